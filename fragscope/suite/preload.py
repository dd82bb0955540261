"""Imported by the fork server: what every worker needs, once.

A scenario file that cannot be imported is left to the worker, which reports why.
"""

import contextlib
import gc
import io
import os
from pathlib import Path

import torch

import fragscope.record.virtual.cuda_api
import fragscope.record.virtual.dispatch
import fragscope.record.virtual.functions
import fragscope.suite.worker
from fragscope.suite.discover import load_scenarios
from fragscope.suite.server import PRELOAD_VARIABLE

# Some operators on metadata import a large part of torch at their first call; let that happen once, here.
torch.stack([torch.zeros(1, device="meta")])

for _name in filter(None, os.environ.get(PRELOAD_VARIABLE, "").split(os.pathsep)):
    with contextlib.suppress(BaseException), contextlib.redirect_stdout(io.StringIO()):
        load_scenarios(Path(_name))

# Collecting garbage before a measured phase then looks only at what the worker made.
gc.collect()
gc.freeze()

__all__ = ["fragscope"]
