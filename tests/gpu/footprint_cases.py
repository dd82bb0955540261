"""Operators whose footprint is recorded on a card and then demanded of the virtual device.

Each case is a generator: what runs before the first ``yield`` is set-up, what runs between the two is recorded, and the
locals that live at the second ``yield`` die after it. The code says ``cuda`` and runs unchanged on both devices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

Case = Callable[[], Iterator[None]]
CASES: dict[str, Case] = {}

SIZES = {"small": 1_000, "medium": 1_000_000, "large": 40_000_000}  # elements


def case(function: Case) -> Case:
    CASES[function.__name__] = function
    return function


def sized(function: Callable[[int], Iterator[None]]) -> None:
    """One case a size: kernels may take scratch from some size on."""
    for label, elements in SIZES.items():
        CASES[f"{function.__name__}-{label}"] = lambda f=function, n=elements: f(n)


def unary(name: str, op: Callable[[torch.Tensor], object], dtype: torch.dtype = torch.float32) -> None:
    def run(n: int) -> Iterator[None]:
        x = torch.ones(n, dtype=dtype, device="cuda")
        yield
        y = op(x)
        yield
        del y

    run.__name__ = name
    sized(run)


def matrix(name: str, op: Callable[[torch.Tensor], object], dtype: torch.dtype = torch.float32) -> None:
    """On [rows, 1000] tensors."""

    def run(n: int) -> Iterator[None]:
        x = torch.ones(n // 1000, 1000, dtype=dtype, device="cuda")
        yield
        y = op(x)
        yield
        del y

    run.__name__ = name
    sized(run)


def binary(name: str, op: Callable[[torch.Tensor, torch.Tensor], object], dtype: torch.dtype = torch.float32) -> None:
    def run(n: int) -> Iterator[None]:
        a = torch.ones(n, dtype=dtype, device="cuda")
        b = torch.ones(n, dtype=dtype, device="cuda")
        yield
        y = op(a, b)
        yield
        del y

    run.__name__ = name
    sized(run)


def made(name: str, op: Callable[[int], object]) -> None:
    """Made from nothing."""

    def run(n: int) -> Iterator[None]:
        yield
        y = op(n)
        yield
        del y

    run.__name__ = name
    sized(run)


# --- made from nothing --------------------------------------------------------------------------------------------

made("empty", lambda n: torch.empty(n, device="cuda"))
made("zeros", lambda n: torch.zeros(n, device="cuda"))
made("ones", lambda n: torch.ones(n, dtype=torch.bfloat16, device="cuda"))
made("full", lambda n: torch.full((n,), 3.0, device="cuda"))
made("arange", lambda n: torch.arange(n, device="cuda"))
made("arange_float", lambda n: torch.arange(0, n, dtype=torch.float32, device="cuda"))
made("linspace", lambda n: torch.linspace(0, 1, n, device="cuda"))
made("eye", lambda n: torch.eye(int(n**0.5), device="cuda"))
made("rand", lambda n: torch.rand(n, device="cuda"))
made("randn", lambda n: torch.randn(n, device="cuda"))
made("randn_bf16", lambda n: torch.randn(n, dtype=torch.bfloat16, device="cuda"))
made("randint", lambda n: torch.randint(0, 100, (n,), device="cuda"))
made("randperm", lambda n: torch.randperm(n, device="cuda"))
made("tensor_from_list", lambda n: torch.tensor([1.0] * min(n, 1000), device="cuda"))
made("tril_indices", lambda n: torch.tril_indices(int(n**0.5), int(n**0.5), device="cuda"))
made("scalar_tensor", lambda n: torch.scalar_tensor(3.0, device="cuda"))

# --- pointwise ----------------------------------------------------------------------------------------------------

for _name in (
    "abs neg exp sqrt rsqrt sigmoid tanh relu square reciprocal round floor log sin cos isnan sign logical_not erf "
    "expm1 log1p trunc ceil isfinite"
).split():
    unary(_name, getattr(torch, _name))
unary("gelu", torch.nn.functional.gelu)
unary("silu", torch.nn.functional.silu)
unary("clamp", lambda x: x.clamp(0, 1))
unary("clamp_min_", lambda x: x.clamp_(min=1e-10))
unary("add_scalar", lambda x: x + 1)
unary("mul_scalar_bf16", lambda x: x * 2.5, torch.bfloat16)
unary("pow_scalar", lambda x: x**3)
unary("float_to_half", lambda x: x.half())
unary("float_to_fp8", lambda x: x.to(torch.float8_e4m3fn))
unary("bf16_to_float", lambda x: x.float(), torch.bfloat16)
unary("fp8_to_bf16", lambda x: x.to(torch.bfloat16), torch.float8_e4m3fn)
unary("shift_and_mask", lambda x: (x >> 4) & 0xF, torch.int32)
unary("or_in_place", lambda x: x.__ior__(3), torch.int32)
unary("compare_scalar", lambda x: x > 0.5)
for _name in "add sub mul div maximum minimum eq lt atan2 remainder fmod hypot".split():
    binary(_name, getattr(torch, _name))
binary("add_", lambda a, b: a.add_(b))
binary("mul_", lambda a, b: a.mul_(b))
binary("lerp", lambda a, b: torch.lerp(a, b, 0.5))
binary("addcmul", lambda a, b: torch.addcmul(a, a, b))
binary("where", lambda a, b: torch.where(a > 0, a, b))
binary("bitwise_xor", torch.bitwise_xor, torch.int32)
binary("mixed_types", lambda a, b: a + b.to(torch.float32), torch.bfloat16)
binary("type_promotion", lambda a, b: a.bfloat16() + b)
matrix("broadcast_add", lambda x: x + x[0])
matrix("broadcast_column", lambda x: x * x[:, :1])
unary("masked_fill", lambda x: x.masked_fill(x > 0, 0.0))
unary("masked_fill_", lambda x: x.masked_fill_(x > 0, 0.0))
unary("fill_", lambda x: x.fill_(2.0))
unary("zero_", lambda x: x.zero_())
unary("normal_", lambda x: x.normal_())
unary("uniform_", lambda x: x.uniform_())
unary("bernoulli_", lambda x: x.bernoulli_(0.5))
unary("random_", lambda x: x.random_(), torch.int32)
unary("exponential_", lambda x: x.exponential_())
unary("foreach_add_", lambda x: torch._foreach_add_([x, x], 1.0))
unary("foreach_mul_", lambda x: torch._foreach_mul_([x, x], 2.0))
unary("foreach_lerp_", lambda x: torch._foreach_lerp_([x], [x], 0.5))
unary("foreach_addcmul_", lambda x: torch._foreach_addcmul_([x], [x], [x]))
unary("foreach_addcdiv_", lambda x: torch._foreach_addcdiv_([x], [x], [x]))
unary("foreach_sqrt", lambda x: torch._foreach_sqrt([x, x]))
unary("foreach_div_", lambda x: torch._foreach_div_([x, x], 2.0))
unary("foreach_norm", lambda x: torch._foreach_norm([x, x]))
unary("foreach_copy_", lambda x: torch._foreach_copy_([x], [x.clone()]))

# --- copies and rearrangements ------------------------------------------------------------------------------------

unary("clone", torch.clone)
unary("empty_like", torch.empty_like)
unary("zeros_like", torch.zeros_like)
unary("new_empty", lambda x: x.new_empty(7))
unary("flip", lambda x: x.flip(0))
unary("roll", lambda x: x.roll(3))
unary("repeat", lambda x: x.repeat(2))
unary("repeat_interleave", lambda x: x.repeat_interleave(2))
unary("view_bytes", lambda x: x.view(torch.uint8))
unary("stack", lambda x: torch.stack([x, x, x]))
unary("cat", lambda x: torch.cat([x, x, x]))
unary("cat_many", lambda x: torch.cat([x[:3]] * 300))
unary("stack_many_bytes", lambda x: torch.stack([x[:256]] * 300), torch.uint8)
unary("cat_out", lambda x: torch.cat([x, x], out=torch.empty(0, device="cuda")))
unary("slice_assign", lambda x: x[10:20].copy_(x[30:40]))
unary("setitem_scalar", lambda x: x.__setitem__(3, 1.0))
unary("setitem_tensor", lambda x: x.__setitem__(slice(0, 10), x[10:20]))
unary("pad", lambda x: torch.nn.functional.pad(x, (1, 2)))
unary("split", lambda x: x.split(100))
unary("as_strided", lambda x: x.as_strided((10, 3), (3, 1)))
unary("chunk_clone", lambda x: [c.clone() for c in x.chunk(4)])
matrix("transpose_contiguous", lambda x: x.t().contiguous())
matrix("permute_clone", lambda x: x.view(-1, 10, 100).permute(1, 0, 2).contiguous())
matrix("copy_permuted", lambda x: x.view(-1, 10, 100).permute(1, 0, 2).copy_(x.clone().view(10, -1, 100)))
matrix("reshape_copy", lambda x: x.t().reshape(-1))
matrix("cat_columns", lambda x: torch.cat([x, x], dim=1))
matrix("tril", torch.tril)
matrix("triu", torch.triu)
matrix("column_slice_clone", lambda x: x[:, ::2].clone())
matrix("index_rows", lambda x: x[torch.arange(x.shape[0], device="cuda")])
matrix("index_rows_bytes", lambda x: x[torch.arange(x.shape[0], device="cuda")], torch.uint8)
matrix("index_rows_host_index", lambda x: x[torch.arange(x.shape[0])])
matrix("index_rows_host_int32", lambda x: x[torch.arange(x.shape[0], dtype=torch.int32)])
matrix("index_rows_card_int32", lambda x: x[torch.arange(x.shape[0], dtype=torch.int32, device="cuda")])
matrix("index_two", lambda x: x[torch.arange(3, device="cuda") % x.shape[0], torch.arange(3, device="cuda")])
matrix("index_host_mask", lambda x: x[torch.arange(x.shape[0]) % 2 == 0])
matrix("index_middle", lambda x: x.view(-1, 10, 100)[:, torch.arange(10, device="cuda")])
matrix("index_batched_last", lambda x: x.view(-1, 2, 5, 100)[:, :, torch.arange(5, device="cuda"), :])
matrix("index_select", lambda x: x.index_select(0, torch.arange(x.shape[0], device="cuda")))
matrix("index_select_columns", lambda x: x.index_select(1, torch.arange(100, device="cuda")))
matrix("gather", lambda x: x.gather(1, torch.zeros(x.shape[0], 5, dtype=torch.int64, device="cuda")))
matrix("scatter_", lambda x: x.scatter_(1, torch.zeros(x.shape[0], 5, dtype=torch.int64, device="cuda"), 1.0))
matrix("index_two_host", lambda x: x[torch.arange(2) % x.shape[0], torch.arange(2)])
matrix("index_two_host_int32", lambda x: x[torch.arange(2, dtype=torch.int32) % x.shape[0], torch.arange(2)])
matrix("index_host_broadcast", lambda x: x[(torch.arange(3) % x.shape[0])[:, None], torch.arange(50)[None, :]])
matrix("index_host_and_card", lambda x: x[torch.arange(2, device="cuda") % x.shape[0], torch.arange(2)])
matrix("setitem_card_mask", lambda x: x.__setitem__(x > 0, 0.0))
matrix("setitem_card_row_mask", lambda x: x.__setitem__(x[:, 0] > 0, 0.0))
matrix("setitem_host_index", lambda x: x.__setitem__(torch.arange(1), 0.0))
matrix("setitem_card_index", lambda x: x.__setitem__(torch.arange(1, device="cuda"), x[:1].clone()))
matrix("setitem_column_scalar", lambda x: x.__setitem__((slice(None), 3), 1.0))
matrix("setitem_column_host_scalar", lambda x: x.__setitem__((slice(None), 3), torch.tensor(1.0)))
matrix("index_put_card", lambda x: x.index_put_((torch.arange(1, device="cuda"),), x[0].clone()))
matrix("index_put_host", lambda x: x.index_put_((torch.arange(1),), x[0].clone()))
matrix("index_put_accumulate", lambda x: x.index_put_((torch.arange(1, device="cuda"),), x[0].clone(), accumulate=True))
matrix("index_copy_", lambda x: x.index_copy_(0, torch.arange(1, device="cuda"), x[:1].clone()))
matrix("index_fill_", lambda x: x.index_fill_(0, torch.arange(1, device="cuda"), 1.0))
matrix("index_add_", lambda x: x.index_add_(0, torch.arange(1, device="cuda"), x[:1].clone()))
matrix("embedding", lambda x: torch.nn.functional.embedding(torch.zeros(17, dtype=torch.int64, device="cuda"), x))
matrix("unfold", lambda x: x.unfold(1, 10, 10).clone())
matrix("resize_", lambda x: x.clone().resize_(x.numel() * 2))


@case
def index_select_out() -> Iterator[None]:
    x = torch.ones(2048, 7168, dtype=torch.uint8, device="cuda")
    index = torch.arange(2048).to("cuda")
    out = torch.empty_like(x)
    yield
    torch.index_select(x, 0, index, out=out)
    yield


@case
def index_select_out_slice() -> Iterator[None]:
    x = torch.ones(4, 512, 1024, dtype=torch.uint8, device="cuda")
    index = torch.arange(512).to("cuda")
    out = torch.empty_like(x)
    yield
    torch.index_select(x[1], 0, index, out=out[1])
    yield


# --- between host and card ----------------------------------------------------------------------------------------


def _host(name: str, op: Callable[[torch.Tensor, torch.Tensor], object]) -> None:
    """``op(card, host)`` on tensors of [rows, 1000] float32."""

    def run(n: int) -> Iterator[None]:
        card = torch.ones(n // 1000, 1000, device="cuda")
        host = torch.ones(n // 1000, 1000)
        yield
        y = op(card, host)
        yield
        del y

    run.__name__ = name
    CASES[f"{name}-medium"] = lambda: run(SIZES["medium"])


_host("to_cuda", lambda c, h: h.to("cuda"))
_host("cuda", lambda c, h: h.cuda())
_host("cuda_non_blocking", lambda c, h: h.cuda(non_blocking=True))
_host("to_cuda_half", lambda c, h: h.to("cuda", torch.float16))
_host("to_cuda_half_non_blocking", lambda c, h: h.to("cuda", torch.float16, non_blocking=True))
_host("to_cuda_transposed", lambda c, h: h.t().to("cuda"))
_host("to_cuda_sliced", lambda c, h: h[:, ::2].to("cuda"))
_host("copy_host_to_card", lambda c, h: c.copy_(h))
_host("copy_host_to_card_half", lambda c, h: c.half().copy_(h))
_host("copy_host_to_card_half_non_blocking", lambda c, h: c.half().copy_(h, non_blocking=True))
_host("copy_host_to_card_transposed", lambda c, h: c[:1000].t().copy_(h[:1000]))
_host("copy_host_to_card_slice", lambda c, h: c[:, ::2].copy_(h[:, ::2]))
_host("copy_host_to_card_slice_non_blocking", lambda c, h: c[:, ::2].copy_(h[:, ::2], non_blocking=True))
_host("copy_host_row_broadcast", lambda c, h: c.copy_(h[0]))
_host("setitem_from_host", lambda c, h: c.__setitem__(0, h[0]))
_host("cpu", lambda c, h: c.cpu())
_host("cpu_transposed", lambda c, h: c.t().cpu())
_host("cpu_sliced", lambda c, h: c[:, ::2].cpu())
_host("cpu_as_half", lambda c, h: c.to("cpu", torch.float16))
_host("cpu_as_half_non_blocking", lambda c, h: c.to("cpu", torch.float16, non_blocking=True))
_host("new_tensor", lambda c, h: c.new_tensor([1.0, 2.0]))
_host("as_tensor", lambda c, h: torch.as_tensor([1.0, 2.0], device="cuda"))
_host("module_cuda", lambda c, h: torch.nn.Linear(100, 50).cuda())
_host("module_to_half", lambda c, h: torch.nn.Linear(100, 50).to("cuda", torch.float16))
_host("add_host_scalar", lambda c, h: c + torch.tensor(2.0))

# --- reductions and the like: many take scratch ------------------------------------------------------------------

for _name in "sum mean amax amin max min any all argmax prod var std norm cumsum softmax log_softmax sort topk".split():
    _full: dict[str, Callable[[torch.Tensor], object]] = {
        "cumsum": lambda x: x.cumsum(-1),
        "softmax": lambda x: x.softmax(-1),
        "log_softmax": lambda x: x.log_softmax(-1),
        "sort": lambda x: x.sort(),
        "topk": lambda x: x.topk(10),
    }
    unary(f"{_name}_all", _full.get(_name, lambda x, _n=_name: getattr(x, _n)()))
    _rows: dict[str, Callable[[torch.Tensor], object]] = {**_full}
    matrix(f"{_name}_rows", _rows.get(_name, lambda x, _n=_name: getattr(x, _n)(dim=-1)))
    if _name not in ("topk",):
        _columns: dict[str, Callable[[torch.Tensor], object]] = {
            "cumsum": lambda x: x.cumsum(0),
            "softmax": lambda x: x.softmax(0),
            "log_softmax": lambda x: x.log_softmax(0),
            "sort": lambda x: x.sort(dim=0),
        }
        matrix(f"{_name}_columns", _columns.get(_name, lambda x, _n=_name: getattr(x, _n)(dim=0)))
matrix("layer_norm", lambda x: torch.nn.functional.layer_norm(x, (1000,)))
matrix("rms_norm", lambda x: torch.nn.functional.rms_norm(x, (1000,)))
matrix("amax_quantize", lambda x: (x / (x.abs().amax(dim=-1, keepdim=True) / 448.0)).to(torch.float8_e4m3fn))
matrix("dropout", lambda x: torch.nn.functional.dropout(x, 0.1))
matrix("one_hot_free", lambda x: torch.nn.functional.embedding(torch.zeros(3, dtype=torch.int64, device="cuda"), x))
matrix("bincount_free_histc", lambda x: x.histc(10))
matrix("mm", lambda x: x[:512] @ x[:512].t())
matrix("mm_bf16", lambda x: x[:512] @ x[:512].t(), torch.bfloat16)
matrix("addmm", lambda x: torch.nn.functional.linear(x[:512], x[:64], x[0, :1].expand(min(64, x.shape[0]))))
matrix("bmm", lambda x: torch.bmm(x.view(-1, 10, 100), x.view(-1, 100, 10)))


@case
def sdpa() -> Iterator[None]:
    q = torch.randn(2, 8, 512, 64, dtype=torch.bfloat16, device="cuda")
    yield
    y = torch.nn.functional.scaled_dot_product_attention(q, q, q)
    yield
    del y


@case
def cross_stream_free() -> Iterator[None]:
    side = torch.cuda.Stream()
    x = torch.ones(1_000_000, device="cuda")
    yield
    x.record_stream(side)
    y = torch.empty(500, device="cuda")
    yield
    del y


# --- what many operators make together: either listed as estimated, or equal to the card ---------------------------

COMPOSITES: dict[str, Case] = {}


def block(name: str, build: Callable[[], Callable[[], object]]) -> None:
    """``build`` sets up and returns what is recorded."""

    def run() -> Iterator[None]:
        op = build()
        yield
        y = op()
        yield
        del y

    COMPOSITES[name] = run


def _on_card(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype, device="cuda").requires_grad_(grad)


def _module(make: Callable[[], torch.nn.Module], *shape: int, train: bool = True) -> Callable[[], Callable[[], object]]:
    def build() -> Callable[[], object]:
        module = make().cuda().train(train)
        x = _on_card(*shape)
        return lambda: module(x)

    return build


nn = torch.nn
block("linear_3d_bias", _module(lambda: nn.Linear(64, 32), 4, 128, 64))
block("linear_3d_no_bias", _module(lambda: nn.Linear(64, 32, bias=False), 4, 128, 64))
block("linear_2d_bias", _module(lambda: nn.Linear(64, 32), 128, 64))
block("layer_norm_train", _module(lambda: nn.LayerNorm(64), 128, 64))
block("group_norm", _module(lambda: nn.GroupNorm(4, 16), 8, 16, 32, 32))
block("batch_norm_train", _module(lambda: nn.BatchNorm2d(16), 8, 16, 32, 32))
block("batch_norm_eval", _module(lambda: nn.BatchNorm2d(16), 8, 16, 32, 32, train=False))
block("dropout_train", _module(lambda: nn.Dropout(0.1), 128, 64))
block("dropout_eval", _module(lambda: nn.Dropout(0.1), 128, 64, train=False))
block("conv2d", _module(lambda: nn.Conv2d(16, 32, 3, padding=1), 8, 16, 32, 32))
block("lstm", _module(lambda: nn.LSTM(32, 32), 5, 4, 32))
block("gru", _module(lambda: nn.GRU(32, 32), 5, 4, 32))
block(
    "attention_layer",
    lambda: (lambda m, x: lambda: m(x, x, x))(
        nn.MultiheadAttention(64, 4, batch_first=True).cuda(), _on_card(2, 16, 64)
    ),
)
block("encoder_layer", _module(lambda: nn.TransformerEncoderLayer(64, 4, 128, batch_first=True), 2, 16, 64))
block("gelu_tanh", _module(lambda: nn.GELU("tanh"), 128, 64))
block("interpolate", lambda: (lambda x: lambda: nn.functional.interpolate(x, scale_factor=2))(_on_card(2, 3, 16, 16)))
block("pad_reflect", lambda: (lambda x: lambda: nn.functional.pad(x, (1, 1), mode="reflect"))(_on_card(2, 3, 16)))
block(
    "cross_entropy",
    lambda: (lambda x, t: lambda: nn.functional.cross_entropy(x, t))(
        _on_card(64, 100), torch.zeros(64, dtype=torch.int64, device="cuda")
    ),
)
block(
    "embedding_bag",
    lambda: (lambda w, i: lambda: nn.functional.embedding_bag(i, w))(
        _on_card(100, 16), torch.zeros(4, 5, dtype=torch.int64, device="cuda")
    ),
)
block(
    "one_hot",
    lambda: (lambda i: lambda: nn.functional.one_hot(i, 10))(torch.zeros(7, dtype=torch.int64, device="cuda")),
)
block("clip_grad_norm", lambda: (lambda p: lambda: nn.utils.clip_grad_norm_([p], 1.0))(_with_grad(128, 64)))
block(
    "linear_forward_backward",
    lambda: (lambda m, x: lambda: m(x).square().sum().backward())(nn.Linear(64, 32).cuda(), _on_card(128, 64)),
)
block(
    "mul_backward", lambda: (lambda x: lambda: (x * x * 2).backward(torch.ones_like(x)))(_on_card(128, 64, grad=True))
)
block(
    "softmax_backward",
    lambda: (lambda x: lambda: x.softmax(-1).backward(torch.ones_like(x)))(_on_card(128, 64, grad=True)),
)
block(
    "index_backward",
    lambda: (lambda x: lambda: x[torch.arange(5, device="cuda")].backward(torch.ones(5, 64, device="cuda")))(
        _on_card(128, 64, grad=True)
    ),
)
block("matmul_3d", lambda: (lambda a, b: lambda: a @ b)(_on_card(4, 32, 64), _on_card(64, 16)))
block("matmul_batched", lambda: (lambda a, b: lambda: a @ b)(_on_card(4, 32, 64), _on_card(4, 64, 16)))
block(
    "baddbmm",
    lambda: (lambda a, b, c: lambda: torch.baddbmm(c, a, b))(
        _on_card(4, 32, 64), _on_card(4, 64, 16), _on_card(4, 32, 16)
    ),
)
block("matvec", lambda: (lambda a, b: lambda: a @ b)(_on_card(32, 64), _on_card(64)))
block("dot", lambda: (lambda a: lambda: a @ a)(_on_card(64)))
block(
    "einsum", lambda: (lambda a, b: lambda: torch.einsum("bij,bjk->bik", a, b))(_on_card(4, 8, 16), _on_card(4, 16, 8))
)
block("einsum_pointwise", lambda: (lambda a, b: lambda: torch.einsum("ij,j->ij", a, b))(_on_card(8, 16), _on_card(16)))
block("outer", lambda: (lambda a: lambda: torch.outer(a, a))(_on_card(64)))
block("nan_to_num", lambda: (lambda a: lambda: a.nan_to_num())(_on_card(64, 64)))
block("logsumexp", lambda: (lambda a: lambda: a.logsumexp(-1))(_on_card(64, 64)))
block("normalize", lambda: (lambda a: lambda: nn.functional.normalize(a))(_on_card(64, 64)))
block("meshgrid", lambda: (lambda a: lambda: torch.meshgrid(a, a, indexing="ij"))(_on_card(64)))
block("rope", lambda: (lambda x: lambda: torch.cat((-x[..., 32:], x[..., :32]), dim=-1))(_on_card(4, 16, 64)))
block(
    "kv_cache_cat",
    lambda: (lambda a, b: lambda: torch.cat([a, b], dim=2))(_on_card(1, 8, 100, 64), _on_card(1, 8, 1, 64)),
)
block("causal_mask", lambda: lambda: torch.full((64, 64), float("-inf"), device="cuda").triu(1))


def _with_grad(*shape: int) -> torch.Tensor:
    p = torch.nn.Parameter(_on_card(*shape))
    p.grad = torch.ones_like(p)
    return p


def _optimizer(name: str, make: Callable[[list[torch.Tensor]], torch.optim.Optimizer]) -> None:
    def build() -> Callable[[], object]:
        parameters = [_with_grad(128, 64), _with_grad(64)]
        optimizer = make(parameters)
        optimizer.step()
        return optimizer.step

    block(f"{name}_step", build)


_optimizer("adamw", lambda p: torch.optim.AdamW(p))
_optimizer("adamw_single", lambda p: torch.optim.AdamW(p, foreach=False))
_optimizer("sgd_momentum", lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9))


def interleave_cases() -> None:
    """flashinfer's kernel, where the package is there."""
    from flashinfer import nvfp4_block_scale_interleave

    for rows, columns in ((128, 4), (1024, 448), (7168, 32), (256, 8), (200, 6)):

        def run(r: int = rows, c: int = columns) -> Iterator[None]:
            scales = torch.ones(r, c, dtype=torch.uint8, device="cuda")
            yield
            y = nvfp4_block_scale_interleave(scales)
            yield
            del y

        CASES[f"nvfp4_block_scale_interleave-{rows}x{columns}"] = run

    def batched() -> Iterator[None]:
        scales = torch.ones(3, 256, 16, dtype=torch.uint8, device="cuda")
        yield
        y = nvfp4_block_scale_interleave(scales)
        yield
        del y

    CASES["nvfp4_block_scale_interleave-3x256x16"] = batched
