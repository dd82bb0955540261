"""Pages that a command writes beside its results, where the extra for them is installed."""

from __future__ import annotations

from collections.abc import Callable

import click

from fragscope.errors import UsageError


def page_written(name: str, write: Callable[[], None]) -> bool:
    """Write a page; False, with a line that says so, where the extra is missing: the results are there all the same."""
    try:
        write()
    except UsageError as e:
        click.echo(f"fragscope: no {name}: {e}", err=True)
        return False
    return True
