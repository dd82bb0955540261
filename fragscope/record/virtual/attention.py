"""``scaled_dot_product_attention``: the kernel that a card would pick, and what that one allocates.

Torch picks by the device of its tensors, and for metadata takes the one that multiplies matrices, whose scores are the
largest tensor of all. So the choice is made here, by the card's capability, and the kernel's own operator is called.
What kernels take besides their outputs is told by ``scratch/attention_kernels.py``.

Source: ``select_sdp_backend`` and the ``can_use_*`` functions of aten/src/ATen/native/transformers/cuda/sdp_utils.cpp,
``scaled_dot_product_attention`` in aten/src/ATen/native/transformers/attention.cpp; the order of cuDNN's allocations,
and that an H100 takes it, recorded with torch 2.11 (``sdpa`` of tests/data/footprints).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from fragscope.record.virtual.card import VirtualCard
from fragscope.record.virtual.scratch.attention_kernels import cudnn_workspace
from fragscope.record.virtual.storages import Place, is_transformed

_META = torch.device("meta")  # of the card, where operators of the program run
_HALF = (torch.float16, torch.bfloat16)
_CUDNN_FIRST = (2, 11)
"""From this torch on an H100 was seen to take cuDNN's kernel; a 2.9 was seen not to."""
_CUDNN = "aten::_scaled_dot_product_cudnn_attention"
_NAMES = {0: "math", 1: "flash", 2: "mem_efficient", 3: "cudnn"}  # of SDPBackend in torch/nn/attention
_PLAIN = [1, 2, 0, 3]


class Attention:
    """Attention on one virtual card."""

    def __init__(self, device: VirtualCard) -> None:
        self._device = device

    def __call__(
        self,
        plain: Callable[..., torch.Tensor],
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        """As ``torch.nn.functional.scaled_dot_product_attention``; ``plain`` is that function.

        Raises:
            RuntimeError: the tensors do not fit each other; as torch does.
        """
        autocast = self._device.autocast
        lower = autocast.dtype()
        if lower is not None:  # the kernel is picked after the casts, of which the last argument's comes first
            attn_mask, value, key, query = (autocast.cast(t, lower) for t in (attn_mask, value, key, query))
        if self._is_refused(query, key, value, attn_mask):
            return plain(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        kernel = self.pick(query, key, value, attn_mask, dropout_p, is_causal=is_causal, enable_gqa=enable_gqa)
        scaled = {"scale": scale}
        if kernel == "math":
            if any(t.is_nested for t in (query, key, value)):
                return plain(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
            return _multiplied(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        tensors = [t for t in (query, key, value, attn_mask) if t is not None]
        keeps_sums = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
        bias = _additive(attn_mask, query.dtype)
        if kernel == "flash":
            return _flash(query, key, value, dropout_p, is_causal, scale)
        if kernel == "mem_efficient":
            bias = _aligned(bias, query, key)
            run = torch.ops.aten._scaled_dot_product_efficient_attention
            out: torch.Tensor = run(query, key, value, bias, keeps_sums, dropout_p, is_causal, **scaled)[0]
            return out
        is_taken_apart = any(is_transformed(t) for t in tensors)
        if keeps_sums or is_taken_apart:
            if not keeps_sums:
                self._device.estimate(f"{_CUDNN} in torch.func, without gradients")
            run = torch.ops.aten._scaled_dot_product_cudnn_attention
            return run(query, key, value, bias, keeps_sums, dropout_p, is_causal, False, **scaled)[0]  # type: ignore[no-any-return]
        # Without gradients it writes no sums, which torch's rule for its shapes makes all the same.
        with self._device.temporaries([8, 8]):  # seed and offset of the random numbers
            out = _like(query, (*query.shape[:3], value.shape[-1]))
            self._device.launched(_CUDNN, tensors, [out])
            self._device.follow_plan(_CUDNN, cudnn_workspace(query, key, self._device.card), [])
        return out

    def _is_refused(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> bool:
        """Whether torch's own function says what is wrong, which it asks first, too.

        Raises:
            RuntimeError: tensors are on several devices, which only the virtual card can name.

        Source: ``validate_sdpa_input`` in aten/src/ATen/native/transformers/attention.cpp; of the mask, what the
        dispatcher asks of the arguments of one kernel.
        """
        tensors = (query, key, value)
        if not query.dtype == key.dtype == value.dtype:
            return True
        shown = [self._shown(t) for t in tensors]
        if len(set(shown)) > 1:
            raise RuntimeError(
                "Expected query, key, and value to have the same device type, but got "
                f"query.device: {shown[0]} key.device: {shown[1]} and value.device: {shown[2]} instead."
            )
        if mask is not None and mask.dim() and (where := self._shown(mask)) != shown[0]:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, {shown[0]} and "
                f"{where}! (attn_mask of scaled_dot_product_attention)"
            )
        allowed = (torch.bool, torch.float32, query.dtype)
        return any(t.dim() < 2 for t in tensors) or (mask is not None and mask.dtype not in allowed)

    def _shown(self, tensor: torch.Tensor) -> str:
        """The device that a tensor seems to be on."""
        place = self._device.storages.place(tensor)
        return "cuda:0" if place is Place.CARD else "cpu" if place is Place.HOST else str(tensor.device)

    def pick(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        dropout: float,
        *,
        is_causal: bool,
        enable_gqa: bool,
    ) -> str:
        """``flash``, ``mem_efficient``, ``cudnn`` or ``math``."""
        call = _Call(self._device.card.capability, query, key, value, mask, dropout, is_causal, enable_gqa)
        order = torch._C._get_sdp_priority_order()
        is_recent = tuple(int(n) for n in torch.__version__.split(".")[:2]) >= _CUDNN_FIRST
        if order[:4] == _PLAIN and call.capability in ((9, 0), (10, 0)) and is_recent:
            order = [3, 1, 2, 0]
        for number in order:
            name = _NAMES.get(number)
            if name is not None and name != "math" and _is_enabled(name) and getattr(call, f"fits_{name}")():
                return name
        if not _is_enabled("math"):
            raise RuntimeError("No viable backend for scaled_dot_product_attention was found. ")
        return "math"


class _Call:
    """One call, as the kernels' conditions see it."""

    def __init__(
        self,
        capability: tuple[int, int],
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        dropout: float,
        is_causal: bool,
        enable_gqa: bool,
    ) -> None:
        self.capability = capability
        self._tensors = (query, key, value)
        self._mask, self._dropout, self._is_causal = mask, dropout, is_causal
        self._is_plain = all(t.dim() == 4 and t.shape[2] > 0 for t in self._tensors)
        if not self._is_plain:
            return
        self._dims = (query.shape[3], key.shape[3], value.shape[3])
        same_heads = query.shape[1] == key.shape[1] == value.shape[1]
        shares_heads = enable_gqa and query.shape[1] % key.shape[1] == 0 and key.shape[1] == value.shape[1]
        self._same_heads, self._fits_heads = same_heads, same_heads or shares_heads
        same_batch = query.shape[0] == key.shape[0] == value.shape[0]
        same_dtype = query.dtype == key.dtype == value.dtype
        is_dense = all(t.stride(3) == 1 or t.shape[3] == 1 for t in self._tensors)
        is_dense = is_dense and (mask is None or not mask.dim() or mask.stride(-1) == 1)
        self._is_plain = same_batch and same_dtype and is_dense
        self._dtype = query.dtype

    def fits_flash(self) -> bool:
        if not self._is_plain or not self._fits_heads or self._mask is not None:
            return False
        head = self._dims[0]
        if len(set(self._dims)) > 1 or head > 256 or self._dtype not in _HALF:
            return False
        if not (8, 0) <= self.capability <= (12, 1):
            return False
        is_small = (8, 6) <= self.capability <= (8, 9) or (12, 0) <= self.capability <= (12, 1)
        trains = any(t.requires_grad for t in self._tensors)
        if trains and is_small and (192 < head <= 224 or (head > 224 and self._dropout > 0)):
            return False
        return not self._is_causal or self._tensors[0].shape[2] == self._tensors[1].shape[2]

    def fits_mem_efficient(self) -> bool:
        if not self._is_plain or not self._same_heads or not (5, 0) <= self.capability <= (12, 1):
            return False
        if self._dtype not in (*_HALF, torch.float32) or (self._dtype == torch.bfloat16 and self.capability < (8, 0)):
            return False
        is_half = self._dtype in _HALF
        uses_tensor_cores = self.capability >= (8, 0) or (self.capability >= (7, 0) and is_half)
        alignment = 4 if self.capability >= (8, 0) else 1
        if uses_tensor_cores:
            alignment = max(alignment, 8 if is_half else 4)
        head, of_key, of_value = self._dims
        return head == of_key and all(n > 0 and n % alignment == 0 for n in (head, of_value))

    def fits_cudnn(self) -> bool:
        if not self._is_plain or not self._fits_heads or self._dtype not in _HALF:
            return False
        if not (8, 0) <= self.capability <= (12, 1):
            return False
        limit = 256 if self.capability == (9, 0) else 128
        rows, columns = self._tensors[0].shape[2], self._tensors[1].shape[2]
        if self._dims[0] != self._dims[1] or not self._fits_cudnn_mask(rows, columns):
            return False
        if columns == 1 or (rows == 1 and self._dropout > 0):
            return False
        if torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled():
            return False
        return all(n <= limit and n % 8 == 0 for n in self._dims)

    def _fits_cudnn_mask(self, rows: int, columns: int) -> bool:
        """Source: ``check_attn_mask_shape`` in aten/src/ATen/native/transformers/sdp_utils_cpp.h."""
        mask = self._mask
        if mask is None:
            return True
        if mask.requires_grad or mask.dim() not in (2, 4):
            return False
        wanted = (*self._tensors[0].shape[:2], rows, columns)[-mask.dim() :]
        return all(given in (1, size) for given, size in zip(mask.shape, wanted, strict=True))


def _like(query: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """A new tensor whose dimensions lie in memory in the order of the query's."""
    strides, step = [0] * len(shape), 1
    for dim in sorted(range(len(shape)), key=query.stride().__getitem__):
        strides[dim], step = step, step * shape[dim]
    return torch.empty_strided(shape, strides, dtype=query.dtype, device=_META)


def _is_enabled(name: str) -> bool:
    return bool(getattr(torch._C, f"_get_{name}_sdp_enabled")())


def _additive(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """Kernels add masks to scores: one of booleans becomes numbers of the query's type."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    kept = torch.scalar_tensor(0.0, dtype=dtype, device=_META)
    masked = torch.scalar_tensor(-math.inf, dtype=dtype, device=_META)
    added = torch.where(mask, kept, masked)
    del masked, kept
    return added


def _aligned(bias: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor | None:
    """Rows of a mask begin at multiples of eight elements."""
    if bias is None:
        return None
    if any(stride % 8 for stride in bias.stride()[:-1]):
        length = bias.shape[-1]
        bias = torch.nn.functional.pad(bias, (0, 8 - length % 8))[..., :length]
    return bias.expand(*query.shape[:3], key.shape[2])


def _usual_scale(query: torch.Tensor) -> float:
    head = query.shape[-1]
    return 1 / math.sqrt(head) if head else math.inf


def _multiplied(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    is_causal: bool,
    scale: float | None,
    shares_heads: bool,
) -> torch.Tensor:
    """By matrix products, in float32. Tensors die in the order in which those of the C++ function do.

    Torch's own function writes the mask into the scores only where no dispatch mode is active, and picks the kernel of
    dropout by the device.

    Source: ``_scaled_dot_product_attention_math`` in aten/src/ATen/native/transformers/attention.cpp.
    """
    given = query.dtype
    if given in _HALF and not torch._C._get_math_sdp_allow_fp16_bf16_reduction():
        query, key, value = (t.to(torch.float32) for t in (query, key, value))
    factor = math.sqrt(abs(scale) if scale is not None else _usual_scale(query))
    scaled = query * (-factor if scale is not None and scale < 0 else factor)
    if is_causal and mask is not None:
        raise RuntimeError("_scaled_dot_product_attention: Explicit attn_mask should not be set when is_causal=True")
    if is_causal:
        seen = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=_META).tril()
        mask = _additive(seen, scaled.dtype)
        del seen
    else:
        mask = _additive(mask, scaled.dtype)
    if shares_heads and not query.shape[-3] == key.shape[-3] == value.shape[-3]:
        heads = query.shape[-3]
        if heads % key.shape[-3] or heads % value.shape[-3]:
            raise RuntimeError("Number of heads in key and value must divide the number of heads in ")
        key, value = (t.repeat_interleave(heads // t.shape[-3], dim=-3) for t in (key, value))
    scores = torch.matmul(scaled, key.transpose(-2, -1) * factor)
    if mask is not None:
        scores.add_(mask)
    weights = torch.ops.aten._safe_softmax(scores, -1)
    del scores
    if dropout > 0:
        weights = torch.ops.aten.native_dropout(weights, dropout, True)[0]
    kept = weights.to(given)
    product = torch.matmul(weights, value)
    out = product.to(given)
    del product, weights, scaled, mask, value, key, query, kept
    return out


def _flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout: float, is_causal: bool, scale: float | None
) -> torch.Tensor:
    """Heads are padded to a multiple of eight."""
    head = query.shape[-1]
    scale = scale if scale is not None else _usual_scale(query)
    if head % 8:
        query, key, value = (torch.nn.functional.pad(t, (0, 8 - head % 8)) for t in (query, key, value))
    run: Any = torch.ops.aten._scaled_dot_product_flash_attention
    results = list(run(query, key, value, dropout, is_causal, False, scale=scale))
    out: torch.Tensor = results.pop(0)
    while results:  # in the order in which C++ lets go of them
        results.pop(0)
    return out[..., :head]
