"""Confs as sets of settings: reading them, and spelling them so that every release concerned takes them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import replace

from fragscope.allocator import Conf, Rules, parse_conf
from fragscope.allocator.conf_words import split_words
from fragscope.errors import UsageError, printable

TUNED = (
    "expandable_segments",
    "max_split_size_mb",
    "max_non_split_rounding_mb",
    "roundup_power2_divisions",
    "garbage_collection_threshold",
    "large_segment_size_mb",
)
"""Keys that decide where memory goes. All others a conf holds are left as they are."""

Choice = tuple[tuple[str, str], ...]
"""Tuned keys and their values, in the order of ``TUNED``."""


def choice_of(values: Mapping[str, str]) -> Choice:
    """Values by key as a Choice."""
    return tuple((key, values[key]) for key in TUNED if key in values)


def settings_in(text: str, rules: Rules) -> dict[str, str]:
    """Keys and values of a conf string that the release takes; of a key given twice the last value."""
    words = split_words(text, rules.conf.white_space)
    out: dict[str, str] = {}
    at = 0
    while at + 2 < len(words):  # key, separator, value
        stop = at + 3
        if words[at + 2] == "[":
            stop = words.index("]", at) + 1 if "]" in words[at:] else len(words)
        out[words[at]] = "".join(words[at + 2 : stop])
        at = stop + 1  # past the separator
    return out


def spelled(values: Mapping[str, str]) -> str:
    """Values by key as a conf string."""
    return ",".join(f"{key}:{value}" for key, value in values.items())


def effective(text: str, releases: Sequence[Rules]) -> tuple[Conf, ...]:
    """What a conf string means to each release, without its spelling: equal values are equal confs.

    Raises:
        UsageError: a release refuses it, or the model does not cover it.
    """
    return tuple(replace(parse_conf(text, rules), text="") for rules in releases)


def kept(keeps: Sequence[str], recorded: Sequence[Mapping[str, str]], releases: Sequence[Rules]) -> dict[str, str]:
    """The settings that every candidate has; ``""`` stands for a key that none may have.

    Args:
        keeps: ``KEY:VALUE``, or ``KEY`` for what the recordings had.
        recorded: the settings of each recording.
        releases: that are to take them.

    Raises:
        UsageError: a key or value that a release does not know, contradictions, or recordings that differ in what is
            to stay.
    """
    out: dict[str, str] = {}
    for keep in keeps:
        key, colon, value = (part.strip() for part in keep.partition(":"))
        _check_key(keep, key, releases)
        if not colon:
            value = _common(key, recorded, f"--keep {key}")
        else:
            if not value:
                raise UsageError(f"--keep {printable(keep)}: write KEY, or KEY:VALUE with a value")
            value = _checked(keep, key, value, releases)
        if out.setdefault(key, value) != value:
            raise UsageError(f"--keep: {key} cannot be both {out[key] or 'default'} and {value or 'default'}")
    for key in sorted({key for values in recorded for key in values} - set(TUNED) - set(out)):
        out[key] = _common(key, recorded, "the traces")
    text = spelled({key: value for key, value in out.items() if value})
    try:
        effective(text, releases)
    except UsageError as e:
        raise UsageError(f"--keep: {e}") from None
    if all(key in out for key in TUNED if all(key in rules.conf_keys for rules in releases)):
        raise UsageError("--keep: every setting is kept; nothing is left to tune")
    return out


def _check_key(keep: str, key: str, releases: Sequence[Rules]) -> None:
    for rules in releases:
        if key not in rules.conf_keys:
            near = difflib.get_close_matches(key, sorted(rules.conf_keys), n=1)
            hint = f"did you mean {near[0]}?" if near else f"tuned are {', '.join(TUNED)}"
            raise UsageError(f"--keep {printable(keep)}: torch {rules.release} has no such setting; {hint}")


def _checked(keep: str, key: str, value: str, releases: Sequence[Rules]) -> str:
    """The value as it is spelled in candidates, ``""`` for the default."""
    text = f"{key}:{value}"
    try:
        settings = settings_in(text, releases[0])
        if set(settings) != {key}:
            raise UsageError("that is more than one setting; repeat --keep")
        if effective(text, releases) == effective("", releases) and key in TUNED:
            return ""
    except UsageError as e:
        raise UsageError(f"--keep {printable(keep)}: {e}") from None
    return settings[key]


def _common(key: str, recorded: Sequence[Mapping[str, str]], where: str) -> str:
    found = {values.get(key, "") for values in recorded}
    if len(found) > 1:
        shown = " and ".join(sorted(printable(value) or "the default" for value in found))
        raise UsageError(f"{where}: the recordings have {key} as {shown}; say which with --keep {key}:VALUE")
    return found.pop() if found else ""
