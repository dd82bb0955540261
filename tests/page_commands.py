"""Tables of a page are what the command beside them prints."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def assert_page_holds(page: str, command: str) -> None:
    """The page names ``python SCRIPT ...`` and has all that it prints."""
    assert f"`{command}`" in page
    arguments = [sys.executable, *command.split()[1:]]
    printed = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=True)
    assert printed.stdout.strip() in page
