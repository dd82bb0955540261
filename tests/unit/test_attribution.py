"""Which line a difference is told by: recordings written by hand, over sources written by hand."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from fragscope.against.attribute import Attribution, Explanation
from fragscope.against.held import Recorded
from fragscope.against.lines import Alignment, Sources
from fragscope.against.places import Tree
from fragscope.allocator import ReplaySettings, replay, rules_for
from fragscope.gate.verdict import StackChange, Touched
from fragscope.trace import Frame, RequestKind, RequestLog, StackTable, Trace, write_trace

MIB = 2**20
SETTINGS = ReplaySettings(rules_for("2.13.0"), "any", 2**40, 2**40)


class Program:
    """A tree with one file, and a recording of it: memory is asked for by lines, given by their text."""

    def __init__(self, folder: Path, source: str, file: str = "loader.py") -> None:
        self.folder, self.file = folder, file
        folder.mkdir(exist_ok=True)
        (folder / file).write_text(source)
        self.lines = source.splitlines()
        self.log, self.stacks = RequestLog(), StackTable()
        self.log.append(RequestKind.PHASE_BEGIN, phase=1)
        self.count = 0

    def ask(self, *texts: str, mib: int = 1, library: bool = False, through: Frame | None = None) -> int:
        """Ask for memory in the innermost of these lines, or in a library that it calls."""
        frames = [Frame(self.file, self._line(text), "load") for text in texts]
        if library:
            through = Frame("/env/lib/python3.11/site-packages/einops/parts.py", 7, "rearrange")
        if through is not None:
            frames.insert(0, through)
        self.count += 1
        self.log.append(RequestKind.ALLOC, id=self.count, size=mib * MIB, stack=self.stacks.add(tuple(frames)), phase=1)
        return self.count

    def free(self, *numbers: int) -> None:
        for number in numbers:
            self.log.append(RequestKind.FREE, id=number, phase=1)

    def _line(self, text: str) -> int:
        (found,) = [n for n, line in enumerate(self.lines, 1) if text in line]
        return found

    def recorded(self, capacity: int = SETTINGS.capacity) -> Recorded:
        self.log.append(RequestKind.PHASE_END, phase=1)
        trace = Trace(self.log.finish(), stacks=self.stacks, phases=("", "measure"), torch="2.13.0")
        write_trace(replay(trace, replace(SETTINGS, capacity=capacity)).trace, self.folder / "case.fscope")
        return Recorded.of(self.folder / "case.fscope")


def attribution(before: Program, after: Program, capacity: int = SETTINGS.capacity) -> Attribution:
    trees = [Tree(p.folder, p.folder) for p in (before, after)]
    return Attribution(*trees, before.recorded(), after.recorded(capacity))


def told(changes: Iterable[StackChange]) -> list[tuple[str, str, int, int, str]]:
    return [(c.kind, c.code, c.before // MIB, c.after // MIB, c.why) for c in changes]


SOURCE = """\
def load():
    first = make(8)
    second = make(4)
    del first
    third = make(6)
"""


def test_what_is_kept_too_long_is_guilty_and_not_what_stands_at_the_new_peak(tmp_path: Path):
    """The peak was at `second`, with 12 MiB, and is at `third`, with 18."""
    before = Program(tmp_path / "before", SOURCE)
    first = before.ask("first = make")
    before.ask("second = make", mib=4)
    before.free(first)
    before.ask("third = make", mib=6)
    before.log  # noqa: B018
    after = Program(tmp_path / "after", SOURCE.replace("    del first\n", ""))
    after.ask("first = make", mib=1)
    after.ask("second = make", mib=4)
    after.ask("third = make", mib=6)
    found = attribution(before, after)
    assert told(found.of_value("peak_allocated").stacks) == [("grown", "first = make(8)", 0, 1, "longer")]
    was, now, moved = found.peaks("peak_allocated")
    assert was is not None and now is not None
    assert (was.code, now.code, moved) == ("third = make(6)", "third = make(6)", False)


def test_the_peak_that_moved_is_said_with_both_lines(tmp_path: Path):
    before = Program(tmp_path / "before", SOURCE)
    first = before.ask("first = make", mib=8)
    before.ask("second = make", mib=4)
    before.free(first)
    before.ask("third = make", mib=6)
    after = Program(tmp_path / "after", "# moved\n" * 30 + SOURCE.replace("    del first\n", ""))
    after.ask("first = make", mib=8)
    after.ask("second = make", mib=4)
    after.ask("third = make", mib=6)
    found = attribution(before, after)
    assert told(found.of_value("peak_allocated").stacks) == [("grown", "first = make(8)", 0, 8, "longer")]
    was, now, moved = found.peaks("peak_allocated")
    assert was is not None and now is not None
    assert (was.line, was.code) == (3, "second = make(4)")
    assert (now.line, now.code, moved) == (34, "third = make(6)", True)
    assert found.peaks("retained") == (None, None, False)


def test_values_of_the_end_are_compared_at_the_end(tmp_path: Path):
    before, after = Program(tmp_path / "before", SOURCE), Program(tmp_path / "after", SOURCE)
    for program in (before, after):
        program.ask("first = make", mib=8)
        program.ask("second = make", mib=4)
    before.free(1, 2)
    after.free(1)
    found = attribution(before, after)
    assert told(found.of_value("retained").stacks) == [("grown", "second = make(4)", 0, 4, "longer")]
    assert found.of_value("peak_allocated").stacks == ()


@pytest.mark.parametrize(
    ("sizes", "why"),
    [
        (([4], [6]), "larger"),
        (([4], [4, 4]), "more"),
        (([4], [5, 6]), ""),
        (([6], [4]), "smaller"),
        (([4, 4], [4]), "fewer"),
    ],
)
def test_why_a_place_holds_otherwise(tmp_path: Path, sizes: tuple[list[int], list[int]], why: str):
    before, after = Program(tmp_path / "before", SOURCE), Program(tmp_path / "after", SOURCE)
    for program, wanted in zip((before, after), sizes, strict=True):
        for size in wanted:
            program.ask("first = make", mib=size)
    (change,) = attribution(before, after).of_value("retained").stacks
    assert (change.before, change.after, change.why) == (sum(sizes[0]) * MIB, sum(sizes[1]) * MIB, why)
    assert (change.blocks_before, change.blocks_after) == tuple(map(len, sizes))


HELPER = """\
def make(size):
    return empty(size)

def weights():
    w = make(8)

def scratch():
    s = make(4)
    t = make(2)
"""


def test_a_function_that_allocates_for_others_is_not_the_line(tmp_path: Path):
    before, after = Program(tmp_path / "before", HELPER), Program(tmp_path / "after", HELPER)
    for program, size in ((before, 4), (after, 5)):
        program.ask("return empty", "w = make", mib=8)
        program.ask("return empty", "s = make", mib=size)
    (change,) = attribution(before, after).of_value("retained").stacks
    assert (change.code, change.line) == ("s = make(4)", 8)
    assert change.frames == ["loader.py:2 load", "loader.py:8 load"]


def test_unless_it_is_the_function_that_changed(tmp_path: Path):
    """Every caller gets twice as much: then its own line is what costs."""
    doubled = HELPER.replace("return empty(size)", "return empty(2 * size)")
    before, after = Program(tmp_path / "before", HELPER), Program(tmp_path / "after", doubled)
    for program, factor in ((before, 1), (after, 2)):
        program.ask("return empty", "w = make", mib=8 * factor)
        program.ask("return empty", "s = make", mib=4 * factor)
    changes = attribution(before, after).of_value("retained").stacks
    assert told(changes) == [
        ("grown", "return empty(2 * size)", 8, 16, "larger"),
        ("grown", "return empty(2 * size)", 4, 8, "larger"),
    ]


def test_a_library_is_not_the_repository(tmp_path: Path):
    before, after = Program(tmp_path / "before", SOURCE), Program(tmp_path / "after", SOURCE)
    for program, size in ((before, 4), (after, 5)):
        program.ask("second = make", mib=size, library=True)
    (change,) = attribution(before, after).of_value("retained").stacks
    assert (change.file, change.line) == ("loader.py", 3)
    assert change.frames == ["einops/parts.py:7 rearrange", "loader.py:3 load"]


def test_lines_that_come_and_go(tmp_path: Path):
    other = SOURCE.replace("    second = make(4)\n", "").replace(
        "third", "    buffer = torch.zeros(n, device=d)\n    third"
    )
    before, after = Program(tmp_path / "before", SOURCE), Program(tmp_path / "after", other)
    before.ask("second = make", mib=4)
    after.ask("buffer = torch", mib=3)
    assert told(attribution(before, after).of_value("retained", fell=True).stacks) == [
        ("gone", "second = make(4)", 4, 0, ""),
        ("new", "buffer = torch.zeros(n, device=d)", 0, 3, ""),
    ]


def test_an_extracted_function_and_a_renamed_file_are_no_difference(tmp_path: Path):
    text = "def load():\n" + "".join(f"    step_{n}()\n" for n in range(20)) + "    held = torch.empty(size)\n"
    extracted = text.replace("    held = torch", "    held = inner()\n\n\ndef inner():\n    return torch")
    before = Program(tmp_path / "before", text)
    after = Program(tmp_path / "after", extracted, file="weights.py")
    before.ask("held = torch", mib=4)
    after.ask("return torch", "held = inner", mib=4)
    assert attribution(before, after).of_value("retained").stacks == ()


# --- the same point -----------------------------------------------------------------------------------------------

TURNS = """\
def load():
    weight = make(10)
    for _ in range(4):
        part = make(2)
        out = turned(part)
    last = make(1)
"""
TWICE = TURNS.replace("turned(part)", "turned(turned(part))")


def turn(program: Program, requests: int, mib: int = 3) -> None:
    """A part, then what one line asks for, each freed when the next is there; the last one stays."""
    part = program.ask("part = make", mib=2)
    made = [program.ask("out = turned", mib=mib) for _ in range(requests)]
    program.free(part, *made[:-1])


def test_a_line_that_asks_more_often_in_each_turn_is_guilty_and_not_what_grows_over_the_turns(tmp_path: Path):
    """Four turns of one request became four of three; the weight is freed before the last turn.

    By hand: the peak is in the third turn, with the weight, two results that stay, the part and three requests of the
    line: 10 + 6 + 2 + 9. Before there was one request at that point: 10 + 6 + 2 + 3.
    """
    before, after = Program(tmp_path / "before", TURNS), Program(tmp_path / "after", TWICE)
    for program, requests in ((before, 1), (after, 3)):
        weight = program.ask("weight = make", mib=10)
        for number in range(4):
            if number == 3:
                program.free(weight)
            turn(program, requests)
        program.ask("last = make")
    found = attribution(before, after)
    (change,) = found.of_value("peak_requested").stacks
    assert told([change]) == [("grown", "out = turned(turned(part))", 9, 15, "more")]
    assert change.changed


@pytest.mark.parametrize("requests", [(1, 3), (3, 5), (5, 2)])
def test_where_every_line_of_a_loop_asks_otherwise_the_turn_is_told_by_its_share(
    tmp_path: Path, requests: tuple[int, int]
):
    """No line of the loop asks as often as before. What was made before the loop is freed in the last turn but one.

    The peak is in the first two turns, where the weight lives, by the result of the first that stays: turn 2 of 4.
    """
    before, after = Program(tmp_path / "before", TURNS), Program(tmp_path / "after", TWICE)
    for program, often, mib in ((before, requests[0], 3), (after, requests[1], 8)):
        weight = program.ask("weight = make", mib=100)
        for number in range(4):
            if number == 2:
                program.free(weight)
            made = [program.ask("out = turned", mib=mib) for _ in range(often)]
            program.free(*made[:-1])
        program.ask("last = make")
    (change,) = [c for c in attribution(before, after).of_value("peak_requested").stacks if c.code.startswith("out")]
    # One result stays from turn 1, and all requests of turn 2 are there when its last one is.
    assert (change.before, change.after) == (3 * (1 + requests[0]) * MIB, 8 * (1 + requests[1]) * MIB)
    assert change.why not in ("longer", "shorter")


def test_a_new_line_is_compared_with_the_moment_between_its_neighbours_at_which_most_was_held(tmp_path: Path):
    """Parts of all turns at once, after the loop: not compared with the peak before, which was at the last line."""
    stacked = TURNS.replace("    last = make(1)", "    every = stacked(weight)\n    last = make(1)")
    before, after = Program(tmp_path / "before", TURNS), Program(tmp_path / "after", stacked)
    for program in (before, after):
        program.ask("weight = make", mib=10)
        for _ in range(4):
            if program is before:
                turn(program, 1)
            else:
                program.ask("part = make", mib=2)
    after.free(after.ask("every = stacked", mib=20))
    for program in (before, after):
        program.ask("last = make", mib=15)
    assert told(attribution(before, after).of_value("peak_requested").stacks) == [
        ("new", "every = stacked(weight)", 0, 20, ""),
        ("grown", "part = make(2)", 2, 8, "longer"),
        ("gone", "out = turned(part)", 12, 0, ""),
    ]


@pytest.mark.parametrize("seed", range(24))
def test_lines_that_ask_as_before_are_never_named(tmp_path: Path, seed: int):
    """Turns of three lines, of which one asks more or less often than before, or is new, and for larger memory.

    Of every turn one request of another line stays, so that every turn holds otherwise; the weight, which lives up to
    some turn, makes that one the peak. What did not change held the same at the same point, whichever that is.
    """
    random = Random(seed)
    changed, turns = random.randrange(3), random.randint(2, 6)
    counts = [random.randint(1, 3) for _ in range(3)]
    other = list(counts)
    other[changed] = random.choice([n for n in range(1, 5) if n != counts[changed]])
    if random.random() < 0.3:
        counts[changed] = 0
    last_with_weight = random.randrange(turns)
    lines = "".join(f"        line_{n} = asked_in_line_{n}(weight)\n" for n in range(3))
    source = f"def load():\n    weight = make(10)\n    for _ in range({turns}):\n{lines}"
    programs = []
    for name, often, mib in (("before", counts, 1), ("after", other, 6)):
        program = Program(tmp_path / name, source)
        weight = program.ask("weight = make", mib=1000)
        for turn_number in range(turns):
            made = [
                (n, program.ask(f"line_{n} = ", mib=mib if n == changed else 2 + n))
                for n in range(3)
                for _ in range(often[n])
            ]
            kept = next(number for n, number in made if n != changed)
            program.free(*(number for _, number in made if number != kept))
            if turn_number == last_with_weight:
                program.free(weight)
        programs.append(program)
    named = {change.code for change in attribution(*programs).of_value("peak_requested").stacks}
    assert named <= {f"line_{changed} = asked_in_line_{changed}(weight)"}


def test_a_failure_is_compared_with_the_turn_it_fails_in(tmp_path: Path):
    """The program ends in the third of six turns: what later turns hold is no difference."""
    before, after = Program(tmp_path / "before", TURNS), Program(tmp_path / "after", TWICE)
    before.ask("weight = make", mib=100)
    for _ in range(6):
        turn(before, 1, mib=30)
    before.ask("last = make")
    after.ask("weight = make", mib=100)
    for _ in range(2):
        turn(after, 2, mib=30)
    after.ask("part = make", mib=2)
    after.ask("out = turned", mib=30)
    after.ask("out = turned", mib=30)  # 100 + 2 x 30 + 20, a segment for parts, + 30 + 30
    found = attribution(before, after, capacity=230 * MIB)
    failing = found.failing()
    assert failing is not None
    assert failing.code == "out = turned(turned(part))"
    assert told(found.of_failure().stacks) == []


def test_memory_is_said_to_be_kept_longer_only_where_the_same_was_asked_for(tmp_path: Path):
    """As many requests in all, but more of them before the peak: it is another point, and not the same memory."""
    before, after = Program(tmp_path / "before", SOURCE), Program(tmp_path / "after", SOURCE)
    before.ask("first = make", mib=4)
    before.ask("second = make", mib=8)
    before.ask("first = make", mib=4)
    after.ask("first = make", mib=4)
    after.ask("first = make", mib=4)
    after.ask("second = make", mib=8)
    before.free(1, 2)
    after.free(1, 3)
    before.ask("third = make", mib=1)
    after.ask("third = make", mib=1)
    (change,) = attribution(before, after).of_value("peak_requested").stacks
    assert (change.code, change.before // MIB, change.after // MIB, change.why) == ("first = make(8)", 4, 8, "more")


def test_what_is_held_in_other_blocks_is_not_kept_longer(tmp_path: Path):
    """11 MiB in a whole block of 12 once, and beside a neighbour once: nobody asks for more or less."""
    before, after = Program(tmp_path / "before", SOURCE), Program(tmp_path / "after", SOURCE)
    room = before.ask("second = make", mib=12)
    before.free(room)
    before.ask("first = make", mib=11)  # 1 MiB is too little to be split off (kSmallSize, CUDACachingAllocator.cpp)
    room = after.ask("second = make", mib=14)
    after.free(room)
    after.ask("first = make", mib=11)
    (change,) = attribution(before, after).of_value("retained").stacks
    assert (change.before // MIB, change.after // MIB, change.why) == (12, 11, "cut")


# --- what the change touched --------------------------------------------------------------------------------------

CALLS = """\
import torch

def load():
    model = build()
    finish(model)
    return model

def build():
    return torch.empty(
        8,
        device="cuda",
    )

def finish(model):
    \"\"\"Of all.\"\"\"
    step = torch.ones(2)
    del step
    last = torch.ones(4)

LIMIT = 4
"""


def calls(folder: Path, source: str, *, model: int = 8, step: int = 2, kept: bool = False) -> Program:
    program = Program(folder, source)
    program.ask("return torch.empty(", "model = build()", mib=model)
    first = program.ask("step = torch.ones", "    finish(model)", mib=step)
    if not kept:
        program.free(first)
    program.ask("last = torch.ones", "    finish(model)", mib=4)
    return program


def touched(found: Explanation) -> list[tuple[str, int, bool, bool]]:
    return [(line.code, line.line, line.on_the_way, line.removed) for line in found.touched.lines]


def test_a_changed_line_goes_before_a_larger_one_that_is_not(tmp_path: Path):
    """The step is 1 MiB larger where the change is, and so is what is asked for elsewhere, by 16."""
    edited = CALLS.replace("step = torch.ones(2)", "step = torch.ones(3)")
    before = calls(tmp_path / "before", CALLS, kept=True)
    after = calls(tmp_path / "after", edited, model=24, step=3, kept=True)
    found = attribution(before, after).of_value("peak_requested")
    assert [(c.line, c.after - c.before, c.changed) for c in found.stacks] == [(16, MIB, True), (9, 16 * MIB, False)]
    assert found.touched == Touched()


def test_unless_it_is_next_to_nothing_beside_that(tmp_path: Path):
    """1 MiB of 128 is less than 1 %: the gate would not take it for a difference."""
    edited = CALLS.replace("step = torch.ones(2)", "step = torch.ones(3)")
    before = calls(tmp_path / "before", CALLS, kept=True)
    after = calls(tmp_path / "after", edited, model=136, step=3, kept=True)
    found = attribution(before, after).of_value("peak_requested")
    assert [(c.line, c.changed) for c in found.stacks] == [(9, False), (16, True)]
    assert touched(found) == [("step = torch.ones(3)", 16, True, False)]


def test_a_statement_on_several_lines_is_changed_in_any_of_them(tmp_path: Path):
    edited = CALLS.replace("        8,\n", "        9,\n")
    before, after = calls(tmp_path / "before", CALLS), calls(tmp_path / "after", edited, model=9)
    (change,) = attribution(before, after).of_value("peak_requested").stacks
    assert (change.line, change.code, change.changed) == (9, "return torch.empty(", True)


@pytest.mark.parametrize(
    ("edit", "where"),
    [
        (("    del step\n", ""), [("del step", 17, True, True)]),
        (("    finish(model)\n", "    keep = []\n    finish(model)\n"), [("keep = []", 5, True, False)]),
        (("LIMIT = 4", "LIMIT = 5"), [("LIMIT = 5", 20, False, False)]),
        (("return torch.empty(", "# a word\n    return torch.empty("), []),
        (("Of all.", "Of everything."), []),
        (("import torch\n", "import torch\nimport sys\n"), []),
        (
            ("    del step\n", "    keep = step\n    more = keep\n"),
            [("keep = step", 17, True, False), ("more = keep", 18, True, False)],
        ),
        (("    del step\n", "    if model:\n        del step\n"), [("if model:", 17, True, False)]),
    ],
)
def test_where_the_line_that_rose_is_not_changed_it_is_said_what_is(
    tmp_path: Path, edit: tuple[str, str], where: list[tuple[str, int, bool, bool]]
):
    """`step` lives longer; lines are counted in CALLS."""
    assert CALLS.count(edit[0]) == 1
    before = calls(tmp_path / "before", CALLS)
    after = calls(tmp_path / "after", CALLS.replace(*edit), kept=True)
    found = attribution(before, after).of_value("peak_requested")
    assert [(c.code, c.why, c.changed) for c in found.stacks] == [("step = torch.ones(2)", "longer", False)]
    assert touched(found) == where


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (("", ""), ([("layers = 8", 3, False, False)], 0)),
        (("    del step\n", ""), ([("del step", 17, True, True)], 1)),
    ],
)
def test_files_that_a_case_only_imports_are_named_where_nothing_else_is_touched(
    tmp_path: Path, edit: tuple[str, str], expected: tuple[list[tuple[str, int, bool, bool]], int]
):
    before = calls(tmp_path / "before", CALLS)
    after = calls(tmp_path / "after", CALLS.replace(*edit) if edit[0] else CALLS, kept=True)
    for program, layers in ((before, 4), (after, 8)):
        (program.folder / "config.py").write_text(f"class Config:\n\n    layers = {layers}\n")
    (after.folder / "unused.py").write_text("nobody = imports\n")
    trees = [Tree(p.folder, p.folder) for p in (before, after)]
    imported = [str(after.folder / "config.py"), "/usr/lib/python3/elsewhere.py"]
    found = Attribution(*trees, before.recorded(), after.recorded(), imported).of_value("peak_requested")
    assert (touched(found), found.touched.more) == expected


def test_of_a_file_that_was_renamed_only_what_was_edited_is_touched(tmp_path: Path):
    edited = CALLS.replace("    model = build()", "    model = build()  # all").replace(
        "    del step\n", "    keep(step)\n"
    )
    before, after = calls(tmp_path / "before", CALLS), Program(tmp_path / "after", edited, file="weights.py")
    after.ask("return torch.empty(", "model = build()", mib=8)
    after.ask("step = torch.ones", "    finish(model)", mib=2)
    after.ask("last = torch.ones", "    finish(model)", mib=4)
    found = attribution(before, after).of_value("peak_requested")
    assert [(c.file, c.code) for c in found.stacks] == [("weights.py", "step = torch.ones(2)")]
    # A comment at the end of a line is part of the line that was edited.
    assert touched(found) == [
        ("keep(step)", 17, True, False),
        ("model = build()  # all", 4, True, False),
    ]


def test_what_cannot_be_parsed_is_held_line_by_line(tmp_path: Path):
    broken = "print 'two'\n" + CALLS
    edited = broken.replace("step = torch.ones(2)", "step = torch.ones(3)")
    before = calls(tmp_path / "before", broken)
    after = calls(tmp_path / "after", edited, step=3, kept=True)
    (change,) = attribution(before, after).of_value("peak_requested").stacks
    assert (change.code, change.changed) == ("step = torch.ones(3)", True)


# --- lines --------------------------------------------------------------------------------------------------------


def aligned(tmp_path: Path, before: str, after: str, names: tuple[str, str] = ("a.py", "a.py")) -> Alignment:
    for folder, name, text in (("old", names[0], before), ("new", names[1], after)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text(text)
    return Alignment(Sources(tmp_path / "old"), Sources(tmp_path / "new"), {names[0]}, {names[1]})


def test_of_equal_lines_each_is_its_own(tmp_path: Path):
    """One of two equal lines is new: the one that stood there is where it was, beside its neighbours."""
    lines = aligned(tmp_path, "a = 1\nx = x.clone()\nb = 2\n", "x = x.clone()\na = 1\nx = x.clone()\nb = 2\n")
    moved = lines.moved("a.py", 2)
    assert moved is not None
    assert (moved.file, moved.line) == ("a.py", 3)


def test_an_edited_line_is_the_same_one_and_a_replaced_one_is_not(tmp_path: Path):
    before = "start()\nheld = torch.empty(n, device=d)\nstop()\nflush()\nend()\n"
    after = "start()\nheld = torch.empty(2 * n, device=d)\nstop()\nreturn None\nend()\n"
    lines = aligned(tmp_path, before, after)
    assert [(m.line if (m := lines.moved("a.py", n)) else None) for n in range(1, 6)] == [1, 2, 3, None, 5]


def test_indentation_does_not_count(tmp_path: Path):
    lines = aligned(tmp_path, "held = make()\n", "if True:\n        held = make()\n")
    moved = lines.moved("a.py", 1)
    assert moved is not None and moved.line == 2


def test_a_file_of_another_name_is_known_by_its_content(tmp_path: Path):
    text = "".join(f"line_{n} = {n}\n" for n in range(9))
    moved = aligned(tmp_path, text, f"# new\n{text}", ("a.py", "b.py")).moved("a.py", 3)
    assert moved is not None and (moved.file, moved.line) == ("b.py", 4)


def test_files_that_are_missing_or_no_text_have_no_lines(tmp_path: Path):
    (tmp_path / "bad.py").write_bytes(b"\xff\x00\n")
    sources = Sources(tmp_path)
    assert sources.line("none.py", 1) == ""
    assert sources.line("bad.py", 9) == ""
    assert sources.line("nul\0.py", 1) == ""


def test_an_environment_in_the_projects_folder_is_the_same_for_both_trees(tmp_path: Path):
    """Its frames are relative to the folder that holds it; one of two calls of a line asks for more now."""
    before, after = Program(tmp_path / "before", SOURCE), Program(tmp_path / "after", SOURCE)
    library = ".venv/lib/python3.11/site-packages/einops/parts.py"
    sizes = {7: (4, 4), 9: (4, 8)}
    for number, (program, file) in enumerate(((before, str(after.folder / library)), (after, library))):
        for line, mib in sizes.items():
            program.ask("first = make", mib=mib[number], through=Frame(file, line, "rearrange"))
    (change,) = attribution(before, after).of_value("peak_allocated").stacks
    assert (change.before // MIB, change.after // MIB, change.why) == (4, 8, "larger")
