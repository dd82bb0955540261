"""Streams and threads of the virtual card, held against what a real one did (tests/data/streams)."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from virtual_cards import h100

torch = pytest.importorskip("torch")

from fragscope.record.virtual import VirtualDevice  # noqa: E402 - needs torch
from fragscope.trace import RequestKind  # noqa: E402

pytestmark = pytest.mark.torch

RECORDED = json.loads((Path(__file__).parents[1] / "data/streams/h100-2.11.json").read_text())["programs"]
Event = tuple[str, int, int]


def recorded(name: str, *, without: tuple[int, ...] = ()) -> list[Event]:
    """What the card's allocator was asked for, less allocations of some sizes."""
    return [(a, size, stream) for a, size, stream in RECORDED[name] if a != "free_completed" and size not in without]


def asked(device: VirtualDevice, program: Callable[[], object], *, without: tuple[int, ...] = ()) -> list[Event]:
    """What the virtual card's allocator is asked for by a program."""
    before = len(device.memory.requests.finish())
    program()
    requests = device.memory.requests.finish()
    made: dict[int, tuple[int, int]] = {}
    numbers: dict[int, int] = {}
    events = []
    for row in range(len(requests)):
        kind, id_ = int(requests.kind[row]), int(requests.id[row])
        if kind == RequestKind.ALLOC:
            made[id_] = int(requests.size[row]), int(requests.stream[row])
        if row < before or kind not in (RequestKind.ALLOC, RequestKind.FREE) or made[id_][0] in without:
            continue
        size, stream = made[id_]
        action = "alloc" if kind == RequestKind.ALLOC else "free_requested"
        events.append((action, size, numbers.setdefault(stream, len(numbers))))
    return events


def deferred(name: str) -> list[int]:
    """Sizes of what the card freed and could not give out at once, since another stream had used it."""
    sizes = [size for action, size, _ in RECORDED[name] if action == "free_requested"]
    for action, size, _ in RECORDED[name]:
        if action == "free_completed":
            sizes.remove(size)
    return sizes


REDUCTION = (4, 76)
"""The result of ``mean``, and what it takes besides, which is not modelled: 76 bytes, and 4 once more."""


def test_backward_passes_run_on_the_streams_of_their_forward_passes() -> None:
    with h100() as device:
        side = torch.cuda.Stream()
        w = torch.ones(512, 512, device="cuda", requires_grad=True)
        v = torch.ones(300, 512, device="cuda", requires_grad=True)

        def two() -> None:
            with torch.cuda.stream(side):
                a = (v * 2).relu()
            torch.cuda.current_stream().wait_stream(side)
            b = (a * 3 + w[:300]).square()
            loss = b.mean()
            loss.backward()

        def called_on_side() -> None:
            b = (v * 3).square().mean()
            with torch.cuda.stream(side):
                b.backward()

        for name, program in (("two streams", two), ("called on side", called_on_side)):
            w.grad = v.grad = None
            assert asked(device, program, without=REDUCTION) == recorded(name, without=REDUCTION)
            waiting = len(device.memory._uses)
            assert waiting == len(deferred(name)) == 1, "a gradient that another stream than its own took"
            torch.cuda.synchronize()
        assert torch.cuda.current_stream() == torch.cuda.default_stream()


def test_code_that_a_backward_pass_calls_is_on_the_stream_of_its_step() -> None:
    seen = []
    with h100() as device:
        side, third = torch.cuda.Stream(), torch.cuda.Stream()
        x = torch.ones(4, device="cuda", requires_grad=True)
        with torch.cuda.stream(side):
            y = x * 2

        def hook(gradient: torch.Tensor) -> None:
            seen.append(torch.cuda.current_stream())
            with torch.cuda.stream(third):
                seen.append(torch.cuda.current_stream())
            seen.append(torch.cuda.current_stream())

        y.grad_fn.register_prehook(lambda gradients: hook(gradients[0]))
        x.register_post_accumulate_grad_hook(hook)
        (y * 3).sum().backward()
        assert seen == [side, third, side] * 2
        assert torch.cuda.current_stream() == torch.cuda.default_stream()
        assert device.stream == 0


def test_sums_of_gradients_are_made_where_they_are_taken() -> None:
    """``x`` is first used on the main stream, which waits for the other to add its part: no race."""
    with h100() as device:
        device.memory.begin_phase("measure")
        device.memory.ordered = True
        side = torch.cuda.Stream()
        x = torch.ones(1000, device="cuda", requires_grad=True)
        a = x * 2
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            b = x * 3
        torch.cuda.current_stream().wait_stream(side)
        (a + b).sum().backward()
        x.grad.clone()
        assert [str(h) for h in device.memory.ordering.hazards] == []
        assert "accumulation of gradients" in device.estimated


def test_backward_passes_inside_others_and_of_other_threads() -> None:
    with h100() as device:
        side = torch.cuda.Stream()
        layer = torch.nn.Linear(8, 8, bias=False).cuda()
        x = torch.ones(8, 8, device="cuda", requires_grad=True)
        with torch.cuda.stream(side):
            y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=True)
        on_side = asked(device, lambda: y.backward(torch.ones_like(y)))
        numbers = {stream for action, size, stream in on_side if action == "alloc" and size == 8 * 8 * 4}
        assert len(numbers) == 2, "the first gradient is the caller's, all others are made on the other stream"
        assert not [op for op in device.estimated if "threads" in op]

        def elsewhere() -> None:
            with torch.cuda.stream(torch.cuda.Stream()):
                (x * 2).backward(x.detach())

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        (x * 2).backward(x.detach())
        assert [op for op in device.estimated if "threads" in op] == ["backward pass over streams of several threads"]
