"""What stood when a snapshot's recording began, as far as its entries lead back to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fragscope.errors import InputFileError
from fragscope.trace.snapshot.entries import within_malloc
from fragscope.trace.snapshot.pools import Pools
from fragscope.trace.snapshot.segments import live_at_end
from fragscope.trace.snapshot.settings import conf_of
from fragscope.trace.snapshot.shape import ACTIONS, Checker, is_plain
from fragscope.trace.snapshot.skipped import Skipped
from fragscope.trace.start import StartState, size_rules, start_state
from fragscope.trace.trace import SegmentState


def start_of(
    check: Checker,
    pools: Pools,
    final: tuple[SegmentState, ...],
    segments: Sequence[Any],
    entries: Sequence[Any],
    device: int,
    settings: Mapping[str, Any],
    skipped: Skipped,
) -> StartState | None:
    """What stood when recording began; None for nothing.

    Raises:
        ContradictionError: the entries do not lead to what stands at the end.
    """
    numbers: Sequence[int] = range(len(entries))
    if skipped.unknown:
        numbers = [n for n in numbers if not _is_unknown(entries[n])]
    if not all(is_plain(entries[n]) for n in numbers):
        return None  # reading them in order says which one is not what it should be
    rules = size_rules(settings, conf_of(settings))
    live = live_at_end(check, segments, device)

    def before(rows: Sequence[int]) -> StartState | None:
        def pool_of(at: int, entry: Mapping[str, Any]) -> int:
            return pools.of(rows[at], entry, f"event {rows[at]}", entry["addr"])

        undone = [entries[n] for n in rows]
        return start_state(final, live, undone, pool_of, rules, frees_at_once=skipped.frees_at_once)

    try:
        state = before(numbers)
        first = first_whole(entries, skipped)
        if state is not None and first:
            state = before([n for n in numbers if n >= first])
    except (InputFileError, KeyError, TypeError):
        return None  # likewise
    return state


def first_whole(entries: Sequence[Any], skipped: Skipped) -> int:
    """The first entry that does not belong to a request whose beginning is lost."""
    within = within_malloc(skipped)
    for number, entry in enumerate(entries):
        if _is_unknown(entry):
            continue
        action = entry.get("action") if isinstance(entry, dict) else None
        if action not in within:
            return number
        if action in ("alloc", "oom"):
            return number + 1
    return len(entries)


def _is_unknown(entry: Any) -> bool:
    """Whether an entry is of an action that is not known here, and left out."""
    action = entry.get("action") if isinstance(entry, dict) else None
    return isinstance(action, str) and action not in ACTIONS
