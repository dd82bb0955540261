"""Layers that torch runs in a function of its own where nothing is trained, if no mode asks for every call.

A ``TransformerEncoderLayer`` without masks takes the steps of that function here. With masks, and for a
``MultiheadAttention`` alone, the layer's own steps are taken and the case is estimated.

Source: ``TransformerEncoderLayer.forward`` in torch/nn/modules/transformer.py; ``transformer_encoder_layer_forward``
and ``native_multi_head_attention_cuda`` in aten/src/ATen/native/transformers. Recorded on an H100 with torch 2.11: the
last part of ``encoder`` of tests/gpu/model_programs.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from fragscope.record.virtual.card import VirtualCard

_Forward = Callable[..., Any]


def encoder_layer(device: VirtualCard, original: _Forward) -> _Forward:
    """``TransformerEncoderLayer.forward`` as on a card."""

    @functools.wraps(original)
    def forward(
        layer: Any, src: torch.Tensor, src_mask: Any = None, src_key_padding_mask: Any = None, is_causal: bool = False
    ) -> torch.Tensor:
        if not (src.is_cuda and _is_fused(layer, src)):
            return original(layer, src, src_mask, src_key_padding_mask, is_causal)  # type: ignore[no-any-return]
        if src_mask is None and src_key_padding_mask is None:
            return _encoded(layer, src)
        device.estimate("TransformerEncoderLayer with masks and without gradients")
        return original(layer, src, src_mask, src_key_padding_mask, is_causal)  # type: ignore[no-any-return]

    return forward


def attention(device: VirtualCard, original: _Forward) -> _Forward:
    """``MultiheadAttention.forward``, whose function without gradients is not followed."""

    @functools.wraps(original)
    def forward(module: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if query.is_cuda and not module.training and _takes_no_gradients(module, query):
            device.estimate("MultiheadAttention without gradients")
        return original(module, query, *args, **kwargs)

    return forward


def _takes_no_gradients(module: torch.nn.Module, source: torch.Tensor) -> bool:
    tensors = (source, *module.parameters())
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    return torch.backends.mha.get_fastpath_enabled() and not wanted and not torch.is_autocast_enabled()


def _is_fused(layer: Any, src: torch.Tensor) -> bool:
    heads = layer.self_attn
    hooked = any(
        len(getattr(m, "_forward_hooks", {})) + len(getattr(m, "_forward_pre_hooks", {})) for m in layer.modules()
    )
    return (
        not layer.training
        and src.dim() == 3
        and not src.is_nested
        and heads.batch_first
        and heads.in_proj_bias is not None
        and heads._qkv_same_embed_dim
        and heads.num_heads % 2 == 0
        and bool(layer.activation_relu_or_gelu)
        and layer.norm1.eps == layer.norm2.eps
        and not hooked
        and _takes_no_gradients(layer, src)
    )


def _encoded(layer: Any, src: torch.Tensor) -> torch.Tensor:
    """Tensors die where those of the C++ function do."""
    x = _normed(layer.norm1, src) if layer.norm_first else src
    x = _attended(layer.self_attn, x)
    x.add_(src)
    if not layer.norm_first:
        x = _normed(layer.norm1, x)
    kept = x
    if layer.norm_first:
        x = _normed(layer.norm2, x)
    inner = functional.linear(x, layer.linear1.weight, layer.linear1.bias)  # the activation is part of the product
    x = functional.linear(inner, layer.linear2.weight, layer.linear2.bias)
    del inner
    x.add_(kept)
    if not layer.norm_first:
        x = _normed(layer.norm2, x)
    return x


def _normed(norm: Any, x: torch.Tensor) -> torch.Tensor:
    return functional.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def _attended(heads: Any, x: torch.Tensor) -> torch.Tensor:
    batch, length, width = x.shape
    joined = functional.linear(x, heads.in_proj_weight, heads.in_proj_bias)
    query, key, value = (
        t.view(batch, length, heads.num_heads, width // heads.num_heads).transpose(1, 2) for t in joined.chunk(3, -1)
    )
    seen = functional.scaled_dot_product_attention(query, key, value)
    del query, key, value
    out = functional.linear(seen.transpose(1, 2).reshape(batch, -1, width), heads.out_proj.weight, heads.out_proj.bias)
    del seen, joined
    return out
