"""Programs on the virtual device whose streams have an order or lack one; one edge more or less turns the verdict."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
from virtual_cards import h100  # noqa: E402

from fragscope.errors import UsageError  # noqa: E402
from fragscope.record.virtual.extent import Extent  # noqa: E402
from fragscope.record.virtual.ordering import Hazard, Ordering  # noqa: E402

pytestmark = pytest.mark.torch
N = 4 * 2**20  # bytes; a segment of its own

Program = Callable[[], object]


def hazards(program: Program) -> list[Hazard]:
    """What a program's measured phase shows."""
    with h100() as device:
        device.memory.begin_phase("measure")
        kept = program()
        device.memory.end_phase()
        del kept
        return list(device.memory.ordering.hazards)


def data(size: int = N) -> torch.Tensor:
    return torch.zeros(size, dtype=torch.uint8, device="cuda")


# --- edges ------------------------------------------------------------------------------------------------------------

EDGES = {
    "wait_stream": lambda side: torch.cuda.current_stream().wait_stream(side),
    "wait_event": lambda side: torch.cuda.current_stream().wait_event(side.record_event()),
    "event.wait": lambda side: side.record_event().wait(),
    "event.synchronize": lambda side: side.record_event().synchronize(),
    "stream.synchronize": lambda side: side.synchronize(),
    "cuda.synchronize": lambda side: torch.cuda.synchronize(),
    "accelerator.synchronize": lambda side: torch.accelerator.synchronize(),
}


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("there", [True, False], ids=["edge", "no edge"])
def test_an_edge_from_the_writer_to_the_reader_is_what_it_takes(edge: str, there: bool) -> None:
    def program() -> None:
        side = torch.cuda.Stream()
        x = data()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            x.add_(1)
        if there:
            EDGES[edge](side)
        x.clone()

    assert bool(hazards(program)) is not there


@pytest.mark.parametrize("edge", ["wait_stream", "wait_event", "event.wait"])
def test_an_edge_before_the_work_orders_nothing(edge: str) -> None:
    def program() -> None:
        side = torch.cuda.Stream()
        x = data()
        side.wait_stream(torch.cuda.current_stream())
        EDGES[edge](side)
        with torch.cuda.stream(side):
            x.add_(1)
        x.clone()

    assert len(hazards(program)) == 1


def test_an_edge_in_the_other_direction_orders_nothing() -> None:
    def program() -> None:
        side = torch.cuda.Stream()
        x = data()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            x.add_(1)
        side.wait_stream(torch.cuda.current_stream())
        x.clone()

    assert len(hazards(program)) == 1


def test_an_event_that_was_never_recorded_orders_nothing() -> None:
    def program() -> None:
        side = torch.cuda.Stream()
        x = data()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            x.add_(1)
        torch.cuda.current_stream().wait_event(torch.cuda.Event())
        x.clone()

    assert len(hazards(program)) == 1


def test_edges_chain_over_a_third_stream() -> None:
    def program(chained: bool) -> None:
        first, second = torch.cuda.Stream(), torch.cuda.Stream()
        x = data()
        first.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(first):
            x.add_(1)
        if chained:
            second.wait_stream(first)
        torch.cuda.current_stream().wait_stream(second)
        x.clone()

    assert not hazards(lambda: program(True))
    assert hazards(lambda: program(False))


def test_two_readers_need_no_order_and_a_writer_does_against_both() -> None:
    def program(write: bool) -> None:
        side = torch.cuda.Stream()
        x = data()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            x.clone()
        _ = x.add_(1) if write else x.clone()

    assert not hazards(lambda: program(False))
    found = hazards(lambda: program(True))
    assert [(h.first.writes, h.second.writes) for h in found] == [(False, True)]


@pytest.mark.parametrize("blocking", [True, False])
def test_a_copy_to_the_host_orders_if_it_blocks(blocking: bool) -> None:
    def program() -> None:
        side = torch.cuda.Stream()
        x = data()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            x.to("cpu", non_blocking=not blocking)
        x.add_(1)

    assert bool(hazards(program)) is not blocking


def test_a_copy_from_the_host_is_a_write() -> None:
    def program() -> None:
        x = data()
        with torch.cuda.stream(torch.cuda.Stream()):
            x.copy_(torch.zeros(N, dtype=torch.uint8), non_blocking=True)

    assert [h.second.what for h in hazards(program)] == ["aten::copy_"]


# --- streams ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("others", "found"), [(30, 1), (31, 0)])
def test_the_first_stream_comes_again_after_32(others: int, found: int) -> None:
    def program() -> object:
        x, first = data(), torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(first):
            x.add_(1)
        kept = [torch.cuda.Stream() for _ in range(others)]
        with torch.cuda.stream(torch.cuda.Stream()):
            x.add_(1)
        return x, kept

    assert len(hazards(program)) == found


def test_the_default_stream_does_not_wait_for_streams_of_torch() -> None:
    """Source: cudaStreamNonBlocking in c10/cuda/CUDAStream.cpp, and what CUDA documents of that flag."""

    def program() -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            x = data()
        x.add_(1)

    assert len(hazards(program)) == 1


@pytest.mark.parametrize("handle", [0x1234, 2], ids=["made elsewhere", "per thread"])
def test_the_default_stream_and_a_blocking_one_wait_for_each_other(handle: int) -> None:
    def program() -> None:
        x = data()
        with torch.cuda.stream(torch.cuda.ExternalStream(handle)):
            x.add_(1)
        x.add_(1)

    assert not hazards(program)


def test_blocking_streams_do_not_wait_for_each_other() -> None:
    def program() -> None:
        x = data()
        for handle in (0x1234, 0x5678):
            with torch.cuda.stream(torch.cuda.ExternalStream(handle)):
                x.add_(1)

    assert len(hazards(program)) == 1


def test_the_default_stream_has_two_handles() -> None:
    def program() -> None:
        x = data()
        with torch.cuda.stream(torch.cuda.ExternalStream(1)):  # cudaStreamLegacy
            x.add_(1)

    assert not hazards(program)


def test_threads_have_streams_of_their_own() -> None:
    def program() -> None:
        x = data()

        def work() -> None:
            with torch.cuda.stream(torch.cuda.Stream()):
                x.add_(1)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()

    assert len(hazards(program)) == 1


# --- what is touched --------------------------------------------------------------------------------------------------


def on_two_streams(first: Program, second: Program) -> None:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        first()
    second()


@pytest.mark.parametrize(
    ("first", "second", "shared"),
    [
        (lambda m: m[:4], lambda m: m[4:], False),
        (lambda m: m[:5], lambda m: m[4:], True),
        (lambda m: m[:, :32], lambda m: m[:, 32:], False),
        (lambda m: m[:, :33], lambda m: m[:, 32:], True),
        (lambda m: m[:, ::2], lambda m: m[:, 1::2], False),
        (lambda m: m.t()[:32], lambda m: m.t()[32:], False),
        (lambda m: m[:, :32], lambda m: m[2], True),
        (lambda m: m[:, :32], lambda m: m[2, 32:], False),
    ],
)
def test_parts_of_a_tensor_are_told_apart(first: object, second: object, shared: bool) -> None:
    def program() -> None:
        m = data(64 * 64).view(64, 64)
        on_two_streams(lambda: first(m).add_(1), lambda: second(m).add_(1))  # type: ignore[operator]

    assert bool(hazards(program)) is shared


def test_the_last_write_of_one_part_does_not_hide_that_of_another() -> None:
    def program() -> None:
        m = data(64 * 64).view(64, 64)
        on_two_streams(lambda: (m[:, :32].add_(1), m[:, 32:].add_(1)), m[:, :32].clone)

    assert len(hazards(program)) == 1


def test_what_is_kept_of_a_column_at_a_time_is_bounded() -> None:
    """A cache that grows by columns and is read up to the last after each: time and memory for each stay the same."""
    columns = 400
    with h100() as device:
        device.memory.begin_phase("measure")
        cache, column = torch.zeros(4, columns, 16, device="cuda"), torch.ones(4, 16, device="cuda")
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.zeros(1, device="cuda")
        for i in range(columns):
            cache[:, i] = column
            cache[:, : i + 1].sum(1)
        assert not device.memory.ordering.hazards
        cells = device.memory.ordering._shadow._cells
    assert len(cells) < columns / 2
    assert max(len(views) for cell in cells for last in (cell.reads, cell.writes) for views in last.values()) <= 64


@pytest.mark.parametrize("waits", [True, False])
def test_many_columns_on_one_stream_are_known_on_another(waits: bool) -> None:
    def program() -> None:
        side, cache = torch.cuda.Stream(), torch.zeros(4, 200, 16, device="cuda")
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for i in range(200):
                cache[:, i] += 1
        if waits:
            torch.cuda.current_stream().wait_stream(side)
        cache[:, :3].sum()

    assert bool(hazards(program)) is not waits


@pytest.mark.parametrize(
    "write",
    [
        lambda x, y: x.add_(y),
        lambda x, y: torch.add(y, y, out=x),
        lambda x, y: torch._foreach_add_([x], [y]),
        lambda x, y: x.copy_(y),
        lambda x, y: x.zero_(),
        lambda x, y: x.__setitem__(slice(0, 10), y[:10]),
        lambda x, y: x.index_put_((torch.zeros(3, dtype=torch.int64, device="cuda"),), y[:3]),
        lambda x, y: x.index_put_((y.view(torch.bool),), torch.tensor(0, dtype=torch.uint8)),
    ],
)
def test_what_an_operator_changes_is_written(write: Callable[..., object]) -> None:
    def program() -> None:
        x, y = data(), data()
        on_two_streams(x.clone, lambda: write(x, y))

    assert [(h.first.writes, h.second.writes) for h in hazards(program)] == [(False, True)]


@pytest.mark.parametrize(("training", "found"), [(True, 1), (False, 0)])
def test_batch_norm_writes_its_running_mean_in_training(training: bool, found: int) -> None:
    def program() -> None:
        norm, x = torch.nn.BatchNorm1d(8, device="cuda").train(training), torch.zeros(4, 8, device="cuda")
        on_two_streams(norm.running_mean.clone, lambda: norm(x))

    assert len(hazards(program)) == found


def test_making_a_tensor_and_looking_at_it_touch_nothing() -> None:
    def program() -> None:
        x = torch.empty(N, dtype=torch.uint8, device="cuda")
        looks = (
            torch.empty_like,
            torch.ones_like,
            lambda t: t.new_zeros(3),
            lambda t: t.view(2, -1).t(),
            lambda t: t[3:],
            lambda t: torch.ops.aten._unsafe_view(t, (2, -1)),
        )
        on_two_streams(lambda: x.add_(1), lambda: [look(x) for look in looks])

    assert not hazards(program)


def test_only_the_measured_phase_is_followed() -> None:
    with h100() as device:
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            x = data()
        device.memory.begin_phase("measure")
        x.add_(1)
        device.memory.end_phase()
        with torch.cuda.stream(side):
            x.add_(1)
        assert device.memory.ordering.summary() == ""


# --- the allocator ----------------------------------------------------------------------------------------------------


def reused(*, recorded: bool = False, waits: bool = False) -> list[Hazard]:
    """A tensor used on another stream is freed, and the next one gets its memory."""

    def program() -> None:
        side = torch.cuda.Stream()
        x = data()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            y = x.clone()
        if recorded:
            x.record_stream(side)
        del x
        if waits:
            torch.cuda.current_stream().wait_stream(side)
        z = data()
        del y, z

    return hazards(program)


def test_memory_that_another_stream_still_reads_is_given_away() -> None:
    found = reused()
    assert [(h.first.what, h.first.writes, h.second.writes, h.reused) for h in found] == [
        ("aten::clone", False, True, True)
    ]
    assert "it was freed and given to another tensor between" in str(found[0])


def test_record_stream_and_an_edge_each_prevent_it() -> None:
    assert not reused(recorded=True)
    assert not reused(waits=True)


@pytest.mark.parametrize("recorded", [True, False])
def test_what_the_allocator_waited_for_is_over_when_it_hands_the_memory_out(recorded: bool) -> None:
    """Emptying the cache completes deferred frees; the segment stays, since its other tensor lives."""

    def program() -> None:
        side = torch.cuda.Stream()
        neighbour, x = data(), data()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            y = x.clone()
        if recorded:
            x.record_stream(side)
        address = x.data_ptr()
        del x
        torch.cuda.empty_cache()
        z = data()
        assert z.data_ptr() == address
        del neighbour, y, z

    assert bool(hazards(program)) is not recorded


@pytest.mark.parametrize("ordered", [True, False])
def test_so_is_what_the_recorded_stream_comes_after(ordered: bool) -> None:
    def program() -> None:
        side, third, current = torch.cuda.Stream(), torch.cuda.Stream(), torch.cuda.current_stream()
        with torch.cuda.stream(side):
            neighbour, x = data(1024), data(1024)
        third.wait_stream(side)
        with torch.cuda.stream(third):
            y = x.clone()
        if ordered:
            current.wait_stream(third)
        x.record_stream(current)
        address = x.data_ptr()
        del x
        torch.cuda.empty_cache()
        with torch.cuda.stream(side):
            z = data(1024)
        assert z.data_ptr() == address
        del neighbour, y, z

    assert bool(hazards(program)) is not ordered


def test_the_stream_of_the_allocation_is_not_waited_for() -> None:
    """The allocator records events on the recorded streams only; the next tensor may be written on one of those."""

    def program() -> None:
        side, current = torch.cuda.Stream(), torch.cuda.current_stream()
        current.wait_stream(side)
        with torch.cuda.stream(side):
            neighbour, x = data(1024), data(1024)
        x.record_stream(current)
        address = x.data_ptr()
        del x
        torch.cuda.empty_cache()
        with torch.cuda.stream(side):
            z = torch.empty(1024, dtype=torch.uint8, device="cuda")
        assert z.data_ptr() == address
        z.zero_()
        del neighbour

    assert [h.reused for h in hazards(program)] == [True]


def test_so_is_work_of_the_only_stream_there_was() -> None:
    ordering, memory = Ordering(), Extent(0, 512, 512)
    ordering.independent(10)
    ordering.launch(10, "reads", None, [(0, memory)], [])
    ordering.freed(0, 512, [10])
    ordering.launch(0, "writes", None, [], [(1, memory)])
    assert ordering.pairs == 0


def test_a_tensor_that_moved_is_followed_where_it_is() -> None:
    def program() -> None:
        x = data()
        address = x.data_ptr()
        x.resize_(2 * N)
        z = data()
        assert z.data_ptr() == address
        on_two_streams(lambda: z.add_(1), lambda: x.add_(1))

    assert not hazards(program)


def test_memory_reused_on_its_own_stream_has_an_order() -> None:
    def program() -> None:
        for _ in range(3):
            with torch.cuda.stream(torch.cuda.Stream()):
                data().add_(1)
        for _ in range(3):
            data().add_(1)

    assert not hazards(program)


def test_memory_from_one_stream_written_on_another_meets_its_former_owner() -> None:
    """The output of a raw kernel, allocated for torch's stream: work that is queued there may still use the block."""

    def program(wait: bool) -> None:
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            data().add_(1)
            out = torch.empty(N, dtype=torch.uint8, device="cuda")
        if wait:
            side.synchronize()
        out.zero_()

    assert all(h.reused for h in hazards(lambda: program(False)))
    assert hazards(lambda: program(False))
    assert not hazards(lambda: program(True))


def test_giving_memory_back_to_the_driver_waits_for_the_card() -> None:
    def program(empty: bool) -> None:
        side = torch.cuda.Stream()
        x, spare = data(), data(8 * N)  # a segment of its own, which can be given back
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            x.add_(1)
        del spare
        if empty:
            torch.cuda.empty_cache()
        x.clone()

    assert not hazards(lambda: program(True))
    assert hazards(lambda: program(False))


@pytest.mark.parametrize("cached", [True, False])
def test_so_does_a_request_that_fails_if_there_was_something_to_give_back(cached: bool) -> None:
    def program() -> None:
        side = torch.cuda.Stream()
        x, spare = data(), data(8 * N)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            x.add_(1)
        if cached:
            del spare
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(2**40, dtype=torch.uint8, device="cuda")
        x.clone()

    assert bool(hazards(program)) is not cached


@pytest.mark.parametrize(("how", "ordered"), [("cudaMalloc", True), ("cuMemCreate", False)])
def test_cuda_free_waits_for_the_card_and_unmapping_does_not(how: str, ordered: bool) -> None:
    with h100() as device:
        device.memory.begin_phase("measure")
        x = data()
        taken = device.take_device_memory(N, how)  # type: ignore[arg-type]
        on_two_streams(lambda: x.add_(1), taken.free)
        x.clone()
        assert bool(device.memory.ordering.hazards) is not ordered


# --- kernels outside torch --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("synchronised", [True, False])
def test_a_declared_kernel_runs_on_the_default_stream(synchronised: bool) -> None:
    with h100() as device:
        device.memory.begin_phase("measure")
        with torch.cuda.stream(torch.cuda.Stream()):
            x = data()
            out = torch.empty_like(x)
            if synchronised:
                torch.cuda.synchronize()
            device.kernel("encode", [x], [out])
            assert bool(device.memory.ordering.hazards) is not synchronised
            torch.cuda.synchronize()
            device.kernel("again", [x], [out], torch.cuda.current_stream())
            out.add_(1)
        assert len(device.memory.ordering.hazards) == (0 if synchronised else 1)


def test_a_declared_kernel_takes_tensors_of_the_card_only() -> None:
    with h100() as device, pytest.raises(UsageError, match=r"kernel 'encode': one of its tensors is not on the card"):
        device.kernel("encode", [torch.zeros(3)], [])


# --- usual programs ---------------------------------------------------------------------------------------------------


def prefetching() -> None:
    """The next batch is copied on a side stream while this one is worked on."""
    copies, current = torch.cuda.Stream(), torch.cuda.current_stream()
    host = torch.zeros(N, dtype=torch.uint8)

    def load() -> torch.Tensor:
        with torch.cuda.stream(copies):
            return host.to("cuda", non_blocking=True)

    batch = load()
    for _ in range(5):
        current.wait_stream(copies)
        batch.record_stream(current)
        following = load()
        batch.add_(1).sum()
        batch = following


def double_buffering() -> None:
    """Two buffers in turn, with an event for each way."""
    side, current = torch.cuda.Stream(), torch.cuda.current_stream()
    buffers = [data(), data()]
    side.wait_stream(current)
    free = [torch.cuda.Event(), torch.cuda.Event()]
    full = [torch.cuda.Event(), torch.cuda.Event()]
    for i in range(6):
        with torch.cuda.stream(side):
            side.wait_event(free[i % 2])
            buffers[i % 2].fill_(i)
            full[i % 2].record()
        current.wait_event(full[i % 2])
        buffers[i % 2].clone()
        free[i % 2].record()


def forking_and_joining() -> None:
    """Two halves of a product on two streams, joined on the first."""
    side, current = torch.cuda.Stream(), torch.cuda.current_stream()
    x = torch.ones(512, 512, device="cuda")
    for _ in range(4):
        out = torch.empty(512, 512, device="cuda")
        side.wait_stream(current)
        with torch.cuda.stream(side):
            torch.mm(x[:256], x, out=out[:256])
        torch.mm(x[256:], x, out=out[256:])
        current.wait_stream(side)
        x = out.relu()


def training_with_a_side_stream() -> None:
    """Forward on a side stream, backward from the main one: autograd orders the backward pass."""
    side, current = torch.cuda.Stream(), torch.cuda.current_stream()
    weight = torch.ones(256, 256, device="cuda", requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    for _ in range(3):
        x = torch.ones(64, 256, device="cuda")
        side.wait_stream(current)
        with torch.cuda.stream(side):
            loss = (x @ weight).relu().mean()
            loss.backward()
        current.wait_stream(side)
        optimizer.step()
        optimizer.zero_grad()


def backward_from_another_stream() -> None:
    """No order by the program between forward and backward: autograd has it."""
    side, current = torch.cuda.Stream(), torch.cuda.current_stream()
    weight = torch.ones(256, 256, device="cuda", requires_grad=True)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        loss = (torch.ones(64, 256, device="cuda") @ weight).relu().mean()
    loss.backward()
    weight.grad.clone()


def backward_on_a_stream_of_its_own() -> None:
    """Called where nothing else runs, it still runs on the stream of the forward pass, which reads the gradient."""
    side = torch.cuda.Stream()
    weight, gradient = torch.ones(64, 256, device="cuda", requires_grad=True), torch.ones(64, 256, device="cuda")
    out = (weight * 2).relu()
    with torch.cuda.stream(side):
        out.backward(gradient)
    weight.grad.clone()


def reducing_in_hooks(*, waits: bool = True) -> None:
    """Gradients are summed up on a stream of their own while the backward pass goes on."""
    reduces, current = torch.cuda.Stream(), torch.cuda.current_stream()
    weights = [torch.ones(256, device="cuda", requires_grad=True) for _ in range(2)]
    sums = torch.zeros(256, device="cuda")

    def reduce(weight: torch.Tensor) -> None:
        reduces.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(reduces):
            sums.add_(weight.grad)
        weight.grad.record_stream(reduces)

    for weight in weights:
        weight.register_post_accumulate_grad_hook(reduce)
    for _ in range(2):
        (weights[0] * weights[1]).sum().backward()
        if waits:
            current.wait_stream(reduces)
        sums.clone()
        reduces.wait_stream(current)


def test_an_order_that_is_missing_after_hooks_of_a_backward_pass_is_found() -> None:
    found = hazards(lambda: reducing_in_hooks(waits=False))
    assert [(h.first.what, h.second.what) for h in found][:1] == [("aten::add_", "aten::clone")]


USUAL = [
    prefetching,
    double_buffering,
    forking_and_joining,
    training_with_a_side_stream,
    backward_from_another_stream,
    backward_on_a_stream_of_its_own,
    reducing_in_hooks,
]


@pytest.mark.parametrize("program", USUAL)
def test_usual_programs_raise_no_alarm(program: Program) -> None:
    assert not [str(h) for h in hazards(program)]


def test_usual_programs_with_an_edge_left_out_do(monkeypatch: pytest.MonkeyPatch) -> None:
    for program in (prefetching, forking_and_joining):
        with h100() as device:
            stream = torch.cuda.Stream
            device.memory.begin_phase("measure")
            monkeypatch.setattr(stream.__mro__[1], "wait_stream", lambda self, other: None)
            program()
            monkeypatch.undo()
            assert device.memory.ordering.hazards, program.__name__


# --- what is said -----------------------------------------------------------------------------------------------------


MARKED = ("x.add_(3)", 'device.kernel("encode", [x], [])')


def test_the_message_names_both_accesses_their_lines_and_streams() -> None:
    with h100() as device:
        device.memory.begin_phase("measure")
        with torch.cuda.stream(torch.cuda.Stream()):
            x = data()
            for _ in range(3):
                x.add_(3)
                device.kernel("encode", [x], [])
        text = device.memory.ordering.summary()
    source = Path(__file__).read_text().splitlines()
    add, encode = (next(n for n, line in enumerate(source, 1) if line.strip() == text) for text in MARKED)
    assert text == (
        f"encode ({__file__}:{encode}, on the default stream) reads memory that aten::add_ "
        f"({__file__}:{add}, on stream 1) writes, and nothing orders them; 5 such pairs at 2 places"
    )


def test_work_of_one_stream_is_kept_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """However much work there was before the second stream came, the last write is known."""
    monkeypatch.setattr("fragscope.record.virtual.ordering._KEPT", 4)

    def program() -> None:
        x, y = data(), data()
        for _ in range(7):
            y.add_(1)
        with torch.cuda.stream(torch.cuda.Stream()):
            x.clone()
            y.clone()

    assert [h.first.what for h in hazards(program)][1:] == ["aten::add_"]
    assert len(hazards(program)) == 2
