"""Layers that torch runs in a function of its own where nothing is trained, if no mode asks for every call.

A ``TransformerEncoderLayer``, and a ``MultiheadAttention`` that is not asked for its weights, take the steps of that
function here, without masks and where a kernel of attention is there for the heads. Otherwise the layer's own steps are
taken and the case is estimated.

Source: ``TransformerEncoderLayer.forward`` in torch/nn/modules/transformer.py, ``MultiheadAttention.forward`` in
activation.py beside it; ``transformer_encoder_layer_forward`` and ``native_multi_head_attention_cuda`` in
aten/src/ATen/native/transformers. Recorded on an H100 with torch 2.11: the last part of ``encoder`` of
tests/gpu/model_programs.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from fragscope.record.virtual.card import VirtualCard

_Forward = Callable[..., Any]
_WHOLE = 8
"""Heads of a multiple of so many elements go to a kernel of attention."""
_TYPES = (torch.float32, torch.float16, torch.bfloat16)


def encoder_layer(device: VirtualCard, original: _Forward) -> _Forward:
    """``TransformerEncoderLayer.forward`` as on a card."""

    @functools.wraps(original)
    def forward(
        layer: Any, src: torch.Tensor, src_mask: Any = None, src_key_padding_mask: Any = None, is_causal: bool = False
    ) -> torch.Tensor:
        if not (src.is_cuda and _is_fused(layer, src)):
            return original(layer, src, src_mask, src_key_padding_mask, is_causal)  # type: ignore[no-any-return]
        if src_mask is not None or src_key_padding_mask is not None:
            device.estimate("TransformerEncoderLayer with masks and without gradients")
        elif _has_kernel(layer.self_attn, src):
            return _encoded(layer, src)
        else:
            device.estimate("TransformerEncoderLayer of such heads and without gradients")
        return original(layer, src, src_mask, src_key_padding_mask, is_causal)  # type: ignore[no-any-return]

    return forward


def attention(device: VirtualCard, original: _Forward) -> _Forward:
    """``MultiheadAttention.forward`` as on a card."""

    @functools.wraps(original)
    def forward(
        heads: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, key_padding_mask: Any = None,
        need_weights: bool = True, attn_mask: Any = None, average_attn_weights: bool = True, is_causal: bool = False,
    ) -> Any:  # fmt: skip
        masks = [m for m in (key_padding_mask, attn_mask) if m is not None]
        if query.is_cuda and query is key and key is value and _is_fused_alone(heads, query, masks):
            if not masks and not need_weights and _has_kernel(heads, query):
                return _attended(heads, query), None
            device.estimate("MultiheadAttention with masks, weights or such heads and without gradients")
        return original(
            heads, query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
        )

    return forward


def _is_fused_alone(heads: Any, query: torch.Tensor, masks: list[torch.Tensor]) -> bool:
    return (
        not heads.training
        and query.dim() == 3
        and heads.batch_first
        and heads._qkv_same_embed_dim
        and heads.in_proj_bias is not None
        and heads.in_proj_bias.dtype == heads.in_proj_weight.dtype == query.dtype
        and heads.num_heads % 2 == 0
        and heads.bias_k is None
        and heads.bias_v is None
        and not heads.add_zero_attn
        and not any(m.is_floating_point() for m in masks)
        and _takes_no_gradients(heads, query)
    )


def _has_kernel(heads: Any, query: torch.Tensor) -> bool:
    """Whether the heads are not multiplied one matrix after the other."""
    return (
        heads.head_dim % _WHOLE == 0
        and query.dtype in _TYPES
        and not query.is_nested
        and torch.backends.cuda.mem_efficient_sdp_enabled()
    )


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
