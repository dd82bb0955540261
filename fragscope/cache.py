"""Where fragscope keeps what it made once and can make again: compiled code."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """The user's cache folder for fragscope (``FRAGSCOPE_CACHE_DIR``, else as the XDG specification says)."""
    root = os.environ.get("FRAGSCOPE_CACHE_DIR") or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(root).expanduser() / "fragscope"
