"""A test's figures for machines: JUnit properties, and columns beside pytest-benchmark's times."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fragscope.testing.marker import Bound
from fragscope.testing.measuring import Measurement

PREFIX = "fragscope_"


def properties(measurement: Measurement, bounds: Mapping[str, Bound]) -> list[tuple[str, object]]:
    """Name and value of everything a test report carries; bytes as integers, which survive every serialisation."""
    out: list[tuple[str, object]] = [(f"{PREFIX}{metric}", value) for metric, value in measurement.values().items()]
    out += [(f"{PREFIX}budget_{metric}", bound.bytes) for metric, bound in bounds.items()]
    out.append((f"{PREFIX}recorded_on", measurement.where))
    if measurement.caveats:
        out.append((f"{PREFIX}caveats", "; ".join(measurement.caveats)))
    return out


def without_earlier(properties: list[tuple[str, object]]) -> list[tuple[str, object]]:
    """Properties of others only: a test that runs again states its own anew."""
    return [(name, value) for name, value in properties if not name.startswith(PREFIX)]


def add_columns(benchmark: Any, measurement: Measurement) -> None:
    """Put the figures into the ``extra_info`` of pytest-benchmark's fixture."""
    benchmark.extra_info.update({f"{PREFIX}{metric}": value for metric, value in measurement.values().items()})
