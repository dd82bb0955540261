"""budgets.toml: the limits a repository sets on its cases.

    [budget."moe-fp8-shuffle/*/preallocated"]     # a glob over scenario/preset/variant
    peak_reserved = "8 GiB"
    transient = "2.3 GiB"

    [[budget."moe-fp8-shuffle/*/list-stack"]]     # double brackets: several budgets with one glob
    conf = "expandable_segments:True"             # optional: only for cases with this value
    retained = 0

**The glob.** The parts between slashes are matched one by one, so ``*`` never crosses a slash. ``*``, ``?`` and
``[abc]`` mean what they mean in file names; case matters. There are three parts; more are only for names that hold
a slash themselves.

**Limits.** Bytes, as an integer or with a unit. A fraction of a byte is dropped: a value is a whole number, so it is
above "2.3 GiB" exactly when it is above the whole bytes in it. 0 is a limit like any other; negative limits do not
exist (a phase that ends with less than it began with, a negative ``retained``, is within every limit).

**Narrowing.** ``conf`` ("" and "default" are the default conf; blanks do not matter), ``torch`` (a release, or the
beginning of one up to a dot: "2.11" covers 2.11.0), ``card`` and ``device`` restrict a budget to cases with that value.

**Specificity.** Where several budgets match a case, each metric is taken from the most specific one that states it.
More specific is, in this order: more parts without wildcards; more narrowing keys; longer literal text; a longer
``torch`` release. Budgets that tie and state different limits are an error.

The file may also hold waivers (``gate/waivers.py``) and what the lock lets pass (``gate/lock.py``).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from fnmatch import translate
from typing import Protocol

from fragscope.errors import UsageError
from fragscope.gate.verdict import CaseName
from fragscope.results import Case
from fragscope.toml import quoted
from fragscope.units import parse_bytes

METRICS = ("peak_requested", "peak_allocated", "peak_reserved", "peak_hbm", "transient", "retained", "stranded")
"""What a limit can be set on. ``stranded`` is what is stranded when the measured phase is over, not its peak."""

NARROWING = ("conf", "torch", "card", "device")

_LARGEST = 2**63 - 1  # what results.json and its readers in other languages can hold
_WILDCARD = re.compile(r"\[!?\]?[^\]]*\]|[*?]")  # as fnmatch reads them; "[" without "]" stands for itself


class Bytes(Protocol):
    """Counters at one moment, or the largest value of each; bytes."""

    @property
    def requested(self) -> int:
        """Asked for by the program."""

    @property
    def allocated(self) -> int:
        """In blocks handed out."""

    @property
    def reserved(self) -> int:
        """Held from the driver."""

    @property
    def hbm(self) -> int:
        """Reserved, plus what was taken of the driver past the allocator."""

    @property
    def stranded(self) -> int:
        """Idle beside live blocks."""


class Figures(Protocol):
    """What has the values that limits are set on: a case of a results file, or what a replay says of a phase."""

    @property
    def peak(self) -> Bytes:
        """The largest value of each counter."""

    @property
    def end(self) -> Bytes:
        """When it was over."""

    @property
    def transient(self) -> int:
        """Needed only on the way."""

    @property
    def retained(self) -> int:
        """Left behind; negative where more was freed."""


def metric_value(figures: Figures, metric: str) -> int:
    """The value of one of ``METRICS``, bytes."""
    match metric:
        case "peak_requested":
            return figures.peak.requested
        case "peak_allocated":
            return figures.peak.allocated
        case "peak_reserved":
            return figures.peak.reserved
        case "peak_hbm":
            return figures.peak.hbm
        case "transient":
            return figures.transient
        case "retained":
            return figures.retained
        case "stranded":
            return figures.end.stranded
    raise ValueError(metric)


def parse_limit(metric: str, value: object) -> int:
    """A limit as it is written: bytes as an integer, or a size such as ``"2 GiB"``.

    Raises:
        UsageError: it is no byte count, negative, or beyond any memory; names the metric.
    """
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise UsageError(f"{metric}: {quoted(value)} is not a byte count; write an integer or a size such as '2 GiB'")
    limit = parse_bytes(value, metric)
    if limit > _LARGEST:
        raise UsageError(f"{metric}: the limit is beyond any memory; at most {_LARGEST} bytes")
    return limit


@dataclass(frozen=True, slots=True)
class Limit:
    """A limit in bytes and the line that states it."""

    bytes: int
    line: int


@dataclass(frozen=True, slots=True)
class Budget:
    """One table of the file.

    Attributes:
        pattern: the glob.
        limits: by metric; never empty.
        line: of the table.
        conf, torch, card, device: the value a case must have; None where any will do.
    """

    pattern: str
    limits: dict[str, Limit]
    line: int
    conf: str | None = None
    torch: str | None = None
    card: str | None = None
    device: str | None = None
    _parts: tuple[str | re.Pattern[str], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        parts = tuple(re.compile(translate(p)) if _WILDCARD.search(p) else p for p in self.pattern.split("/"))
        object.__setattr__(self, "_parts", parts)

    def matches_name(self, name_parts: list[str]) -> bool:
        """Whether the glob matches ``scenario/preset/variant``, given split at its slashes."""
        return len(name_parts) == len(self._parts) == self.leading_matches(name_parts)

    def leading_matches(self, name_parts: list[str]) -> int:
        """How many parts match before the first that does not."""
        count = 0
        for name, part in zip(name_parts, self._parts, strict=False):
            if not (name == part if isinstance(part, str) else part.match(name)):
                break
            count += 1
        return count

    def matches_settings(self, case: Case | CaseName) -> bool:
        """Whether the case has every value the budget is narrowed to."""
        return (
            (self.conf is None or _same_conf(self.conf, case.conf))
            and (self.torch is None or _is_release(case.torch, self.torch))
            and (self.card is None or self.card == case.card)
            and (self.device is None or self.device == case.device)
        )

    @property
    def narrowing(self) -> dict[str, str]:
        """The narrowing keys that are set."""
        values = {"conf": self.conf, "torch": self.torch, "card": self.card, "device": self.device}
        return {key: value for key, value in values.items() if value is not None}

    @property
    def specificity(self) -> tuple[int, int, int, int]:
        """Larger is more specific; see the module's text for the order."""
        literal_parts = sum(isinstance(part, str) for part in self._parts)
        literal_text = len(_WILDCARD.sub("", self.pattern))
        release = 0 if self.torch is None else self.torch.count(".") + 1
        return literal_parts, len(self.narrowing), literal_text, release


def case_name(case: Case) -> str:
    """``scenario/preset/variant``: what globs are matched against."""
    return f"{case.scenario}/{case.preset}/{case.variant}"


def _same_conf(a: str, b: str) -> bool:
    def plain(conf: str) -> str:
        conf = "".join(conf.split())
        return "" if conf == "default" else conf

    return plain(a) == plain(b)


def _is_release(release: str, wanted: str) -> bool:
    # A prefix ends where a part of the release ends: "2.1" is not the beginning of 2.11.
    return release == wanted or (release.startswith(wanted) and release[len(wanted)] in ".+")
