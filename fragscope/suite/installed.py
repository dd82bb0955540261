"""Variants that run the code of an installed package as it is, instead of a replay of it."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fragscope.results import InstalledCode, NotApplicable
from fragscope.suite.expect import check_code
from fragscope.suite.upstream import installed_source

if TYPE_CHECKING:
    from fragscope.suite.discover import Selection


@dataclass(frozen=True, slots=True)
class Installed:
    """Code of a package that a variant runs unmodified, where the package is installed.

        CACHE = fragscope.Installed("transformers", "transformers.cache_utils:DynamicCache")

        @growth.installed("dynamic", CACHE)
        def _(case):
            grow(case, CACHE.load()())

    Attributes:
        package: the distribution, such as ``"transformers"``.
        function: ``module:function``, ``module:Class`` or ``module:Class.method``.
        first: modules to import before it, for packages whose modules import each other in a circle.
    """

    package: str
    function: str
    first: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_code("Installed", self.function, package=self.package)

    def load(self) -> Any:
        """The function or class itself, imported.

        It was imported before the variant runs, outside the virtual device; here it is only looked up.

        Raises:
            ImportError: something that its module imports is missing, or it is not there.
        """
        for module in self.first:
            importlib.import_module(module)
        module, _, name = self.function.partition(":")
        found: Any = importlib.import_module(module)
        for part in filter(None, name.split(".")):
            try:
                found = getattr(found, part)
            except AttributeError:
                raise ImportError(f"{module} has no {name}") from None
        return found

    @property
    def importable(self) -> bool:
        """Whether ``load`` succeeds, found out by trying."""
        try:
            self.load()
        except Exception:
            return False
        return True

    def code(self) -> InstalledCode | None:
        """Package, release, function and the digest of its source here; None where the package is not installed."""
        source = installed_source(self.package, self.function)
        if source is None:
            return None
        return InstalledCode(self.package, source.version, self.function, source.digest or "")


def applicable(selections: Sequence[Selection]) -> tuple[list[Selection], list[NotApplicable]]:
    """Which of the selected cases can run here, and which variants cannot since their package is not installed."""
    missing: dict[str, str] = {}
    for selection in selections:
        code = selection.scenario.variants[selection.variant].installed
        if selection.of not in missing:
            absent = code is not None and code.code() is None
            missing[selection.of] = f"{code.package} is not installed" if code is not None and absent else ""
    kept = [s for s in selections if not missing[s.of]]
    return kept, [NotApplicable("", "", reason, variant=name) for name, reason in missing.items() if reason]
