"""What differs between torch releases, in one table.

Sources: c10/cuda/CUDACachingAllocator.cpp and c10/core/AllocatorConfig.h of each release; the rows of 2.11 to 2.14 are
held against answers of the releases' own binaries (tests/data/golden).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from enum import Enum

from fragscope.errors import UsageError


class TieBreak(Enum):
    """How a free list orders blocks of one stream and one size."""

    ADDRESS = "address"
    """By address (up to 2.11): which segment the driver placed lower decides."""
    BLOCK_ORDER = "block order"
    """By creation of the block object (2.12): a split makes a new object for its front part."""
    SEGMENT_ORDER = "segment order"
    """By creation of the segment, then by address (2.13 and newer): independent of the driver's placement."""


@dataclass(frozen=True, slots=True)
class ConfRules:
    """How a torch release reads a conf string.

    Source: c10/cuda/CUDAAllocatorConfig.cpp up to 2.9; from 2.10 on c10/core/AllocatorConfig.{h,cpp}, and the former
    only for CUDA's own keys.

    Attributes:
        white_space: characters that are dropped wherever they stand.
        checks_separators: whether a separator of the wrong kind is an error; any word passes for one otherwise.
        in_two_passes: whether CUDA's own keys are read in a second pass over the string, after all others.
        signed: whether numbers are read as 32-bit integers (std::stoi) instead of unsigned 64-bit ones (std::stoull).
        limit_allowed: whether ``max_split_size_mb`` and ``max_non_split_rounding_mb`` may equal the large segment's
            size, or must be above it.
        above_includes: whether ``>`` in a list covers the interval named last too.
        rounding_follows_segment: whether every string sets ``max_non_split_rounding_mb`` back to the large segment's
            size, or leaves it.
        variables_in_part: environment variables that only some keys are read from.
    """

    white_space: str
    checks_separators: bool
    in_two_passes: bool
    signed: bool
    limit_allowed: bool
    above_includes: bool
    rounding_follows_segment: bool
    variables_in_part: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Rules:
    """The allocator behaviour of one torch release.

    Attributes:
        release: ``major.minor``.
        tie_break: order of equal-size free blocks.
        limit_at_fraction_one: whether a memory fraction of 1.0 sets a limit (up to 2.9) or removes it.
        limit_rounds: whether fraction times total memory is rounded (2.13 and newer) or truncated.
        conf_variables: environment variables read, first found wins.
        conf_keys: keys that a conf string may hold.
        conf: how a conf string is read.
        scopes_defer: whether an open allocation scope (``use_mem_pool`` too) keeps finished work of other streams from
            being looked at and cached memory from being released; from 2.13 on only a stream capture does.
        newest_scope_first: whether the newest open scope that applies selects the pool, or the oldest (2.9).
        lends_first: whether pools made with ``use_on_oom`` help before cached memory is released, or (up to 2.10) only
            after that was in vain.
    """

    release: str
    tie_break: TieBreak
    limit_at_fraction_one: bool
    limit_rounds: bool
    conf_variables: tuple[str, ...]
    conf_keys: frozenset[str]
    conf: ConfRules
    scopes_defer: bool
    newest_scope_first: bool
    lends_first: bool


_OLD = ("PYTORCH_CUDA_ALLOC_CONF",)
_NEW = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
_KEYS_2_9 = frozenset(
    {
        "backend", "expandable_segments", "garbage_collection_threshold", "graph_capture_record_stream_reuse",
        "max_non_split_rounding_mb", "max_split_size_mb", "pinned_num_register_threads",
        "pinned_use_background_threads", "pinned_use_cuda_host_register", "pinned_use_hip_host_register",
        "release_lock_on_cudamalloc", "release_lock_on_hipmalloc", "roundup_power2_divisions",
    }
)  # fmt: skip
_KEYS_2_10 = _KEYS_2_9 | {"per_process_memory_fraction", "pinned_reserve_segment_size_mb"}
_KEYS_2_11 = _KEYS_2_10 | {"large_segment_size_mb"}
_KEYS_2_12 = _KEYS_2_11 | {"throw_on_cudamalloc_oom", "pinned_free_catch_all"}
_KEYS_2_13 = _KEYS_2_12 | {"pinned_max_round_threshold_mb", "pinned_max_cached_size_mb"}
_CONF_2_9 = ConfRules(
    white_space=" ",
    checks_separators=True,
    in_two_passes=False,
    signed=True,
    limit_allowed=False,
    above_includes=True,
    rounding_follows_segment=False,
    variables_in_part=(),
)
_CONF_2_10 = ConfRules(
    white_space=" \t\n\v\f\r",  # std::isspace
    checks_separators=False,
    in_two_passes=True,
    signed=False,
    limit_allowed=True,
    above_includes=False,
    rounding_follows_segment=False,
    variables_in_part=("PYTORCH_HIP_ALLOC_CONF",),
)
_CONF_2_11 = replace(_CONF_2_10, rounding_follows_segment=True)

RULES: tuple[Rules, ...] = (
    Rules("2.9", TieBreak.ADDRESS, True, False, _OLD, _KEYS_2_9, _CONF_2_9, True, False, False),
    Rules("2.10", TieBreak.ADDRESS, False, False, _NEW, _KEYS_2_10, _CONF_2_10, True, True, False),
    Rules("2.11", TieBreak.ADDRESS, False, False, _NEW, _KEYS_2_11, _CONF_2_11, True, True, True),
    Rules("2.12", TieBreak.BLOCK_ORDER, False, False, _NEW, _KEYS_2_12, _CONF_2_11, True, True, True),
    Rules("2.13", TieBreak.SEGMENT_ORDER, False, True, _NEW, _KEYS_2_13, _CONF_2_11, False, True, True),
    Rules("2.14", TieBreak.SEGMENT_ORDER, False, True, _NEW, _KEYS_2_13, _CONF_2_11, False, True, True),
)
"""Oldest first."""

NEWEST = RULES[-1]


@dataclass(frozen=True, slots=True)
class ChosenRules:
    """The rules for a release somebody named.

    Attributes:
        torch: the release as named, such as ``"2.11.0"``.
        rules: the row of the table.
        assumed: True where the release is newer than the table and its newest row stands in.
    """

    torch: str
    rules: Rules
    assumed: bool


def rules_for(torch: str) -> ChosenRules:
    """The rules of a torch release such as ``"2.11.0"``, ``"2.13"`` or ``"2.11.0+cu130"``.

    Raises:
        UsageError: the release is malformed or older than the oldest rules.
    """
    match = re.fullmatch(r"(\d{1,3})\.(\d{1,3})(?:\.\d+)?(?:[a-z]\w*)?(?:\.dev\d+)?(?:\+[\w.]+)?", torch, re.ASCII)
    if match is None:
        raise UsageError(f"--torch: {torch!r} is not a torch release; write one such as 2.11.0")
    version = (int(match[1]), int(match[2]))
    known = {tuple(int(p) for p in r.release.split(".")): r for r in RULES}
    if version in known:
        return ChosenRules(torch, known[version], assumed=False)
    if version > max(known):
        return ChosenRules(torch, NEWEST, assumed=True)
    raise UsageError(
        f"--torch: {torch} is older than the oldest rules known ({RULES[0].release}); "
        f"known are {', '.join(r.release for r in RULES)}"
    )
