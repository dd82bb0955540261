"""A verdict as JUnit XML, for systems that show test results: one test case for each value that was compared.

The form is that of the Jenkins xUnit plugin's ``junit-10.xsd``, which pytest writes, too. A value that is over its
limit, more than before or not as locked is a failure; what was not measured is an error; what is waived, or only a
warning, is skipped with the reason.
"""

from __future__ import annotations

from xml.etree import ElementTree

from fragscope.errors import printable
from fragscope.gate.findings import Finding, findings
from fragscope.gate.render import summary
from fragscope.gate.render_against import stack_texts
from fragscope.gate.verdict import Verdict

_SUITE = "fragscope gate"
_NAME_LIMIT = 300
_WARNED = "only a warning"


def as_junit(verdict: Verdict) -> str:
    """The document. Every character in it is one that XML 1.0 allows: others are escaped as Python writes them."""
    cases: dict[tuple[str, str], list[Finding]] = {}
    names: dict[tuple[str, str], str] = {}
    for check in verdict.checks:
        cases.setdefault((check.case.id, check.metric), [])
        names[check.case.id, check.metric] = check.case.name
    for change in verdict.changes:
        cases.setdefault((change.case.id, change.metric), [])
        names[change.case.id, change.metric] = change.case.name
    for number, finding in enumerate(findings(verdict)):
        if finding.level != "error" and not finding.waived:
            continue
        # A finding that is about no value is a test case of its own.
        key = (finding.case_id, finding.metric or finding.word)
        if not finding.case_id:
            key = ("", f"{finding.word} {number}")
        cases.setdefault(key, []).append(finding)
        names.setdefault(key, finding.case or _SUITE)
    suite = ElementTree.Element("testsuite", name=_SUITE)
    counts = dict.fromkeys(("failures", "errors", "skipped"), 0)
    for key in sorted(cases, key=lambda key: (names[key], key)):
        case = ElementTree.SubElement(suite, "testcase", classname=_plain(names[key]), name=_plain(key[1]), time="0")
        for kind in _results(case, cases[key], warn_only=verdict.warn_only):
            counts[kind] += 1
    totals = {"tests": str(len(cases)), **{kind: str(number) for kind, number in counts.items()}, "time": "0"}
    suite.attrib.update(totals)
    ElementTree.SubElement(suite, "system-out").text = summary(verdict)
    root = ElementTree.Element("testsuites")
    root.append(suite)
    ElementTree.indent(root)
    return f'<?xml version="1.0" encoding="utf-8"?>\n{ElementTree.tostring(root, encoding="unicode")}\n'


def _results(case: ElementTree.Element, found: list[Finding], *, warn_only: bool) -> list[str]:
    """Writes what one test case came to; which of the suite's counts that goes into, each once."""
    failed = [f for f in found if f.level == "error"]
    if not found:
        return []
    if warn_only or not failed:
        why = _WARNED if failed else "waived"
        ElementTree.SubElement(case, "skipped").text = f"{why}\n{_text(found)}"
        return ["skipped"]
    missing = all(f.word == "not measured" for f in failed)
    element = ElementTree.SubElement(
        case, "error" if missing else "failure", type=_plain(failed[0].word), message=_plain(", ".join(failed[0].said))
    )
    element.text = _text(found)
    return ["errors" if missing else "failures"]


def _text(found: list[Finding]) -> str:
    lines: list[str] = []
    for finding in found:
        place = [f"[{finding.place}]"] if finding.place else []
        lines.append(_plain("  ".join([finding.word, *finding.said, *place]), 4000))
        lines += [f"  {text}" for text in stack_texts(finding.stacks, finding.touched, _plain)]
    return "\n".join(lines)


def _plain(text: str, limit: int = _NAME_LIMIT) -> str:
    return printable(text, limit)
