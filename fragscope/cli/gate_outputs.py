"""Files that the gate writes beside what it prints: a job's summary, a comment's body, JUnit."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fragscope.errors import EXIT_INTERNAL, EXIT_PASS, printable

if TYPE_CHECKING:
    from collections.abc import Callable

    from fragscope.gate.verdict import Verdict


def write_outputs(verdict: Verdict, *, summary: Path | None, comment: Path | None, junit: Path | None) -> int:
    """Write what was asked for, each file whole or not at all.

    A file that cannot be written is one line on stderr. It never makes a failed gate pass; one that passed ends with 1,
    since someone waits for that file.

    Args:
        verdict: what to write.
        summary: Markdown that is added to what the file holds, as GitHub takes a step's summary.
        comment: body of a comment; replaces the file.
        junit: XML; replaces the file.

    Returns:
        The exit code that the verdict and the writing come to.
    """
    from fragscope.gate.junit import as_junit
    from fragscope.gate.markdown import as_comment

    written = True
    if summary is not None:
        written &= _written(summary, lambda path: _add_summary(verdict, path))
    if comment is not None:
        written &= _written(comment, lambda path: _replace(path, as_comment(verdict).encode()))
    if junit is not None:
        written &= _written(junit, lambda path: _replace(path, as_junit(verdict).encode()))
    return verdict.exit_code if written or verdict.exit_code != EXIT_PASS else EXIT_INTERNAL


def folder_in_repository() -> str:
    """The working directory relative to the root of the checkout in a GitHub job; ``""`` at the root and elsewhere."""
    root = os.environ.get("GITHUB_WORKSPACE")
    if not root:
        return ""
    try:
        folder = Path.cwd().resolve().relative_to(Path(root).resolve())
    except ValueError:
        return ""
    return "" if folder == Path() else folder.as_posix()


def _written(path: Path, write: Callable[[Path], None]) -> bool:
    try:
        write(path)
    except OSError as e:
        reason = e.strerror or str(e) or type(e).__name__
        click.echo(f"fragscope: cannot write {printable(str(path))}: {printable(reason)}", err=True)
        return False
    return True


def _add_summary(verdict: Verdict, path: Path) -> None:
    from fragscope.gate.markdown import SUMMARY_LIMIT, as_markdown

    size = path.stat().st_size if path.exists() else 0
    room = SUMMARY_LIMIT - size - 1
    text = as_markdown(verdict, room).encode() if room > 0 else b""
    if not 0 < len(text) <= room:
        raise OSError(f"it holds {size:,} bytes already, and GitHub takes no more than {SUMMARY_LIMIT:,}")
    before = path.read_bytes() if size else b""
    if before and not before.endswith(b"\n"):
        before += b"\n"
    _replace(path, before + text)


def _replace(path: Path, data: bytes) -> None:
    """Write a file; what is none, such as /dev/stdout or a pipe, is written to and stays what it is."""
    from fragscope.trace.containers import write_atomically

    if path.is_symlink() or (path.exists() and not path.is_file()):
        with path.open("wb") as f:
            f.write(data)
    else:
        write_atomically(path, data)
