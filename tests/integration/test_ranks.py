"""Functions in real processes: healthy ones, ones that hang, ones that fail; and that nothing of them is left."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from scenario_files import cases_in, run_in, write_scenarios

import fragscope
from fragscope.errors import UsageError
from fragscope.suite import ranks as ranks_module

torch = pytest.importorskip("torch")
import torch.distributed as dist  # noqa: E402 - only where there is torch

pytestmark = pytest.mark.torch
HERE = str(Path(__file__).relative_to(Path.cwd())) if Path(__file__).is_relative_to(Path.cwd()) else __file__


@pytest.fixture(autouse=True)
def nothing_is_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = children()  # a fork server, if tests of other files ran here
    yield
    assert list(tmp_path.iterdir()) == []
    assert children() <= before  # neither a process nor a zombie


def children() -> set[int]:
    """Processes and zombies of which this one is the parent."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            if int(stat.read_text().rpartition(")")[2].split()[1]) == os.getpid():
                found.add(int(stat.parent.name))
    return found


def join(rank: fragscope.Rank, members: int | None = None) -> None:
    world = rank.ranks if members is None else members
    dist.init_process_group(
        "gloo", init_method=rank.rendezvous, rank=rank.number, world_size=world, timeout=timedelta(hours=1)
    )


def line_of(text: str) -> int:
    """The line of this file that ends with a comment."""
    lines = Path(__file__).read_text().splitlines()
    (number,) = (n for n, line in enumerate(lines, 1) if line.endswith(f"# {text}"))
    return number


def failure(kind: type[Exception], work: Callable[[fragscope.Rank], None], ranks: int, **options: Any) -> Any:
    with pytest.raises(kind) as caught:
        fragscope.run_ranks(work, ranks, **options)
    return caught.value


# --- healthy


def test_all_ranks_run_and_meet(tmp_path_factory):
    out = tmp_path_factory.mktemp("sums")

    def work(rank: fragscope.Rank) -> None:
        join(rank)
        number = torch.tensor([rank.number + 1.0])
        dist.all_reduce(number)
        dist.barrier()
        (out / str(rank.number)).write_text(str(number.item()))

    fragscope.run_ranks(work, 3)
    assert sorted((p.name, p.read_text()) for p in out.iterdir()) == [("0", "6.0"), ("1", "6.0"), ("2", "6.0")]


def test_ranks_that_work_for_longer_than_the_quiet_time_are_not_taken_to_hang():
    """They take turns, and there are more of them than processors: all but one wait most of the time."""

    def work(rank: fragscope.Rank) -> None:
        join(rank)
        for turn in range(2 * rank.ranks):
            if turn % rank.ranks == rank.number:
                until = time.process_time() + 0.15
                while time.process_time() < until:
                    pass
            dist.barrier()

    fragscope.run_ranks(work, 4, quiet=0.3)


def test_ranks_are_plain_processes(tmp_path_factory):
    """Garbage is collected, and input is empty, whatever the caller does."""
    out = tmp_path_factory.mktemp("plain")

    def work(rank: fragscope.Rank) -> None:
        import gc

        assert gc.isenabled()
        assert sys.stdin is None or os.read(0, 1) == b""
        print("said by a rank")
        (out / str(rank.number)).write_text(rank.rendezvous)

    fragscope.run_ranks(work, 1)
    assert (out / "0").read_text().startswith("file:///")


def test_a_rank_computes_after_its_caller_computed_with_several_threads():
    def compute() -> None:
        a = torch.ones(2**21)
        assert (a + a).sum() == 2**22
        b = torch.ones(512, 512)
        assert (b @ b)[0, 0] == 512

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        compute()
        fragscope.run_ranks(lambda rank: compute(), 2, quiet=1.0)
    finally:
        torch.set_num_threads(threads)


def test_a_process_that_works_for_a_rank_is_no_hang():
    spin = "import time\nwhile time.process_time() < 1.5: pass"

    def work(rank: fragscope.Rank) -> None:
        join(rank)
        if rank.number == 0:
            subprocess.run(["sh", "-c", '"$0" -c "$1"; true', sys.executable, spin], check=True)
        dist.barrier()

    fragscope.run_ranks(work, 2, quiet=0.5)


@pytest.mark.parametrize("code", [None, 0, False])
def test_a_rank_may_leave_early(code):
    fragscope.run_ranks(lambda rank: sys.exit(code), 1)


# --- what ranks start


def is_running(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def all_end(pids: list[int]) -> bool:
    deadline = time.monotonic() + 20
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not any(map(is_running, pids))


@pytest.mark.parametrize("fails", [False, True])
def test_what_ranks_start_does_not_outlive_the_call(fails, tmp_path_factory):
    out = tmp_path_factory.mktemp("started")

    def work(rank: fragscope.Rank) -> None:
        started = subprocess.Popen(["sh", "-c", "sleep 1000; true"])
        (out / str(rank.number)).write_text(str(started.pid))
        join(rank)
        dist.barrier()
        if fails:
            raise ValueError("stop")

    if fails:
        failure(fragscope.RankFailedError, work, 2)
    else:
        fragscope.run_ranks(work, 2)
    pids = [int(p.read_text()) for p in out.iterdir()]
    assert len(pids) == 2
    assert all_end(pids)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_outlives_a_caller_that_is_ended(how, tmp_path_factory):
    """Only the caller gets the signal, as from a terminal's Ctrl-C and from whoever kills it."""
    out = tmp_path_factory.mktemp("started")
    program = f"""
import fragscope, os, subprocess, tempfile, time, pathlib
tempfile.tempdir = {str(out)!r}
def work(rank):
    started = subprocess.Popen(["sleep", "1000"])
    part = pathlib.Path({str(out)!r}, f"part-{{rank.number}}")
    part.write_text(f"{{os.getpid()}} {{started.pid}}")
    part.rename(part.with_name(f"pids-{{rank.number}}"))
    time.sleep(1000)
fragscope.run_ranks(work, 2, quiet=1000, timeout=1000)
"""
    caller = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(files := list(out.glob("pids-*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    pids = [int(pid) for file in files for pid in file.read_text().split()]
    assert len(pids) == 4
    assert all(map(is_running, pids))
    caller.send_signal(how)
    assert caller.wait(20) == -how
    assert all_end(pids)


# --- hanging


def test_a_hang_names_who_waits_where():
    def barrier() -> None:
        dist.barrier()  # two wait here

    def work(rank: fragscope.Rank) -> None:
        if rank.number == 3:  # it has no part in it, so that nobody loses a peer when it ends
            return
        join(rank, 3)
        if rank.number == 0:
            dist.recv(torch.zeros(1), src=1)  # one waits here
        else:
            barrier()

    began = time.monotonic()
    error = failure(fragscope.RanksHungError, work, 4, quiet=1.0)
    assert time.monotonic() - began < 60  # and not the hour that gloo waits; nothing else is timed here
    one, two = line_of("one waits here"), line_of("two wait here")
    assert [(w.rank, w.place, w.function) for w in error.waiting] == [
        (0, f"{HERE}:{one}", "work"), (1, f"{HERE}:{two}", "barrier"), (2, f"{HERE}:{two}", "barrier"),
    ]  # fmt: skip
    assert str(error) == (
        f"3 of 4 ranks hang: rank 0 at {HERE}:{one} in work; ranks 1, 2 at {HERE}:{two} in barrier; rank 3 ended"
    )
    assert error.outcome == "timeout"


def test_processes_that_sleep_or_have_ended_hide_no_hang():
    def work(rank: fragscope.Rank) -> None:
        join(rank)
        sleeps = subprocess.Popen(["sleep", "1000"])
        ended = subprocess.Popen(["true"])  # and nobody waits for it
        dist.recv(torch.zeros(1), src=1 - rank.number)
        del sleeps, ended

    error = failure(fragscope.RanksHungError, work, 2, quiet=1.0, timeout=60.0)
    assert str(error).startswith("2 of 2 ranks hang: ranks 0, 1 at ")


def test_ranks_that_run_on_for_ever_are_stopped():
    def work(rank: fragscope.Rank) -> None:
        while True:  # spins
            pass

    error = failure(fragscope.RanksHungError, work, 2, timeout=1.0)
    assert str(error).startswith("2 of 2 ranks had not ended after 1 s: rank")
    first = line_of("spins")
    assert {w.function for w in error.waiting} == {"work"}
    assert {w.place for w in error.waiting} <= {f"{HERE}:{first}", f"{HERE}:{first + 1}"}


# --- failing


def test_an_error_is_told_with_its_place_and_not_those_that_follow_from_it():
    def work(rank: fragscope.Rank) -> None:
        join(rank)
        if rank.number == 1:
            raise ValueError("the shapes differ")  # raised here
        dist.barrier()

    error = failure(fragscope.RankFailedError, work, 3)
    place = f"{HERE}:{line_of('raised here')}, work"
    assert str(error) == f"rank 1 of 3 ended with code 1: ValueError: the shapes differ (at {place})"
    assert (error.rank, error.outcome) == (1, "crash")


def test_a_killed_rank_is_told_with_its_last_words():
    def work(rank: fragscope.Rank) -> None:
        join(rank)
        if rank.number == 2:
            print("loading expert 7")
            os.kill(os.getpid(), signal.SIGKILL)
        dist.barrier()

    error = failure(fragscope.RankFailedError, work, 3)
    assert str(error) == "rank 2 of 3 was ended by SIGKILL: loading expert 7"


def test_a_fault_is_told_with_what_was_said_before():
    def work(rank: fragscope.Rank) -> None:
        print("said before")
        os.abort()

    assert str(failure(fragscope.RankFailedError, work, 1)) == "rank 0 of 1 was ended by SIGABRT: said before"


def test_an_abort_that_follows_from_an_error_is_not_told_for_it(monkeypatch):
    monkeypatch.setattr(ranks_module, "_LOOK_EVERY", 2.0)  # both are seen to have ended at the same time

    def work(rank: fragscope.Rank) -> None:
        join(rank)
        dist.barrier()
        if rank.number == 1:
            raise ValueError("the shapes differ")
        try:
            dist.recv(torch.zeros(1), src=1)
        except RuntimeError:
            os.abort()

    error = failure(fragscope.RankFailedError, work, 2)
    assert str(error).startswith("rank 1 of 2 ended with code 1: ValueError: the shapes differ")


@pytest.mark.parametrize("how", ["SIGABRT", "SIGSEGV", "SIGKILL", "SIGTERM"])
def test_an_error_that_follows_from_a_signal_is_not_told_for_it(how, monkeypatch):
    monkeypatch.setattr(ranks_module, "_LOOK_EVERY", 2.0)

    def work(rank: fragscope.Rank) -> None:
        join(rank)
        dist.barrier()
        if rank.number == 1:
            os.kill(os.getpid(), signal.Signals[how])
        dist.recv(torch.zeros(1), src=1)

    assert str(failure(fragscope.RankFailedError, work, 2)).startswith(f"rank 1 of 2 was ended by {how}")


@pytest.mark.parametrize(("code", "told"), [(3, 3), (-1, 255), (256, 1), ("no more", 1)])
def test_the_code_with_which_a_rank_leaves_is_told(code, told):
    error = failure(fragscope.RankFailedError, lambda rank: sys.exit(code), 1)
    assert str(error).startswith(f"rank 0 of 1 ended with code {told}: SystemExit: {code} (at {HERE}:")


@pytest.mark.parametrize(("ranks", "options"), [(0, {}), (65, {}), (-1, {}), (2, {"quiet": 0}), (2, {"timeout": -1})])
def test_numbers_that_cannot_be_are_refused(ranks, options):
    with pytest.raises(UsageError, match=r"run_ranks: .*(ranks; 1 to 64|more than 0)"):
        fragscope.run_ranks(lambda rank: None, ranks, **options)


# --- in a scenario


def test_a_scenarios_outcome_is_that_of_its_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenario")
    write_scenarios(
        folder,
        "ranks",
        """
        import os
        from datetime import timedelta
        import torch.distributed as dist

        def join(rank):
            dist.init_process_group("gloo", init_method=rank.rendezvous, rank=rank.number, world_size=rank.ranks,
                                    timeout=timedelta(hours=1))

        @fragscope.scenario("ranks", presets={"two": {"n": 2}}, variant="meets")
        def ranks(case):
            held = on_card(1000)
            def work(rank):
                join(rank)
                dist.all_reduce(torch.ones(3))
                assert not torch.cuda.is_available() or torch.ones(1).device.type == "cpu"
            with case.measure():
                kept = on_card(5 * 2**20)
                fragscope.run_ranks(work, case.n)

        @ranks.variant("hangs", role="fixed", expect="timeout")
        def _(case):
            def work(rank):
                join(rank)
                if rank.number:
                    dist.barrier()
                else:
                    dist.recv(torch.zeros(1), src=1)
            with case.measure():
                fragscope.run_ranks(work, case.n, quiet=1.0)

        @ranks.variant("fails", role="fixed", expect="crash")
        def _(case):
            def work(rank):
                raise RuntimeError("no such expert")
            with case.measure():
                fragscope.run_ranks(work, case.n)
        """,
    )
    run_in(folder, "scenario_ranks.py")
    cases = cases_in(folder)
    assert {name: c["outcome"] for name, c in cases.items()} == {
        "ranks/meets": "ok", "ranks/hangs": "timeout", "ranks/fails": "crash",
    }  # fmt: skip
    assert cases["ranks/meets"]["peak"]["requested"] == 1000 + 5 * 2**20, "what ranks do is not on the card"
    lines = (folder / "scenario_ranks.py").read_text().splitlines()
    recv, barrier = (next(n for n, line in enumerate(lines, 1) if what in line) for what in ("recv(", "barrier()"))
    assert cases["ranks/hangs"]["message"] == (
        f"2 of 2 ranks hang: rank 0 at scenario_ranks.py:{recv} in work; rank 1 at scenario_ranks.py:{barrier} in work"
    )
    assert cases["ranks/fails"]["message"].startswith("rank ")
    assert "RuntimeError: no such expert (at scenario_ranks.py:" in cases["ranks/fails"]["message"]
