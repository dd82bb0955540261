"""What docs/exactness.md says of recorded calls is what the recordings hold."""

from __future__ import annotations

import json
import lzma
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PROSE = " ".join((ROOT / "docs" / "exactness.md").read_text().split())


def unpacked(path: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(lzma.decompress((ROOT / path).read_bytes()))
    return found


CASES = unpacked("tests/data/footprints/h100-torch-2.11.0.json.xz")["cases"]


def scratch_of(name: str) -> int:
    """Bytes that a call had given back by its end."""
    during = CASES[name]["second"][: CASES[name]["second"].index(["|"])]
    sizes = [event[1] for event in during if event[0] == "alloc"]
    return sum(sizes[event[1]] for event in during if event[0] == "free")


def test_counts_of_calls_are_those_of_the_recordings() -> None:
    recorded = [name for name, case in CASES.items() if "error" not in case]
    of_flashinfer = [name for name in recorded if name.startswith("nvfp4_block_scale_interleave")]
    assert f"{len(recorded):,} calls recorded on an H100" in PROSE
    assert len(of_flashinfer) == 6
    held = 3622  # of tests/integration/test_footprints.py, which counts them itself
    assert (
        f"(known, len(CASES)) == ({held}, {len(recorded) - 6})"
        in (ROOT / "tests" / "integration" / "test_footprints.py").read_text()
    )
    assert f"{held:,} of them must be equal" in PROSE
    assert f"The other {len(recorded) - 6 - held} are of operators" in PROSE
    calls = unpacked("fragscope/record/virtual/scratch/convolutions.json.xz")["calls"]
    assert f"a table of {len(calls):,} calls" in PROSE


def test_what_surprises_was_recorded() -> None:
    assert "takes 135 MB of scratch" in PROSE
    assert round(scratch_of("sum_columns-large") / 1e6) == 135
    assert CASES["sum_columns-large"]["second"][0] == ["alloc", 4000]
    assert "takes 541 MB" in PROSE
    assert [round(scratch_of(f"{op}_columns-large") / 1e6) for op in ("var", "argmax")] == [541, 541]
    assert scratch_of("sum_rows-large") == 0


def test_a_loss_keeps_the_memory_of_all_squares() -> None:
    """The second allocation, after that of the target, becomes the loss; it goes at the end of the backward pass."""
    events = CASES["sweep_mse-1500x32000-f32"]["second"]
    assert events[1] == ["alloc", 1500 * 32_000 * 4]
    assert events[events.index(["|"]) - 1] == ["free", 1]
    assert "holds 192 MB for as long as the loss lives" in PROSE
