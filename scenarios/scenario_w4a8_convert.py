"""W4A8 expert weights, brought into the form of the CUTLASS kernels after loading.

Source: vLLM #40310. A checkpoint's unsigned 4-bit values become signed ones on torch's stream, then a kernel on the
legacy default stream encodes them. vLLM works on a stream of its own making (``current_stream``, #29207), which does
not wait for the default stream, nor it for that. Four forms of upstream's sequence: without a word about order
(0.19.0), with a synchronisation before each encode (0.20.0), the same as one function that returns all results at
once (0.33.0), and 0.20.0 with the order that is still missing there, before the scales are packed (proposed).
``vllm`` is vLLM's own function as it is installed, with the kernels of its extension declared. ``bounded`` is a
proposal: kernels on the current stream, in place, through scratch for one expert's values and for the scales of a few.

The kernels of upstream's extension are declared, and computed in plain torch where numbers are compared. Of the encode
the values are computed, not their order within an expert, which no variant decides.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol
from unittest import mock

import numpy as np
import torch
from moe_models import preset

import fragscope

MODULE = "vllm.model_executor.layers"
_FIRST = (f"{MODULE}.fused_moe",)
VLLM_CONVERT = fragscope.Installed(
    "vllm", f"{MODULE}.fused_moe.oracle.w4a8:convert_to_w4a8_moe_kernel_format", first=_FIRST
)
VLLM_BACKEND = fragscope.Installed("vllm", f"{MODULE}.fused_moe.oracle.w4a8:W4A8MoeBackend", first=_FIRST)
VLLM_CONFIG = fragscope.Installed("vllm", "vllm.config:VllmConfig", first=_FIRST)
VLLM_DEVICE = fragscope.Installed("vllm", "vllm.config:DeviceConfig", first=_FIRST)
VLLM_COMPILATION = fragscope.Installed("vllm", "vllm.config:CompilationConfig", first=_FIRST)
VLLM_CURRENT_CONFIG = fragscope.Installed("vllm", "vllm.config:set_current_vllm_config", first=_FIRST)

GROUP = 128  # values that share a scale
PER_INT32 = 8  # 4-bit values
SCALE_COPIES = 8  # multiples of a scale that the kernel looks up
LAYOUT_WIDTH = 3  # int32 an expert's layout takes: w4a8_grouped_mm_entry.cu
FP8_MAX = 448.0
EXPERTS_AT_ONCE = 16  # whose scales the proposal converts together
LEAST_SCALE = 1 / (FP8_MAX * 512)

PRESETS = {
    "kimi-k2-tp8": preset("kimi-k2", tp=8, layers=2),
    "deepseek-v3-tp2": preset("deepseek-v3", tp=2, layers=1),
    "qwen3-235b-a22b-tp2": preset("qwen3-235b-a22b", tp=2, layers=2),
}


@dataclass
class Layer:
    """One layer's expert weights, as loaded and then as converted.

    w13 int32 ``[experts, 2 x intermediate, hidden/8]`` and w2 int32 ``[experts, hidden, intermediate/8]``: eight 4-bit
    values each; s13 and s2, bfloat16 ``[experts, rows, columns/128]``, then flat float8_e4m3fn, eight for each scale.

    Attributes:
        made: what the conversion adds: a channel scale a row, float32, layouts and strides.
    """

    w13: torch.Tensor
    w2: torch.Tensor
    s13: torch.Tensor
    s2: torch.Tensor
    made: dict[str, torch.Tensor] = field(default_factory=dict)


class Memory(Protocol):
    """Device memory past torch's allocator."""

    def free(self) -> None:
        """Give it back; waits for the card."""


class Extension(Protocol):
    """Where the kernels of upstream's extension run."""

    def kernel(
        self, what: str, *, reads: Sequence[torch.Tensor] = (), writes: Sequence[torch.Tensor] = (), stream: Any = None
    ) -> None:
        """A kernel is launched; on the legacy default stream where none is given."""

    def computes(self, run: Callable[[], object]) -> None:
        """What that kernel does."""

    def malloc(self, size: int) -> Memory:
        """``cudaMalloc``."""

    def synchronize(self) -> None:
        """``cudaDeviceSynchronize``."""

    def stream(self) -> Any:
        """The current stream."""


class Declared:
    """Kernels are declared to a case, and nothing is computed."""

    def __init__(self, case: fragscope.Case) -> None:
        self.kernel = case.kernel
        self.malloc: Callable[[int], Memory] = partial(case.device_memory, how="cudaMalloc")
        self.synchronize = torch.cuda.synchronize
        self.stream = torch.cuda.current_stream

    def computes(self, run: Callable[[], object]) -> None:
        """Not here."""


class Computed:
    """Kernels are computed, on whatever device their tensors are, one after the other."""

    def kernel(
        self, what: str, *, reads: Sequence[torch.Tensor] = (), writes: Sequence[torch.Tensor] = (), stream: Any = None
    ) -> None:
        """All run on the current stream."""

    def computes(self, run: Callable[[], object]) -> None:
        """Here and now."""
        run()

    def malloc(self, size: int) -> Memory:
        """Nothing is taken."""
        return self

    def free(self) -> None:
        """Nothing was taken."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def stream(self) -> Any:
        """None has a meaning here."""
        return None


# --- upstream's steps -------------------------------------------------------------------------------------------------


def make_strides(layer: Layer, experts: int, hidden: int, intermediate: int) -> None:
    """Strides of all operands, one or two int64 an expert."""
    for name, value in (("a1", hidden), ("a2", intermediate), ("c1", 2 * intermediate)):
        layer.made[name] = torch.full((experts,), value, device=layer.w13.device, dtype=torch.int64)
    for name, value in (("s1", 2 * intermediate), ("s2", hidden)):
        layer.made[name] = torch.zeros((experts, 2), device=layer.w13.device, dtype=torch.int64)
        layer.made[name][:, 0] = value


def signed_in_place(t: torch.Tensor) -> None:
    """Unsigned 4-bit values, of which 8 is zero, become signed ones: value by value, through copies of all of them."""
    for i in range(PER_INT32):
        shift = 4 * i
        nibble = (t >> shift) & 0xF
        t &= ~(0xF << shift)
        t |= ((nibble - 8) & 0xF) << shift


def encoded(t: torch.Tensor) -> torch.Tensor:
    """Bytes of two values each: 1 to 7 become 8 minus themselves, so that both signs share their low three bits."""
    low, high = t.view(torch.uint8) & 0xF, t.view(torch.uint8) >> 4
    low, high = (torch.where((v > 0) & (v < 8), 8 - v, v) for v in (low, high))
    return ((high << 4) | low).view(torch.int32)


def encode(t: torch.Tensor, extension: Extension) -> tuple[torch.Tensor, torch.Tensor]:
    """``cutlass_encode_and_reorder_int4b_grouped``: the encoded values, and where the kernel finds them."""
    out = torch.empty_like(t)
    extension.kernel("unified_encode_int4b", reads=[t], writes=[out])
    extension.computes(lambda: out.copy_(encoded(t)))
    extension.synchronize()
    for expert in out.unbind():
        scratch = extension.malloc(expert.nbytes)
        extension.kernel("reorder_tensor", reads=[expert])
        extension.synchronize()
        extension.kernel("cudaMemcpy from the scratch", writes=[expert])
        scratch.free()
    return out, torch.zeros(t.shape[0], LAYOUT_WIDTH, dtype=torch.int32).to(t.device)


def quantize(x: torch.Tensor, fp8: torch.Tensor, scale: torch.Tensor) -> None:
    """Each row by the largest of its values."""
    # By a number on the host, torch's CUDA kernel would multiply by the reciprocal, which rounds otherwise.
    largest = torch.full_like(scale, FP8_MAX)
    scale.copy_((x.float().abs().amax(1, keepdim=True) / largest).clamp(min=LEAST_SCALE))
    fp8.copy_((x.float() / scale).clamp(-FP8_MAX, FP8_MAX).to(fp8.dtype))


def quantized(x: torch.Tensor, extension: Extension) -> tuple[torch.Tensor, torch.Tensor]:
    """``scaled_fp8_quant`` by rows."""
    fp8 = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty((x.shape[0], 1), dtype=torch.float32, device=x.device)
    extension.kernel("scaled_fp8_quant", reads=[x], writes=[fp8, scale], stream=extension.stream())
    extension.computes(lambda: quantize(x, fp8, scale))
    return fp8, scale


def scales_to_fp8(scales: torch.Tensor, extension: Extension) -> tuple[torch.Tensor, torch.Tensor]:
    """An eighth of each scale as float8, so that 8 times one still fits, and what makes it good, a number a row."""
    fp8, channel = quantized(scales.view(-1, scales.shape[-1]), extension)
    fp8 = (fp8.float() / 8.0).to(torch.float8_e4m3fn)
    channel *= 8.0
    return fp8.view(scales.shape), channel.view(*scales.shape[:-1], -1)


def multiples(scales: torch.Tensor) -> torch.Tensor:
    """-8 to -1 times each scale, which the kernel looks up by the low three bits of a value."""
    factors = torch.arange(-SCALE_COPIES, 0, dtype=torch.float32, device=scales.device)
    return (scales.float().reshape(-1, 1) * factors).to(torch.float8_e4m3fn).reshape(-1)


def pack(scales: torch.Tensor, extension: Extension) -> torch.Tensor:
    """``cutlass_pack_scale_fp8``: to the host, multiplied there, and back; both copies are on the default stream."""
    packed = torch.empty(scales.numel() * SCALE_COPIES, dtype=scales.dtype, device=scales.device)
    host: list[torch.Tensor] = []
    extension.kernel("cudaMemcpy of scales to the host", reads=[scales])
    extension.computes(lambda: host.append(scales.cpu()))
    extension.kernel("cudaMemcpy of packed scales to the card", writes=[packed])
    extension.computes(lambda: packed.copy_(multiples(host[0])))
    return packed


Convert = Callable[[Layer, Extension], None]


def one_after_the_other(layer: Layer, extension: Extension, *, before_encode: bool, before_pack: bool) -> None:
    """Each result takes its place as soon as it is there (0.19.0, 0.20.0)."""
    make_strides(layer, layer.w13.shape[0], layer.w2.shape[1], layer.w13.shape[1] // 2)
    signed_in_place(layer.w13)
    if before_encode:
        extension.synchronize()
    w13, layer.made["b1"] = encode(layer.w13, extension)
    layer.w13 = w13
    signed_in_place(layer.w2)
    if before_encode:
        extension.synchronize()
    w2, layer.made["b2"] = encode(layer.w2, extension)
    layer.w2 = w2
    s13, layer.made["channel13"] = scales_to_fp8(layer.s13, extension)
    s2, layer.made["channel2"] = scales_to_fp8(layer.s2, extension)
    turned = s13.permute(0, 2, 1).contiguous()
    if before_pack:
        extension.synchronize()
    layer.s13 = pack(turned, extension)
    del turned
    turned = s2.permute(0, 2, 1).contiguous()
    if before_pack:
        extension.synchronize()
    layer.s2 = pack(turned, extension)


def unsynchronised(layer: Layer, extension: Extension) -> None:
    """Nothing orders the kernels of the two streams."""
    one_after_the_other(layer, extension, before_encode=False, before_pack=False)


def synchronised(layer: Layer, extension: Extension) -> None:
    """The card is waited for before each encode."""
    one_after_the_other(layer, extension, before_encode=True, before_pack=False)


def ordered(layer: Layer, extension: Extension) -> None:
    """And before the scales are packed."""
    one_after_the_other(layer, extension, before_encode=True, before_pack=True)


def all_at_once(layer: Layer, extension: Extension) -> None:
    """All results exist before the first takes its place; what fits is copied into the old parameter (0.33.0)."""
    take(layer, _results(layer, extension))


def take(layer: Layer, results: dict[str, torch.Tensor]) -> None:
    """Results take their places in the layer."""
    for name in ("w13", "w2"):
        getattr(layer, name).copy_(results[name])
    layer.s13, layer.s2 = results["s13"], results["s2"]
    layer.made.update({name: results[name] for name in ("b1", "b2", "channel13", "channel2")})
    make_strides(layer, layer.w13.shape[0], layer.w2.shape[1], layer.w13.shape[1] // 2)


def _results(layer: Layer, extension: Extension) -> dict[str, torch.Tensor]:
    signed_in_place(layer.w13)
    extension.synchronize()
    w13, b1 = encode(layer.w13, extension)
    signed_in_place(layer.w2)
    extension.synchronize()
    w2, b2 = encode(layer.w2, extension)
    s13, channel13 = scales_to_fp8(layer.s13, extension)
    s2, channel2 = scales_to_fp8(layer.s2, extension)
    packed13 = pack(s13.permute(0, 2, 1).contiguous(), extension)
    packed2 = pack(s2.permute(0, 2, 1).contiguous(), extension)
    return {
        "w13": w13, "w2": w2, "b1": b1, "b2": b2, "s13": packed13, "s2": packed2,
        "channel13": channel13, "channel2": channel2,
    }  # fmt: skip


# --- upstream's own code ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def extension_of_vllm(extension: Extension) -> Iterator[None]:
    """The three operators of vLLM's compiled extension that its Python code calls, in its place."""

    def quant(fp8: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, _upper_bound: None) -> None:
        extension.kernel("scaled_fp8_quant", reads=[x], writes=[fp8, scale], stream=extension.stream())
        extension.computes(lambda: quantize(x, fp8, scale))

    operators = {
        "cutlass_encode_and_reorder_int4b_grouped": partial(encode, extension=extension),
        "cutlass_pack_scale_fp8": partial(pack, extension=extension),
        "dynamic_per_token_scaled_fp8_quant": quant,
    }
    with contextlib.ExitStack() as stack:
        for name, operator in operators.items():
            stack.enter_context(mock.patch.object(torch.ops._C, name, operator, create=True))
        yield


def vllm_convert(layer: Layer, extension: Extension) -> None:
    """What the installed vLLM does; results take their places as in ``all_at_once``."""
    # Otherwise vLLM would compile the quantisation with torch.compile, which does the same in a kernel of its own.
    kernels = VLLM_COMPILATION.load()(custom_ops=["all"])
    config = VLLM_CONFIG.load()(device_config=VLLM_DEVICE.load()("cuda"), compilation_config=kernels)
    with extension_of_vllm(extension), VLLM_CURRENT_CONFIG.load()(config):
        made = VLLM_CONVERT.load()(VLLM_BACKEND.load().CUTLASS, None, GROUP, layer.w13, layer.w2, layer.s13, layer.s2)
    names = ("w13", "w2", "s13", "s2", "channel13", "channel2", "b1", "b2")
    results = dict(zip(names, made, strict=True))
    del made
    take(layer, results)


# --- a proposal -------------------------------------------------------------------------------------------------------

_SIGN_BITS = -0x77777778  # 0x88888888 as int32


def bounded(layer: Layer, extension: Extension) -> None:
    """In place, on the current stream, which orders everything, through bounded scratch.

    Subtracting 8 from a 4-bit value flips its highest bit; the encode maps each byte to one, so that it needs no second
    tensor; rows of scales do not depend on each other, so that some experts can be done at a time.
    """
    make_strides(layer, layer.w13.shape[0], layer.w2.shape[1], layer.w13.shape[1] // 2)
    stream = extension.stream()
    scratch = torch.empty(max(layer.w13[0].nbytes, layer.w2[0].nbytes), dtype=torch.uint8, device=layer.w13.device)
    for t, name in ((layer.w13, "b1"), (layer.w2, "b2")):
        t.bitwise_xor_(_SIGN_BITS)
        extension.kernel("unified_encode_int4b", writes=[t], stream=stream)
        extension.computes(partial(encode_in_place, t))
        for expert in t.unbind():
            part = scratch[: expert.nbytes]
            extension.kernel("reorder_tensor", reads=[expert], writes=[part], stream=stream)
            extension.kernel("copy from the scratch", reads=[part], writes=[expert], stream=stream)
        layer.made[name] = torch.zeros(t.shape[0], LAYOUT_WIDTH, dtype=torch.int32).to(t.device)
    del scratch, part
    layer.s13, layer.made["channel13"] = packed_in_parts(layer.s13, extension)
    layer.s2, layer.made["channel2"] = packed_in_parts(layer.s2, extension)


def packed_in_parts(scales: torch.Tensor, extension: Extension) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed scales and channel scales, straight into their places."""
    experts, rows, groups = scales.shape
    packed = torch.empty(experts, groups * rows * SCALE_COPIES, dtype=torch.float8_e4m3fn, device=scales.device)
    channel = torch.empty(experts, rows, 1, dtype=torch.float32, device=scales.device)
    for i in range(0, experts, EXPERTS_AT_ONCE):
        some = slice(i, i + EXPERTS_AT_ONCE)
        fp8, channel[some] = scales_to_fp8(scales[some], extension)
        turned, out = fp8.permute(0, 2, 1).contiguous(), packed[some].view(-1)
        extension.kernel("pack_scale_fp8", reads=[turned], writes=[out], stream=extension.stream())
        extension.computes(partial(pack_into, out, turned))
    return packed.view(-1), channel


def encode_in_place(t: torch.Tensor) -> None:
    """The encode, where it is."""
    t.copy_(encoded(t))


def pack_into(out: torch.Tensor, scales: torch.Tensor) -> None:
    """The packing, on the card."""
    out.copy_(multiples(scales))


# --- the scenario -----------------------------------------------------------------------------------------------------


def load(case: fragscope.Case, convert: Convert) -> None:
    """Make all layers on a stream of torch's pool, then convert them one after the other."""

    def empty(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(case.experts, rows, columns, dtype=dtype, device=case.device)

    with torch.cuda.stream(torch.cuda.Stream()):
        layers = [
            Layer(
                w13=empty(2 * case.intermediate, case.hidden // PER_INT32, torch.int32),
                w2=empty(case.hidden, case.intermediate // PER_INT32, torch.int32),
                s13=empty(2 * case.intermediate, case.hidden // GROUP, torch.bfloat16),
                s2=empty(case.hidden, case.intermediate // GROUP, torch.bfloat16),
            )
            for _ in range(case.layers)
        ]
        with case.measure():
            for layer in layers:
                convert(layer, Declared(case))


UNORDERED = fragscope.Expect("hazard", device="virtual")
"""A recording on a card says what it takes, not what has no order."""


METHOD = "CompressedTensorsW4A8Fp8MoEMethod.process_weights_after_loading"


@fragscope.scenario(
    "w4a8-convert",
    presets=PRESETS,
    variant="unsynchronised",
    source="vLLM #40310, before",
    expect=UNORDERED,
    replays=fragscope.Replays(
        "vllm",
        "0.19.0",
        f"{MODULE}.quantization.compressed_tensors.compressed_tensors_moe:{METHOD}",
        "a6e2a68ead7dc2ffcacd51f0",
    ),
)
def w4a8_convert(case: fragscope.Case) -> None:
    """Encodes on the default stream what another stream may still be converting."""
    load(case, unsynchronised)


@w4a8_convert.variant(
    "synchronised",
    role="fixed",
    expect=UNORDERED,
    replays=fragscope.Replays(
        "vllm",
        "0.20.0",
        f"{MODULE}.quantization.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe_w4a8_fp8:{METHOD}",
        "7dd1ef67c943d21b53f55932",
    ),
)
def _(case: fragscope.Case) -> None:
    """The card is waited for before each encode (vLLM 0.20.0); packing of the scales has no order yet."""
    load(case, synchronised)


@w4a8_convert.variant(
    "all-at-once",
    role="newest",
    expect=UNORDERED,
    replays=fragscope.Replays(
        "vllm",
        "0.33.0",
        f"{MODULE}.fused_moe.oracle.w4a8:convert_to_w4a8_moe_kernel_format",
        "c5c6ed6c3d846d2c3b04109b",
    ),
)
def _(case: fragscope.Case) -> None:
    """All results before the first takes its place (vLLM 0.33.0); packing of the scales has no order yet."""
    load(case, all_at_once)


@w4a8_convert.installed("vllm", VLLM_CONVERT, expect=UNORDERED)
def _(case: fragscope.Case) -> None:
    """The function of vLLM, as it is installed."""
    load(case, vllm_convert)


@w4a8_convert.variant("ordered", role="proposed")
def _(case: fragscope.Case) -> None:
    """0.20.0, and the card is waited for before the scales are packed."""
    load(case, ordered)


@w4a8_convert.variant("bounded", role="proposed")
def _(case: fragscope.Case) -> None:
    """In place on the current stream, through bounded scratch."""
    load(case, bounded)


CONVERSIONS: dict[str, Convert] = {
    "unsynchronised": unsynchronised,
    "synchronised": synchronised,
    "all-at-once": all_at_once,
    "vllm": vllm_convert,
    "ordered": ordered,
    "bounded": bounded,
}


def random_layer(experts: int, hidden: int, intermediate: int) -> Layer:
    """Random values and scales, on the host."""
    generator = torch.Generator().manual_seed(40310)

    def values(rows: int, columns: int) -> torch.Tensor:
        shape = (experts, rows, columns // 2)
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).view(torch.int32)

    def scales(rows: int, columns: int) -> torch.Tensor:
        return torch.rand((experts, rows, columns // GROUP), generator=generator).pow(4).to(torch.bfloat16)

    return Layer(
        values(2 * intermediate, hidden),
        values(hidden, intermediate),
        scales(2 * intermediate, hidden),
        scales(hidden, intermediate),
    )


def results_of(layer: Layer) -> list[torch.Tensor]:
    """What a converted layer holds besides layouts and strides."""
    return [layer.w13, layer.w2, layer.s13, layer.s2, layer.made["channel13"], layer.made["channel2"]]


@w4a8_convert.numeric
def outputs(variant: str, device: str) -> Sequence[torch.Tensor]:
    """A variant's results for small random weights, its kernels computed one after the other."""
    layer = random_layer(*_SMALL)
    layer = Layer(layer.w13.to(device), layer.w2.to(device), layer.s13.to(device), layer.s2.to(device))
    CONVERSIONS[variant](layer, Computed())
    return results_of(layer)


_SMALL = (3, 512, 256)  # experts, hidden, intermediate


@w4a8_convert.reference
def reference(device: str) -> Sequence[torch.Tensor]:
    """Byte by byte from the formats' definitions, without torch's arithmetic."""
    layer = random_layer(*_SMALL)
    numbers = []
    for value in range(16):
        signed = value - 8
        numbers.append(8 - signed if signed > 0 else signed & 0xF)
    table = bytes(numbers[byte >> 4] << 4 | numbers[byte & 0xF] for byte in range(256))

    def values(t: torch.Tensor) -> torch.Tensor:
        data = t.view(torch.uint8).numpy().tobytes().translate(table)
        return torch.frombuffer(bytearray(data), dtype=torch.int32).view(t.shape)

    # float8_e4m3fn: 4 bits of exponent with bias 7, 3 of fraction, no infinity; the largest code is not a number.
    codes = [c % 8 * 2.0**-9 if c < 8 else (1 + c % 8 / 8) * 2.0 ** (c // 8 - 7) for c in range(127)]

    def code(number: float) -> int:
        nearest = min((abs(abs(number) - value), c % 2, c) for c, value in enumerate(codes))[2]
        return nearest | (0x80 if math.copysign(1, number) < 0 else 0)

    def scales(t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = t.float().numpy()
        least = np.float32(1 / (448 * 512))
        channel = np.maximum(np.abs(x).max(axis=2, keepdims=True) / np.float32(448), least)
        eighths = [code(codes[code(float(number))] / 8) for number in (x / channel).transpose(0, 2, 1).ravel()]
        packed = bytes(code(-times * codes[c]) for c in eighths for times in range(8, 0, -1))
        fp8 = torch.frombuffer(bytearray(packed), dtype=torch.uint8).view(torch.float8_e4m3fn)
        return fp8, torch.from_numpy(channel * np.float32(8))

    s13, channel13 = scales(layer.s13)
    s2, channel2 = scales(layer.s2)
    return [t.to(device) for t in (values(layer.w13), values(layer.w2), s13, s2, channel13, channel2)]
