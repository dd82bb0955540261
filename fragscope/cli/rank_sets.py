"""Commands that take one trace, called with a rank set: the same for each of its members."""

from __future__ import annotations

from collections.abc import Sequence

import click

from fragscope.errors import FragscopeError


def for_each(paths: Sequence[str], parameter: str) -> None:
    """Call the current command once for each path, with all its other options as they are.

    One member that fails does not keep the others from being answered.

    Args:
        paths: what is given as ``parameter``, one after the other.
        parameter: name of the command's parameter.

    Raises:
        FragscopeError: what the first member that failed raised, once the others are done.
    """
    context = click.get_current_context()
    failures: list[FragscopeError] = []
    for path in paths:
        try:
            context.invoke(context.command, **{**context.params, parameter: path})
        except FragscopeError as e:
            failures.append(e)
    if failures:
        if len(failures) > 1:
            click.echo(f"fragscope: {len(failures)} of {len(paths)} traces failed; the first:", err=True)
        raise failures[0]
