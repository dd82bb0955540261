"""When processes count as being at rest."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fragscope.suite.stillness import Activity, StillnessWatch, activity, family

ASLEEP = Activity(turns=7, busy=frozenset(), ticks=100)
STEP = 0.05


def told_after(looks: list[list[tuple[int, Activity | None]]], quiet: float = 1.0) -> int | None:
    """The first look at which rest is told, looks being 0.05 s apart."""
    watch = StillnessWatch(quiet)
    return next((n for n, seen in enumerate(looks) if watch.look(1000 + n * STEP, seen)), None)


def test_rest_is_told_after_the_quiet_time():
    assert told_after([[(1, ASLEEP), (2, ASLEEP)]] * 30) == 20


@pytest.mark.parametrize(
    "other",
    [
        Activity(None, frozenset(), 100),  # its main thread runs, or wants to
        None,  # nobody can tell
    ],
)
def test_one_that_is_not_asleep_keeps_all_from_counting(other):
    assert told_after([[(1, ASLEEP), (2, other)]] * 100) is None


def test_a_thread_that_is_woken_begins_the_time_anew():
    woken = [[(1, Activity(7 + n // 10, frozenset(), 100))] for n in range(100)]
    assert told_after(woken) is None
    assert told_after([*woken[:10], *[[(1, Activity(9, frozenset(), 100))]] * 30]) == 30


def test_the_end_of_a_process_begins_the_time_anew():
    assert told_after([*[[(1, ASLEEP), (2, ASLEEP)]] * 15, *[[(1, ASLEEP)]] * 30]) == 35


def test_another_thread_that_wants_to_run_all_the_time_works():
    assert told_after([[(1, Activity(7, frozenset({5}), 100))]] * 100) is None


def test_another_thread_that_looks_around_now_and_then_does_not():
    """gloo's loop wakes a hundred times a second; a look meets it awake every few times, never for long."""
    looks = [[(1, Activity(7, frozenset({5} if n % 3 == 0 else ()), 100 + n // 100))] for n in range(60)]
    assert told_after(looks) == 20


def test_other_threads_that_take_processor_time_work():
    """A fifth of a processor, seen asleep every time."""
    assert told_after([[(1, Activity(7, frozenset(), 100 + n))] for n in range(200)]) is None


def test_nothing_is_not_at_rest():
    assert told_after([[]] * 100) is None


def test_this_process_is_not_asleep_while_it_looks():
    seen = activity(os.getpid())
    assert seen is not None
    assert seen.turns is None


def test_threads_are_read_whatever_they_are_called(tmp_path):
    def thread(pid: int, tid: int, state: str, times: tuple[int, int]) -> None:
        folder = tmp_path / str(pid) / "task" / str(tid)
        folder.mkdir(parents=True)
        (folder / "stat").write_text(f"{tid} (a) S ) b) {state} 1 1 1 0 -1 0 0 0 0 0 {times[0]} {times[1]} 0 0\n")
        (folder / "status").write_text("Name:\tx\nvoluntary_ctxt_switches:\t40\nnonvoluntary_ctxt_switches:\t2\n")

    thread(10, 10, "S", (3, 4))
    thread(10, 11, "S", (5, 0))
    thread(10, 12, "D", (1, 0))
    thread(20, 20, "R", (1, 0))
    assert activity(10, tmp_path) == Activity(42, frozenset({12}), 13)
    assert activity(20, tmp_path) == Activity(None, frozenset(), 1)
    assert activity(30, tmp_path) is None
    (tmp_path / "10" / "task" / "11" / "stat").write_text("")
    assert activity(10, Path(tmp_path)) is None


def test_a_family_is_whom_it_started_and_whom_those_started(tmp_path):
    def process(pid: int, state: str, children: dict[int, str]) -> None:
        """With the children that each of its threads started."""
        for thread, started in children.items():
            folder = tmp_path / str(pid) / "task" / str(thread)
            folder.mkdir(parents=True)
            (folder / "stat").write_text(f"{thread} (x) {state} 1 1 1 0 -1 0 0 0 0 0 1 0 0 0\n")
            (folder / "status").write_text("voluntary_ctxt_switches:\t4\nnonvoluntary_ctxt_switches:\t0\n")
            (folder / "children").write_text(started)
        (tmp_path / str(pid) / "stat").write_text(f"{pid} (x) {state} 1 1 1 0 -1 0 0 0 0 0 1 0 0 0\n")

    process(10, "S", {10: "20 21 ", 11: "30 "})
    process(20, "S", {20: "40 "})
    process(21, "Z", {21: ""})  # has ended
    process(30, "S", {30: "31 "})  # 31 is gone
    process(40, "R", {40: ""})
    assert family(10, tmp_path) == [
        (10, Activity(4, frozenset(), 2)),
        (20, Activity(4, frozenset(), 1)),
        (40, Activity(None, frozenset(), 1)),
        (30, Activity(4, frozenset(), 1)),
    ]
