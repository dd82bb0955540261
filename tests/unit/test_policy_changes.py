"""Limits of two trees against each other."""

from __future__ import annotations

from pathlib import Path

import pytest

from fragscope.against.git import Repository
from fragscope.against.run import stated_config
from fragscope.cli.against import Wanted, policy_changes
from fragscope.config import load_config
from fragscope.errors import InputFileError
from fragscope.gate.policy import PolicyFile, budget_changes, lock_changes, read_policy, setting_changes

GIB = 2**30
FILE = "budgets.toml"


def budgets(before: str | None, after: str | None) -> list[tuple[str, str, str, int | None, int | None]]:
    found = budget_changes(PolicyFile(FILE, before), PolicyFile(FILE, after))
    return [(c.kind, c.what, c.metric, c.before, c.after) for c in found]


LIMIT = '[budget."a/b/c"]\nretained = "{}"\n'


def test_a_raised_budget_says_by_how_much_and_where():
    old, new = LIMIT.format("1 GiB"), f"# a comment\n{LIMIT.format('2.2 GiB')}"
    (change,) = budget_changes(PolicyFile(FILE, old), PolicyFile(FILE, new))
    assert (change.kind, change.file, change.line) == ("raised", FILE, 3)
    assert (change.before, change.after) == (GIB, int(2.2 * GIB))
    assert change.detail == "raised by 1,228.80 MiB, from 1,024.00 MiB to 2,252.80 MiB"  # 1.2 GiB


def test_what_only_looks_different_is_no_change():
    assert budgets(LIMIT.format("1 GiB"), f"# moved\n\n{LIMIT.format('1024 MiB')}") == []
    narrowed = '[budget."a/b/c"]\nconf = "x: 1"\nretained = 5\n'
    assert budgets(narrowed, narrowed.replace("x: 1", "x:1")) == []


def test_those_that_let_more_pass_come_first():
    before = '[budget."a/b/c"]\nretained = 5\ntransient = 5\npeak_reserved = 5\npeak_hbm = 7\n'
    after = '[budget."a/b/c"]\nretained = 4\ntransient = 6\npeak_reserved = 9\nstranded = 1\n'
    assert budgets(before, after) == [
        ("raised", "a/b/c", "peak_reserved", 5, 9),
        ("raised", "a/b/c", "transient", 5, 6),
        ("removed", "a/b/c", "peak_hbm", 7, None),
        ("new", "a/b/c", "stranded", None, 1),
        ("lowered", "a/b/c", "retained", 5, 4),
    ]


def test_a_budget_is_known_by_its_glob_and_what_narrows_it():
    two = '[[budget."a/b/c"]]\nretained = 5\n[[budget."a/b/c"]]\ncard = "l4"\nretained = 9\n'
    raised = two.replace("retained = 9", "retained = 10")
    assert budgets(two, raised) == [("raised", "a/b/c (card l4)", "retained", 9, 10)]


def test_files_that_come_and_go():
    assert budgets(None, LIMIT.format(1)) == [("new", FILE, "", None, None)]
    assert budgets(LIMIT.format(1), None) == [("removed", FILE, "", None, None)]
    assert budgets(None, None) == []


def test_a_file_that_could_not_be_used_before_is_said_and_one_that_cannot_be_used_now_is_refused():
    assert budgets("[budget", LIMIT.format(1)) == [("changed", FILE, "", None, None)]
    with pytest.raises(InputFileError, match=FILE):
        budgets(LIMIT.format(1), "[budget")


def test_a_lock_says_how_many_lines_changed():
    before, after = PolicyFile("fragscope.lock", "a\nb\nc\n"), PolicyFile("fragscope.lock", "a\nB\nc\nd\n")
    (change,) = lock_changes(before, after)
    assert (change.kind, change.detail) == ("changed", "2 lines written, 1 taken out")
    assert lock_changes(before, before) == []
    assert [c.kind for c in lock_changes(PolicyFile("x", None), after)] == ["new"]


def test_a_changed_tolerance_is_said():
    assert setting_changes("tolerance", "1 %", "1 %") == []
    (change,) = setting_changes("tolerance", None, "5 %")
    assert change.detail == "tolerance was the default, now 5 %"


def test_what_cannot_be_read_is_as_if_it_were_not_there(tmp_path: Path):
    assert read_policy(tmp_path / "none", "none").text is None
    assert read_policy(tmp_path, "folder").text is None
    assert read_policy(None, "none").text is None
    (tmp_path / "bad").write_bytes(b"\xff\xfe")
    assert read_policy(tmp_path / "bad", "bad").text is not None


def test_a_lock_is_compared_as_far_as_a_lock_may_reach(tmp_path: Path):
    """4 MiB, of which every second line changed; both figures are counted here."""
    lines = [f"{number:063d}" for number in range(2**16)]
    changed = [line if number % 2 else f"x{line[1:]}" for number, line in enumerate(lines)]
    for name, content in (("old", lines), ("new", changed)):
        (tmp_path / name).write_text("\n".join(content) + "\n")
    (change,) = lock_changes(read_policy(tmp_path / "old", "lock"), read_policy(tmp_path / "new", "lock"))
    assert change.detail == "32,768 lines written, 32,768 taken out"


STRICT, LOOSE = LIMIT.format(5), LIMIT.format(9)


@pytest.mark.parametrize(
    ("files", "before", "after", "said"),
    [
        ({"memory.lock": "a"}, 'lock = "memory.lock"', "",
         ["lock was memory.lock, now the default", "memory.lock the lock file is no longer in force"]),
        ({"a.lock": "a\nb\n", "b.lock": "a\n"}, 'lock = "a.lock"', 'lock = "b.lock"',
         ["lock was a.lock, now b.lock", "b.lock 0 lines written, 1 taken out"]),
        ({"budgets.toml": STRICT, "loose.toml": LOOSE}, "", 'budgets = "loose.toml"',
         ["budgets was the default, now loose.toml", "loose.toml raised by 4 B, from 5 B to 9 B"]),
        ({"budgets.toml": LOOSE, "strict.toml": STRICT}, 'budgets = "strict.toml"', "",
         ["budgets was strict.toml, now the default", "budgets.toml raised by 4 B, from 5 B to 9 B"]),
        ({}, "", "warn_only = true", ["warn_only was false, now true"]),
        ({}, "", 'card = "b200"\ntorch = "2.9"', ["card was the default, now b200", "torch was the default, now 2.9"]),
        ({}, '[tool.fragscope.cards.mine]\nlike = "l4"\ntotal = "20 GiB"\nfree = "19 GiB"',
         '[tool.fragscope.cards.mine]\nlike = "l4"\ntotal = "48 GiB"\nfree = "19 GiB"\nmultiprocessors = 57\n'
         '[tool.fragscope.cards.new]\nlike = "l4"',
         ["cards.mine was total 20.00 GiB, multiprocessors 58, now total 48.00 GiB, multiprocessors 57"]),
        ({}, '[tool.fragscope.cards.mine]\nlike = "l4"', "", ["cards.mine was defined, now not"]),
        ({}, '[tool.fragscope.cards.mine]\nlike = "no such card"', "", []),
        ({"memory.lock": "a", "strict.toml": STRICT}, 'lock = "memory.lock"\nbudgets = "strict.toml"',
         'lock = "memory.lock"\nbudgets = "strict.toml"', []),
    ],
)  # fmt: skip
def test_settings_that_name_other_limits_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], before: str, after: str, said: list[str]
):
    """The same files lie in both trees; only what pyproject.toml says of them changes."""
    tree, top = tmp_path / "tree", tmp_path / "top"
    for folder, table in ((tree, before), (top, after)):
        folder.mkdir()
        for name, text in {**files, "pyproject.toml": f"[tool.fragscope]\n{table}\n"}.items():
            (folder / name).write_text(text)
    monkeypatch.chdir(top)
    repository, current = Repository(top, ""), load_config(top)
    found = policy_changes(repository, tree, stated_config(tree, tree), current, Wanted("main"))
    assert [c.detail if c.file == "pyproject.toml" else f"{c.file} {c.detail}" for c in found] == said
    # What an option names is held whatever the keys say, and is the same file in both trees.
    options = Wanted("main", budgets=Path("budgets.toml"), lock=Path("fragscope.lock"))
    found = policy_changes(repository, tree, stated_config(tree, tree), current, options)
    assert {c.file for c in found} <= {"pyproject.toml"}


WAIVER = """
[[waiver]]
case = "a/b/c"
metrics = ["transient"]
owner = "@jane"
reason = "fixed upstream in 0.21"
expires = 2027-03-31
"""


def details(before: str, after: str) -> list[tuple[str, str, int, str]]:
    found = budget_changes(PolicyFile(FILE, before), PolicyFile(FILE, after))
    return [(c.kind, c.what, c.line, c.detail) for c in found]


def test_a_new_waiver_says_what_it_waives_until_when_and_who_answers_for_it():
    limit = LIMIT.format(5)
    other = WAIVER.replace("a/b/c", "x/*/*") + 'limit = "4 MiB"\ncard = "l4"\n'
    assert details(limit + WAIVER, limit + WAIVER + other) == [
        ("changed", "waiver x/*/* (card l4)", 11,
         "new: waives transient up to 4.00 MiB, until 2027-03-31, owner @jane: fixed upstream in 0.21"),
    ]  # fmt: skip
    assert details(limit + other + WAIVER, limit + WAIVER) == [
        ("changed", "waiver x/*/* (card l4)", 4, "gone: waived transient up to 4.00 MiB, until 2027-03-31, owner @jane")
    ]


def test_a_waiver_that_is_otherwise_says_how_and_one_that_moved_is_the_same():
    second = WAIVER.replace("transient", "retained").replace("@jane", "@joe")
    longer = WAIVER.replace("2027-03-31", "2028-03-31").replace("fixed", "perhaps fixed")
    assert details(WAIVER + second, second + longer) == [
        ("changed", "waiver a/b/c", 9, "changed, owner @jane: expires was 2027-03-31, now 2028-03-31; "
         "reason was fixed upstream in 0.21, now perhaps fixed upstream in 0.21"),
    ]  # fmt: skip
    wider = WAIVER.replace('["transient"]', '["transient", "retained"]') + "limit = 5\n"
    assert details(WAIVER, wider)[0][3] == (
        "changed, owner @jane: metrics was transient, now transient, retained; limit was none, now 5 B"
    )
    assert details(WAIVER + second, f"# moved\n{second}{WAIVER}") == []


def test_what_a_waiver_says_of_itself_is_harmless():
    hostile = WAIVER.replace("@jane", r"@x\n::error::y").replace("a/b/c", r"a/b/\u001b[2J")
    ((_, what, _, detail),) = details(LIMIT.format(5), LIMIT.format(5) + hostile)
    assert what.isprintable()
    assert detail.isprintable()


def test_what_the_lock_lets_pass_is_said():
    assert details(LIMIT.format(5), LIMIT.format(5) + '[lock]\nimprovements = "allow"\n') == [
        ("changed", "[lock]", 0, "improvements was fail, now allow")
    ]
