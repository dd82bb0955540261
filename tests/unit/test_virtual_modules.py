"""Modules and optimizers that once did not run on the virtual card, beside the same on the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from virtual_cards import h100

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.optim.swa_utils import AveragedModel  # noqa: E402

from fragscope.errors import UnsupportedError  # noqa: E402

pytestmark = pytest.mark.torch


def lazy(device: str) -> list[torch.Tensor]:
    model = nn.Sequential(nn.LazyConv2d(6, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(5)).to(device)
    out = model(torch.ones(2, 4, 9, 9, device=device))
    out.sum().backward()
    return [out, *model.parameters(), *model.buffers()]


def lazy_by_name(device: str) -> list[torch.Tensor]:
    """``.cuda()`` and ``.cpu()`` instead of ``.to``."""
    model = nn.Sequential(nn.LazyLinear(5), nn.LazyBatchNorm1d())
    model = model.cuda().cpu().cuda() if device == "cuda" else model.cpu()
    out = model(torch.ones(2, 9, device=device))
    return [out, *model.parameters(), *model.buffers()]


def packed(device: str) -> list[torch.Tensor]:
    layer = nn.GRU(8, 4, batch_first=True).to(device)
    x = torch.ones(3, 5, 8, device=device, requires_grad=True)
    given = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 3, 2]), batch_first=True)
    out, lengths = nn.utils.rnn.pad_packed_sequence(layer(given)[0], batch_first=True)
    out.sum().backward()
    return [out, lengths, x.grad]


def masked_encoder(device: str) -> list[torch.Tensor]:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).to(device).eval()
    mask = torch.zeros(2, 5, dtype=torch.bool, device=device)
    with torch.no_grad():
        return [model(torch.ones(2, 5, 8, device=device), src_key_padding_mask=mask)]


def optimized(kind: type, device: str) -> list[torch.Tensor]:
    """A step, its state saved and loaded, which moves it to the card, and another step."""
    layer = nn.Linear(8, 4).to(device)
    optimizer = kind(layer.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        layer(torch.ones(2, 8, device=device)).sum().backward()
        optimizer.step()
        state, optimizer = optimizer.state_dict(), kind(layer.parameters())
        optimizer.load_state_dict(state)
    return [v for values in optimizer.state_dict()["state"].values() for v in values.values()]


def averaged(device: str) -> list[torch.Tensor]:
    layer = nn.Linear(4, 4).to(device)
    average = AveragedModel(layer)
    for _ in range(3):
        average.update_parameters(layer)
    assert int(average.n_averaged) == 3
    return [average.n_averaged, *average.parameters()]


PROGRAMS: dict[str, Callable[[str], list[torch.Tensor]]] = {
    "lazy modules": lazy,
    "lazy modules that are moved by name": lazy_by_name,
    "packed sequences": packed,
    "an encoder with a padding mask": masked_encoder,
    "ASGD": lambda device: optimized(torch.optim.ASGD, device),
    "NAdam": lambda device: optimized(torch.optim.NAdam, device),
    "an average of models": averaged,
}


def described(tensors: list[torch.Tensor]) -> list[Any]:
    return [(tuple(t.shape), t.stride(), t.dtype, t.requires_grad, type(t)) for t in tensors]


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature", "ignore:enable_nested_tensor")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("name", PROGRAMS)
def test_they_run_as_on_the_host(name: str) -> None:
    expected = described(PROGRAMS[name]("cpu"))
    with h100() as device:
        assert described(PROGRAMS[name]("cuda")) == expected
        if name.startswith("an encoder"):
            assert "TransformerEncoder with a padding mask and without gradients" in device.estimated


def test_sparse_gradients_are_refused_by_name() -> None:
    with h100():
        table = nn.Embedding(10, 4, sparse=True).cuda()
        out = table(torch.ones(3, dtype=torch.int64, device="cuda"))
        with pytest.raises(UnsupportedError, match=r"sparse tensors are not supported.*test_virtual_modules"):
            out.sum().backward()
        host = torch.eye(4).to_sparse()
        assert host.is_cuda is False, "those of the host are left alone"
        assert torch.sparse.mm(host, torch.ones(4, 4)).sum() == 16
