"""Classes of tensors with tensors inside on the virtual card: quantized weights and their like."""

from __future__ import annotations

from typing import Any

import pytest
from virtual_cards import h100, live

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402
from torch.utils import _pytree  # noqa: E402

pytestmark = pytest.mark.torch


class Halved(torch.Tensor):
    """A weight that is kept in bytes, with a scale."""

    @staticmethod
    def __new__(cls, data: torch.Tensor, scale: torch.Tensor) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=scale.dtype, device=data.device)

    def __init__(self, data: torch.Tensor, scale: torch.Tensor) -> None:
        self.inner, self.scale = data, scale

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert all(str(t.inner.device) == str(t.device) for t in args if isinstance(t, Halved))
        if func in (torch.ops.aten.detach.default, torch.ops.aten._to_copy.default, torch.ops.aten.clone.default):
            options = {k: v for k, v in (kwargs or {}).items() if k != "dtype"}
            return cls(func(args[0].inner, **options), func(args[0].scale, **options))
        plain = _pytree.tree_map_only(Halved, lambda t: t.inner.to(t.scale.dtype) * t.scale, (args, kwargs or {}))
        return func(*plain[0], **plain[1])


def test_they_are_where_their_tensors_are_and_take_what_those_take() -> None:
    with h100() as device:
        host = Halved(torch.ones(512, 1024, dtype=torch.int8), torch.ones((), dtype=torch.bfloat16))
        before = device.memory.allocator.now.requested
        weight = host.to("cuda")
        assert isinstance(weight, Halved)
        assert (str(weight.device), weight.is_cuda, str(weight.inner.device)) == ("cuda:0", True, "cuda:0")
        assert device.memory.allocator.now.requested - before == 512 * 1024 + 2
        layer = nn.Linear(1024, 512, bias=False, device="cuda", dtype=torch.bfloat16)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        kept = live(device)
        out = layer(torch.ones(4, 1024, device="cuda", dtype=torch.bfloat16))
        assert (tuple(out.shape), out.is_cuda, type(out)) == ((4, 512), True, torch.Tensor)
        assert functional.linear(out.t()[:, :1].expand(-1, 1024), weight).shape == (512, 512)
        assert live(device) == kept + 1
        del weight, layer.weight, out
        assert live(device) == kept - 2
        assert device.estimated == {}


class LeftToTorch(torch.Tensor):
    """Has no memory besides its own, and nothing to say of operators."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_dispatch__(func, types, args, kwargs or {})


def test_memory_of_the_card_itself_counts_whatever_its_class() -> None:
    with h100() as device:
        tensor = torch.Tensor._make_subclass(LeftToTorch, torch.ones(1024, 1024, device="cuda"))
        before = torch.cuda.memory_allocated()
        out = tensor + 1
        assert (str(out.device), out.is_cuda) == ("cuda:0", True)
        assert torch.cuda.memory_allocated() - before == 1024 * 1024 * 4
        assert device.estimated == {}
