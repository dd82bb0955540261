"""A verdict for GitHub and for JUnit, read back with parsers: nothing of a hostile name gets out of its place."""

from __future__ import annotations

import re
from typing import Any
from xml.etree import ElementTree

import msgspec
import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt  # rich depends on it

from fragscope.errors import printable
from fragscope.gate.annotations import PER_LEVEL, as_github
from fragscope.gate.findings import findings
from fragscope.gate.junit import as_junit
from fragscope.gate.markdown import COMMENT_LIMIT, MARKER, SUMMARY_LIMIT, as_comment, as_markdown
from fragscope.gate.render import as_text
from fragscope.gate.verdict import (
    Against,
    BudgetName,
    CaseName,
    Change,
    Check,
    LockDifference,
    LockPlace,
    LockUse,
    NotMeasured,
    OneSided,
    OutcomeChange,
    PolicyChange,
    StackChange,
    Undeclared,
    Verdict,
    WaiverName,
    WaiverUse,
    decided,
)

MIB = 2**20


def name(text: str = "moe/v3/list", **changes: Any) -> CaseName:
    values = {
        "id": text, "name": text, "scenario": "moe", "preset": "v3", "variant": "list", "conf": "", "torch": "2.13",
        "card": "h100-80gb", "device": "virtual",
    }  # fmt: skip
    return CaseName(**(values | changes))


def over(text: str = "moe/v3/list", by: int = MIB, file: str = "budgets.toml", **changes: Any) -> Check:
    budget = BudgetName(pattern=text, file=file, line=7)
    values = {"metric": "transient", "limit": MIB, "value": MIB + by, "excess": by, "over": by > 0, "exact": True}
    return Check(case=name(text), budget=budget, **(values | changes))


def verdict_of(**changes: Any) -> Verdict:
    values: dict[str, Any] = {
        "decision": "pass", "exit_code": 0, "budgets": 1, "cases": 1, "cases_held": 1, "cases_without_budget": 0,
        "checks": [], "undeclared": [], "not_measured": [],
    }  # fmt: skip
    return decided(Verdict(**(values | changes)))


STACK = StackChange(
    kind="new", before=0, after=704 * MIB, file="acme/loader.py", line=12, function="load", code="torch.stack(w13)"
)
CHANGE = Change(case=name(), metric="transient", before=MIB, after=705 * MIB, allowed=0, regressed=True, stacks=[STACK])


# --- what GitHub's runner makes of a line ------------------------------------------------------------------------

_KNOWN = {"error", "warning", "notice", "debug", "group", "endgroup", "add-mask", "set-output", "set-env", "save-state"}
_KNOWN |= {"add-path", "add-matcher", "remove-matcher", "echo", "stop-commands"}


def command_in(line: str) -> tuple[str, dict[str, str], str] | None:
    """Command, properties and data, as the runner reads a line of a log (actions/runner, ActionCommand.cs)."""

    def unescaped(text: str, *pairs: tuple[str, str]) -> str:
        for written, meant in (("%0D", "\r"), ("%0A", "\n"), *pairs, ("%25", "%")):
            text = text.replace(written, meant)
        return text

    stripped = line.lstrip()
    if stripped.startswith("::") and "::" in stripped[2:]:
        head, _, data = stripped[2:].partition("::")
        word, _, rest = head.partition(" ")
        if word.lower() in _KNOWN:
            pairs = [p.split("=", 1) for p in rest.strip().split(",") if "=" in p]
            return word, {k: unescaped(v, ("%3A", ":"), ("%2C", ",")) for k, v in pairs}, unescaped(data)
    old = re.search(r"##\[([^\]]*)\]", line)
    if old and old[1].split(" ")[0].lower() in _KNOWN:
        return old[1].split(" ")[0], {}, line
    return None


def test_the_reader_of_commands_finds_hostile_ones():
    assert command_in("  ::stop-commands::x") == ("stop-commands", {}, "x")
    assert command_in("harmless ##[add-mask]x") is not None
    assert command_in("::error file=a%2Cb.py,line=3::one%0Atwo%250A") == (
        "error", {"file": "a,b.py", "line": "3"}, "one\ntwo%0A"
    )  # fmt: skip
    assert command_in("harmless ::error::x") is None


def commands(text: str) -> list[tuple[str, dict[str, str], str]]:
    return [found for line in text.split("\n") if (found := command_in(line))]


def test_an_annotation_stands_at_the_line_that_now_costs_more():
    verdict = verdict_of(checks=[over(by=704 * MIB)], changes=[CHANGE])
    ((level, properties, data),) = commands(as_github(verdict))
    assert level == "error"
    assert properties == {
        "file": "acme/loader.py", "line": "12", "title": "over, regressed: moe/v3/list transient"
    }  # fmt: skip
    assert data.split("\n") == [
        "over: budget 1.00 MiB, value 705.00 MiB, excess 704.00 MiB (+70,400.0 %) [budgets.toml:7]",
        "regressed: before 1.00 MiB, now 705.00 MiB, more 704.00 MiB (+70,400.0 %)",
        "+704.00 MiB  acme/loader.py:12  torch.stack(w13)  new",
    ]


def test_without_a_place_in_the_code_it_stands_at_the_limit():
    ((_, properties, _),) = commands(as_github(verdict_of(checks=[over()])))
    assert (properties["file"], properties["line"]) == ("budgets.toml", "7")
    ((_, properties, _),) = commands(as_github(verdict_of(checks=[over()]), "ci/memory"))
    assert properties["file"] == "ci/memory/budgets.toml"


@pytest.mark.parametrize("file", ["/etc/passwd", "../secret", "a/../../b"])
def test_a_file_outside_the_repository_is_not_named(file):
    ((_, properties, _),) = commands(as_github(verdict_of(checks=[over(file=file)])))
    assert set(properties) == {"title"}


def test_a_difference_from_the_lock_stands_at_its_line():
    difference = LockDifference(
        case=name(), kind="larger", metric="transient", locked=1, value=2, lock=LockPlace(file="fragscope.lock", line=9)
    )
    ((level, properties, _),) = commands(as_github(verdict_of(lock_differences=[difference])))
    assert (level, properties["file"], properties["line"]) == ("error", "fragscope.lock", "9")


def test_no_more_annotations_than_github_takes_the_worst_of_them_and_the_rest_counted():
    checks = [over(f"c{i:02}", by=i * MIB) for i in range(1, 26)]
    crash = Undeclared(case=name("z"), outcome="crash", expected_outcome="ok")
    policy = [PolicyChange(file="b", line=i, what="x", kind="raised", before=1, after=2) for i in range(13)]
    unused = WaiverName(pattern="a/b/c", metrics=[], owner="o", reason="r", expires="2027-01-01", file="b", line=1)
    waivers = [WaiverUse(waiver=unused, state="unused", findings=0)] * 10
    new = [OneSided(case=name("n"), reason="new")]
    text = as_github(verdict_of(checks=checks, undeclared=[crash], policy=policy, waivers=waivers, appeared=new))
    found = commands(text)
    levels = [level for level, _, _ in found]
    assert [levels.count(level) for level in ("error", "warning", "notice")] == [10, 10, 10] == [PER_LEVEL] * 3
    assert [properties["title"].split(": ")[1].split()[0] for _, properties, _ in found[:10]] == [
        "z", *(f"c{i:02}" for i in range(25, 16, -1))
    ]  # fmt: skip
    assert found[-1][2] == ("16 errors, 3 warnings, 1 notice more than GitHub shows; the log of this step has them all")
    assert all(f"  c{i:02}  " in text for i in range(1, 26))  # the text has them all


def test_what_only_warns_is_a_warning():
    verdict = decided(msgspec.structs.replace(verdict_of(checks=[over()]), warn_only=True))
    assert [level for level, _, _ in commands(as_github(verdict))] == ["warning"]


def test_a_pass_has_no_annotation():
    verdict = verdict_of(checks=[over(by=-1)], appeared=[OneSided(case=name("n"), reason="new")])
    assert as_github(verdict) == as_text(verdict)


# --- Markdown -----------------------------------------------------------------------------------------------------


def rendered(text: str) -> list[Any]:
    return MarkdownIt("commonmark").enable("table").enable("strikethrough").parse(text)


def inline(tokens: list[Any]) -> list[Any]:
    return [child for token in tokens for child in token.children or ()]


def cells_of(line: str) -> list[str]:
    """A table's row as GitHub splits it: at bars, but for those that an odd backslash escapes (cmark-gfm)."""
    return re.findall(r"((?:\\[!-/:-@\[-`{-~]|[^|\n])*)\|", line.strip().removeprefix("|"))


def test_the_reader_of_rows_splits_where_github_does():
    assert cells_of(r"| a | b\|c | d\\| e |") == [" a ", r" b\|c ", r" d\\", " e "]


def test_the_comment_of_a_failing_gate():
    verdict = verdict_of(checks=[over(by=704 * MIB)], changes=[CHANGE])
    assert as_comment(verdict).split("\n") == [
        "<!-- fragscope-gate -->",
        "### fragscope gate: failed",
        "",
        as_text(verdict).splitlines()[-1],
        "",
        "| | case | metric | limit | value | more | stated in | |",
        "|---|---|---|--:|--:|--:|---|---|",
        "| over | `moe/v3/list` | `transient` | 1.00 MiB | 705.00 MiB | 704.00 MiB (+70,400.0 %) "
        "| `budgets.toml:7` |  |",
        "| regressed | `moe/v3/list` | `transient` | 1.00 MiB | 705.00 MiB | 704.00 MiB (+70,400.0 %) |  |  |",
        "",
        "What `moe/v3/list` holds otherwise:",
        "",
        "- `transient`",
        "  - +704.00 MiB  `acme/loader.py:12`  `torch.stack(w13)`  new",
        "",
    ]


@pytest.mark.parametrize("limit", [COMMENT_LIMIT, SUMMARY_LIMIT])
def test_what_does_not_fit_is_cut_from_the_end_and_counted(limit):
    long = "x" * 250 + "é"
    verdict = verdict_of(checks=[over(f"c{i:05}{long}", by=MIB * (20_000 - i)) for i in range(5_000)])
    text = as_comment(verdict) if limit == COMMENT_LIMIT else as_markdown(verdict, limit)
    assert limit * 0.98 < len(text.encode()) <= limit
    shown = re.findall(r"`c(\d{5})", text)
    assert shown == [f"{i:05}" for i in range(len(shown))]
    assert f"**{5_000 - len(shown):,} more findings did not fit here**" in text


def test_without_a_limit_nothing_is_cut():
    verdict = verdict_of(checks=[over(f"c{i:05}") for i in range(3_000)])
    assert len(re.findall("`c", as_markdown(verdict))) == 3_000


def test_a_warning_only_says_so_in_its_heading():
    verdict = decided(msgspec.structs.replace(verdict_of(checks=[over()]), warn_only=True))
    assert as_markdown(verdict).startswith("### fragscope gate: failed (only a warning)\n")


# --- JUnit --------------------------------------------------------------------------------------------------------

_FORM: dict[str, tuple[set[str], set[str], set[str]]] = {
    # element: required attributes, allowed attributes, children; the Jenkins plugin's junit-10.xsd as far as it is used
    "testsuites": (set(), {"name", "time", "tests", "failures", "errors"}, {"testsuite"}),
    "testsuite": ({"name", "tests", "failures", "errors"}, {"name", "tests", "failures", "errors", "skipped", "time"},
                  {"testcase", "system-out"}),
    "testcase": ({"name"}, {"name", "time", "classname"}, {"failure", "error", "skipped", "system-out"}),
    "failure": (set(), {"type", "message"}, set()),
    "error": (set(), {"type", "message"}, set()),
    "skipped": (set(), set(), set()),
    "system-out": (set(), set(), set()),
}  # fmt: skip


def checked_junit(text: str) -> ElementTree.Element:
    """The root of a document that is of the form, holds what it counts, and declares nothing."""
    assert text.startswith('<?xml version="1.0" encoding="utf-8"?>\n<testsuites>')
    assert "<!" not in text
    root = ElementTree.fromstring(text.encode())
    assert root.tag == "testsuites"
    for element in root.iter():
        required, allowed, children = _FORM[element.tag]
        assert required <= set(element.attrib) <= allowed
        assert {child.tag for child in element} <= children
    (suite,) = root
    cases = suite.findall("testcase")
    kinds = {"failures": "failure", "errors": "error", "skipped": "skipped"}
    assert suite.get("tests") == str(len(cases))
    for total, kind in kinds.items():
        assert suite.get(total) == str(len(suite.findall(f"testcase/{kind}")))
    assert re.fullmatch(r"(([0-9]{0,3},)*[0-9]{3}|[0-9]{0,3})*(\.[0-9]{0,3})?", suite.get("time", ""))
    return suite


def test_junit_has_a_test_case_for_each_value():
    waiver = WaiverName(
        pattern="a/b/c", metrics=["transient"], owner="@j", reason="r", expires="2027-01-01", file="b", line=1
    )
    verdict = verdict_of(
        checks=[over("a", by=704 * MIB), over("b", by=-1), over("c", waiver=waiver)],
        changes=[msgspec.structs.replace(CHANGE, case=name("a"))],
        undeclared=[Undeclared(case=name("d"), outcome="crash", expected_outcome="ok", message="died")],
        not_measured=[NotMeasured(case=name("e"), reason="skipped")],
    )
    suite = checked_junit(as_junit(verdict))
    assert suite.attrib == {
        "name": "fragscope gate", "tests": "5", "failures": "2", "errors": "1", "skipped": "1", "time": "0"
    }  # fmt: skip
    assert [(c.get("classname"), c.get("name"), [x.tag for x in c]) for c in suite.findall("testcase")] == [
        ("a", "transient", ["failure"]),
        ("b", "transient", []),
        ("c", "transient", ["skipped"]),
        ("d", "undeclared", ["failure"]),
        ("e", "not measured", ["error"]),
    ]
    failure = suite.find("testcase/failure")
    assert failure is not None
    assert failure.attrib == {
        "type": "over", "message": "budget 1.00 MiB, value 705.00 MiB, excess 704.00 MiB (+70,400.0 %)"
    }  # fmt: skip
    assert "\n  +704.00 MiB  acme/loader.py:12  torch.stack(w13)  new" in (failure.text or "")


def test_junit_of_warnings_fails_nothing():
    verdict = decided(msgspec.structs.replace(verdict_of(checks=[over()]), warn_only=True))
    suite = checked_junit(as_junit(verdict))
    assert (suite.get("failures"), suite.get("skipped")) == ("0", "1")


# --- hostile names ------------------------------------------------------------------------------------------------

_PIECES = [
    "::error::x", "::stop-commands::t", "##[add-mask]a", "##[error]x", "\n::set-output name=a::b", "\r\n",
    "%0A::error::",
    "|", r"\|", "\\", "`", "```", "<script>alert(1)</script>", "<img src=x>", "</code>", "-->",
    "<!-- fragscope-gate -->",
    "@everyone", "#1", "GH-2", "https://evil.example/a", "www.evil.example", "a@b.co", "[x](javascript:a)", "![i](u)",
    "*b*", "_i_", "~~s~~", "$x$", ":smile:", "]]>", "&lt;", "&#64;x", "<!DOCTYPE a [<!ENTITY b 'c'>]>",
    "\x1b[31m", "\0",
    "\x85", "\u2028", "\u202e", "\ufffe", "\ud7ff", "a,b=c", "\t", " ", "é", "😀",
]  # fmt: skip
_HOSTILE = st.lists(st.sampled_from(_PIECES) | st.text(max_size=4), max_size=6).map("".join)
_SIZE = st.integers(-(2**63), 2**63 - 1)
_NAMES = st.builds(
    CaseName, id=_HOSTILE, name=_HOSTILE, scenario=_HOSTILE, preset=_HOSTILE, variant=_HOSTILE, conf=_HOSTILE,
    torch=_HOSTILE, card=_HOSTILE, device=_HOSTILE,
)  # fmt: skip
_WORDS = st.lists(_HOSTILE, max_size=2)
_METRIC = st.sampled_from(["transient", "retained"]) | _HOSTILE
_LINE = st.integers(0, 2**40)
_WAIVERS = st.builds(
    WaiverName, pattern=_HOSTILE, metrics=_WORDS, owner=_HOSTILE, reason=_HOSTILE, expires=_HOSTILE, file=_HOSTILE,
    line=_LINE, limit=st.none() | st.integers(0, 2**63),
)  # fmt: skip
_MAYBE_WAIVER = st.none() | _WAIVERS
_BUDGETS = st.builds(BudgetName, pattern=_HOSTILE, file=_HOSTILE, line=_LINE)
_LOCKS = st.builds(LockPlace, file=_HOSTILE, line=_LINE)
_CHECKS = st.builds(
    Check, case=_NAMES, metric=_METRIC, limit=_SIZE, value=_SIZE, excess=_SIZE, over=st.booleans(), budget=_BUDGETS,
    exact=st.booleans(), caveats=_WORDS, waiver=_MAYBE_WAIVER,
)  # fmt: skip
_STACKS = st.builds(
    StackChange, kind=st.sampled_from(["new", "grown", "shrunk", "gone"]), before=_SIZE, after=_SIZE, file=_HOSTILE,
    line=_LINE, function=_HOSTILE, code=_HOSTILE, frames=_WORDS,
)  # fmt: skip
_CHANGES = st.builds(
    Change, case=_NAMES, metric=_METRIC, before=_SIZE, after=_SIZE, allowed=_SIZE, regressed=st.booleans(),
    stacks=st.lists(_STACKS, max_size=2), caveats=_WORDS, waiver=_MAYBE_WAIVER,
)  # fmt: skip
_DIFFERENCES = st.builds(
    LockDifference, case=_NAMES, kind=st.sampled_from(["larger", "smaller", "changed", "unlocked"]), metric=_METRIC,
    locked=st.none() | _SIZE | _HOSTILE, value=st.none() | _SIZE | _HOSTILE, lock=_LOCKS, allowed=st.booleans(),
    reason=_HOSTILE, caveats=_WORDS, waiver=_MAYBE_WAIVER,
)  # fmt: skip


def _some(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[list[Any]]:
    return st.lists(strategy, max_size=2)


_VERDICTS = st.builds(
    verdict_of,
    checks=_some(_CHECKS),
    undeclared=_some(
        st.builds(Undeclared, case=_NAMES, outcome=_HOSTILE, expected_outcome=_HOSTILE, message=_HOSTILE)
    ),
    not_measured=_some(
        st.builds(
            NotMeasured, case=st.none() | _NAMES, budget=st.none() | _BUDGETS, reason=_HOSTILE, lock=st.none() | _LOCKS
        )
    ),
    lock=st.none() | st.builds(LockUse, file=_HOSTILE, cases=_LINE, held=_LINE, note=_HOSTILE),
    lock_differences=_some(_DIFFERENCES),
    waivers=_some(
        st.builds(
            WaiverUse,
            waiver=_WAIVERS,
            state=st.sampled_from(["applied", "exceeded", "expired", "unused"]),
            findings=_LINE,
        )
    ),
    warn_only=st.booleans(),
    against=st.none()
    | st.builds(Against, ref=_HOSTILE, commit=_HOSTILE, current=_HOSTILE, dirty=st.booleans(), notes=_WORDS),
    policy=_some(
        st.builds(
            PolicyChange, file=_HOSTILE, line=_LINE, what=_HOSTILE, metric=_HOSTILE,
            kind=st.sampled_from(["raised", "lowered", "new", "removed", "changed"]), before=st.none() | _SIZE,
            after=st.none() | _SIZE, detail=_HOSTILE,
        )
    ),
    changes=_some(_CHANGES),
    appeared=_some(st.builds(OneSided, case=_NAMES, reason=_HOSTILE)),
    outcomes=_some(
        st.builds(
            OutcomeChange, case=_NAMES, before=_HOSTILE, after=_HOSTILE, regressed=st.booleans(), message=_HOSTILE
        )
    ),
)  # fmt: skip
_FUZZ = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    phases=(Phase.explicit, Phase.reuse, Phase.generate),  # shrinking a whole verdict takes minutes
)


@_FUZZ
@given(_VERDICTS)
def test_no_name_becomes_a_command_and_every_annotation_is_one_of_ours(verdict):
    lines = as_github(verdict).split("\n")
    text = as_text(verdict).rstrip("\n").split("\n")
    annotations, rest = lines[: -len(text) - 1], lines[-len(text) - 1 :]
    assert rest == [*text, ""]
    assert all(line.isprintable() for line in lines)
    assert [line for line in rest if command_in(line)] == []
    for line in annotations:
        found = command_in(line)
        assert found is not None
        level, properties, data = found
        assert level in ("error", "warning", "notice")
        assert line.startswith(f"::{level} ")
        assert set(properties) <= {"file", "line", "title"}
        assert "title" in properties
        assert properties.get("line", "1").isdigit()
        assert not properties.get("file", "").startswith("/")
        assert ".." not in properties.get("file", "").split("/")
        assert all(value.isprintable() for value in properties.values())
        assert all(part.isprintable() and command_in(part) is None for part in data.split("\n"))
    if verdict.warn_only:
        assert not any(line.startswith("::error") for line in annotations)


_OURS = re.compile(r"[\w\s.,:;()%+<\-…|/]*", re.ASCII)


@_FUZZ
@given(_VERDICTS)
@example(verdict_of(checks=[over("a\\|@everyone `")]))
def test_no_name_leaves_its_code_span(verdict):
    text = as_comment(verdict)
    first, _, body = text.partition("\n")
    assert first == MARKER
    assert len(text) <= COMMENT_LIMIT
    tokens = rendered(body)
    assert [token.content for token in tokens if token.type == "html_block"] == []
    assert not any(token.type in ("fence", "code_block", "blockquote_open", "hr") for token in tokens)
    assert {child.type for child in inline(tokens)} <= {
        "text",
        "code_inline",
        "softbreak",
        "strong_open",
        "strong_close",
    }
    for child in inline(tokens):
        if child.type == "text":
            assert _OURS.fullmatch(child.content.replace("&", "")), child.content
            assert not re.search(r"@|#|://|www\.|GH-", child.content)
        assert child.content.isprintable()
    for line in body.split("\n"):
        if line.startswith("| "):
            assert len(cells_of(line)) == 8, line


@_FUZZ
@given(_VERDICTS)
def test_junit_is_always_of_its_form(verdict):
    suite = checked_junit(as_junit(verdict))
    failing = [f for f in findings(verdict) if f.level == "error"]
    failures = int(suite.get("failures", "")) + int(suite.get("errors", ""))
    assert (failures > 0) == (bool(failing) and not verdict.warn_only)
    shown = {case.get("classname") for case in suite.findall("testcase")}
    for id_ in {f.case_id for f in failing if f.case_id}:  # results of strangers may call one case by several names
        names = {printable(f.case, 300) for f in findings(verdict) if f.case_id == id_}
        assert names & shown or "" in names


@_FUZZ
@given(_VERDICTS, st.randoms(use_true_random=False))
def test_findings_do_not_depend_on_the_order_of_the_lists(verdict, shuffler):
    def shuffled(entries: list[Any]) -> list[Any]:
        return shuffler.sample(entries, len(entries))

    changed = msgspec.structs.replace(
        verdict,
        **{
            field: shuffled(getattr(verdict, field))
            for field in ("undeclared", "not_measured", "lock_differences", "policy")
        },
    )
    assert findings(changed) == findings(verdict)
