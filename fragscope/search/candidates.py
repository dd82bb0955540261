"""Which confs are worth trying for given requests: settings one at a time, then together, then a little changed.

Where a threshold acts depends on the sizes that a program asks for, so the values come from the traces: a split limit
just above a frequent size keeps that size's blocks divisible, one just below does not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fragscope.allocator import Rules, parse_conf
from fragscope.search.confs import Choice, choice_of
from fragscope.search.subject import Subject
from fragscope.trace import RequestKind
from fragscope.units import MIB

_FREQUENT = 10  # large request sizes that split limits are put around
_STARTS = 3  # sizes from which on only large requests are rounded
_DIVISIONS = (2, 4, 8, 16)
_SEGMENTS = (12, 14, 16, 18, 22, 24, 28, 32, 40, 48, 64, 96, 128)  # MiB; expandable segments need even ones
_THRESHOLDS = (50, 60, 70, 80, 90, 95)  # percent
_OCTAVES = (32, 64, 128, 256, 512, 1024)  # MiB
_MEDIUM = (MIB, 10 * MIB)  # requests above and below these share large segments (kSmallSize, kMinLargeAlloc)
_LAST_INTERVAL = 32 * 1024  # MiB: the last interval of roundup_power2_divisions begins here


@dataclass(frozen=True, slots=True)
class Material:
    """What candidates are made from.

    Attributes:
        releases: rules that have to take each candidate.
        keys: settings that may vary.
        splits: values of ``max_split_size_mb`` worth trying, ascending.
        starts: sizes in MiB, powers of two, from which on rounding of large requests only is worth trying.
        segments: values of ``large_segment_size_mb`` worth trying, ascending; empty without requests between 1 and
            10 MiB, the ones it is for.
        limited: whether a limit on reserved bytes is in force somewhere, without which nothing is collected.
    """

    releases: tuple[Rules, ...]
    keys: frozenset[str]
    splits: tuple[int, ...]
    starts: tuple[int, ...]
    segments: tuple[int, ...]
    limited: bool


def material_of(subjects: Sequence[Subject], held: Iterable[str]) -> Material:
    """What candidates for these traces are made from; settings in ``held`` do not vary."""
    releases = releases_of(subjects)
    known = frozenset.intersection(*(rules.conf_keys for rules in releases))
    weight: Counter[int] = Counter()
    medium = False
    for subject in subjects:
        asked = subject.tape.size[subject.tape.kind == RequestKind.ALLOC]
        sizes, counts = np.unique(asked, return_counts=True)
        medium |= bool(np.any((sizes > _MEDIUM[0]) & (sizes < _MEDIUM[1])))
        for size, count in zip(sizes.tolist(), counts.tolist(), strict=True):
            if size >= _MEDIUM[1]:
                weight[size] += size * count
    return Material(
        releases=releases,
        keys=known - frozenset(held),
        splits=_splits(weight, releases),
        starts=_starts(weight),
        segments=_SEGMENTS if medium else (),
        limited=any(_is_limited(subject) for subject in subjects),
    )


def releases_of(subjects: Sequence[Subject]) -> tuple[Rules, ...]:
    """The rules that decide about the subjects, each once, oldest first."""
    found = {s.settings.rules.rules.release: s.settings.rules.rules for s in subjects}
    return tuple(sorted(found.values(), key=lambda rules: tuple(map(int, rules.release.split(".")))))


def singles(m: Material) -> list[Choice]:
    """Confs with one setting each (``max_non_split_rounding_mb`` needs ``max_split_size_mb`` and comes later)."""
    values: list[tuple[str, str]] = [("expandable_segments", "True")]
    values += [("max_split_size_mb", str(size)) for size in m.splits]
    values += [("roundup_power2_divisions", str(n)) for n in _DIVISIONS]
    values += [("roundup_power2_divisions", _from(start, n, m)) for start in m.starts for n in (4, 8)]
    values += [("large_segment_size_mb", str(size)) for size in m.segments]
    if m.limited:
        values += [("garbage_collection_threshold", _percent(p)) for p in _THRESHOLDS]
    return [((key, value),) for key, value in values if key in m.keys]


def together(parents: Sequence[Choice]) -> Iterator[Choice]:
    """Each two of the confs as one, where they set different things."""
    for number, one in enumerate(parents):
        for other in parents[number + 1 :]:
            if not {key for key, _ in one} & {key for key, _ in other}:
                yield choice_of(dict(one + other))


def neighbours(choice: Choice, m: Material) -> Iterator[Choice]:
    """The conf with one setting changed a little, left out, or, where it needs another one, added."""
    values = dict(choice)
    for key, value in choice:
        yield choice_of({k: v for k, v in values.items() if k != key})
        for near in _near(key, value, m):
            yield choice_of({**values, key: near})
    split = values.get("max_split_size_mb")
    if split is not None and "max_non_split_rounding_mb" in m.keys - values.keys():
        for size in sorted({*_OCTAVES, int(split)}):
            yield choice_of({**values, "max_non_split_rounding_mb": str(size)})


def _near(key: str, value: str, m: Material) -> list[str]:
    match key:
        case "max_split_size_mb":
            size = int(value)
            below = [s for s in m.splits if s < size][-1:]
            above = [s for s in m.splits if s > size][:1]
            near = {*below, *above, size - 2, size - 1, size + 1, size + 2, size - size // 8, size + size // 8}
            return [str(s) for s in sorted(near - {size}) if s > 0]
        case "max_non_split_rounding_mb":
            size = int(value)
            return [str(s) for s in sorted({size // 2, size - 8, size - 2, size + 2, size + 8, size * 2}) if s > 0]
        case "large_segment_size_mb":
            size = int(value)
            return [str(s) for s in (size - 4, size - 2, size + 2, size + 4) if s > 10]
        case "garbage_collection_threshold":
            percent = round(float(value) * 100)
            return [_percent(p) for p in (percent - 5, percent + 5) if 0 < p < 100]
        case "roundup_power2_divisions":
            return _near_divisions(value, m)
        case _:
            return []


def _near_divisions(value: str, m: Material) -> list[str]:
    if not value.startswith("["):
        n = int(value)
        return [str(n // 2), str(n * 2)] if n > 1 else ["2"]
    first, last = value.strip("[]").split(",")
    start, n = int(first.partition(":")[0]), int(last.partition(":")[2])
    if not m.releases[0].conf.above_includes:
        start *= 2
    near = [(start // 2, n), (start * 2, n), (start, n // 2), (start, n * 2)]
    return [_from(s, d, m) for s, d in near if 2 <= s <= _LAST_INTERVAL and d > 1]


def _from(start: int, divisions: int, m: Material) -> str:
    """Rounding for requests of ``start`` MiB and more only."""
    last_named = start if m.releases[0].conf.above_includes else start // 2
    return f"[{last_named}:0,>:{divisions}]"


def _percent(percent: int) -> str:
    return f"{percent / 100:g}"


def _splits(weight: Counter[int], releases: Sequence[Rules]) -> tuple[int, ...]:
    default = parse_conf("", releases[0]).large_segment_size // MIB
    least = default + (not all(rules.conf.limit_allowed for rules in releases))
    if not weight:
        return ()
    top = max(weight) // MIB + 1
    near = {size // MIB + above for size, _ in weight.most_common(_FREQUENT) for above in (0, 1)}
    return tuple(sorted({least, *(s for s in {*near, *_OCTAVES} if least <= s <= max(top, least))}))


def _starts(weight: Counter[int]) -> tuple[int, ...]:
    """Powers of two with a good part of the large bytes at and above them."""
    if not weight:
        return ()
    intervals: Counter[int] = Counter()
    for size, w in weight.items():
        intervals[min(1 << (size // MIB).bit_length() - 1, _LAST_INTERVAL)] += w
    chosen = [start for start, _ in intervals.most_common(_STARTS)]
    return tuple(sorted({s for s in chosen if s > 1}))


def _is_limited(subject: Subject) -> bool:
    s = subject.settings
    if s.limit is not None or bool(np.any(subject.tape.kind == RequestKind.MEMORY_FRACTION)):
        return True
    conf = parse_conf(s.conf, s.rules.rules)
    fraction = conf.per_process_memory_fraction if s.memory_fraction is None else s.memory_fraction
    explicit = s.memory_fraction is not None or fraction < 1.0
    return fraction < 1.0 or (explicit and s.rules.rules.limit_at_fraction_one)
