"""How outputs say two values beside each other."""

from __future__ import annotations

from fragscope.units import format_bytes


def compared(then: int, now: int) -> tuple[str, str, str]:
    """Two sizes and by how much the second is larger; in bytes where rounding would make them look equal."""
    before, after = format_bytes(then), format_bytes(now)
    if before == after and then != now:
        before, after = f"{then:,} B", f"{now:,} B"
    more = format_bytes(now - then)
    if then > 0:
        percent = 100 * (now - then) / then
        more += f" ({percent:+,.1f} %)" if abs(percent) >= 0.1 else f" ({'+' if now > then else '-'}<0.1 %)"
    return before, after, more


def count(number: int, one: str, many: str) -> str:
    """``"1 case"``, ``"2 cases"``, and nothing for 0."""
    return f"{number:,} {one if number == 1 else many}" if number else ""
