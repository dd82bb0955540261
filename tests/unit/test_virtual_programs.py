"""Small programs as people write them for a CUDA machine; what they hold at their peak is computed here by hand."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import warnings
from collections.abc import Callable

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402
from virtual_cards import h100, live  # noqa: E402

pytestmark = pytest.mark.torch
MIB, GIB = 2**20, 2**30
CUBLAS = 32 * MIB  # workspace of matrix products, recorded on an H100
CUBLASLT = MIB  # and of those that add a bias
PROGRAMS: dict[str, tuple[Callable[[], object], int]] = {}


def block(*sizes: int) -> int:
    """Bytes of blocks that serve requests of up to 1 MiB: multiples of 512."""
    assert all(size <= MIB for size in sizes)
    return sum(-(-size // 512) * 512 for size in sizes)


def program(peak: int) -> Callable[[Callable[[], object]], Callable[[], object]]:
    """A program, and the bytes in blocks that it holds at its peak."""

    def keep(function: Callable[[], object]) -> Callable[[], object]:
        PROGRAMS[function.__name__] = function, peak
        return function

    return keep


# --- made on the card ---------------------------------------------------------------------------------------------


@program(5 * block(4000))
def every_spelling_of_the_device():
    spellings = ("cuda", "cuda:0", torch.device("cuda", 0), torch.device("cuda"), 0)
    held = [torch.zeros(1000, device=device) for device in spellings]
    assert {t.device for t in held} == {torch.device("cuda", 0)}


@program(2 * block(40))
def devices_by_number():
    device = torch.device(torch.cuda.current_device())
    assert device == torch.device(0) == torch.device("cuda", 0)
    assert isinstance(device, torch.device)
    assert type(device) == torch.device  # noqa: E721 - as some programs ask
    assert torch.device("cpu").type == torch.device(type="cpu").type == "cpu"
    assert copy.deepcopy(pickle.loads(pickle.dumps({torch.device(0): 1}))) == {device: 1}
    file = io.BytesIO()
    torch.save({"device": device}, file)
    file.seek(0)
    assert torch.load(file)["device"] == device
    with device:
        held = torch.ones(10), torch.ones(10, device=torch.device("cuda:0"))
    assert all(t.is_cuda for t in held)


@program(block(4000, 64))
def default_devices():
    with torch.device("cuda"):
        a = torch.zeros(1000)
        assert nn.Linear(2, 2, device="cpu").weight.device.type == "cpu"
    torch.set_default_device("cuda")
    b = torch.ones(16)
    torch.set_default_device(None)
    assert a.is_cuda
    assert b.is_cuda
    assert not torch.zeros(1).is_cuda


@program(block(40, 20, 40, 80, 40))
def types_that_name_the_card():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        a = torch.cuda.FloatTensor(10)
        b = torch.cuda.HalfTensor([1] * 10)
    c = torch.zeros(10).type("torch.cuda.FloatTensor")
    d = torch.zeros(10, dtype=torch.half).type(torch.cuda.DoubleTensor)
    assert isinstance(a, torch.cuda.FloatTensor)
    assert not isinstance(b, torch.cuda.FloatTensor)
    assert (a.type(), b.dtype, c.is_cuda, d.dtype) == ("torch.cuda.FloatTensor", torch.half, True, torch.double)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.set_default_tensor_type(torch.cuda.FloatTensor)
        e = torch.zeros(10)
        torch.set_default_tensor_type("torch.FloatTensor")
    assert e.is_cuda
    assert not torch.zeros(1).is_cuda
    assert c.type("torch.FloatTensor").device.type == "cpu"


@program(5 * block(400) + block(200) + block(400))
def moving_in_every_spelling():
    """Six copies are kept, and one at a time is not."""
    host = torch.zeros(10, 10)
    held = [host.cuda(), host.cuda(0), host.to(0), host.to("cuda", non_blocking=True), host.to(device="cuda")]
    held.append(host.to("cuda", torch.half, True, True))
    card = held[0]
    assert card.to("cuda") is card
    assert host.to(card).is_cuda
    assert host.to(held[-1]).dtype == torch.half
    assert not card.cpu().is_cuda
    assert all(t.is_cuda for t in held)


@program(block(4000))
def pinned_memory_is_the_hosts():
    host = torch.zeros(1000).pin_memory()
    assert host.is_pinned()
    assert host[1:].is_pinned()
    assert host.untyped_storage().is_pinned()
    assert host.pin_memory() is host
    assert torch.empty(3, pin_memory=True).is_pinned()
    assert torch.tensor([1, 2], pin_memory=True).tolist() == [1, 2]
    assert not torch.zeros(3).is_pinned()
    card = host.cuda(non_blocking=True)
    assert not card.is_pinned()
    with pytest.raises(RuntimeError, match="pin"):
        card.pin_memory()
    with pytest.raises(RuntimeError, match="pin"):
        torch.empty(3, device="cuda", pin_memory=True)


@program(block(20))
def batches_of_a_loader():
    data = torch.utils.data.TensorDataset(torch.zeros(10, 1))
    for (batch,) in torch.utils.data.DataLoader(data, batch_size=5, pin_memory=True):
        assert batch.is_pinned()
        card = batch.cuda(non_blocking=True)
        assert card.is_cuda
        del card


@program(2 * block(256, 32))
def modules_move():
    tied = nn.Linear(8, 8)
    for move in (
        lambda m: m.cuda(), lambda m: m.cuda(0), lambda m: m.to(0), lambda m: m.to("cuda"),
        lambda m: m.to(torch.zeros((), device="cuda")),
    ):  # fmt: skip
        module = move(copy.deepcopy(tied))
        assert module.weight.is_cuda
        del module
    first, second = copy.deepcopy(tied).cuda(), nn.Linear(8, 8, device="cuda")
    del first, second


@program(block(256, 32, 256, 32))
def meta_weights_materialise():
    with torch.device("meta"):
        empty, assigned = nn.Linear(8, 8), nn.Linear(8, 8)
    with pytest.raises(NotImplementedError, match=r"Cannot copy out of meta tensor; no data! .*to_empty"):
        empty.to("cuda")
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor; no data!"):
        empty.cuda()
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor; no data!"):
        torch.empty(3, device="meta").to("cuda")
    assert torch.cuda.memory_allocated() == 0
    empty.to_empty(device="cuda").reset_parameters()
    state = {name: torch.zeros(p.shape, device="cuda") for name, p in assigned.named_parameters()}
    assigned.load_state_dict(state, assign=True)
    assert assigned.weight.data_ptr() == state["weight"].data_ptr()


@program(block(256, 32))
def a_checkpoint_goes_to_the_card():
    file = io.BytesIO()
    torch.save(nn.Linear(8, 8).state_dict(), file)
    file.seek(0)
    module = nn.utils.skip_init(nn.Linear, 8, 8, device="cuda")
    module.load_state_dict(torch.load(file, map_location="cpu"))
    assert module.weight.is_cuda


@program(block(1000, 400))
def storages():
    storage = torch.UntypedStorage(1000, device="cuda")
    assert storage.device == torch.device("cuda", 0)
    view = torch.empty(0, device="cuda").set_(storage, 0, (10,), (1,))
    del storage
    assert torch.cuda.memory_allocated() == block(1000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = torch.cuda.FloatStorage(100)
        assert other.is_cuda
    del other
    view.untyped_storage().resize_(0)
    assert torch.cuda.memory_allocated() == 0
    view.resize_(30)
    assert torch.cuda.memory_allocated() == block(120)


@program(block(400, 400, 400))
def data_is_replaced():
    parameter = nn.Parameter(torch.zeros(100))
    parameter.data = parameter.data.cuda()
    parameter.data = torch.empty(100, device="cuda")  # the old one is gone when the new one is set
    assert torch.cuda.memory_allocated() == block(400)
    held = copy.deepcopy(parameter), copy.copy(parameter).detach().clone()
    assert held[0].is_cuda
    assert held[1].is_cuda


@program(block(96))
def views_take_nothing():
    base = torch.zeros(4, 6, device="cuda")
    for view in (
        base[1], base.t(), base.view(24), base[:, ::2], base.as_strided((2, 2), (1, 2)), base.view(torch.int16),
        base.expand(2, 4, 6), base.unbind()[0], base.narrow(0, 1, 2), base.unfold(0, 2, 1), base.data, base.mT,
    ):  # fmt: skip
        assert view.is_cuda
        assert view.untyped_storage().data_ptr() == base.data_ptr()


# --- questions ----------------------------------------------------------------------------------------------------


@program(70 * GIB)
def trying_again_after_an_oom():
    held = [torch.empty(GIB, dtype=torch.uint8, device="cuda") for _ in range(70)]
    attempts = 0
    while True:
        try:
            large = torch.empty(40 * GIB, dtype=torch.uint8, device="cuda")
            break
        except torch.cuda.OutOfMemoryError as e:
            assert isinstance(e, RuntimeError)
            held.clear()
            gc.collect()
            torch.cuda.empty_cache()
            attempts += 1
    assert attempts == 1
    assert large.is_cuda
    assert torch.cuda.memory_stats()["num_ooms"] == 1
    assert torch.cuda.max_memory_allocated() == 70 * GIB
    torch.cuda.reset_peak_memory_stats()
    assert torch.cuda.max_memory_allocated() == 40 * GIB


@program(block(1000))
def the_allocator_by_hand():
    address = torch.cuda.caching_allocator_alloc(1000)
    assert torch.cuda.memory_allocated() == 1024
    torch.cuda.caching_allocator_delete(address)
    with pytest.raises(RuntimeError, match="invalid device pointer"):
        torch.cuda.caching_allocator_delete(address)
    assert torch.cuda.memory_allocated() == 0


@program(0)
def what_programs_ask_at_their_start():
    cuda = torch.cuda
    assert cuda.is_available()
    assert cuda.is_initialized()
    cuda.init()
    assert (cuda.device_count(), cuda.current_device()) == (1, 0)
    for device in (0, "cuda:0", torch.device("cuda")):
        cuda.set_device(device)
        with cuda.device(device):
            assert cuda.get_device_properties(device).name == cuda.get_device_name(device)
    shared = cuda.get_device_properties().shared_memory_per_block_optin
    assert shared == 227 * 1024  # CUDA C++ Programming Guide, compute capability 9.0
    assert cuda.get_allocator_backend() == "native"
    assert not cuda.can_device_access_peer(0, 0)
    assert cuda.get_arch_list() == ["sm_90"]
    for seed in (cuda.manual_seed, cuda.manual_seed_all, torch.manual_seed):
        seed(1)
    cuda.set_rng_state(cuda.get_rng_state())
    cuda.default_generators[0].manual_seed(1)
    with torch.random.fork_rng(), cuda.profiler.profile(), cuda.nvtx.range("start"):
        cuda.synchronize()
    assert torch.get_device_module() is cuda
    assert torch.accelerator.current_accelerator() == torch.device("cuda")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32


# --- training and inference ---------------------------------------------------------------------------------------

ROWS, WIDTH = 64, 128  # one activation: 32 KiB; one weight: 64 KiB
ACTIVATION, WEIGHT = 4 * ROWS * WIDTH, 4 * WIDTH * WIDTH


def layers(count: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(count))).cuda()


@program(CUBLAS + 4 * WEIGHT + ACTIVATION + 2 * ACTIVATION)
def inference_holds_two_activations():
    model, x = layers(4), torch.zeros(ROWS, WIDTH, device="cuda")
    with torch.no_grad():
        assert not model(x).requires_grad


@program(CUBLAS + 4 * WEIGHT + 5 * ACTIVATION)
def training_saves_every_activation():
    model, x = layers(4), torch.zeros(ROWS, WIDTH, device="cuda")
    assert model(x).requires_grad


@program(2 * CUBLAS + 2 * WEIGHT + 2 * ACTIVATION + 2 * WEIGHT + ACTIVATION)
def a_backward_pass():
    """When the first weight's gradient is made, what lay between the layers is gone, and its gradient is there."""
    model, x = layers(2), torch.zeros(ROWS, WIDTH, device="cuda")
    y = model(x)
    y.backward(x)
    assert all(p.grad.is_cuda for p in model.parameters())


@program(CUBLAS + 4 * WEIGHT + 2 * ACTIVATION + ACTIVATION)
def checkpointing_saves_the_ends():
    model, x = layers(4), torch.zeros(ROWS, WIDTH, device="cuda", requires_grad=True)
    y = checkpoint(model, x, use_reentrant=False)
    assert y.requires_grad


@program(2 * CUBLAS + CUBLASLT + 5 * block(WEIGHT, 4 * WIDTH) + ACTIVATION)
def adamw_steps_over_all_parameters_at_once():
    """As is the default on a card: the roots of all second moments stand beside weights, gradients and moments."""
    model, x = nn.Linear(WIDTH, WIDTH).cuda(), torch.zeros(ROWS, WIDTH, device="cuda")
    optimizer = torch.optim.AdamW(model.parameters())
    model(x).backward(x)
    optimizer.step()
    assert torch.cuda.memory_allocated() == 2 * CUBLAS + CUBLASLT + 4 * block(WEIGHT, 4 * WIDTH) + ACTIVATION
    optimizer.zero_grad()
    assert torch.cuda.memory_allocated() == 2 * CUBLAS + CUBLASLT + 3 * block(WEIGHT, 4 * WIDTH) + ACTIVATION


@program(CUBLAS + WEIGHT + ACTIVATION + WEIGHT // 2 + ACTIVATION // 2 + ACTIVATION // 2)
def autocast_keeps_its_weights_until_its_end():
    model, x = layers(1), torch.zeros(ROWS, WIDTH, device="cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        with torch.autocast("cuda", dtype=torch.bfloat16), torch.no_grad():
            assert model(x).dtype == torch.bfloat16
        # The input's cast and the result are gone; the weight's stays, although the inner autocast has ended.
        assert torch.cuda.memory_allocated() == CUBLAS + WEIGHT + ACTIVATION + WEIGHT // 2
    assert torch.cuda.memory_allocated() == CUBLAS + WEIGHT + ACTIVATION


@program(CUBLAS + WEIGHT + ACTIVATION + WEIGHT // 2 + ACTIVATION)
def autocast_without_its_cache():
    model, x = layers(1), torch.zeros(ROWS, WIDTH, device="cuda")
    with torch.autocast("cuda", cache_enabled=False), torch.no_grad():
        assert model(x).dtype == torch.float16
        assert torch.cuda.memory_allocated() == CUBLAS + WEIGHT + ACTIVATION


@program(2 * CUBLAS + 2 * WEIGHT + 2 * ACTIVATION + 2 * WEIGHT + ACTIVATION)
def a_scaled_step():
    model, x = layers(2), torch.zeros(ROWS, WIDTH, device="cuda")
    optimizer, scaler = torch.optim.SGD(model.parameters()), torch.amp.GradScaler("cuda")
    y = model(x)
    y.backward(x)
    del y
    loss = torch.zeros((), device="cuda")
    assert scaler.scale(loss).is_cuda
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()


@pytest.mark.parametrize("name", PROGRAMS)
def test_runs_and_holds_what_it_should(name):
    run, peak = PROGRAMS[name]
    gc.collect()
    gc.disable()
    try:
        with h100() as device:
            watch = device.memory.allocator.watch()
            run()
            assert device.memory.allocator.peaks(watch).allocated == peak
            assert live(device) == 0
    finally:
        gc.enable()
