"""The parts of ``tests/gpu/whole_programs.py`` that need no GPU: footprints, and the table of both devices."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
sys.path.insert(0, str(Path(__file__).parents[1] / "gpu"))
import whole_programs  # noqa: E402
from op_footprints import footprints_of  # noqa: E402
from whole_programs import Job, Jobs, on_virtual, report, what_differs  # noqa: E402

from fragscope.allocator import card_named  # noqa: E402

pytestmark = pytest.mark.torch
CARD = card_named("h100-80gb")
MIB = 2**20


def test_an_operators_footprint_is_what_it_allocates_between_its_begin_and_its_end():
    a, b = torch.ones(32, 64), torch.ones(64, 16)

    def program():
        for _ in range(2):
            torch.mm(a, b)
        torch.mm(b.t(), b)

    def sort():
        return a.sort(-1)

    found = footprints_of(program, "cpu")["aten::mm"]
    assert [(f["events"], f["temporary"], f["calls"]) for f in found] == [
        ([["alloc", 32 * 16 * 4]], 0, 2),
        ([["alloc", 16 * 16 * 4]], 0, 1),
    ]
    results = [e[1] for e in footprints_of(sort, "cpu")["aten::sort"][0]["events"] if e[0] == "alloc"]
    assert results[:2] == [32 * 64 * 4, 32 * 64 * 8]
    assert footprints_of(program, "cuda") == {}


def jobs_of(tmp_path, monkeypatch):
    """One program, which on the card takes a temporary that nobody foresaw."""
    monkeypatch.setitem(
        whole_programs.PROGRAMS, "small", lambda: torch.empty(3 * MIB, dtype=torch.uint8, device="cuda")
    )

    def on_card():
        torch.empty(3 * MIB, dtype=torch.uint8, device="cuda")
        torch.empty(8 * MIB, dtype=torch.uint8, device="cuda")

    jobs = {}
    for tag, conf in whole_programs.CONFS.items():
        said = Job("small", lambda: None)
        said.result = on_virtual("small", CARD, conf, tmp_path / f"small-virtual-{tag}.fscope")
        said.result["estimated"] = {"aten::sort": [4, "model.py:7"]}
        jobs["small", f"virtual-{tag}"] = said
    monkeypatch.setitem(whole_programs.PROGRAMS, "small", on_card)
    for tag, conf in whole_programs.CONFS.items():
        done = Job("small", lambda: None)
        done.result = on_virtual("small", CARD, conf, tmp_path / f"small-card-{tag}.fscope")
        jobs["small", f"card-{tag}"] = done
    measured = jobs["small", "footprints"] = Job("small", lambda: None)
    measured.result = {"aten::sort": 4096}
    return jobs


def test_the_table_says_what_was_predicted_what_was_measured_and_what_is_missing(tmp_path, monkeypatch):
    text = report(tmp_path, ["small"], jobs_of(tmp_path, monkeypatch))
    assert "| small | default | ok | 3.00 | 8.00 | -5,242,880 B (-62.50%) |" in text
    assert "| aten::sort | 4 | small | model.py:7 | 4,096 |" in text
    assert "small: 1 sizes asked for another number of times" in text
    assert "  8,388,608 B: 0 said, 1 on the card" in text
    assert what_differs(tmp_path / "small-virtual-default.fscope", tmp_path / "small-card-default.fscope") == [
        [8 * MIB, 0, 1]
    ]


def test_a_program_that_fails_is_a_line_of_the_table(tmp_path, monkeypatch):
    jobs = jobs_of(tmp_path, monkeypatch)
    jobs["small", "virtual-default"].error = "UnsupportedError: no"
    jobs["small", "card-expandable"].error = "the process died; see its log"
    text = report(tmp_path, ["small"], jobs)
    assert "virtual: UnsupportedError: no" in text
    assert "GPU: the process died" in text


def test_jobs_that_fail_die_or_take_too_long_do_not_stop_the_others(tmp_path, capsys):
    import os
    import time

    (tmp_path / "jobs").mkdir()
    good, bad = Job("good", lambda: {"n": 1}), Job("bad", lambda: 1 / 0)
    dead, slow = Job("dead", lambda: os._exit(3)), Job("slow", lambda: time.sleep(600), on_card=True)
    Jobs(tmp_path, 5.0, 2).run([slow, dead, bad, good])
    assert (good.result, good.error) == ({"n": 1}, "")
    assert bad.error == "ZeroDivisionError: division by zero"
    assert dead.error == "the process died; see its log"
    assert slow.error == "stopped after 5 s"
