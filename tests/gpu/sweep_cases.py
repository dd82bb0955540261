"""Operators whose scratch hangs on shape and type, at many of them: cases for footprint_cases.COMPOSITES.

They show from where on a kernel takes scratch, and how much. ``python tests/gpu/record_footprints.py OUT.json`` records
them with the others.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from footprint_cases import block
from program_cases import _backward

nn = torch.nn
Op = Callable[[torch.Tensor], object]
FLOAT, HALF = torch.float32, torch.bfloat16
SHORT = {
    torch.float32: "f32",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.bool: "bool",
    torch.float16: "f16",
    torch.int32: "i32",
}


def sweep(name: str, op: Op, shape: tuple[int, ...], dtype: torch.dtype = FLOAT, *, back: bool = False) -> None:
    """One shape of one operator, alone or with its backward pass."""
    label = f"{name}-{'x'.join(map(str, shape))}-{SHORT[dtype]}"

    def build() -> Callable[[], object]:
        x = torch.ones(shape, dtype=dtype, device="cuda").requires_grad_(back)
        return _backward(lambda: x, op)() if back else functools.partial(op, x)  # type: ignore[operator]

    block(label, build)


SHAPES = (
    (1,), (1000,), (4096,), (65_536,), (262_144,), (1 << 20,), ((1 << 20) + 3,), (1 << 24,), (17, 4096), (128, 128),
    (2048, 4096), (4096, 17), (4096, 2048), (100_000, 8), (8, 100_000), (64, 64, 64), (8, 197, 384), (48, 197, 384),
    (12, 1024, 768), (300, 32_000), (8, 16, 32, 32), (48, 64, 112, 112), (3, 7, 11, 13),
)  # fmt: skip


def _dims(shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...] | None]]:
    yield "all", None
    if len(shape) > 1:
        yield "first", (0,)
        yield "last", (-1,)
    if len(shape) > 2:
        yield "middle", (1,)
        yield "two", (0, 1)
        yield "most", (0, *range(2, len(shape)))


def _reductions() -> None:
    for shape in SHAPES:
        for where, dims in _dims(shape):
            dim = {} if dims is None else {"dim": dims}
            one = {} if dims is None else {"dim": dims[0]}
            for dtype in (FLOAT, HALF):
                sweep(f"sweep_sum_{where}", lambda x, d=dim: x.sum(**d), shape, dtype)
            sweep(f"sweep_mean_{where}", lambda x, d=dim: x.mean(**d), shape)
            sweep(f"sweep_norm_{where}", lambda x, d=dim: torch.linalg.vector_norm(x, **d), shape)
            if dims is None or len(dims) == 1:
                sweep(f"sweep_argmax_{where}", lambda x, d=one: x.argmax(**d), shape)
                if dims is not None:
                    sweep(f"sweep_max_{where}", lambda x, d=one: x.max(**d), shape, HALF)
            if len(shape) < 4 or dims is None:
                sweep(f"sweep_amax_{where}", lambda x, d=dim: x.amax(**d), shape, HALF)
                sweep(f"sweep_var_{where}", lambda x, d=dim: x.var(**d), shape)
                sweep(f"sweep_any_{where}", lambda x, d=dim: x.any(**d), shape, torch.bool)
    for shape in ((1000,), (1 << 20,), (17, 4096), (2048, 4096)):
        for where, dims in _dims(shape):
            one = {} if dims is None else {"dim": dims[0]}
            sweep(f"sweep_sum_{where}", lambda x, d=one: x.sum(**d), shape, torch.int64)
            sweep(f"sweep_sum_{where}", lambda x, d=one: x.sum(**d), shape, torch.bool)
            sweep(f"sweep_sum_{where}", lambda x, d=one: x.sum(**d, dtype=torch.float32), shape, HALF)
            sweep(f"sweep_all_{where}", lambda x, d=one: x.all(**d), shape, torch.bool)
            sweep(f"sweep_max_{where}", lambda x, d=one: x.max(**d), shape, torch.int64)
            sweep(f"sweep_sum_strided_{where}", lambda x, d=one: x[..., ::2].sum(**d), shape)
            if len(shape) == 2:
                sweep(f"sweep_sum_transposed_{where}", lambda x, d=one: x.t().sum(**d), shape)
                sweep(f"sweep_sum_expanded_{where}", lambda x, d=one: x[:, None].expand(-1, 3, -1).sum(**d), shape)


def _ordered() -> None:
    for rows, columns in ((1, 100), (1, 2048), (1, 5000), (1, 100_000), (1, 1 << 20), (64, 8), (4096, 8), (8, 1000),
                          (8, 32_000), (2048, 4097), (100_000, 8)):  # fmt: skip
        shape = (rows, columns) if rows > 1 else (columns,)
        for dtype in (FLOAT, torch.int64):
            sweep("sweep_sort", lambda x: x.sort(), shape, dtype)
            sweep("sweep_cumsum", lambda x: x.cumsum(-1), shape, dtype)
            sweep("sweep_argsort", lambda x: x.argsort(), shape, dtype)
        sweep("sweep_sort_stable", lambda x: x.sort(stable=True), shape)
        sweep("sweep_cumsum_bool", lambda x: x.bool().cumsum(-1), shape)
        sweep("sweep_cumprod", lambda x: x.cumprod(-1), shape)
        sweep("sweep_sort_first", lambda x: x.sort(dim=0), shape)
        sweep("sweep_cumsum_first", lambda x: x.cumsum(0), shape)
        for k in (1, 8, 50, 2000):
            if k <= columns:
                sweep(f"sweep_topk_{k}", lambda x, n=k: x.topk(n), shape)
        sweep("sweep_nonzero", lambda x: x.nonzero(), shape)
        sweep("sweep_masked_select", lambda x: x[x > 0], shape)
        sweep("sweep_unique", lambda x: x.unique(), shape, torch.int64)
        sweep("sweep_bincount", lambda x: x.flatten().bincount(), shape, torch.int64)
        sweep("sweep_histc", lambda x: x.histc(8, 0, 7), shape)
        sweep("sweep_isin", lambda x: torch.isin(x, x.flatten()[:3]), shape, torch.int64)
        sweep("sweep_isin_many", lambda x: torch.isin(x, x), shape, torch.int64)
        sweep("sweep_multinomial", lambda x: x.multinomial(1), shape)
        sweep("sweep_multinomial_5", lambda x: x.multinomial(5), shape)
        sweep("sweep_median", lambda x: x.median(-1), shape)
        sweep("sweep_kthvalue", lambda x: x.kthvalue(1), shape)
        sweep("sweep_logsumexp", lambda x: x.logsumexp(-1), shape)
        sweep("sweep_searchsorted", lambda x: torch.searchsorted(x, x), shape)
        sweep("sweep_mode", lambda x: x.mode(-1), shape)
        sweep("sweep_randperm", lambda x: torch.randperm(x.numel(), device="cuda"), shape)
        sweep("sweep_repeat_interleave", lambda x: x.flatten().repeat_interleave(2), shape)
        sweep("sweep_diff", lambda x: x.diff(), shape)
        sweep("sweep_equal", lambda x: torch.equal(x, x + 1), shape)
        sweep("sweep_allclose", lambda x: torch.allclose(x, x + 1), shape)
        sweep("sweep_where", lambda x: torch.where(x > 0), shape)


def _norms() -> None:
    for rows in (1, 17, 64, 127, 128, 512, 1024, 1576, 4096, 9456, 65_536):
        for columns in (64, 384, 768, 4096):
            if rows * columns > 1 << 26:
                continue
            for dtype in (FLOAT, HALF):

                def norm(x: torch.Tensor) -> torch.Tensor:
                    weight = torch.ones(x.shape[-1], dtype=x.dtype, device="cuda", requires_grad=True)
                    return nn.functional.layer_norm(x, x.shape[-1:], weight, weight)

                def rms(x: torch.Tensor) -> torch.Tensor:
                    weight = torch.ones(x.shape[-1], dtype=x.dtype, device="cuda", requires_grad=True)
                    return nn.functional.rms_norm(x, x.shape[-1:], weight)

                sweep("sweep_layer_norm_back", norm, (rows, columns), dtype, back=True)
                sweep("sweep_rms_norm_back", rms, (rows, columns), dtype, back=True)
    for shape in ((8, 16, 32, 32), (48, 64, 56, 56), (8, 2048, 7, 7)):
        for training in (True, False):
            for dtype in (FLOAT, HALF):

                def batch(x: torch.Tensor, t: bool = training) -> torch.Tensor:
                    return nn.BatchNorm2d(x.shape[1], dtype=x.dtype).cuda().train(t)(x)

                sweep(f"sweep_batch_norm_{training}", batch, shape, dtype, back=True)
        sweep("sweep_group_norm", lambda x: nn.GroupNorm(4, x.shape[1]).to(x.device)(x), shape, back=True)
        sweep("sweep_instance_norm", nn.functional.instance_norm, shape, back=True)
        sweep("sweep_max_pool", lambda x: nn.functional.max_pool2d(x, 2), shape, back=True)
        sweep("sweep_avg_pool", lambda x: nn.functional.avg_pool2d(x, 2), shape, back=True)
        sweep("sweep_adaptive_pool", lambda x: nn.functional.adaptive_avg_pool2d(x, 1), shape, back=True)
        sweep("sweep_interpolate", lambda x: nn.functional.interpolate(x, scale_factor=2, mode="bilinear"), shape,
              back=True)  # fmt: skip
        sweep("sweep_channels_last", lambda x: x.to(memory_format=torch.channels_last) * 2, shape)


def _indexed() -> None:
    for count in (3, 100, 3072, 3073, 10_000, 100_000):
        for words in (1000, 32_000, 50_257):

            def look_up(w: torch.Tensor, n: int = count) -> torch.Tensor:
                return nn.functional.embedding(torch.arange(n, device="cuda") % len(w), w)

            sweep(f"sweep_embedding_back_{count}", look_up, (words, 64), back=True)
            sweep(f"sweep_embedding_back_{count}", look_up, (words, 64), HALF, back=True)
        sweep(f"sweep_index_back_{count}", lambda x, n=count: x[torch.arange(n, device="cuda") % len(x)], (1000, 64),
              back=True)  # fmt: skip
        sweep(f"sweep_gather_back_{count}",
              lambda x, n=count: x.gather(0, torch.zeros(n, 64, dtype=torch.int64, device="cuda")), (1000, 64),
              back=True)  # fmt: skip
        sweep(f"sweep_index_put_{count}",
              lambda x, n=count: x.index_put_((torch.arange(n, device="cuda") % len(x),), torch.ones(64, device="cuda"),
                                              accumulate=True), (1000, 64))  # fmt: skip
        sweep(f"sweep_index_add_{count}",
              lambda x, n=count: x.index_add_(0, torch.arange(n, device="cuda") % len(x),
                                              torch.ones(n, 64, device="cuda")), (1000, 64))  # fmt: skip
        sweep(f"sweep_scatter_add_{count}",
              lambda x, n=count: x.scatter_add_(0, torch.zeros(n, 64, dtype=torch.int64, device="cuda"),
                                                torch.ones(n, 64, device="cuda")), (1000, 64))  # fmt: skip
        sweep(f"sweep_one_hot_{count}",
              lambda x, n=count: nn.functional.one_hot(torch.arange(n, device="cuda") % 8, 8), (1,))  # fmt: skip
        sweep(f"sweep_bool_index_{count}", lambda x, n=count: x[torch.arange(len(x), device="cuda") < n], (1000, 64))


def _attention() -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    attend = nn.functional.scaled_dot_product_attention
    kernels = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION,
               "efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH}  # fmt: skip
    for shape in ((1, 16, 64, 64), (2, 12, 197, 64), (8, 16, 700, 64), (3, 8, 1500, 128), (4, 4, 333, 96),
                  (2, 4, 512, 256), (1, 1, 1, 64), (16, 32, 1, 128), (1, 2, 5000, 40)):  # fmt: skip
        for name, kernel in kernels.items():
            for dtype in (HALF, FLOAT):
                if dtype == FLOAT and name in ("cudnn", "flash"):
                    continue
                for way, options in {"": {}, "causal": {"is_causal": True}, "dropout": {"dropout_p": 0.1}}.items():

                    def run(x: torch.Tensor, k: object = kernel, o: dict[str, object] = options) -> torch.Tensor:
                        with sdpa_kernel(k):  # type: ignore[arg-type]
                            return attend(x, x, x, **o)  # type: ignore[arg-type]

                    sweep(f"sweep_sdpa_{name}_{way}", run, shape, dtype)
                    sweep(f"sweep_sdpa_{name}_{way}_back", run, shape, dtype, back=True)

                def masked(x: torch.Tensor, k: object = kernel) -> torch.Tensor:
                    mask = torch.zeros(x.shape[2], x.shape[2], dtype=x.dtype, device="cuda")
                    with sdpa_kernel(k):  # type: ignore[arg-type]
                        return attend(x, x, x, attn_mask=mask)

                if name != "flash":
                    sweep(f"sweep_sdpa_{name}_masked", masked, shape, dtype, back=True)


def _products() -> None:
    for experts, rows in ((8, 128), (8, 2048), (4, 300)):

        def grouped(x: torch.Tensor, e: int = experts) -> object:
            ends = (torch.arange(1, e + 1, device="cuda") * (len(x) // e)).int()
            return torch._grouped_mm(x, torch.ones(e, x.shape[1], 256, dtype=x.dtype, device="cuda"), offs=ends)

        sweep(f"sweep_grouped_mm_{experts}", grouped, (rows, 1024), HALF)
        sweep(f"sweep_grouped_mm_{experts}", grouped, (rows, 1024), HALF, back=True)
    for shape in ((1, 64), (17, 64), (128, 128), (4096, 1024), (3, 5, 64)):
        for dtype in (FLOAT, HALF):

            def linear(x: torch.Tensor, d: torch.dtype = dtype) -> torch.Tensor:
                return nn.Linear(x.shape[-1], 32, dtype=d).cuda()(x)

            sweep("sweep_linear", linear, shape, dtype, back=True)
            sweep("sweep_matmul", lambda x: x @ x.mT, shape, dtype, back=True)
    sweep("sweep_baddbmm", lambda x: torch.baddbmm(x, x, x), (4, 64, 64), back=True)
    sweep("sweep_baddbmm_expanded", lambda x: torch.baddbmm(x[:1, :1], x, x), (4, 64, 64))
    sweep("sweep_addmv", lambda x: x @ x[0], (64, 64), back=True)
    sweep("sweep_dot", lambda x: x @ x, (4096,), back=True)
    sweep("sweep_einsum", lambda x: torch.einsum("bij,bkj->bik", x, x), (4, 64, 64), back=True)
    sweep("sweep_einsum_outer", lambda x: torch.einsum("i,j->ij", x, x), (64,), back=True)
    sweep("sweep_conv1d", lambda x: nn.Conv1d(64, 32, 3).to(x.device)(x), (4, 64, 100), back=True)
    for size, channels, out, kernel, stride, side in ((48, 3, 384, 16, 16, 224), (8, 3, 64, 7, 2, 224),
                                                      (8, 64, 64, 1, 1, 56), (8, 64, 64, 3, 1, 56),
                                                      (8, 512, 512, 3, 1, 7)):  # fmt: skip
        for dtype in (FLOAT, HALF):

            def convolve(
                x: torch.Tensor, c: int = channels, o: int = out, k: int = kernel, s: int = stride,
                d: torch.dtype = dtype,
            ) -> torch.Tensor:  # fmt: skip
                return nn.Conv2d(c, o, k, s, dtype=d).cuda()(x)

            sweep(f"sweep_conv2d_{out}_{kernel}", convolve, (size, channels, side, side), dtype, back=True)


def _losses() -> None:
    for rows, columns in ((1, 10), (24, 1000), (508, 50_257), (1500, 32_000)):

        def loss(x: torch.Tensor) -> torch.Tensor:
            return nn.functional.cross_entropy(x, torch.zeros(len(x), dtype=torch.int64, device="cuda"))

        for dtype in (FLOAT, HALF):
            sweep("sweep_cross_entropy", loss, (rows, columns), dtype)
            sweep("sweep_cross_entropy", loss, (rows, columns), dtype, back=True)
            sweep("sweep_nll_mean", lambda x: nn.functional.nll_loss(
                x, torch.zeros(len(x), dtype=torch.int64, device="cuda")), (rows, columns), dtype)  # fmt: skip
            sweep("sweep_label_smoothing", lambda x: nn.functional.cross_entropy(
                x, torch.zeros(len(x), dtype=torch.int64, device="cuda"), label_smoothing=0.1), (rows, columns), dtype,
                back=True)  # fmt: skip
        sweep("sweep_mse", lambda x: nn.functional.mse_loss(x, x * 2), (rows, columns), back=True)
        sweep("sweep_bce", lambda x: nn.functional.binary_cross_entropy_with_logits(x, x * 2), (rows, columns),
              back=True)  # fmt: skip
        sweep("sweep_glu", nn.functional.glu, (rows, columns // 2 * 2), back=True)
        sweep("sweep_std_mean", lambda x: torch.std_mean(x, -1), (rows, columns))
        sweep("sweep_softmax_first", lambda x: x.softmax(0), (rows, columns), back=True)
        sweep("sweep_softmax_half_to_float", lambda x: x.softmax(-1, dtype=torch.float32), (rows, columns), HALF,
              back=True)  # fmt: skip


def _strided() -> None:
    """Kernels that copy what is not contiguous."""
    for name, op in {
        "softmax": lambda x: x.softmax(-1), "layer_norm": lambda x: nn.functional.layer_norm(x, x.shape[-1:]),
        "dropout": lambda x: nn.functional.dropout(x, 0.5), "mm": lambda x: x @ x.mT,
        "mm_every_second": lambda x: x[:, ::2] @ x[:, ::2].mT, "bmm": lambda x: x[None, :, ::2] @ x[None, :, ::2].mT,
        "sort": lambda x: x.sort(), "topk": lambda x: x.topk(3), "cumsum": lambda x: x.cumsum(-1),
        "embedding": lambda x: nn.functional.embedding(torch.zeros(8, 4, dtype=torch.int64, device="cuda").t(), x),
        "abs_complex": lambda x: torch.complex(x, x).abs(), "where_mixed": lambda x: torch.where(x > 0, x, x.half()),
        "cat": lambda x: torch.cat([x, x]), "gelu": nn.functional.gelu, "roll": lambda x: x.roll(1, 0),
        "index_select": lambda x: x.index_select(0, torch.arange(4, device="cuda")),
        "layer_norm_back": None, "dropout_back": None,
    }.items():  # fmt: skip
        if op is None:
            continue
        for shape in ((300, 400), (64, 64)):
            sweep(f"sweep_transposed_{name}", lambda x, f=op: f(x.t()), shape)
            sweep(f"sweep_transposed_{name}_back", lambda x, f=op: _first(f(x.t())), shape, back=True)


def _first(result: object) -> torch.Tensor:
    out = result[0] if isinstance(result, tuple) else result
    assert isinstance(out, torch.Tensor)
    return out


def _other_types() -> None:
    """What the sweeps above have of one type only."""
    for shape in SHAPES:
        for where, dims in _dims(shape):
            if where not in ("all", "first", "last"):
                continue
            dim = {} if dims is None else {"dim": dims}
            sweep(f"types_mean_{where}", lambda x, d=dim: x.mean(**d), shape, HALF)
            sweep(f"types_norm_{where}", lambda x, d=dim: torch.linalg.vector_norm(x, **d), shape, HALF)
            sweep(f"types_nansum_{where}", lambda x, d=dim: x.nansum(**d), shape, HALF)
            sweep(f"types_var_{where}", lambda x, d=dim: x.var(**d), shape, HALF)
            sweep(f"types_sum_to_float_{where}", lambda x, d=dim: x.sum(dtype=torch.float32, **d), shape, HALF)
            sweep(f"types_amax_{where}", lambda x, d=dim: x.amax(**d), shape)
            sweep(f"types_any_{where}", lambda x, d=dim: x.any(**d), shape)
            one = {} if dims is None else {"dim": dims[0]}
            sweep(f"types_argmax_{where}", lambda x, d=one: x.argmax(**d), shape, HALF)
            sweep(f"types_prod_{where}", lambda x, d=one: x.prod(**d), shape, HALF)
    for rows, columns in (
        (1, 100),
        (1, 600),
        (1, 5000),
        (1, 100_000),
        (1, 1 << 20),
        (8, 32_000),
        (300, 32_000),
        (1, 128_256),
    ):
        shape = (rows, columns) if rows > 1 else (columns,)
        for dtype in (HALF, torch.int32, torch.float16):
            sweep("types_cumsum", lambda x: x.cumsum(-1, dtype=x.dtype), shape, dtype)
            sweep("types_sort", lambda x: x.sort(), shape, dtype)
            sweep("types_topk", lambda x: x.topk(8), shape, dtype)
            sweep("types_multinomial", lambda x: x.softmax(-1).multinomial(1), shape, HALF)
    for count in (120, 200, 400, 800, 1600, 2400, 3000):
        sweep(
            f"types_index_back_{count}",
            lambda x, n=count: x[torch.arange(n, device="cuda") % len(x)],
            (1000, 64),
            back=True,
        )
        sweep(
            f"types_index_back_{count}",
            lambda x, n=count: x[torch.arange(n, device="cuda") % len(x)],
            (40_000, 64),
            back=True,
        )
        sweep(f"types_two_indices_back_{count}",
              lambda x, n=count: x[torch.arange(n, device="cuda") % len(x), torch.arange(n, device="cuda") % 64],
              (1000, 64), back=True)  # fmt: skip
    for count in (20_000, 50_000, 200_000, 400_000):
        sweep(
            f"types_embedding_back_{count}",
            lambda w, n=count: nn.functional.embedding(torch.arange(n, device="cuda") % len(w), w),
            (32_000, 64),
            back=True,
        )
    for name, loss in {
        "l1": nn.functional.l1_loss,
        "smooth": nn.functional.smooth_l1_loss,
        "huber": nn.functional.huber_loss,
        "kl": nn.functional.kl_div,
        "cosine": nn.functional.cosine_similarity,
    }.items():
        for rows, columns in ((24, 1000), (1500, 32_000)):
            sweep(f"types_{name}", lambda x, f=loss: f(x, x * 2), (rows, columns), back=True)


def _single_rows() -> None:
    """How cuDNN splits the keys of one row."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    for batch in (1, 2, 4, 8, 16, 32):
        for heads, shared in ((8, 8), (16, 4), (32, 8), (64, 8)):
            for columns in (128, 256, 300, 512, 1024, 2048, 8192):
                for head in (64, 128):

                    def attend(x: torch.Tensor, b: int = batch, k: int = shared, c: int = columns) -> torch.Tensor:
                        keys = torch.ones(b, k, c, x.shape[-1], dtype=x.dtype, device="cuda")
                        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                            return nn.functional.scaled_dot_product_attention(x, keys, keys, enable_gqa=True)

                    sweep(f"rows_sdpa_{shared}_{columns}", attend, (batch, heads, 1, head), HALF)
    for batch, heads, rows, head in ((4, 8, 2, 64), (4, 8, 3, 64), (4, 8, 16, 128), (2, 4, 64, 160), (2, 4, 64, 256)):

        def square(x: torch.Tensor) -> torch.Tensor:
            with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):
                return nn.functional.scaled_dot_product_attention(x, x, x)

        def efficient(x: torch.Tensor) -> torch.Tensor:
            with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
                return nn.functional.scaled_dot_product_attention(x, x, x)

        sweep("rows_square", square, (batch, heads, rows, head), HALF, back=True)
        sweep("rows_efficient", efficient, (batch, heads, rows, head), HALF, back=True)
        sweep("rows_efficient", efficient, (batch, heads, 10 * rows, head), HALF, back=True)


def _between() -> None:
    """What follows from the source, and no card has recorded yet."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    loss = nn.functional.binary_cross_entropy_with_logits
    sweep("between_bce_weight", lambda x: loss(x, x.detach(), weight=x.detach()), (50, 2000), back=True)
    sweep("between_bce_pos_weight", lambda x: loss(x, x.detach(), pos_weight=x.detach()[0]), (50, 2000), back=True)
    sweep("between_bce_none", lambda x: loss(x, x.detach(), reduction="none"), (50, 2000), back=True)
    sweep("between_masked_select", lambda x: x.masked_select(x > 0), (50, 2000))
    sweep("between_nonzero", lambda x: x.nonzero(), (4096,), torch.int64)
    sweep("between_unique_inverse", lambda x: x.unique(return_inverse=True), (100_000,), torch.int64)
    sweep("between_bincount", lambda x: x.bincount(minlength=300), (100_000,), torch.int64)
    sweep("between_topk", lambda x: x.topk(8), (65_000, 400))
    sweep("between_cumsum", lambda x: x.cumsum(0), (1_000_000,), HALF)
    sweep("between_multinomial", lambda x: x.multinomial(3), (64, 50_257))
    sweep("between_embedding_bag", lambda x: nn.functional.embedding_bag(
        torch.zeros(40, 50, dtype=torch.int64, device="cuda"), x, mode="sum"), (1000, 64))  # fmt: skip
    for count in (2304, 2305, 20_000, 120_000):
        sweep(f"between_randperm_{count}", lambda x, n=count: torch.randperm(n, device="cuda"), (1,))
    for shape in ((256,), (256, 256), (257, 3)):

        def look_up(x: torch.Tensor) -> torch.Tensor:
            index = torch.zeros(5000, dtype=torch.int64, device="cuda")
            return x[index, index] if x.dim() > 1 else x[index]

        sweep("between_index_back", look_up, shape, back=True)
    for shape in ((2, 4, 4096, 256), (8, 32, 128, 256), (4, 16, 2048, 192)):

        def attend(x: torch.Tensor) -> torch.Tensor:
            with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
                return nn.functional.scaled_dot_product_attention(x, x, x)

        sweep("between_efficient", attend, shape, HALF, back=True)
    for name, options in {"alone": {"batch_first": True}, "rows_first": {}}.items():

        def heads(x: torch.Tensor, o: dict[str, bool] = options) -> object:
            with torch.no_grad():
                return nn.MultiheadAttention(64, 4, **o).cuda().eval()(x, x, x, need_weights=False)[0]  # type: ignore[arg-type]

        sweep(f"between_attention_{name}", heads, (2, 16, 64))


for _add in (
    _between,
    _reductions,
    _ordered,
    _norms,
    _indexed,
    _attention,
    _products,
    _losses,
    _strided,
    _other_types,
    _single_rows,
):
    _add()
