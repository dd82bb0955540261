"""Limits of a launch: published tables, FlashInfer's own allocation sequence, and replays held against sums."""

from __future__ import annotations

import pytest

from fragscope.allocator import ReplaySettings, card_named, rules_for
from fragscope.thresholds import (
    FREED,
    TILES,
    Launch,
    MoeModel,
    ctas,
    enough,
    launch_peak,
    launch_trace,
    memory_limit,
    most_tokens,
    recommended_chunk,
    shipped_models,
    thresholds,
    upstream_chunk,
)
from fragscope.trace import RequestKind

MIB, GIB = 1024**2, 1024**3

# Published for tile 128: tokens at the grid's limit, CTAs at 300,000 tokens, GiB of gemm2_output and of gemm1_output
# with its scales. For MiniMax-M2 the last is 19,004 x 128 rows x (768 + 96) bytes = 1.957 GiB.
PUBLISHED = {
    "deepseek-v3": (1_044_511, 19_004, 32.5, 2.6),
    "kimi-k2": (1_042_479, 19_131, 32.7, 2.6),
    "kimi-k3": (517_175, 38_389, 32.8, 7.9),
    "nemotron-3-super": (378_344, 52_070, 12.7, 9.4),
    "nemotron-3-nano": (1_395_391, 14_189, 9.1, 1.8),
    "qwen3-235b-a22b": (1_046_543, 18_877, 18.4, 1.9),
    "qwen3-next-80b": (832_358, 23_945, 11.7, 0.8),
    "gpt-oss-120b": (2_093_087, 9_502, 6.5, 1.8),
    "glm-4.5": (1_046_035, 18_908, 23.1, 1.9),
    "glm-5": (1_044_511, 19_004, 27.8, 2.6),
    "minimax-m2": (1_044_511, 19_004, 13.9, 2.0),
}


def launch(name: str, tile: int = 128) -> Launch:
    return Launch.of(shipped_models()[name], tile)


def settings(conf: str = "", capacity: int | None = None) -> ReplaySettings:
    card = card_named("h100-80gb")
    made = ReplaySettings(rules=rules_for("2.11.0"), card=card.name, total=card.total, capacity=card.free, conf=conf)
    return made if capacity is None else made.with_capacity(capacity)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_table(name):
    limit, at_300k, gemm2, gemm1 = PUBLISHED[name]
    made = launch(name)
    assert made.most_tokens() == limit
    assert (made.ctas(limit), made.ctas(limit + 1)) == (65_535, 65_536)
    assert made.ctas(300_000) == at_300k
    assert upstream_chunk(made) == 300_000  # published: the measured cap binds for every model
    size = {b.name: b.nbytes for b in made.buffers(300_000)}
    assert round(size["gemm2_output"] / GIB, 1) == gemm2
    assert round((size["gemm1_output"] + size["gemm1_output_scale"]) / GIB, 1) == gemm1


def test_smaller_tiles_leave_room_for_fewer_tokens():
    """Published for Nemotron 3 Super at tile 64."""
    assert most_tokens(22, 512, 64) == 189_183
    assert ctas(300_000, 22, 512, 64) == 103_629
    limits = [most_tokens(22, 512, tile) for tile in TILES]
    assert limits == sorted(limits)


def test_a_launch_allocates_what_flashinfer_0_6_11_does():
    """Order, shapes and types of prepare_routing and prepare_moe for a small layer: 700 CTAs, 89,600 rows."""
    made = Launch(experts=300, top_k=4, hidden=2048, intermediate=176, tile=128)
    tokens = (300 + 400 * 128) // 4
    assert made.ctas(tokens) == 700
    assert [(b.name, b.shape, b.dtype) for b in made.buffers(tokens)] == [
        ("packed_topk", (51_500,), "int32"),
        ("expert_weights", (12_875, 4), "bfloat16"),
        ("num_tokens_per_expert", (300,), "int32"),
        ("total_num_padded_tokens", (1,), "int32"),
        ("expanded_idx_to_permuted_idx", (51_500,), "int32"),
        ("permuted_idx_to_token_idx", (89_600,), "int32"),
        ("expert_count_histogram", (600,), "int32"),
        ("cta_idx_xy_to_batch_idx", (700,), "int32"),
        ("cta_idx_xy_to_mn_limit", (700,), "int32"),
        ("num_non_exiting_ctas", (1,), "int32"),
        ("gemm1_output_scale", (89_600 * 12,), "uint8"),  # 176/16 = 11 columns, padded to 12
        ("gemm1_output", (89_600, 88), "uint8"),
        ("gemm2_output", (89_600, 2048), "bfloat16"),
    ]


def test_small_launches_have_floors():
    """Outputs of the matrix products hold 128 KiB at least, the histogram has 512 places."""
    made = Launch(experts=8, top_k=1, hidden=256, intermediate=64, tile=8)
    size = {b.name: (b.shape, b.nbytes) for b in made.buffers(1)}
    assert size["gemm1_output"] == ((4096, 32), 128 * 1024)
    assert size["gemm2_output"] == ((256, 256), 128 * 1024)
    assert size["gemm1_output_scale"] == ((4096 * 4,), 4096 * 4)
    assert size["expert_count_histogram"] == ((512,), 2048)
    assert size["permuted_idx_to_token_idx"] == ((8,), 32)


def test_routing_that_is_not_sliced_is_packed_whole():
    size = {b.name: b.nbytes for b in launch("qwen3-next-80b").buffers(1000, routed=5000)}
    assert size["packed_topk"] == 5000 * 10 * 4
    assert size["expert_weights"] == 1000 * 10 * 2


def test_every_tensor_of_a_launch_is_freed_once():
    names = [b.name for b in launch("kimi-k2").buffers(1000)]
    assert sorted(FREED) == sorted(names)
    # Members of FP4BlockScaleLauncher go first, those of its base in reverse; Python's own tensors outlive the call.
    assert FREED[0] == "gemm1_output_scale"
    assert FREED[-2:] == ("expert_weights", "packed_topk")
    kinds = launch_trace(launch("kimi-k2"), 1000).requests.kind.tolist()
    assert kinds == [RequestKind.ALLOC] * 13 + [RequestKind.FREE] * 13


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("tokens", [1, 8_192, 300_000])
def test_requested_bytes_of_the_replay_are_the_sum(name, tokens):
    made = launch(name)
    peak = launch_peak(made, tokens, settings())
    assert peak.requested == sum(b.nbytes for b in made.buffers(tokens))
    assert peak.requested <= peak.allocated <= peak.reserved
    assert (peak.fits, peak.ctas) == (True, made.ctas(tokens))


def test_reserved_bytes_are_those_of_the_segments():
    """Worked out by hand for Qwen3-Next-80B at 300,000 tokens: default conf, own segments in pages of 2 MiB."""
    rows = 23_945 * 128
    large = [12_000_000, rows * 4, rows * 32, rows * 256, rows * 4096]  # packed, permuted, scales and outputs
    own = sum(-(-size // (2 * MIB)) * 2 * MIB for size in large)
    # 6,000,000 bytes of weights take a segment of 20 MiB, whose rest has room for the 12,000,000 of the expanded
    # indices; what is at most 1 MiB shares a segment of 2 MiB.
    assert launch_peak(launch("qwen3-next-80b"), 300_000, settings()).reserved == own + 20 * MIB + 2 * MIB


def test_no_memory_is_room_for_no_token():
    assert memory_limit(launch("deepseek-v3"), settings(capacity=2 * MIB)).tokens == 0
    assert recommended_chunk(launch("deepseek-v3"), settings(capacity=2 * MIB)) == 0


def test_enough_tokens_pad_one_row_in_ten_under_the_worst_routing():
    for name in PUBLISHED:
        made = launch(name)
        for tokens, keeps in ((enough(made), True), (enough(made) - 1, False)):
            work = tokens * made.top_k
            # The worst routing leaves every expert one row beyond whole tiles.
            padding = made.experts * (made.tile - 1)
            assert (padding * 10 <= work) is keeps
            assert made.ctas(tokens) * made.tile <= work + padding


def test_the_smallest_limit_binds():
    model = shipped_models()["nemotron-3-super"]
    roomy = thresholds(model, 128, settings())
    assert (roomy.binds, roomy.largest) == ("upstream cap", 300_000)
    assert roomy.chunk == enough(launch(model.name)) == recommended_chunk(launch(model.name), settings())
    assert roomy.at_chunk.reserved < roomy.at_largest.reserved / 8
    assert roomy.grid == {tile: most_tokens(22, 512, tile) for tile in TILES}

    tight = thresholds(model, 128, settings(capacity=2 * GIB))
    assert (tight.binds, tight.largest) == ("memory", tight.memory)
    assert tight.chunk == tight.memory == recommended_chunk(launch(model.name), settings(capacity=2 * GIB))
    assert tight.at_largest.reserved <= 2 * GIB

    small = thresholds(model, 64, settings())
    assert (small.binds, small.largest) == ("launch grid", 189_183)


def test_a_curve_goes_up_to_the_grids_limit_and_has_the_marked_tokens():
    found = thresholds(shipped_models()["gpt-oss-20b"], 128, settings())
    tokens = [p.tokens for p in found.curve]
    assert tokens == sorted(set(tokens))
    assert tokens[0] == 1
    assert tokens[-1] == found.grid[128]
    assert {300_000, found.chunk} <= set(tokens)
    assert all(p.fits for p in found.curve)


def test_models_of_the_table_have_the_published_shapes():
    """Experts, top_k, hidden size and width as the table of thresholds gives them."""
    shapes = {
        "deepseek-v3": (256, 8, 7168, 2048), "kimi-k2": (384, 8, 7168, 2048), "kimi-k3": (896, 16, 3584, 3072),
        "nemotron-3-super": (512, 22, 1024, 2688), "nemotron-3-nano": (128, 6, 2688, 1856),
        "qwen3-235b-a22b": (128, 8, 4096, 1536), "qwen3-next-80b": (512, 10, 2048, 512),
        "gpt-oss-120b": (128, 4, 2880, 2880), "glm-4.5": (160, 8, 5120, 1536), "glm-5": (256, 8, 6144, 2048),
        "minimax-m2": (256, 8, 3072, 1536),
    }  # fmt: skip
    models = shipped_models()
    assert {n: (m.experts, m.top_k, m.hidden, m.intermediate) for n, m in models.items() if n in shapes} == shapes


def test_a_launch_is_that_of_a_whole_layer():
    model = MoeModel("m", experts=4, top_k=2, hidden=64, intermediate=32)
    assert Launch.of(model, 8) == Launch(4, 2, 64, 32, 8)
    assert Launch.of(model.sharded(2), 8).intermediate == 16
