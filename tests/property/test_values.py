"""Values of small tensors on the virtual card against the same program on the host."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from virtual_cards import h100  # noqa: E402

pytestmark = pytest.mark.torch

INTEGER_STEPS = {
    "sum of two": lambda a, b: a + b.sum(),
    "difference": lambda a, b: a - b.max(),
    "product": lambda a, b: a * 3,
    "remainder": lambda a, b: a % 7,
    "comparison": lambda a, b: (a > b.min()).long(),
    "negation": lambda a, b: ~a,
    "cumulated": lambda a, b: a.cumsum(-1),
    "sorted": lambda a, b: a.flatten().sort(stable=True)[1],
    "order": lambda a, b: a.flatten().argsort(stable=True),
    "joined": lambda a, b: torch.cat([a.flatten(), b.flatten()]),
    "turned": lambda a, b: a.flip(0),
    "transposed": lambda a, b: a.t() if a.dim() == 2 else a,
    "row": lambda a, b: a[0] if a.dim() > 1 and len(a) else a,
    "every other": lambda a, b: a[::2],
    "back": lambda a, b: a[1:],
    "as rows": lambda a, b: a.reshape(2, -1) if a.numel() and a.numel() % 2 == 0 else a,
    "masked": lambda a, b: a[a > b.min()],
    "where": lambda a, b: torch.where(a > 2, a, -a),
    "places": lambda a, b: (a > 1).nonzero().flatten(),
    "once each": lambda a, b: a.unique(),
    "counted": lambda a, b: torch.bincount(a.flatten().abs() % 9, minlength=9),
    "picked": lambda a, b: b.flatten()[a.flatten() % max(1, b.numel())] if b.numel() else a,
    "gathered": lambda a, b: b.flatten().gather(0, a.flatten() % b.numel()) if b.numel() else a,
    "number": lambda a, b: a + int(b.sum().item()) % 5,
    "if": lambda a, b: a + 1 if (b > 0).any() else a - 1,
    "list": lambda a, b: torch.tensor(a.flatten().tolist()[:4] or [1], device=a.device),
    "as bytes": lambda a, b: a.to(torch.uint8).long(),
    "as float and back": lambda a, b: ((a % 100).float() * 0.5).long(),
    "largest place": lambda a, b: a.flatten().argmax().reshape(1) if a.numel() else a,
    "repeated": lambda a, b: a.flatten()[:5].repeat(2),
    "repeated each": lambda a, b: a.flatten()[:5].repeat_interleave(a.flatten()[:5].abs() % 3),
    "one hot": lambda a, b: torch.nn.functional.one_hot(a.flatten()[:4].abs() % 5, 5),
    "filled": lambda a, b: torch.full_like(a, 3) + a.new_zeros(a.shape),
    "in": lambda a, b: torch.isin(a, b).long(),
}
WRITES = {
    "add": lambda a, b: a.add_(1),
    "fill part": lambda a, b: a[1:].fill_(4),
    "zero": lambda a, b: a[:1].zero_(),
    "copy": lambda a, b: a.copy_(b.flatten()[0].clone()) if b.numel() else a.zero_(),
    "masked": lambda a, b: a.masked_fill_(a > 3, 2),
    "by mask": lambda a, b: a.__setitem__(a < 2, 1),
    "by place": lambda a, b: a.__setitem__(0, 9) if a.dim() and len(a) else None,
    "scattered": lambda a, b: a.scatter_(0, torch.zeros_like(a[:1]), 6) if a.dim() == 1 and len(a) else None,
    "multiplied": lambda a, b: a.__imul__(2),
}
STEP = st.tuples(
    st.sampled_from([*INTEGER_STEPS, *(f"write: {name}" for name in WRITES)]),
    st.integers(0, 100),
    st.integers(0, 100),
)
PROGRAM = st.tuples(
    st.lists(st.lists(st.integers(-20, 20), min_size=1, max_size=12), min_size=1, max_size=3),
    st.lists(STEP, min_size=1, max_size=14),
)


def run(device: str, starts: list[list[int]], steps: list[tuple[str, int, int]]) -> list[torch.Tensor]:
    """All tensors that a program makes; later writes reach earlier views."""
    made = [torch.tensor(numbers, device=device) for numbers in starts]
    for name, first, second in steps:
        a, b = made[first % len(made)], made[second % len(made)]
        if name.startswith("write: "):
            WRITES[name.removeprefix("write: ")](a, b)
        elif not b.numel() and name in ("difference", "comparison", "masked"):
            continue
        else:
            made.append(INTEGER_STEPS[name](a, b))
    return made


@settings(max_examples=60, deadline=None)
@given(PROGRAM)
def test_programs_of_integers_hold_what_the_host_says(program):
    starts, steps = program
    expected = run("cpu", starts, steps)
    with h100():
        found = run("cuda", starts, steps)
        assert all(t.is_cuda for t in found)
        assert [t.tolist() for t in found] == [t.tolist() for t in expected]


@settings(max_examples=40, deadline=None)
@given(PROGRAM)
def test_what_is_written_from_the_unknown_is_unknown_with_all_its_views(program):
    """After a random number went in, no tensor of that storage has a value, and every other has the host's."""
    starts, steps = program
    expected = run("cpu", starts, steps)
    with h100() as device:
        found = run("cuda", starts, steps)
        target = found[0]
        target.add_(torch.randint(5, target.shape, device="cuda"))
        storage = target.untyped_storage()._cdata
        for tensor, value in zip(found, expected, strict=True):
            known = device.values.of(tensor)
            if tensor.untyped_storage()._cdata == storage and tensor.untyped_storage().nbytes():
                assert known is None
            else:
                assert known is not None
                assert known.tolist() == value.tolist()
