"""Imported by the fork server: what every worker needs, once.

A scenario file that cannot be imported is left to the worker, which reports why.
"""

import contextlib
import gc
import os
import sys
from pathlib import Path

import torch

import fragscope.record.virtual.cuda_api
import fragscope.record.virtual.dispatch
import fragscope.record.virtual.functions
import fragscope.suite.numerics
from fragscope.suite.discover import load_scenarios
from fragscope.suite.server import PATH_VARIABLE, PRELOAD_VARIABLE
from fragscope.suite.sources import remember_sources

# What scenario files print while they are imported was printed once already, by the command that looked for them.
_stderr = os.dup(2)
_nothing = os.open(os.devnull, os.O_RDWR)
os.dup2(_nothing, 1)
os.dup2(_nothing, 2)

# Some operators on metadata import a large part of torch at their first call; let that happen once, here.
torch.stack([torch.zeros(1, device="meta")])

# By itself torch asks CUDA whether there is a card, which makes CUDA unusable in every fork; NVML does no such harm.
_before = os.environ.get("PYTORCH_NVML_BASED_CUDA_CHECK")
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
# What is imported here, every worker has: it must be what they would import themselves.
sys.path[:] = os.environ[PATH_VARIABLE].split(os.pathsep) if PATH_VARIABLE in os.environ else sys.path
for _name in filter(None, os.environ.get(PRELOAD_VARIABLE, "").split(os.pathsep)):
    with contextlib.suppress(BaseException):
        load_scenarios(Path(_name))
if _before is None:
    del os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"]
else:
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = _before
remember_sources()

os.dup2(_stderr, 2)
os.close(_stderr)
os.close(_nothing)

# Collecting garbage before a measured phase then looks only at what the worker made.
gc.collect()
gc.freeze()

__all__ = ["fragscope"]
