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
from fragscope.trace import RequestKind, Requests  # noqa: E402

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
            before = len(device.memory.requests.finish())
            torch.cuda.synchronize()
            kinds = device.memory.requests.finish().kind[before:].tolist()
            waited = kinds.count(RequestKind.USES_DONE)
            assert waited == len(deferred(name)) == 1, "a gradient that another stream than its own took"
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


def several_streams(first: torch.cuda.Stream, second: torch.cuda.Stream) -> tuple[torch.Tensor, ...]:
    """A leaf; what the main stream and the first make of it; and what the second, the main and the first make of that.

    The step of the second stream hands a gradient to each of the other two, where another one is already: a pass takes
    the step that was made last first.
    """
    x = torch.ones(1000, device="cuda", requires_grad=True)
    u = x * 2
    with torch.cuda.stream(first):
        v = x * 3
    with torch.cuda.stream(second):
        both = u * v
    on_main = u * 5
    with torch.cuda.stream(first):
        on_first = v * 7
    return x, u, v, both, on_main, on_first


def test_gradients_that_other_streams_take_are_marked() -> None:
    """By hand from ``InputBuffer::add`` (torch/csrc/autograd/input_buffer.cpp): what comes from another stream than the
    one of the step that takes it is recorded there, whether or not it is added to what came before."""
    with h100() as device:
        _, _, _, *ends = several_streams(torch.cuda.Stream(), torch.cuda.Stream())
        names = dict(zip((0, *streams_of(device)), ("main", "first", "second"), strict=True))
        gradients = [torch.ones(1000, device="cuda") for _ in ends]
        before = len(device.memory.requests.finish())
        torch.autograd.backward(ends, gradients)
        requests = device.memory.requests.finish()
        made = {int(requests.id[r]): int(requests.stream[r]) for r in range(len(requests)) if is_alloc(requests, r)}
        used = [
            (names[made[int(requests.id[r])]], names[int(requests.stream[r])])
            for r in range(before, len(requests))
            if requests.kind[r] == RequestKind.RECORD_STREAM
        ]
        assert used == [
            ("main", "second"),  # the caller's gradient of what the second stream made
            ("main", "first"),  # and of what the first made
            ("second", "main"),  # the second stream's for u, to which the main one has given one before
            ("second", "first"),  # and for v, likewise
            ("first", "main"),  # v's for the leaf, which was first used on the main stream
        ]
        taken = [names[int(requests.stream[r])] for r in range(before, len(requests)) if is_alloc(requests, r)]
        assert taken == ["first", "main", "second", "second", "first", "main"], "all sums are written in place"


@pytest.mark.parametrize("wanted", ["x", "v"])
def test_sums_are_made_on_the_stream_of_the_step_that_takes_them(wanted: str) -> None:
    """By hand from ``InputBuffer::add``: the accumulation stream is the consumer's. A graph of the gradients is asked
    for, since sums are written in place without (``accumulate``, beside it)."""
    with h100() as device:
        x, _, v, *ends = several_streams(torch.cuda.Stream(), torch.cuda.Stream())
        names = dict(zip((0, *streams_of(device)), ("main", "first", "second"), strict=True))
        gradients = [torch.ones(1000, device="cuda") for _ in ends]
        before = len(device.memory.requests.finish())
        kept = torch.autograd.grad(ends, {"x": x, "v": v}[wanted], gradients, create_graph=True)
        requests = device.memory.requests.finish()
        taken = [names[int(requests.stream[r])] for r in range(before, len(requests)) if is_alloc(requests, r)]
        if wanted == "x":
            assert taken == [
                "first",  # of on_first, for v
                "main",  # of on_main, for u
                "second", "second",  # of both, for u and for v
                "main", "first",  # their sums with the above
                "first", "main",  # of v and of u, for x
                "main",  # their sum
            ]  # fmt: skip
        else:  # nothing that only u needs is done
            assert taken == ["first", "second", "first"]
        del kept


def test_several_gradients_of_one_tensor_are_added_up_where_it_was_made() -> None:
    """By hand from ``InputBuffer::add``, which the gradients that a pass begins with go through, too."""
    with h100() as device:
        side = torch.cuda.Stream()
        x = torch.ones(1000, device="cuda", requires_grad=True)
        with torch.cuda.stream(side):
            y = x * 2
        gradients = [torch.ones(1000, device="cuda") for _ in range(2)]
        before = len(device.memory.requests.finish())
        kept = torch.autograd.grad([y, y], x, gradients)
        requests = device.memory.requests.finish()
        events = [
            (RequestKind(int(requests.kind[r])).name, int(requests.stream[r]) != 0)
            for r in range(before, len(requests))
            if requests.kind[r] in (RequestKind.ALLOC, RequestKind.RECORD_STREAM)
        ]
        assert events == [
            ("RECORD_STREAM", True),
            ("RECORD_STREAM", True),
            ("ALLOC", True),  # their sum
            ("ALLOC", True),  # the gradient of x, which no other stream has used
        ]
        del kept


def is_alloc(requests: Requests, row: int) -> bool:
    return bool(requests.kind[row] == RequestKind.ALLOC)


def streams_of(device: VirtualDevice) -> list[int]:
    """Handles of the streams besides the default one that memory was taken on, in order."""
    requests = device.memory.requests.finish()
    return [int(s) for s in dict.fromkeys(requests.stream.tolist()) if s]


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


def test_streams_are_numbered_as_on_a_card() -> None:
    """The answers are those of an H100 with torch 2.11: 32 streams of a priority, then the first again; (0, -3)."""
    with h100():
        made = [torch.cuda.Stream() for _ in range(70)]
        handles = [s.cuda_stream for s in made]
        assert [handles.index(h) for h in handles][30:36] == [30, 31, 0, 1, 2, 3]
        high = [torch.cuda.Stream(priority=-1) for _ in range(40)]
        assert len({s.cuda_stream for s in high}) == 32
        assert not {s.cuda_stream for s in high} & set(handles)
        assert torch.cuda.Stream(priority=-3).priority == -3
        assert torch.cuda.Stream(priority=-9).priority == -3, "the highest there is"
        assert torch.cuda.Stream.priority_range() == (0, -3)
        s = high[0]
        same = torch.cuda.Stream(stream_id=s.stream_id, device_index=s.device_index, device_type=s.device_type)
        assert same == s
        assert (same.cuda_stream, same.priority) == (s.cuda_stream, -1)
        with pytest.raises(RuntimeError, match="invalid device ordinal"):
            torch.cuda.Stream(stream_id=s.stream_id, device_index=1, device_type=s.device_type)


# --- threads ------------------------------------------------------------------------------------------------------


def in_thread(program: Callable[[], object]) -> Callable[[], None]:
    """The program in a thread that has ended afterwards."""

    def run() -> None:
        thread = threading.Thread(target=program)
        thread.start()
        thread.join()

    return run


def test_workspaces_of_cublas_are_of_the_threads_that_took_them_on_the_card() -> None:
    """A second thread takes one, a third that comes after it none; the thread of backward passes has its own."""
    with h100() as device:
        side = torch.cuda.Stream()
        w = torch.ones(512, 512, device="cuda", requires_grad=True)
        v = torch.ones(300, 512, device="cuda", requires_grad=True)
        (v * 3).square().mean().backward()  # which started autograd's thread

        def product() -> None:
            w.detach() @ w.detach()

        def on_side() -> None:
            with torch.cuda.stream(side):
                product()

        product()
        assert asked(device, product) == recorded("product again")
        assert asked(device, in_thread(product)) == recorded("thread 1")
        assert asked(device, in_thread(product)) == recorded("thread 2")
        assert asked(device, on_side) == recorded("side")
        layer = torch.nn.Linear(512, 512).cuda()
        assert asked(device, lambda: layer(v.detach())) == recorded("lt first")
        assert asked(device, lambda: layer(v.detach())) == recorded("lt again")
        assert asked(device, in_thread(lambda: layer(v.detach()))) == recorded("lt thread")
        assert not [op for op in device.estimated if "cuBLAS" in op]
        workspace = 32 * 2**20
        events = asked(device, lambda: layer(v).sum().backward())
        assert events.count(("alloc", workspace, 0)) == recorded("backward thread").count(("alloc", workspace, 0)) == 1
        assert not [op for op in device.estimated if "cuBLAS" in op]


def test_what_depends_on_which_thread_is_first_is_estimated() -> None:
    def product() -> None:
        x = torch.ones(8, 8, device="cuda")
        x @ x
        both.wait()

    both = threading.Barrier(2)
    with h100() as device:
        threads = [threading.Thread(target=product) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert "cuBLAS workspaces of threads that run at once" in device.estimated
        x = torch.ones(8, 8, device="cuda", requires_grad=True)
        (x @ x).sum().backward()
        assert "cuBLAS workspace of backward passes after threads" in device.estimated


def test_several_gradients_at_once_over_several_streams_are_estimated() -> None:
    with h100() as device:
        x = torch.ones(3, 4, device="cuda", requires_grad=True)
        with torch.cuda.stream(torch.cuda.Stream()):
            part = x.exp()
        out = (part + x * 2).sum(0)
        seeds = torch.eye(4, device="cuda")
        (found,) = torch.autograd.grad(out, x, seeds, is_grads_batched=True)
        assert found.shape == (4, 3, 4)
        assert "batched gradients of several streams" in device.estimated
