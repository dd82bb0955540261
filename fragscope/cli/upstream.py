"""``fragscope upstream``: whether the code that variants replay is still what the installed packages have."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from fragscope.cli.printed_at_import import shown_on_stderr
from fragscope.cli.scenarios import selections_of
from fragscope.errors import EXIT_NOT_MEASURED, EXIT_OVER_BUDGET, EXIT_PASS, NotMeasuredError, UsageError, printable

if TYPE_CHECKING:
    from fragscope.suite.replayed import Replayed


@click.command("upstream")
@click.argument("what", nargs=-1, metavar="[PATH|NAME]...")
@click.option("--digest", metavar="MODULE:FUNCTION", help="Print the digest of an installed function and nothing else.")
@click.option("--package", metavar="NAME", help="Its distribution, where that is not called as the module is.")
@click.option("--format", "style", type=click.Choice(["text", "json"]), default="text", show_default=True)
def command(what: tuple[str, ...], digest: str | None, package: str | None, style: str) -> int:
    """Say whether the code that variants replay is what the installed packages have.

    Nothing of a package is imported: its files are read. Arguments choose scenarios as those of `fragscope run` do.

    \b
    Each function is
      same            a variant replays what is installed
      changed         the installed one is none that a variant replays
      gone            the package is installed without it
      cannot be read  this Python cannot read its module
      no digest       no variant says what its source was
      not installed   the package is not there

    Exit codes: 0 nothing changed, 3 something is changed or gone, 4 nothing could be compared.
    """  # noqa: D301  # \b is click's mark for lines that stay as they are
    if digest is not None:
        if what:
            raise UsageError("--digest takes no scenarios")
        return _print_digest(digest, package)
    if package is not None:
        raise UsageError("--package belongs to --digest")
    from fragscope.config import load_config
    from fragscope.suite.replayed import replayed

    with shown_on_stderr():
        selections = selections_of(load_config(), what, (), ())
    found = replayed({s.scenario.name: s.scenario for s in selections}.values())
    if style == "json":
        import msgspec

        from fragscope.suite.replayed import UpstreamReport

        click.echo(msgspec.json.format(msgspec.json.encode(UpstreamReport(functions=found)), indent=1))
    else:
        for line in _lines(found):
            click.echo(line)
    if any(f.stale for f in found):
        return EXIT_OVER_BUDGET
    return EXIT_PASS if any(f.state == "same" for f in found) else EXIT_NOT_MEASURED


def _print_digest(function: str, package: str | None) -> int:
    from fragscope.suite.expect import check_code
    from fragscope.suite.upstream import installed_source

    check_code("--digest", function)
    if ":" not in function:
        raise UsageError(f"--digest {function} names a module: write module:function, such as {function}:load")
    package = package or function.partition(":")[0].partition(".")[0]
    source = installed_source(package, function)
    if source is None:
        raise NotMeasuredError(f"--digest {function}: {package} is not installed")
    if source.unread:
        raise NotMeasuredError(
            f"--digest {function}: {package} {source.version}: "
            f"{printable(str(source.file))} cannot be read: {printable(source.unread)}"
        )
    if source.digest is None:
        where = "has no such module" if source.file is None else f"does not define it in {source.file}"
        raise NotMeasuredError(f"--digest {function}: {package} {source.version} {printable(where)}")
    click.echo(source.digest)
    click.echo(f"fragscope: {package} {source.version}, {source.file}", err=True)
    return EXIT_PASS


def _lines(found: list[Replayed]) -> list[str]:
    out = []
    for f in found:
        out.append(f"{f.state:<14} {f.scenario}  {f.function}")
        if f.version is not None:
            digest = f", digest {f.digest}" if f.digest and f.state != "same" else ""
            unread = f", cannot be read: {printable(f.unread)}" if f.unread else ""
            out.append(f"{'':14} installed: {f.package} {f.version}{digest}{unread}")
        for r in f.variants:
            mark = " = installed" if r.variant in f.same else ""
            out.append(f"{'':14} {r.variant}: {f.package} {r.version}, {r.digest or 'no digest'}{mark}")
    counts = {state: sum(f.state == state for f in found) for state in dict.fromkeys(f.state for f in found)}
    listed = ", ".join(f"{n} {state}" for state, n in counts.items()) or "no variant says what it replays"
    return [*out, f"{len(found)} function{'s' * (len(found) != 1)} replayed: {listed}"]
