"""Whether channels come last in what convolutions and their like return on the virtual card."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
from virtual_cards import h100

torch = pytest.importorskip("torch")
from torch.nn import functional  # noqa: E402

pytestmark = pytest.mark.torch
LAST = {2: torch.channels_last, 3: torch.channels_last_3d}
CONVOLUTIONS: dict[str, tuple[Callable[..., torch.Tensor], tuple[int, int], dict[str, Any]]] = {
    "conv2d": (functional.conv2d, (8, 4), {}),
    "conv3d": (functional.conv3d, (8, 4), {}),
    "depthwise conv2d": (functional.conv2d, (4, 1), {"groups": 4}),
    "depthwise conv3d": (functional.conv3d, (4, 1), {"groups": 4}),
    "conv_transpose2d": (functional.conv_transpose2d, (4, 8), {}),
    "conv_transpose3d": (functional.conv_transpose3d, (4, 8), {}),
}


def strides(
    name: str, device: str, last: tuple[bool, bool], dtype: torch.dtype = torch.float32
) -> list[tuple[int, ...]]:
    """Of the result and of the gradients of input and weight."""
    run, channels, options = CONVOLUTIONS[name]
    spatial = 3 if "3d" in name else 2
    x = torch.ones(2, 4, *[6] * spatial, device=device, dtype=dtype)
    weight = torch.ones(*channels, *[3] * spatial, device=device, dtype=dtype)
    x, weight = (
        t.to(memory_format=LAST[spatial]) if wanted else t for t, wanted in zip((x, weight), last, strict=True)
    )
    out = run(x.requires_grad_(), weight.requires_grad_(), **options)
    gradients = torch.autograd.grad(out, (x, weight), torch.ones_like(out))
    return [tuple(0 if n == 1 else s for n, s in zip(t.shape, t.stride(), strict=True)) for t in (out, *gradients)]


@pytest.mark.parametrize("last", list(itertools.product((False, True), repeat=2)), ids=lambda p: f"{p[0]:d}{p[1]:d}")
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_channels_of_convolutions_come_last_where_those_of_input_or_weight_do(
    name: str, last: tuple[bool, bool]
) -> None:
    """As in torch's own build for the host, whose rule for floats (``mkldnn_conv_use_channels_last`` in
    aten/src/ATen/native/ConvUtils.h) is the same as cuDNN's beside it."""
    expected = strides(name, "cpu", last)
    with h100():
        assert strides(name, "cuda", last) == expected


@pytest.mark.parametrize("name", ["conv2d", "conv3d"])
def test_channels_of_doubles_come_first(name: str) -> None:
    """Source: ``cudnn_conv_suggest_memory_format`` in aten/src/ATen/native/ConvUtils.h."""
    with h100():
        assert strides(name, "cuda", (True, True), torch.float64) == strides(name, "cuda", (False, False))


def test_gaps_do_not_matter() -> None:
    with h100():
        x = torch.ones(2, 4, 6, 12, device="cuda").to(memory_format=torch.channels_last)[..., ::2]
        assert not x.is_contiguous(memory_format=torch.channels_last)
        out = functional.conv2d(x, torch.ones(8, 4, 1, 1, device="cuda"))
        assert out.stride() == (8 * 6 * 6, 1, 6 * 8, 8)
        pixel = functional.conv2d(x[:, :, :1, :1], torch.ones(8, 4, 1, 1, device="cuda"))
        assert pixel.stride() == (8, 1, 8, 8)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("spatial", [2, 3])
def test_normalised_batches_keep_their_layout(spatial: int, training: bool) -> None:
    def layout(device: str) -> list[tuple[int, ...]]:
        x = torch.ones(2, 4, *[6] * spatial, device=device).to(memory_format=LAST[spatial]).requires_grad_()
        mean, variance = torch.zeros(4, device=device), torch.ones(4, device=device)
        out = functional.batch_norm(x, mean, variance, training=training)
        (gradient,) = torch.autograd.grad(out.sum(), x)
        return [out.stride(), gradient.stride()]

    expected = layout("cpu")
    with h100():
        assert layout("cuda") == expected
