"""``torch.cuda`` and ``torch.accelerator`` as the card answers them; reading memory state is an observation."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
from virtual_cards import h100  # noqa: E402

from fragscope.allocator import ReplaySettings, card_named, replay, rules_for  # noqa: E402
from fragscope.errors import UnsupportedError  # noqa: E402
from fragscope.trace import RequestKind  # noqa: E402

pytestmark = pytest.mark.torch
GIB = 2**30
DATA = Path(__file__).parents[1] / "data"


@pytest.fixture
def card():
    with h100() as device:
        yield device


def test_the_card_describes_itself(card):
    assert torch.backends.cuda.is_built()
    assert torch.cuda.is_available()
    assert torch.cuda.device_count() == 1
    assert torch.cuda.current_device() == 0
    assert torch.cuda.get_device_name() == "NVIDIA H100 80GB HBM3"
    assert torch.cuda.get_device_capability("cuda:0") == (9, 0)
    properties = torch.cuda.get_device_properties(0)
    assert (properties.total_memory, properties.multi_processor_count) == (85_017_493_504, 132)
    assert torch.cuda.is_bf16_supported()
    assert torch.accelerator.current_accelerator() == torch.device("cuda")
    with torch.cuda.device(0):
        assert torch.ones(1, device="cuda").is_cuda


def test_statistics_equal_the_model(card):
    a = torch.empty(3 << 20, dtype=torch.uint8, device="cuda")  # from a 20 MiB segment
    b = torch.empty(600, dtype=torch.uint8, device="cuda")  # 1024 bytes from a 2 MiB segment
    del a
    assert torch.cuda.memory_allocated() == 1024
    assert torch.cuda.max_memory_allocated() == (3 << 20) + 1024
    assert torch.cuda.memory_reserved() == torch.cuda.max_memory_reserved() == 22 << 20
    stats = torch.cuda.memory_stats()
    of_all = {k: v for k, v in stats.items() if k.endswith(("all.current", "all.peak")) and "inactive" not in k}
    assert of_all == {
        "allocated_bytes.all.current": 1024,
        "allocated_bytes.all.peak": (3 << 20) + 1024,
        "active_bytes.all.current": 1024,
        "active_bytes.all.peak": (3 << 20) + 1024,
        "reserved_bytes.all.current": 22 << 20,
        "reserved_bytes.all.peak": 22 << 20,
        "requested_bytes.all.current": 600,
        "requested_bytes.all.peak": (3 << 20) + 600,
        "segment.all.current": 2,
        "segment.all.peak": 2,
        "allocation.all.current": 1,
        "allocation.all.peak": 2,
        "active.all.current": 1,
        "active.all.peak": 2,
    }
    assert (stats["allocated_bytes.large_pool.freed"], stats["allocation.small_pool.current"]) == (3 << 20, 1)
    assert (stats["num_ooms"], stats["num_alloc_retries"]) == (0, 0)
    torch.cuda.reset_peak_memory_stats()
    assert torch.cuda.max_memory_allocated() == 1024
    assert torch.cuda.memory_stats()["active_bytes.all.peak"] == 1024
    torch.cuda.empty_cache()
    assert torch.cuda.mem_get_info() == (card.memory.settings.capacity - (2 << 20), 85_017_493_504)
    del b


def test_a_statistic_that_is_not_kept_is_refused_not_zero(card):
    stats = torch.cuda.memory_stats()
    with pytest.raises(UnsupportedError, match=r"reserved_bytes_by_private_pools\.0_1\.current"):
        stats["reserved_bytes_by_private_pools.0_1.current"]
    with pytest.raises(UnsupportedError, match=r"test_virtual_cuda_api\.py"):
        stats.get("reserved_bytes_by_private_pools.0_1.current", 0)
    assert stats.get("of_another_library", 7) == 7


def test_the_accelerator_answers_the_same(card):
    held = torch.empty(1 << 20, device="cuda")
    assert torch.accelerator.is_available()
    assert torch.accelerator.device_count() == 1
    torch.accelerator.synchronize()
    if hasattr(torch.accelerator, "memory_allocated"):
        assert torch.accelerator.memory_allocated() == held.nbytes
        assert torch.accelerator.max_memory_allocated() == torch.cuda.max_memory_allocated()
        assert torch.accelerator.memory_stats() == torch.cuda.memory_stats()


def test_reading_memory_state_is_an_observation(card):
    torch.cuda.mem_get_info()
    torch.cuda.memory_allocated()
    torch.cuda.memory_stats()
    _ = torch.cuda.get_device_properties(0).total_memory
    line = test_reading_memory_state_is_an_observation.__code__.co_firstlineno
    assert [(o.what, o.where) for o in card.memory.observations] == [
        ("torch.cuda.mem_get_info", f"{__file__}:{line + 1}"),
        ("torch.cuda.memory_allocated", f"{__file__}:{line + 2}"),
        ("torch.cuda.memory_stats", f"{__file__}:{line + 3}"),
        ("torch.cuda.get_device_properties().total_memory", f"{__file__}:{line + 4}"),
    ]


# --- out of memory ------------------------------------------------------------------------------------------------


def test_out_of_memory_is_worded_as_by_torch_and_can_be_caught(card):
    held = [torch.empty(10 * GIB, dtype=torch.uint8, device="cuda") for _ in range(7)]
    with pytest.raises(torch.OutOfMemoryError) as caught:
        torch.empty(10 * GIB, dtype=torch.uint8, device="cuda")
    # 84,465,090,560 bytes were free; 70 GiB of them are taken
    assert str(caught.value).startswith(
        "CUDA out of memory. Tried to allocate 10.00 GiB. GPU 0 has a total capacity of 79.18 GiB of which 8.66 GiB is "
        "free. Of the allocated memory 70.00 GiB is allocated by PyTorch, and 0 bytes is reserved by PyTorch but "
        "unallocated."
    )
    assert isinstance(caught.value, torch.cuda.OutOfMemoryError)
    assert torch.cuda.memory_stats()["num_ooms"] == 1
    assert card.memory.observations[0].what == "OutOfMemoryError"
    del held
    assert torch.empty(60 * GIB, dtype=torch.uint8, device="cuda").is_cuda


def test_an_operator_that_does_not_fit_leaves_nothing_behind(card):
    x = torch.empty(20 * GIB, dtype=torch.bfloat16, device="cuda")
    with pytest.raises(torch.OutOfMemoryError):
        x + 1
    with pytest.raises(torch.OutOfMemoryError):
        x.float()
    assert torch.cuda.memory_allocated() == 40 * GIB


def test_a_memory_fraction_is_a_limit(card):
    torch.cuda.set_per_process_memory_fraction(0.1)
    assert torch.cuda.get_per_process_memory_fraction() == 0.1
    with pytest.raises(torch.OutOfMemoryError, match=r"7\.92 GiB allowed"):  # a tenth of 79.18 GiB
        torch.empty(8 * GIB, dtype=torch.uint8, device="cuda")


# --- streams ------------------------------------------------------------------------------------------------------


def block() -> torch.Tensor:
    return torch.empty(4 << 20, dtype=torch.uint8, device="cuda")


def test_a_block_is_never_reused_on_another_stream(card):
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        x = block()
        address = x.data_ptr()
        del x
    y = block()
    assert y.data_ptr() != address
    with side:
        assert torch.cuda.current_stream() == side
        z = block()
    assert z.data_ptr() == address


@pytest.mark.parametrize(
    "wait", [lambda s, e: s.synchronize(), lambda s, e: torch.cuda.synchronize(), lambda s, e: e.synchronize()]
)
def test_a_block_in_use_elsewhere_comes_back_at_the_next_synchronisation(card, wait):
    side = torch.cuda.Stream()
    x = block()
    address = x.data_ptr()
    x.record_stream(side)
    del x
    event = side.record_event()
    y = block()
    assert y.data_ptr() != address
    wait(side, event)
    z = block()
    assert z.data_ptr() == address
    kinds = card.memory.requests.finish().kind
    assert [RequestKind(k).name for k in kinds] == ["ALLOC", "RECORD_STREAM", "FREE", "ALLOC", "USES_DONE", "ALLOC"]


def test_an_event_from_before_the_free_says_nothing_about_it(card):
    side = torch.cuda.Stream()
    x = block()
    address = x.data_ptr()
    x.record_stream(side)
    event = side.record_event()
    del x
    event.synchronize()
    assert block().data_ptr() != address


def test_other_ways_to_streams_and_events(card):
    assert torch.Stream(device="cuda").device == torch.device("cuda", 0)
    assert torch.cuda.ExternalStream(0x1234).cuda_stream == 0x1234
    side, event = torch.cuda.Stream(priority=-1), torch.cuda.Event(enable_timing=True)
    event.record()
    side.wait_event(event)
    side.wait_stream(torch.cuda.current_stream())
    assert not event.query()
    with torch.cuda.StreamContext(side):
        assert torch.cuda.current_stream() == side
    with pytest.raises(UnsupportedError, match="has no time"):
        event.elapsed_time(event)
    torch.cuda.nvtx.range_push("loading")
    torch.cuda.nvtx.range_pop()


def test_generators_of_the_card(card):
    generator = torch.Generator(device="cuda")
    generator.manual_seed(1)
    assert isinstance(generator, torch.Generator)
    assert generator.device == torch.device("cuda", 0)
    assert torch.randn(3, device="cuda", generator=generator).is_cuda
    assert torch.ones(3, device="cuda").normal_(generator=generator).is_cuda


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize(
    "use",
    [
        *(lambda n=n: getattr(torch.cuda, n)() for n in ("host_memory_stats", "utilization", "power_draw")),
        lambda: torch.compile(lambda x: x)(1), lambda: torch.compile(torch.nn.Linear(2, 2)),
        lambda: torch.compile(mode="max-autotune")(lambda x: x)(1), lambda: torch.cuda.memory._dump_snapshot("x"),
        lambda: torch.cuda.memory.CUDAPluggableAllocator("a.so", "b", "c"),
        lambda: torch.cuda.MemPool(allocator=object()), lambda: torch.cuda.jiterator._create_jit_fn("T f() {}"),
        lambda: torch.cuda.cudart().cudaHostRegister(0, 0, 0), lambda: torch.cuda.nccl.all_reduce([]),
        lambda: torch.cuda.Event().ipc_handle(), lambda: torch.cuda.get_device_properties().pci_bus_id,
        lambda: torch.jit.script(torch.nn.Linear(2, 2)).cuda(),
        lambda: torch.nested.nested_tensor([torch.ones(2, device="cuda")]),
        lambda: torch.nested.as_nested_tensor([torch.ones(2)], device="cuda", layout=torch.jagged),
        lambda: torch.cuda.memory._set_allocator_settings("graph_capture_record_stream_reuse:True"),
        lambda: torch.nn.parallel.comm.broadcast(torch.ones(1, device="cuda"), [0]),
    ],
)  # fmt: skip
def test_what_is_not_modelled_is_refused_with_its_place(card, use):
    with pytest.raises(UnsupportedError, match=r"\(at .*test_virtual_cuda_api\.py:"):
        use()


def test_every_public_name_of_torch_cuda_is_answered_or_refused(card):
    """A function that is neither would ask a library that this build of torch may not have."""
    from fragscope.record.virtual.cuda_api import REFUSED, _Cuda
    from fragscope.record.virtual.memory_api import Memory
    from fragscope.record.virtual.pools_api import Pools
    from fragscope.record.virtual.streams_api import Streams

    known = {*REFUSED, *(n for owner in (_Cuda, Memory, Pools, Streams) for n in owner.NAMES)}
    made_of_others = {
        "CudaError", "DeferredCudaCallError", "amp", "cudaStatus", "default_generators", "device", "device_of",
        "get_gencode_flags", "graph", "graph_annotations", "graphs", "has_half", "has_magma", "jiterator",
        "make_graphed_callables", "max_memory_cached", "memory", "memory_cached", "nccl", "nvtx", "profiler", "random",
        "reset_max_memory_allocated", "reset_max_memory_cached", "sparse", "streams", "tunable",
    }  # fmt: skip
    storages = {n for n in torch.cuda.__all__ if n.endswith(("Storage", "Tensor"))}
    assert set(torch.cuda.__all__) - known - made_of_others - storages == set()


def test_events_say_yes_once_the_host_has_waited_or_asked_before(card):
    event = torch.cuda.Event()
    assert event.query()  # nothing was recorded
    held = torch.ones(3, device="cuda")
    event.record()
    torch.cuda.synchronize()
    assert event.query()
    assert torch.cuda.current_stream().query()
    assert card.estimated == {}
    event.record()
    assert not event.query()
    assert event.query()  # a loop that waits for it ends
    assert list(card.estimated) == ["Event.query"]
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        held = held + 1
    assert [side.query(), side.query()] == [False, True]


def test_statistics_have_the_keys_of_the_release(card):
    """Those of a recording with torch 2.11; what later releases added is in PyTorch's documentation of it."""
    recorded = json.loads((DATA / "traces" / "train_vit-default.json").read_text())["memory_stats"]
    assert sorted(torch.cuda.memory_stats()) == sorted(recorded)
    assert torch.cuda.memory_stats()["max_split_size"] == recorded["max_split_size"]
    nested = torch.cuda.memory_stats_as_nested_dict()
    assert nested["allocated_bytes"]["all"]["current"] == 0
    assert nested["oversize_segments"]["peak"] == 0


def test_a_program_changes_the_allocators_settings(card):
    """By the allocator's description: with expandable segments a large block is mapped in pages of 20 MiB."""
    first = torch.empty(12 << 20, dtype=torch.uint8, device="cuda")
    assert torch.cuda.memory_reserved() == 12 << 20
    torch.cuda.memory._set_allocator_settings("expandable_segments:True")
    second = torch.empty(12 << 20, dtype=torch.uint8, device="cuda")
    assert torch.cuda.memory_reserved() == (12 + 20) << 20
    with pytest.raises(RuntimeError, match="no_such_key"):
        torch.cuda.memory._set_allocator_settings("no_such_key:1")
    trace = card.trace()
    assert trace.confs == ("expandable_segments:True",)
    profile = card_named("h100-80gb")
    settings = ReplaySettings(rules_for("2.11.0"), profile.name, profile.total, profile.free)
    assert replay(trace, settings, verify=True).verify.mismatches == 0
    del first, second


def test_every_name_of_torch_accelerator_is_answered(card):
    answers = {
        name: getattr(torch.accelerator, name)
        for name in torch.accelerator.__all__
        if name not in ("device_index", "Graph", "get_device_capability")
    }
    for name, answer in answers.items():
        if name.startswith("set_"):
            answer(torch.cuda.current_stream() if name == "set_stream" else 0)
        else:
            answer()
    with torch.accelerator.device_index(0):
        assert torch.accelerator.current_device_index() == 0


def test_accumulated_statistics_start_over(card):
    kept = torch.ones(3, device="cuda")
    torch.ones(3, device="cuda")
    torch.cuda.reset_accumulated_memory_stats()
    other = torch.ones(200, device="cuda")
    stats = torch.cuda.memory_stats()
    assert (stats["allocated_bytes.all.allocated"], stats["allocated_bytes.all.freed"]) == (1024, 0)
    assert stats["allocated_bytes.all.current"] == 512 + 1024
    del kept, other


def test_a_summary_and_a_snapshot(card):
    kept = torch.ones(300, device="cuda")
    assert "PyTorch CUDA memory summary" in torch.cuda.memory_summary()
    (segment,) = torch.cuda.memory_snapshot()
    assert (segment["total_size"], segment["allocated_size"], segment["requested_size"]) == (2 << 20, 1536, 1200)
    assert (segment["segment_type"], segment["segment_pool_id"], segment["is_expandable"]) == ("small", (0, 0), False)
    states = [(b["address"] - segment["address"], b["size"], b["state"]) for b in segment["blocks"]]
    assert states == [(0, 1536, "active_allocated"), (1536, (2 << 20) - 1536, "inactive")]
    assert kept.data_ptr() == segment["address"]


@pytest.mark.filterwarnings("ignore:Attempted to get default timeout for nccl")
def test_a_group_of_nccl_is_refused(card):
    store = torch.distributed.HashStore()
    with pytest.raises(UnsupportedError, match="run_ranks"):
        torch.distributed.init_process_group("nccl", store=store, rank=0, world_size=1)
    assert not torch.distributed.is_initialized()


def test_an_operator_without_a_fake_kernel_is_refused(card):
    @torch.library.custom_op("fragscope_tests::bare", mutates_args=(), device_types="cuda")
    def bare(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    with pytest.raises(UnsupportedError, match="register_fake"):
        bare(torch.ones(3, device="cuda"))


def test_what_was_compiled_before_is_refused_when_it_is_called():
    added = torch.compile(lambda x: x + 1, backend="eager")  # the default one takes long to import
    layer = torch.compile(torch.nn.Linear(2, 2), backend="eager")
    disabled = torch.compile(lambda x: x + 1, disable=True)
    with h100():
        x = torch.ones(2, 2, device="cuda")
        for compiled in (added, layer.cuda()):
            with pytest.raises(UnsupportedError, match=r"TORCH_COMPILE_DISABLE=1 .*test_virtual_cuda_api\.py"):
                compiled(x)
        assert disabled(x).is_cuda
        assert torch.compile(lambda x: x + 1, disable=True)(x).is_cuda
        with torch._dynamo.config.patch(disable=True):  # which TORCH_COMPILE_DISABLE=1 sets
            assert torch.compile(lambda x: x + 1, backend="eager")(x).is_cuda
            assert added(x).is_cuda

        @torch.compiler.disable
        def plain(x):
            return x + 1

        assert plain(x).is_cuda


def test_kernels_of_triton_are_refused(tmp_path, monkeypatch):
    """A stand-in for the package, whose kernels are launched by ``JITFunction.run``."""
    runtime = tmp_path / "triton" / "runtime"
    runtime.mkdir(parents=True)
    for folder in (tmp_path / "triton", runtime):
        (folder / "__init__.py").write_text("")
    (runtime / "jit.py").write_text(
        "class JITFunction:\n"
        "    def __init__(self, fn):\n"
        "        self.fn = fn\n"
        "    def __getitem__(self, grid):\n"
        "        return lambda *args: self.run(*args, grid=grid)\n"
        "    def run(self, *args, grid):\n"
        "        return 'launched'\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("triton", "triton.runtime", "triton.runtime.jit"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with h100():
        from triton.runtime.jit import JITFunction

        def add_kernel(): ...

        with pytest.raises(UnsupportedError, match=r"add_kernel .*case\.kernel.*test_virtual_cuda_api\.py"):
            JITFunction(add_kernel)[(1,)](torch.ones(3, device="cuda"))
    assert JITFunction(add_kernel)[(1,)]() == "launched"
    for name in ("triton", "triton.runtime", "triton.runtime.jit"):
        del sys.modules[name]


@pytest.mark.parametrize("module", ["green_contexts", "gds", "tunable", "jiterator", "nccl"])
def test_a_module_that_an_older_torch_lacks_is_left_out(monkeypatch, module):
    monkeypatch.delattr(torch.cuda, module, raising=False)
    with h100():
        assert torch.zeros(1, device="cuda").is_cuda


def test_libraries_of_a_build_for_cuda_are_there():
    """As torch 2.11.0+cu130 answers on an H100."""
    before, cudnn = torch.default_generator, torch.backends.cudnn
    own = cudnn.is_available()
    with h100():
        x = torch.ones(1).cuda()
        assert (cudnn.is_available(), cudnn.enabled, cudnn.benchmark, cudnn.deterministic) == (True, True, False, False)
        assert (cudnn.allow_tf32, cudnn.version(), cudnn.is_acceptable(x)) == (True, 91900, True)
        assert not cudnn.is_acceptable(torch.ones(1))
        assert torch.backends.cuda.is_flash_attention_available()
        assert torch.distributed.is_nccl_available()
        assert torch.cuda.nccl.version() == (2, 28, 9)
        assert torch.backends.cusparselt.is_available()
        assert torch.cuda.is_bf16_supported()
        assert torch.cuda.is_bf16_supported(False)
        assert type(torch.cuda.initial_seed()) is int
        torch.cuda.manual_seed(7)
        assert torch.cuda.initial_seed() == 7
        assert torch.cuda.get_sync_debug_mode() == 0
        torch.cuda.set_sync_debug_mode("warn")
        assert torch.cuda.get_sync_debug_mode() == 1
        (generator,) = torch.cuda.default_generators
        assert isinstance(generator, torch.Generator)
        assert isinstance(before, torch.Generator)
        assert not isinstance(3, torch.Generator)
    assert cudnn.is_available() is own
    assert (cudnn.version() is None) is not own


def test_versions_that_nobody_has_read_are_not_made_up():
    with h100(torch="2.10.0"):
        assert torch.backends.cudnn.version() == 91002, "nvidia-cudnn-cu12==9.10.2.21"
        assert torch.cuda.nccl.version() == (2, 27, 5), "nvidia-nccl-cu12==2.27.5"
    with h100(torch="2.99.0"):
        for version in (torch.backends.cudnn.version, torch.cuda.nccl.version):
            with pytest.raises(UnsupportedError, match=r"is not known for torch 2\.99"):
                version()


def test_a_snapshot_looks_at_what_is_held_once(card, monkeypatch):
    held = [torch.ones(2**22, device="cuda") for _ in range(8)]
    asked = []
    whole = card.memory.requested_by_address
    monkeypatch.setattr(card.memory, "requested_by_address", lambda: (asked.append(None), whole())[1])
    assert len(torch.cuda.memory_snapshot()) == len(held) > 1
    assert len(asked) == 1
