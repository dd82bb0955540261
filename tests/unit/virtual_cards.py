"""A virtual H100 for tests, and the allocations that live on it."""

from __future__ import annotations

from fragscope.allocator import ReplaySettings, card_named, rules_for
from fragscope.record.virtual import VirtualDevice


def h100(capacity: int | None = None, torch: str = "2.11.0", **settings: object) -> VirtualDevice:
    """A virtual H100, or one with less free memory."""
    profile = card_named("h100-80gb")
    return VirtualDevice(
        profile,
        ReplaySettings(rules_for(torch), profile.name, profile.total, capacity or profile.free, **settings),
    )


def live(device: VirtualDevice) -> int:
    """Allocations that the program holds, without cuBLAS's workspaces."""
    return device.memory.live - len(device.gemm_workspaces)
