"""What a variant declares about itself: how it should end in which cell of a run, and whose code it replays."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, get_args

from fragscope.errors import UsageError, printable
from fragscope.results import Outcome


@dataclass(frozen=True, slots=True)
class Expect:
    """An outcome, and the cells of a run in which it is the right one.

    Attributes:
        outcome: how the variant should end there.
        preset, conf, torch, card, device: globs that a cell's own values must match; ``conf=""`` is no conf, and
            ``torch`` is matched as it was named, such as ``2.11*``.
        when: of the case's preset values and parameters by name, which ``--set`` and ``--sweep`` change; None means
            always.
    """

    outcome: Outcome
    preset: str = "*"
    conf: str = "*"
    torch: str = "*"
    card: str = "*"
    device: str = "*"
    when: Callable[[Mapping[str, Any]], bool] | None = None

    def applies(self, preset: str, conf: str, torch: str, card: str, device: str, values: Mapping[str, Any]) -> bool:
        """Whether a cell is among those meant."""
        cell = ((preset, self.preset), (conf, self.conf), (torch, self.torch), (card, self.card), (device, self.device))
        # A conf may hold brackets, which a glob takes for a set of characters.
        if not all(value == glob or fnmatchcase(value, glob) for value, glob in cell):
            return False
        try:
            return self.when is None or bool(self.when(values))
        except Exception as e:
            said = printable(f"{type(e).__name__}: {e}", 200)
            raise UsageError(f"Expect({self.outcome!r}): when fails for preset {preset!r}: {said}") from e


Declared = Outcome | Expect | Sequence[Expect]
"""How ``expect=`` is written: an outcome for every cell, or one ``Expect`` or several of which the first that applies
counts. Where none applies, ``ok`` is expected."""


def declared(where: str, expect: object) -> tuple[Expect, ...]:
    """What ``expect=`` means, each outcome a known one.

    Raises:
        UsageError: it is neither an outcome nor made of ``Expect``.
    """
    if isinstance(expect, str):
        rules: tuple[object, ...] = () if expect == "ok" else (Expect(expect),)  # type: ignore[arg-type]
    elif isinstance(expect, Expect):
        rules = (expect,)
    elif isinstance(expect, Sequence):
        rules = tuple(expect)
    else:
        rules = (expect,)
    out = []
    for rule in rules:
        if not isinstance(rule, Expect):
            raise UsageError(
                f"{where}: expect holds a {type(rule).__name__}; write an outcome, or fragscope.Expect(...)"
            )
        if rule.outcome not in get_args(Outcome):
            raise UsageError(f"{where}: outcome {rule.outcome!r} is none of {', '.join(get_args(Outcome))}")
        out.append(rule)
    return tuple(out)


_FUNCTION = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*(:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*)?", re.ASCII)


def check_code(where: str, function: str, **words: str) -> None:
    """See that a package's code is named as it should be.

    Raises:
        UsageError: one of the words is none, or the function is not written ``module:function``.
    """
    for word, value in words.items():
        if not value or not value.isprintable() or any(c.isspace() for c in value):
            raise UsageError(f"{where}: {word} {printable(repr(value), 60)} is not one word")
    if not _FUNCTION.fullmatch(function):
        raise UsageError(f"{where}: function {printable(repr(function), 100)}: write module:function")


@dataclass(frozen=True, slots=True)
class Replays:
    """Whose code a variant replays.

    Attributes:
        package: the distribution, such as ``"vllm"``.
        version: its release.
        function: ``module:function`` or ``module:Class.method``.
        digest: of the function's source in that release, as ``fragscope upstream --digest`` prints it; ``""`` where
            it was not taken.
    """

    package: str
    version: str
    function: str
    digest: str = ""

    def __post_init__(self) -> None:
        check_code("Replays", self.function, package=self.package, version=self.version)

    def __str__(self) -> str:
        return f"{self.package} {self.version} {self.function}"
