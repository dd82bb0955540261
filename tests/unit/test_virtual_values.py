"""What is known of small tensors on the virtual card, what is not, and what is said of the rest."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

torch = pytest.importorskip("torch")
from virtual_cards import h100  # noqa: E402

import fragscope  # noqa: E402
from fragscope.errors import UnsupportedError, UsageError  # noqa: E402
from fragscope.record.virtual.values import LARGEST  # noqa: E402
from fragscope.trace import RequestKind  # noqa: E402

pytestmark = pytest.mark.torch
Make = Callable[[str], "torch.Tensor"]
NAN, INF = float("nan"), float("inf")


def floats(device: str, *numbers: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor(numbers or (0.5, -1.25, 3.0, 1e-30), dtype=dtype, device=device)


KNOWN: dict[str, Make] = {
    "float product": lambda d: floats(d) * floats(d),
    "float quotient": lambda d: floats(d) / torch.tensor(3.0, device=d),
    "quotient of integers": lambda d: torch.arange(7, device=d) / torch.tensor([3], device=d),
    "quotient by a power of two": lambda d: floats(d) / 4 + torch.arange(4, device=d) / torch.tensor(-0.5),
    "whole quotient": lambda d: floats(d, 7.0, -7.0, 0.3, -0.0, 12345.6) // 0.1,
    "whole quotient by the card": lambda d: torch.div(
        floats(d, 7.0, -7.0), torch.tensor(2.5, device=d), rounding_mode="floor"
    ),
    "whole quotient in place": lambda d: torch.arange(9.0, device=d).sub_(4).floor_divide_(3),
    "rounded quotient by the card": lambda d: torch.div(floats(d), torch.tensor(3.0, device=d), rounding_mode="trunc"),
    "rest": lambda d: floats(d, 7.0, -7.0, 0.3) % 0.1,
    "rest of C": lambda d: torch.fmod(floats(d, 7.0, -7.0, 0.3), -3),
    "difference from a number": lambda d: torch.rsub(floats(d), 1.0),
    "float difference": lambda d: floats(d, dtype=torch.float64) - 0.1,
    "conversion to bfloat16": lambda d: floats(d).to(torch.bfloat16),
    "bfloat16 moved": lambda d: floats(d, dtype=torch.bfloat16)[torch.tensor([2, 0], device=d)],
    "comparison of floats": lambda d: floats(d) > 0.1,
    "largest float": lambda d: floats(d).max().reshape(1),
    "float to integer": lambda d: floats(d, -1.9, 2.9).long(),
    "no number to bool": lambda d: floats(d, NAN, 0.0).bool(),
    "stable sort of equals": lambda d: floats(d, 1, 0, 1, 0).sort(stable=True)[1],
    "sort of unequals": lambda d: floats(d, 3, 1, 2).sort()[1],
    "largest two": lambda d: floats(d, 3, 1, 2).topk(2)[1],
    "largest of equal rest": lambda d: floats(d, 1, 3, 1).topk(1)[1],
    "once each, with places": lambda d: torch.unique(torch.tensor([3, 1, 3], device=d), return_inverse=True)[1],
    "steps of a range": lambda d: torch.arange(0.0, 5.0, device=d),
    "embedding": lambda d: torch.nn.functional.embedding(torch.tensor([1, 0], device=d), torch.eye(3, device=d)),
    "written by places": lambda d: torch.zeros(4, device=d).index_put_(
        (torch.tensor([1, 3], device=d),), torch.tensor([5.0, 6.0], device=d)
    ),
    "a number put by a mask": lambda d: torch.index_put(
        torch.arange(3, device=d), (torch.tensor([True, False, True], device=d),), torch.tensor(9)
    ),
    "a number put by a mask of the last dimension": lambda d: torch.ops.aten.index_put_(
        torch.zeros(2, 3, device=d), [None, torch.tensor([True, False, True], device=d)], torch.tensor([9.0])
    ),
    "a number put by a mask and places": lambda d: torch.zeros(2, 3, device=d).index_put_(
        (torch.tensor([True, False], device=d), torch.tensor([2], device=d)), torch.tensor(9.0)
    ),
    "filled by copy": lambda d: torch.empty(3, device=d).copy_(torch.tensor([1.0, 2.0, 3.0])),
    "zeroed": lambda d: torch.empty(3, device=d).zero_(),
    "integer overflow": lambda d: torch.tensor([2**31 - 1], dtype=torch.int32, device=d) + 1,
    "classes": lambda d: torch.nn.functional.one_hot(torch.tensor([2, 0], device=d)),
    "made of numbers on the card": lambda d: torch.tensor([torch.tensor(3, device=d), torch.tensor(4, device=d)]),
    "clone of a storage": lambda d: torch.empty(0, dtype=torch.int64, device=d).set_(
        torch.arange(3, device=d).untyped_storage().clone()
    ),
    "nothing": lambda d: torch.cat([torch.empty(0, device=d), floats(d)]),
}
UNKNOWN: dict[str, Make] = {
    "sum of floats": lambda d: floats(d).sum(),
    "mean": lambda d: floats(d).mean(),
    "exp": lambda d: floats(d).exp(),
    "quotient by a number that float32 does not hold": lambda d: floats(d) / 0.1,
    "rounded quotient by a number": lambda d: torch.div(floats(d), 3, rounding_mode="trunc"),
    "whole quotient, large": lambda d: floats(d, 1e9) // 3,
    "whole quotient of no number": lambda d: floats(d, NAN, INF) // 3,
    "whole quotient by zero": lambda d: floats(d) // 0,
    "rest, of a large number": lambda d: floats(d, 1e9) % 3,
    "bfloat16 quotient": lambda d: floats(d, dtype=torch.bfloat16) / 3,
    "scaled difference": lambda d: torch.sub(floats(d), floats(d), alpha=0.3),
    "scaled difference from a number": lambda d: torch.rsub(floats(d), 1.0, alpha=0.3),
    "bfloat16 product": lambda d: floats(d, dtype=torch.bfloat16) * 3,
    "random": lambda d: torch.rand(3, device=d),
    "random integers": lambda d: torch.randint(5, (3,), device=d),
    "zeros made random": lambda d: torch.zeros(3, device=d).normal_(),
    "uninitialised": lambda d: torch.empty(3, device=d),
    "partly written": lambda d: torch.empty(3, device=d)[:2].fill_(1),
    "places of equals, unsorted": lambda d: floats(d, 1, 0, 1, 0).sort()[1],
    "places of equals, largest": lambda d: floats(d, 1, 1, 0).topk(1)[1],
    "two values for one place": lambda d: torch.zeros(4, device=d).index_put_(
        (torch.tensor([1, 1], device=d),), torch.tensor([5.0, 6.0], device=d)
    ),
    "two values scattered to one place": lambda d: torch.zeros(4, dtype=torch.int64, device=d).scatter_(
        0, torch.tensor([1, 1], device=d), torch.tensor([5, 6], device=d)
    ),
    "too large for an integer": lambda d: floats(d, 1e20).int(),
    "no number to integer": lambda d: floats(d, NAN).long(),
    "division by zero": lambda d: torch.arange(3, device=d) // torch.zeros(3, dtype=torch.int64, device=d),
    "index out of range": lambda d: torch.arange(3, device=d)[torch.tensor([5], device=d)],
    "large": lambda d: torch.zeros(LARGEST + 1, dtype=torch.uint8, device=d),
    "made larger": lambda d: torch.zeros(3, device=d).resize_(100),
    "written as a storage": lambda d: _with_storage(torch.zeros(3, device=d), torch.ones(3)),
    "product of matrices": lambda d: torch.eye(3, device=d) @ torch.eye(3, device=d),
}


def _with_storage(tensor: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    tensor.untyped_storage().copy_(source.untyped_storage())
    return tensor


@pytest.mark.parametrize("make", KNOWN.values(), ids=KNOWN)
def test_known_values_are_those_of_the_host(make: Make) -> None:
    expected = make("cpu")
    with h100():
        found = make("cuda")
        moved = found.cpu()
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
        assert torch.equal(moved, expected)


@pytest.mark.parametrize("make", UNKNOWN.values(), ids=UNKNOWN)
def test_what_a_card_might_compute_otherwise_is_unknown(make: Make) -> None:
    with h100() as device:
        tensor = make("cuda")
        assert device.values.of(tensor) is None
        with pytest.raises(UnsupportedError):
            tensor.flatten()[0].item()


QUOTIENTS = {
    3: (66665, 66665), 5: (39999, 66900), 7: (108530, 71679), 10: (39999, 66900), 49: (51536, 107704),
    100: (55841, 27866), 1000: (113234, 26651), 4: (0, 0),
}  # fmt: skip
"""Of the whole numbers below 200,000 divided by one of the host: how many quotients an H100 (torch 2.11) and the host
round to other floats, of float32 and of float64. A power of two has an exact reciprocal."""


@pytest.mark.parametrize(("divisor", "differ"), QUOTIENTS.items())
def test_quotients_by_a_number_of_the_host_are_those_of_a_card(
    divisor: int, differ: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for limit in ("LARGEST", "LARGEST_OF_FLOATS"):
        monkeypatch.setattr(f"fragscope.record.virtual.values.{limit}", 2**22)
    x = torch.arange(200_000)
    ways: tuple[Make, ...] = (
        lambda t: t / divisor,
        lambda t: t.div(torch.tensor(divisor)),
        lambda t: t.float().div_(divisor),
    )
    with h100():
        on_card = x.cuda()
        for way in ways:
            assert int((way(on_card).cpu() != way(x)).sum()) == differ[0]
        assert int(((on_card.double() / divisor).cpu() != x.double() / divisor).sum()) == differ[1]


def test_views_and_writes_share_values() -> None:
    with h100():
        base = torch.arange(12, device="cuda").view(3, 4)
        column, row = base[:, 1], base[1]
        base.t()[2].fill_(100)
        row.add_(1)
        alias = base.view(torch.int32)
        assert base.tolist() == [[0, 1, 100, 3], [5, 6, 101, 8], [8, 9, 100, 11]]
        assert column.tolist() == [1, 6, 9]
        assert alias[1, ::2].tolist() == [5, 6, 101, 8]


def test_a_number_put_by_a_mask_into_a_copy_leaves_the_input_alone() -> None:
    with h100():
        x = torch.zeros(1000, device="cuda")
        mask = torch.empty(1000, dtype=torch.bool, device="cuda")
        before = torch.cuda.memory_allocated()
        y = torch.index_put(x, (mask,), torch.tensor(9.0))
        assert y is not x
        assert torch.cuda.memory_allocated() - before == 4096
        assert x.count_nonzero() == 0


def test_a_mask_beside_other_indices_needs_its_values() -> None:
    with h100():
        x = torch.zeros(4, 3, device="cuda")
        mask = torch.empty(4, dtype=torch.bool, device="cuda")
        x[mask] = 0.0  # a card fills where the mask says so, and asks nothing
        with pytest.raises(UnsupportedError, match="by a mask"):
            x[mask, torch.tensor([1], device="cuda")] = 0.0
        with pytest.raises(IndexError, match=r"The shape of the mask \[4\] at index 0 .* \[4, 3\] at index 1"):
            x[:, mask] = 0.0


@pytest.mark.parametrize("x", [torch.ones, torch.randn], ids=["known", "unknown"])
def test_batch_norm_writes_its_running_statistics_in_training_only(x: Callable[..., torch.Tensor]) -> None:
    with h100():
        norm, data = torch.nn.BatchNorm1d(8).cuda(), x(4, 8, device="cuda")
        norm.eval()(data)
        assert norm.running_mean.tolist() == [0.0] * 8
        norm.train()(data)
        for written in (norm.running_mean, norm.running_var):
            with pytest.raises(UnsupportedError):
                written.tolist()


def test_control_flow_follows_values() -> None:
    with h100():
        lengths = torch.tensor([3, 0, 2]).cuda()
        assert [int(n) for n in lengths] == [3, 0, 2]
        assert list(range(lengths[0])) == [0, 1, 2]
        assert f"{lengths[2]:03d}" == "002"
        assert (lengths == 0).any()
        assert not (lengths < 0).any()
        rows = torch.rand(3, 5, device="cuda")
        assert rows[lengths > 0].shape == (2, 5)
        assert rows.repeat_interleave(lengths, dim=0).shape == (5, 5)
        assert rows.masked_select(torch.eye(3, 5, dtype=torch.bool, device="cuda")).shape == (3,)
        assert rows.masked_select((lengths > 0)[:, None]).shape == (10,)
        assert [x.tolist() for x in torch.where(lengths > 0)] == [[0, 2]]
        host = torch.zeros(3, dtype=torch.int64)
        host.copy_(lengths)
        assert host.tolist() == [3, 0, 2]


def test_places_are_strided_as_a_card_returns_them() -> None:
    """Source: ``nonzero_cuda_out_impl`` in aten/src/ATen/native/cuda/Nonzero.cu: rows of the transpose."""
    with h100():
        assert torch.eye(3, device="cuda").nonzero().stride() == (1, 3)


def test_values_allocate_nothing_on_the_card() -> None:
    with h100() as device:
        x = torch.tensor([4, 5, 6], device="cuda")
        y = x * 2 + x
        assert (y > 14).any()
        assert y[1].item() == 15
        requests = device.trace().requests
        sizes = requests.size[requests.kind == RequestKind.ALLOC].tolist()
        # the numbers, the product, the sum, the comparison, and whether any is true
        assert sizes == [24, 24, 24, 3, 1]


def test_values_die_with_their_tensors() -> None:
    with h100() as device:
        x = torch.arange(1000, device="cuda")
        assert device.storages.valued == 8000
        x.add_(torch.randint(5, (1000,), device="cuda"))
        assert device.storages.valued == 0
        x = torch.arange(10, device="cuda")
        assert device.storages.valued == 80
        del x
        assert device.storages.valued == 0


@pytest.mark.parametrize("reads", [True, False])
def test_reading_a_number_makes_the_host_wait(reads: bool) -> None:
    """What comes after it is ordered behind the stream that it was read on."""
    with h100() as device:
        device.memory.begin_phase("measure")
        side = torch.cuda.Stream()
        x = torch.zeros(1000, dtype=torch.int64, device="cuda")
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            x.add_(1)
            if reads:
                assert x[0].item() == 1
        x.clone()
        device.memory.end_phase()
        assert bool(device.memory.ordering.hazards) is not reads


def test_kernels_that_torch_does_not_see_leave_nothing_known() -> None:
    with h100() as device:
        x, y = torch.zeros(3, device="cuda"), torch.zeros(3, device="cuda")
        device.kernel("fused", [x], [y])
        assert device.values.of(x) is not None
        assert device.values.of(y) is None


def test_a_captured_graph_computes_when_it_is_replayed() -> None:
    with h100() as device:
        static, steps = torch.zeros(3, device="cuda"), torch.zeros(1, dtype=torch.int64, device="cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = static + 1
            steps.add_(1)
        assert device.values.of(static) is not None
        assert device.values.of(out) is None
        steps.fill_(5)
        static.copy_(torch.ones(3))
        assert (steps.item(), static.tolist()) == (5, [1, 1, 1])
        graph.replay()
        assert static.tolist() == [1, 1, 1]  # the graph reads it
        with pytest.raises(UnsupportedError, match=r"CUDAGraph\.replay"):
            steps.item()


READ: dict[str, Callable[[torch.Tensor], object]] = {
    "a number": lambda x: int(x[3]),
    "places": lambda x: x.nonzero(),
    "a mask": lambda x: x[x > 2],
    "classes": torch.nn.functional.one_hot,
    "repetitions": torch.repeat_interleave,
    "a number nobody knows": lambda x: torch.rand(3, device="cuda").sum().item(),
}


@pytest.mark.parametrize("read", READ.values(), ids=READ)
def test_a_stream_that_is_captured_is_not_waited_for(read: Callable[[torch.Tensor], object]) -> None:
    with h100():
        x = torch.arange(5, device="cuda")
        with (
            pytest.raises(RuntimeError, match="operation failed due to a previous error during capture"),
            torch.cuda.graph(torch.cuda.CUDAGraph()),
        ):
            read(x)


def test_repetitions_of_a_known_number_are_captured() -> None:
    with h100():
        x = torch.arange(5, device="cuda")
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            assert torch.repeat_interleave(x, output_size=10).shape == (10,)


# --- what is said -----------------------------------------------------------------------------------------------------


def test_the_message_names_what_made_the_values_unknown() -> None:
    with h100():
        line = _here() + 1
        w = torch.rand(8, 4, device="cuda")
        mask = (w.sum(-1) > 0) & torch.tensor([True] * 8, device="cuda")
        with pytest.raises(UnsupportedError) as caught:
            mask.any().item()
    text = str(caught.value)
    assert re.search(rf"derive from those of aten::rand at \S*test_virtual_values\.py:{line} \(128 B\)", text), text
    assert caught.value.location is not None
    assert caught.value.location.endswith(f"test_virtual_values.py:{line + 3}")


def test_the_message_says_that_a_tensor_is_too_large() -> None:
    with h100():
        large = torch.zeros(LARGEST + 8, dtype=torch.uint8, device="cuda")
        with pytest.raises(UnsupportedError, match="values are kept up to 1"):
            large.nonzero()


def test_the_message_names_a_write_into_known_memory() -> None:
    with h100():
        x = torch.zeros(4, device="cuda")
        line = _here() + 1
        x.uniform_()
        with pytest.raises(UnsupportedError, match=rf"aten::uniform_ at \S*test_virtual_values\.py:{line}"):
            bool(x[0])


def _here() -> int:
    import inspect

    frame = inspect.currentframe()
    assert frame is not None
    assert frame.f_back is not None
    return frame.f_back.f_lineno


# --- what a scenario supplies -----------------------------------------------------------------------------------------


def test_a_scenario_supplies_the_values_of_a_tensor() -> None:
    with h100() as device:
        mask = torch.rand(4, 4, device="cuda") > 0.5
        before = device.memory.live
        fragscope.supply(mask, torch.eye(4, dtype=torch.bool))
        assert device.memory.live == before
        assert mask.nonzero().shape == (4, 2)
        fragscope.supply(mask[0], True)
        assert mask.sum().item() == 7


def test_a_scenario_supplies_what_an_operator_returns() -> None:
    with h100():
        logits = torch.rand(2, 100, device="cuda")
        with fragscope.supplied("argmax", 17):
            assert logits.argmax(-1).tolist() == [17, 17]
            with fragscope.supplied("aten::argmax", lambda result: torch.arange(result.numel())):
                assert logits.argmax(-1).tolist() == [0, 1]
            assert torch.tensor([1, 5, 2], device="cuda").argmax().item() == 1  # this is known
        with pytest.raises(UnsupportedError):
            logits.argmax(-1).tolist()


def test_a_scenario_supplies_the_routing_of_experts() -> None:
    with h100():
        scores = torch.rand(6, 4, device="cuda")
        balanced = lambda r: None if r.dtype.is_floating_point else torch.arange(12).view(6, 2) % 4  # noqa: E731
        with fragscope.supplied("topk", balanced):
            weights, chosen = scores.softmax(-1).topk(2)
        assert (chosen == 1).nonzero().shape == (3, 2)
        with pytest.raises(UnsupportedError):
            weights.tolist()


def test_a_scenario_supplies_numbers_that_the_host_reads() -> None:
    with h100():
        loss = torch.rand(3, device="cuda").sum()
        with fragscope.supplied("item", 0.25):
            assert loss.item() == 0.25
            assert float(loss.cpu()) == 0.25
            assert f"{loss:.2f}" == "0.25"


def test_without_a_virtual_device_nothing_is_supplied() -> None:
    x = torch.tensor([3, 1])
    fragscope.supply(x, [7, 7])
    with fragscope.supplied("argmax", 1):
        assert (x.tolist(), x.argmax().item()) == ([3, 1], 0)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda x: fragscope.supply(x, torch.zeros(5)), r"the values have the shape \(5,\), the tensor \(4,\)"),
        (lambda x: fragscope.supply(x[:2], 1), "a part of memory whose rest is unknown"),
        (lambda x: fragscope.supply(torch.zeros(4), 1), "not on the card"),
        (lambda x: fragscope.supply(x, x), "a tensor on the host, a list or a number"),
        (lambda x: fragscope.supply(x, "0101"), "a tensor on the host, a list or a number"),
        (lambda x: _argmax_with(x, lambda result: torch.zeros(7)), r"supplied\('aten::argmax'\): .* shape \(7,\)"),
        (lambda x: _argmax_with(x, lambda result: "first"), "a tensor on the host, a list or a number"),
        (lambda x: fragscope.supplied("armax", 1).__enter__(), "torch has no operator 'armax'"),
        (lambda x: fragscope.supplied("nonzero", 1).__enter__(), "supply those that it reads"),
    ],
)
def test_what_cannot_be_supplied_is_said(wrong: Callable[[torch.Tensor], object], words: str) -> None:
    with h100(), pytest.raises(UsageError, match=words):
        wrong(torch.rand(4, device="cuda"))


def _argmax_with(x: torch.Tensor, values: Callable[[torch.Tensor], object]) -> torch.Tensor:
    with fragscope.supplied("argmax", values):
        return x.argmax(-1)


# --- inference mode ---------------------------------------------------------------------------------------------------


def test_inference_mode_asks_for_the_same_memory() -> None:
    """In it torch hands over whole composite operators, which a card takes apart like everywhere else."""

    def sizes(mode: Callable[[], object]) -> list[int]:
        with h100() as device, mode():  # type: ignore[attr-defined]
            x = torch.rand(4, 16, 64, device="cuda")
            layer = torch.nn.Linear(64, 32).cuda()
            y = torch.nn.functional.layer_norm(layer(x), (32,)).reshape(-1).to(torch.float16)
            y = torch.nn.functional.pad(y, (1, 1)).matmul(y.new_ones(y.numel() + 2, 3))
            requests = device.trace().requests
            return requests.size[requests.kind == RequestKind.ALLOC].tolist()

    assert sizes(torch.inference_mode) == sizes(torch.no_grad)


def _whole(h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return h.copy_(x)


WRITES: dict[str, Callable[[torch.Tensor, torch.Tensor], object]] = {
    "a copy": _whole,
    "a copy of a copy": lambda h, x: h.copy_(x.cpu()),
    "a copy into a part": lambda h, x: h[0].copy_(x[0]),
    "assignment": lambda h, x: h.__setitem__(0, x[0]),
    "addition": lambda h, x: h.add_(x.cpu()),
    "output argument": lambda h, x: torch.add(h, x.cpu(), out=h),
    "a copy that does not wait": lambda h, x: h.copy_(x, non_blocking=True),
    "lists of tensors": lambda h, x: torch._foreach_add_([h], [x.cpu()]),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_tensor_of_the_host_that_is_written_with_unknown_values_is_unknown(
    write: Callable[[torch.Tensor, torch.Tensor], object],
) -> None:
    """Its shape is known, and what is computed of it; no number that it held before is handed out."""
    with h100() as device:
        x, h = torch.rand(4, 4, device="cuda"), torch.ones(4, 4)
        alias = h[0]
        write(h, x)
        assert h.device.type == "cpu"
        assert (h + 1).shape == (4, 4)
        assert h.cuda().is_cuda
        assert (x * h.sum()).is_cuda, "a card takes numbers of the host"
        with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
            x + h
        for read in (
            h.sum().item,
            alias[0].item,
            h[0, 0].__float__,
            (h > 0).all().__bool__,
            h.tolist,
            h.numpy,
            torch.full((4,), 7.0, device="cuda").fill_(h[0, 0])[0].item,
            torch.zeros(4, 4, device="cuda").copy_(h)[0, 0].item,
        ):
            with pytest.raises(UnsupportedError, match=r"(those of|at) .*rand"):
                read()
        assert not device.estimated
        h.zero_()
        assert h.sum().item() == 0
        assert alias[0].item() == 0
        write(h, x)
        h.copy_(torch.arange(16.0).view(4, 4))
        assert alias.tolist() == [0, 1, 2, 3]
        write(h, x)
        h.copy_(torch.arange(16.0, device="cuda").view(4, 4))
        assert alias.tolist() == [0, 1, 2, 3]


def test_memory_that_others_read_is_not_written_with_unknown_values() -> None:
    with h100():
        h = torch.ones(4)
        seen = h.numpy()
        with pytest.raises(UnsupportedError, match="NumPy"):
            h.copy_(torch.rand(4, device="cuda"))
        assert seen.tolist() == [1, 1, 1, 1]
        h.copy_(torch.arange(4.0, device="cuda"))
        assert seen.tolist() == [0, 1, 2, 3]


def test_copies_into_the_host_are_held_to_their_shapes() -> None:
    said = r"output with shape \[3\] doesn't match the broadcast shape \[2, 3\]"
    with h100(), pytest.raises(RuntimeError, match=said):
        torch.empty(3).copy_(torch.rand(2, 3, device="cuda"))
