"""Run as ``python -m fragscope``."""

from fragscope.cli import main

main()
