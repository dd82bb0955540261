"""Every row of docs/virtual-device.md is what happens."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
from virtual_cards import h100  # noqa: E402

from fragscope.errors import UnsupportedError  # noqa: E402

pytestmark = pytest.mark.torch
GUIDE = Path(__file__).parents[2] / "docs" / "virtual-device.md"
ROW = re.compile(r"^\| `(?P<code>[^|]+)` \| (?P<outcome>[^|]+) \|", re.MULTILINE)
ROWS = [(m["code"], m["outcome"].strip()) for m in ROW.finditer(GUIDE.read_text())]
SETUP = """
import copy, pickle, torch
from torch import nn
import torch.nn.functional as F
import torch.utils.checkpoint
x = torch.ones(4, 4, device="cuda")
h = torch.ones(4, 4)
layer = nn.Linear(4, 4, bias=False).cuda()
"""


def test_the_guide_has_rows():
    assert len(ROWS) > 40


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("code", "outcome"), ROWS, ids=[code for code, _ in ROWS])
def test_each_row_is_what_happens(code, outcome):
    namespace: dict[str, object] = {"__name__": "guide"}
    with h100() as device:
        exec(SETUP, namespace)
        try:
            exec(compile(code, "guide.py", "exec"), namespace)
            ended = "runs"
        except Exception as e:
            ended = "unsupported" if isinstance(e, UnsupportedError) else type(e).__name__
            if isinstance(e, UnsupportedError):
                assert str(e).endswith("(at guide.py:1)")
    if ended == "runs" and device.estimated:
        assert all(where in ("guide.py:1", "<string>:1") for _, where in device.estimated.values())
        ended = f"estimated: {next(iter(device.estimated))}"
    assert ended == outcome
