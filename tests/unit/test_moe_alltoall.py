"""Sizes and refusals of FlashInfer's one-sided all-to-all.

Expected bytes: FlashInfer's own formula, evaluated by hand for real models (kMaxTopK 22, 8 ranks and 8,192 tokens where
nothing else is said). Releases: read in the wheels' csrc/.../moeAlltoAllKernels.h and csrc/trtllm_moe_alltoall.cu.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scenarios"))

from moe_alltoall import (
    RELEASES,
    MoeLayer,
    RefusedError,
    TooSmallError,
    aux_bytes,
    check_use,
    needed_by,
    release_of,
    workspace_bytes,
)

MIB = 2**20
NOW = release_of("0.6.11.post2")
PR_TEST = MoeLayer("nvfp4", hidden=4096, top_k=2, experts=8, tokens=1024)
DEEPSEEK = MoeLayer("nvfp4", hidden=7168, top_k=8, experts=256, tokens=8192)
QWEN = replace(DEEPSEEK, hidden=4096, experts=128)
NEMOTRON = replace(DEEPSEEK, hidden=1024, top_k=22, experts=512)
GPT_OSS = replace(DEEPSEEK, hidden=2880, top_k=4, experts=128)


@pytest.mark.parametrize(
    ("layer", "ranks", "format_", "expected"),
    [
        (PR_TEST, 2, "nvfp4", 21_709_184),
        (PR_TEST, 2, "bf16", 33_767_808),
        (PR_TEST, 2, "mxfp8", "24.45"),
        (DEEPSEEK, 8, "nvfp4", "1153.4"),
        (DEEPSEEK, 8, "mxfp8", "1363.4"),
        (DEEPSEEK, 8, "bf16", "1797.4"),
        (QWEN, 8, "nvfp4", "661.4"),
        (QWEN, 8, "mxfp8", "781.4"),
        (QWEN, 8, "bf16", "1029.4"),
        (NEMOTRON, 8, "nvfp4", "176.4"),
        (NEMOTRON, 8, "mxfp8", "206.4"),
        (NEMOTRON, 8, "bf16", "268.4"),
        (GPT_OSS, 8, "nvfp4", "464.6"),
        (GPT_OSS, 8, "mxfp8", "549.0"),
        (GPT_OSS, 8, "bf16", "723.4"),
    ],
)
def test_workspaces_of_real_models(layer, ranks, format_, expected):
    size = needed_by(NOW, ranks, layer.sent_as(format_))
    if isinstance(expected, int):
        assert size == expected
    else:
        digits = len(expected.partition(".")[2])
        assert f"{size / MIB:.{digits}f}" == expected


def test_auxiliary_data_line_by_line():
    """2 ranks, 3 tokens: flags and counters 24 -> 128; two flag lists 8 each -> 256, 384; two tables of 3 x 22 x 4 =
    264 bytes -> 648 -> 768 and 1,032 -> 1,152."""
    assert aux_bytes(NOW, 2, 3) == 1152
    assert aux_bytes(release_of("0.6.6"), 2, 3) == 384 + 128 + 128  # 3 x 8 x 4 = 96 bytes each


def test_the_tables_of_targets_follow_the_release():
    """8,192 tokens, two tables of int32: 22 entries a token instead of 8 are 917,504 bytes more."""
    before, after = (aux_bytes(release_of(v), 8, 8192) for v in ("0.6.7.post3", "0.6.8"))
    assert after - before == 917_504


def test_fewer_tokens_leave_less_room_for_flags_not_for_payloads():
    """Layers that differ in tokens: payloads begin where those of the most tokens put them, 180,224 bytes later."""
    assert aux_bytes(NOW, 8, 8192) - aux_bytes(NOW, 8, 7168) == 180_224
    fewer = replace(DEEPSEEK, tokens=7168)
    check_use(NOW, 8, fewer, needed_by(NOW, 8, fewer), 7168)
    with pytest.raises(TooSmallError) as caught:
        check_use(NOW, 8, fewer, needed_by(NOW, 8, fewer), 8192)
    assert caught.value.missing == 180_224


def test_statistics_of_the_load_balancer_are_an_addition_of_later_releases():
    """8 ranks, 256 experts, int32: 8,192 bytes."""
    later = release_of("0.7.2.post1")
    assert aux_bytes(later, 8, 8192, 256) - aux_bytes(later, 8, 8192) == 8192
    assert workspace_bytes(later, 8, 8192, 10, 10, 256) - workspace_bytes(later, 8, 8192, 10, 10) == 8192
    with pytest.raises(RefusedError, match=r"not in flashinfer 0\.6\.14"):
        aux_bytes(release_of("0.6.15.post1"), 8, 8192, 256)


@pytest.mark.parametrize(
    ("version", "top_k", "payloads", "divide", "eplb"),
    [
        ("0.6.6", 8, 8, True, False),
        ("0.6.7.post3", 8, 8, True, False),
        ("0.6.8.post1", 22, 4, True, False),
        ("0.6.11.post2", 22, 4, True, False),
        ("0.6.13", 22, 4, True, False),
        ("0.6.14", 22, 6, True, False),
        ("0.6.15.post1", 22, 6, True, False),
        ("0.6.16.post4", 22, 6, False, True),
        ("0.7.2.post1", 22, 6, False, True),
    ],
)
def test_constants_of_releases(version, top_k, payloads, divide, eplb):
    r = release_of(version)
    assert (r.max_top_k, r.max_payloads, r.experts_divide, r.has_eplb) == (top_k, payloads, divide, eplb)


def test_releases_before_the_first_known_are_refused():
    with pytest.raises(RefusedError, match=r"before 0\.6\.6 are not known"):
        release_of("0.6.5")


def test_every_release_has_kernels_for_what_it_allows_at_most():
    assert all(max(r.top_ks) == r.max_top_k for r in RELEASES)


def fits(layer: MoeLayer, version: str = "0.6.11.post2", ranks: int = 8) -> None:
    check_use(release_of(version), ranks, layer, 2**40, layer.tokens)


@pytest.mark.parametrize(
    ("layer", "version", "ranks", "why"),
    [
        (replace(DEEPSEEK, top_k=10), "0.6.6", 8, "top_k 10 is not within 1 to 8"),
        (replace(DEEPSEEK, top_k=23), "0.6.11", 8, "top_k 23 is not within 1 to 22"),
        (replace(DEEPSEEK, top_k=0), "0.6.11", 8, "top_k 0"),
        (replace(DEEPSEEK, top_k=12), "0.6.15", 8, "unsupported top_k 12"),
        (replace(DEEPSEEK, top_k=20), "0.7.2", 8, "unsupported top_k 20"),
        (replace(DEEPSEEK, experts=250), "0.6.15", 8, "num_experts 250 must be at least ep_size 8 and a multiple"),
        (replace(DEEPSEEK, experts=4), "0.7.2", 8, "num_experts 4 must be at least ep_size 8$"),
        (DEEPSEEK, "0.7.2", 128, "ep_size 128 is not within 1 to 64"),
    ],
)
def test_what_flashinfer_refuses(layer, version, ranks, why):
    with pytest.raises(RefusedError, match=why):
        fits(layer, version, ranks)


@pytest.mark.parametrize(
    ("layer", "version"),
    [
        (replace(DEEPSEEK, top_k=10), "0.6.8"),
        (replace(DEEPSEEK, top_k=12), "0.6.16"),
        (replace(DEEPSEEK, experts=250), "0.6.16"),
        (NEMOTRON, "0.6.8"),
    ],
)
def test_what_later_releases_take(layer, version):
    fits(layer, version)


def test_more_tokens_than_the_workspace_was_made_for_are_refused():
    with pytest.raises(RefusedError, match="runtime_max_tokens_per_rank 8192 exceeds the 4096"):
        check_use(NOW, 8, DEEPSEEK, 2**40, 4096)


def test_a_workspace_serves_the_layer_it_was_made_for_and_no_byte_less():
    for layer in (PR_TEST, DEEPSEEK, GPT_OSS.sent_as("mxfp8"), NEMOTRON.sent_as("bf16")):
        size = needed_by(NOW, 8, layer)
        check_use(NOW, 8, layer, size, layer.tokens)
        with pytest.raises(TooSmallError) as caught:
            check_use(NOW, 8, layer, size - 1, layer.tokens)
        assert caught.value.missing == 1


def test_the_head_overruns_at_combine_and_a_much_smaller_workspace_at_dispatch():
    """8 x 8,192 rows; bf16 dispatch takes 2 x 7,168 instead of 3,584 + 448 bytes of each: 675,282,944 bytes more."""
    head = DEEPSEEK.sent_as("bf16")
    with pytest.raises(TooSmallError, match="combine: payload region insufficient") as caught:
        check_use(NOW, 8, head, needed_by(NOW, 8, DEEPSEEK), 8192)
    assert caught.value.missing == 8 * 8192 * (14_336 - 4_032) == 675_282_944
    with pytest.raises(TooSmallError, match="dispatch: workspace size per rank insufficient"):
        check_use(NOW, 8, head, 500 * MIB, 8192)
