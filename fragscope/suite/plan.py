"""Cases: what is run under what, with readable ids and digests."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import fragscope
from fragscope.allocator import ReplaySettings, card_named
from fragscope.results import DeviceKind, Outcome
from fragscope.suite.discover import Selection
from fragscope.suite.scenario import Value
from fragscope.suite.sources import installed_fingerprint


@dataclass(frozen=True, slots=True)
class PlannedCase:
    """One measurement to make.

    Attributes:
        id: readable, unique within a run.
        digest: of everything that decides the result except the source code, as 24 hexadecimal digits.
    """

    selection: Selection
    values: tuple[tuple[str, Value], ...]
    changed: tuple[tuple[str, Value], ...]
    settings: ReplaySettings
    device: DeviceKind
    id: str
    digest: str

    @property
    def expect(self) -> Outcome:
        """What its variant declares for this cell."""
        s = self.settings
        variant = self.selection.scenario.variants[self.selection.variant]
        return variant.expected(self.selection.preset, s.conf, s.rules.torch, s.card, self.device, dict(self.values))

    @property
    def recording(self) -> tuple[str, tuple[tuple[str, Value], ...], str, str]:
        """Cases with equal values here can share one recording.

        On a card each conf is recorded: its allocator reads the conf once a process, and what it does under one is
        there to be measured.
        """
        conf = self.settings.conf if self.device == "cuda" else ""
        return (self.selection.name, self.values, self.device, conf)


def plan(
    selections: Sequence[Selection],
    overrides: Mapping[str, str],
    settings: Sequence[ReplaySettings],
    device: DeviceKind,
) -> list[PlannedCase]:
    """Every selection under every combination of settings, each once."""
    out: dict[str, PlannedCase] = {}
    for selection, setting in itertools.product(selections, settings):
        scenario = selection.scenario
        parsed = {k: scenario.parse_override(k, v) for k, v in overrides.items()}
        changes = {k: v for k, v in parsed.items() if v is not None}
        defaults = scenario.values_for(selection.preset, {})
        values = scenario.values_for(selection.preset, changes)
        changed = tuple(sorted((k, v) for k, v in values.items() if defaults[k] != v))
        items = tuple(sorted(values.items()))
        case = PlannedCase(
            selection=selection,
            values=items,
            changed=changed,
            settings=setting,
            device=device,
            id=_case_id(selection.name, changed, setting, device),
            digest=_digest(selection.name, items, setting, device),
        )
        out.setdefault(case.digest, case)
    return list(out.values())


def _case_id(name: str, changed: Sequence[tuple[str, Value]], settings: ReplaySettings, device: DeviceKind) -> str:
    """``scenario/preset/variant[name=value]@conf,torch,card,device``."""
    params = "[" + ",".join(f"{k}={v}" for k, v in changed) + "]" if changed else ""
    card = settings.card
    if settings.capacity != card_named(card).free:
        card += f":{settings.capacity}B"
    under = [settings.conf or "default", f"torch-{settings.rules.torch}", card, device]
    return f"{name}{params}@{','.join(under)}"


def _digest(name: str, values: Sequence[tuple[str, Value]], settings: ReplaySettings, device: DeviceKind) -> str:
    card = card_named(settings.card)
    facts = {
        "name": name,
        "values": list(values),
        "conf": settings.conf,
        "torch": settings.rules.torch,
        "card": [settings.card, settings.total, settings.capacity],
        "reports": [card.product, *card.capability, card.multiprocessors, card.l2],
        "memory_fraction": settings.memory_fraction,
        "device": device,
        "versions": versions(),
        "installed": _installed(),
        "fragscope": own_fingerprint(),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]


@functools.cache
def versions() -> dict[str, str]:
    """Versions of what decides a result; a package that is not installed is left out."""
    out = {"python": platform.python_version()}
    for package in ("fragscope", "torch", "flashinfer-python", "numpy"):
        try:
            out[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return out


_installed = functools.cache(installed_fingerprint)


@functools.cache
def own_fingerprint() -> str:
    """SHA-256 over fragscope's own modules, so that results of an edited model are not taken for its own."""
    digest = hashlib.sha256()
    folder = Path(fragscope.__file__).parent
    for file in sorted(folder.rglob("*.py")):
        digest.update(str(file.relative_to(folder)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()
