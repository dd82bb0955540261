"""Reading a conf string word by word, as a torch release does.

A string changes the settings that were in force before it, and torch's readers are lenient in ways that changed with
2.10 (``ConfRules``), so this follows the C++: c10/cuda/CUDAAllocatorConfig.cpp up to 2.9, from 2.10 on
c10/core/AllocatorConfig.cpp and, for CUDA's own keys, the former. Held against the releases' own binaries in
tests/conformance.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from fragscope.allocator.conf_words import WORD, read_double, read_signed, read_unsigned, split_words
from fragscope.allocator.rules import RULES, Rules
from fragscope.errors import UsageError, printable
from fragscope.units import MIB

UNLIMITED = 2**63 - 1
"""``max_split_size`` where no limit is set, bytes."""
DIVISIONS = 16
"""Intervals of ``roundup_power2_divisions``: below 2 MiB, [2, 4) MiB, ... from 32 GiB (kRoundUpPowerOfTwoIntervals)."""
_MOST_MIB = (WORD - 1) // MIB  # larger numbers of MiB are read as this one
_LEAST_SEGMENT = 10  # kMinLargeAlloc, MiB: large_segment_size_mb must be above it
_MOST_THREADS = 128  # pinned_max_register_threads
_BACKENDS = ("native", "cudaMallocAsync")
_NOT_CLOSED = "the list is not closed by ']'"


@dataclass(frozen=True, slots=True)
class Conf:
    """The effective allocator settings after a conf string was parsed; sizes in bytes.

    Attributes:
        text: the string as given; ``""`` is the default.
        max_split_size: blocks of this size and more are neither split nor given to smaller requests.
        max_non_split_rounding: how much larger than a request of ``max_split_size`` and more its block may be.
        roundup_power2_divisions: steps between powers of two, for requests below 2 MiB, in [2, 4) MiB and so on up to
            32 GiB and more; 0 and 1 are none.
        garbage_collection_threshold: share of the memory limit above which old idle segments are returned; 0 is never.
        expandable_segments: whether new memory is mapped into reserved address ranges.
        large_segment_size: segment for requests above 1 MiB and below 10 MiB.
        per_process_memory_fraction: memory fraction; read when the allocator begins, or at once with
            ``throw_on_cudamalloc_oom``.
        throw_on_cudamalloc_oom: whether a request beyond that fraction is refused before anything is released.
        graph_capture_record_stream_reuse: whether blocks that other streams used are reused while a graph is captured.
        backend: ``native``, or an allocator that is not PyTorch's own.
    """

    text: str = ""
    max_split_size: int = UNLIMITED
    max_non_split_rounding: int = 20 * MIB
    roundup_power2_divisions: tuple[int, ...] = (0,) * DIVISIONS
    garbage_collection_threshold: float = 0.0
    expandable_segments: bool = False
    large_segment_size: int = 20 * MIB
    per_process_memory_fraction: float = 1.0
    throw_on_cudamalloc_oom: bool = False
    graph_capture_record_stream_reuse: bool = False
    backend: str = "native"

    @property
    def label(self) -> str:
        """For tables: ``default`` instead of an empty string."""
        return self.text or "default"


def effective_conf(text: str, rules: Rules, before: Conf | None = None) -> Conf:
    """The settings in force after ``text``, whether or not the allocator model covers them.

    Args:
        text: the conf string.
        rules: the torch release that reads it.
        before: settings in force until then; None where the string is what the process starts with.

    Raises:
        UsageError: the release refuses the string. PyTorch may keep the settings it read before the error.
    """
    return _Reader(text, rules, before).read()


def is_power_of_two(value: int) -> bool:
    """``llvm::isPowerOf2_64``: 0 is none."""
    return value.bit_count() == 1


class _Reader:
    """Walks over the words of a string and changes ``conf`` as torch changes its settings."""

    def __init__(self, text: str, rules: Rules, before: Conf | None) -> None:
        self.text = text
        self.rules = rules
        self.backend = None if before is None else before.backend  # cannot change later
        self.words = split_words(text, rules.conf.white_space)
        self.at = 0  # the word being read
        self.key = ""
        self.conf = replace(
            before or Conf(),
            text=text,
            max_split_size=UNLIMITED,
            roundup_power2_divisions=(0,) * DIVISIONS,
            garbage_collection_threshold=0.0,
        )

    def read(self) -> Conf:
        if "large_segment_size_mb" in self.rules.conf_keys:
            self._segment_size_first()
        if self.rules.conf.rounding_follows_segment:
            self.conf = replace(self.conf, max_non_split_rounding=self.conf.large_segment_size)
        if self.rules.conf.in_two_passes:
            self._read_pairs(_COMMON)
            self._read_pairs(_CUDA)
        else:
            self._read_pairs(_COMMON | _CUDA)
        return self.conf

    def _segment_size_first(self) -> None:
        """Other keys are checked against it, wherever it stands; torch takes any word of that name for the key."""
        while self.at < len(self.words):
            if self.words[self.at] == "large_segment_size_mb":
                self.key = self.words[self.at]
                self._separator(":")
                self.large_segment_size()
            self.at += 1

    def _read_pairs(self, readers: Mapping[str, Callable[[_Reader], None]]) -> None:
        """Key by key; those without a reader in this pass are skipped."""
        self.at = 0
        while self.at < len(self.words):
            self.key = self.words[self.at]
            if self.key not in self.rules.conf_keys:
                raise self._unknown()
            self._separator(":")
            readers.get(self.key, _Reader.skip)(self)
            if self.at + 1 < len(self.words):
                self._separator(",")
            self.at += 1

    def skip(self) -> None:
        if self._next() == "[":
            while self.words[self.at] != "]":
                self._expect_more(_NOT_CLOSED)
                self.at += 1

    def max_split_size(self) -> None:
        self.conf = replace(self.conf, max_split_size=min(self._size_from_segment(), UNLIMITED))

    def max_non_split_rounding(self) -> None:
        self.conf = replace(self.conf, max_non_split_rounding=self._size_from_segment())

    def large_segment_size(self) -> None:
        size = self._number()
        if size <= _LEAST_SEGMENT:
            raise self._refused(f"torch wants more than {_LEAST_SEGMENT}")
        self.conf = replace(self.conf, large_segment_size=min(size, _MOST_MIB) * MIB)

    def garbage_collection_threshold(self) -> None:
        share = self._double()
        if not 0.0 < share < 1.0:
            raise self._refused("torch wants a number between 0 and 1, neither of them included")
        self.conf = replace(self.conf, garbage_collection_threshold=share)

    def per_process_memory_fraction(self) -> None:
        share = self._double()
        if not 0.0 <= share <= 1.0:
            raise self._refused("torch wants a number from 0 to 1")
        self.conf = replace(self.conf, per_process_memory_fraction=share)

    def expandable_segments(self) -> None:
        self.conf = replace(self.conf, expandable_segments=self._flag())

    def throw_on_cudamalloc_oom(self) -> None:
        self.conf = replace(self.conf, throw_on_cudamalloc_oom=self._flag())

    def graph_capture_record_stream_reuse(self) -> None:
        self.conf = replace(self.conf, graph_capture_record_stream_reuse=self._flag())

    def chosen_backend(self) -> None:
        name = self._next()
        if name not in _BACKENDS:
            raise self._refused(f"torch has {' and '.join(_BACKENDS)}")
        if self.backend not in (None, name):
            raise self._refused(f"the process began with {self.backend}, and torch cannot change it")
        self.conf = replace(self.conf, backend=name)

    def flag_without_effect(self) -> None:
        self._flag()

    def number_without_effect(self) -> None:
        self._number()

    def register_threads(self) -> None:
        threads = self._number()
        if not is_power_of_two(threads) or threads > _MOST_THREADS:
            raise self._refused(f"torch wants a power of two up to {_MOST_THREADS}")

    def reserved_segment(self) -> None:
        if self._number() == 0:
            raise self._refused("torch wants more than 0")

    def divisions(self) -> None:
        if self._peek() == "[":
            self.at += 1
            slots = self._division_list()
        else:
            steps = self._number()
            if not is_power_of_two(steps):
                raise self._refused("torch wants a power of two (1 is off)")
            slots = [steps] * DIVISIONS
        self.conf = replace(self.conf, roundup_power2_divisions=tuple(slots))

    def _division_list(self) -> list[int]:
        """``[64:8,256:4,>:1]``: interval in MiB and steps. Intervals that are not named keep what they have."""
        slots = list(self.conf.roundup_power2_divisions)
        last = 0
        first = True
        while not self._list_ends():
            interval = self.words[self.at]
            self._separator(":")
            steps = self._number()
            if steps and not is_power_of_two(steps):
                raise self._refused("torch wants powers of two as divisions, or 0 for none")
            if interval == ">":
                begin = last + (not self.rules.conf.above_includes)
                slots[begin:] = [steps] * (DIVISIONS - begin)
            else:
                last = self._slot(interval)
                if first:  # also what is below the first interval
                    slots[:last] = [steps] * last
                    first = False
                slots[last] = steps
            self._expect_more(_NOT_CLOSED)
            if self.words[self.at + 1] != "]":
                self._separator(",")
        return slots

    def _list_ends(self) -> bool:
        may_end_here = self.rules.conf.checks_separators  # up to 2.9, at the end of the string
        if not may_end_here:
            self._expect_more(_NOT_CLOSED)
        self.at += 1
        return self.at == len(self.words) or self.words[self.at] == "]"

    def _slot(self, interval: str) -> int:
        try:
            begin = read_unsigned(interval)
        except ValueError as error:
            raise self._error(f"{self.key}: the interval {printable(interval, 40)} {error}") from None
        if not is_power_of_two(begin):
            raise self._error(f"{self.key}: torch wants powers of two as intervals, not {printable(interval, 40)}")
        return min(begin.bit_length() - 1, DIVISIONS - 1)

    def _size_from_segment(self) -> int:
        """A number of MiB that the large segment's size limits, as bytes."""
        size = self._number()
        least = self.conf.large_segment_size // MIB
        allowed = self.rules.conf.limit_allowed
        if size < least or (size == least and not allowed):
            wanted = "at least" if allowed else "more than"
            raise self._refused(f"torch {self.rules.release} wants {wanted} large_segment_size ({least})")
        return min(size, _MOST_MIB) * MIB

    def _number(self) -> int:
        word = self._next()
        try:
            return read_signed(word) if self.rules.conf.signed else read_unsigned(word)
        except ValueError as error:
            raise self._refused(f"that {error}") from None

    def _double(self) -> float:
        try:
            return read_double(self._next())
        except ValueError as error:
            raise self._refused(f"that {error}") from None

    def _flag(self) -> bool:
        word = self._next()
        if word not in ("True", "False"):
            raise self._refused("torch wants True or False, spelled so")
        return word == "True"

    def _next(self) -> str:
        word = self._peek()
        self.at += 1
        return word

    def _peek(self) -> str:
        self._expect_more(f"{self.key} has no value")
        return self.words[self.at + 1]

    def _separator(self, expected: str) -> None:
        self._expect_more(f"{self.key} has no value; write {self.key}:value")
        self.at += 1
        if self.rules.conf.checks_separators and self.words[self.at] != expected:
            found = printable(self.words[self.at], 40)
            raise self._error(f"{self.key}: {expected!r} is expected before {found!r}")

    def _expect_more(self, otherwise: str) -> None:
        if self.at + 1 >= len(self.words):
            raise self._error(otherwise)

    def _refused(self, why: str) -> UsageError:
        """The value read last breaks a rule."""
        return self._error(f"{self.key} is {printable(self.words[self.at], 40)}, but {why}")

    def _unknown(self) -> UsageError:
        key = printable(self.key, 60)
        release = self.rules.release
        if key in {",", ":", "[", "]"}:
            return self._error(f"a key is expected before {key!r}; write key:value,key:value")
        having = [r.release for r in RULES if key in r.conf_keys]
        if having:
            return self._error(f"{key!r} is a key of torch {having[0]} and newer, not of {release}")
        near = difflib.get_close_matches(key, sorted(self.rules.conf_keys), n=1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(self.rules.conf_keys))}"
        return self._error(f"{key!r} is not a key of torch {release}; {hint}")

    def _error(self, what: str) -> UsageError:
        return UsageError(f"conf '{printable(self.text)}': {what}")


_COMMON: dict[str, Callable[[_Reader], None]] = {
    "max_split_size_mb": _Reader.max_split_size,
    "max_non_split_rounding_mb": _Reader.max_non_split_rounding,
    "garbage_collection_threshold": _Reader.garbage_collection_threshold,
    "roundup_power2_divisions": _Reader.divisions,
    "expandable_segments": _Reader.expandable_segments,
    "pinned_use_background_threads": _Reader.flag_without_effect,
    "pinned_max_round_threshold_mb": _Reader.number_without_effect,
    "pinned_max_cached_size_mb": _Reader.number_without_effect,
}
_CUDA: dict[str, Callable[[_Reader], None]] = {
    "backend": _Reader.chosen_backend,
    # It only lets other threads run while the driver works. Builds for CUDA know the names for HIP too.
    "release_lock_on_cudamalloc": _Reader.flag_without_effect,
    "release_lock_on_hipmalloc": _Reader.flag_without_effect,
    "pinned_use_cuda_host_register": _Reader.flag_without_effect,
    "pinned_use_hip_host_register": _Reader.flag_without_effect,
    "pinned_num_register_threads": _Reader.register_threads,
    "pinned_reserve_segment_size_mb": _Reader.reserved_segment,
    "pinned_free_catch_all": _Reader.flag_without_effect,
    "graph_capture_record_stream_reuse": _Reader.graph_capture_record_stream_reuse,
    "per_process_memory_fraction": _Reader.per_process_memory_fraction,
    "throw_on_cudamalloc_oom": _Reader.throw_on_cudamalloc_oom,
}
