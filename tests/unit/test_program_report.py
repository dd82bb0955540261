"""The parts of ``tests/gpu/whole_programs.py`` that need no GPU: footprints, jobs, and the report of both devices."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
sys.path.insert(0, str(Path(__file__).parents[1] / "gpu"))
import whole_programs  # noqa: E402
from op_footprints import footprints_of  # noqa: E402
from program_report import assumed_in, report, requests_compared, verified_in  # noqa: E402
from whole_programs import Job, Jobs, on_virtual, results_of, within_package  # noqa: E402

from fragscope.allocator import ReplaySettings, card_named, rules_for  # noqa: E402
from fragscope.record.virtual import VirtualDevice  # noqa: E402
from fragscope.trace import load_trace, write_trace  # noqa: E402

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


TRACES = Path(__file__).parents[1] / "data" / "traces"


def on_fake_card(file):
    """What the virtual device did stands for a card."""
    return {**on_virtual("small", CARD, "", file), "verified": {"compared": 7, "mismatches": 1}}


def jobs_of(tmp_path, monkeypatch, on_card):
    """A program that is said to take 3 MiB and a copy of them, and does otherwise on the card."""

    def said_program():
        copied = torch.empty(3 * MIB, dtype=torch.uint8, device="cuda").clone()
        del copied

    jobs = {}
    monkeypatch.setitem(whole_programs.PROGRAMS, "small", said_program)
    for tag, conf in whole_programs.CONFS.items():
        said = jobs["small", f"virtual-{tag}"] = Job("small", dict)
        said.result = on_virtual("small", CARD, conf, tmp_path / f"small-virtual-{tag}.fscope")
        said.result["estimated"] = {"aten::sort": [4, "model.py:7"]} if tag == "default" else {}
    monkeypatch.setitem(whole_programs.PROGRAMS, "small", on_card)
    for tag in whole_programs.CONFS:
        done = jobs["small", f"card-{tag}"] = Job("small", dict)
        done.result = on_fake_card(tmp_path / f"small-card-{tag}.fscope")
    measured = jobs["small", "footprints"] = Job("small", dict)
    measured.result = {"aten::sort": 4096, "aten::add": 512}
    return jobs


def more_on_card():
    first = torch.empty(3 * MIB, dtype=torch.uint8, device="cuda")
    torch.empty(8 * MIB, dtype=torch.uint8, device="cuda")
    del first


def test_the_tables_say_what_was_predicted_what_was_measured_and_what_is_missing(tmp_path, monkeypatch):
    results = results_of(tmp_path, CARD, ["small"], jobs_of(tmp_path, monkeypatch, more_on_card))
    assert results["programs"]["small"]["footprints"]["result"] == {"aten::sort": 4096}
    text = report(json.loads(json.dumps(results)))
    rows = [line for line in text.splitlines() if line.startswith("| small |")]
    assert "| small | default | ok | 6.00 | 11.00 | -5,242,880 B (-45.45%) |" in rows[0]
    assert rows[0].endswith("| 2 sizes differ | estimated: 1 unknown operator |")
    assert rows[1].endswith("| 2 sizes differ | exact |")
    assert rows[2:] == ["| small | 8,388,608 | 0 | 1 |", "| small | 3,145,728 | 2 | 1 |"]
    assert "| aten::sort | 4 | small | model.py:7 | 4,096 |" in text
    assert "- Both figures equal to the byte: 0 of 2\n- Of those said to be exact: 0 of 1\n" in text
    assert "- Peak of requested bytes equal: 0 of 2\n" in text
    assert "- Every request equal, in order: 0 of 2\n" in text
    assert "decisions: 2 of 14 differ\n" in text


def test_requests_are_held_against_each_other_in_order(tmp_path, monkeypatch):
    def two(frees):
        def program():
            tensors = [torch.empty(n * MIB, dtype=torch.uint8, device="cuda") for n in (3, 3, 5)]
            for n in frees:
                tensors[n] = None

        return program

    files = {}
    for name, program in {"a": two([0, 1, 2]), "b": two([0, 1, 2]), "c": two([1, 0, 2])}.items():
        monkeypatch.setitem(whole_programs.PROGRAMS, "small", program)
        files[name] = tmp_path / f"{name}.fscope"
        on_virtual("small", CARD, "", files[name])
    assert requests_compared(files["a"], files["b"]) == {
        "requests": "equal", "sizes": [], "peak_requested": [11 * MIB, 11 * MIB],
    }  # fmt: skip
    # of equal blocks, too
    assert requests_compared(files["a"], files["c"])["requests"] == "frees in another order"


@pytest.mark.parametrize(("release", "codes"), [("2.11.0", ["tie_by_modelled_address"]), ("2.12.0", [])])
def test_what_can_change_the_figures_is_kept(tmp_path, release, codes):
    """Of two free halves of segments the one at the lower address is taken, up to 2.11."""
    settings = ReplaySettings(rules_for(release), CARD.name, CARD.total, CARD.free)
    with VirtualDevice(CARD, settings) as device:
        tensors = [torch.empty(MIB, dtype=torch.uint8, device="cuda") for _ in range(4)]
        tensors[0] = tensors[2] = None
        torch.empty(MIB, dtype=torch.uint8, device="cuda")
        write_trace(device.trace({}), tmp_path / "ties.fscope")
    assert assumed_in(tmp_path / "ties.fscope") == codes


def test_a_recording_of_a_card_is_held_against_the_model():
    file = TRACES / "train_vit-default.pickle.xz"
    verified = verified_in(file)
    assert verified["compared"] > len(load_trace(file).requests)  # each request, segments, statistics
    assert verified["mismatches"] == 0


def test_places_in_packages_do_not_say_where_this_machine_keeps_them():
    assert within_package("/opt/env/lib/python3.12/site-packages/timm/layers/norm.py:7") == "timm/layers/norm.py:7"
    assert within_package("tests/gpu/model_programs.py:7") == "tests/gpu/model_programs.py:7"


def test_a_program_that_fails_is_a_line_of_the_table(tmp_path, monkeypatch):
    jobs = jobs_of(tmp_path, monkeypatch, more_on_card)
    for kind, error in (("virtual-default", "UnsupportedError: no"), ("card-expandable", "it died")):
        jobs["small", kind].error, jobs["small", kind].result = error, None
    text = report(results_of(tmp_path, CARD, ["small"], jobs))
    assert "| small | default | virtual: UnsupportedError: no | - | - |" in text
    assert "| small | expandable | GPU: it died | 6.00 | - | - |" in text
    assert "equal to the byte" not in text


def test_without_a_gpu_nothing_is_said_to_be_measured(tmp_path, monkeypatch):
    jobs = {k: j for k, j in jobs_of(tmp_path, monkeypatch, more_on_card).items() if k[1].startswith("virtual")}
    text = report(results_of(tmp_path, CARD, ["small"], jobs))
    assert "| small | default | ok | 6.00 | - | - | 20.00 | - | - | - | estimated: 1 unknown operator |" in text


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


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "name either FOLDER or --table"),
        (["folder", "--table", "results.json"], "name either FOLDER or --table"),
        (["--table", "missing.json"], "missing.json is no results.json of this command: FileNotFoundError"),
        (["--table", "other.json"], "other.json is no results.json of this command: KeyError: 'programs'"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.json").write_text("{}")
    monkeypatch.setattr(sys, "argv", ["whole_programs.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        whole_programs.main()
    assert ended.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
