"""Which private pool a request goes to: scopes of ``use_mem_pool`` and captures of CUDA graphs."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field


@dataclass(slots=True, eq=False)
class Scope:
    """An open scope.

    Attributes:
        pool: number of its pool.
        thread: whose requests go there; None for a capture.
        streams: handles of the streams that are captured, which a capture goes by.
        is_broken: whether the program waited for one of them meanwhile, so that nothing comes of the capture.
    """

    pool: int
    thread: int | None = None
    streams: set[int] = field(default_factory=set)
    is_broken: bool = False


class Scopes:
    """The open scopes of one card.

    Args:
        newest_first: whether the newest scope that applies selects the pool, or the oldest.
    """

    def __init__(self, *, newest_first: bool) -> None:
        self._newest_first = newest_first
        self._open: list[Scope] = []

    def begin(self, scope: Scope) -> Scope:
        """Requests that it applies to go to its pool from here on."""
        self._open.append(scope)
        return scope

    def end(self, scope: Scope) -> None:
        """They no longer do."""
        self._open.remove(scope)

    def pool_of(self, stream: int) -> int:
        """Number of the pool that the running thread's requests on a stream go to."""
        if not self._open:
            return 0
        thread = threading.get_ident()
        for scope in reversed(self._open) if self._newest_first else self._open:
            if scope.thread == thread or stream in scope.streams:
                return scope.pool
        return 0

    def is_captured(self, stream: int) -> bool:
        """Whether work on a stream is captured into a CUDA graph."""
        return any(stream in scope.streams for scope in self._open)

    def broken(self, stream: int) -> None:
        """The program waited for a stream that is captured."""
        for scope in self._open:
            scope.is_broken |= stream in scope.streams

    def joins(self, stream: int, event_stream: int) -> None:
        """A stream waits for work that is captured: it is captured from then on, too."""
        for scope in self._open:
            if event_stream in scope.streams:
                scope.streams.add(stream)
