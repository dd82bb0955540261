"""``fragscope fit`` asked about cards, ``fragscope cards``, and runs on cards that differ."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import TRACES
from commands import error_of, json_of, markdown_of
from requests_of import MIB, trace_of

from fragscope.allocator import CARDS, ReplaySettings, recorded_under, replay, rules_for
from fragscope.allocator.cards import Card, define
from fragscope.cli import run
from fragscope.search import on_cards, subject_of
from fragscope.trace import RequestKind, Trace, load_trace, write_trace

GIB = 2**30
MOE = str(TRACES / "moe_list_stack-default.pickle.xz")
OOM = str(TRACES / "oom-default.pickle.xz")

answer, error = partial(json_of, "fit"), partial(error_of, "fit")


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with cards of its own."""
    (tmp_path / "pyproject.toml").write_text(
        '[tool.fragscope]\ncard = "tiny"\n[tool.fragscope.cards.tiny]\nlike = "h100-80gb"\ntotal = "2 GiB"\n'
        'free = "1 GiB"\n[tool.fragscope.cards.small]\nlike = "tiny"\nfree = "1.5 GiB"\n'
    )
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    define(())


def stored(trace: Trace, name: str = "t.fscope") -> str:
    write_trace(trace, Path(name))
    return name


# --- traces -------------------------------------------------------------------------------------------------------


def test_the_room_is_what_a_replay_there_leaves(capsys: pytest.CaptureFixture[str]) -> None:
    value = answer(capsys, MOE, "--card", "l4", "--card", "b200", "--card", "l4")
    assert [c["name"] for c in value["cards"]] == ["l4", "b200"]
    trace = load_trace(MOE)
    own = ReplaySettings.of(recorded_under(trace))
    for found in value["answers"]:
        card = CARDS[found["card"]]
        settings = replace(own, total=card.total, capacity=card.free)
        whole = replay(trace, settings, compiled=False).whole
        assert (found["runs"], found["runs_under"]) == (True, "")
        assert found["held"] == whole.peak.reserved
        assert found["room"] == card.free - whole.peak.reserved
    assert [a["card"] for a in value["answers"]] == ["l4", "b200"], "least room first"


def test_a_conf_that_helps_is_named(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A segment of 500 MiB that a block of 20 MiB keeps serves no 700 MiB, unless it can grow."""
    requests = [("alloc", 0, 500 * MIB), ("free", 0), ("alloc", 1, 20 * MIB), ("alloc", 2, 700 * MIB)]
    path = stored(trace_of(*requests, card="tiny"))
    text = run(["fit", path, "--card", "tiny", "--card", "small"])
    out = capsys.readouterr().out
    value = answer(capsys, path, "--card", "tiny", "--card", "small", code=text)
    by_card = {a["card"]: a for a in value["answers"]}
    assert text == 0, "it runs on both, on one with another conf"
    assert by_card["tiny"]["runs_under"] == "expandable_segments:True"
    assert by_card["tiny"]["held"] == 720 * MIB
    assert [c["runs"] for c in by_card["tiny"]["confs"]] == [False, True]
    assert by_card["tiny"]["confs"][0]["failure"]["event"] == 3
    assert by_card["small"]["runs_under"] == ""
    assert [c["conf"] for c in by_card["small"]["confs"]] == [""], "nothing has to help"
    both = ["--conf", "", "--conf", "expandable_segments:True"]
    asked = answer(capsys, path, "--card", "small", *both)["answers"][0]
    assert [c["conf"] for c in asked["confs"]] == both[1::2], "what is asked for is answered"
    assert by_card["small"]["room"] == 1536 * MIB - 1200 * MIB
    assert "c only under another conf" in out
    assert "t.fscope on tiny, default: event 3 fails, 700.00 MiB" in out
    assert "runs with conf expandable_segments:True" in out


def test_what_fits_nowhere_ends_with_3(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = stored(trace_of(("alloc", 0, 3 * GIB), card="tiny"))
    value = answer(capsys, path, "--card", "small", "--card", "l4", code=3)
    assert [(a["card"], a["runs"]) for a in value["answers"]] == [("small", False), ("l4", True)], "worst first"
    assert value["answers"][0]["confs"][0]["failure"]["requested"] == 3 * GIB


def test_memory_that_others_of_the_process_took_is_not_there() -> None:
    trace = trace_of(("alloc", 0, 100 * MIB), ("alloc", 1, 100 * MIB))
    settings = ReplaySettings.on(CARDS["h100-80gb"], rules_for("2.11"))
    served = replay(trace, settings, compiled=False).trace
    requests = served.requests
    # Samples of device memory in use: 500 MiB of context before anything, 300 MiB more of a library at the end.
    columns = {name: np.repeat(getattr(requests, name), [2, 2]) for name in type(requests).__slots__}
    columns["kind"][[0, 3]] = RequestKind.NON_TORCH
    columns["size"][[0, 3]] = [500 * MIB, 500 * MIB + 300 * MIB + 200 * MIB]
    d = served.decisions
    moved = replace(d, request=np.asarray(d.request) + 1)
    sampled = replace(served, requests=type(requests)(**columns), decisions=moved, source="cuda")
    (found,) = on_cards(subject_of(sampled, "t"), [CARDS["l4"]], [""])
    assert found.other == 300 * MIB
    assert found.free == CARDS["l4"].free - 300 * MIB


def test_a_program_that_learned_about_memory_is_asked_to_run_there(capsys: pytest.CaptureFixture[str]) -> None:
    value = answer(capsys, OOM, "--card", "l4", code=4)
    assert value["answers"][0]["runs"] is None
    assert "caught an OOM" in value["answers"][0]["reason"]
    assert answer(capsys, OOM, "--card", "l4", "--assume-unchanged")["answers"][0]["runs"] is True


def test_estimates_are_said_in_every_format(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = stored(trace_of(("alloc", 0, 21 * GIB), card="l4"))
    assert run(["fit", path, "--card", "l4"]) == 0
    out = capsys.readouterr().out
    assert "free_estimated (effect unknown, 1 events): free memory estimated: l4 was not measured" in out
    lines, cells = markdown_of("fit", capsys, path, "--card", "l4")
    assert cells[0] == ["l4", "case (conf)"]
    room = (CARDS["l4"].free - 21 * GIB) / MIB
    assert cells[2] == [rf"\~{room:,.2f}", "t.fscope (default)"]
    assert any("free\\_estimated" in line for line in lines)
    assert answer(capsys, path, "--card", "l4")["answers"][0]["exact"] is False
    assert answer(capsys, path, "--card", "h100-80gb")["answers"][0]["exact"] is True


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([MOE, "--card", "h100"], "did you mean h100-80gb"),
        ([MOE, "--card", "l4", "--total", "1 GiB"], "--card already says"),
        ([MOE, "--card", "l4", "--conf", "nonsense"], "nonsense"),
        (["results.json", "--torch", "banana"], "'banana' is not a torch release"),
        (["results.json", "--total", "1 GiB"], "name them with --card"),
    ],
)
def test_a_wrong_call_exits_with_2(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("results.json").write_text("{}")
    assert named in error(capsys, *arguments)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("mine.json", '{"run": 1}', "mine.json: is not a results file"),
        ("mine", '\ufeff\n {"schema_version": 9}', "mine: is not a results file"),
        ("results.json", "nothing", "results.json: is not a PyTorch memory snapshot"),
        ("results.json", "", "results.json: is empty"),
        ("missing.json", None, "missing.json: no such file or directory"),
        ("bare/kept", "", "bare: is a folder with neither results.json ('fragscope run' writes it) nor recordings"),
        ("x" * 300, None, "file name too long"),
    ],
)
@pytest.mark.parametrize("cards", [["--card", "l4"], []])
def test_what_a_file_is_its_content_says(
    name: str, content: str | None, said: str, cards: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(content)
    assert said in error(capsys, "bare" if name == "bare/kept" else name, *cards, code=5)


# --- results ------------------------------------------------------------------------------------------------------

SCENARIO = """
import torch

import fragscope


@fragscope.scenario("s", presets={"p": {"mib": 900}}, variant="plain")
def s(case):
    with case.measure():
        a = torch.empty(case.mib, 2**20, dtype=torch.int8, device="cuda")


@s.variant("product", role="proposed")
def _(case):
    with case.measure():
        a = torch.empty(128, 128, device="cuda")
        b = a @ a


@s.variant("by-processor", role="proposed")
def _(case):
    with case.measure():
        n = torch.cuda.get_device_properties(0).multi_processor_count
        a = torch.empty(n, 2**20, dtype=torch.int8, device="cuda")


@s.variant("by-memory", role="proposed")
def _(case):
    with case.measure():
        a = torch.empty(torch.cuda.mem_get_info()[0] // 2, dtype=torch.int8, device="cuda")
"""


@pytest.fixture
def ran(repository: Path, capsys: pytest.CaptureFixture[str]) -> dict[tuple[str, str], Any]:
    """A run on three cards: results by variant and card."""
    pytest.importorskip("torch")
    (repository / "scenario_s.py").write_text(SCENARIO)
    cards = [word for name in ("h100-80gb", "l4", "h200", "tiny") for word in ("--card", name)]
    assert run(["run", "scenario_s.py", "--device", "virtual", "--no-report", *cards]) == 0
    assert "fragscope: l4, h200: free memory estimated, " in capsys.readouterr().err
    results = json.loads((repository / ".fragscope/results.json").read_text())
    assert results["run"]["cards"]["l4"]["estimated"] == ["total", "free"]
    assert results["run"]["cards"]["tiny"]["estimated"] == []
    return {(c["variant"], c["card"]): c for c in results["cases"]}


@pytest.mark.torch
def test_every_card_answers_for_itself(ran: dict[tuple[str, str], Any]) -> None:
    def allocated(variant: str, card: str) -> int:
        return int(ran[variant, card]["peak"]["allocated"])

    # parseChosenWorkspaceSize of PyTorch's CublasHandlePool.cpp: 32 MiB on Hopper, else 4096 KiB twice and 16 KiB
    # eight times; beside two matrices of 64 KiB.
    matrices = 2 * 128 * 128 * 4
    assert allocated("product", "h100-80gb") == 32 * MIB + matrices
    assert allocated("product", "h200") == 32 * MIB + matrices
    assert allocated("product", "l4") == 8_519_680 + matrices
    for card, processors in (("h100-80gb", 132), ("l4", 58), ("h200", 132), ("tiny", 132)):
        assert allocated("by-processor", card) == processors * MIB
        assert ran["by-processor", card]["exact"], "it was asked on that card"
        assert ran["plain", card]["exact"]
        assert [ran[variant, card]["any_card"] for variant in ("plain", "by-processor", "product")] == [
            True,
            False,
            False,
        ]
    assert [op["op"] for op in ran["product", "l4"]["estimated_ops"]] == ["cuBLAS workspace"]
    assert not ran["product", "l4"]["exact"]
    assert ran["product", "h200"]["exact"], "matrix products were recorded on a card of that capability"


def codes(found: dict[str, Any]) -> set[str]:
    return {a["code"] for a in found["confs"][0]["assumptions"]}


@pytest.mark.torch
def test_cases_of_a_run_are_held_against_cards(
    ran: dict[tuple[str, str], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    value = answer(capsys, ".fragscope", "--card", "tiny", "--card", "h200", "--card", "a10", code=4)
    found = {(a["name"], a["card"]): a for a in value["answers"]}
    assert found["s/p/plain", "tiny"]["room"] == (1024 - 900) * MIB
    assert found["s/p/plain", "a10"]["room"] == CARDS["a10"].free - 900 * MIB
    # What read memory on a card is known there; elsewhere it would have to be run.
    assert found["s/p/by-memory", "h200"]["runs"] is True
    assert found["s/p/by-memory", "a10"]["runs"] is None
    assert "torch.cuda.mem_get_info" in found["s/p/by-memory", "a10"]["reason"]
    # A product's workspace was recorded elsewhere; what asked for nothing of the card is the same on all.
    assert "other_card" in codes(found["s/p/product", "a10"])
    assert "other_card" not in codes(found["s/p/plain", "a10"])
    assert found["s/p/product", "h200"]["exact"]
    Path(".fragscope/results.json").rename(".fragscope/monday")
    assert run(["fit", ".fragscope/monday"]) == 4, "without --card, all that are known"
    heading = next(line for line in capsys.readouterr().out.splitlines() if line.endswith("case (conf)"))
    assert heading.split()[:2] == ["tiny", "small"]
    assert set(heading.split()) >= set(CARDS)


@pytest.mark.torch
@pytest.mark.parametrize("otherwise", [["--capacity", "700 MiB"], ["--torch", "2.9"]], ids=lambda words: words[0])
def test_a_case_of_other_memory_or_another_release_is_not_the_card_s_own(
    otherwise: list[str], repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch")
    (repository / "scenario_s.py").write_text(SCENARIO)
    assert run(["run", "scenario_s.py", "--device", "virtual", "--no-report", "--card", "tiny", *otherwise]) in (0, 3)
    capsys.readouterr()
    asked = ["--torch", "2.11"] if otherwise[0] == "--torch" else []
    value = answer(capsys, ".fragscope", "--card", "tiny", *asked, code=4)
    found = {a["name"]: a for a in value["answers"]}
    assert found["s/p/by-memory"]["runs"] is None, "it took half of what was free when it was recorded"
    assert "torch.cuda.mem_get_info" in found["s/p/by-memory"]["reason"]
    assert found["s/p/product"]["runs"] is True, "it asked for nothing of the kind"


@pytest.mark.torch
def test_a_conf_that_was_asked_for_is_not_left_out(
    ran: dict[tuple[str, str], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """What read memory is known on its own card under its own conf only."""
    other, own = "expandable_segments:True", ""
    confs = ["--conf", other, "--conf", own]
    value = answer(capsys, ".fragscope", "--card", "tiny", *confs)
    found = {a["name"]: a for a in value["answers"]}["s/p/by-memory"]
    assert (found["runs"], found["runs_under"], found["exact"], found["unsaid"]) == (True, own, True, [other])
    assert "torch.cuda.mem_get_info" in found["reason"]
    run(["fit", ".fragscope", "--card", "tiny", *confs])
    assert f"s/p/by-memory on tiny, {other}: the program called torch.cuda.mem_get_info" in capsys.readouterr().out
    value = answer(capsys, ".fragscope", "--card", "tiny", *confs, "--assume-unchanged")
    found = {a["name"]: a for a in value["answers"]}["s/p/by-memory"]
    assert [(c["conf"], c["runs"]) for c in found["confs"]] == [(other, True), (own, True)]
    assert found["unsaid"] == []
    only = answer(capsys, ".fragscope", "--card", "tiny", "--conf", other, code=4)
    assert {a["name"]: a for a in only["answers"]}["s/p/by-memory"]["runs"] is None


@pytest.mark.torch
def test_results_of_strangers_lead_nowhere_else(
    ran: dict[tuple[str, str], Any], repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = repository / ".fragscope/results.json"
    results = json.loads(file.read_text())
    write_trace(trace_of(("alloc", 0, MIB)), repository / "secret.fscope")
    results["cases"] = [dict(results["cases"][0], trace="../secret.fscope", scenario="s\x1b[2J|x")]
    file.write_text(json.dumps(results))
    assert run(["fit", ".fragscope", "--card", "l4"]) == 4
    out = capsys.readouterr().out
    assert "lies outside the folder" in out
    assert "\x1b" not in out
    assert run(["fit", ".fragscope", "--card", "l4", "--format", "markdown"]) == 4
    assert r"\|x" in capsys.readouterr().out
    file.write_text("{")
    assert "results.json" in error(capsys, ".fragscope", "--card", "l4", code=5)


# --- cards elsewhere ----------------------------------------------------------------------------------------------


def test_cards_are_listed_with_their_source(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    value = json_of("cards", capsys)
    assert value["schema_version"] == 1
    by_name = {card["name"]: card for card in value["cards"]}
    assert by_name["h100-80gb"] == {
        "name": "h100-80gb",
        "product": "NVIDIA H100 80GB HBM3",
        "total": 85_017_493_504,
        "free": 84_465_090_560,
        "capability": "9.0",
        "multiprocessors": 132,
        "l2": 52_428_800,
        "measured": True,
        "estimated": [],
        "source": "measured: driver 580.159.04, CUDA 13.0, torch 2.11.0+cu130",
    }
    assert not by_name["l4"]["measured"]
    assert by_name["tiny"]["source"] == "pyproject.toml:3, like h100-80gb"
    assert [card["name"] for card in value["cards"]][-2:] == ["tiny", "small"], "one's own come last"
    assert run(["cards"]) == 0
    out = capsys.readouterr().out
    assert "~22,491.25" in out
    assert " 81,079.00" in out
    assert "pyproject.toml:3, like h100-80gb" in out


def test_a_card_of_ones_own_is_taken_by_every_command(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = stored(trace_of(("alloc", 0, 900 * MIB), ("alloc", 1, 300 * MIB), card=None))
    replays = json_of("replay", capsys, path, "--card", "tiny", "--card", "small")["replays"]
    assert [(r["card"], r["capacity"], len(r["ooms"])) for r in replays] == [
        ("tiny", GIB, 1),
        ("small", 3 * GIB // 2, 0),
    ]
    tuned = json_of("tune", capsys, path, "--card", "tiny", "--jobs", "1")
    assert tuned["traces"][0]["card"] == "tiny"
    thresholds = json_of("thresholds", capsys, "--model", "deepseek-v3")
    assert (thresholds["settings"]["card"], thresholds["settings"]["capacity"]) == ("tiny", GIB)


def test_processes_that_search_know_the_cards(repository: Path) -> None:
    """As ``tune`` starts them where a search is long."""
    path = stored(trace_of(("alloc", 0, 900 * MIB), ("alloc", 1, 300 * MIB), card=None))
    card = asdict(Card("tiny", "Tiny", 2 * GIB, GIB, (9, 0), 4, MIB, "here", ("l2",)))
    given = {"cards": [card], "subjects": [[path, {"card": "tiny"}]], "compiled": False}
    command = [sys.executable, "-m", "fragscope.search.worker"]
    done = subprocess.run(command, input=f'{json.dumps(given)}\n""\n', capture_output=True, text=True, check=True)
    (figures,) = json.loads(done.stdout)["figures"]
    assert figures["ooms"] == 1, "1.2 GiB do not fit into 1 GiB"


def test_a_wrong_card_of_ones_own_ends_each_command_with_5(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pyproject.toml").write_text('[tool.fragscope.cards.mine]\nlike = "l4"\nfre = 3\n')
    for command in (["cards"], ["fit", MOE, "--card", "l4"], ["replay", MOE, "--card", "l4"], ["thresholds"]):
        assert run(command) == 5
        assert "pyproject.toml: line 3: [tool.fragscope.cards.mine] unknown key 'fre'" in capsys.readouterr().err
