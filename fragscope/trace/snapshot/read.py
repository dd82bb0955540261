"""From a snapshot's file to a Trace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fragscope.errors import InputFileError, UsageError
from fragscope.trace.containers import read_unpacked
from fragscope.trace.pickles import load_plain_pickle
from fragscope.trace.snapshot.beginning import first_whole, start_of
from fragscope.trace.snapshot.entries import EntryReader
from fragscope.trace.snapshot.pools import Pools, PrivateRanges
from fragscope.trace.snapshot.segments import final_segments, live_at_end
from fragscope.trace.snapshot.settings import (
    CONF_KEY,
    conf_of,
    confs_of,
    release_of,
    releases_in_part,
    scopes_defer,
    settings_at_start,
)
from fragscope.trace.snapshot.shape import Checker
from fragscope.trace.snapshot.skipped import skipped_in
from fragscope.trace.start import ContradictionError, StartState, large_page, size_rules, start_state
from fragscope.trace.trace import Loss, Trace

_KNOWN_KEYS = frozenset(
    {"segments", "device_traces", "allocator_settings", "external_annotations", "host_segments", "host_traces"}
)


def read_snapshot(path: Path, device: int | None = None) -> Trace:
    """Read a pickled PyTorch memory snapshot, plain or inside ``.xz`` or ``.gz``.

    Args:
        path: the file.
        device: CUDA device to take where the snapshot holds several.

    Raises:
        InputFileError: the file is not a snapshot, is damaged, hostile or inconsistent.
        UsageError: the snapshot holds several devices and none was chosen, or not the one that was.
    """
    value = load_plain_pickle(read_unpacked(path), path)
    return snapshot_to_trace(value, path, device)


def snapshot_to_trace(value: Any, path: Path, device: int | None = None) -> Trace:
    """Turn a decoded snapshot into a Trace; arguments and errors as ``read_snapshot``.

    Args:
        value: the decoded snapshot.
        path: the file, for errors.
        device: CUDA device to take where the snapshot holds several.
    """
    check = Checker(path)
    top = check.mapping(value, "the file")
    for key in ("segments", "device_traces"):
        if key not in top:
            raise InputFileError(path, f"is not a PyTorch memory snapshot (no {key!r} in it)")
    traces = [check.sequence(t, "device_traces") for t in check.sequence(top["device_traces"], "device_traces")]
    segments = check.sequence(top["segments"], "segments")
    chosen = _choose_device(check, traces, segments, device)
    entries = traces[chosen] if chosen < len(traces) else []
    settings = check.mapping(top.get("allocator_settings", {}), "allocator_settings")
    release = release_of(top, settings, entries)
    pools = Pools(check, PrivateRanges(check, entries, segments, chosen))
    final = final_segments(check, segments, chosen, pools, large_page(conf_of(settings)))
    pending = sum(state == "pending" for s in final for _, _, state in s.blocks)
    skipped = skipped_in(path, entries, pending)
    reader = EntryReader(
        check, pools, skipped, scopes_defer=scopes_defer(release), releases_in_part=releases_in_part(settings)
    )
    started: StartState | None = None
    try:
        started = start_of(check, pools, final, segments, entries, chosen, settings, skipped)
    except ContradictionError as e:
        reader.inferred.contradiction = str(e)
    first = 0
    if started is not None:
        reader.begin(started)
        first = first_whole(entries, skipped)
    for number, entry in enumerate(entries[first:], first):
        reader.take(number, check.mapping(entry, f"event {number}"))
    reader.finish()
    lost = reader.inferred.losses() + skipped.losses(None if started is None else reader.inferred.held)
    unknown = sorted(str(k) for k in top if k not in _KNOWN_KEYS)
    if unknown:
        lost.append(Loss("unknown_keys", f"the snapshot has keys this version does not know: {', '.join(unknown)}"))
    if not entries:
        raise InputFileError(path, f"holds no recorded events for device {chosen}; was recording on when it was taken?")
    if CONF_KEY not in settings:
        lost.append(Loss("allocator_settings", "the snapshot does not name its allocator conf; the default is assumed"))
    lost.append(Loss("torch_release", f"snapshots do not name their torch release; the keys are those of {release}"))
    private = sum(1 for s in final if s.pool)
    if pools.lacks_ids and private:
        lost.append(Loss("pool_ids", "events of this release do not name their pool, and private pools exist", private))
    toggled = reader.inferred.toggles > 0
    return Trace(
        requests=reader.requests.finish(),
        decisions=reader.decisions.finish(),
        stacks=reader.stacks.table,
        phases=tuple(reader.phases),
        pools=tuple(pools.ids),
        settings=settings_at_start(check, settings, toggled=toggled, begins_mapped=bool(reader.begins_mapped)),
        confs=confs_of(check, settings) if toggled else (),
        torch=release,
        device=chosen,
        initial=() if started is None else started.segments,
        final=final,
        lost=tuple(lost),
        placement="recorded",
        source="snapshot",
        provenance={"file": path.name},
    )


def state_before(value: Any, device: int, position: int) -> StartState | None:
    """What stood before the entry at a position of a decoded snapshot; None for nothing.

    Args:
        value: a snapshot that began with its process.
        device: CUDA device index.
        position: entries that came before.

    Raises:
        ContradictionError: the entries do not lead from there to what stands at the end.
    """
    path = Path("the snapshot")
    check = Checker(path)
    entries, segments = value["device_traces"][device], value["segments"]
    pools = Pools(check, PrivateRanges(check, entries, segments, device))
    settings = value.get("allocator_settings", {})
    final = final_segments(check, segments, device, pools, large_page(conf_of(settings)))

    def pool_of(number: int, entry: Mapping[str, Any]) -> int:
        return pools.of(number, entry, f"event {number}", entry["addr"])

    live = live_at_end(check, segments, device)
    return start_state(final, live, entries[position:], pool_of, size_rules(settings, conf_of(settings)))


def _choose_device(check: Checker, traces: Sequence[Sequence[Any]], segments: Sequence[Any], device: int | None) -> int:
    used = {i for i, t in enumerate(traces) if t}
    if device is not None:
        if device not in used:
            held = ", ".join(map(str, sorted(used))) or "none"
            raise UsageError(f"{check.path}: no events for device {device}; the snapshot has them for: {held}")
        return device
    if len(used) > 1:
        raise UsageError(
            f"{check.path}: holds events of devices {', '.join(map(str, sorted(used)))}; choose one with --device-index"
        )
    return used.pop() if used else 0
