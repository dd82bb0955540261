"""``fragscope doctor``: what this machine can do."""

from __future__ import annotations

import os
from pathlib import Path

import click


@click.command("doctor")
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text", show_default=True)
def command(form: str) -> int:
    """Say what this machine can do: GPU, torch, allocator settings in force, recording, and what is installed.

    \b
    Each line is
      ok      it works
      warn    it works, with a limit
      fail    it is there or set, and broken
      absent  it is not there

    Exit codes: 0, or 1 where a check fails.
    """  # noqa: D301  # \b is click's mark for lines that stay as they are
    import msgspec
    from rich.console import Console

    from fragscope.allocator import DEFAULT_CARD
    from fragscope.cli.configured import configured
    from fragscope.doctor import diagnose, this_machine
    from fragscope.doctor.render import as_text

    config = configured()
    chosen_by = "" if config.out is None else "'out' in pyproject.toml"
    machine = this_machine(dict(os.environ), config.out or Path(".fragscope"), chosen_by, config.card or DEFAULT_CARD)
    diagnosis = diagnose(machine)
    if form == "json":
        click.echo(msgspec.json.format(msgspec.json.encode(diagnosis), indent=1))
    else:
        console = Console(highlight=False)
        text = as_text(diagnosis, console.width if console.is_terminal else None)
        console.print(text, end="", soft_wrap=True)
    return diagnosis.exit_code
