"""``fragscope init``: the files with which a repository begins."""

from __future__ import annotations

import re
from pathlib import Path

import click

from fragscope.errors import UsageError, printable

_ACTION = re.compile(r"[A-Za-z0-9-]{1,39}/[A-Za-z0-9._-]{1,100}(?:/[A-Za-z0-9._/-]{1,200})?@[A-Za-z0-9._/-]{1,200}")


@click.command("init")
@click.argument("path", required=False, metavar="[PATH]", type=click.Path(path_type=Path))
@click.option("--loader", "named", metavar="MODULE:FUNCTION",
              help="The function to measure; it is looked for in the sources, nothing is imported.")  # fmt: skip
@click.option("--github/--no-github", "github", default=None,
              help="Write a GitHub workflow. [default: where .github or a remote at github.com is]")  # fmt: skip
@click.option("--action", metavar="OWNER/REPO@REF",
              help="Where fragscope's action is, for the workflow. [default: OWNER is left to fill in]")  # fmt: skip
@click.option("--write-config", is_flag=True, help="Add [tool.fragscope] at the end of pyproject.toml.")
@click.option("--dry-run", is_flag=True, help="Print what would be written, and write nothing.")
def command(
    *,
    path: Path | None,
    named: str | None,
    github: bool | None,
    action: str | None,
    write_config: bool,
    dry_run: bool,
) -> None:
    """Write a scenario, budgets and a workflow for the repository in PATH, the working directory by default.

    They run as they are; comments say what to replace. What the repository uses is read off its files: nothing of it is
    imported or run. Nothing is ever written over: where a file is there already, the exit code is 2, and nothing is
    written at all.
    """
    from fragscope.starter import find_loader, look_at, plan_files, write_all
    from fragscope.starter.write import refuse_existing

    if action is not None and not _ACTION.fullmatch(action):
        raise UsageError(f"--action {printable(action, 120)}: write OWNER/REPOSITORY@REF")
    repository = look_at(path or Path())
    loader = None if named is None else find_loader(repository, named)
    wanted = repository.github if github is None else github
    plan = plan_files(repository, loader, github=wanted, action=action, adds_table=write_config)
    if write_config and not plan.table:
        raise UsageError("--write-config: pyproject.toml has [tool.fragscope] already; leave the option out")
    click.echo(f"found: {printable(repository.found, 300)}")
    if dry_run:
        refuse_existing(repository.root, plan.files)
        for name, content in plan.files.items():
            click.echo(f"\n--- {name}\n{content}", nl=False)
    else:
        write_all(repository.root, plan.files, plan.table if write_config else "")
    width = max(map(len, plan.files))
    click.echo("")
    for name in plan.files:
        click.echo(f"{'would write' if dry_run else 'wrote'} {name.ljust(width)}  {plan.roles[name]}")
    for line in plan.left_to_do:
        click.echo(line)
    if plan.table:
        added = write_config and not dry_run
        click.echo("added to pyproject.toml:" if added else "for pyproject.toml (--write-config adds it):")
        for line in plan.table.splitlines():
            click.echo(f"  {line}")
    run = "fragscope run" if write_config or not plan.run else f"fragscope run {plan.run}"
    there = "" if repository.root == Path.cwd().resolve() else f" in {printable(str(path), 300)}"
    click.echo(f"next{there}: {run} --device virtual, then fragscope gate")
