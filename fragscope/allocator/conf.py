"""The conf: settings of the allocator, from a string, from the environment or from what a recording reports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NoReturn

from fragscope.allocator.conf_reader import DIVISIONS, UNLIMITED, Conf, effective_conf, is_power_of_two
from fragscope.allocator.rules import Rules
from fragscope.errors import UnmodelledError, UsageError, printable
from fragscope.trace import Settings
from fragscope.units import MIB

__all__ = ["UNLIMITED", "Conf", "conf_from_environment", "effective_conf", "parse_conf", "recorded_conf"]

_GRANULARITY = 2 * MIB  # of physical memory that the driver maps (cuMemGetAllocationGranularity)
_MOST_SIZE = 2**62  # bytes: a sum of two such sizes still fits in PyTorch's 64 bits
_MOST_DIVISIONS = 2**54  # times 512 B (kMinBlockSize) it still fits in PyTorch's 64 bits


def parse_conf(text: str, rules: Rules, before: Conf | None = None) -> Conf:
    """The settings in force after a conf string, for the allocator model.

    Args:
        text: the conf string.
        rules: the torch release that reads it.
        before: settings in force until then; None where the string is what the process starts with.

    Raises:
        UsageError: the release refuses the string. PyTorch may keep the settings it read before the error.
        UnmodelledError: the release accepts settings that the allocator model does not cover; names the key.
    """
    conf = effective_conf(text, rules, before)
    _refuse_unmodelled(conf)
    return conf


def conf_from_environment(environ: Mapping[str, str], rules: Rules) -> tuple[str, str]:
    """The variable that a process of the release takes its conf from, and its text; both empty where none is set.

    A variable that is set to nothing counts: it hides the ones after it.

    Raises:
        UnmodelledError: the release would take some keys from one variable and some from another.
    """
    if rules.conf_variables[0] not in environ:
        for variable in rules.conf.variables_in_part:
            if variable in environ:
                raise UnmodelledError(
                    variable, f"torch {rules.release} for CUDA takes some keys from it and others not; unset it"
                )
    for variable in rules.conf_variables:
        if variable in environ:
            return variable, environ[variable]
    return "", ""


def recorded_conf(settings: Settings, rules: Rules) -> Conf:
    """The conf in force when a recording ended.

    A snapshot names the last string only; settings that earlier strings left stand beside it as values. The Conf's
    text is that string where it alone gives these settings, else one that does. What snapshots do not report
    (``large_segment_size``, ``max_non_split_rounding``, the memory fraction) is taken from the last string alone.

    Args:
        settings: of the Trace.
        rules: the torch release that recorded it.

    Raises:
        UsageError: the string or the values are not such as the release has.
        UnmodelledError: settings that the allocator model does not cover, or a value without meaning; names the key.
    """
    named = effective_conf(settings.conf, rules)
    conf = _with_recorded(named, settings.recorded)
    _refuse_unmodelled(conf)
    if conf == named:
        return conf
    conf = replace(conf, text=_spelled(conf, rules))
    if not _gives(conf, rules):
        raise UsageError(
            f"the settings that were in force when this was recorded ({conf.text}) cannot be those of "
            f"torch {rules.release}; name the release that recorded it"
        )
    return conf


def _gives(conf: Conf, rules: Rules) -> bool:
    """Whether a process that starts with the Conf's text has its settings."""
    try:
        return effective_conf(conf.text, rules) == conf
    except UsageError:
        return False


def _refuse_unmodelled(conf: Conf) -> None:
    """Raise UnmodelledError for settings that torch accepts and the allocator model does not cover."""

    def refuse(key: str, why: str) -> UnmodelledError:
        return UnmodelledError(key, f"{why} (conf '{printable(conf.text)}')")

    if conf.backend != "native":
        raise refuse("backend", f"the allocator model covers backend:native, not {conf.backend}")
    if conf.graph_capture_record_stream_reuse:
        raise refuse(
            "graph_capture_record_stream_reuse",
            "the allocator model does not cover graph_capture_record_stream_reuse:True",
        )
    if conf.expandable_segments and conf.large_segment_size % _GRANULARITY:
        raise refuse(
            "large_segment_size_mb",
            f"the driver maps expandable segments in units of 2 MiB, and {conf.large_segment_size // MIB} MiB "
            "are no multiple of it; choose an even number",
        )
    for key, size in (
        ("large_segment_size_mb", conf.large_segment_size),
        ("max_non_split_rounding_mb", conf.max_non_split_rounding),
    ):
        if size > _MOST_SIZE:
            raise refuse(
                key, f"sums with {size // MIB} MiB overflow in PyTorch, which the allocator model does not cover"
            )
    if max(conf.roundup_power2_divisions) > _MOST_DIVISIONS:
        raise refuse(
            "roundup_power2_divisions",
            "so many divisions overflow in PyTorch, which the allocator model does not cover",
        )


def _with_recorded(conf: Conf, recorded: Mapping[str, str]) -> Conf:
    """The Conf with the values a snapshot reports, as far as it does."""
    slots = list(conf.roundup_power2_divisions)
    for key, value in recorded.items():
        try:
            if key == "max_split_size":
                size = int(value)
                conf = replace(conf, max_split_size=size if 0 <= size < UNLIMITED else UNLIMITED)  # -1: no limit
            elif key == "garbage_collection_threshold":
                conf = replace(conf, garbage_collection_threshold=_share(value))
            elif key == "expandable_segments":
                conf = replace(conf, expandable_segments=_truth(value))
            elif key == "graph_capture_record_stream_reuse":
                conf = replace(conf, graph_capture_record_stream_reuse=_truth(value))
            elif key.startswith("roundup_power2_divisions."):
                slots[_recorded_slot(key)] = _steps(value)
        except ValueError:
            raise UnmodelledError(
                key.partition(".")[0],
                f"was {printable(value, 60)} when this was recorded, which is not a value it can have",
            ) from None
    return replace(conf, roundup_power2_divisions=tuple(slots))


def _truth(value: str) -> bool:
    return {"True": True, "False": False}[value] if value in ("True", "False") else _no_value()


def _share(value: str) -> float:
    share = float(value)
    return share if 0.0 <= share < 1.0 else _no_value()


def _steps(value: str) -> int:
    steps = int(value)
    return steps if steps == 0 or (steps > 0 and is_power_of_two(steps)) else _no_value()


def _recorded_slot(key: str) -> int:
    """Snapshots name the intervals ``1``, ``2``, ``4`` to ``32768`` (MiB)."""
    begin = int(key.partition(".")[2])
    in_table = begin > 0 and is_power_of_two(begin) and begin.bit_length() <= DIVISIONS
    return begin.bit_length() - 1 if in_table else _no_value()


def _no_value() -> NoReturn:
    raise ValueError


def _spelled(conf: Conf, rules: Rules) -> str:
    """A conf string that gives these settings to a process that starts with it, if one can."""
    default = Conf()
    rounding = conf.large_segment_size if rules.conf.rounding_follows_segment else default.max_non_split_rounding
    slots = conf.roundup_power2_divisions
    pairs: list[str] = []
    if conf.large_segment_size != default.large_segment_size:
        pairs.append(f"large_segment_size_mb:{conf.large_segment_size // MIB}")
    if conf.max_split_size != UNLIMITED:
        pairs.append(f"max_split_size_mb:{conf.max_split_size // MIB}")
    if conf.max_non_split_rounding != rounding:
        pairs.append(f"max_non_split_rounding_mb:{conf.max_non_split_rounding // MIB}")
    if len(set(slots)) > 1:
        named = [f"{1 << i}:{steps}" for i, steps in enumerate(slots) if steps or not i]
        pairs.append(f"roundup_power2_divisions:[{','.join(named)}]")
    elif slots[0]:
        pairs.append(f"roundup_power2_divisions:{slots[0]}")
    for key in ("garbage_collection_threshold", "expandable_segments", "per_process_memory_fraction",
                "throw_on_cudamalloc_oom"):  # fmt: skip
        if getattr(conf, key) != getattr(default, key):
            pairs.append(f"{key}:{getattr(conf, key)}")
    return ",".join(pairs)
