"""Which releases the harness covers, and where their oracles are (built by oracle/build.py)."""

from __future__ import annotations

import os
from pathlib import Path

RELEASES = ("2.9.1", "2.10.0", "2.11.0", "2.12.0", "2.13.0", "2.14.1")


class OracleError(Exception):
    """An oracle is missing or cannot be built; the message is one line."""


def default_directory(release: str) -> Path:
    """Where the oracle of a release belongs: below the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "fragscope-conformance" / release


def oracle_of(release: str, directory: Path | None = None) -> Path:
    """The directory of a built oracle.

    Raises:
        OracleError: there is none.
    """
    directory = directory or default_directory(release)
    if not (directory / "libshim.so").exists():
        builder = Path(__file__).parent / "oracle" / "build.py"
        raise OracleError(f"no oracle of torch {release} in {directory}; build it: python {builder} {release}")
    return directory
