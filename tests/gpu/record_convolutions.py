"""Record what convolutions allocate on this machine's GPU, for those that vision models make.

    python tests/gpu/record_convolutions.py OUT.json.xz [--seconds N]

The models run on the virtual device first, which tells their calls; each call is then made twice on the GPU, the second
one recorded. The file has the versions and, by ``convolutions.key_of``, the steps: ``o`` with the number of a result,
``t`` with the bytes of scratch, ``g`` with the number of the scratch that goes back. What is not given back by then
goes at the end, the last first. It belongs at fragscope/record/virtual/scratch/convolutions.json.xz.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import gc
import json
import lzma
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from fragscope.allocator import ReplaySettings, card_named, rules_for
from fragscope.record.virtual import VirtualDevice
from fragscope.record.virtual.dispatch import DispatchMode
from fragscope.record.virtual.scratch import convolutions
from fragscope.record.virtual.scratch.convolutions import key_of

OPS = ("aten::convolution", "aten::convolution_backward")
MODES = ((False, False), (True, False), (True, True))  # autocast, channels last
Calls = dict[str, tuple[str, tuple[Any, ...]]]


def models() -> Iterator[tuple[str, Callable[[], torch.nn.Module], list[tuple[int, int]]]]:
    """Name, how to make it, batches and sides."""
    import timm
    import torchvision

    usual = [(1, 224), (8, 224), (16, 224), (32, 224), (64, 224), (128, 224)]
    met = [(8, 128), (24, 128), (48, 128), (8, 160), (24, 160), (48, 160), (24, 224), (48, 224)]
    for name in ("resnet50", "resnet18"):
        yield name, getattr(torchvision.models, name), met + usual
    for name in ("vit_small_patch16_224", "vit_base_patch16_224", "vit_large_patch14_224"):
        options: dict[str, Any] = {"pretrained": False, "dynamic_img_size": True}
        yield (
            name,
            lambda n=name, o=options: timm.create_model(n, depth=1, **o),
            met[: 8 if "small" in name else 0] + usual,
        )
    yield "convnext_tiny", lambda: timm.create_model("convnext_tiny", pretrained=False), usual[:4]
    yield "efficientnet_b0", lambda: timm.create_model("efficientnet_b0", pretrained=False), usual[:4]


def calls_of(make: Callable[[], torch.nn.Module], batch: int, side: int, *, mixed: bool, last: bool) -> Calls:
    """The convolutions of one training step, by key; the arguments are metadata."""
    card = card_named("h100-80gb")
    found: Calls = {}
    run = DispatchMode._account

    def account(self: Any, func: Any, trait: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        name = func._schema.name
        if name in OPS:
            described = tuple(_Description(a) if isinstance(a, torch.Tensor) else a for a in args)
            found.setdefault(key_of(name, args), (name, described))
        run(self, func, trait, args, kwargs, out)

    settings = ReplaySettings(rules_for(torch.__version__.split("+")[0]), card.name, 2**42, 2**42)
    with mock.patch.object(DispatchMode, "_account", account), VirtualDevice(card, settings, Path.cwd()):
        model = make().cuda()
        if last:
            model = model.to(memory_format=torch.channels_last)
        images = torch.empty(batch, 3, side, side, device="cuda")
        if last:
            images = images.to(memory_format=torch.channels_last)
        with torch.autocast("cuda", torch.bfloat16, enabled=mixed):
            loss = model(images).float().sum()
        loss.backward()
    return found


def calls_of_model(job: tuple[str, bool, bool]) -> Calls:
    """Those of one model at all sizes."""
    wanted, mixed, last = job
    ((_, make, sizes),) = (m for m in models() if m[0] == wanted)
    found: Calls = {}
    # While the calls are told, the table that they belong in may be missing.
    with mock.patch.object(convolutions, "_table", dict):
        for batch, side in sizes:
            try:
                found |= calls_of(make, batch, side, mixed=mixed, last=last)
            except Exception as e:
                print(f"{wanted} {batch} x {side}: {type(e).__name__}: {str(e)[:150]}", flush=True)
            gc.collect()
    return found


class _Description:
    """What is needed to make a tensor again."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.shape, self.stride, self.dtype = tuple(tensor.shape), tensor.stride(), tensor.dtype

    def made(self) -> torch.Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="cuda").fill_(0.5)


def recorded(op: str, args: tuple[Any, ...]) -> str:
    """The steps of a second call."""
    function = getattr(torch.ops.aten, op.removeprefix("aten::")).default
    given = tuple(a.made() if isinstance(a, _Description) else a for a in args)
    function(*given)
    torch.cuda.synchronize()
    torch.cuda.memory._record_memory_history(enabled="all", context=None, max_entries=100_000, clear_history=True)
    out = function(*given)
    torch.cuda.synchronize()
    trace = torch.cuda.memory._snapshot()["device_traces"][0]
    torch.cuda.memory._record_memory_history(enabled=None)
    results = [t for t in (out if isinstance(out, tuple) else (out,)) if t is not None]
    places = {t.untyped_storage().data_ptr(): n for n, t in enumerate(results)}
    live: dict[int, int] = {}
    steps: list[str] = []
    taken = 0
    last = {e["addr"]: i for i, e in enumerate(trace) if e["action"] == "alloc"}
    for position, entry in enumerate(trace):
        address = entry["addr"]
        if entry["action"] == "alloc" and address in places and last[address] == position:
            steps.append(f"o{places[address]}")
        elif entry["action"] == "alloc":
            live[address], taken = taken, taken + 1
            steps.append(f"t{entry['size']}")
        elif entry["action"] == "free_completed" and address in live:
            steps.append(f"g{live.pop(address)}")
    return " ".join(steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--seconds", type=float, default=150.0, help="after which no further call is recorded")
    options = parser.parse_args()
    until = time.monotonic() + options.seconds
    jobs = [(name, mixed, last) for mixed, last in MODES for name, _, _ in models()]
    # Forked before CUDA is used, which none of them does.
    with concurrent.futures.ProcessPoolExecutor(mp_context=multiprocessing.get_context("fork")) as pool:
        told = list(pool.map(calls_of_model, jobs))
    calls: Calls = {}
    for job, found in zip(jobs, told, strict=True):
        calls |= found
        print(f"{job}: {len(found)} calls, {len(calls)} so far", flush=True)
    done: dict[str, str] = {}
    for key, (op, args) in calls.items():
        if time.monotonic() > until:
            print(f"{len(calls) - len(done)} calls are left out: the time is over")
            break
        try:
            done[key] = recorded(op, args)
        except Exception as e:
            print(f"{key}: {type(e).__name__}: {str(e)[:150]}")
            torch.cuda.memory._record_memory_history(enabled=None)
        if len(done) % 100 == 0:
            torch.cuda.empty_cache()
    versions = {
        "torch": torch.__version__, "cudnn": torch.backends.cudnn.version(), "gpu": torch.cuda.get_device_name(0),
    }  # fmt: skip
    content = json.dumps({"versions": versions, "calls": dict(sorted(done.items()))}, indent=0)
    options.file.write_bytes(lzma.compress(content.encode()))
    print(
        f"{len(done)} of {len(calls)} calls, {len({*done.values()})} different, in {options.file.stat().st_size} bytes"
    )


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    main()
