"""What people read of a comparison, in text and in Markdown."""

from __future__ import annotations

from typing import Any

from fragscope.gate.annotations import as_github
from fragscope.gate.markdown import as_markdown
from fragscope.gate.render import as_text
from fragscope.gate.verdict import (
    Against,
    CaseName,
    Change,
    CodePlace,
    OneSided,
    OutcomeChange,
    PolicyChange,
    StackChange,
    Touched,
    TouchedLine,
    Verdict,
)

MIB = 2**20


def case(name: str = "a/b/c") -> CaseName:
    return CaseName(
        id=name, name=name, scenario="a", preset="b", variant="c", conf="", torch="2.13", card="l4", device="virtual"
    )


def stack(**changes: Any) -> StackChange:
    values = {"kind": "grown", "before": 0, "after": 5 * MIB, "file": "x.py", "line": 7, "function": "load"}
    return StackChange(**(values | {"code": "kept.append(w)", "why": "longer", "frames": ["x.py:7 load"]} | changes))


def change(metric: str = "transient", after: int = 6 * MIB, **changes: Any) -> Change:
    values = {"before": MIB, "after": after, "allowed": 0, "regressed": True, "stacks": [stack()]}
    return Change(case=case(), metric=metric, **(values | changes))


def verdict(**changes: Any) -> Verdict:
    against = Against(ref="main", commit="0" * 40, current="1" * 40, dirty=False, compared=1, notes=[])
    values: dict[str, Any] = {"decision": "over", "exit_code": 3, "budgets": 0, "cases": 1, "cases_held": 0}
    values |= {"cases_without_budget": 1, "checks": [], "undeclared": [], "not_measured": [], "against": against}
    return Verdict(**(values | changes))


def test_a_regression_names_its_sizes_its_line_and_where_the_peak_is():
    place = CodePlace(file="x.py", line=9, function="load", code="w = cat(kept)")
    moved = change(
        peak_before=CodePlace(file="x.py", line=5, function="f", code="a"), peak_after=place, peak_moved=True
    )
    assert as_text(verdict(changes=[moved])).splitlines() == [
        "regressed  a/b/c  transient  +5.00 MiB (+500.0 %)  before 1.00 MiB  now 6.00 MiB",
        "    +5.00 MiB  x.py:7  kept.append(w)  held 0 B, now 5.00 MiB: the same memory is kept longer",
        "    peak at x.py:9  w = cat(kept); before at x.py:5  a",
        "fail: 1 value regressed; 1 case of 1111111 compared with main (0000000)",
    ]


def test_what_the_change_touched_is_said_where_the_line_that_rose_is_none_of_it():
    lines = [
        TouchedLine(file=f"y{n}.py", line=n, function="f", code=f"kept = {n}", on_the_way=n == 1, removed=n == 2)
        for n in range(1, 5)
    ]
    marked = change(stacks=[stack(changed=True)])
    hinted = change(stacks=[stack()], touched=Touched(lines=lines, more=2))
    assert as_text(verdict(changes=[marked])).splitlines()[1].endswith(": the same memory is kept longer; changed here")
    assert as_text(verdict(changes=[hinted])).splitlines()[1:6] == [
        "    +5.00 MiB  x.py:7  kept.append(w)  held 0 B, now 5.00 MiB: the same memory is kept longer",
        "    changed on the way  y1.py:1  kept = 1",
        "    changed elsewhere  y2.py:2  kept = 2  removed",
        "    changed elsewhere  y3.py:3  kept = 3",
        "    changed besides  3 other lines",
    ]
    assert "changed on the way" in as_github(verdict(changes=[hinted]), "")


def test_sizes_that_would_read_the_same_are_in_bytes():
    """24 MiB, and 512 bytes more."""
    close = change(stacks=[stack(before=24 * MIB, after=24 * MIB + 512, why="")])
    assert "+512 B  x.py:7  kept.append(w)  held 25,165,824 B, now 25,166,336 B" in as_text(verdict(changes=[close]))


def test_lines_stand_once_below_the_values_that_have_the_same():
    both = verdict(changes=[change(), change("peak_requested"), change("retained", stacks=[stack(line=8)])])
    lines = as_text(both).splitlines()
    assert [line.split("  ")[0] or line.strip().split("  ")[1] for line in lines[:-1]] == [
        "regressed",
        "regressed",
        "x.py:7",
        "regressed",
        "x.py:8",
    ]


def test_what_is_better_new_gone_or_changed_is_said_and_is_no_failure():
    better = change(after=MIB // 2, regressed=False, improved=True)
    found = verdict(
        decision="pass",
        exit_code=0,
        changes=[better],
        outcomes=[OutcomeChange(case=case("d/e/f"), before="crash", after="ok", regressed=False, message="TypeError")],
        appeared=[OneSided(case=case("n/e/w"), reason="main has no such case")],
        removed=[OneSided(case=case("o/l/d"), reason="only main has it")],
        policy=[
            PolicyChange(
                file="budgets.toml", line=2, what="a/*/*", metric="retained", kind="raised", detail="raised by 1 B"
            )
        ],
        against=Against(ref="main", commit="0" * 40, current="1" * 40, dirty=True, compared=1, notes=["a note"]),
    )
    assert as_text(found).splitlines() == [
        "policy  budgets.toml:2  a/*/*  retained  raised by 1 B",
        "improved  d/e/f  outcome ok, was crash  TypeError",
        "improved  a/b/c  transient  -512.00 KiB (-50.0 %)  before 1.00 MiB  now 512.00 KiB",
        "new  n/e/w  main has no such case",
        "removed  o/l/d  only main has it",
        "note  a note",
        "pass: 1 case of 1111111 with changes that are not committed compared with main (0000000)",
    ]


def test_an_outcome_that_broke_names_the_request_that_failed():
    broken = OutcomeChange(
        case=case(),
        before="ok",
        after="oom",
        regressed=True,
        message="Tried to allocate",
        place=CodePlace(file="x.py", line=3, function="f", code="w = torch.empty(n)"),
        stacks=[stack(kind="new", why="")],
    )
    assert as_text(verdict(outcomes=[broken])).splitlines() == [
        "regressed  a/b/c  outcome oom, was ok  Tried to allocate  at x.py:3  w = torch.empty(n)",
        "    +5.00 MiB  x.py:7  kept.append(w)  new",
        "fail: 1 case ends otherwise than before; 1 case of 1111111 compared with main (0000000)",
    ]


def test_more_places_than_fit_are_counted():
    many = change(stacks=[stack(line=n) for n in range(1, 10)])
    lines = as_text(verdict(changes=[many])).splitlines()
    assert lines[7] == "    +15.00 MiB in 3 other places"


def test_a_difference_below_what_is_shown_is_in_bytes():
    text = as_text(verdict(changes=[change(before=MIB, after=MIB + 1, stacks=[])]))
    assert "+1 B (+<0.1 %)  before 1,048,576 B  now 1,048,577 B" in text


def test_nothing_hostile_leaves_its_place():
    evil = "x`|<b>\x1b[31m\n::error::"
    found = verdict(
        changes=[
            change(
                stacks=[stack(file=evil, code=evil, frames=[evil])],
                touched=Touched(lines=[TouchedLine(file=evil, line=1, function=evil, code=evil)]),
                caveats=[evil],
            )
        ],
        outcomes=[OutcomeChange(case=case(evil), before="ok", after="oom", regressed=True, message=evil)],
        appeared=[OneSided(case=case(evil), reason=evil)],
        policy=[PolicyChange(file=evil, line=1, what=evil, kind="raised", detail=evil)],
        against=Against(ref=evil, commit="0" * 40, current="", dirty=False, notes=[evil]),
    )
    for text in (as_text(found), as_markdown(found)):
        assert "\x1b" not in text
        assert not any(line.lstrip().startswith("::") for line in text.splitlines())
    for line in as_markdown(found).splitlines():
        outside = "".join(line.split("``")[::2]) if "``" in line else line
        assert "<b>" not in outside


def test_a_verdict_without_a_comparison_says_nothing_of_one():
    plain = verdict(against=None, decision="pass", exit_code=0, budgets=1)
    assert as_text(plain) == "pass: 0 values of 0 cases held against 1 budget; 1 case has no budget\n"
