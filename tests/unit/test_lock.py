"""fragscope.lock: what is locked, how the file looks, and which files are refused."""

from __future__ import annotations

import tomllib

import pytest
from builders import bare_case, results_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fragscope.errors import InputFileError, UsageError
from fragscope.gate.lock import FILE_LIMIT, Lock, LockedCase, load_lock, lock_of, lock_text, parse_lock
from fragscope.gate.lock_update import relock
from fragscope.results import AssumptionRecord, Case, EstimatedOp, Peak

MIB = 2**20
ID = "moe/v3/list@default,torch-2.13,h100-80gb,virtual"


def case(id_: str = ID, **changes: object) -> Case:
    values = {
        "id": id_,
        "scenario": "moe",
        "preset": "v3",
        "variant": "list",
        "torch": "2.13",
        "allocs": 3,
        "peak": Peak(requested=3 * MIB, allocated=4 * MIB, active=5 * MIB, reserved=6 * MIB, stranded=9, hbm=6 * MIB),
        "end": Peak(requested=1, allocated=2, reserved=3, stranded=512),
        "transient": 2 * MIB,
        "retained": -1536,
    }
    return bare_case(**(values | changes))


def text_of(*cases: Case) -> str:
    lock, left_out = lock_of(results_of(list(cases)), "fragscope.lock")
    assert left_out == {}
    return lock_text(lock)


def test_the_file_as_it_stands_in_a_repository():
    text = text_of(case())
    assert text.split("\n")[3:] == [
        "version = 1",
        'fragscope = "0.1.0"',
        'torch = "2.13.0"',
        "",
        '[case."moe/v3/list@default,torch-2.13,h100-80gb,virtual"]',
        "peak_requested = 3_145_728  # 3.00 MiB",
        "peak_allocated = 4_194_304  # 4.00 MiB",
        "peak_reserved = 6_291_456  # 6.00 MiB",
        "transient = 2_097_152  # 2.00 MiB",
        "retained = -1_536  # -1.50 KiB",
        "stranded = 512",
        "",
    ]
    assert all(line.startswith("# ") or not line for line in text.split("\n")[:3])


def test_which_build_of_torch_it_was_does_not_matter():
    results = results_of([case()], versions={"fragscope": "0.1.0", "torch": "2.13.0+cpu"})
    assert lock_of(results, "x.lock")[0].torch == "2.13.0"


def test_one_value_that_changes_is_one_line_of_the_diff():
    a, b = text_of(case(), case("z")), text_of(case(transient=3 * MIB), case("z"))
    assert [pair for pair in zip(a.split("\n"), b.split("\n"), strict=True) if pair[0] != pair[1]] == [
        ("transient = 2_097_152  # 2.00 MiB", "transient = 3_145_728  # 3.00 MiB")
    ]


def test_the_order_of_the_cases_does_not_matter():
    cases = [case(f"c{i}") for i in (2, 10, 1)]
    assert text_of(*cases) == text_of(*reversed(cases))
    assert list(parse_lock(text_of(*cases)).cases) == ["c1", "c10", "c2"]


def test_memory_taken_past_the_allocator_has_a_line_of_its_own():
    peak = Peak(requested=1, allocated=1, reserved=2 * MIB, raw=MIB, hbm=3 * MIB)
    assert "\npeak_hbm = 3_145_728  # 3.00 MiB\n" in text_of(case(peak=peak))
    assert "peak_hbm" not in text_of(case())
    assert parse_lock(text_of(case())).cases[ID].figures["peak_hbm"] == 6 * MIB


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"estimated_ops": [EstimatedOp("aten::b", 1), EstimatedOp("aten::a", 2)]}, "aten::a, aten::b"),
        ({"assumptions": [AssumptionRecord("tie", "bounded", 1), AssumptionRecord("x", "none", 1)]}, "tie"),
        ({}, "the results do not say why"),
    ],
)
def test_estimated_figures_are_locked_and_marked(changes, reason):
    text = text_of(case(exact=False, **changes))
    assert text.endswith(f'\nestimated = "{reason}"\n')
    assert parse_lock(text).cases[ID].estimated == reason


@pytest.mark.parametrize("outcome", ["oom", "crash", "timeout", "overflow", "wrong", "unsupported"])
def test_of_a_case_that_is_declared_to_end_early_only_the_outcome_is_locked(outcome):
    text = text_of(case(outcome=outcome, expected_outcome=outcome))
    assert text.endswith(f'virtual"]\noutcome = "{outcome}"\n')


def test_a_declared_hazard_came_to_its_end_and_has_figures():
    locked = parse_lock(text_of(case(outcome="hazard", expected_outcome="hazard"))).cases[ID]
    assert (locked.outcome, locked.figures["transient"]) == ("hazard", 2 * MIB)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"device": "cuda"}, "on a card"),
        ({"outcome": "skipped", "message": "needs 9 GiB"}, "was skipped: needs 9 GiB"),
        ({"peak": Peak(), "end": Peak(), "allocs": 0}, "has no figures"),
    ],
)
def test_what_is_not_the_same_every_time_is_left_out(changes, word):
    lock, left_out = lock_of(results_of([case("a"), case("b", **changes)]), "x.lock")
    assert list(lock.cases) == ["a"]
    assert word in left_out["b"]


def test_a_lock_larger_than_any_that_can_be_read_is_not_written():
    figures = parse_lock(text_of(case())).cases[ID].figures
    many = {f"{i:0300}": LockedCase(f"{i:0300}", figures) for i in range(9000)}
    with pytest.raises(UsageError, match="9,000 cases are more than a lock holds"):
        lock_text(Lock("x.lock", many))


_ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)  # TOML, as JSON, has no lone surrogates
_SIZE = st.integers(0, 2**63 - 1)
_SIZES = ("peak_requested", "peak_allocated", "peak_reserved", "peak_hbm", "transient", "stranded")
_LOCKED = st.builds(
    lambda id_, sizes, retained, outcome, estimated: LockedCase(
        id_,
        dict(
            zip(_SIZES, sizes, strict=True)
        ) | {"retained": retained} if outcome in ("ok", "hazard") else {},
        outcome,
        estimated if outcome in ("ok", "hazard") else "",
    ),
    _ANY_TEXT, st.lists(_SIZE, min_size=6, max_size=6), st.integers(-(2**63), 2**63 - 1),
    st.sampled_from(["ok", "hazard", "oom", "crash"]), _ANY_TEXT,
)  # fmt: skip


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.lists(_LOCKED, max_size=5, unique_by=lambda c: c.id), _ANY_TEXT)
def test_whatever_names_hold_the_file_reads_back_as_it_was_written(cases, torch):
    lock = Lock("x.lock", {c.id: c for c in cases}, "0.1.0", torch)
    text = lock_text(lock)
    assert parse_lock(text, "x.lock") == lock
    assert all(line.isprintable() for line in text.split("\n"))
    assert set(tomllib.loads(text).get("case", {})) == set(lock.cases)


GOOD = text_of(case())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["line 1", "states no version"]),
        ("version = 2\n", ["line 1", "version is 2", "reads 1"]),
        ("version = true\n", ["line 1", "version is True"]),
        ("version = 1\ncases = 3\n", ["line 2", "'cases'", "did you mean 'case'?"]),
        ("version = 1\ncase = 3\n", ["line 2", "case is not a table"]),
        ("version = 1\n[case]\na = 3\n", ["line 3", "case.'a' is not a table"]),
        ("version = 1\ntorch = 2.13\n", ["line 2", "torch: 2.13 is not a string"]),
        (GOOD.replace("transient", "transent"), ["line 12", "'transent'", "did you mean 'transient'?"]),
        (
            GOOD.replace("transient = 2_097_152", 'transient = "2 MiB"'),
            ["line 12", "transient: '2 MiB' is not a whole"],
        ),
        (GOOD.replace("transient = 2_097_152", "transient = 2.5"), ["line 12", "2.5 is not a whole number"]),
        (GOOD.replace("transient = 2_097_152", "transient = true"), ["line 12", "True is not a whole number"]),
        (GOOD.replace("transient = 2_097_152", "transient = -1"), ["line 12", "-1 is no size"]),
        (GOOD.replace("transient = 2_097_152", f"transient = {2**63}"), ["line 12", "is no size"]),
        (GOOD.replace("transient = 2_097_152", f"transient = {'9' * 5000}"), ["line 12: holds a number of 5,000"]),
        (GOOD.replace("stranded = 512\n", ""), ["line 8", "states no stranded"]),
        (GOOD + 'outcome = "oom"\n', ["line 9", "a case whose outcome is oom has no figures"]),
        (GOOD + 'outcome = "fine"\n', ["line 15", "outcome: 'fine' is not one of ok, oom"]),
        (GOOD + "outcome = []\n", ["line 15", "outcome: [] is not one of"]),
        (GOOD + "estimated = 3\n", ["line 15", "estimated: 3 is not a string"]),
        (GOOD + "stranded = 512\n", ["line 15", "stands twice, first in line 14"]),
        (GOOD + GOOD.split("\n", 7)[7], ["line 15", "stands twice, first in line 8"]),
        (GOOD + "<<<<<<< HEAD\n", ["line 15", "merge conflict"]),
        (GOOD.partition("ansient")[0], ["line 12"]),
        ("version = 1\nx" + ".x" * 100_000 + " = 1\n", ["line 2", "nested deeper than any lock"]),
        ("version = " + "[" * 100_000, ["line 1", "nested deeper than any lock"]),
    ],
    ids=lambda value: None if isinstance(value, list) else value[-20:].replace("\n", " "),
)
def test_a_file_that_is_no_lock_is_refused_in_one_line_that_names_the_place(text, words):
    with pytest.raises(InputFileError) as caught:
        parse_lock(text)
    said = str(caught.value)
    assert said.isprintable()
    assert len(said) < 600
    for word in words:
        assert word in said


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"\xff", "line 1: is not UTF-8"),
        (b"version = 1\n\0", "line 2"),
        (b"#" * (FILE_LIMIT + 1), "holds more than 4.00 MiB; that is not a locks file"),
    ],
)
def test_bytes_that_are_no_lock(tmp_path, content, word):
    (tmp_path / "x.lock").write_bytes(content)
    with pytest.raises(InputFileError, match="x\\.lock") as caught:
        load_lock(tmp_path / "x.lock")
    assert word in str(caught.value)


@given(st.binary(max_size=200), st.integers(0, len(GOOD)))
def test_any_bytes_anywhere_are_a_lock_or_one_line(tmp_path_factory, junk, at):
    path = tmp_path_factory.getbasetemp() / "any.lock"
    path.write_bytes(GOOD[:at].encode() + junk + GOOD[at:].encode())
    try:
        load_lock(path)
    except InputFileError as e:
        assert str(e).isprintable()


# --- writing anew -------------------------------------------------------------------------------------------------


def lock(*cases: Case, torch: str = "2.13.0") -> Lock:
    return lock_of(results_of(list(cases), versions={"fragscope": "0.1.0", "torch": torch}), "x.lock")[0]


def test_a_run_of_some_cases_leaves_the_others_as_they_are():
    change = relock(lock(case("a"), case("b")), lock(case("b", transient=1), case("c")), prune=False)
    assert (change.added, change.dropped, change.kept) == (("c",), (), ("a",))
    assert change.changed == {"b": ("transient 2.00 MiB -> 1 B (-2,097,151 B)",)}
    assert sorted(change.lock.cases) == ["a", "b", "c"]
    assert change.lock.cases["b"].figures["transient"] == 1
    assert change.differs


def test_pruning_drops_them():
    change = relock(lock(case("a"), case("b")), lock(case("b")), prune=True)
    assert (change.dropped, change.kept, sorted(change.lock.cases), change.differs) == (("a",), (), ["b"], True)


def test_the_same_figures_of_a_part_do_not_differ():
    assert not relock(lock(case("a"), case("b")), lock(case("b")), prune=False).differs


def test_cases_of_two_releases_are_not_mixed():
    old = lock(case("a"), case("b"), torch="2.12.0")
    assert (
        "made with torch 2.12.0, these results with 2.13.0, and 1 of its cases"
        in relock(old, lock(case("b")), prune=False).mixed
    )
    assert relock(old, lock(case("b")), prune=True).mixed == ""
    assert relock(old, lock(case("a"), case("b")), prune=False).mixed == ""


def test_exactness_and_outcomes_are_told_too():
    old, new = lock(case("a"), case("b")), lock(case("a", exact=False), case("b", outcome="oom"))
    changed = relock(old, new, prune=False).changed
    assert changed["a"] == ("exact -> estimated (the results do not say why)",)
    assert changed["b"][0] == "outcome ok -> oom"
    assert "transient 2.00 MiB -> none" in changed["b"]
