"""The allocator settings and the release that a snapshot tells of."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from fragscope.trace.snapshot.shape import Checker
from fragscope.trace.trace import Settings

CONF_KEY = "PYTORCH_CUDA_ALLOC_CONF"  # the name in every release, whichever variable was set
_SCOPES_DEFER = (2, 12)  # up to here an open scope keeps an OOM from releasing what is cached


def release_of(top: Mapping[str, Any], settings: Mapping[str, Any], entries: Sequence[Mapping[str, Any]]) -> str:
    """The newest release that writes these keys: which keys a snapshot has grew from release to release.

    2.10 and 2.11 write the same keys; their allocators also behave alike under the settings that the model covers.
    """
    if "host_segments" in top:
        return "2.14"
    if "max_round_threshold" in settings:
        return "2.13"
    if any("pool_id" in e for e in entries if isinstance(e, dict)):
        return "2.12"
    return "2.11" if any("user_metadata" in e for e in entries if isinstance(e, dict)) else "2.9"


def scopes_defer(release: str) -> bool:
    """Whether an open scope keeps an OOM from releasing what is cached."""
    return tuple(int(part) for part in release.split(".")) <= _SCOPES_DEFER


def releases_in_part(settings: Mapping[str, Any]) -> bool:
    """Whether requests may release some segments without waiting for other streams: garbage collection, oversize."""
    return bool(settings.get("max_split_size", -1) != -1 or settings.get("garbage_collection_threshold", 0) != 0)


def conf_of(settings: Mapping[str, Any]) -> str:
    """The conf string that the snapshot names."""
    conf = settings.get(CONF_KEY)
    return conf if isinstance(conf, str) else ""


def _settings(check: Checker, settings: Mapping[str, Any]) -> Settings:
    flat: dict[str, str] = {}
    for key, item in settings.items():
        if isinstance(item, dict):
            flat.update({f"{key}.{k}": _flat(v) for k, v in item.items()})
        else:
            flat[str(key)] = _flat(item)
    conf = check.text(settings, CONF_KEY, "allocator_settings") if CONF_KEY in settings else ""
    return Settings(conf=conf, recorded=flat)


_SWITCH = re.compile(r"expandable_segments:(True|False)")


def confs_of(check: Checker, settings: Mapping[str, Any]) -> tuple[str, str]:
    """The conf that the snapshot names, with expandable segments off and on."""
    conf = _settings(check, settings).conf
    if not _SWITCH.search(conf):
        conf = ",".join(part for part in (conf, "expandable_segments:False") if part)
    return _SWITCH.sub("expandable_segments:False", conf), _SWITCH.sub("expandable_segments:True", conf)


def settings_at_start(check: Checker, settings: Mapping[str, Any], *, toggled: bool, begins_mapped: bool) -> Settings:
    """As the snapshot reports them, but for expandable segments if those were switched later."""
    reported = _settings(check, settings)
    if not toggled:
        return reported
    recorded = dict(reported.recorded)
    recorded["expandable_segments"] = str(begins_mapped)
    return replace(reported, conf=confs_of(check, settings)[begins_mapped], recorded=recorded)


def _flat(value: Any) -> str:
    """A setting as text. A container becomes its type's name: written out, one that holds itself twice has no end."""
    return str(value) if isinstance(value, str | int | float | None) else type(value).__name__
