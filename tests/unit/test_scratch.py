"""Scratch of operators on the virtual card, beyond the recorded calls of tests/integration/test_footprints.py."""

from __future__ import annotations

import functools
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


def test_storage_of_cub_between_the_recordings():
    """By hand from CCCL 3.0: pieces aligned to 256 bytes, and 255 for where they begin."""
    assert [cub.radix_sort(n, 8, 8) for n in (2304, 2305)] == [1, 2 * 18_688 + 8 * 2048 + 1024 + 256 + 255]
    assert cub.radix_sort(5000, 8, 8, passes=1) == 2048 + 2 * 1024 + 256 + 255  # in place
    # 2**28 - 1 elements of 4,608 a tile are 58,254 tiles: one more takes a second set of counts and of counters
    portion = 58_254 * 4608
    counts, tiles, pairs = 8 * 2048, 58_254 * 1024, 8 * portion
    assert cub.radix_sort(portion, 8, 8) == counts + tiles + 2 * pairs + 256 + 255
    assert cub.radix_sort(portion + 32, 8, 8) == 2 * counts + tiles + 2 * (pairs + 256) + 256 + 255
    assert cub.select(5_000_000) == 9728 + 255 + 1 + 255  # 1,184 tiles of 4,224, and 32 states of 8 bytes
    assert cub.plain_sum(5_000_000) == 13_312 + 255 + 1 + 255  # 1,628 tiles of 3,072
    assert cub.sum_by_key(64_512) == 768 + 256 + 255  # 16 tiles of 4,032, with states of 16 bytes and a key each
    assert cub.sum_by_key(64_513) == 1024 + 256 + 255
    # 261 tiles of 3,840: half precision has its states, partial and whole sums apart
    assert cub.scan(1_000_000, 2, is_word=False) == (1280 + 768 + 768 + 255) + 1 + 255
    assert cub.scan(1_000_000, 2) is None
    assert cub.scan((1 << 30) + 1, 4) is None
    assert [cub.count_nonzero(n, card_named("h100-80gb")) for n in (4096, 4097)] == [1, 132 * 8 * 5 * 4 + 128 + 255]


def test_an_operator_that_is_called_gives_back_its_scratch_and_keeps_its_result():
    inner = Plan().take(7).out(0).take(8, 9).give(0).take(5)
    plan = Plan().take(1)
    assert plan.call(inner, 100) == 2
    assert plan.steps == [
        ("take", 1), ("take", 7), ("take", 100), ("take", 8), ("take", 9), ("give", 1), ("take", 5),
        ("give", 5), ("give", 4), ("give", 3),
    ]  # fmt: skip
    assert plan.call(Plan().out(0).guessed("of this kind"), 0) == 6
    assert plan.why == "of this kind"


# --- drawing, picking, counting -----------------------------------------------------------------------------------


def taken(code, device=None) -> list[int]:
    """What a call takes on an H100, in order; bytes."""
    return [n for what, n in events(device, code) if what == "+"]


def test_drawing_checks_the_probabilities_first():
    """``multinomial_out`` in Distributions.cpp, by hand: 3 rows of 700."""
    with h100() as device:
        x = torch.empty(3, 700, device="cuda")
        checked = [4, 1, 4, 1, 1, 12, 3, 1, 1]  # largest, finite, least, positive, both; sums, zero, any, none
        assert taken(lambda: x.multinomial(1), device) == [24, *checked, 8400]
        assert taken(lambda: x.multinomial(4), device) == [96, *checked, 8400, 48]
        assert taken(lambda: x[0].multinomial(1), device) == [8, 4, 1, 4, 1, 1, 4, 1, 1, 2800]
        assert taken(lambda: x[:, ::2].multinomial(1), device)[1:4] == [4, 4200, 1]  # `max` copies what is strided
        assert device.estimated == {}
        x.multinomial(4, replacement=True)
        x.double().multinomial(1)
        assert list(device.estimated) == ["aten::multinomial with replacement", "aten::multinomial of this type"]


def test_a_permutation_is_sorted_by_as_many_bits_as_make_equal_keys_unlikely():
    """31 bits for 20,000, which four bytes hold, and 36 for 120,000: four and five digits."""
    with h100() as device:
        made = [160_000, 8, 160_000, 80_000, 80_000, 80_128 + 160_000 + 4 * 2048 + 4 * 1024 + 256 + 255]
        assert taken(lambda: torch.randperm(20_000, device="cuda"), device) == made
        large = 2 * 960_000 + 5 * 2048 + 27 * 1024 + 256 + 255
        assert taken(lambda: torch.randperm(120_000, device="cuda"), device) == [960_000, 8, *[960_000] * 3, large]
        assert taken(lambda: torch.randperm(0, device="cuda"), device) == [8]
        assert device.estimated == {}
        torch.randperm(20_000, device="cuda", dtype=torch.int32)
        assert list(device.estimated) == ["aten::randperm of this type"]


def test_what_was_told_from_an_h100_is_estimated_on_another_card():
    profile = card_named("l4")
    settings = ReplaySettings(rules_for("2.11.0"), profile.name, profile.total, profile.free)
    with VirtualDevice(profile, settings) as device:
        torch.randperm(9, device="cuda")
        torch.eye(3, device="cuda", dtype=torch.bool).nonzero()
        torch.arange(9, device="cuda").unique()
        assert list(device.estimated) == [
            "aten::randperm of this type", "aten::nonzero of this type or size", "aten::_unique2 of this kind",
        ]  # fmt: skip


def test_picking_counts_first():
    with h100() as device:
        mask = torch.arange(60, device="cuda").view(6, 10) > 41  # 18 of them
        data = torch.empty(6, 10, device="cuda")
        assert taken(mask.nonzero, device) == [4, 1, 288, 1023]
        assert taken(lambda: mask.t().nonzero(), device) == [60, 4, 1, 288, 1023]
        assert taken(lambda: data[mask], device) == [4, 1, 288, 1023, 72]
        assert taken(lambda: data.masked_select(mask), device) == [4, 1, 288, 1023, 72]
        assert device.estimated == {}
        assert taken(torch.arange(4096, device="cuda").nonzero, device) == [4, 1, 4095 * 8, 1023]
        assert device.estimated == {}
        torch.arange(4097, device="cuda").nonzero()
        data[mask] = torch.empty(18, device="cuda")
        data[0].masked_select(mask)
        assert list(device.estimated) == [
            "aten::nonzero of this type or size", "aten::index_put_ with a mask",
            "aten::masked_select of several shapes",
        ]  # fmt: skip


def test_the_unique_keep_the_memory_of_all():
    with h100() as device:
        x = torch.arange(50, device="cuda") % 7
        assert taken(x.unique, device) == [400, 1, 400, 8, 1023]
        found = x.unique()
        assert (found.shape, found.untyped_storage().nbytes()) == ((7,), 400)
        assert found.tolist() == list(range(7))
        assert taken(lambda: x.unique(return_inverse=True), device) == [400] * 3 + [1, 400, 400, 1023, 400, 8, 1023]
        assert x.unique(return_inverse=True)[1].tolist() == x.tolist()
        assert device.estimated == {}
        x.unique(return_counts=True)
        assert list(device.estimated) == ["aten::_unique2 of this kind"]


def test_comparing_looks_at_what_may_differ():
    with h100() as device:
        x = torch.arange(100, device="cuda")
        y = x + 1
        assert taken(lambda: torch.equal(x, y), device) == [100, 1]
        assert not torch.equal(x, y)
        assert torch.equal(x, x)
        assert taken(lambda: torch.equal(x, x), device) == []
        assert taken(lambda: torch.equal(x, x[:9]), device) == []
        assert taken(lambda: torch.equal(x.view(10, 10).t(), y.view(10, 10)), device) == [100, 1]
        floats = torch.ones(100, device="cuda")
        assert torch.allclose(floats, floats)
        assert not torch.allclose(floats, floats * 2)
        assert device.estimated == {}


def test_bins_are_as_many_as_the_largest_says():
    with h100() as device:
        x = torch.arange(50, device="cuda") % 7
        assert taken(x.bincount, device) == [8, 8, 56]
        assert taken(lambda: x.bincount(minlength=300), device) == [8, 8, 2400]
        assert device.estimated == {}
        x.int().bincount()
        assert list(device.estimated) == ["aten::bincount of this type or with weights"]


def test_places_of_a_power_of_two_fit_its_bits():
    """256 rows are told apart by eight bits, and so sorted by one digit, in place; 257 are not."""

    def gradient(*shape: int) -> list[int]:
        with h100() as device:
            x = torch.empty(*shape, device="cuda", requires_grad=True)
            index = [torch.zeros(5000, dtype=torch.int64, device="cuda")] * (2 if len(shape) == 2 else 1)
            y = x[tuple(index)] if len(index) > 1 else x[index[0]]
            given = torch.ones_like(y)
            sizes = taken(lambda: y.backward(given), device)
            assert device.estimated == {}
            return sizes

    pairs = 2 * 40_192
    assert gradient(256)[-1] == 2048 + 2 * 1024 + 256 + 255
    assert gradient(257)[-1] == 2 * 2048 + 2 * 1024 + pairs + 256 + 255
    # two indices: rests and places of each, those of the second added to the first's; then three to sort
    assert gradient(256, 256) == [4 * 65_536, *[40_000] * 7, 2 * 2048 + 2 * 1024 + pairs + 256 + 255]


def test_an_index_of_many_is_checked_by_a_reduction_of_several_blocks():
    """``max`` and ``min`` of 300,000 int64: as ``bincount`` of 256,000 took them."""
    with h100() as device:
        x = torch.zeros(10, device="cuda")
        index, ones = torch.zeros(300_000, dtype=torch.int64, device="cuda"), torch.ones(300_000, device="cuda")
        sizes = taken(lambda: x.index_put_((index,), ones, accumulate=True), device)
        assert [size for size in sizes[:8] if size in (8, 4, 1)] == [8, 4, 1, 8, 4, 1]
        assert device.estimated == {}
        x.index_put_((index[:9].int(),), ones[:9], accumulate=True)
        square = index[:9].view(3, 3).t()
        x.index_put_((square,), ones[:9].view(3, 3), accumulate=True)
        assert list(device.estimated) == [
            "aten::index_put_ with accumulate by such indices", "aten::index_put_ with accumulate on strided tensors",
        ]  # fmt: skip


def test_gradients_of_wide_heads_keep_parts_of_keys_apart():
    """By hand from ``launchKernel``: 200 parts of all heads, of 64 keys each; one of few keys of many heads."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def workspace(batch: int, heads: int, rows: int, head: int) -> int:
        with h100() as device, sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
            x = torch.empty(batch, heads, rows, head, dtype=torch.bfloat16, device="cuda", requires_grad=True)
            y = functional.scaled_dot_product_attention(x, x, x)
            given = torch.ones_like(y)
            largest = max(taken(lambda: y.backward(given), device))
            assert device.estimated == {}
            return largest

    def tiles(rows: int, head: int) -> int:
        return -(-rows // 128) * -(-head // 64) * (128 * 64 + 4)

    assert workspace(2, 4, 4096, 256) == 4 * 8 * (tiles(4096, 256) + 25 * 64 * 512)
    assert workspace(8, 32, 128, 256) == 4 * 256 * (tiles(128, 256) + 64 * 512)
    assert workspace(4, 16, 2048, 192) == 4 * 64 * (tiles(2048, 192) + 3 * 64 * 512)


def test_bags_of_embeddings_take_their_sizes_first():
    with h100() as device:
        table = torch.empty(100, 16, device="cuda")
        words = torch.zeros(7, 5, dtype=torch.int64, device="cuda")
        assert taken(lambda: functional.embedding_bag(words, table, mode="sum"), device) == [56, 56, 280, 448]
        assert device.estimated == {}
        functional.embedding_bag(words, table, mode="max")
        assert list(device.estimated) == ["aten::_embedding_bag_forward_only of this kind"]


def test_binary_cross_entropy_weighs_in_place():
    """By hand from Loss.cpp and FunctionsManual.cpp, 4,000 bytes a tensor.

    Forward: log of the sigmoid, weights of the targets less one and times them, losses, their mean. Backward: a
    sigmoid; with weights of the targets these, one more, and the sigmoid.
    """
    with h100() as device:
        x, target, weight = (torch.empty(50, 20, device="cuda") for _ in range(3))
        x.requires_grad_()
        for given, forward, backward in (
            ({}, [4000, 4000, 4], [4, 4000]),
            ({"weight": weight}, [4000, 4000, 4], [4, 4000]),
            ({"pos_weight": weight[0]}, [4000, 80, 4000, 4000, 4], [4, 4000, 4000, 4000]),
            ({"reduction": "none"}, [4000, 4000], [4000]),
        ):
            loss = functional.binary_cross_entropy_with_logits(x, target, **given)
            said = functools.partial(functional.binary_cross_entropy_with_logits, x.detach(), target, **given)
            assert taken(said, device) == forward
            x.grad = None
            how = [torch.ones_like(loss)] if given.get("reduction") else []
            assert taken(functools.partial(loss.backward, *how), device) == backward
        assert device.estimated == {}
        functional.binary_cross_entropy_with_logits(x, target.half())
        assert list(device.estimated) == ["aten::binary_cross_entropy_with_logits of two types"]


def test_scaled_products_take_the_workspace_of_products_with_a_bias():
    """``scaled_gemm`` in CUDABlas.cpp asks for the same as ``gemm_and_bias`` beside it: 32 MiB and 1 MiB, once."""
    with h100() as device:
        a, scale = torch.empty(64, 32, device="cuda").to(torch.float8_e4m3fn), torch.empty((), device="cuda")
        multiply = functools.partial(torch._scaled_mm, a, a.t(), out_dtype=torch.bfloat16)
        assert taken(lambda: multiply(scale, scale), device) == [8192, 32 * 2**20, 2**20]
        assert taken(lambda: multiply(scale, scale), device) == [8192]
        assert device.estimated == {}
        multiply(torch.empty(64, 1, device="cuda"), torch.empty(1, 64, device="cuda"))
        assert list(device.estimated) == ["aten::_scaled_mm with scales of rows or blocks"]


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
                assert len(device.estimated) == 1
                assert "MultiheadAttention with masks, weights or such heads" in next(iter(device.estimated))
            else:
                (layer.train() if why == "training" else layer)(x)
                assert device.estimated == {}


def attention(heads: int = 4, **options) -> nn.Module:
    return nn.MultiheadAttention(64, heads, **{"batch_first": True, **options}).cuda().eval()


def test_attention_alone_takes_the_steps_that_it_takes_in_a_layer():
    """Those of the layer's first part, which was recorded: the joined projection, the heads, and their projection."""
    with h100() as device, torch.no_grad():
        layer, x = encoder(norm_first=True), torch.empty(2, 16, 64, device="cuda")
        layer(x)
        of_layer = taken(lambda: layer(x), device)
        alone = taken(lambda: layer.self_attn(x, x, x, need_weights=False), device)
        first = of_layer.index(2 * 16 * 192 * 4)
        assert alone == of_layer[first : first + len(alone)]
        assert alone[0] == 2 * 16 * 192 * 4
        assert device.estimated == {}
        out, weights = layer.self_attn(x, x, x, need_weights=False)
        assert (out.shape, weights) == ((2, 16, 64), None)


def test_attention_that_torch_does_not_fuse_is_not_estimated():
    """``MultiheadAttention.forward`` in torch/nn/modules/activation.py has the conditions."""
    with h100() as device, torch.no_grad():
        x, y = (torch.empty(2, 16, 64, device="cuda") for _ in range(2))
        attention()(x, y, y)
        attention(batch_first=False)(x, x, x)
        attention(heads=1)(x, x, x)
        attention(bias=False)(x, x, x)
        attention(add_bias_kv=True)(x, x, x)
        attention()(x, x, x, attn_mask=torch.zeros(16, 16, device="cuda"))
        assert device.estimated == {}
        attention(heads=16)(x, x, x, need_weights=False)  # of four elements each
        assert list(device.estimated) == ["MultiheadAttention with masks, weights or such heads and without gradients"]
    with h100() as device, torch.no_grad():
        layer = nn.TransformerEncoderLayer(64, 16, 128, batch_first=True).cuda().eval()
        layer(torch.empty(2, 16, 64, device="cuda"))
        assert "TransformerEncoderLayer of such heads and without gradients" in device.estimated


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
