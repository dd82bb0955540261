"""A transformer's training step under autocast asks for what an H100 was asked for, request by request.

Expected: tests/data/traces/train_vit-default, in which timm trained a vision transformer; its layers are written out
here. Compared are a layer's forward and backward pass as they recur.
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402

TESTS = Path(__file__).parents[1]
sys.path.insert(0, str(TESTS / "unit"))

from virtual_cards import h100  # noqa: E402

from fragscope.trace import RequestKind, Requests, load_trace  # noqa: E402

IS_RECENT = tuple(int(n) for n in torch.__version__.split(".")[:2]) >= (2, 11)
pytestmark = [
    pytest.mark.torch,
    pytest.mark.skipif(not IS_RECENT, reason="an older torch takes another attention kernel than the recorded one"),
]
WIDTH, HEADS, BATCH, TOKENS = 384, 6, 9, 101
SUMS = 4 * BATCH * HEADS * TOKENS  # of attention's rows; taken once in each layer's forward pass
WORKSPACE = 4 * BATCH * TOKENS * WIDTH + SUMS + 256  # of attention's backward pass, once in each layer's


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, HEADS, width // HEADS).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        x = functional.scaled_dot_product_attention(q, k, v)
        x = x.transpose(1, 2).reshape(batch, tokens, width)
        return self.proj(x)


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        x = self.fc1(x)
        x = self.act(x)
        return self.fc2(x)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = nn.LayerNorm(WIDTH), Attention(), nn.LayerNorm(WIDTH), Mlp()

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def words(requests: Requests, start: int = 0) -> list[tuple[str, int]]:
    """Allocations and frees, in order, with their sizes."""
    sizes: dict[int, int] = {}
    out = []
    for kind, id_, asked in zip(requests.kind.tolist(), requests.id.tolist(), requests.size.tolist(), strict=True):
        if kind == RequestKind.ALLOC:
            sizes[id_] = asked
            out.append(("alloc", asked))
        elif kind == RequestKind.FREE:
            out.append(("free", sizes[id_]))
        else:
            out.append(("", 0))
    return [word for word in out[start:] if word[0]]


def between(events: list[tuple[str, int]], size: int, number: int) -> list[tuple[str, int]]:
    """From one allocation of a size, the ``number``-th, to the next."""
    at = [i for i, event in enumerate(events) if event == ("alloc", size)]
    return events[at[number] : at[number + 1]]


@pytest.fixture(scope="module")
def recorded() -> list[tuple[str, int]]:
    return words(load_trace(TESTS / "data" / "traces" / "train_vit-default.pickle.xz").requests)


@pytest.fixture(scope="module")
def asked() -> list[tuple[str, int]]:
    gc.collect()
    gc.disable()
    try:
        with h100() as device:
            model = nn.Sequential(*(Layer() for _ in range(5))).cuda()
            optimizer = torch.optim.AdamW(model.parameters())
            x = torch.zeros(BATCH, TOKENS, WIDTH, device="cuda")
            start = len(device.memory.requests)
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(x).float().square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return words(device.memory.requests.finish(), start)
    finally:
        gc.enable()


def test_a_layers_forward_pass(asked, recorded):
    assert len(between(recorded, SUMS, 2)) > 30
    assert between(asked, SUMS, 2) == between(recorded, SUMS, 2)


def test_a_layers_backward_pass(asked, recorded):
    """The accumulation of gradients and the workspace of attention's kernel among it."""
    assert len(between(recorded, WORKSPACE, 2)) > 40
    assert between(asked, WORKSPACE, 2) == between(recorded, WORKSPACE, 2)
