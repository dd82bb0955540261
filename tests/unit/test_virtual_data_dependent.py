"""What needs the contents of a tensor on the virtual card is refused, at the user's own line."""

from __future__ import annotations

import inspect
import io
import pickle

import pytest

torch = pytest.importorskip("torch")
import numpy  # noqa: E402
from virtual_cards import h100  # noqa: E402

from fragscope.errors import UnsupportedError  # noqa: E402

pytestmark = pytest.mark.torch
NEEDS_DATA = {
    "item": lambda x: x[0, 0].item(),
    "bool": lambda x: bool(x[0, 0]),
    "if": lambda x: 1 if x[0, 0] else 2,
    "not": lambda x: not x[0, 0],
    "any": lambda x: 1 if (x > 0).any() else 0,
    "int": lambda x: int(x[0, 0]),
    "float": lambda x: float(x[0, 0]),
    "complex": lambda x: complex(x[0, 0]),
    "index of a list": lambda x: [1, 2][x[0, 0].long()],
    "range": lambda x: range(x[0, 0].long()),
    "format": lambda x: f"{x[0, 0]:.3f}",
    "format without a specification": lambda x: format(x[0, 0]),
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "asarray": numpy.asarray,
    "item after cpu": lambda x: x.sum().cpu().item(),
    "bool after cpu": lambda x: bool(x.sum().cpu()),
    "numpy after cpu": lambda x: x.cpu().numpy(),
    "tolist after cpu": lambda x: x.cpu().tolist(),
    "tensor of tensors": lambda x: torch.tensor([x[0, 0], x[0, 1]]),
    "equal": lambda x: torch.equal(x, x.clone()),
    "allclose": lambda x: torch.allclose(x, x),
    "assert_close": lambda x: torch.testing.assert_close(x, x.clone()),
    "contains": lambda x: 1 in x,
    "max of a loop": lambda x: max(x[0]),
    "nonzero": lambda x: x.nonzero(),
    "nonzero as tuple": lambda x: torch.nonzero(x, as_tuple=True),
    "argwhere": torch.argwhere,
    "where with a condition only": torch.where,
    "masked_select": lambda x: x.masked_select(x > 0),
    "mask": lambda x: x[x > 0],
    "mask assigned a tensor": lambda x: x.__setitem__(x > 0, torch.ones(16, device="cuda")),
    "mask from the card on the host": lambda x: torch.ones(4, 4)[(x > 0).cpu()],
    "index from the card on the host": lambda x: torch.ones(4, 4)[x[0].long()],
    "slice by a tensor": lambda x: torch.ones(3)[: x[0, 0].long()],
    "unique": lambda x: x.unique(),
    "unique of a dimension": lambda x: torch.unique(x, dim=0, return_inverse=True),
    "unique_consecutive": torch.unique_consecutive,
    "repeat_interleave": lambda x: x.repeat_interleave(x[0].long(), dim=0),
    "bincount": lambda x: torch.bincount(x[0].long()),
    "one_hot": lambda x: torch.nn.functional.one_hot(x[0].long()),
    "to_sparse": lambda x: x.to_sparse(),
    "copy into a tensor of the host, read": lambda x: torch.ones(4, 4).copy_(x).sum().item(),
    "copy into memory that is shared": lambda x: torch.ones(4, 4).share_memory_().copy_(x),
    "bytes of a storage that was copied into": lambda x: bytes(torch.ones(4, 4).copy_(x).untyped_storage()),
    "save after a copy": lambda x: torch.save(torch.ones(4, 4).copy_(x), io.BytesIO()),
    "trunc_normal_": torch.nn.init.trunc_normal_,
    "pickle": pickle.dumps,
    "save": lambda x: torch.save(x, io.BytesIO()),
    "save after cpu": lambda x: torch.save({"w": x.cpu()}, io.BytesIO()),
    "save a module": lambda x: torch.save(torch.nn.Linear(2, 2).cuda().state_dict(), io.BytesIO()),
    "dlpack": lambda x: torch.utils.dlpack.to_dlpack(x),  # noqa: PLW0108 - looked up when it is called
    "bytes of a storage": lambda x: bytes(x.cpu().untyped_storage()),
    "storage as a list": lambda x: x.untyped_storage().tolist(),
    "array interface": lambda x: x.__cuda_array_interface__,
}


def use(need, x):
    return need(x)


@pytest.mark.parametrize("need", NEEDS_DATA.values(), ids=NEEDS_DATA)
def test_refused_at_the_line_of_the_user(need):
    with h100() as device:
        x = torch.rand(4, 4, device="cuda")
        before = device.memory.live
        with pytest.raises(UnsupportedError) as caught:
            use(need, x)
        file, _, line = caught.value.location.rpartition(":")
        assert file == __file__
        written = inspect.unwrap(need).__code__.co_firstlineno if inspect.isfunction(need) else 0
        if written and inspect.getfile(need) == __file__:
            assert int(line) == written
        else:  # torch's or numpy's own function: the line that calls it
            assert int(line) == use.__code__.co_firstlineno + 1
        caught.value.__traceback__ = None
        del caught
        assert device.memory.live == before


def test_what_is_known_without_data_goes_on():
    with h100():
        x = torch.rand(4, 4, device="cuda")
        x[x > 0] = 1.0
        x[torch.tensor([True, False, True, False])] = 2.0
        assert torch.where(x > 0, x, 0.0).shape == (4, 4)
        assert (x.shape, x.stride(), len(x), x.numel(), x.nbytes) == ((4, 4), (4, 1), 4, 16, 64)
        assert x.repeat_interleave(2, dim=0).shape == (8, 4)
        assert [row.shape for row in x] == [(4,)] * 4


def test_tensors_can_be_shown_without_their_values():
    with h100() as device:
        x = torch.rand(4, 4, device="cuda")
        assert repr(x) == "tensor(..., device='cuda:0', size=(4, 4))"
        assert str(x.cpu()) == "tensor(..., device='cpu', contents unknown, size=(4, 4))"
        assert device.estimated["Tensor.__repr__"][0] == 1
        assert repr(torch.ones(1)) == "tensor([1.])"
