"""Whether what variants replay is still what the installed packages have."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

import msgspec

from fragscope.suite.scenario import Scenario
from fragscope.suite.upstream import Source, installed_source

SCHEMA_VERSION = 1

State = Literal["same", "changed", "gone", "cannot be read", "no digest", "not installed"]


class Release(msgspec.Struct, frozen=True):
    """A variant, and the release and digest of what it replays."""

    variant: str
    version: str
    digest: str


class Replayed(msgspec.Struct, frozen=True):
    """One function that variants of a scenario replay, beside what is installed of it.

    Attributes:
        scenario: its name.
        package, function: what is replayed.
        state: ``same``: a variant has the digest of what is installed; ``changed``: none has; ``gone``: the package is
            installed without the function; ``cannot be read``: this Python cannot read its module; ``no digest``: no
            variant says what it replays; ``not installed``.
        version: the release that is installed; None where none is.
        digest: of the function that is installed; None where there is none, or it cannot be read.
        unread: why it cannot be read; ``""`` else.
        same: the variants that replay what is installed.
        variants: all that replay the function.
    """

    scenario: str
    package: str
    function: str
    state: State
    version: str | None
    digest: str | None
    unread: str
    same: list[str]
    variants: list[Release]

    @property
    def stale(self) -> bool:
        """Whether the installed release does something that no variant replays."""
        return self.state in ("changed", "gone")


class UpstreamReport(msgspec.Struct, frozen=True, kw_only=True):
    """What ``fragscope upstream --format json`` prints.

    Attributes:
        functions: every function that variants replay, once for each scenario.
    """

    schema_version: int = SCHEMA_VERSION
    functions: list[Replayed]


def replayed(
    scenarios: Iterable[Scenario], source_of: Callable[[str, str], Source | None] = installed_source
) -> list[Replayed]:
    """Every function that is replayed, once for each scenario, in the order of definition.

    A variant of an earlier release is not stale while another one of the scenario replays what is installed now.

    Args:
        scenarios: whose variants are looked at.
        source_of: tells what is installed of a function of a package.
    """
    out = []
    for scenario in scenarios:
        functions: dict[tuple[str, str], list[Release]] = {}
        for variant in scenario.variants.values():
            told = variant.replays
            if told is not None:
                release = Release(variant.name, told.version, told.digest)
                functions.setdefault((told.package, told.function), []).append(release)
        for (package, function), releases in functions.items():
            source = source_of(package, function)
            digest = None if source is None else source.digest
            same = [r.variant for r in releases if r.digest and r.digest == digest]
            out.append(
                Replayed(
                    scenario=scenario.name,
                    package=package,
                    function=function,
                    state=_state(source, releases, same),
                    version=None if source is None else source.version,
                    digest=digest,
                    unread="" if source is None else source.unread,
                    same=same,
                    variants=releases,
                )
            )
    return out


def _state(source: Source | None, releases: list[Release], same: list[str]) -> State:
    if source is None:
        return "not installed"
    if source.unread:
        return "cannot be read"
    if source.digest is None:
        return "gone"
    if same:
        return "same"
    return "changed" if any(r.digest for r in releases) else "no digest"
