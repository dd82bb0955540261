"""What a program does through torch is noted, and torch is as before when the recording is over."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from fragscope.record.cuda.hooks import installed, quietly
from fragscope.trace import RequestKind
from fragscope.trace.chunks import NOTE, RELEASED


class Taken:
    """Takes notes as a recorder does."""

    def __init__(self) -> None:
        self.notes: list[tuple[str, dict[str, Any]]] = []
        self.wanted = 0

    def note(self, kind: int, **what: Any) -> None:
        name = "RELEASED" if kind == RELEASED else RequestKind(kind - NOTE).name
        self.notes.append((name, what))

    def history_wanted(self) -> None:
        self.wanted += 1

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.notes]


class Memory:
    def data_ptr(self) -> int:
        return 0x7000


def stand_in() -> Any:
    """As much of torch as the hooks touch; every function says what it was called with."""

    class Tensor:
        is_cuda = True

        def untyped_storage(self) -> Memory:
            return Memory()

        def get_device(self) -> int:
            return 1

        def record_stream(self, s: Any) -> Any:
            return ("recorded", s)

    class Parameter(Tensor):
        pass

    class MemPool:
        def __init__(self, allocator: Any = None, use_on_oom: bool = False, no_split: bool = False) -> None:
            del allocator, use_on_oom, no_split
            self.id = (0, 7)

    class CUDAGraph:
        captured = False

        def capture_begin(self, *pool: Any, **options: Any) -> None:
            del pool, options

        def capture_end(self) -> None:
            self.captured = True

        def pool(self) -> tuple[int, int]:
            if not self.captured:
                raise RuntimeError("Called CUDAGraph::pool() without a preceding successful capture.")
            return (3, 0)

        def reset(self) -> str:
            return "reset"

    def says(name: str) -> Any:
        return lambda *args, **kwargs: (name, args, kwargs)

    functions = [
        "_cuda_emptyCache", "_accelerator_emptyCache", "_cuda_setMemoryFraction", "_accelerator_setAllocatorSettings",
        "_cuda_memoryStats", "_cuda_memorySnapshot", "_cuda_record_memory_history",
        "_cuda_record_memory_history_legacy",
    ]  # fmt: skip
    pools = ["_cuda_beginAllocateCurrentThreadToPool", "_cuda_endAllocateToPool", "_cuda_releasePool"]
    native = SimpleNamespace(**{name: says(name) for name in [*functions, *pools]})
    native._cudart = SimpleNamespace(cudaMemGetInfo=says("cudaMemGetInfo"))
    memory = SimpleNamespace(**{name: says(name) for name in pools})
    cuda = SimpleNamespace(memory=memory, MemPool=MemPool, CUDAGraph=CUDAGraph)
    return SimpleNamespace(_C=native, cuda=cuda, Tensor=Tensor, nn=SimpleNamespace(Parameter=Parameter))


@pytest.fixture
def torch() -> Any:
    return stand_in()


@pytest.fixture
def taken() -> Taken:
    return Taken()


def test_releases_settings_and_observations(torch, taken):
    with installed(torch, taken):
        assert torch._C._cuda_emptyCache() == ("_cuda_emptyCache", (), {})
        torch._C._accelerator_emptyCache()
        torch._C._cuda_setMemoryFraction(0.25, 1)
        torch._C._accelerator_setAllocatorSettings("max_split_size_mb:20")
        assert torch._C._cuda_memoryStats(0) == ("_cuda_memoryStats", (0,), {})
        torch._C._cudart.cudaMemGetInfo(0)
    assert taken.names == [
        "EMPTY_CACHE", "RELEASED", "EMPTY_CACHE", "RELEASED", "MEMORY_FRACTION", "SETTINGS",
        "OBSERVATION", "OBSERVATION",
    ]  # fmt: skip
    assert taken.notes[4][1] == {"device": 1, "size": 250_000_000}
    assert taken.notes[5][1] == {"text": "max_split_size_mb:20"}
    what, _, where = taken.notes[6][1]["text"].partition("\n")
    assert what == "torch.cuda.memory_stats"
    assert "test_hooks.py:" in where
    assert taken.notes[7][1]["text"].startswith("torch.cuda.mem_get_info\n")


def test_a_release_that_fails_is_over_all_the_same(torch, taken):
    def fails() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    torch._C._cuda_emptyCache = fails
    with installed(torch, taken), pytest.raises(RuntimeError, match="illegal"):
        torch._C._cuda_emptyCache()
    assert taken.names == ["EMPTY_CACHE", "RELEASED"]


def test_what_the_recorder_does_itself_is_not_noted(torch, taken):
    with installed(torch, taken), quietly():
        torch._C._cuda_memoryStats(0)
        torch._C._cuda_emptyCache()
        torch._C._cuda_record_memory_history("all")
    assert taken.notes == []
    assert taken.wanted == 0


def test_uses_by_other_streams(torch, taken):
    stream = SimpleNamespace(cuda_stream=0x55)
    with installed(torch, taken):
        assert torch.Tensor().record_stream(stream) == ("recorded", stream)
        assert torch.nn.Parameter().record_stream(s=stream) == ("recorded", stream)
    assert taken.notes == [("RECORD_STREAM", {"device": 1, "addr": 0x7000, "stream": 0x55})] * 2


def test_tensors_that_cannot_be_noted_are_used_all_the_same(torch, taken):
    class Wrapper(torch.Tensor):  # as DTensor: its memory is that of another tensor
        def untyped_storage(self) -> Memory:
            raise RuntimeError("Attempted to access the data pointer on an invalid python storage.")

    class OnHost(torch.Tensor):
        is_cuda = False

    with installed(torch, taken):
        stream = SimpleNamespace(cuda_stream=1)
        assert Wrapper().record_stream(stream) == ("recorded", stream)
        assert OnHost().record_stream(stream) == ("recorded", stream)
        assert torch.Tensor().record_stream("no stream") == ("recorded", "no stream")
    assert taken.notes == []


def test_pools_come_and_go(torch, taken):
    with installed(torch, taken):
        pool = torch.cuda.MemPool(use_on_oom=True, no_split=True)
        torch.cuda.memory._cuda_beginAllocateCurrentThreadToPool(0, pool.id)
        torch.cuda.memory._cuda_endAllocateToPool(0, pool.id)
        torch.cuda.memory._cuda_releasePool(0, pool.id)
        del pool
    assert taken.names == ["POOL_CREATE", "SCOPE_OPEN", "SCOPE_CLOSE", "POOL_RELEASE", "POOL_RELEASE"]
    assert taken.notes[0][1] == {"size": 3, "pool": (0, 7)}
    assert all(what["pool"] == (0, 7) for _, what in taken.notes)


def test_the_pool_of_a_capture_is_known_when_it_is_over(torch, taken):
    with installed(torch, taken):
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(capture_error_mode="thread_local")
        graph.capture_end()
        assert graph.reset() == "reset"
        assert graph.reset() == "reset"  # its pool was released the first time
        del graph
    assert taken.names == ["SCOPE_OPEN", "CAPTURE_BEGIN", "CAPTURE_END", "SCOPE_CLOSE", "POOL_RELEASE"]
    opened, closed = taken.notes[0][1], taken.notes[3][1]
    assert opened["addr"] == closed["addr"] > 0
    assert closed["pool"] == taken.notes[4][1]["pool"] == (3, 0)


def test_a_history_of_the_programs_own_is_announced(torch, taken):
    with installed(torch, taken):
        assert torch._C._cuda_record_memory_history("all")[0] == "_cuda_record_memory_history"
        torch._C._cuda_record_memory_history_legacy(True)
    assert taken.wanted == 2


def test_everything_is_put_back(torch, taken):
    before = [dict(vars(owner)) for owner in (torch._C, torch._C._cudart, torch.cuda.memory)]
    classes = [dict(vars(owner)) for owner in (torch.Tensor, torch.cuda.MemPool, torch.cuda.CUDAGraph)]
    with installed(torch, taken):
        assert vars(torch._C) != before[0]
    assert [dict(vars(owner)) for owner in (torch._C, torch._C._cudart, torch.cuda.memory)] == before
    assert [dict(vars(owner)) for owner in (torch.Tensor, torch.cuda.MemPool, torch.cuda.CUDAGraph)] == classes


def test_what_somebody_else_has_replaced_since_stays(torch, taken):
    with installed(torch, taken):
        theirs = torch._C._cuda_emptyCache = lambda: "theirs"
    assert torch._C._cuda_emptyCache is theirs
