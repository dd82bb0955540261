"""``fragscope record`` with the stand-in recorder."""

import functools

import stand_in_recorder

from fragscope.cli import main
from fragscope.record import launch

launch.LaunchOptions = functools.partial(launch.LaunchOptions, recorder=stand_in_recorder.__name__)
main()
