"""What a recorder noted between entries: the requests that entries alone leave out."""

from __future__ import annotations

from collections.abc import Sequence

from fragscope.trace.chunks import GAP, NOTE, RELEASED
from fragscope.trace.events import NO_ID, DecisionKind, RequestKind
from fragscope.trace.snapshot.entries import EntryReader
from fragscope.trace.snapshot.pools import Pools
from fragscope.trace.snapshot.shape import Checker
from fragscope.trace.snapshot.skipped import Skipped
from fragscope.trace.trace import Observation, PoolId

_NOTED = frozenset(
    {
        RequestKind.RECORD_STREAM, RequestKind.EMPTY_CACHE, RequestKind.MEMORY_FRACTION, RequestKind.PHASE_BEGIN,
        RequestKind.PHASE_END, RequestKind.OBSERVATION, RequestKind.POOL_CREATE, RequestKind.SCOPE_OPEN,
        RequestKind.SCOPE_CLOSE, RequestKind.POOL_RELEASE, RequestKind.SETTINGS, RequestKind.CAPTURE_BEGIN,
        RequestKind.CAPTURE_END, RequestKind.NON_TORCH, RequestKind.RAW_ALLOC, RequestKind.RAW_FREE,
    }
)  # fmt: skip
"""What a recorder notes; everything else is read from the allocator's events."""


class NotedReader(EntryReader):
    """Reads entries with notes between them.

    Attributes:
        observations: what ``OBSERVATION`` rows refer to.
        confs: what ``SETTINGS`` rows refer to.
        gaps: how often events were lost.
        lost_events: how many of them, as far as that is known.
        unknown_notes: notes of kinds that this version does not know.
    """

    def __init__(
        self, check: Checker, pools: Pools, texts: Sequence[str], *, scopes_defer: bool, releases_in_part: bool
    ) -> None:
        super().__init__(check, pools, Skipped(), scopes_defer=scopes_defer, releases_in_part=releases_in_part)
        self.observations: list[Observation] = []
        self.confs: list[str] = []
        self.gaps = 0
        self.lost_events = 0
        self.unknown_notes = 0
        self._texts = texts
        self._raw: dict[int, tuple[int, int]] = {}  # the recorder's number of raw memory -> id, bytes

    def note(self, kind: int, *, addr: int, size: int, stream: int, pool: PoolId, text: int) -> None:
        """Something happened after the entries read so far; ``kind`` as in ``trace.chunks``."""
        if self._open_free is not None:
            self._close_free(deferred=not self._completes_open)
        if kind == GAP:
            self.gaps += 1
            self.lost_events += max(size, 0)
            self._has_gap = True
        elif kind == RELEASED:
            self._end_release()
        elif kind - NOTE in _NOTED:
            self._row(RequestKind(kind - NOTE), addr, size, stream, self._pools.number(pool), text)
        else:
            self.unknown_notes += 1

    def _row(self, kind: RequestKind, addr: int, size: int, stream: int, pool: int, text: int) -> None:
        append = self.requests.append
        if kind == RequestKind.EMPTY_CACHE:
            self._explicit_release()
            self._in_release = True
        elif kind == RequestKind.RECORD_STREAM:
            id_ = self._live.get(addr)
            if id_ is not None:
                self._uses.setdefault(id_, set()).add(stream)
                append(kind, id=id_, stream=stream)
        elif kind == RequestKind.OBSERVATION:
            what, _, where = self._text(text).partition("\n")
            append(kind, size=len(self.observations))
            self.observations.append(Observation(what, where))
        elif kind == RequestKind.SETTINGS:
            self._notes_settings = True
            append(kind, size=len(self.confs))
            self.confs.append(self._text(text))
        elif kind == RequestKind.PHASE_BEGIN:
            self.phases.append(self._text(text))
            append(kind, phase=len(self.phases) - 1)
        elif kind == RequestKind.PHASE_END:
            append(kind, phase=len(self.phases) - 1)
        elif kind in (RequestKind.POOL_CREATE, RequestKind.SCOPE_OPEN):
            if pool == 0:  # of a capture that failed
                return
            if pool not in self._made_pools:
                self._made_pools.add(pool)
            self._noted_pools.add(pool)
            append(kind, size=size, pool=pool)
        elif kind in (RequestKind.SCOPE_CLOSE, RequestKind.POOL_RELEASE):
            if pool in self._noted_pools:  # else it was made before the recording, which inference tells of
                append(kind, pool=pool)
        elif kind == RequestKind.RAW_ALLOC:
            self._take_raw(addr, size, free=stream)
        elif kind == RequestKind.RAW_FREE:
            taken = self._raw.pop(addr, None)
            if taken is not None:  # else its note was lost
                append(kind, id=taken[0], size=taken[1])
        else:
            append(kind, id=NO_ID, size=size, stream=max(stream, 0), pool=pool)

    def _take_raw(self, number: int, size: int, free: int) -> None:
        """Memory was taken past the allocator; number 0: in vain, with ``free`` bytes left."""
        id_ = self._new_id()
        row = self.requests.append(RequestKind.RAW_ALLOC, id=id_, size=size)
        if number:
            self._raw[number] = id_, size
        else:
            self.decisions.request = row
            self.decisions.append(DecisionKind.OOM, id_, max(free, 0), size, 0, 0)

    def _text(self, number: int) -> str:
        if not 0 <= number < len(self._texts):
            self.unknown_notes += 1  # the disk was full, say
            return ""
        return self._texts[number]
