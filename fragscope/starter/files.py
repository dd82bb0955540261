"""What the files say: a scenario that runs as it is, budgets that it meets, a workflow that holds it to them."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path, PurePosixPath

from fragscope.errors import UsageError, printable
from fragscope.starter.loader import Loader, Parameter
from fragscope.starter.repository import Repository

DIMENSION = 1024
"""What a tensor's sizes are where nobody named a model. Kernels of vLLM, SGLang and FlashInfer want multiples of their
blocks and tiles (64, 128), and packed weights and scales hold up to 8 values or 4 blocks in one: 1024 is a multiple of
all."""
COUNT = 16
"""What is counted off in loops, such as layers and experts: small enough for a scenario that ends in a moment."""
BLOCK = 128
"""What sizes of blocks and groups are: the usual one of quantized weights."""
_COUNTS = re.compile(
    r"^n_|(^|_)(num|layers?|experts?|heads?|blocks|groups|ranks?|world|tp|ep|dp|pp|topk|top|count|batch|e|l|steps?|times"
    r"|copies|chunks?|splits?|shards?|stages?|bits?)(_|$)",
    re.IGNORECASE,
)
_BLOCKS = re.compile(r"(^|_)(block|group|tile)(_|$)", re.IGNORECASE)
_LIMIT = "79 GiB"  # what a card of 80 GB has free, allocator/cards.py
_TAKEN = {
    "device",
    "values",
    "scenario",
    "preset",
    "variant",
    "kernel",
    "measure",
    "measured",
    "skip",
    "end",
    "overflow",
}


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be written.

    Attributes:
        files: content by path relative to the root, in the order they are told.
        roles: what each is for, a few words for people.
        table: lines of [tool.fragscope] for pyproject.toml; empty where there is one already.
        run: what ``fragscope run`` is called with for these scenarios, ``""`` once the table is there.
        left_to_do: what was not written, or only in part, and what to do about it, for people.
    """

    files: dict[str, str]
    roles: dict[str, str]
    table: str
    run: str
    left_to_do: tuple[str, ...]


def plan_files(
    repository: Repository,
    loader: Loader | None,
    *,
    github: bool,
    action: str | None = None,
    adds_table: bool = False,
) -> Plan:
    """The files for a repository.

    Args:
        repository: what it is made of.
        loader: what the scenario runs; None for a stand-in that is to be replaced.
        github: write a workflow.
        adds_table: the table that is missing is written, too; a comparison of commits needs it.
        action: ``OWNER/REPOSITORY@REF`` of fragscope's action, for the workflow; None for this release's with an owner
            to fill in, since nothing here knows who publishes it.

    Raises:
        UsageError: a workflow where GitHub would not look for one, or a configured place outside the repository.
    """
    config, root = repository.config, repository.root
    if github and not repository.git:
        raise UsageError(
            f"--github: there is no .git in {printable(str(root), 200)}, and GitHub runs only workflows at a "
            "repository's root; call fragscope init there, or leave the option out"
        )
    folder = _scenario_folder(repository)
    subject = loader.function if loader is not None else (repository.packages[0] if repository.packages else "loader")
    scenario = str(PurePosixPath(folder) / f"scenario_{_file_name(subject)}.py")
    budgets = _inside(root, config.budgets) if config.budgets is not None else "budgets.toml"
    name = _scenario_name(subject)
    files = {
        scenario: _scenario(repository, loader, name, scenario),
        budgets: _budgets(name),
    }
    roles = {
        scenario: f"runs {loader.module}:{loader.function}"
        if loader is not None
        else "a stand-in to put your loader in",
        budgets: "what it may take",
    }
    places = (_relative(root, path) for path in config.scenarios)
    configured = any(place is not None and PurePosixPath(scenario).is_relative_to(place) for place in places)
    left_to_do: list[str] = []
    if loader is not None and loader.parameters:
        left_to_do.append(
            f"put a real model's shapes in PRESETS of {scenario}: those there are made up, and a loader may fail on "
            "them"
        )
    if github:
        workflow = ".github/workflows/fragscope.yml"
        compares = configured or (adds_table and not repository.has_table)
        files[workflow] = _workflow(repository, action, _COMPARED if compares else _held(folder, budgets))
        roles[workflow] = "both on every pull request"
        if action is None:
            left_to_do.append(f"replace OWNER in {workflow} by whoever publishes the fragscope that you use")
    elif repository.github:
        left_to_do.append("no workflow: --no-github")
    elif repository.git:
        left_to_do.append("no workflow: nothing says that this lies on GitHub (--github writes one)")
    else:
        left_to_do.append("no workflow: this is not the root of a git repository")
    table = (
        ""
        if repository.has_table
        else f"[tool.fragscope]\nscenarios = [{_quoted(folder)}]\nbudgets = {_quoted(budgets)}\n"
    )
    if repository.has_table and not configured:
        left_to_do.append(
            f"add {_quoted(scenario)} to scenarios of [tool.fragscope] in pyproject.toml: nothing there holds it"
        )
    return Plan(files, roles, table, "" if configured else folder, tuple(left_to_do))


def _scenario_folder(repository: Repository) -> str:
    """Where scenarios stand: the folder that is configured, beside the tests, or a folder of their own."""
    for path in repository.config.scenarios:
        if path.suffix != ".py":
            return _inside(repository.root, path)
    return repository.tests or "scenarios"


def _inside(root: Path, path: Path) -> str:
    """A configured path relative to the root.

    Raises:
        UsageError: it lies elsewhere, or is not plain text.
    """
    relative = _relative(root, path)
    if relative is None:
        raise UsageError(f"{printable(str(path), 200)}, named in [tool.fragscope], lies outside the repository")
    if not relative.isprintable() or relative in ("", "."):
        raise UsageError(f"{printable(str(path), 200)}, named in [tool.fragscope], is no place for a file")
    return relative


def _relative(root: Path, path: Path) -> str | None:
    """A path relative to the root; None where it lies elsewhere."""
    try:
        return path.resolve().relative_to(root).as_posix()
    except (ValueError, OSError):
        return None


def _file_name(subject: str) -> str:
    """What a file and, with an ending, a function may be called."""
    name = re.sub(r"[^a-z0-9_]+", "_", subject.lower()).strip("_")[:60] or "loader"
    return f"load_{name}" if name[0].isdigit() else name


def _scenario_name(subject: str) -> str:
    return _file_name(subject).replace("_", "-")


def _quoted(text: str) -> str:
    """A string as TOML, YAML and JSON have it."""
    return json.dumps(text)


# --- the scenario -------------------------------------------------------------------------------------------------


def _scenario(repository: Repository, loader: Loader | None, name: str, file: str) -> str:
    up = len(PurePosixPath(file).parts) - 1
    lines = [f'"""What loading costs in GPU memory: `fragscope run {file}` needs no GPU."""', ""]
    imports = ["import fragscope"]
    uses_torch = loader is None or any(p.kind in ("tensor", "tensors", "module", "dtype") for p in loader.parameters)
    if repository.source and loader is not None:
        lines += ["import sys", "from pathlib import Path", ""]
        path = f'Path(__file__).parents[{up}] / "{repository.source}"'
        imports = [f"sys.path.insert(0, str({path}))  # not needed where the package is installed", "", *imports]
    if uses_torch:
        imports.append("import torch")
    if loader is not None:
        called = _free(loader.function)
        alias = "" if called == loader.function else f" as {called}"
        imports.append(f"from {loader.module} import {loader.function}{alias}")
    lines += [*imports, ""]
    lines += [_presets(loader), ""] if loader is not None else [_STAND_IN_PRESETS, ""]
    lines += [
        "",
        f'@fragscope.scenario("{name}", presets=PRESETS, variant="as-it-is")',
        f"def {_file_name(name)}_memory(case):",
    ]
    lines += _body(loader) if loader is not None else _STAND_IN.splitlines()
    return "\n".join(lines) + "\n"


_STAND_IN_PRESETS = """\
# The shapes of one real model; each becomes an attribute of `case`. Full size costs nothing here.
PRESETS = {"example": {"experts": 64, "rows": 2048, "columns": 2048}}"""

_STAND_IN = """\
    # What is there before: not measured. Code says "cuda" as it does on a card.
    weights = [
        torch.empty(case.rows, case.columns, dtype=torch.bfloat16, device="cuda") for _ in range(case.experts)
    ]
    with case.measure():
        # Put the call of your loader here. This one makes a copy of every expert, and stacks the copies.
        # What is made lives until the end, as in your program.
        stacked = torch.stack([weight.t().contiguous() for weight in weights])  # noqa: F841"""


def _presets(loader: Loader) -> str:
    values: dict[str, int] = {}
    for p in loader.parameters:
        if p.kind == "size":
            values[_value_name(p)] = _made_up(p.name)
        elif p.kind in ("tensor", "tensors", "module"):
            values |= {"rows": DIMENSION, "columns": DIMENSION}
    if not values:
        values = {"rows": DIMENSION, "columns": DIMENSION}
    pairs = ", ".join(f'"{name}": {value}' for name, value in values.items())
    return (
        "# Made up: put the shapes of one real model here. Full size costs nothing, tensors have no data.\n"
        "# A loader that fails on a shape or a size wants others than these, or than the scenario makes of them.\n"
        f'PRESETS = {{"example": {{{pairs}}}}}'
    )


def _made_up(name: str) -> int:
    """A size for a parameter of this name that few loaders refuse."""
    if _COUNTS.search(name):
        return COUNT
    return BLOCK if _BLOCKS.search(name) else DIMENSION


def _value_name(p: Parameter) -> str:
    """What a parameter is called as an attribute of ``case``."""
    name = p.name.strip("_") or "size"
    return f"{name}_" if name in _TAKEN or name in ("rows", "columns") else name


def _free(name: str, *others: str) -> str:
    """A name that the scenario does not use otherwise."""
    while name in ("case", "fragscope", "loaded", "Path", "PRESETS", "sys", "torch", *others):
        name += "_"
    return name


_TENSOR = 'torch.empty(case.rows, case.columns, dtype=torch.bfloat16, device="cuda")'


def _body(loader: Loader) -> list[str]:
    arguments, before, called = [], [], _free(loader.function)
    for p in loader.parameters:
        made = {
            "tensor": _TENSOR,
            "tensors": f"[{_TENSOR} for _ in range(4)]",
            "module": 'torch.nn.Linear(case.columns, case.rows, bias=False, dtype=torch.bfloat16, device="cuda")',
            "size": f"case.{_value_name(p)}",
            "number": "1.0",
            "flag": "False",
            "text": '""',
            "device": '"cuda"',
            "dtype": "torch.bfloat16",
            "other": "None",
        }[p.kind]
        variable = _free(p.name, called)
        if p.kind in ("tensor", "tensors", "module"):
            before.append(f"    {variable} = {made}")
            made = variable
        elif p.kind == "other":
            before.append(f"    {variable} = None  # to be made: {printable(p.annotation, 60)}")
            made = variable
        arguments.append(f"{p.name}={made}" if p.by_name else made)
    call = f"{called}({', '.join(arguments)})"
    return [
        *(["    # What is there before: not measured. Shapes are made up, too."] if before else []),
        *before,
        "    with case.measure():",
        "        # What is returned lives until the end, as in your program.",
        f"        loaded = {call}  # noqa: F841",
    ]


# --- budgets and workflow -----------------------------------------------------------------------------------------


def _budgets(name: str) -> str:
    return f"""\
# What each case may take: a glob over scenario/preset/variant, and limits. `fragscope gate` ends with 3 where one is
# exceeded. The table that `fragscope run` prints has the figures of today.

[budget."{name}/*/*"]
peak_reserved = "{_LIMIT}"  # what a card of 80 GB has free; put in what your model leaves
# transient = "64 MiB"      # needed on the way only: what a fix of a loader makes smaller
# retained = 0              # more at the end than at the beginning
"""


_COMPARED = """\
          # What the change costs, line by line, and whether that is within the budgets: scenarios and budgets are those
          # of [tool.fragscope]. HEAD is the pull request merged into its base, and HEAD^1 that base.
          against: HEAD^1
          # warn-only: true
"""


def _held(folder: str, budgets: str) -> str:
    """What the action is given where no configuration says what both commits of a comparison are to run."""
    return f"""\
          scenarios: {_quoted(folder)}
          budgets: {_quoted(budgets)}
          # Instead of these two, once [tool.fragscope] of pyproject.toml has them: what the change costs, line by line.
          # HEAD is the pull request merged into its base, and HEAD^1 that base.
          # against: HEAD^1
          # warn-only: true
"""


def _workflow(repository: Repository, action: str | None, given: str) -> str:
    used = action or f"OWNER/fragscope@v{version('fragscope')} # replace OWNER by whoever publishes the release"
    installed = repository.pyproject is not None or (repository.root / "setup.py").is_file()
    install = ""  # the action installs torch and fragscope itself
    if installed and repository.packages:
        install = (
            "      # A CPU build first, or a project that needs torch gets one for CUDA.\n"
            "      - run: pip install torch --index-url https://download.pytorch.org/whl/cpu\n"
            "      - run: pip install -e .\n"
        )
    return f"""\
# GPU memory of this repository's own code, on a runner without a GPU.
name: GPU memory
on: pull_request
permissions:
  contents: read
jobs:
  fragscope:
    runs-on: ubuntu-latest
    steps:
      - uses: actions/checkout@v4
        with:
          fetch-depth: 2 # with HEAD^1, for against
          persist-credentials: false
      - uses: actions/setup-python@v5
        with:
          python-version: "3.12"
{install}      - uses: {used}
        with:
{given}"""
