"""The scenario kv-cache-growth: transformers' own caches, the replays of them, and arithmetic that knows neither."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata, util
from pathlib import Path

import numpy as np
import pytest

from fragscope.results import Case, Results, load_results
from fragscope.trace import RequestKind, load_trace

pytest.importorskip("torch")
pytestmark = pytest.mark.torch

ROOT = Path(__file__).parents[2]
MIB = 2**20
HAS_TRANSFORMERS = util.find_spec("transformers") is not None
needs_transformers = pytest.mark.skipif(not HAS_TRANSFORMERS, reason="transformers is not installed")

# As the scenario has them: layers are cut here, which changes neither sizes nor their order within a layer.
LAYERS = 4
UNITS = {"llama-2-7b": 4 * 32 * 128 * 2, "mistral-7b": 8 * 8 * 128 * 2}  # bytes of a token's keys in a layer
STEPS = {"llama-2-7b": (512, *[1] * 64), "mistral-7b": (608, *[1] * 64)}


def run(out: Path, *arguments: str) -> Results:
    command = [sys.executable, "-m", "fragscope", "run", "kv-cache-growth", "--device", "virtual", "--no-report"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(
        [*command, "--out", str(out), *arguments], cwd=ROOT, env=environment, check=True, capture_output=True,
        timeout=300,
    )  # fmt: skip
    return load_results(out)


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> tuple[Results, Path]:
    """Every variant that there is here, four layers of it."""
    out = tmp_path_factory.mktemp("short")
    return run(out, "--set", f"layers={LAYERS}"), out


def case_of(results: Results, preset: str, variant: str, conf: str = "") -> Case:
    (case,) = [c for c in results.cases if (c.preset, c.variant, c.conf) == (preset, variant, conf)]
    return case


def requests(short: tuple[Results, Path], preset: str, variant: str) -> np.ndarray:
    """Kind, lifetime and bytes of the requests of the measured phase, in order."""
    results, out = short
    trace = case_of(results, preset, variant).trace
    assert trace is not None
    loaded = load_trace(out / trace)
    rows = loaded.requests
    wanted = (rows.kind == RequestKind.ALLOC) | (rows.kind == RequestKind.FREE)
    wanted &= rows.phase == loaded.phases.index("measure")
    return np.stack([np.asarray(c[wanted], dtype="<i8") for c in (rows.kind, rows.id, rows.size)], axis=1)


def sizes(rows: np.ndarray) -> list[int]:
    return [int(size) for kind, _, size in rows if kind == RequestKind.ALLOC]


def concatenating(preset: str) -> list[int]:
    """Bytes that a cache asks for that concatenates: new keys, new values, all keys, all values."""
    unit, held, out = UNITS[preset], 0, []
    for count in STEPS[preset]:
        held += count
        out += [count * unit, count * unit, held * unit, held * unit] * LAYERS
    return out


def preallocating(preset: str) -> list[int]:
    """New keys and values; at first room for all and a length of 8 bytes; then places, counted from zero and on."""
    unit, room, out = UNITS[preset], sum(STEPS[preset]), []
    for step, count in enumerate(STEPS[preset]):
        first = [room * unit, room * unit, 8] if step == 0 else []
        out += [count * unit, count * unit, *first, 8 * count, 8 * count] * LAYERS
    return out


@pytest.mark.parametrize("preset", UNITS)
@pytest.mark.parametrize(
    ("variant", "predicted"),
    [
        ("concatenated", concatenating),
        ("preallocated", preallocating),
        pytest.param("dynamic", concatenating, marks=needs_transformers),
        pytest.param("static", preallocating, marks=needs_transformers),
    ],
)
def test_requests_are_those_of_the_arithmetic(short, preset, variant, predicted) -> None:  # type: ignore[no-untyped-def]
    assert sizes(requests(short, preset, variant)) == predicted(preset)


@needs_transformers
@pytest.mark.parametrize("preset", UNITS)
@pytest.mark.parametrize(("replay", "own"), [("concatenated", "dynamic"), ("preallocated", "static")])
def test_a_replay_asks_and_frees_as_the_package_does(
    short: tuple[Results, Path], preset: str, replay: str, own: str
) -> None:
    """Request by request, lifetimes too; which release it was is in the results."""
    assert np.array_equal(requests(short, preset, replay), requests(short, preset, own))
    code = case_of(short[0], preset, own).installed
    assert code is not None
    assert (code.package, code.version) == ("transformers", metadata.version("transformers"))
    assert code.function == f"transformers.cache_utils:{own.title()}Cache"
    assert code.digest


@pytest.mark.parametrize("preset", UNITS)
def test_chunks_hold_all_layers_and_never_move(short: tuple[Results, Path], preset: str) -> None:
    chunk = 16 * 2 * LAYERS * UNITS[preset]
    rows = requests(short, preset, "chunked")
    chunks = [size for size in sizes(rows) if size == chunk]
    assert len(chunks) == -(-sum(STEPS[preset]) // 16)
    token, prompt = UNITS[preset], STEPS[preset][0] * UNITS[preset]
    assert set(sizes(rows)) == {token, prompt, chunk}
    held = {int(i) for kind, i, size in rows if kind == RequestKind.ALLOC and size == chunk}
    assert not held & {int(i) for kind, i, _ in rows if kind == RequestKind.FREE}


def test_every_variant_holds_the_same_in_the_end(short: tuple[Results, Path]) -> None:
    for case in short[0].cases:
        assert case.outcome == "ok"
        assert case.exact
        assert case.numeric is not None
        assert case.numeric["agree"] is True
        assert (case.numeric["compared_with"], case.numeric["device"]) == ("reference", "cpu")
        assert case.numeric["variants"] == (5 if HAS_TRANSFORMERS else 3)


def test_without_transformers_its_variants_are_left_out(short: tuple[Results, Path]) -> None:
    left = {(x.variant, x.reason) for x in short[0].run.not_applicable}
    missing = "transformers is not installed"
    absent = {("kv-cache-growth/dynamic", missing), ("kv-cache-growth/static", missing)}
    assert left == (set() if HAS_TRANSFORMERS else absent)


def test_what_growing_costs_at_full_size(tmp_path: Path) -> None:
    """Of the variants that serve any length, chunks hold least: the cache, and what one layer adds to it.

    Concatenation holds one tensor twice, and what the allocator cannot use again: at 16 MiB and more each tensor has a
    segment of its own (rounded to 2 MiB), and the prompt's are too small from the first token on.
    """
    results = run(tmp_path, "--variant", "c*", "--conf", "", "--conf", "max_split_size_mb:20", "--conf",
                  "expandable_segments:True")  # fmt: skip
    for conf in ("", "max_split_size_mb:20", "expandable_segments:True"):
        for preset, unit in UNITS.items():
            grown, chunked = (case_of(results, preset, v, conf) for v in ("concatenated", "chunked"))
            tokens = sum(STEPS[preset])
            whole = 64 * tokens * unit
            assert chunked.peak.requested == whole + 2 * unit
            assert grown.peak.requested == whole + (tokens - 1) * unit + 2 * unit
            assert chunked.peak.reserved < grown.peak.reserved
    plain = case_of(results, "llama-2-7b", "concatenated")
    assert plain.peak.reserved >= 64 * (16 + 18) * MIB
    # Segments of 20 MiB that are whole again serve nothing below max_split_size_mb:20.
    split = case_of(results, "mistral-7b", "concatenated", "max_split_size_mb:20")
    assert split.peak.reserved > 20 * split.peak.allocated
    assert split.after_empty_cache.reserved < 2 * split.peak.allocated
