"""What whole programs are made of: cases for footprint_cases.COMPOSITES that no card has recorded yet.

``python tests/gpu/record_footprints.py OUT.json`` records them with the others; until then the virtual device only has
to run them, and tests/integration/test_footprints.py holds those that are recorded against it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable

import torch
from footprint_cases import _on_card, _optimizer, _with_grad, block

nn = torch.nn


def _backward(make: Callable[[], torch.Tensor], call: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], object]:
    """One call and its backward pass."""

    def build() -> Callable[[], object]:
        x = make()

        def run() -> None:
            y = call(x)
            y.backward(torch.ones_like(y))

        return run

    return build  # type: ignore[return-value]


def _amp(dtype: torch.dtype, call: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        with torch.autocast("cuda", dtype=dtype):
            return call()

    return run


def _attention_cases() -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    attend = nn.functional.scaled_dot_product_attention
    kernels = {
        "picked": None,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "math": SDPBackend.MATH,
    }
    shapes = {"short": (2, 8, 101, 64), "long": (1, 16, 2048, 128), "decode": (4, 8, 1, 64)}
    options: dict[str, dict[str, object]] = {"plain": {}, "causal": {"is_causal": True}, "dropout": {"dropout_p": 0.1}}

    def add(name: str, kernel: object, shape: tuple[int, ...], dtype: torch.dtype, how: dict[str, object]) -> None:
        def build(*, trains: bool) -> Callable[[], object]:
            keys = (*shape[:2], max(shape[2], 128), shape[3])
            if how.get("is_causal"):
                keys = shape
            q, k = (_on_card(*s, dtype=dtype, grad=trains) for s in (shape, keys))
            mask = None
            if "mask" in how:
                mask = torch.zeros(shape[2], keys[2], dtype=torch.bool, device="cuda")
            given = {key: value for key, value in how.items() if key != "mask"}

            def run() -> object:
                with contextlib.nullcontext() if kernel is None else sdpa_kernel(kernel):  # type: ignore[arg-type]
                    y = attend(q, k, k, attn_mask=mask, **given)  # type: ignore[arg-type]
                if trains:
                    y.backward(torch.ones_like(y))
                    return None
                return y

            return run

        block(f"sdpa_{name}", functools.partial(build, trains=False))
        block(f"sdpa_{name}_backward", functools.partial(build, trains=True))

    for label, shape in shapes.items():
        for way, how in options.items():
            if way == "causal" and label == "decode":
                continue
            add(f"picked_{label}_{way}", None, shape, torch.bfloat16, how)
        add(f"picked_{label}_masked", None, shape, torch.bfloat16, {"mask": True})
        add(f"picked_{label}_float", None, shape, torch.float32, {})
        for kernel in list(kernels)[1:]:
            add(f"{kernel}_{label}", kernels[kernel], shape, torch.bfloat16, {})


_attention_cases()

for _rows, _columns in ((1, 4096), (17, 4096), (2048, 4096), (2048, 32000)):
    _of = f"{_rows}x{_columns}"
    for _name, _op in {
        "argmax": lambda x: x.argmax(-1),
        "topk": lambda x: x.topk(50),
        "sort": lambda x: x.sort(descending=True),
        "cumsum": lambda x: x.softmax(-1).cumsum(-1),
        "logsumexp": lambda x: x.logsumexp(-1),
        "mean_of_squares": lambda x: x.pow(2).mean(-1, keepdim=True),
        "sum_to_one": lambda x: x.sum(),
        "max": lambda x: x.max(-1),
        "any_nan": lambda x: x.isnan().any(),
        "multinomial": lambda x: x.softmax(-1)[:, :4096].multinomial(1),
    }.items():
        block(
            f"{_name}-{_of}",
            functools.partial(lambda r, c, op: functools.partial(op, _on_card(r, c)), _rows, _columns, _op),
        )
    block(
        f"cross_entropy_backward-{_of}",
        functools.partial(
            lambda r, c: _backward(
                lambda: _on_card(r, c, grad=True),
                lambda x: nn.functional.cross_entropy(x, torch.zeros(len(x), dtype=torch.int64, device="cuda")),
            )(),
            _rows, _columns,
        ),
    )  # fmt: skip
    for _name, _call in {
        "layer_norm": lambda x: nn.functional.layer_norm(x, x.shape[-1:]),
        "rms_norm": lambda x: nn.functional.rms_norm(x, x.shape[-1:]),
        "gelu": nn.functional.gelu,
        "silu": nn.functional.silu,
        "softmax": lambda x: x.softmax(-1),
        "log_softmax": lambda x: x.log_softmax(-1),
        "dropout": lambda x: nn.functional.dropout(x, 0.1),
        "expanded_sum": lambda x: x.sum(0),
        "mean": lambda x: x.mean(),
        "cat": lambda x: torch.cat([x, x]),
        "index": lambda x: x[torch.zeros(3, dtype=torch.int64, device="cuda")],
        "index_select": lambda x: x.index_select(0, torch.zeros(3, dtype=torch.int64, device="cuda")),
        "gather": lambda x: x.gather(1, torch.zeros(len(x), 1, dtype=torch.int64, device="cuda")),
    }.items():
        block(
            f"{_name}_backward-{_of}",
            functools.partial(
                lambda r, c, call: _backward(lambda: _on_card(r, c, grad=True), call)(), _rows, _columns, _call
            ),
        )

for _rows in (1, 16, 2048):
    for _dtype in (torch.bfloat16, torch.float32):
        _of = f"{_rows}-{str(_dtype).removeprefix('torch.')}"
        for _bias in (False, True):
            block(
                f"linear_{'bias' if _bias else 'plain'}-{_of}",
                functools.partial(
                    lambda r, d, b: functools.partial(
                        nn.Linear(4096, 1024, bias=b).cuda().to(d), _on_card(r, 4096, dtype=d)
                    ),
                    _rows, _dtype, _bias,
                ),
            )  # fmt: skip
            block(
                f"linear_{'bias' if _bias else 'plain'}_backward-{_of}",
                functools.partial(
                    lambda r, d, b: _backward(
                        lambda: _on_card(r, 4096, dtype=d, grad=True), nn.Linear(4096, 1024, bias=b).cuda().to(d)
                    )(),
                    _rows, _dtype, _bias,
                ),
            )  # fmt: skip
block("linear_amp", lambda: _amp(torch.bfloat16, functools.partial(nn.Linear(64, 32).cuda(), _on_card(128, 64))))
block(
    "conv2d_amp", lambda: _amp(torch.bfloat16, functools.partial(nn.Conv2d(3, 8, 4, 4).cuda(), _on_card(2, 3, 32, 32)))
)
block("addmm_strided", lambda: (lambda a, b: lambda: a[:, ::2] @ b)(_on_card(64, 64), _on_card(32, 16)))
block("bmm_expanded", lambda: (lambda a, b: lambda: a @ b.expand(4, 64, 16))(_on_card(4, 32, 64), _on_card(1, 64, 16)))
block("scaled_mm", lambda: (lambda a, s: lambda: torch._scaled_mm(a, a.t(), s, s, out_dtype=torch.bfloat16))(
    _on_card(128, 128).to(torch.float8_e4m3fn), _on_card()
))  # fmt: skip
block("embedding_backward", lambda: _backward(
    lambda: _on_card(32000, 64, grad=True),
    lambda w: nn.functional.embedding(torch.arange(4096, device="cuda"), w),
)())  # fmt: skip
block("batch_norm_backward", lambda: _backward(lambda: _on_card(8, 16, 32, 32, grad=True), nn.BatchNorm2d(16).cuda())())
block(
    "group_norm_backward", lambda: _backward(lambda: _on_card(8, 16, 32, 32, grad=True), nn.GroupNorm(4, 16).cuda())()
)
block("conv2d_backward", lambda: _backward(lambda: _on_card(8, 16, 32, 32, grad=True), nn.Conv2d(16, 32, 3).cuda())())
block("interpolate_bicubic", lambda: (
    lambda x: lambda: nn.functional.interpolate(x, size=(10, 10), mode="bicubic", antialias=True)
)(_on_card(1, 64, 14, 14)))  # fmt: skip
block("mask_of_lengths", lambda: (lambda n: lambda: torch.arange(512, device="cuda")[None] < n[:, None])(
    torch.ones(8, dtype=torch.int64, device="cuda")
))  # fmt: skip
block(
    "positions",
    lambda: (lambda m: lambda: m.long().cumsum(-1) - 1)(torch.ones(8, 512, dtype=torch.int64, device="cuda")),
)
block("nonzero", lambda: (lambda m: lambda: m.nonzero())(_on_card(1000)))
block("masked_select", lambda: (lambda x: lambda: x[x > 0])(_on_card(1000)))
block("unique", lambda: (lambda x: lambda: x.unique())(torch.ones(1000, dtype=torch.int64, device="cuda")))
block("item", lambda: (lambda x: lambda: x.sum().item())(_on_card(1000)))
block("isin", lambda: (lambda x: lambda: torch.isin(x, x[:3]))(torch.ones(1000, dtype=torch.int64, device="cuda")))
block("stream_capture", lambda: (lambda x: lambda: _captured(lambda: x @ x))(_on_card(64, 64)))
block("mem_pool", lambda: (lambda x, p: lambda: _pooled(p, lambda: x + 1))(_on_card(64, 64), torch.cuda.MemPool()))


def _captured(call: Callable[[], object]) -> object:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call()
    return graph, y


def _pooled(pool: object, call: Callable[[], object]) -> object:
    with torch.cuda.use_mem_pool(pool):  # type: ignore[arg-type]
        return call()


def _many(count: int) -> list[torch.Tensor]:
    return [_with_grad(64, 8 + n) for n in range(count)]


for _count in (3, 300):
    block(f"clip_grad_norm-{_count}", functools.partial(
        lambda n: functools.partial(nn.utils.clip_grad_norm_, _many(n), 1.0), _count
    ))  # fmt: skip
    block(f"amp_unscale-{_count}", functools.partial(
        lambda n: (lambda ps, found, scale: lambda: torch._amp_foreach_non_finite_check_and_unscale_(
            [p.grad for p in ps], found, scale
        ))(_many(n), _on_card(1), _on_card(1)), _count,
    ))  # fmt: skip
_optimizer("adamw_fused", lambda p: torch.optim.AdamW(p, fused=True))
_optimizer("adamw_capturable", lambda p: torch.optim.AdamW(p, capturable=True))
_optimizer("adamw_amsgrad", lambda p: torch.optim.AdamW(p, amsgrad=True))
_optimizer("adam", lambda p: torch.optim.Adam(p, weight_decay=0.1))
_optimizer("sgd", lambda p: torch.optim.SGD(p, lr=0.1))
_optimizer("sgd_fused", lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True))
_optimizer("adagrad", lambda p: torch.optim.Adagrad(p))
_optimizer("rmsprop", lambda p: torch.optim.RMSprop(p))
_optimizer("nadam", lambda p: torch.optim.NAdam(p))
_optimizer("adafactor", lambda p: torch.optim.Adafactor(p))
