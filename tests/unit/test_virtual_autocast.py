"""``torch.autocast("cuda")`` on the virtual card."""

from __future__ import annotations

import re
import threading
import warnings
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402
from virtual_cards import h100  # noqa: E402

from fragscope.record.virtual import autocast  # noqa: E402
from fragscope.trace import RequestKind  # noqa: E402

pytestmark = pytest.mark.torch
HALF, BFLOAT, FLOAT = torch.float16, torch.bfloat16, torch.float32
LISTS_RMS_NORM = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 12)  # by the headers of 2.9.1 to 2.14.1


@pytest.fixture
def card():
    with h100() as device:
        yield device


def of_header(name: str) -> set[str]:
    """Operators of a list in torch's own header."""
    header = (Path(torch.__file__).parent / "include" / "ATen" / "autocast_mode.h").read_text()
    text = re.search(rf"#define {name}\(_\)(.*?)\n\n", header, re.DOTALL)[1]
    return {".".join(filter(None, m)) for m in re.findall(r"_\((\w+)(?:, (\w+))?\)", text)}


def test_the_lists_are_those_of_the_installed_torch():
    lower = of_header("AT_FORALL_LOWER_PRECISION_FP") | {"cudnn_convolution", "cudnn_convolution_transpose"}
    assert set(autocast.LOWER) >= lower
    assert set(autocast.FLOAT32) >= of_header("AT_FORALL_FP32")
    assert set(autocast.FLOAT32_RESULT) >= of_header("AT_FORALL_FP32_SET_OPT_DTYPE")
    assert set(autocast.WIDEST) >= of_header("AT_FORALL_PROMOTE")
    ours = [*autocast.LOWER, *autocast.FLOAT32, *autocast.FLOAT32_RESULT, *autocast.WIDEST]
    assert len(set(ours)) == len(ours)


def test_every_operator_that_torch_casts_on_a_card_is_in_a_list():
    registered = {
        n.removeprefix("aten::") for n in torch._C._dispatch_get_registrations_for_dispatch_key("AutocastCUDA")
    }
    lists = (autocast.LOWER, autocast.FLOAT32, autocast.FLOAT32_RESULT, autocast.WIDEST, autocast.BANNED)
    assert registered <= {*autocast.NORMS, *(name for names in lists for name in names)}


# What each operator returns is documented: "CUDA Op-Specific Behavior" of docs.pytorch.org/docs/stable/amp.html.
RESULTS = {
    "matmul of float": (lambda x, h: x @ x, HALF),
    "linear": (lambda x, h: functional.linear(x, x), HALF),
    "convolution": (lambda x, h: functional.conv1d(x[None], x[:, :, None]), HALF),
    "einsum": (lambda x, h: torch.einsum("ij,jk->ik", x, x), HALF),
    "exp of half": (lambda x, h: h.exp(), FLOAT),
    "power": (lambda x, h: h**2, FLOAT),
    "layer norm": (lambda x, h: functional.layer_norm(h, (8,)), FLOAT),
    "rms norm": (lambda x, h: functional.rms_norm(h, (8,)), FLOAT if LISTS_RMS_NORM else HALF),
    "softmax": (lambda x, h: h.softmax(-1), FLOAT),
    "softmax of a type of its own": (lambda x, h: h.softmax(-1, dtype=HALF), HALF),
    "sum": (lambda x, h: h.sum(), FLOAT),
    "norm": (lambda x, h: torch.norm(h, dim=0), FLOAT),
    "cross entropy": (lambda x, h: functional.cross_entropy(h, h.softmax(-1)), FLOAT),
    "widest of both": (lambda x, h: torch.addcmul(h, h, x), FLOAT),
    "widest of half": (lambda x, h: torch.addcmul(h, h, h), HALF),
    "what is not listed": (lambda x, h: functional.gelu(h), HALF),
    "what is not listed, of both": (lambda x, h: h + x, FLOAT),
    "double": (lambda x, h: x.double() @ x.double(), torch.float64),
}


@pytest.mark.parametrize("name", RESULTS)
def test_results_are_of_the_documented_type(card, name):
    run, dtype = RESULTS[name]
    x = torch.zeros(8, 8, device="cuda")
    with torch.autocast("cuda"):
        assert run(x, x.half()).dtype == dtype


def test_a_torch_that_does_not_list_an_operator_does_not_cast_for_it(monkeypatch):
    """As measured on an H100 with torch 2.11, where ``rms_norm`` of float16 gave float16 (from 2.12 on, float32)."""
    listed = torch._C._dispatch_has_kernel_for_dispatch_key
    monkeypatch.setattr(
        torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda op, key: op != "aten::rms_norm" and listed(op, key)
    )
    with h100(), torch.autocast("cuda"):
        half, weight = torch.zeros(64, 64, dtype=HALF, device="cuda"), torch.ones(64, device="cuda")
        held = torch.cuda.memory_allocated()
        assert functional.rms_norm(half, (64,)).dtype == HALF
        # 64 x 64 values of 2 bytes, and 64 of 4 bytes for the backward pass; no copy in float32.
        assert torch.cuda.max_memory_allocated() - held == 8192 + 512
        # No kernel takes weights of another type; torch says so and multiplies step by step.
        with pytest.warns(UserWarning, match="Mismatch dtype between input and weight"):
            assert functional.rms_norm(half, (64,), weight).dtype == HALF


def test_the_innermost_context_counts(card):
    x, host = torch.zeros(8, 8, device="cuda"), torch.zeros(8, 8)
    with torch.autocast("cuda"):
        assert torch.is_autocast_enabled()
        with torch.autocast("cuda", dtype=BFLOAT):
            assert (x @ x).dtype == BFLOAT
        with torch.autocast("cuda", enabled=False):
            assert (x @ x).dtype == FLOAT
        assert (x @ x).dtype == HALF
        assert (host @ host).dtype == FLOAT
        with pytest.raises(RuntimeError, match="unsafe to autocast"):
            functional.binary_cross_entropy(x.half(), x.half())
    assert (x @ x).dtype == FLOAT
    with torch.autocast("cpu"):
        assert (host @ host).dtype == BFLOAT
        assert (x @ x).dtype == FLOAT


def test_casts_come_in_the_order_of_the_recording(card):
    """Of a linear layer and of a convolution: tests/data/traces/train_vit-default, events 153 to 156 and 172 to 175."""
    layer, patches = nn.Linear(192, 576).cuda(), nn.Conv2d(3, 192, 16, 16).cuda()
    images, tokens = torch.zeros(9, 3, 160, 160, device="cuda"), torch.zeros(18, 101, 192, device="cuda")
    assert asked(card, lambda: amp(layer)(tokens))[:4] == [1152, 221_184, 698_112, 2_094_336]
    assert asked(card, lambda: amp(patches)(images)) == [384, 294_912, 1_382_400, 345_600]


def amp(module):
    return torch.autocast("cuda", dtype=BFLOAT)(module.forward)


def asked(device, code) -> list[int]:
    before = len(device.memory.requests)
    code()
    rows = device.memory.requests.finish()
    return [int(s) for s, k in zip(rows.size[before:], rows.kind[before:], strict=True) if k == RequestKind.ALLOC]


def test_weights_are_cast_once_and_gradients_come_back(card):
    layer, x = nn.Linear(64, 64, bias=False).cuda(), torch.zeros(8, 64, device="cuda")
    with torch.autocast("cuda"):
        first = asked(card, lambda: layer(x))
        assert first.count(64 * 64 * 2) == 1
        assert asked(card, lambda: layer(x)) == [8 * 64 * 2, 8 * 64 * 2]  # the input's cast and the result
        torch.clear_autocast_cache()
        assert asked(card, lambda: layer(x)).count(64 * 64 * 2) == 1
        y = layer(x)
    y.backward(torch.ones_like(y))
    assert layer.weight.grad.dtype == FLOAT


class Casts(TorchDispatchMode):
    """Counts casts."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._to_copy.default
        return func(*args, **(kwargs or {}))


def casts_of_threads(device):
    """How often a weight is cast in two threads that share it; one leaves autocast while the other is in it."""
    weight, x = torch.ones(4, 4, device=device, requires_grad=True), torch.ones(4, 4, dtype=BFLOAT, device=device)
    counts = []

    def use():
        with Casts() as casts:
            x @ weight
        counts.append(casts.count)

    def other():
        with torch.autocast(device, BFLOAT):
            use()

    with torch.autocast(device, BFLOAT):
        use()
        use()
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        use()
    return counts


def test_threads_share_casts_and_the_first_that_leaves_lets_go_of_them():
    """Casts are a table of the process (``get_cached_casts`` in aten/src/ATen/autocast_mode.cpp), on the host, too."""
    expected = casts_of_threads("cpu")
    assert expected == [1, 0, 0, 1]
    with h100():
        assert casts_of_threads("cuda") == expected


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_casts_again(card, reentrant):
    layer = nn.Sequential(nn.Linear(8, 8, bias=False), nn.ReLU(), nn.Linear(8, 8, bias=False)).cuda()
    x = torch.zeros(4, 8, device="cuda", requires_grad=True)
    with torch.autocast("cuda"):
        y = checkpoint(layer, x, use_reentrant=reentrant)
    y.backward(torch.ones_like(y))
    assert (y.dtype, x.grad.dtype) == (HALF, FLOAT)


def test_casts_of_modules_of_their_own(card):
    class Scaled(torch.autograd.Function):
        @staticmethod
        @torch.amp.custom_fwd(device_type="cuda", cast_inputs=FLOAT)
        def forward(ctx, x):
            return x * 2

        @staticmethod
        @torch.amp.custom_bwd(device_type="cuda")
        def backward(ctx, grad):
            return grad * 2

    with torch.autocast("cuda"):
        assert Scaled.apply(torch.zeros(4, dtype=HALF, device="cuda")).dtype == FLOAT


def test_nothing_is_said_on_the_way():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with h100():
            pass
    assert [str(w.message) for w in caught] == []
