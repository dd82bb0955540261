"""Private pools and CUDA graphs on the virtual card."""

from __future__ import annotations

import threading

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from virtual_cards import h100  # noqa: E402

from fragscope.allocator import ReplaySettings, card_named, replay, rules_for  # noqa: E402
from fragscope.trace import RequestKind  # noqa: E402

pytestmark = pytest.mark.torch
MIB = 2**20


@pytest.fixture
def card():
    with h100() as device:
        yield device


def made(size: int = MIB) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8, device="cuda")


def kinds(device) -> list[str]:
    return [RequestKind(k).name for k in device.memory.requests.finish().kind]


def test_a_pool_keeps_its_memory_to_itself(card):
    pool = torch.cuda.MemPool()
    with torch.cuda.use_mem_pool(pool):
        assert pool.use_count() == 2
        inside = made()
    assert (pool.id, pool.use_count()) == ((0, 1), 1)
    (segment,) = pool.snapshot()
    assert (segment["segment_pool_id"], segment["address"]) == ((0, 1), inside.data_ptr())
    outside = made()
    assert not segment["address"] <= outside.data_ptr() < segment["address"] + segment["total_size"]
    del inside, outside
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() == 2 * MIB  # a pool that is in use keeps what is idle in it
    with torch.cuda.use_mem_pool(pool):
        assert made().data_ptr() == segment["address"]
    del pool
    assert torch.cuda.memory_reserved() == 0


def test_requests_tell_the_pool(card):
    pool = torch.cuda.MemPool(use_on_oom=True)
    with torch.cuda.use_mem_pool(pool):
        kept = made()
    del pool, kept
    rows = card.memory.requests.finish()
    assert kinds(card) == [
        "POOL_CREATE", "SCOPE_OPEN", "ALLOC", "SCOPE_CLOSE", "POOL_RELEASE", "POOL_RELEASE", "EMPTY_CACHE", "FREE",
    ]  # fmt: skip
    assert rows.pool.tolist()[:7] == [1] * 7
    assert rows.size[0] == 1  # use_on_oom
    trace = card.trace()
    assert trace.pools == ((0, 0), (0, 1))
    profile = card_named("h100-80gb")
    settings = ReplaySettings(rules_for("2.11.0"), profile.name, profile.total, profile.free)
    assert replay(trace, settings, verify=True).verify.mismatches == 0


def test_a_pool_is_of_the_thread_that_opened_it(card):
    pool, seen = torch.cuda.MemPool(), []
    with torch.cuda.use_mem_pool(pool):
        thread = threading.Thread(target=lambda: seen.append(made()))
        thread.start()
        thread.join()
        inner = torch.cuda.MemPool()
        with torch.cuda.use_mem_pool(inner):
            seen.append(made())
    pools = card.memory.requests.finish().pool[[k == "ALLOC" for k in kinds(card)]]
    assert pools.tolist() == [0, 2]


def test_a_scope_ends_with_an_exception(card):
    pool = torch.cuda.MemPool()
    with pytest.raises(KeyError), torch.cuda.use_mem_pool(pool):
        raise KeyError
    made()
    assert card.memory.requests.finish().pool[-2] == 0


def test_a_graph_is_captured_into_a_pool_that_lives_with_it(card):
    x = made()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        assert torch.cuda.is_current_stream_capturing()
        y = x + 1
        del y
        z = x * 2
    assert not torch.cuda.is_current_stream_capturing()
    assert graph.pool() == (1, 0)
    before = len(card.memory.requests)
    graph.replay()
    assert len(card.memory.requests) == before
    del z
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() == 4 * MIB  # x's segment, and the pool's: both results were made in one block
    graph.reset()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() == 2 * MIB
    assert list(card.estimated) == ["CUDA graph capture"]
    assert [k for k in kinds(card) if "CAPTURE" in k or "SCOPE" in k or "POOL" in k] == [
        "SCOPE_OPEN", "CAPTURE_BEGIN", "CAPTURE_END", "SCOPE_CLOSE", "POOL_RELEASE",
    ]  # fmt: skip


REPEATS = "torch.ones(3, dtype=torch.int64, device='cuda')"


@pytest.mark.parametrize(
    "waits",
    [
        "torch.cuda.synchronize()", "x.cpu()", "torch.ones(3).cuda()", "torch.cuda.current_stream().synchronize()",
        "x.nonzero()", "x.sum().item()", f"torch.repeat_interleave({REPEATS})", "x[x > 0]", "x.tolist()", "bool(x[0])",
    ],
)  # fmt: skip
def test_what_waits_breaks_a_capture(card, waits):
    """As on an H100 with torch 2.11, where the end of the capture has the last word."""
    x = torch.ones(3, device="cuda")
    inside = []
    with (
        pytest.raises(torch.AcceleratorError, match="operation failed due to a previous error during capture"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        try:
            eval(waits, {"torch": torch, "x": x})
        except torch.AcceleratorError as e:
            inside.append(str(e))
            raise
    assert "operation not permitted when stream is capturing" in inside[0]
    torch.cuda.synchronize()


def test_repeating_into_a_size_that_is_given_does_not_wait(card):
    x, repeats = torch.ones(3, device="cuda"), torch.randint(3, (3,), device="cuda")
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        y = x.repeat_interleave(repeats, output_size=5)
    assert y.shape == (5,)
    assert torch.repeat_interleave(repeats, output_size=4).shape == (4,)


def test_streams_that_wait_for_captured_work_are_captured(card):
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            assert torch.cuda.is_current_stream_capturing()
            kept = made()
        torch.cuda.current_stream().wait_stream(side)
    rows = card.memory.requests.finish()
    assert rows.pool[kinds(card).index("ALLOC")] == 1
    del kept


def test_graphs_share_a_pool(card):
    first, second = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(first):
        kept = made()
    with torch.cuda.graph(second, pool=first.pool()):
        other = made()
    assert second.pool() == first.pool()
    assert set(card.memory.requests.finish().pool[[k == "ALLOC" for k in kinds(card)]].tolist()) == {1}
    del kept, other


def test_a_graph_is_captured_once_and_off_the_default_stream(card):
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="without a preceding successful capture"):
        graph.replay()
    with pytest.raises(RuntimeError, match="non-default stream"):
        graph.capture_begin()
    with torch.cuda.graph(graph):
        pass
    with pytest.raises(RuntimeError, match="already owns a captured graph"), torch.cuda.graph(graph):
        pass


def test_graphed_callables(card):
    layer, x = nn.Linear(8, 8, bias=False).cuda(), torch.zeros(4, 8, device="cuda")
    graphed = torch.cuda.make_graphed_callables(layer, (x,))
    y = graphed(x)
    y.backward(torch.ones_like(y))
    assert "CUDA graph capture" in card.estimated
