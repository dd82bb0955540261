"""What happens to a program is its result: figures, outcomes and messages of one run over many small scenarios."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from scenario_files import MIB, cases_in, results_in, run_in, write_scenarios

pytest.importorskip("torch")
pytestmark = pytest.mark.torch

FIGURES = """
    import gc

    ONE = {"one": {}}
    MIB = 2**20

    @fragscope.scenario("figures", presets=ONE)
    def _(case):
        base = [on_card(1000), on_card(3 * MIB)]
        with case.measure():
            temporary = on_card(5 * MIB)
            kept = on_card(700)
            del temporary
            large = on_card(12 * MIB)

    class Node:
        pass

    def cycle():
        node = Node()
        node.itself, node.data = node, on_card(4 * MIB)

    @fragscope.scenario("cycle", presets=ONE)
    def _(case):
        cycle()
        gc.enable()
        with case.measure():
            for _ in range(3):
                cycle()
            gc_inside = gc.isenabled()
        assert not gc_inside and gc.isenabled()

    @fragscope.scenario("caught-oom", presets=ONE)
    def _(case):
        with case.measure():
            try:
                on_card(200 * 2**30)
            except torch.OutOfMemoryError:
                kept = on_card(1 * MIB)

    @fragscope.scenario("wrapped", presets=ONE)
    @torch.no_grad()
    def _(case):
        with case.measure():
            kept = on_card(1 * MIB)
"""

ENDS = """
    import ctypes, multiprocessing, os, subprocess, sys, threading

    ONE = {"one": {}}

    def ends(name, expect):
        return fragscope.scenario(name, presets=ONE, expect=expect)

    @ends("abort", "crash")
    def _(case):
        print("said before")
        os.abort()

    @ends("segfault", "crash")
    def _(case):
        ctypes.string_at(0)

    @ends("sys-exit", "crash")
    def _(case):
        sys.exit(0)

    @ends("os-exit", "crash")
    def _(case):
        os._exit(0)

    @ends("keyboard-interrupt", "crash")
    def _(case):
        raise KeyboardInterrupt

    @ends("hang", "timeout")
    def _(case):
        with case.measure():
            threading.Event().wait()

    @ends("threads-left", "ok")
    def _(case):
        threading.Thread(target=threading.Event().wait).start()
        multiprocessing.get_context("fork").Process(target=threading.Event().wait).start()
        with case.measure():
            kept = on_card(512)

    @ends("thread-fails", "crash")
    def _(case):
        def work():
            raise ValueError("not in the main thread")
        with case.measure():
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()

    @ends("moves", "ok")
    def _(case):
        os.chdir("/")
        sys.path.insert(0, "/nowhere")
        sys.stdout = None
        with case.measure():
            kept = on_card(512)

    @ends("reads-input", "crash")
    def _(case):
        input()

    @ends("overflow", "overflow")
    def _(case):
        with case.measure():
            kept = on_card(4 * 2**20)
            case.overflow(1234, "a workspace of 5 MiB, sized for another layer")

    @ends("waits", "timeout")
    def _(case):
        with case.measure():
            case.end("timeout", "ranks 0 and 1 wait")

    @ends("oom", "oom")
    def _(case):
        base = on_card(3 * 2**20)
        with case.measure():
            kept = on_card(4 * 2**20)
            on_card(200 * 2**30)

    @ends("oom-before", "oom")
    def _(case):
        on_card(200 * 2**30)

    @ends("unsupported", "unsupported")
    def _(case):
        with case.measure():
            on_card(512)[0].item()                              # the place

    @ends("skipped", "skipped")
    def _(case):
        case.skip("needs 39,454 MiB")

    @ends("never", "crash")
    def _(case):
        pass

    @ends("twice", "crash")
    def _(case):
        for _ in range(2):
            with case.measure():
                pass

    @ends("raises-inside", "crash")
    def _(case):
        with case.measure():
            kept = on_card(3 * 2**20)
            raise ValueError("é" * 5000 + "\\n\\x1b[31m\\udcff")   # raised here

    @ends("raises-before", "crash")
    def _(case):
        raise ValueError("früh")
"""

NUMERIC = """
    import os, threading

    def steps(name, outputs, tolerance=None, **variants):
        first = variants.pop("first", "ok")
        made = fragscope.scenario(name, presets={"one": {}}, variant="first", expect=first)(measured)
        for variant, expect in variants.items():
            made.variant(variant, role="fixed", expect=expect)(measured)
        if tolerance is None:
            made.numeric(outputs)
        else:
            made.numeric(tolerance=tolerance)(outputs)
        return made

    def measured(case):
        with case.measure():
            kept = on_card(512)

    def random(variant, device):
        out = torch.rand(8, device=device)
        if variant == "off":
            out.view(torch.int32)[3] ^= -1
            return [torch.zeros(2), out]
        if variant == "raises":
            raise ValueError("cannot")
        if variant == "nothing":
            return None
        if variant == "short":
            return []
        return (torch.zeros(2), out)

    steps("differs", random, same="ok", off="wrong", raises="wrong", nothing="wrong", short="wrong")
    steps("dies", lambda variant, device: os.abort(), first="wrong")
    steps("hangs", lambda variant, device: threading.Event().wait(), first="wrong")

    def nearly(variant, device):
        exact = torch.tensor([1.0, 100.0, 0.0], dtype=torch.bfloat16)
        return exact + torch.tensor({"near": [0.0, 0.5, 1e-4], "far": [0.02, 0.0, 0.0]}.get(variant, [0.0] * 3))

    steps("near", nearly, tolerance=(0.01, 1e-3), near="ok", far="wrong")

    checked = steps("referenced", lambda variant, device: torch.arange(3), first="wrong")
    @checked.reference
    def _(device):
        return [torch.arange(3) + 1]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run over everything; exit code 0 says that every outcome is the declared one."""
    folder = tmp_path_factory.mktemp("outcomes")
    write_scenarios(folder, "figures", FIGURES)
    write_scenarios(folder, "ends", ENDS)
    write_scenarios(folder, "numeric", NUMERIC)
    run_in(folder, ".", "--timeout", "5")
    return folder


@pytest.fixture(scope="module")
def cases(folder: Path) -> dict[str, dict[str, Any]]:
    """Its cases by scenario and variant."""
    return cases_in(folder)


def line_of(folder: Path, file: str, marker: str) -> str:
    lines = (folder / file).read_text().splitlines()
    return f"{file}:{next(n for n, line in enumerate(lines, 1) if marker in line)}"


def test_figures_are_those_of_the_measured_phase(cases: dict[str, dict[str, Any]]) -> None:
    """By hand, from the allocator's rules: sizes round up to 512; up to 1 MiB comes from a 2 MiB segment, less than
    10 MiB from a 20 MiB one, more from a segment of its own rounded up to 2 MiB."""
    case = cases["figures/original"]
    base, end = 1024 + 3 * MIB, 1024 + 3 * MIB + 1024 + 12 * MIB
    peak = end  # more than with the 5 MiB temporary, which is gone before the 12 MiB come
    assert (case["base"], case["end_live"], case["retained"]) == (base, end, end - base)
    assert (case["peak"]["allocated"], case["transient"]) == (peak, 0)
    # 700 and 1000 bytes share the 2 MiB segment; 12 MiB fit what is left of the 20 MiB one.
    assert case["peak"]["reserved"] == 22 * MIB
    assert case["peak"]["requested"] == 1000 + 3 * MIB + 700 + 12 * MIB
    assert (case["allocs"], case["driver_calls"]["alloc"], case["segments_peak"]) == (3, 0, 2)
    assert case["after_empty_cache"]["reserved"] == 22 * MIB
    assert (case["exact"], case["message"], case["ooms"]) == (True, "", [])


def test_cyclic_garbage_made_inside_stays_and_that_from_before_goes(cases: dict[str, dict[str, Any]]) -> None:
    case = cases["cycle/original"]
    assert case["outcome"] == "ok", case["message"]
    assert (case["base"], case["end_live"], case["peak"]["allocated"]) == (0, 12 * MIB, 12 * MIB)


def test_an_oom_that_the_program_handles_is_listed(cases: dict[str, dict[str, Any]]) -> None:
    case = cases["caught-oom/original"]
    assert (case["outcome"], case["end_live"]) == ("ok", MIB)
    assert [(o["requested"], o["stream"]) for o in case["ooms"]] == [(200 * 2**30, 0)]


def test_a_decorated_body_is_measured(cases: dict[str, dict[str, Any]]) -> None:
    assert cases["wrapped/original"]["end_live"] == MIB


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("abort", "the process was ended by SIGABRT (at scenario_ends.py:"),
        ("segfault", "the process was ended by SIGSEGV (at scenario_ends.py:"),
        ("sys-exit", "SystemExit: 0 (at scenario_ends.py:"),
        ("os-exit", "the process ended with code 0"),
        ("keyboard-interrupt", "KeyboardInterrupt (at scenario_ends.py:"),
        ("hang", "the process took longer than 5 s and was stopped (at scenario_ends.py:"),
        ("thread-fails", "in a thread: ValueError: not in the main thread (at scenario_ends.py:"),
        ("reads-input", "EOFError"),
        ("oom-before", "before the measured phase: CUDA out of memory. Tried to allocate 200.00 GiB"),
        ("skipped", "needs 39,454 MiB"),
        ("never", "the scenario never entered case.measure()"),
        ("twice", "UsageError: twice/original: case.measure() is entered twice"),
        ("raises-before", "ValueError: früh (at scenario_ends.py:"),
    ],
)
def test_an_outcome_says_what_happened(cases: dict[str, dict[str, Any]], name: str, message: str) -> None:
    case = cases[f"{name}/original"]
    assert case["outcome"] == case["expected_outcome"]
    assert case["message"].startswith(message)
    assert case["message"].isprintable()


def test_the_last_words_of_a_crash_are_in_its_message(cases: dict[str, dict[str, Any]]) -> None:
    assert cases["abort/original"]["message"].endswith(": said before")


@pytest.mark.parametrize("name", ["threads-left", "moves"])
def test_what_a_program_leaves_behind_does_not_change_its_figures(cases: dict[str, dict[str, Any]], name: str) -> None:
    case = cases[f"{name}/original"]
    assert (case["outcome"], case["end_live"]) == ("ok", 512), case["message"]
    assert case["seconds"] < 4  # and is not waited for until the timeout


def test_an_oom_keeps_base_and_peak(cases: dict[str, dict[str, Any]]) -> None:
    case = cases["oom/original"]
    assert (case["base"], case["peak"]["allocated"]) == (3 * MIB, 7 * MIB)
    assert [o["requested"] for o in case["ooms"]] == [200 * 2**30]
    assert not case["exact"]


def test_unsupported_names_the_line(folder: Path, cases: dict[str, dict[str, Any]]) -> None:
    assert cases["unsupported/original"]["message"].endswith(
        f"(at {line_of(folder, 'scenario_ends.py', '# the place')})"
    )


def test_an_error_inside_keeps_the_figures_and_a_bounded_message(
    folder: Path, cases: dict[str, dict[str, Any]]
) -> None:
    case = cases["raises-inside/original"]
    assert case["peak"]["allocated"] == 3 * MIB
    assert case["message"].startswith("ValueError: ééé")
    assert case["message"].endswith(f"(at {line_of(folder, 'scenario_ends.py', '# raised here')})")
    assert len(case["message"]) < 700
    assert case["message"].isprintable()


def test_a_scenario_says_itself_how_it_ended(cases: dict[str, dict[str, Any]]) -> None:
    case = cases["overflow/original"]
    assert (case["outcome"], case["missing"]) == ("overflow", 1234)
    assert case["message"] == "a workspace of 5 MiB, sized for another layer"
    assert case["peak"]["allocated"] == 4 * MIB
    assert (cases["waits/original"]["outcome"], cases["waits/original"]["message"]) == ("timeout", "ranks 0 and 1 wait")


def test_the_log_has_the_traceback(folder: Path, cases: dict[str, dict[str, Any]]) -> None:
    log = folder / "out" / "logs" / f"{cases['raises-before/original']['digest']}.log"
    assert "Traceback" in log.read_text()
    assert "früh" in log.read_text()


def test_traces_are_there_where_a_phase_was_entered(folder: Path, cases: dict[str, dict[str, Any]]) -> None:
    for name in ("figures", "oom", "raises-inside", "unsupported"):
        assert (folder / "out" / cases[f"{name}/original"]["trace"]).is_file()
    for name in ("never", "skipped", "hang", "raises-before"):
        assert cases[f"{name}/original"]["trace"] is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("differs/off", "numerics: tensor 1 differs in 4 of 32 bytes"),
        ("differs/raises", "numerics: ValueError: cannot"),
        ("differs/nothing", "numerics: returns a NoneType, not a sequence of tensors"),
        ("differs/short", "numerics: makes 0 tensors, not 2"),
        ("dies/first", "numerics: the numeric step was ended by SIGABRT (at scenario_numeric.py:"),
        ("hangs/first", "numerics: the numeric step took longer than 5 s and was stopped (at scenario_numeric.py:"),
        ("near/far", "numerics: tensor 0 is out of tolerance in 1 of 3 numbers"),
        ("referenced/first", "numerics: tensor 0 differs in 3 of 24 bytes"),
    ],
)
def test_wrong_numbers_do_not_hide_figures(cases: dict[str, dict[str, Any]], name: str, message: str) -> None:
    case = cases[name]
    assert case["outcome"] == "wrong"
    assert case["message"].startswith(message)
    assert case["numeric"]["agree"] is False
    assert case["end_live"] == 512


def test_random_inputs_are_the_same_for_every_variant(cases: dict[str, dict[str, Any]]) -> None:
    for variant in ("first", "same"):
        assert cases[f"differs/{variant}"]["outcome"] == "ok"
    assert cases["differs/first"]["numeric"]["compared_with"] == "first"


def test_the_log_of_a_numeric_step_that_failed_is_kept(folder: Path) -> None:
    assert "ValueError: cannot" in (folder / "out" / "logs" / "numeric-differs.log").read_text()


REPEATED = """
    from pathlib import Path

    def counted(case):
        with Path(__file__).with_name("runs.txt").open("a") as runs:
            runs.write(case.scenario + "\\n")

    @fragscope.scenario("pure", presets={"one": {}})
    def _(case):
        counted(case)
        with case.measure():
            kept = on_card(12 * 2**20)

    @fragscope.scenario("looks", presets={"one": {}})
    def _(case):
        counted(case)
        with case.measure():
            kept = on_card(torch.cuda.mem_get_info()[0] // 2**20)

    @fragscope.scenario("too-large", presets={"one": {}}, expect="oom")
    def _(case):
        counted(case)
        base = on_card(30 * 2**20)
        with case.measure():
            kept = on_card(60 * 2**20)
            more = on_card(60 * 2**20)
"""


def test_a_recording_serves_other_settings_unless_it_depends_on_them(tmp_path: Path) -> None:
    """Under 100 MiB: 12 MiB fit, 30 + 60 + 60 do not, and what reads free memory runs once for each setting."""
    write_scenarios(tmp_path, "repeated", REPEATED)
    run_in(tmp_path, ".", "--torch", "2.11", "--torch", "2.12", "--torch", "2.13", "--capacity", "100 MiB")
    runs = (tmp_path / "runs.txt").read_text().split()
    assert {name: runs.count(name) for name in set(runs)} == {"pure": 1, "looks": 3, "too-large": 3}
    cases = results_in(tmp_path)["cases"]
    assert [c["torch"] for c in cases] == ["2.11", "2.12", "2.13"] * 3
    assert len({c["trace"] for c in cases}) == 9
    for case in cases:
        assert case["capacity"] == 100 * MIB
        if case["scenario"] == "too-large":
            assert (case["base"], case["peak"]["allocated"]) == (30 * MIB, 90 * MIB)
        if case["scenario"] == "looks":
            assert case["peak"]["requested"] == 100
