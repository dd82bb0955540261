"""Unmodified CUDA code on a card that does not exist: identity, lifetimes, modules, training, errors, threads."""

from __future__ import annotations

import copy
import functools
import gc
import io
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402
from virtual_cards import h100, live  # noqa: E402

from fragscope.errors import UsageError  # noqa: E402
from fragscope.record.virtual.functions import _without_question  # noqa: E402
from fragscope.trace import RequestKind  # noqa: E402

pytestmark = pytest.mark.torch
CUDA = torch.device("cuda", 0)
MADE_BEFORE = torch.ones(1000)


@pytest.fixture(autouse=True, scope="module")
def without_collection():
    """As inside ``case.measure()``: nothing may depend on a garbage collection.

    The first optimizer of a process makes torch import itself further, which leaves garbage behind on any device.
    """
    torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1).step()
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def card():
    with h100() as device:
        yield device
        assert live(device) == 0, "something outlived its last reference"


def allocated() -> int:
    return torch.cuda.memory_allocated()


# --- size and order -----------------------------------------------------------------------------------------------


def test_sixty_gibibytes_fit_into_a_process_with_little_memory():
    code = """
import resource
import torch
from virtual_cards import h100
resource.setrlimit(resource.RLIMIT_DATA, (2 << 30, 2 << 30))
with h100() as device:
    x = torch.empty(60 << 30, dtype=torch.uint8, device="cuda")
    y = x[: 1 << 30].clone()
    x.add_(1)
    assert torch.cuda.memory_allocated() == 61 << 30
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=__file__.rpartition("/")[0])


def test_requests_come_in_program_order():
    with h100() as device:
        a = torch.empty(1000, dtype=torch.uint8, device="cuda")
        b = a + 1
        del a
        c = torch.cat([b, b])
        del b, c
    rows = device.memory.requests.finish()
    assert [(RequestKind(k).name, int(i), int(s)) for k, i, s in zip(rows.kind, rows.id, rows.size, strict=True)] == [
        ("ALLOC", 0, 1000),
        ("ALLOC", 1, 1000),
        ("FREE", 0, 0),
        ("ALLOC", 2, 2000),
        ("FREE", 1, 0),
        ("FREE", 2, 0),
    ]


# --- identity -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cuda", "cuda:0", torch.device("cuda"), CUDA, 0], ids=repr)
def test_every_spelling_of_the_device(card, device):
    made = torch.empty(3, device=device)
    moved = torch.ones(3).to(device)
    for tensor in (made, moved, torch.ones(3).to(device=device, dtype=torch.half), torch.ones(3).cuda(device)):
        assert tensor.is_cuda
        assert not tensor.is_cpu
        assert not tensor.is_meta
        assert tensor.device == CUDA
        assert tensor.get_device() == 0
    assert made.to(device) is made
    assert made.cuda() is made
    assert made.to(device, copy=True) is not made
    back = made.cpu()
    assert (back.device, back.is_cuda, back.get_device()) == (torch.device("cpu"), False, -1)


def test_moving_to_another_tensor(card):
    here = torch.ones(3, dtype=torch.half, device="cuda")
    moved = torch.ones(3).to(here)
    assert (moved.device, moved.dtype) == (CUDA, torch.half)
    assert not here.to(torch.ones(1)).is_cuda


def test_views_share_the_address_of_their_base(card):
    x = torch.empty(10, 4, device="cuda")
    assert x[3].data_ptr() == x.data_ptr() + 3 * 4 * 4
    storage = x[3].untyped_storage()
    assert (storage.data_ptr(), storage.nbytes(), storage.device) == (x.data_ptr(), 160, CUDA)


def test_a_device_context(card):
    with torch.device("cuda"):
        assert torch.empty(3).is_cuda
        assert torch.tensor([]).is_cuda
        assert nn.Linear(3, 4).weight.is_cuda
        assert not torch.zeros(2, device="cpu").is_cuda
    with torch.device("meta"):
        assert torch.ones(2).is_meta
    assert not torch.empty(3).is_cuda


def test_the_default_device(card):
    torch.set_default_device("cuda")
    try:
        assert torch.empty(3).is_cuda
        assert torch.get_default_device() == CUDA
    finally:
        torch.set_default_device(None)
    assert not torch.empty(3).is_cuda


def test_meta_tensors_that_the_program_asks_for_take_no_memory(card):
    x = torch.empty(3, device="cuda")
    before = allocated()
    kept = [
        torch.empty_like(x, device="meta"),
        x.to("meta"),
        torch.tensor([1.0], device="meta"),
        nn.Linear(2, 2, device="meta").weight,
    ]
    assert all(t.is_meta for t in kept)
    assert allocated() == before


@pytest.mark.parametrize(
    "make",
    [
        torch.empty_like, torch.zeros_like, torch.rand_like, lambda x: torch.full_like(x, 2), lambda x: x.new_empty(3),
        lambda x: x.new_zeros(3), lambda x: x.new_full((3,), 1.0), lambda x: x.new_tensor([1.0]), lambda x: x.new(5),
    ],
)  # fmt: skip
def test_tensors_made_like_others(card, make):
    assert make(torch.empty(3, 4, device="cuda")).is_cuda
    assert not make(torch.empty(3, 4)).is_cuda


@pytest.mark.parametrize(
    "use",
    [
        lambda: torch.ones(1, device="cuda:1"), lambda: torch.ones(1, device=1), lambda: torch.ones(1).to("cuda:1"),
        lambda: torch.ones(1).cuda(1), lambda: torch.tensor([1], device="cuda:1"), lambda: torch.cuda.set_device(1),
        lambda: torch.cuda.mem_get_info(1), lambda: torch.cuda.memory_allocated(1), lambda: torch.cuda.Stream(1),
        lambda: nn.Linear(1, 1).cuda(1), lambda: torch.cuda.synchronize("cuda:3"),
    ],
)  # fmt: skip
def test_there_is_one_card(card, use):
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        use()


# --- lifetimes ----------------------------------------------------------------------------------------------------


def test_memory_lives_as_long_as_the_last_view(card):
    x = torch.empty(1 << 20, device="cuda")
    view = x[10:].view(-1)[5:].unsqueeze(0).t()
    del x
    assert allocated() == 4 << 20
    del view
    assert allocated() == 0


def test_tensors_kept_by_other_objects(card):
    x = torch.empty(100, device="cuda")
    kept = {"closure": functools.partial(torch.sum, x)}
    try:
        raise ValueError(x)
    except ValueError as e:
        kept["error"] = e
    dead = []
    weakref.finalize(x, dead.append, True)
    del x, kept["closure"]
    assert allocated() == 512
    kept["error"].__traceback__ = None
    del kept["error"]
    assert dead == [True]
    assert allocated() == 0


def test_garbage_in_a_cycle_stays_until_it_is_collected(card):
    cycle = [torch.empty(100, device="cuda")]
    cycle.append(cycle)
    del cycle
    assert allocated() == 512
    gc.collect()
    assert allocated() == 0


def test_a_collection_that_strikes_inside_the_books_waits_for_its_turn():
    with h100() as device:
        x = torch.empty(100, device="cuda")
        entry = device.storages.find(x)
        with device.memory._lock:  # as while the allocator works
            device.memory.free(entry.id)
            assert device.memory.live == 1
        assert device.memory.live == 0
        entry.id = None


def test_in_place_work_takes_nothing(card):
    x = torch.zeros(1000, device="cuda")
    before = torch.cuda.max_memory_allocated()
    x.add_(1)
    x[3] = 5
    x[5:7] = torch.ones(2)
    x += 1
    x.copy_(torch.ones(1000))
    assert torch.cuda.max_memory_allocated() == before


def test_an_out_tensor_grows(card):
    a = torch.ones(100, device="cuda")
    out = torch.empty(0, device="cuda")
    torch.add(a, a, out=out)
    assert out.shape == (100,)
    assert allocated() == 1024
    with pytest.warns(UserWarning, match="was resized"):
        torch.mul(a, a, out=torch.empty(3, device="cuda"))


def test_a_resized_storage_gives_its_memory_back(card):
    x = torch.empty(1 << 20, device="cuda")
    x.untyped_storage().resize_(0)
    assert allocated() == 0
    x.untyped_storage().resize_(4 << 20)
    assert allocated() == 4 << 20


def test_deepcopy_copies_whole_storages_and_keeps_aliases(card):
    x = torch.ones(1000, device="cuda")
    before = allocated()
    copied = copy.deepcopy([x, x, x[10:]])
    assert copied[0] is copied[1]
    assert copied[2].data_ptr() == copied[0].data_ptr() + 40
    assert allocated() == 2 * before
    alias = copy.copy(x)
    assert alias.data_ptr() == x.data_ptr()


@pytest.mark.parametrize(
    "wrong",
    [
        lambda a, b: a @ b, lambda a, b: torch.cat([a, b]), lambda a, b: torch.stack([a, b]), lambda a, b: a.copy_(b),
        functional.linear, torch.bmm, lambda a, b: a.add_(b), lambda a, b: a.view(5),
    ],
)  # fmt: skip
def test_wrong_shapes_raise_and_leave_nothing_behind(card, wrong):
    a, b = torch.ones(3, 4, device="cuda"), torch.ones(5, 6, device="cuda")
    before = card.memory.live
    with pytest.raises(RuntimeError):
        wrong(a, b)
    assert card.memory.live == before


def test_shapes_that_do_not_broadcast_are_worded_as_by_the_kernels(card):
    with pytest.raises(
        RuntimeError, match=r"size of tensor a \(4\) must match the size of tensor b \(6\) at .* dimension 1"
    ):
        torch.ones(3, 4, device="cuda") + torch.ones(5, 6, device="cuda")


# --- host and card ------------------------------------------------------------------------------------------------


def test_the_host_stays_real(card):
    values = torch.randn(100)
    order = values.argsort()
    assert values[order].tolist() == sorted(values.tolist())
    assert MADE_BEFORE.sum().item() == 1000
    assert MADE_BEFORE.cuda().is_cuda
    assert torch.ones(3, pin_memory=True).sum().item() == 3
    assert allocated() == 0


def test_a_copy_on_the_host_can_go_back(card):
    host = torch.ones(4, 4, device="cuda").cpu()
    mixed = torch.cat([host + 1, torch.ones(4, 4)])
    assert mixed.device == torch.device("cpu")
    assert allocated() == 0
    assert mixed.cuda().is_cuda


@pytest.mark.parametrize(
    "mix",
    [
        lambda c, h: c + h, lambda c, h: h + c, lambda c, h: torch.cat([c, h]), lambda c, h: c.add_(h),
        lambda c, h: torch.where(c > 0, c, h), lambda c, h: torch.add(c, c, out=h), lambda c, h: nn.Linear(3, 3)(c),
        lambda c, h: torch.index_select(c, 0, torch.tensor([1])), lambda c, h: c.gather(0, torch.tensor([1])),
    ],
)  # fmt: skip
def test_host_and_card_do_not_mix(card, mix):
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        mix(torch.ones(3, device="cuda"), torch.ones(3))


def test_host_scalars_mix(card):
    assert (torch.tensor(2.0) * torch.ones(3, device="cuda")).is_cuda


@pytest.mark.parametrize(
    "where",
    ["cuda", "cuda:0", CUDA, {"cpu": "cuda:0"}, lambda storage, _: storage.cuda()],
    ids=["cuda", "cuda:0", "device", "mapping", "function"],
)
def test_torch_load_onto_the_card(card, where):
    file = io.BytesIO()
    torch.save({"whole": torch.ones(1000), "part": torch.ones(1000)[1:]}, file)
    file.seek(0)
    loaded = torch.load(file, map_location=where)
    assert all(t.is_cuda for t in loaded.values())
    assert allocated() == 2 * 4096


def test_a_buffer_from_a_file_goes_to_the_card(card):
    view = torch.frombuffer(bytearray(64), dtype=torch.float32).view(4, 4)
    target = torch.empty(4, 4, device="cuda")
    target.copy_(view)
    assert view.to("cuda").is_cuda


# --- modules and training -----------------------------------------------------------------------------------------


def test_parameters_move_in_place(card):
    class Tagged(nn.Parameter):
        """As loaders define them, with attributes that say how to load."""

    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5))
    model[0].bias.requires_grad_(False)
    model[0].weight = Tagged(model[0].weight.data)
    model[0].weight.loader = "rows"
    seen = []
    model[0].weight.register_hook(lambda g: seen.append(g.device))
    before = list(model.parameters())
    optimizer = torch.optim.SGD(before, lr=0.1, momentum=0.9)
    model.cuda()
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))
    assert [p.requires_grad for p in before] == [True, False, True, True]
    assert (type(model[0].weight), model[0].weight.loader) == (Tagged, "rows")
    assert all(t.is_cuda for t in (*model.parameters(), *model.buffers()))
    model(torch.ones(3, 4, device="cuda")).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    assert seen == [CUDA]
    assert model.half()[0].weight.dtype == torch.half
    model.cpu()
    assert not model[0].weight.is_cuda


def test_gradients_move_with_their_parameters(card):
    layer = nn.Linear(4, 5)
    layer(torch.ones(2, 4)).sum().backward()
    layer.cuda()
    assert layer.weight.grad.is_cuda
    layer.cpu()
    assert not layer.weight.grad.is_cuda


def test_tied_weights_take_memory_once(card):
    a, b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    b.weight = a.weight
    nn.ModuleList([a, b]).cuda()
    assert a.weight is b.weight
    assert allocated() == 512


def test_state_dicts(card):
    source, target = nn.Linear(4, 5), nn.Linear(4, 5, device="cuda")
    target.load_state_dict(source.state_dict())
    other = nn.Linear(4, 5, device="meta")
    other.load_state_dict(target.state_dict(), assign=True)
    assert other.weight.data_ptr() == target.weight.data_ptr()
    assert nn.Linear(4, 5, device="meta").to_empty(device="cuda").weight.is_cuda
    assert copy.deepcopy(target).weight.data_ptr() != target.weight.data_ptr()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.SGD, {}), (torch.optim.SGD, {"momentum": 0.9}), (torch.optim.SGD, {"fused": True}),
        (torch.optim.AdamW, {}), (torch.optim.AdamW, {"foreach": False}), (torch.optim.AdamW, {"fused": True}),
        (torch.optim.AdamW, {"capturable": True}),
    ],
)  # fmt: skip
def test_training_holds_the_same_memory_after_every_step(card, kind, options):
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Dropout(0.1), nn.Linear(16, 4)).cuda()
    optimizer = kind(model.parameters(), lr=0.1, **options)
    inputs, labels = torch.ones(5, 8, device="cuda"), torch.zeros(5, dtype=torch.long, device="cuda")
    held = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(inputs), labels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        del loss
        held.append(allocated())
    assert held[1] == held[2] == held[3]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(card, reentrant):
    layer = nn.Linear(8, 8).cuda()
    x = torch.ones(5, 8, device="cuda", requires_grad=True)
    torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=reentrant).sum().backward()
    assert x.grad.is_cuda


def test_code_that_autograd_calls_sees_the_card(card):
    seen = []

    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            seen.extend([ctx.saved_tensors[0].device, grad.device])
            return grad * 2

    x = torch.ones(3, device="cuda", requires_grad=True)
    x.register_hook(lambda g: seen.append(g.device))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (seen.append(t.device), t)[1], lambda t: t):
        y = (x * x).sum()
    y.backward(retain_graph=True)
    y.backward()
    Doubled.apply(x).sum().backward()
    assert seen
    assert set(seen) == {CUDA}


def run_layers():
    q = torch.randn(2, 4, 16, 8, device="cuda", requires_grad=True)
    functional.scaled_dot_product_attention(q, q, q, is_causal=True).sum().backward()
    nn.Conv2d(4, 8, 3, padding=1).cuda()(q).sum().backward()
    for layer in (nn.LayerNorm(8), nn.GroupNorm(2, 4), nn.BatchNorm2d(4), nn.RMSNorm(8)):
        layer.cuda()(q).sum().backward()
    nn.Embedding(10, 4).cuda()(torch.tensor([1, 2], device="cuda")).sum().backward()
    functional.interpolate(q, scale_factor=2)
    for mode in ("reflect", "replicate", "circular"):
        functional.pad(q, (1, 1, 1, 1), mode=mode)
    torch.einsum("bhld,bhmd->bhlm", q, q)
    nn.MultiheadAttention(8, 2).cuda()(*[torch.ones(3, 2, 8, device="cuda")] * 3)


def test_layers_leave_nothing_behind(card):
    run_layers()
    assert live(card) == 0


def test_several_results_of_one_operator(card):
    x = torch.ones(10, 10, device="cuda")
    values, indices = x.max(1)
    assert values.is_cuda
    assert indices.is_cuda
    assert x.max(1).values.is_cuda
    assert all(t.is_cuda for t in x.sort())


# --- footprints that torch itself decides by device ---------------------------------------------------------------


def sizes_asked(device, code) -> list[int]:
    before = len(device.memory.requests)
    code()
    rows = device.memory.requests.finish()
    return [int(s) for s, k in zip(rows.size[before:], rows.kind[before:], strict=True) if k == RequestKind.ALLOC]


def test_one_hot_scatters_into_zeros(card):
    labels = torch.zeros(1000, dtype=torch.long, device="cuda")
    assert sizes_asked(card, lambda: functional.one_hot(labels, 16)) == [1000 * 16 * 8]
    assert card.estimated == {}


def test_softmax_from_half_to_float_is_one_kernel(card):
    x = torch.ones(100, 1000, dtype=torch.half, device="cuda")
    assert sizes_asked(card, lambda: x.softmax(-1, dtype=torch.float32)) == [400_000]
    assert sizes_asked(card, lambda: functional.softmax(x, dim=-1, dtype=torch.float32)) == [400_000]
    assert sizes_asked(card, lambda: x.bfloat16().softmax(-1, dtype=torch.float32)) == [200_000, 400_000, 400_000]


def test_dropout_inside_attention_is_one_kernel(card):
    layer = nn.MultiheadAttention(8, 2, dropout=0.5).cuda()
    names = []
    take, card.register = card.register, lambda t: (names.append(t.dtype), take(t))[1]
    layer(*[torch.ones(3, 2, 8, device="cuda")] * 3, need_weights=True)
    assert torch.bool in names  # the mask of native_dropout
    del card.register


@pytest.mark.parametrize(
    ("code", "operator"),
    [
        (lambda x: nn.LSTM(32, 8).cuda()(x)[0], "lstm"),
        (lambda x: nn.GRU(32, 8).cuda()(x)[0], "gru"),
        (lambda x: nn.LSTMCell(32, 8).cuda()(x[0]), "lstm_cell"),
        (lambda x: x.mode(-1), "aten::mode"),
        (lambda x: x.flatten().double().cumsum(0), "aten::cumsum of this type or size"),
        (lambda x: nn.Conv1d(32, 8, 3).to(x.device)(x), "aten::convolution of this shape"),
        (lambda x: torch.randperm(9, device="cuda", dtype=torch.int32), "aten::randperm of this type"),
        (repr, "Tensor.__repr__"),
    ],
)
def test_what_a_card_does_in_another_way_is_listed_with_its_place(card, code, operator):
    code(torch.ones(32, 32, 32, device="cuda"))
    calls, where = card.estimated[operator]
    assert calls == 1
    assert where.partition(":")[0].endswith("test_virtual_device.py")


# --- entering and leaving -----------------------------------------------------------------------------------------


def torch_state() -> dict[str, object]:
    from torch.overrides import _get_current_function_mode_stack
    from torch.utils._python_dispatch import _len_torch_dispatch_stack

    owners = (
        torch, torch._C, torch._C._nn, torch.cuda, torch.cuda.memory, torch.cuda.random, torch.cuda.streams,
        torch.cuda.nvtx, torch.cuda.graphs, torch.cuda.graphs.graph, torch.cuda.profiler, torch.cuda.tunable,
        torch.cuda.jiterator, torch.cuda.nccl, torch.cuda.gds, torch.accelerator, torch.Tensor, torch.UntypedStorage,
        torch.autocast, torch.amp.GradScaler, torch.testing, torch.utils.dlpack, torch.nn.Module, torch.nn.RNNBase,
        torch.nn.parallel.comm, torch.nested, torch.distributed.distributed_c10d, torch.version, threading.Thread,
        torch.autograd.graph.saved_tensors_hooks,
    )  # fmt: skip
    state: dict[str, object] = {f"{o!r}.{k}": v for o in owners for k, v in vars(o).items()}
    state["casts"] = [torch._C._dispatch_dump(f"aten::{op}") for op in ("linear", "softmax.int", "norm.Scalar")]
    state["in the casting layer"] = torch._C._dispatch_tls_is_dispatch_key_included("AutocastCUDA")
    state["default device"] = torch.get_default_device()
    state["function modes"] = len(_get_current_function_mode_stack())
    state["dispatch modes"] = _len_torch_dispatch_stack()
    state["meta path"] = list(sys.meta_path)
    return state


@pytest.mark.parametrize("failing", [False, True])
def test_torch_is_what_it_was(failing):
    before = torch_state()
    try:
        with h100():
            kept = torch.ones(3, device="cuda")
            torch.set_default_device("cuda")
            with torch.autocast("cuda"), torch.cuda.graph(torch.cuda.CUDAGraph()):
                torch.ones(3, 3) @ torch.ones(3, 3)
                if failing:
                    raise KeyError("theirs")
    except KeyError:
        pass
    after = torch_state()
    assert [
        k for k in before.keys() | after.keys() if before.get(k) is not after.get(k) and before.get(k) != after.get(k)
    ] == []
    del kept
    assert torch.ones(2).sum().item() == 2


def test_one_device_at_a_time():
    with h100() as first:
        with pytest.raises(UsageError, match="active already"), h100():
            pass
        with pytest.raises(UsageError, match="active already"), first:
            pass
        assert torch.ones(1, device="cuda").is_cuda
    with pytest.raises(UsageError, match="used before"), first:
        pass
    with h100() as second:
        kept = torch.ones(1, device="cuda")
    assert (first.memory._next_id, second.memory._next_id) == (1, 1)
    del kept


# --- threads ------------------------------------------------------------------------------------------------------


def test_threads_see_the_card(card):
    class Loader(threading.Thread):
        def run(self):
            self.loaded = torch.ones(100, device="cuda") + 1

    loader = Loader()
    loader.start()
    loader.join()
    assert loader.loaded.is_cuda
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda n: torch.ones(1000, device="cuda") + n, range(40)))
    assert all(t.is_cuda for t in results)
    assert allocated() == 512 + 40 * 4096


def test_an_executor_from_before_sees_the_card():
    with ThreadPoolExecutor(1) as pool:
        pool.submit(int).result()
        with h100():
            made = pool.submit(lambda: torch.ones(3, device="cuda").is_cuda)
            assert made.result()
        assert pool.submit(lambda: torch.ones(3).sum().item()).result() == 3


def test_every_thread_has_a_current_stream_of_its_own(card):
    side = torch.cuda.Stream()
    seen = []
    with torch.cuda.stream(side):
        thread = threading.Thread(target=lambda: seen.append(torch.cuda.current_stream()))
        thread.start()
        thread.join()
        assert torch.cuda.current_stream() == side
    assert seen == [torch.cuda.default_stream()]


def test_a_stream_context_can_be_entered_again(card):
    side = torch.cuda.Stream()
    for make in (torch.cuda.stream, torch.cuda.StreamContext):
        context = make(side)
        for _ in range(2):
            with context:
                assert torch.cuda.current_stream() == side
            assert torch.cuda.current_stream() == torch.cuda.default_stream()
    with torch.cuda.stream(None):
        assert torch.cuda.current_stream() == torch.cuda.default_stream()


def test_there_are_32_streams_of_each_of_four_priorities(card):
    """As ``getStreamFromPool`` in c10/cuda/CUDAStream.cpp hands them out."""
    normal = [torch.cuda.Stream() for _ in range(33)]
    high = [torch.cuda.Stream(priority=-3) for _ in range(32)]
    assert len({s.cuda_stream for s in (*normal, *high)}) == 64
    assert normal[32] == normal[0]
    assert torch.cuda.Stream(priority=-5) == high[0]
    with pytest.raises(RuntimeError, match="less than or equal to 0, got 1"):
        torch.cuda.Stream(priority=1)


PARTS = "some elements of the input tensor and the written-to tensor refer to a single memory location"
ITSELF = "more than one element of the written-to tensor refers to a single memory location"


@pytest.mark.parametrize(
    ("code", "refused"),
    [
        ("x[1:].copy_(x[:-1])", PARTS),
        ("x[1:].add_(x[:-1])", PARTS),
        ("torch.add(x[1:], 1, out=x[:-1])", PARTS),
        ("x.view(torch.int32)[1:].copy_(x[:-1])", PARTS),
        ("x[:9].view(3, 3).copy_(x[:9].view(3, 3).t())", PARTS),
        ("x[:1].expand(4).copy_(x[4:8])", ITSELF),
        ("x[:1].expand(4).mul_(2)", ITSELF),
        ("x[:1].expand(4).copy_(torch.ones(4))", ITSELF),
        ("x[:1].expand(4).fill_(2)", None),
        ("x[:1].expand(4).zero_()", None),
        ("x.copy_(x)", None),
        ("x.mul_(x)", None),
        ("x[:5].copy_(x[5:])", None),
        ("x[:6].view(3, 2)[:, :1].copy_(x[:6].view(3, 2)[:, 1:])", None),
    ],
)
def test_writing_where_elements_overlap_is_refused(card, code, refused):
    """As on the host, which the same code is run on."""
    for device in ("cpu", "cuda"):
        x = torch.ones(10, device=device)
        if refused is None:
            eval(code, {"x": x, "torch": torch})
        else:
            with pytest.raises(RuntimeError, match=refused):
                eval(code, {"x": x, "torch": torch})


def test_functions_whose_question_is_answered_see_their_module_as_it_is_now():
    module = {"has_torch_function_unary": lambda *args: True, "limit": 1}
    exec("def asks(*x):\n    return has_torch_function_unary(x), limit, len(x)", module)
    exec("def sets(x):\n    global limit\n    limit = has_torch_function_unary(x)", module)
    body = _without_question(module["asks"])
    assert body("x") == (False, 1, 1)
    module["limit"] = 2
    assert body("x") == (False, 2, 1)
    del module["limit"]
    with pytest.raises(NameError, match="limit"):
        body("x")
    assert _without_question(module["sets"]) is None, "it writes to its module"


@pytest.mark.parametrize("in_thread", [False, True])
def test_a_gradient_that_waits_for_its_move_lives_no_longer_than_its_tensor(card, in_thread):
    held = [nn.Parameter(torch.ones(1000))]
    held[0].grad = torch.ones(1000)
    held[0].data = held[0].data.cuda()
    assert held[0].grad is not None
    assert held[0].grad.device.type == "cpu", "it is kept beside until it moves, too"
    gone = weakref.ref(held[0].grad)
    if in_thread:
        seen = []
        thread = threading.Thread(target=lambda: seen.append(held[0].grad is gone()))
        thread.start()
        thread.join()
        assert seen == [True]
    held.clear()
    assert gone() is None
    assert live(card) == 0


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    "run",
    [
        lambda x, i: x.index_put_((i,), x[:3]),
        lambda x, i: x.index_add_(0, i, x[:3]),
        lambda x, i: x.index_copy_(0, i, x[:3]),
        lambda x, i: x.scatter_(0, i, x[:3]),
        lambda x, i: x.cumsum(0),
    ],
)
def test_what_takes_other_steps_with_deterministic_algorithms_is_estimated(run, deterministic):
    with h100() as device:
        x, places = torch.ones(8, device="cuda"), torch.arange(3, device="cuda")
        run(x, places)
        assert [op for op in device.estimated if op.endswith("with deterministic algorithms")] != []
        torch.use_deterministic_algorithms(False)
        device.estimated.clear()
        run(x, places)
        assert device.estimated == {}


def test_a_program_that_writes_by_index_in_a_backward_pass_takes_what_it_takes_elsewhere():
    """A card checks the program's own indices wherever that asks; those of a formula it does not."""
    taken = []

    class Adds(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            accumulate()
            return gradient

    with h100() as device:
        target, index, values = (
            torch.zeros(4000, 64, device="cuda"), torch.arange(3000, device="cuda"), torch.ones(3000, 64, device="cuda")
        )  # fmt: skip

        def accumulate():
            before = len(device.memory.requests)
            target.index_put_((index,), values, accumulate=True)
            rows = device.memory.requests.finish()
            taken.append([int(s) for s in rows.size[before:]])

        accumulate()
        Adds.apply(torch.ones(2, device="cuda", requires_grad=True)).sum().backward()
        assert taken[0] == taken[1] != []
