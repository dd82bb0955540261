"""What a repository and a command line set for all measured tests.

The nearest wins: command line, pytest's ini options, ``[tool.fragscope.pytest]`` of pyproject.toml.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fragscope.allocator.own_cards import use_cards_of
from fragscope.config import load_config
from fragscope.errors import UsageError, printable
from fragscope.testing.marker import Bound, read_bounds


@dataclass(frozen=True, slots=True)
class Options:
    """Settings of a pytest session.

    Attributes:
        card: name of the virtual card, None for the default one.
        torch: the release whose rules the virtual card follows, None for the installed one.
        require: a marked test that was not measured fails.
        defaults: limits of every measured test.
    """

    card: str | None
    torch: str | None
    require: bool
    defaults: dict[str, Bound]


def read_options(
    root: Path, *, card: str | None, require: bool | None, ini_file: str, ini_budget: Sequence[str]
) -> Options:
    """The settings of a session.

    Args:
        root: pytest's root folder; pyproject.toml is looked for there and above.
        card: of the command line or ini file.
        require: likewise, None where neither says.
        ini_file: what to call pytest's configuration file in messages.
        ini_budget: lines such as ``"peak_reserved = 8 GiB"``.

    Raises:
        UsageError: an unknown metric, or a value that is no byte count; names the file.
        InputFileError: pyproject.toml cannot be read.
    """
    config = load_config(root)
    if config.own_cards is not None:
        use_cards_of(config.own_cards)
    project = (
        f"{printable('pyproject.toml' if config.root == root else str(config.root))}: [tool.fragscope.pytest.budget]"
    )
    stated = read_bounds(config.pytest.budget, project, project)
    place = f"{printable(ini_file)}: fragscope_budget"
    for line in ini_budget:
        metric, is_pair, value = line.partition("=")
        if not is_pair:
            raise UsageError(f"{place}: {printable(repr(line), 80)} is no limit; write such as peak_reserved = 8 GiB")
        stated.update(read_bounds({metric.strip(): value.strip()}, place, place))
    return Options(
        card=card or config.pytest.card or config.card,
        torch=config.torch,
        require=bool(config.pytest.require) if require is None else require,
        defaults={metric: bound for metric, bound in stated.items() if bound is not None},
    )
