"""Parsing ``PYTORCH_ALLOC_CONF`` strings.

The model covers the native allocator under its default conf. Keys without any effect on device blocks are accepted;
every other setting that departs from its default is refused by name, never ignored.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fragscope.allocator.rules import Rules
from fragscope.errors import UnmodelledError, UsageError, printable
from fragscope.trace import Settings

# Key -> values that leave the native allocator's device blocks as they are by default. None: any value does.
_WITHOUT_EFFECT: dict[str, frozenset[str] | None] = {
    "backend": frozenset({"native"}),
    "pinned_use_cuda_host_register": None,
    "pinned_num_register_threads": None,
    "pinned_use_background_threads": None,
    "pinned_reserve_segment_size_mb": None,
    "pinned_free_catch_all": None,
    "pinned_max_round_threshold_mb": None,
    "pinned_max_cached_size_mb": None,
    "release_lock_on_cudamalloc": None,  # only lets other threads run while the driver works
    "expandable_segments": frozenset({"False"}),
    "large_segment_size_mb": frozenset({"20"}),
    "per_process_memory_fraction": frozenset({"1", "1.0"}),
    "throw_on_cudamalloc_oom": frozenset({"False"}),
    "graph_capture_record_stream_reuse": frozenset({"False"}),
    "max_non_split_rounding_mb": frozenset({"20"}),
    "max_split_size_mb": frozenset(),
    "roundup_power2_divisions": frozenset(),
    "garbage_collection_threshold": frozenset(),
}
_EVERY_RELEASE = frozenset(
    {
        "backend", "max_split_size_mb", "roundup_power2_divisions", "garbage_collection_threshold",
        "expandable_segments", "release_lock_on_cudamalloc", "pinned_use_cuda_host_register",
        "pinned_num_register_threads", "pinned_use_background_threads",
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Conf:
    """A parsed conf.

    Attributes:
        text: the string as given; ``""`` is the default.
    """

    text: str = ""

    @property
    def label(self) -> str:
        """For tables: ``default`` instead of an empty string."""
        return self.text or "default"


def parse_conf(text: str, rules: Rules) -> Conf:
    """Parse a conf string as the given release's rules understand it.

    Raises:
        UsageError: a key that the release does not have, or a pair without a value.
        UnmodelledError: a setting that the allocator model does not cover; names the key.
    """
    known = _EVERY_RELEASE | rules.conf_keys
    for key, value in _pairs(text):
        if key not in known:
            elsewhere = key in _WITHOUT_EFFECT
            why = f"is not a key of torch {rules.release}" if elsewhere else "is not a key of PYTORCH_ALLOC_CONF"
            raise UsageError(f"conf {text!r}: {key!r} {why}")
        harmless = _WITHOUT_EFFECT[key]
        if harmless is not None and value not in harmless:
            raise UnmodelledError(key, f"the allocator model does not cover {key}:{value} (conf {text!r})")
    return Conf(text)


# What a snapshot reports of settings that move device blocks -> the values that leave them as they are by default.
_RECORDED_DEFAULTS = {
    "max_split_size": frozenset({"-1"}),
    "garbage_collection_threshold": frozenset({"0.0", "0"}),
    "expandable_segments": frozenset({"False"}),
    "graph_capture_record_stream_reuse": frozenset({"False"}),
}


def recorded_conf(settings: Settings) -> str:
    """The conf that a recording was made under, for a replay under the same settings.

    Raises:
        UnmodelledError: the conf string is a default one, but the effective settings beside it are not; names the key.
    """
    if settings.conf:
        return settings.conf  # parse_conf decides about it
    for key, value in settings.recorded.items():
        allowed = _RECORDED_DEFAULTS.get(key)
        if key.startswith("roundup_power2_divisions."):
            allowed = frozenset({"0", "1"})
        if allowed is not None and value not in allowed:
            raise UnmodelledError(
                key.partition(".")[0],
                f"was {printable(value, 60)} when this was recorded, which the allocator model does not cover",
            )
    return settings.conf


def _pairs(text: str) -> Iterator[tuple[str, str]]:
    """Key and value of each pair; commas inside brackets belong to the value. White space is dropped, as torch does."""
    compact = "".join(text.split())
    start = depth = 0
    for position, character in enumerate(compact + ","):
        depth += (character == "[") - (character == "]")
        if character == "," and depth == 0:
            part = compact[start:position]
            start = position + 1
            if part:
                key, colon, value = part.partition(":")
                if not colon or not value:
                    raise UsageError(f"conf {text!r}: {part!r} is not of the form key:value")
                yield key, value
    if depth:
        raise UsageError(f"conf {text!r}: a bracket is not closed")
