"""Operands of types that do not go together are refused on the virtual card as on a real one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from virtual_cards import h100

torch = pytest.importorskip("torch")
from torch.nn import functional  # noqa: E402

pytestmark = pytest.mark.torch
HALF, FLOAT, LONG = torch.float16, torch.float32, torch.int64


def ones(device: str, *shape: int, dtype: torch.dtype = FLOAT) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype, device=device)


def at(device: str) -> torch.Tensor:
    return torch.zeros(2, dtype=LONG, device=device)


SAME_WORDS: dict[str, Callable[[str], object]] = {
    "linear": lambda d: functional.linear(ones(d, 4, 4), ones(d, 4, 4, dtype=HALF), ones(d, 4, dtype=HALF)),
    "linear of three dimensions": lambda d: functional.linear(
        ones(d, 2, 4, 4), ones(d, 4, 4, dtype=HALF), ones(d, 4, dtype=HALF)
    ),
    "a bias of another type": lambda d: functional.linear(
        ones(d, 4, 4, dtype=HALF), ones(d, 4, 4, dtype=HALF), ones(d, 4)
    ),
    "bmm": lambda d: torch.bmm(ones(d, 2, 4, 4, dtype=HALF), ones(d, 2, 4, 4)),
    "einsum": lambda d: torch.einsum("ij,jk->ik", ones(d, 4, 4, dtype=HALF), ones(d, 4, 4)),
    "mv": lambda d: torch.mv(ones(d, 4, 4, dtype=HALF), ones(d, 4)),
    "dot": lambda d: torch.dot(ones(d, 4, dtype=HALF), ones(d, 4)),
    "shapes": lambda d: torch.mm(ones(d, 4, 4), ones(d, 5, 4)),
    "shapes with a bias": lambda d: functional.linear(ones(d, 4, 4), ones(d, 3, 5), ones(d, 3)),
    "no matrix": lambda d: torch.mm(ones(d, 4), ones(d, 4, 4)),
    "a target of integers": lambda d: functional.cross_entropy(ones(d, 3, 4), ones(d, 3, dtype=torch.int32)),
    "index_put_": lambda d: ones(d, 4).index_put_((at(d),), ones(d, 2, dtype=HALF)),
    "index_copy_": lambda d: ones(d, 4).index_copy_(0, at(d), ones(d, 2, dtype=HALF)),
    "index_add_": lambda d: ones(d, 4).index_add_(0, at(d), ones(d, 2, dtype=HALF)),
}


REWORDED = ("mv", "a target of integers")
"""2.9 has other words for these; releases between were not asked."""


def older_than(*release: int) -> bool:
    return tuple(map(int, torch.__version__.split(".")[:2])) < release


def said(program: Callable[[str], object], device: str) -> str:
    with pytest.raises(RuntimeError) as error:
        program(device)
    return str(error.value)


@pytest.mark.parametrize("name", SAME_WORDS)
def test_a_card_and_the_host_say_the_same(name: str) -> None:
    expected = said(SAME_WORDS[name], "cpu")
    with h100():
        found = said(SAME_WORDS[name], "cuda")
    if name not in REWORDED or not older_than(2, 13):
        assert found == expected


OF_CARDS: dict[str, tuple[Callable[[str], object], str]] = {
    # aten/src/ATen/native/cuda/Blas.cpp
    "mm": (
        lambda d: ones(d, 4, 4) @ ones(d, 4, 4, dtype=HALF),
        "expected mat1 and mat2 to have the same dtype, but got: float != c10::Half",
    ),
    "products of integers": (
        lambda d: ones(d, 4, 4, dtype=LONG) @ ones(d, 4, 4, dtype=LONG),
        "\"addmm_cuda\" not implemented for 'Long'",
    ),
    # aten/src/ATen/native/Convolution.cpp; BFloat16 is not among the names that processErrorMsg translates
    "convolution": (
        lambda d: functional.conv2d(ones(d, 1, 3, 8, 8), ones(d, 4, 3, 3, 3, dtype=HALF)),
        "Input type (torch.cuda.FloatTensor) and weight type (torch.cuda.HalfTensor) should be the same",
    ),
    "convolution in bfloat16": (
        lambda d: functional.conv1d(ones(d, 1, 3, 8, dtype=torch.bfloat16), ones(d, 4, 3, 3)),
        "Input type (CUDABFloat16Type) and weight type (torch.cuda.FloatTensor) should be the same",
    ),
    # aten/src/ATen/native/cuda/layer_norm_kernel.cu
    "layer_norm": (
        lambda d: functional.layer_norm(ones(d, 3, 4, dtype=HALF), (4,), ones(d, 4), ones(d, 4)),
        "expected scalar type Half but found Float",
    ),
}


@pytest.mark.parametrize("name", OF_CARDS)
def test_a_card_says_it_in_its_own_words(name: str) -> None:
    program, expected = OF_CARDS[name]
    with h100():
        assert said(program, "cuda") == expected


def test_what_autocast_casts_goes_together() -> None:
    with h100(), torch.autocast("cuda", torch.bfloat16):
        x = ones("cuda", 4, 4)
        assert functional.linear(x.half(), x, x[0].bfloat16()).dtype == torch.bfloat16
        assert functional.layer_norm(x.half(), (4,), x[0], x[0]).dtype == FLOAT


def test_results_that_are_given_are_no_operands() -> None:
    with h100():
        matrix, vector = ones("cuda", 4, 4), ones("cuda", 4)
        for run, operands, out in (
            (torch.mm, (matrix, matrix), matrix.clone()),
            (torch.addmm, (vector, matrix, matrix), matrix.clone()),
            (torch.bmm, (matrix[None], matrix[None]), matrix[None].clone()),
            (torch.mv, (matrix, vector), vector.clone()),
            (torch.dot, (vector, vector), vector[0].clone()),
            (torch.vdot, (vector, vector), vector[0].clone()),
            (torch.index_copy, (vector, 0, at("cuda"), vector[:2]), vector.clone()),
            (torch.index_add, (vector, 0, at("cuda"), vector[:2]), vector.clone()),
        ):
            assert run(*operands, out=out) is out


def test_of_empty_operands_no_kernel_is_asked() -> None:
    """Kernels of products return before they look at the type; a convolution of nothing has a backend of its own."""
    with h100():
        assert torch.mm(ones("cuda", 0, 4, dtype=LONG), ones("cuda", 4, 4, dtype=LONG)).shape == (0, 4)
        assert torch.mm(ones("cuda", 4, 0, dtype=LONG), ones("cuda", 0, 4, dtype=LONG)).shape == (4, 4)
        assert torch.bmm(ones("cuda", 0, 4, 4, dtype=LONG), ones("cuda", 0, 4, 4, dtype=LONG)).shape == (0, 4, 4)
        assert torch.mv(ones("cuda", 0, 4, dtype=LONG), ones("cuda", 4, dtype=LONG)).shape == (0,)
        assert functional.conv2d(ones("cuda", 0, 3, 4, 4, dtype=HALF), ones("cuda", 2, 3, 3, 3)).shape == (0, 2, 2, 2)
        assert functional.layer_norm(ones("cuda", 0, 4, dtype=HALF), (4,), ones("cuda", 4)).shape == (0, 4)


@pytest.mark.skipif(older_than(2, 13), reason="the rule for the shape of this overload is newer")
def test_overloads_that_name_their_type_take_a_bias_of_it() -> None:
    with h100():
        half = ones("cuda", 4, 4, dtype=HALF)
        assert torch.addmm(ones("cuda", 4, 4), half, half, out_dtype=FLOAT).dtype == FLOAT


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_host_tensors_are_quantized_as_ever() -> None:
    with h100():
        host = torch.ones(3)
        assert torch.quantize_per_tensor(input=host, scale=0.1, zero_point=0, dtype=torch.quint8).is_quantized
        listed = torch.quantize_per_tensor([host], torch.tensor([0.1]), torch.tensor([0]), torch.quint8)
        assert listed[0].is_quantized
