"""What a case asked for, in a form that two machines can be compared by."""

from __future__ import annotations

import hashlib

import numpy as np

from fragscope.trace import RequestKind, Requests
from fragscope.trace.window import order_of_first_use


def counted_and_digested(requests: Requests) -> tuple[int, str]:
    """How many allocations and frees there are, and a SHA-256 of their kinds, ids, sizes and streams in order.

    Streams are numbered by first use: their handles differ from machine to machine.
    """
    wanted = (requests.kind == RequestKind.ALLOC) | (requests.kind == RequestKind.FREE)
    columns = [requests.kind[wanted], requests.id[wanted], requests.size[wanted]]
    columns.append(order_of_first_use(requests.stream[wanted]))
    rows = np.ascontiguousarray(np.stack([column.astype("<i8") for column in columns], axis=1))
    return len(rows), hashlib.sha256(rows.tobytes()).hexdigest()
