"""Deferred frees of a program: when other streams are done with them, and in which order the binary noticed.

Several frees that can complete at once do so in the order of a hash table inside the binary. A model cannot know it, so
it is told about completed uses in the order that the binary's trace shows.
"""

from __future__ import annotations

from answers import Answers
from programs import Op, Program

_NEVER = (1 << 62, 0)


def noticed(program: Program, answers: Answers) -> list[list[int]]:
    """For each operation, the ids whose deferred frees the binary completed in it, in its order."""
    live: dict[int, int] = {}  # id -> address
    deferred: dict[int, int] = {}  # address -> id; an address is not given again before the free completed
    found = []
    for op, entries in zip(program.ops, answers.entries, strict=True):
        own = None
        if op[0] == "free" and op[1] in live:
            own = live.pop(op[1])
            deferred[own] = op[1]
        completed = [deferred.pop(entry.addr) for entry in entries if entry.action == "free_completed"]
        found.append([id_ for id_ in completed if own is None or id_ != op[1]])
        if op[0] == "alloc":
            live.update((op[1], entry.addr) for entry in entries if entry.action == "alloc")
    return found


class Completions:
    """Follows a program and says which ids the model is to be told about before an operation.

    Args:
        program: the program.
        answers: the binary's.
        scopes_hold: whether an open scope holds frees back, as up to 2.12: their events are recorded when the allocator
            next looks outside of scopes, and uses recorded inside one are then taken to be over.
    """

    def __init__(self, program: Program, answers: Answers, scopes_hold: bool) -> None:
        self._scopes_hold = scopes_hold
        self.noticed = noticed(program, answers)
        self._batch = {id_: (number, place) for number, ids in enumerate(self.noticed) for place, id_ in enumerate(ids)}
        self._stream: dict[int, int] = {}  # of every allocation
        self._uses: dict[int, set[int]] = {}  # allocation -> other streams that use it
        self._uses_in_scope: dict[int, set[int]] = {}  # of those, recorded while a scope was open
        self._held: list[int] = []  # freed inside a scope, no events yet
        self._events = 0  # recorded so far
        self._waiting: dict[int, dict[int, int]] = {}  # freed -> stream that is not done -> number of the event
        self._done: set[int] = set()  # freed, all streams are done, the model does not know
        self._told: set[int] = set()
        self.cross_stream_uses = 0
        self.held_reordered = 0  # times that held frees completed in the order of heap addresses, not that of the frees

    def before(self, number: int, synchronizes: bool) -> list[int]:
        """Ids to tell the model about before an operation.

        Args:
            number: of the operation.
            synchronizes: whether the program asks the allocator to wait for all streams, so that all frees complete.
        """
        here = self.noticed[number]
        if synchronizes:
            ready = [id_ for id_ in here if id_ not in self._told]
        else:
            ready = [id_ for id_ in here if id_ in self._done]
        # Others can be told already, unless one that completes with them, but before them, is still to come.
        later = sorted((id_ for id_ in self._done if id_ not in ready), key=lambda id_: self._batch.get(id_, _NEVER))
        ready += [id_ for id_ in later if self._is_next(id_, ready)]
        self._done.difference_update(ready)
        self._told.update(ready)
        return ready

    def _is_next(self, id_: int, ready: list[int]) -> bool:
        if id_ not in self._batch:
            return True
        number, place = self._batch[id_]
        return all(earlier in self._told or earlier in ready for earlier in self.noticed[number][:place])

    def after(self, number: int, op: Op, served: bool, scope_open: bool, looked: bool) -> None:
        """Follow an operation that the binary has performed.

        Args:
            number: of the operation.
            op: the operation.
            served: whether it did anything: False for a refused request and for what is done to its id.
            scope_open: whether an allocation scope was open.
            looked: whether the allocator looked for completed frees.
        """
        holds = self._scopes_hold and scope_open
        if looked:
            held = [id_ for id_ in self.noticed[number] if id_ in self._held]
            self.held_reordered += held != sorted(held, key=self._held.index)
            for id_ in self._held:
                self._record(id_, self._uses.pop(id_) - self._uses_in_scope.pop(id_, set()))
            self._held.clear()
        for id_ in self.noticed[number]:
            # Waiting for an event is waiting for all that was put on its stream before.
            for stream, event in self._waiting.pop(id_, {}).items():
                self._finish(stream, event)
            self._done.discard(id_)
        match op:
            case ["alloc", id_, _, stream] if served:
                self._stream[id_] = stream
            case ["use", id_, stream] if served and stream != self._stream[id_]:
                self.cross_stream_uses += 1
                self._uses.setdefault(id_, set()).add(stream)
                if holds:
                    self._uses_in_scope.setdefault(id_, set()).add(stream)
            case ["free", id_] if served and id_ in self._uses:
                if holds:
                    self._held.append(id_)
                else:
                    self._record(id_, self._uses.pop(id_))
            case ["done", stream]:
                self._finish(stream, self._events)

    def _record(self, id_: int, streams: set[int]) -> None:
        self._events += 1
        self._waiting[id_] = dict.fromkeys(streams, self._events)

    def _finish(self, stream: int, event: int) -> None:
        """The stream is done with everything up to an event."""
        for id_, events in list(self._waiting.items()):
            if events.get(stream, event + 1) <= event:
                del events[stream]
                if not events:
                    del self._waiting[id_]
                    self._done.add(id_)
