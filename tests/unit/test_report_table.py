"""The comparison on a terminal and in Markdown."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from builders import bare_case, fp8_results, results_of
from click.testing import CliRunner
from rich.console import Console

from fragscope.cli import run
from fragscope.cli.report import command
from fragscope.report import markdown, results_table, summarize
from fragscope.report.markdown import escaped
from fragscope.results import Peak, PrecheckRecord, Results, VerifyRecord, save_results

GIB = 1024**3
MIB = 1024**2


def shown(results: Results, width: int, color: bool = False) -> str:
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=color, color_system="standard" if color else None)
    console.print(results_table(results))
    return file.getvalue()


def four_variants() -> Results:
    return results_of([
        bare_case(base=5376 * MIB, transient=3636 * MIB, peak=Peak(allocated=9012 * MIB, reserved=9038 * MIB)),
        bare_case(variant="preallocated", role="fixed", transient=2249 * MIB),
        bare_case(variant="gather", role="newest", transient=2240 * MIB, exact=False),
        bare_case(variant="in-place", role="proposed", transient=3636 * MIB),
    ])  # fmt: skip


def test_each_variant_stands_beside_the_original() -> None:
    rows = {row.variant: row.difference_text for row in summarize(four_variants()).groups[0].rows}
    assert rows == {"list-stack": "reference", "preallocated": "-38.1 %", "gather": "~-38.4 %", "in-place": "same"}


@pytest.mark.parametrize(
    ("original", "other", "expected"),
    [
        (0, 0, "same"),
        (0, 2 * MIB, "+2.00 MiB"),
        (10 * GIB, 10 * GIB + 512, "+512 B"),  # too small for a percentage, but not nothing
        (10 * GIB, 10 * GIB - 1, "-1 B"),
        (MIB, 3 * MIB, "+200.0 %"),
        (MIB, 0, "-100.0 %"),
    ],
)
def test_a_difference_is_a_percentage_unless_that_would_hide_it(original: int, other: int, expected: str) -> None:
    cases = [bare_case(transient=original), bare_case(variant="b", role="fixed", transient=other)]
    assert summarize(results_of(cases)).groups[0].rows[1].difference_text == expected


@pytest.mark.parametrize("outcome", ["oom", "crash", "timeout", "unsupported", "skipped"])
def test_what_did_not_run_to_its_end_is_not_compared(outcome: str) -> None:
    cut = bare_case(variant="b", role="fixed", outcome=outcome, transient=1)
    group = summarize(results_of([bare_case(transient=MIB), cut])).groups[0]
    assert group.rows[1].difference_text == "-"
    group = summarize(
        results_of([bare_case(outcome=outcome, transient=1), bare_case(variant="b", role="fixed")])
    ).groups[0]
    assert group.rows[1].difference_text == "-"


def test_only_cases_under_the_same_settings_are_compared() -> None:
    cases = [
        bare_case(transient=MIB),
        bare_case(variant="b", role="fixed", conf="max_split_size_mb:20", transient=2 * MIB),
        bare_case(variant="c", role="fixed", changed={"layers": 4}, transient=2 * MIB),
    ]
    groups = summarize(results_of(cases)).groups
    assert [g.settings for g in groups] == [
        ("with default", "conf default"),
        ("with default", "conf max_split_size_mb:20"),
        ("with layers=4", "conf default"),
    ]
    assert all(row.difference is None for g in groups for row in g.rows)


def test_what_is_idle_in_private_pools_is_said_under_the_table() -> None:
    pooled = bare_case(exact=False, peak=Peak(pool_idle=48 * MIB), end=Peak(pool_idle=2 * MIB))
    results = results_of([pooled, bare_case(variant="plain", role="fixed")])
    note = "list-stack: idle in private pools: at most ~48.00 MiB, at the end ~2.00 MiB"
    for width in (80, 130):
        assert note in " ".join(shown(results, width).split())
    assert f"- {escaped(note)}" in markdown(results)
    assert "plain: idle" not in shown(results, 130)


def test_where_model_and_card_part_is_said_under_the_table() -> None:
    case = bare_case(device="cuda", exact=False, verify=VerifyRecord(2000, 3, "peak reserved: PyTorch says 5\x1b"))
    results = results_of([case, bare_case(variant="b", role="fixed", device="cuda", verify=VerifyRecord(10, 0))])
    note = (
        "list-stack: the allocator model differs from the recording in 3 of 2,000 comparisons, and the figures are the "
        "model's; first: peak reserved: PyTorch says 5\\x1b"
    )
    warning = "In 1 of 2 cases the allocator model differs from what was recorded: their figures are not the card's."
    for width in (80, 130):
        said = " ".join(shown(results, width).split())
        assert note in said
        assert f"! {warning}" in said
        assert "b: the allocator" not in said
    assert f"- {escaped(note)}" in markdown(results)
    assert f":warning: {escaped(warning)}" in markdown(results)


def test_what_was_run_without_being_known_to_fit_is_said_under_the_table() -> None:
    run = bare_case(device="cuda", precheck=PrecheckRecord(None, 5, False, "it was run without knowing what it needs"))
    known = bare_case(variant="b", role="fixed", device="cuda", precheck=PrecheckRecord(4, 5, True))
    for text in (shown(results_of([run, known]), 130), markdown(results_of([run, known]))):
        assert text.count("list-stack: it was run without knowing what it needs") == 1
        assert "b: " not in text


def test_what_a_reader_must_know_comes_with_the_figures() -> None:
    results = results_of([bare_case(outcome="oom"), bare_case(variant="b", exact=False)], planned=5, complete=False)
    summary = summarize(results)
    assert summary.headlines[0] == "1 of 2 outcomes are not the declared ones: 1 oom."
    assert summary.warnings == (
        "3 of 5 planned cases have no result: the run was not finished.",
        "1 of 2 cases are marked ~: their figures are not exact.",
    )
    assert summarize(results_of([])).headlines == ("Nothing was measured.",)


def test_the_headline_names_the_smallest_transient() -> None:
    assert summarize(four_variants()).headlines[1] == (
        "load_experts / dsv3-tp8: gather has the smallest transient, ~2,240.00 MiB, "
        "38.4 % less than the original's 3,636.00 MiB."
    )


@pytest.mark.parametrize("width", [80, 100, 140])
def test_every_figure_is_whole_at_every_width(width: int) -> None:
    text = shown(four_variants(), width)
    assert max(map(len, text.splitlines())) <= width
    for whole in ("5,376.00", "3,636.00", "9,012.00", "9,038.00", "~2,240.00", "~-38.4 %", "reference", "original"):
        assert whole in text


def test_estimates_and_unexpected_outcomes_are_marked_without_colour() -> None:
    cases = [bare_case(transient=MIB), bare_case(variant="b", role="fixed", outcome="oom", message="tried 3 GiB")]
    text = shown(results_of(cases), 120)
    assert "! oom (declared: ok)" in text
    assert "b: tried 3 GiB" in text
    assert "\x1b" not in text
    assert "~ not exact" not in text
    assert "~ not exact" in shown(four_variants(), 140)


def test_a_declared_outcome_is_no_alarm() -> None:
    text = shown(results_of([bare_case(outcome="overflow", expected_outcome="overflow")]), 120)
    assert "overflow (declared)" in text
    assert "!" not in text


def test_unmeasured_figures_are_not_zeros() -> None:
    row = re.findall(r".*unsupported.*", shown(results_of([bare_case(outcome="unsupported")]), 140))[0]
    assert "0.00" not in row


def test_names_cannot_carry_markup_or_control_characters_to_a_terminal() -> None:
    text = shown(results_of([bare_case(variant="[bold red]x[/]\x1b[31m\nrm")]), 140, color=True)
    assert "[bold red]x[/]" in text
    assert "\x1b[31m\n" not in text
    assert "\\x1b[31m\\nrm" in text


HOSTILE = "a|b `c` <img src=x onerror=alert(1)> *d* [e](https://f.g) @maintainer #12 GH-7 www.h.i\n| j | ~k~ $l$ \\"


def test_markdown_shows_hostile_names_as_they_are() -> None:
    text = markdown(
        results_of([bare_case(variant=HOSTILE, scenario=HOSTILE, preset=HOSTILE, outcome="crash", message=HOSTILE)])
    )
    rows = [line for line in text.splitlines() if line.startswith("| a")]
    assert len(rows) == 1
    assert len(re.findall(r"(?<!\\)\|", rows[0])) == 10  # nine cells: no name made another
    assert "<img" not in text
    assert not re.search(r"(?<!\\)`", text)
    for linked in ("@maintainer", "#12", "GH-7", "://f", "www.h"):
        assert linked not in text
    assert not re.search(r"(?<!\\)\]\(", text)


def test_escaping_is_only_of_what_needs_it() -> None:
    assert escaped("list-stack 2.5 (w13)") == "list-stack 2.5 (w13)"
    assert escaped("a_b*c") == "a\\_b\\*c"
    assert escaped("x\ny") == "x\\\\ny"


def test_markdown_marks_what_is_not_as_declared() -> None:
    text = markdown(results_of([bare_case(outcome="wrong")], planned=2, complete=False))
    assert "| :x: **wrong (declared: ok)** |" in text
    assert ":warning: 1 of 2 planned cases have no result" in text


def test_the_command_prints_tables_and_says_where_it_wrote_pages(tmp_path: Path) -> None:
    save_results(fp8_results(tmp_path), tmp_path / "results.json")
    runner = CliRunner()
    text = runner.invoke(command, [str(tmp_path), "--format", "text"], catch_exceptions=False).output
    assert "3,507.75" in text
    text = runner.invoke(
        command, [str(tmp_path / "results.json"), "--format", "markdown"], catch_exceptions=False
    ).output
    assert text == markdown(fp8_results(tmp_path))
    text = runner.invoke(command, [str(tmp_path)], catch_exceptions=False).output
    assert text == f"{tmp_path / 'report.html'}\n"
    assert (tmp_path / "report.html").stat().st_size > 1_000_000
    for form in ("markdown", "text", "html"):
        out = tmp_path / "out" / form
        arguments = [str(tmp_path), "--format", form, "--out", str(out)]
        assert runner.invoke(command, arguments, catch_exceptions=False).output == f"{out}\n"
        assert out.stat().st_size > 500


def test_missing_results_are_a_bad_input_and_a_bad_target_a_bad_call(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["report", str(tmp_path)]) == 5
    assert capsys.readouterr().err.count("\n") == 1
    save_results(four_variants(), tmp_path / "results.json")
    (tmp_path / "file").touch()
    assert run(["report", str(tmp_path), "--out", str(tmp_path / "file" / "x.html")]) == 2
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize("width", [20, 80, 81, 200])
@pytest.mark.parametrize("shift", range(8))
def test_no_line_is_a_command_wherever_it_folds(width: int, shift: int) -> None:
    """GitHub's runner reads any line that begins with two colons, blanks before them aside (ActionCommand.cs)."""
    message = "a" * (50 + shift) + " ::stop-commands::zz" + " b" * 40 + " ::error::y"
    named = bare_case(scenario="::s", preset="::p", variant=f"{'v' * shift}::x::zz", outcome="crash", message="x")
    results = results_of([bare_case(outcome="crash", message=message), named])
    text = shown(results, width)
    for line in text.splitlines():
        assert not line.strip().startswith("::"), line
    # All of it is there: the marks and the line ends are what was added.
    assert message.replace(" ", "") in re.sub(r"\n│ |\s", "", text)
