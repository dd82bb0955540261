"""Levels of detail that keep every peak."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fragscope.measure.segments import Ints


def decimate(values: npt.NDArray[Any], points: int) -> Ints:
    """Choose rows of a series so that a drawing of them shows every peak and every dip.

    The rows are cut into equal buckets; the first and the last row and each bucket's largest and smallest value (the
    first where several are equal) are kept, in their order. What lies between them is left out, so distances between
    kept rows differ: plot them at their own row numbers.

    Args:
        values: shape ``(n,)``.
        points: most rows to choose, at least 4.

    Returns:
        Row numbers, int64, ascending; all rows where ``n <= points``.
    """
    if points < 4:
        raise ValueError(f"at least 4 points are needed to keep both ends and both extremes, not {points}")
    count = len(values)
    if count <= points:
        return np.arange(count, dtype=np.int64)
    buckets = (points - 2) // 2
    edges = np.arange(buckets + 1, dtype=np.int64) * count // buckets
    kept = [0, count - 1]
    for start, stop in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        bucket = values[start:stop]
        kept += [start + int(np.argmax(bucket)), start + int(np.argmin(bucket))]
    return np.unique(np.array(kept, dtype=np.int64))
