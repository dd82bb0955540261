"""The limit of a grid's y dimension on the card at hand."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from launch_grid import launched  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.torch,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


def test_the_largest_grid_runs_whole_and_one_block_more_is_refused():
    assert launched(65_535) == ("", 65_535)
    refused, ran = launched(65_536)
    assert "invalid argument" in refused
    assert ran == 0
