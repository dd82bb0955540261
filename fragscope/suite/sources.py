"""The source files behind a result: whose edit makes it stale."""

from __future__ import annotations

import hashlib
import os
import sys
import sysconfig
from pathlib import Path

import fragscope
from fragscope.suite.discover import MODULE_PREFIX

_remembered: dict[str, str] = {}


def remember_sources() -> None:
    """Keep the hashes of what is loaded now, for workers forked later.

    A file that is edited while a run is going was loaded in its old form; a result must not claim the new one.
    """
    _remembered.update(_hashes(_files()))


def loaded_sources(scenario: Path) -> dict[str, str]:
    """SHA-256 by path of the user's own modules that are loaded, without those of other scenario files.

    Installed packages are left out: their versions are part of a case's digest.
    """
    files = _files(but_of=scenario)
    known = {file: _remembered[file] for file in files if file in _remembered}
    return dict(sorted((known | _hashes(files - known.keys())).items()))


def file_hash(path: str) -> str | None:
    """SHA-256 of a file's content; None where it cannot be read."""
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError:
        return None


def installed_fingerprint() -> str:
    """SHA-256 over names and versions of the packages that can be imported, as their metadata folders spell them."""
    found: set[str] = set()
    for folder in sys.path:
        try:
            found.update(n for n in os.listdir(folder or ".") if n.endswith((".dist-info", ".egg-info")))  # noqa: PTH208
        except OSError:
            continue
    return hashlib.sha256("\n".join(sorted(found)).encode("utf-8", "surrogateescape")).hexdigest()


def _files(but_of: Path | None = None) -> set[str]:
    paths = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    installed = tuple(f"{os.path.realpath(p)}/" for p in (*paths, str(Path(fragscope.__file__).parent)))
    out = set()
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if not isinstance(file, str) or not file.endswith(".py") or "-packages/" in file:
            continue
        path = os.path.realpath(file)
        other = but_of is not None and name.startswith(MODULE_PREFIX) and path != str(but_of)
        if not other and not path.startswith(installed):
            out.add(path)
    return out


def _hashes(files: set[str]) -> dict[str, str]:
    return {file: digest for file in files if (digest := file_hash(file)) is not None}
