"""Random programs for a release, from a seed: each has a theme that picks its conf and which operations it has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from programs import Op, Pools, Program, version

KIB, MIB, GIB = 2**10, 2**20, 2**30
STREAMS = (0, 0x5100, 0x5200, 0x5300)
# Oldest release with a theme, a key or an operation; themes and keys that are not named are in every release.
SINCE = {
    "large_segment": (2, 11),
    "fraction_key": (2, 10),
    "reject": (2, 12),
    "unsplit_pools": (2, 10),
    "max_split_size_of_20": (2, 10),
    # Up to 2.12 a use that is recorded in a scope, of a block that is freed outside of scopes, is remembered with the
    # Block object: whichever allocation has that object later may lose a use of its own. That depends on the heap.
    "free of a block used in a scope": (2, 13),
}
_OLDEST = (2, 9)


@dataclass
class _Setting:
    """What a theme decides: settings with their possible values, and how often special operations come."""

    keys: dict[str, Callable[[_Author], str | None]] = field(default_factory=dict)
    conf_changes: float = 0.0
    fractions: float = 0.0
    empties: float = 0.002
    pools: float = 0.0
    use_on_oom: float = 0.0
    no_split: float = 0.0
    fraction_first: float = 0.3  # probability that the program begins with one


def generate(seed: int, release: str, operations: int, theme: str | None = None) -> Program:
    """A program for a release.

    Args:
        seed: decides everything else.
        release: the program uses nothing that is newer.
        operations: how many, about.
        theme: one of ``THEMES``; None lets the seed choose among those of the release.
    """
    random = Random(f"{seed} {theme}")
    have = themes_of(release)
    chosen = theme or have[seed % len(have)]
    if chosen not in have:
        raise ValueError(f"torch {release} does not have what {chosen} programs use")
    return _Author(random, release, chosen, operations).write(f"{chosen}-{seed}")


def themes_of(release: str) -> list[str]:
    """Themes whose programs run on a release."""
    return [theme for theme in THEMES if version(release) >= SINCE.get(theme, _OLDEST)]


class _Author:
    """Writes one program."""

    def __init__(self, random: Random, release: str, theme: str, operations: int) -> None:
        self.random = random
        self.operations = operations
        self.pace = max(1.0, 1000 / operations)  # rare operations come in short programs too
        self.release = version(release)
        self.newest_used = _OLDEST
        self._uses(theme)
        self.setting = THEMES[theme]
        self.odd_segments = theme == "large_segment" and random.random() < 0.5
        self.large_segment = 20  # MiB, the largest that the program sets so far
        self.max_split_size = self._choose_max_split_size()
        self.streams = STREAMS[: random.choice((1, 1, 2, 3, 4))]
        self.choose_device()
        self.pools = Pools()
        self.next_pool = 1
        self.ops: list[Op] = []
        self.live: dict[int, int] = {}  # id -> bytes
        self.used_in_scope: set[int] = set()
        self.next_id = 0
        self.conf = self.write_conf()
        self.palette = [self.size() for _ in range(random.choice((4, 10, 25)))]

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def _uses(self, what: str) -> None:
        self.newest_used = max(self.newest_used, SINCE.get(what, _OLDEST))

    def choose_device(self) -> None:
        """Mostly so small that requests are refused often."""
        random = self.random
        self.capacity = random.choice((16, 48, 100, 256, 600, 1024, 4096, 40 * KIB)) * MIB
        beside = random.choice((0, 0, 2, 100, 512)) * MIB
        self.total = self.capacity + beside + random.choice((0, 0, 123_457 * 512, 1))
        self.seed = random.choice((0, random.getrandbits(32)))

    # --- sizes

    def size(self) -> int:
        """Bytes, from 1 to beyond the capacity, with those where the allocator's rules change."""
        random = self.random
        kind = random.random()
        if kind < 0.3:
            return random.randint(1, 4096)
        if kind < 0.5:
            near = random.choice((512, KIB, 512 * KIB, MIB, 2 * MIB, 10 * MIB, 20 * MIB, self.large_segment * MIB))
            return max(1, near + random.choice((-512, -1, 0, 1, 512)))
        if kind < 0.6:
            edge = (self.max_split_size or 12) * MIB
            return edge + random.choice((-2 * MIB, -1, 0, 1, MIB, 2 * MIB, 19 * MIB, 20 * MIB, 21 * MIB))
        if kind < 0.95:
            largest = min(self.capacity // random.choice((2, 4, 16)), 4 * GIB)
            return max(1, int(2 ** random.uniform(10, largest.bit_length())))
        return random.randint(self.capacity // 2, self.capacity + self.capacity // 4)

    # --- settings

    def _choose_max_split_size(self) -> int | None:
        """MiB; the same in the whole program, as changing it makes the real allocator free parts of segments."""
        if "max_split_size_mb" not in self.setting.keys or self.chance(0.15):
            return None
        smallest = 20 if self.release >= SINCE["max_split_size_of_20"] else 21
        value = self.random.choice((smallest, 21, 32, 64, 200))
        if value == 20:
            self._uses("max_split_size_of_20")
        return value

    def write_conf(self) -> str:
        """A conf string of the theme; every string names max_split_size_mb, which is forgotten otherwise."""
        parts = [(key, value) for key, draw in self.setting.keys.items() if (value := draw(self)) is not None]
        self.random.shuffle(parts)
        return ",".join(f"{key}:{value}" for key, value in parts)

    # --- operations

    def write(self, name: str) -> Program:
        """The whole program."""
        if self.chance(self.setting.fraction_first):
            self.ops.append(["fraction", self.fraction()])
        target = self.random.choice((0.4, 0.8, 1.3)) * self.capacity
        uses = self.random.choice((0.0, 0.03, 0.1)) if len(self.streams) > 1 else 0.0
        users = self.random.choice((1, len(self.streams)))  # record_stream with one foreign stream, or with any
        while len(self.ops) < self.operations:
            self.step(target, uses, self.streams[:users] if users == 1 else self.streams)
        since = ".".join(str(part) for part in self.newest_used)
        return Program(name, since, self.total, self.capacity, self.seed, self.conf, self.ops)

    def step(self, target: float, uses: float, users: tuple[int, ...]) -> None:
        """One operation, or a few that belong together."""
        random, setting = self.random, self.setting
        if self.chance(setting.conf_changes * self.pace):
            self.ops.append(["conf", self.write_conf()])
        elif self.chance(setting.empties * self.pace):
            self.ops.append(["empty"])
        elif self.chance(setting.fractions * self.pace):
            self.ops.append(["fraction", self.fraction()])
        elif self.chance(setting.pools * self.pace):
            self.pool_operation()
        elif self.live and self.chance(uses):
            self.use(random.choice(list(self.live)), random.choice(users))
        elif uses and self.chance(uses / 2):
            self.ops.append(["done", random.choice(self.streams)])
        elif not self.live or (self.chance(0.6) and sum(self.live.values()) < target):
            self.allocate()
        elif self.chance(0.01):
            for id_ in random.sample(list(self.live), random.randint(1, min(40, len(self.live)))):
                self.free(id_)
        else:
            ids = list(self.live)
            self.free(random.choice(ids) if self.chance(0.6) else ids[-1 - random.randrange(min(4, len(ids)))])

    def allocate(self) -> None:
        random = self.random
        size = random.choice(self.palette) if self.chance(0.6) else self.size()
        self.ops.append(["alloc", self.next_id, size, random.choice(self.streams)])
        if size <= self.capacity:  # what cannot be served is not freed
            self.live[self.next_id] = size
        self.next_id += 1

    def use(self, id_: int, stream: int) -> None:
        if self.pools.open:
            self.used_in_scope.add(id_)
        self.ops.append(["use", id_, stream])

    def free(self, id_: int) -> None:
        if id_ in self.used_in_scope and not self.pools.open:
            if self.release < SINCE["free of a block used in a scope"]:
                return
            self._uses("free of a block used in a scope")
        del self.live[id_]
        self.ops.append(["free", id_])

    def fraction(self) -> float:
        return self.random.choice((0.3, 0.5, 0.77, 0.9, 1.0, round(self.random.uniform(0.2, 1.0), 4)))

    def pool_operation(self) -> None:
        random, pools = self.random, self.pools
        known = list(pools.users)
        kinds = ("pool_create", "pool_begin", "pool_begin", "pool_end", "pool_end", "pool_release", "pool_release")
        kind = random.choice((*kinds, "empty_pool"))
        if kind == "pool_create" or not known:
            # One at most helps out on OOM: several are asked in the order of a hash table.
            on_oom = not pools.on_oom and self.chance(self.setting.use_on_oom)
            unsplit = self.chance(self.setting.no_split)
            op: Op = ["pool_create", self.next_pool, on_oom, unsplit]
            self.next_pool += 1
        else:
            op = [kind, random.choice(known)]
            if kind == "pool_end" and pools.open:
                op = [kind, pools.open[-1]]
        if kind == "pool_begin" and len(pools.open) > 2:
            return
        if pools.allows(op):
            pools.apply(op)
            self.ops.append(op)


# --- values of the keys; None leaves the key out


def _max_split_size(author: _Author) -> str | None:
    return None if author.max_split_size is None else str(author.max_split_size)


def _max_non_split_rounding(author: _Author) -> str | None:
    if author.chance(0.6):
        return None
    smallest = 20 if author.release >= SINCE["max_split_size_of_20"] else 21
    value = author.random.choice((smallest, 21, 40, 300))
    if value == 20:
        author._uses("max_split_size_of_20")
    return str(max(value, author.large_segment))


def _divisions(author: _Author) -> str | None:
    random = author.random
    if author.chance(0.2):
        return None
    if author.chance(0.5):
        return random.choice(("1", "2", "4", "8", "16", "32"))
    bounds = sorted(random.sample((1, 2, 4, 8, 16, 64, 256, 1024, 32768), random.randint(1, 4)))
    pairs = [f"{bound}:{random.choice((0, 1, 2, 4, 8))}" for bound in bounds]
    if author.chance(0.6):
        pairs.append(f">:{random.choice((1, 2, 4))}")
    return f"[{','.join(pairs)}]"


def _garbage_collection(author: _Author) -> str | None:
    return author.random.choice(("0.2", "0.5", "0.8", "0.95", None))


def _large_segment_size(author: _Author) -> str | None:
    if author.release < SINCE["large_segment"] or author.chance(0.3):
        return None
    if author.max_split_size is not None and author.max_split_size < 64:
        return "12" if author.chance(0.5) else None  # no more than max_split_size_mb
    # With expandable segments the driver maps whole granules of 2 MiB only.
    value = author.random.choice((11, 13, 21, 33) if author.odd_segments else (12, 16, 20, 32, 64))
    author.large_segment = max(author.large_segment, value)
    author._uses("large_segment")
    return str(value)


def _expandable(author: _Author) -> str | None:
    return "True"


def _sometimes_expandable(author: _Author) -> str | None:
    if author.max_split_size is not None:
        # While the flag is set, ordinary segments are split at any size. Parts above max_split_size_mb make the real
        # allocator free the middle of a segment later, so that the flag cannot change in such programs.
        return "True"
    return author.random.choice(("True", "False", None))


def _fraction_key(author: _Author) -> str | None:
    return author.random.choice(("0.35", "0.5", "0.8", "0.9999", "1.0", None))


def _throw(author: _Author) -> str | None:
    return author.random.choice(("True", "True", "False"))


def _newer(since: str, draw: Callable[[_Author], str | None]) -> Callable[[_Author], str | None]:
    """A key of a mixed theme, left out where the release does not have it."""

    def value(author: _Author) -> str | None:
        if author.release < SINCE[since] or author.chance(0.5):
            return None
        author._uses(since)
        return draw(author)

    return value


_MIXED: dict[str, Callable[[_Author], str | None]] = {
    "large_segment_size_mb": _large_segment_size,
    "max_split_size_mb": _max_split_size,
    "max_non_split_rounding_mb": _max_non_split_rounding,
    "roundup_power2_divisions": _divisions,
    "garbage_collection_threshold": _garbage_collection,
    "per_process_memory_fraction": _newer("fraction_key", _fraction_key),
    "throw_on_cudamalloc_oom": _newer("reject", _throw),
}
THEMES: dict[str, _Setting] = {
    "default": _Setting(),
    "fractions": _Setting(fractions=0.005),
    "oversize": _Setting(
        {"max_split_size_mb": _max_split_size, "max_non_split_rounding_mb": _max_non_split_rounding},
        conf_changes=0.002,
    ),
    "divisions": _Setting({"roundup_power2_divisions": _divisions}, conf_changes=0.01),
    "garbage": _Setting(
        {"garbage_collection_threshold": _garbage_collection}, conf_changes=0.002, fractions=0.003, fraction_first=1.0
    ),
    "large_segment": _Setting({"large_segment_size_mb": _large_segment_size}, conf_changes=0.01),
    "expandable": _Setting({"expandable_segments": _expandable}, fractions=0.002, empties=0.005),
    "expandable_toggled": _Setting({"expandable_segments": _sometimes_expandable}, conf_changes=0.02, empties=0.005),
    "fraction_key": _Setting({"per_process_memory_fraction": _fraction_key}, conf_changes=0.005, fractions=0.002),
    "reject": _Setting(
        {"throw_on_cudamalloc_oom": _throw, "per_process_memory_fraction": _fraction_key},
        conf_changes=0.005,
        fractions=0.002,
    ),
    "pools": _Setting(pools=0.03),
    "pools_on_oom": _Setting(pools=0.03, use_on_oom=0.6),
    "unsplit_pools": _Setting(pools=0.03, no_split=0.5, use_on_oom=0.2),
    "mixed": _Setting(_MIXED, conf_changes=0.01, fractions=0.002),
    "mixed_expandable": _Setting(
        {**_MIXED, "expandable_segments": _sometimes_expandable}, conf_changes=0.01, fractions=0.002, empties=0.004
    ),
    "mixed_pools": _Setting(_MIXED, conf_changes=0.003, fractions=0.002, pools=0.03, use_on_oom=0.3),
}
