"""Scratch of operators on the virtual card, beyond the recorded calls of tests/integration/test_footprints.py."""

from __future__ import annotations

from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402
from virtual_cards import h100, live  # noqa: E402

from fragscope.allocator import ReplaySettings, card_named, rules_for  # noqa: E402
from fragscope.record.virtual import VirtualDevice  # noqa: E402
from fragscope.record.virtual.scratch import cub  # noqa: E402
from fragscope.record.virtual.scratch.convolutions import _table, key_of, steps_of  # noqa: E402
from fragscope.record.virtual.scratch.plan import Plan  # noqa: E402
from fragscope.trace import RequestKind  # noqa: E402

pytestmark = pytest.mark.torch


def events(device, code) -> list[tuple[str, int]]:
    """What a call takes and gives back: bytes of each allocation, and by number what is freed."""
    before = len(device.memory.requests)
    kept = code()
    rows = device.memory.requests.finish()
    numbers: dict[int, int] = {}
    out = []
    for row in range(before, len(rows)):
        id_ = int(rows.id[row])
        if rows.kind[row] == RequestKind.ALLOC:
            numbers[id_] = len(numbers)
            out.append(("+", int(rows.size[row])))
        elif id_ in numbers:
            out.append(("-", numbers[id_]))
    del kept
    return out


def test_scratch_goes_back_the_last_first_unless_it_is_said():
    with h100() as device:
        plan = Plan().take(100, 200).give(0).take(300).pass_by(400)
        assert events(device, lambda: device.follow_plan("op", plan, [])) == [
            ("+", 100), ("+", 200), ("-", 0), ("+", 300), ("+", 400), ("-", 3), ("-", 2), ("-", 1),
        ]  # fmt: skip
        assert device.estimated == {}
        device.follow_plan("op", Plan().guessed("of this kind"), [])
        assert list(device.estimated) == ["op of this kind"]


def test_nothing_is_left_where_memory_runs_out():
    with h100() as device:
        before = live(device)
        with pytest.raises(torch.OutOfMemoryError):
            device.follow_plan("op", Plan().take(1000, 2**40), [])
        assert live(device) == before
        x = torch.empty(40_000, 1000, device="cuda")
        held = torch.empty(torch.cuda.mem_get_info()[0] - 2**27, dtype=torch.uint8, device="cuda")
        with pytest.raises(torch.OutOfMemoryError):
            x.sum(0)  # takes 135,168,000 B for a moment
        assert live(device) == before + 2
        del held
        assert x.sum(0).shape == (1000,)


def test_a_card_with_fewer_multiprocessors_splits_sums_less():
    """Blocks wanted: 2,048 threads of 512 on 132 multiprocessors, and 1,536 on 58."""

    def parts(profile) -> int:
        settings = ReplaySettings(rules_for("2.11.0"), profile.name, profile.total, profile.free)
        with VirtualDevice(profile, settings) as device:
            x = torch.empty(1 << 24, device="cuda")
            taken = events(device, x.sum)
        assert [size for what, size in taken if what == "+"][::2] == [4, 4]  # the result, and a semaphore
        return taken[1][1] // 4

    assert parts(card_named("h100-80gb")) == 132 * 4
    assert parts(card_named("l4")) == 58 * 3


def test_storage_of_cub_is_that_of_the_recording():
    """``sweep_sort``, ``sweep_cumsum`` and ``sweep_embedding_back`` of tests/data/footprints; bytes."""
    assert [cub.radix_sort(n, 4, 8) for n in (100, 5000, 100_000, 1 << 20)] == [1, 70_143, 1_228_287, 12_792_319]
    assert [cub.radix_sort(n, 8, 8) for n in (3073, 10_000)] == [67_583, 180_223]
    assert [cub.scan(n, 4) for n in (100, 100_000, 1 << 20)] == [1023, 1279, 5375]
    assert [cub.scan(n, 8) for n in (100, 100_000, 1 << 20)] == [1279, 2815, 19_967]
    assert cub.radix_sort(5000, 16, 8) is None


# --- convolutions -------------------------------------------------------------------------------------------------


def convolution(batch: int = 24) -> list[tuple[str, int]]:
    """The first one of a ResNet-50 on images of 160 x 160."""
    with h100() as device:
        layer = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False).cuda()
        x = torch.empty(batch, 3, 160, 160, device="cuda")
        taken = events(device, lambda: layer(x))
        return taken if not device.estimated else [*taken, *((op, 0) for op in device.estimated)]


def test_a_recorded_convolution_takes_its_workspace():
    """PyTorch's profiler saw 46,732,288 B of the same call on an H100, in blocks of 512 B."""
    (_, out), (_, workspace), given = convolution()
    assert out == 24 * 64 * 80 * 80 * 4
    assert 0 <= 46_732_288 - workspace < 512
    assert given == ("-", 1)


def test_a_convolution_that_was_not_recorded_is_estimated():
    assert convolution(batch=13) == [("+", 13 * 64 * 80 * 80 * 4), ("aten::convolution of this shape", 0)]


@pytest.mark.parametrize("choice", ["benchmark", "deterministic"])
def test_another_choice_of_algorithm_is_estimated(choice, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, choice, True)
    assert convolution()[-1] == ("aten::convolution of this shape", 0)


def test_on_another_card_every_convolution_is_estimated():
    profile = replace(card_named("h100-80gb"), capability=(8, 9))
    settings = ReplaySettings(rules_for("2.11.0"), profile.name, profile.total, profile.free)
    with VirtualDevice(profile, settings) as device:
        nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False).cuda()(torch.empty(24, 3, 160, 160, device="cuda"))
        assert list(device.estimated) == ["aten::convolution of this shape"]


def test_every_line_of_the_table_gives_back_what_it_takes_once():
    """A broken line would take memory that nobody gives back, or give back what was not taken."""
    for key, text in _table().items():
        steps = steps_of(text)
        taken = sum(step == "take" for step, _ in steps)
        given = [n for step, n in steps if step == "give"]
        assert len(set(given)) == len(given), key
        assert all(0 <= n < taken for n in given), key
        assert sorted(n for step, n in steps if step == "out") == list(range(sum(s == "out" for s, _ in steps))), key


def test_a_key_tells_layouts_apart():
    x, w = torch.empty(2, 8, 9, 9, device="meta"), torch.empty(4, 8, 3, 3, device="meta")
    rest = (None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)
    keys = {
        key_of("aten::convolution", (a, w, *rest))
        for a in (x, x.to(memory_format=torch.channels_last), x.transpose(2, 3), x.half())
    }
    assert len(keys) == 4


def test_channels_stay_last_through_convolution_and_normalisation():
    with h100():
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3)).cuda()
        x = torch.empty(2, 3, 16, 16, device="cuda")
        assert model(x).is_contiguous()
        last = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
        assert last.is_contiguous(memory_format=torch.channels_last)
        last.sum().backward()
        assert model[0].weight.grad.shape == (8, 3, 3, 3)


# --- what torch makes of others -----------------------------------------------------------------------------------


def test_the_mean_of_squares_keeps_their_memory():
    with h100() as device:
        x = torch.empty(1000, device="cuda")
        loss = functional.mse_loss(x, x)
        assert (loss.shape, live(device)) == ((), 2)
        assert loss.untyped_storage().nbytes() == 4000


def test_rms_norm_of_second_order_is_estimated():
    with h100() as device:
        x = torch.empty(4, 8, device="cuda", requires_grad=True)
        (grad,) = torch.autograd.grad(functional.rms_norm(x, (8,)).sum(), x, create_graph=True)
        grad.sum().backward()
        assert "aten::_fused_rms_norm_backward of second order" in device.estimated
        assert x.grad.shape == (4, 8)


def test_lists_of_gradients_are_normed_at_once():
    with h100() as device:
        parameters = [nn.Parameter(torch.empty(10, device="cuda")) for _ in range(3)]
        for p in parameters:
            p.grad = torch.empty_like(p)
        taken = events(device, lambda: nn.utils.get_total_norm([p.grad for p in parameters]))
        assert [size for what, size in taken if what == "+"][:4] == [12, 4, 4, 4]


def encoder(**options) -> nn.Module:
    return nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, **options).cuda().eval()


@pytest.mark.parametrize("first", [True, False], ids=["norm first", "norm last"])
def test_an_encoder_layer_without_gradients_keeps_its_attention_apart(first):
    """Its function takes the joined projection, what attention gives, and its projection, in this order."""
    with h100() as device:
        layer, x = encoder(norm_first=first), torch.empty(2, 16, 64, device="cuda")
        with torch.no_grad():
            layer(x)
            taken = [size for what, size in events(device, lambda: layer(x)) if what == "+" and size >= 8192]
        joined, width, inner = 2 * 16 * 192 * 4, 2 * 16 * 64 * 4, 2 * 16 * 128 * 4
        assert taken == ([width] * first) + [joined, width, width, width, inner, width] + ([width] * (not first))
        assert device.estimated == {}


@pytest.mark.parametrize("why", ["masks", "training", "gradients", "alone"])
def test_what_the_fused_layer_does_not_take_is_torchs_own(why):
    with h100() as device:
        layer, x = encoder(), torch.empty(2, 16, 64, device="cuda")
        with torch.set_grad_enabled(why == "gradients"):
            if why == "masks":
                layer(x, src_key_padding_mask=torch.zeros(2, 16, dtype=torch.bool, device="cuda"))
                assert "TransformerEncoderLayer with masks and without gradients" in device.estimated
            elif why == "alone":
                layer.self_attn(x, x, x)
                assert list(device.estimated) == ["MultiheadAttention without gradients"]
            else:
                (layer.train() if why == "training" else layer)(x)
                assert device.estimated == {}


# --- what others do with it ---------------------------------------------------------------------------------------


def test_composites_take_results_and_empty_tensors():
    with h100():
        x, out = torch.zeros(4, 8, device="cuda"), torch.empty(8, device="cuda")
        assert torch.logsumexp(x, 0, out=out) is out
        assert torch.logsumexp(torch.zeros(0, 3, device="cuda"), 0).shape == (3,)
        assert functional.mse_loss(x.half(), x, reduction="none").dtype == torch.float32
        assert functional.huber_loss(x.half(), x, reduction="none").dtype == torch.float16
        assert torch.logsumexp(torch.complex(x, x), 0).dtype == torch.complex64


def test_rms_norm_refuses_what_torch_refuses():
    with h100(), pytest.raises(RuntimeError, match="normalized_shape"):
        functional.rms_norm(torch.zeros(4, 8, device="cuda"), (7,))


def test_attention_without_a_kernel_that_is_left():
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with h100():
        q = torch.zeros(1, 2, 8, 64, dtype=torch.float64, device="cuda")
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION), pytest.raises(RuntimeError, match="No viable backend"):
            functional.scaled_dot_product_attention(q, q, q)


def test_a_product_of_nothing_takes_no_workspace():
    """A card asks for none: an expert without tokens is not the first product of a stream."""
    with h100() as device:
        taken = events(device, lambda: torch.zeros(0, 16, device="cuda") @ torch.zeros(16, 4, device="cuda"))
        assert taken == [("+", 256), ("-", 0)]
        assert device.gemm_workspaces == {}


def many_rows() -> torch.Tensor:
    return nn.LayerNorm(8).cuda()(torch.zeros(70_000, 8, device="cuda")).square().mean()


def expanded_gradient_of_log_softmax() -> torch.Tensor:
    return functional.log_softmax(torch.zeros(4, 8, device="cuda", requires_grad=True), -1).sum()


def expanded_gradient_of_embedding() -> torch.Tensor:
    return nn.Embedding(9, 4).cuda()(torch.zeros(3, dtype=torch.long, device="cuda")).sum()


def channels_last() -> torch.Tensor:
    images = torch.zeros(2, 4, 8, 8, device="cuda").to(memory_format=torch.channels_last)
    return nn.BatchNorm2d(4).cuda()(images).mean()


@pytest.mark.parametrize(
    ("code", "op"),
    [
        (many_rows, "aten::native_layer_norm_backward of so many rows"),
        (expanded_gradient_of_log_softmax, "aten::_log_softmax_backward_data on strided tensors"),
        (expanded_gradient_of_embedding, "aten::embedding_dense_backward on strided tensors"),
        (channels_last, "aten::native_batch_norm with channels last"),
    ],
)
def test_what_no_recording_has_is_estimated(code, op):
    with h100() as device:
        code().backward()
        assert op in device.estimated
