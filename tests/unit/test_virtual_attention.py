"""The attention kernel that a card would pick, and what it allocates."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest

torch = pytest.importorskip("torch")
from torch.nn import functional  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from virtual_cards import h100  # noqa: E402

from fragscope.allocator import ReplaySettings, card_named, rules_for  # noqa: E402
from fragscope.record.virtual import VirtualDevice  # noqa: E402
from fragscope.record.virtual.attention import Attention  # noqa: E402
from fragscope.trace import RequestKind  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1] / "integration"))

pytestmark = pytest.mark.torch
HALF, BFLOAT, FLOAT = torch.float16, torch.bfloat16, torch.float32
IS_RECENT = tuple(int(n) for n in torch.__version__.split(".")[:2]) >= (2, 11)
FIRST = "cudnn" if IS_RECENT else "flash"


def picked(device, **options) -> str:
    """The kernel for one call on 2 x 4 x 16 x 64, changed as the options say."""
    shape = options.pop("shape", (2, 4, 16, 64))
    keys = options.pop("keys", shape)
    dtype = options.pop("dtype", BFLOAT)
    mask = options.pop("mask", None)
    q, k = torch.zeros(shape, dtype=dtype, device="cuda"), torch.zeros(keys, dtype=dtype, device="cuda")
    if mask is not None:
        mask = torch.zeros(mask, dtype=torch.bool, device="cuda")
    taken: list[str] = []
    pick = Attention.pick
    with mock.patch.object(Attention, "pick", lambda *a, **k: taken.append(pick(*a, **k)) or taken[-1]):
        out = functional.scaled_dot_product_attention(q, k, k, attn_mask=mask, **options)
    assert out.shape == q.shape
    assert device.estimated == {}
    return taken.pop()


# Source of the expectations: the conditions in aten/src/ATen/native/transformers/cuda/sdp_utils.cpp
CALLS = {
    "half": ({"dtype": HALF}, FIRST),
    "float": ({"dtype": FLOAT}, "mem_efficient"),
    "double": ({"dtype": torch.float64}, "math"),
    "masked": ({"mask": (16, 16)}, "cudnn" if IS_RECENT else "mem_efficient"),
    "masked float": ({"mask": (16, 16), "dtype": FLOAT}, "mem_efficient"),
    "one key": ({"shape": (2, 4, 1, 64), "keys": (2, 4, 1, 64)}, "flash"),
    "head of 12": ({"shape": (2, 4, 16, 12)}, "flash"),
    "head of 300": ({"shape": (2, 4, 16, 304)}, "mem_efficient"),
    "float head of 6": ({"shape": (2, 4, 16, 6), "dtype": FLOAT}, "math"),
    "shared heads": ({"keys": (2, 2, 16, 64), "enable_gqa": True}, FIRST),
    "shared heads of float": ({"keys": (2, 2, 16, 64), "enable_gqa": True, "dtype": FLOAT}, "math"),
    "three dimensions": ({"shape": (4, 16, 64)}, "math"),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_kernel_is_that_of_the_card(name):
    options, kernel = CALLS[name]
    with h100() as device:
        assert picked(device, **options) == kernel


def test_another_card_takes_another_kernel():
    profile = replace(card_named("h100-80gb"), capability=(8, 9))
    settings = ReplaySettings(rules_for("2.11.0"), profile.name, profile.total, profile.free)
    with VirtualDevice(profile, settings) as device:
        assert picked(device) == "flash"
        assert picked(device, mask=(16, 16)) == "mem_efficient"


def test_the_programs_choice_counts():
    with h100() as device:
        with sdpa_kernel(SDPBackend.MATH):
            assert picked(device) == "math"
        with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            assert picked(device) == "mem_efficient"
        with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
            assert picked(device) == "mem_efficient"
        with torch.autocast("cuda"):
            assert picked(device, dtype=FLOAT) == FIRST


@pytest.mark.skipif(not IS_RECENT, reason="an older torch takes another kernel than the recorded one")
def test_allocations_are_those_of_the_recording():
    import test_footprints

    events, estimated, _ = test_footprints.events_on_virtual_card(test_footprints.footprint_cases.CASES["sdpa"])
    assert events == test_footprints.RECORDED["sdpa"]["second"]
    assert estimated == []


@pytest.mark.skipif(not IS_RECENT, reason="an older torch takes another kernel than the recorded one")
def test_with_gradients_sums_are_kept():
    """As events 178 to 183 of tests/data/traces/train_vit-default: seed, offset, result, sums, workspace."""
    with h100() as device:
        q = torch.zeros(18, 3, 101, 64, dtype=BFLOAT, device="cuda", requires_grad=True)
        before = len(device.memory.requests)
        out = functional.scaled_dot_product_attention(q, q, q)
        rows = device.memory.requests.finish()
        kinds = [RequestKind(k).name for k in rows.kind[before:]]
        assert kinds == ["ALLOC"] * 5 + ["FREE"]
        assert rows.size[before:].tolist()[:5] == [8, 8, 698_112, 21_816, 256]
        assert rows.id[-1] == rows.id[-2]
        grad = torch.zeros_like(out)
        before = len(device.memory.requests)
        out.backward(grad)
        rows = device.memory.requests.finish()
        taken = [int(s) for s, k in zip(rows.size[before:], rows.kind[before:], strict=True) if k == RequestKind.ALLOC]
        # As in that recording's backward pass: the gradients of query, key and value, and a workspace.
        assert taken[:4] == [698_112, 698_112, 698_112, 1_418_296]
        assert q.grad.is_cuda


def test_softmax_takes_a_product_on_its_way_back():
    """``softmax_backward`` of tests/data/footprints."""
    import test_footprints

    events, _, _ = test_footprints.events_on_virtual_card(
        test_footprints.footprint_cases.COMPOSITES["softmax_backward"]
    )
    assert events == test_footprints.RECORDED["softmax_backward"]["second"]


def test_host_tensors_attend_as_ever():
    with h100() as device:
        q = torch.ones(1, 2, 3, 4)
        assert functional.scaled_dot_product_attention(q, q, q).sum().item() == 24
        assert device.estimated == {}


def refused(options: dict, device: str) -> str:
    """What torch says of a call that it refuses."""
    q = torch.zeros(options.get("query", (1, 4, 6, 8)), dtype=options.get("dtype", HALF), device=device)
    k = torch.zeros(options.get("key", q.shape), dtype=options.get("key dtype", q.dtype), device=device)
    v = torch.zeros(k.shape, dtype=options.get("value dtype", q.dtype), device=device)
    mask = options.get("mask")
    mask = None if mask is None else torch.zeros(mask, dtype=options.get("mask dtype", q.dtype), device=device)
    with (
        pytest.raises(RuntimeError) as said,
        sdpa_kernel(options.get("kernels", list(SDPBackend.__members__.values()))),
    ):
        functional.scaled_dot_product_attention(
            q, k, v, mask, is_causal=options.get("causal", False), enable_gqa=options.get("shares", False)
        )
    return str(said.value)


REFUSED = {
    "value of another type": {"value dtype": FLOAT},
    "key of another type": {"key dtype": BFLOAT},
    "one dimension": {"query": (8,)},
    "a mask of integers": {"mask": (6, 6), "mask dtype": torch.int64},
    "a mask of another type": {"mask": (6, 6), "mask dtype": BFLOAT},
    "heads that cannot be shared": {"key": (1, 3, 6, 8), "shares": True},
    "a mask besides is_causal": {"mask": (6, 6), "causal": True, "kernels": [SDPBackend.MATH]},
    "heads of two lengths": {"key": (1, 4, 6, 16)},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_in_the_words_of_torch(name):
    expected = refused(REFUSED[name], "cpu")
    with h100():
        assert refused(REFUSED[name], "cuda") == expected


def test_tensors_of_several_devices_are_refused():
    """Source: ``validate_sdpa_input`` in aten/src/ATen/native/transformers/attention.cpp."""
    with h100():
        card, host = torch.zeros(1, 4, 6, 8, device="cuda"), torch.zeros(1, 4, 6, 8)
        for q, k, shown in ((card, host, ("cuda:0", "cpu")), (host, card, ("cpu", "cuda:0"))):
            with pytest.raises(RuntimeError) as said:
                functional.scaled_dot_product_attention(q, k, k)
            assert str(said.value) == (
                "Expected query, key, and value to have the same device type, but got "
                f"query.device: {shown[0]} key.device: {shown[1]} and value.device: {shown[1]} instead."
            )
        half = card.half()
        with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
            functional.scaled_dot_product_attention(half, half, half, attn_mask=torch.zeros(6, 6, dtype=HALF))


@pytest.mark.skipif(not IS_RECENT, reason="cuDNN's kernel comes first from torch 2.11 on")
def test_masks_that_cudnn_does_not_take():
    """Source: ``check_attn_mask_shape`` in aten/src/ATen/native/transformers/sdp_utils_cpp.h."""
    with h100() as device:
        assert picked(device, mask=(4, 16, 16)) == "mem_efficient"
        assert picked(device, mask=(1, 1, 1, 16)) == "cudnn"
        q = torch.zeros(2, 4, 16, 64, dtype=HALF, device="cuda")
        mask = torch.zeros(16, 16, dtype=HALF, device="cuda", requires_grad=True)
        call = {"is_causal": False, "enable_gqa": False}
        assert Attention(device).pick(q, q, q, mask, 0.0, **call) == "mem_efficient"
        assert Attention(device).pick(q, q, q, mask.detach(), 0.0, **call) == "cudnn"
        repeated = mask.detach()[:, :1].expand(16, 16)  # check_last_dim_stride_equals_1_dense
        assert Attention(device).pick(q, q, q, repeated, 0.0, **call) == "math"


def test_heads_that_are_equal_are_not_repeated():
    """Source: ``pre_process_group_query_attention_input`` in aten/src/ATen/native/transformers/attention.cpp."""
    events = {}
    for shares in (False, True):
        with h100() as device, sdpa_kernel(SDPBackend.MATH):
            q = torch.zeros(2, 4, 16, 64, device="cuda")
            functional.scaled_dot_product_attention(q, q, q, enable_gqa=shares)
            events[shares] = device.memory.requests.finish().size.tolist()
    assert events[True] == events[False]
