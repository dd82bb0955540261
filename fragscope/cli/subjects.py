"""What the commands that replay say of a trace, and of what an answer takes for granted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from fragscope.errors import printable

if TYPE_CHECKING:
    from fragscope.allocator import Assumption, ReplaySettings
    from fragscope.search import Subject
    from fragscope.trace import Trace


def trace_json(name: str, trace: Trace) -> dict[str, Any]:
    """A trace as published: what its file says."""
    return {
        "path": name,
        "source": trace.source,
        "events": len(trace.requests),
        "device": trace.device,
        "torch": trace.torch,
        "card": trace.card,
        "lost": [asdict(loss) for loss in trace.lost],
    }


def settings_json(s: ReplaySettings) -> dict[str, Any]:
    """Settings as published; sizes are integer bytes."""
    return {
        "conf": s.conf,
        "torch": s.rules.torch,
        "rules": s.rules.rules.release,
        "card": s.card,
        "total": s.total,
        "capacity": s.capacity,
        "memory_fraction": s.memory_fraction,
        "limit": s.limit,
    }


def subject_json(subject: Subject) -> dict[str, Any]:
    """A trace with the settings that its replays start from."""
    return {**trace_json(subject.name, subject.tape.trace), **settings_json(subject.settings)}


def granted(assumptions: Sequence[Assumption]) -> list[str]:
    """What an answer takes for granted and what may change it, for people; a line each, some of it from the file."""
    return [
        printable(f"{a.code} (effect {a.effect}, {a.events:,} events): {a.detail}", 1000)
        for a in assumptions
        if a.effect != "none"
    ]
