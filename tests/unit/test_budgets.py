"""budgets.toml: what it may say, what it means, and where it says the error is."""

from __future__ import annotations

import re
import tomllib

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fragscope.errors import InputFileError
from fragscope.gate import Budget, load_budgets, parse_budgets
from fragscope.results import Case
from fragscope.toml.lines import MAX_DEPTH, TooNestedError, find_lines

MIB = 2**20
GIB = 2**30


def _case(name: str = "moe/v3/list", **changes: object) -> Case:
    scenario, preset, variant = name.split("/")
    return Case(
        **{
            "id": name,
            "digest": "d",
            "scenario": scenario,
            "preset": preset,
            "variant": variant,
            "role": "original",
            "torch": "2.11.0",
            "torch_installed": "2.11.0",
            "card": "h100-80gb",
            "device": "virtual",
            "outcome": "ok",
            **changes,
        }
    )


def _only(text: str) -> Budget:
    (budget,) = parse_budgets(text).budgets
    return budget


# --- limits -------------------------------------------------------------------------------------------------------


def test_limits_are_bytes_and_know_their_lines():
    budget = _only('# limits\n\n[budget."moe/*/list"]\npeak_reserved = "8 GiB"\ntransient = 512\nretained = 0\n')
    assert {metric: (limit.bytes, limit.line) for metric, limit in budget.limits.items()} == {
        "peak_reserved": (8 * GIB, 4),
        "transient": (512, 5),
        "retained": (0, 6),
    }
    assert (budget.pattern, budget.line) == ("moe/*/list", 3)


def test_every_metric_can_be_limited():
    metrics = ["peak_requested", "peak_allocated", "peak_reserved", "peak_hbm", "transient", "retained", "stranded"]
    budget = _only('[budget."a/b/c"]\n' + "".join(f'{m} = "{i} MB"\n' for i, m in enumerate(metrics)))
    assert {m: limit.bytes for m, limit in budget.limits.items()} == {m: i * 10**6 for i, m in enumerate(metrics)}


@pytest.mark.parametrize(
    ("written", "limit"),
    [('"2.3 GiB"', 2_469_606_195), ('"0.5 KiB"', 512), ('"1.5 kB"', 1500), ('"0"', 0), ('"0.0001 KiB"', 0)],
)
def test_a_fraction_of_a_byte_is_dropped(written, limit):
    # 2.3 GiB are 2,469,606,195.2 bytes: 2,469,606,195 are within, 2,469,606,196 are not.
    assert _only(f'[budget."a/b/c"]\ntransient = {written}\n').limits["transient"].bytes == limit


@pytest.mark.parametrize(
    "written",
    ["-1", '"-1 MiB"', '"8 gib"', '"8 GIB"', '"2.3 GIB"', '"2.5"', '"2.5 B"', '"lots"', '""', "1.5", "true", "[1]",
     "{a = 1}", "2020-01-01", "nan", str(2**63), "0x" + "f" * 5000, "[0x" + "f" * 5000 + "]"],
)  # fmt: skip
def test_a_limit_that_is_no_byte_count_names_line_and_key(written):
    with pytest.raises(InputFileError, match=r"^budgets\.toml: line 3: transient: ") as caught:
        parse_budgets(f'[budget."a/b/c"]\nretained = 1\ntransient = {written}\n')
    assert caught.value.exit_code == 5


# --- the glob and what narrows it ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "name", "matches"),
    [
        ("moe/v3/list", "moe/v3/list", True),
        ("moe/*/list", "moe/v3/list", True),
        ("*/*/*", "moe/v3/list", True),
        ("moe/*/list", "moe/v3/stack", False),
        ("moe/v?/l*t", "moe/v3/list", True),
        ("moe/v[12]/list", "moe/v3/list", False),
        ("moe/v[!12]/list", "moe/v3/list", True),
        ("Moe/*/*", "moe/v3/list", False),
        ("moe.*/*/*", "moexx/v3/list", False),
        ("moe/*/*", "moe//", True),
        ("moe[/*/*", "moe[/v3/list", True),
        ("[[]moe]/*/*", "[moe]/v3/list", True),
    ],
)
def test_globs_match_part_by_part(pattern, name, matches):
    assert _only(f"[budget.'{pattern}']\nretained = 0\n").matches_name(name.split("/")) is matches


def test_a_star_does_not_cross_a_slash():
    four_parts = ["moe", "org", "v3", "list"]
    assert not _only('[budget."moe/*/list"]\nretained = 0\n').matches_name(four_parts)
    assert _only('[budget."moe/*/*/list"]\nretained = 0\n').matches_name(four_parts)


@pytest.mark.parametrize(
    ("key", "value", "case", "matches"),
    [
        ("torch", "2.11", {"torch": "2.11.0"}, True),
        ("torch", "2.11", {"torch": "2.11"}, True),
        ("torch", "2.11.0", {"torch": "2.11.0+cu130"}, True),
        ("torch", "2.1", {"torch": "2.11.0"}, False),
        ("torch", "2.11.0", {"torch": "2.11"}, False),
        ("conf", "", {"conf": ""}, True),
        ("conf", "default", {"conf": ""}, True),
        ("conf", "", {"conf": "default"}, True),
        ("conf", "", {"conf": "expandable_segments:True"}, False),
        ("conf", "a:1, b:2", {"conf": "a:1,b:2"}, True),
        ("card", "h100-80gb", {"card": "h100-80gb"}, True),
        ("card", "h100", {"card": "h100-80gb"}, False),
        ("device", "cuda", {"device": "virtual"}, False),
        ("device", "virtual", {"device": "virtual"}, True),
    ],
)
def test_narrowing_keys(key, value, case, matches):
    budget = _only(f'[budget."moe/v3/list"]\n{key} = "{value}"\nretained = 0\n')
    assert budget.matches_settings(_case(**case)) is matches


def test_double_brackets_give_one_glob_several_budgets():
    text = """\
[[budget."a/b/c"]]
conf = ""
transient = 1
[[budget."a/b/c"]]
conf = "expandable_segments:True"
transient = 2
"""
    first, second = parse_budgets(text).budgets
    assert (first.conf, first.line, first.limits["transient"].line) == ("", 1, 3)
    assert (second.conf, second.line, second.limits["transient"].line) == ("expandable_segments:True", 4, 6)


def test_specificity_is_literal_parts_then_narrowing_then_literal_text_then_release():
    def specificity(pattern: str, **narrowing: str) -> tuple[int, ...]:
        keys = "".join(f'{k} = "{v}"\n' for k, v in narrowing.items())
        return _only(f'[budget."{pattern}"]\nretained = 0\n{keys}').specificity

    ascending = [
        specificity("*/*/*"),
        specificity("moe*/*/*"),
        specificity("moe-fp8*/*/*"),
        specificity("*/*/*", card="h100"),
        specificity("*/*/*", card="h100", conf=""),
        specificity("moe/*/*"),
        specificity("moe/*/*", torch="2"),
        specificity("moe/*/*", torch="2.11"),
        specificity("moe/v3/*"),
        specificity("moe/v3/list"),
    ]
    assert ascending == sorted(ascending)
    assert len(set(ascending)) == len(ascending)


# --- files that say nothing, or something wrong -------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "# none yet\n", "[budget]\n"])
def test_a_file_without_budgets_is_read(text):
    assert parse_budgets(text).budgets == ()


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ('[budget."a/b/c"]\n\ntransent = 1\n', 3, ["'transent'", "did you mean 'transient'?"]),
        ('[budget."a/b/c"]\nx = 1\n', 2, ["'x'", "peak_requested", "device"]),
        ('\n[budgets."a/b/c"]\nretained = 1\n', 2, ["'budgets'", "did you mean 'budget'?"]),
        ('[budget."a/b/c"]\nretained = 1\n[tool]\n', 3, ["'tool'", "budget"]),
        ('[budget."a/b"]\nretained = 1\n', 1, ["'a/b'", "three parts"]),
        ("[budget.moe]\nretained = 1\n", 1, ["'moe'", "three parts"]),
        ("[budget]\nretained = 1\n", 2, ["retained"]),
        ('[budget]\n"a/b/c" = 7\n', 2, ["'a/b/c'", "table"]),
        ('[budget]\n"a/b/c" = [{retained = 1}, 7]\n', 2, ["'a/b/c'", "table"]),
        ('[budget."a/b/c"]\nconf = "x:y"\n', 1, ["'a/b/c'", "no limit"]),
        ('[budget."a/b/c"]\nretained = 1\ntorch = 2.11\n', 3, ["torch", "2.11", "quotes"]),
        ('[budget."a/b/c"]\nretained = 1\ndevice = "virtaul"\n', 3, ["virtaul", "did you mean 'virtual'?"]),
        ('[budget."a/b/c"]\nretained = 1\ncard = ""\n', 3, ["card", "empty"]),
        ("budget = 3\n", 1, ["budget"]),
        ('[budget."a/b/c"]\nretained = 1\n[budget.a/b/c]\n', 3, []),
        ('[budget."a/b/c"]\nretained = \n', 2, []),
        ('[budget."a/b/c"]\nretained = 1\n\n[budget."a/b/c"]\ntransient = 1\n', 4, ["twice", "line 1"]),
        ('[budget."a/b/c"]\nretained = 1\n\nretained = 1\n', 4, ["twice", "line 2"]),
        ("\nx = '''\n[a]\n\n", 2, []),
        ("\n[budget", 2, []),
        ("\na = [\n1,\n", 2, []),
        ("\n\na" + ".a" * 40_000 + " = 1\n", 3, ["nested"]),
        ("\na = " + "[" * 40_000, 2, ["nested"]),
        ("\n\na = " + "{a=" * 40_000, 3, ["nested"]),
    ],
)
def test_errors_name_the_line_and_the_key(text, line, words):
    with pytest.raises(InputFileError) as caught:
        parse_budgets(text, "limits.toml")
    message = str(caught.value)
    assert message.startswith("limits.toml: ")
    assert f"line {line}" in message
    for word in words:
        assert word in message
    assert caught.value.exit_code == 5


def test_control_characters_do_not_reach_the_terminal():
    with pytest.raises(InputFileError) as caught:
        parse_budgets('[budget."a/b/\\u001b[31mc"]\n"\\u001b]0;owned\\u0007" = 1\n')
    assert str(caught.value).isprintable()


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(InputFileError, match="no such file"):
        load_budgets(tmp_path / "none.toml")
    with pytest.raises(InputFileError, match="directory"):
        load_budgets(tmp_path)
    (tmp_path / "b.toml").write_bytes(b'[budget."a/b/c"]\nretained = 0 # \xff\n')
    with pytest.raises(InputFileError, match=r"line 2: is not UTF-8"):
        load_budgets(tmp_path / "b.toml")
    (tmp_path / "b.toml").write_bytes(b"#" * (MIB + 1))
    with pytest.raises(InputFileError, match="not a budgets file"):
        load_budgets(tmp_path / "b.toml")


_TOMLISH = st.text(alphabet="[]{}=\"'\\.,#\n\t ab1-/*\x1b\r", max_size=60)


@given(st.one_of(st.text(max_size=60), _TOMLISH, _TOMLISH.map(lambda t: '[budget."a/b/c"]\nretained = 1\n' + t)))
def test_no_text_does_worse_than_a_bad_input_file(text):
    try:
        parse_budgets(text)
    except InputFileError as e:
        assert str(e).isprintable()


# --- the line finder ----------------------------------------------------------------------------------------------


def test_lines_of_headers_keys_inline_tables_and_what_follows_long_strings():
    text = '''\
# [not.a.header]
[budget."a/b/c"] # x
transient = "1 # GiB"
x.'y z' = [1, # [
  {a = 1, "b\\u0020c" = "]"},
]
s = """
[no]
k = 1
"""""
[[budget.d]]
p = 1979-05-27 07:32:00
[[budget.'d']]
p = 2
[budget.d.q]
z = +inf
[budget]
'''
    assert find_lines(text).lines == {
        ("budget",): 17,
        ("budget", "a/b/c"): 2,
        ("budget", "a/b/c", "transient"): 3,
        ("budget", "a/b/c", "x"): 4,
        ("budget", "a/b/c", "x", "y z"): 4,
        ("budget", "a/b/c", "x", "y z", 0): 4,
        ("budget", "a/b/c", "x", "y z", 1): 5,
        ("budget", "a/b/c", "x", "y z", 1, "a"): 5,
        ("budget", "a/b/c", "x", "y z", 1, "b c"): 5,
        ("budget", "a/b/c", "s"): 7,
        ("budget", "d"): 11,
        ("budget", "d", 0): 11,
        ("budget", "d", 0, "p"): 12,
        ("budget", "d", 1): 13,
        ("budget", "d", 1, "p"): 14,
        ("budget", "d", 1, "q"): 15,
        ("budget", "d", 1, "q", "z"): 16,
    }


def test_an_unknown_path_has_the_line_of_what_is_around_it():
    lines = find_lines("\n[a]\nb = 1\n")
    assert (lines.of("a", "b"), lines.of("a", "c"), lines.of("z"), lines.of()) == (3, 2, 1, 1)


def test_depth_is_bounded():
    within = ".".join(["a"] * (MAX_DEPTH - 1)) + " = 1\n"
    assert tomllib.loads(within)
    find_lines(within)
    with pytest.raises(TooNestedError) as caught:
        find_lines("\n" + ".".join(["a"] * (MAX_DEPTH + 1)) + " = 1\n")
    assert caught.value.line == 2


def _quote(key: str, style: int) -> str:
    if style == 0 and re.fullmatch(r"[A-Za-z0-9_-]+", key):
        return key
    if style == 1 and "'" not in key and key.isprintable():
        return f"'{key}'"
    return '"' + "".join(c if c.isalnum() or c in "/*- #.'[]=" else f"\\U{ord(c):08X}" for c in key) + '"'


_KEYS = st.text(st.sampled_from("ab1-_./*#='\"[] é\n\\\x1b"), min_size=1, max_size=6)
_VALUES = st.sampled_from(
    ["1", '"x"', "'#'", '"\\"]"', "true", "1979-05-27 07:32:00", '"""a\n# b\n[c]\n"""', "'''\nk = 1\n'''''", '""""""',
     "[]", "[1, # ]\n 2,\n]", "{}", "[[1], [2]]", '{a = 1, "b" = [1, {c = 2}]}', "-inf", '"""\\\n  x"""', "''"]
)  # fmt: skip
_NOISE = st.sampled_from(["", "\n", "# [x]\n", "\n \t\n", '# "\n'])


@st.composite
def _documents(draw: st.DrawFn) -> tuple[str, dict[tuple[str, ...], int]]:
    """A valid document and the line of every table and key in it."""
    text, lines = "", {}
    tables = draw(st.lists(_KEYS, unique=True, max_size=4))
    for table in tables:
        text += draw(_NOISE)
        lines[(table,)] = text.count("\n") + 1
        text += f"[{draw(st.sampled_from(['', ' ']))}{_quote(table, draw(st.integers(0, 2)))}]"
        text += draw(st.sampled_from(["\n", " # ]\n", "\t\n"]))
        for key in draw(st.lists(_KEYS, unique=True, max_size=4)):
            text += draw(_NOISE)
            lines[(table, key)] = text.count("\n") + 1
            text += f"{_quote(key, draw(st.integers(0, 2)))} = {draw(_VALUES)}"
            text += draw(st.sampled_from(["\n", " # = [\n"]))
    return text, lines


@given(_documents(), st.booleans())
def test_every_table_and_key_of_a_document_has_its_line(document, windows):
    text, lines = document
    assert {path for path in _paths(tomllib.loads(text)) if len(path) <= 2} == set(lines)
    if windows:
        text = text.replace("\n", "\r\n")
    found = find_lines(text).lines
    assert {path: line for path, line in found.items() if len(path) <= 2} == lines


def _paths(value: object, path: tuple[str | int, ...] = ()) -> set[tuple[str | int, ...]]:
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = {path} if path else set()
    for key, inner in pairs:
        found |= _paths(inner, (*path, key))
    return found


_PIECES = st.sampled_from(
    ["[a]", "[[b]]", "[a.b]", "[[b.c]]", "[b.d]", "a = 1", "x.y = 2", "x.z.w = {q = [1, {r.s = 2}]}", "'k' = '''\n'''",
     "\n", "\n", "\n", " ", "# c", '"\\u0061" = "\\"#"', "v = [\n[1],\n# ]\n{x=1}\n]", '"""', "'", "[", "]", ","]
)  # fmt: skip


@given(st.lists(_PIECES, max_size=12).map("".join))
@example('a = """\n"""""\nb = 1')
@example("a = '''x''''\nb = 1")
def test_whatever_tomllib_accepts_is_found_whole(text):
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        find_lines(text)
        return
    assert set(find_lines(text).lines) == _paths(content)
