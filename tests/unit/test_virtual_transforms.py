"""``torch.func`` and forward derivatives on the virtual card: functions are handed wrappers of its tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from virtual_cards import h100, live

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.autograd import forward_ad  # noqa: E402
from torch.func import (  # noqa: E402
    functional_call,
    grad,
    grad_and_value,
    jacrev,
    jvp,
    stack_module_state,
    vjp,
    vmap,
)
from torch.nn import functional  # noqa: E402

pytestmark = [
    pytest.mark.torch,
    # torch's own decompositions of forward derivatives, when they are first imported
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated"),
]
Function = Callable[[torch.Tensor], torch.Tensor]


def attended(x: torch.Tensor) -> torch.Tensor:
    heads = x.reshape(1, -1, 4, 8)
    return functional.scaled_dot_product_attention(heads, heads, heads).reshape(x.shape)


def written(x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    x[0] = 1.0
    return x


def under_autocast(x: torch.Tensor) -> torch.Tensor:
    with torch.autocast(x.device.type, torch.bfloat16):
        return functional.linear(x, torch.ones(8, 8, device=x.device)).float()


FUNCTIONS: dict[str, Function] = {
    "softmax": lambda x: functional.softmax(x, -1),
    "log_softmax": lambda x: x.log_softmax(-1),
    "softmax of halves": lambda x: torch.softmax(x.half(), -1, dtype=torch.float32),
    "layer_norm": lambda x: functional.layer_norm(x, (8,)),
    "rms_norm": lambda x: functional.rms_norm(x, (8,)),
    "linear": lambda x: functional.linear(x, torch.ones(8, 8, device=x.device), torch.ones(8, device=x.device)),
    "linear of a strided tensor": lambda x: functional.linear(
        x.reshape(-1, 4, 8).transpose(0, 1), torch.ones(8, 8, device=x.device), torch.ones(8, device=x.device)
    ),
    "cross_entropy": lambda x: functional.cross_entropy(
        x.reshape(-1, 8), torch.zeros(x.numel() // 8, dtype=torch.int64, device=x.device)
    ),
    "conv": lambda x: functional.conv1d(x.reshape(-1, 4, 8), torch.ones(4, 4, 3, device=x.device)),
    "one_hot": lambda x: x * functional.one_hot(torch.zeros(8, dtype=torch.int64, device=x.device), 8).sum(0),
    "an index": lambda x: x[..., torch.tensor([0, 1], device=x.device)],
    "moves": lambda x: x.to(torch.float64).to(x.device).type(x.dtype),
    "a number": lambda x: x * x.new_tensor(2.0) * torch.tensor(2.0, device=x.device),
    "a write": written,
    "autocast": under_autocast,
    "attention": attended,
}


def batch(x: torch.Tensor) -> torch.Tensor:
    return x.expand(3, *x.shape).contiguous()


TRANSFORMS: dict[str, Callable[[Function, torch.Tensor], Any]] = {
    "grad": lambda f, x: grad(lambda y: f(y).sum())(x),
    "grad_and_value": lambda f, x: grad_and_value(lambda y: f(y).sum())(x),
    "vjp": lambda f, x: vjp(f, x)[1](f(x)),
    "vmap": lambda f, x: vmap(f)(batch(x)),
    "per sample": lambda f, x: vmap(grad(lambda y: f(y).sum()))(batch(x)),
    "grad of vmap": lambda f, x: grad(lambda y: vmap(f)(y).sum())(batch(x)),
    "jacrev": lambda f, x: jacrev(lambda y: f(y).sum())(x),
    "jvp": lambda f, x: jvp(f, (x,), (x,)),
}


def shapes(out: Any) -> Any:
    if isinstance(out, torch.Tensor):
        return tuple(out.shape), out.dtype, out.requires_grad
    return tuple(shapes(o) for o in out)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_results_are_those_of_the_host(name: str, transform: str) -> None:
    if name == "attention" and transform == "jvp":
        pytest.skip("no fused kernel has forward derivatives, on a card either")
    program, run = FUNCTIONS[name], TRANSFORMS[transform]
    expected = shapes(run(program, torch.ones(2, 4, 8)))
    with h100() as device:
        x = torch.ones(2, 4, 8, device="cuda")
        out = run(program, x)
        assert shapes(out) == expected
        assert all(t.is_cuda for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, torch.Tensor))
        if name == "rms_norm":
            assert "aten::rms_norm in torch.func" in device.estimated


def test_gradients_per_sample_take_a_gradient_of_each_weight_for_each_sample() -> None:
    with h100() as device:
        model = nn.Sequential(nn.Linear(1024, 512, bias=False), nn.ReLU(), nn.LayerNorm(512)).cuda()
        weights = {name: p.detach() for name, p in model.named_parameters()}
        x = torch.ones(6, 1024, device="cuda")

        def loss(given: dict[str, torch.Tensor], sample: torch.Tensor) -> torch.Tensor:
            return functional_call(model, given, (sample[None],)).sum()

        before = live(device), device.memory.allocator.now.requested
        found = vmap(grad(loss), in_dims=(None, 0))(weights, x)
        assert {name: tuple(g.shape) for name, g in found.items()} == {
            "0.weight": (6, 512, 1024),
            "2.weight": (6, 512),
            "2.bias": (6, 512),
        }
        assert live(device) - before[0] == 3
        workspaces = device.memory.allocator.now.requested - before[1] - 4 * 6 * (512 * 1024 + 512 + 512)
        assert workspaces == 32 * 2**20 * len(device.gemm_workspaces), "nothing else stays"


def test_an_ensemble_runs_as_one() -> None:
    with h100():
        layers = [nn.Linear(4, 3).cuda() for _ in range(5)]
        weights, buffers = stack_module_state(layers)
        out = vmap(lambda w, b, x: functional_call(layers[0], (w, b), (x,)), (0, 0, None))(
            weights, buffers, torch.ones(7, 4, device="cuda")
        )
        assert out.shape == (5, 7, 3)
        assert out.is_cuda


def test_what_a_card_answers_inside_a_transform() -> None:
    seen: list[Any] = []

    def look(x: torch.Tensor) -> torch.Tensor:
        seen.append((x.is_cuda, str(x.device), x.get_device(), x.type(), "device='cuda:0'" in repr(x)))
        with pytest.raises(RuntimeError, match="doesn't have storage"):
            x.data_ptr()
        return x.sum()

    with h100():
        vmap(look)(torch.ones(2, 3, device="cuda"))
        grad(look)(torch.ones(3, device="cuda"))
    assert seen == [(True, "cuda:0", 0, "torch.cuda.FloatTensor", True)] * 2


def test_forward_derivatives_are_not_lost() -> None:
    with h100() as device, forward_ad.dual_level():
        half = torch.ones(3, 4, device="cuda", dtype=torch.half)
        out = torch.softmax(forward_ad.make_dual(half, half), -1, dtype=torch.float32)
        tangent = forward_ad.unpack_dual(out).tangent
        assert tangent is not None
        assert tangent.dtype == torch.float32
        assert list(device.estimated) == ["softmax from float16 to float32 in torch.func"]


def test_zeros_of_forward_derivatives_take_no_memory() -> None:
    with h100() as device:
        x = torch.ones(1000, device="cuda")
        before = len(device.memory.requests.finish())
        zeros = torch._efficientzerotensor((1000,), device="cuda")
        assert zeros.is_cuda
        assert zeros._is_zerotensor()
        assert len(device.memory.requests.finish()) == before
        jvp(torch.sin, (x,), (x,))
        assert device.estimated == {}
