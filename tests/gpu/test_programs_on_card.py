"""On a machine with an NVIDIA GPU: the programs of tests/unit/test_virtual_programs.py hold on it what they should.

So do the kernels that attention picks and the types that autocast returns, which the virtual device is held to without
a card. The figures are those of an H100 with torch 2.11; cuBLAS workspaces of other cards differ.
"""

from __future__ import annotations

import gc
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

import test_virtual_attention  # noqa: E402
import test_virtual_autocast  # noqa: E402
import test_virtual_programs  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.torch,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
    # What torch itself warns of on a card differs by release: up to 2.12 its own ``UntypedStorage.is_pinned`` passes on
    # an argument that it calls deprecated, and a first matrix product in autograd's thread finds no CUDA context.
    pytest.mark.filterwarnings("default"),
]
OF_THE_PROFILE = ("what_programs_ask_at_their_start", "trying_again_after_an_oom")  # they ask what an H100 has
PROGRAMS = [name for name in test_virtual_programs.PROGRAMS if name not in OF_THE_PROFILE]


def settle() -> None:
    """Nothing of earlier programs is held."""
    gc.collect()
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() == 0


def let_go(run: Callable[[], None]) -> None:
    """Run it; frames of what fails, which pytest keeps, hold its tensors no longer."""
    try:
        run()
    except BaseException as e:
        traceback.clear_frames(e.__traceback__)
        raise


@pytest.mark.parametrize("name", PROGRAMS)
def test_holds_what_it_should(name):
    run, peak = test_virtual_programs.PROGRAMS[name]
    torch.cuda.init()
    settle()
    torch.cuda.reset_peak_memory_stats()
    let_go(run)
    assert torch.cuda.max_memory_allocated() == peak


@pytest.mark.parametrize("name", test_virtual_attention.CALLS)
def test_attention_picks_the_kernel(name):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the expectations are those of an H100")
    options, kernel = test_virtual_attention.CALLS[name]
    given = dict(options)
    shape = given.pop("shape", (2, 4, 16, 64))
    keys, dtype = given.pop("keys", shape), given.pop("dtype", torch.bfloat16)
    mask = given.pop("mask", None)
    q, k = torch.zeros(shape, dtype=dtype, device="cuda"), torch.zeros(keys, dtype=dtype, device="cuda")
    if mask is not None:
        given["attn_mask"] = torch.zeros(mask, dtype=dtype, device="cuda")
    chosen = torch._fused_sdp_choice(q, k, k, **given)
    assert {0: "math", 1: "flash", 2: "mem_efficient", 3: "cudnn"}[chosen] == kernel


@pytest.mark.parametrize("name", test_virtual_autocast.RESULTS)
def test_autocast_returns_the_type(name):
    run, dtype = test_virtual_autocast.RESULTS[name]
    x = torch.zeros(8, 8, device="cuda")
    with torch.autocast("cuda"):
        assert run(x, x.half()).dtype == dtype
