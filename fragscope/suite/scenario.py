"""How scenarios are written: a function that makes its state, then measures one phase.

    @fragscope.scenario(presets={"small": {"experts": 8}}, variant="list-and-stack")
    def load_experts(case):
        layers = make_layers(case.experts)      # base: not measured
        with case.measure():
            for w in layers:
                w.rebind(shuffle(w))

    @load_experts.variant("in-place", role="proposed")
    def _(case): ...

The code says ``device="cuda"`` as it would on a GPU. Nothing that the function makes outlives it, so lifetimes are the
program's own.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import math
import operator
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, get_args, overload

from fragscope.errors import UsageError, printable
from fragscope.record.device_memory import DeviceMemory, How, check_request
from fragscope.results import Outcome, Role
from fragscope.suite.expect import Declared, Expect, Replays, declared
from fragscope.suite.installed import Installed

if TYPE_CHECKING:
    import torch

Value = int | float | str | bool
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,79}")
_TEXT_LIMIT = 200


class Recorder(Protocol):
    """What ``case.measure()`` marks its phase on."""

    def begin_phase(self, name: str) -> None:
        """The measured phase begins."""

    def end_phase(self) -> None:
        """The measured phase is over."""

    def take_device_memory(self, size: int, how: How) -> DeviceMemory:
        """Take device memory past the caching allocator; raises ``torch.OutOfMemoryError`` where it lacks."""

    def kernel(self, what: str, reads: Sequence[torch.Tensor], writes: Sequence[torch.Tensor], stream: Any) -> None:
        """A kernel that torch does not see touches tensors."""


class EndCase(Exception):  # noqa: N818 - not an error
    """Raised by ``case.end``: the case is over, and the scenario itself says how it ended.

    Attributes:
        missing: bytes that something of a fixed size lacked; None where that is not what happened.
    """

    def __init__(self, outcome: Outcome, message: str, missing: int | None = None) -> None:
        super().__init__(message)
        self.outcome: Outcome = outcome
        self.missing = missing


class Case:
    """One scenario × preset × variant, as its function sees it.

    Preset values and parameters are attributes: ``case.experts``, ``case.layers``.

    Attributes:
        scenario, preset, variant: names.
        values: all preset values and parameters by name.
        device: the device to name in code, ``"cuda"`` on the virtual device too.
    """

    def __init__(
        self, scenario: str, preset: str, variant: str, values: Mapping[str, Value], recorder: Recorder
    ) -> None:
        self.scenario = scenario
        self.preset = preset
        self.variant = variant
        self.values = dict(values)
        self.device = "cuda"
        self.measured = False
        self._recorder = recorder

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["values"][name]
        except KeyError:
            known = ", ".join(sorted(self.__dict__.get("values", ()))) or "none"
            raise AttributeError(f"case has no value {name!r}; preset and parameters give: {known}") from None

    @contextlib.contextmanager
    def measure(self) -> Iterator[None]:
        """Mark the measured phase; exactly one per case.

        Garbage is collected before it and left alone during it, so that cyclic garbage made inside stays allocated, the
        same on every device.
        """
        if self.measured:
            raise UsageError(f"{self.scenario}/{self.variant}: case.measure() is entered twice; a case has one phase")
        self.measured = True
        gc.collect()
        was_enabled = gc.isenabled()
        gc.disable()
        self._recorder.begin_phase("measure")
        try:
            yield
        finally:
            self._recorder.end_phase()
            if was_enabled:
                gc.enable()

    def device_memory(self, size: int, how: How = "cuMemCreate") -> DeviceMemory:
        """Take device memory past the caching allocator, as communication libraries and raw kernels do.

        On the virtual device it is entered in the books, on a GPU it is really taken. It leaves less for PyTorch,
        counts in ``peak.raw`` and ``peak.hbm`` of the results, and is held until ``free()``.

        Args:
            size: bytes.
            how: ``"cuMemCreate"``, rounded up to the granularity the driver recommends (2 MiB), or ``"cudaMalloc"``.
                Both take whole pages of 2 MiB of the card; that cards let several small ``cudaMalloc`` share a page is
                not modelled, so that what they take is an upper bound.

        Raises:
            UsageError: the arguments are no request.
            torch.OutOfMemoryError: the driver has too little; unlike PyTorch's own requests this one does not make the
                allocator give back what it caches.
            NotMeasuredError: on a GPU, cuda-bindings is not installed.
        """
        check_request(size, how)
        return self._recorder.take_device_memory(size, how)

    def kernel(
        self,
        what: str,
        *,
        reads: Sequence[torch.Tensor] = (),
        writes: Sequence[torch.Tensor] = (),
        stream: Any = None,
    ) -> None:
        """Say which tensors a kernel outside torch reads and writes, and on which stream it runs.

        The virtual device holds it against the work of other streams. On a GPU nothing happens.

        Args:
            what: its name in messages.
            reads: tensors it only reads.
            writes: tensors it writes, or reads and writes.
            stream: a ``torch.cuda.Stream``; None is the legacy default stream, on which ``kernel<<<grid, block>>>``
                and ``cudaMemcpy`` run.

        Raises:
            UsageError: a tensor is not on the card.
        """
        self._recorder.kernel(what, reads, writes, stream)

    def skip(self, reason: str) -> NoReturn:
        """End the case as skipped: it cannot run here."""
        self.end("skipped", reason)

    def overflow(self, missing: int, message: str) -> NoReturn:
        """End the case: something of a fixed size is too small by ``missing`` bytes.

        Raises:
            UsageError: ``missing`` is no positive whole number.
        """
        try:
            count = operator.index(missing)
        except TypeError:
            count = 0
        if not 0 < count < 2**63:
            raise UsageError(f"{self.scenario}/{self.variant}: case.overflow: {missing!r} is no number of bytes")
        raise EndCase("overflow", message, count)

    def end(self, outcome: Outcome, message: str) -> NoReturn:
        """End the case with an outcome that only the scenario can see, such as ``timeout`` or ``wrong``.

        Raises:
            UsageError: no such outcome, or ``ok``, which a case reaches by coming to its end.
        """
        if outcome not in get_args(Outcome) or outcome == "ok":
            known = ", ".join(o for o in get_args(Outcome) if o != "ok")
            raise UsageError(f"{self.scenario}/{self.variant}: case.end: outcome {outcome!r} is none of {known}")
        raise EndCase(outcome, message)


Body = Callable[[Case], None]
Outputs = Callable[[str, str], "Sequence[torch.Tensor]"]
Reference = Callable[[str], "Sequence[torch.Tensor]"]


@dataclass(frozen=True, slots=True)
class Variant:
    """One implementation in a scenario.

    Attributes:
        expect: declared outcomes; ``ok`` in every cell that none of them is about.
        replays: whose code it replays; None for a proposal, and where nobody said.
        installed: the code of a package that it runs as it is; None where it brings its own.
    """

    name: str
    role: Role
    body: Body
    expect: tuple[Expect, ...] = ()
    doc: str = ""
    replays: Replays | None = None
    installed: Installed | None = None

    def expected(
        self, preset: str, conf: str, torch: str, card: str, device: str, values: Mapping[str, Value]
    ) -> Outcome:
        """The declared outcome of one cell."""
        for rule in self.expect:
            if rule.applies(preset, conf, torch, card, device, values):
                return rule.outcome
        return "ok"


@dataclass(slots=True)
class Scenario:
    """A named set of variants that do the same work on the same presets.

    Attributes:
        presets: values by name, for each real model or size.
        params: parameter defaults; a tuple lists the choices, its first is the default.
        source: where the replayed code comes from.
        file: the file that defines it.
    """

    name: str
    presets: dict[str, dict[str, Value]]
    params: dict[str, Value | tuple[Value, ...]]
    source: str
    doc: str
    file: Path
    variants: dict[str, Variant] = field(default_factory=dict)
    outputs: Outputs | None = None
    expected: Reference | None = None
    tolerance: tuple[float, float] | None = None

    def variant(
        self, name: str, *, role: Role, expect: Declared = "ok", replays: Replays | None = None
    ) -> Callable[[Body], Body]:
        """Add an implementation; the decorated function is its body.

        Args:
            name: unique within the scenario.
            role: what it is to the others.
            expect: declared outcome; see ``Declared``.
            replays: whose code it replays.
        """

        def add(body: Body) -> Body:
            self.add(name, role, body, expect, replays=replays)
            return body

        return add

    def installed(self, name: str, code: Installed, *, expect: Declared = "ok") -> Callable[[Body], Body]:
        """Add a variant that runs a package's own code, where the package is installed; elsewhere it is left out.

        Args:
            name: unique within the scenario.
            code: what the decorated function runs; it gets it from ``code.load()``.
            expect: declared outcome; see ``Declared``.
        """

        def add(body: Body) -> Body:
            self.add(name, "installed", body, expect, installed=code)
            return body

        return add

    def add(
        self,
        name: str,
        role: Role,
        body: Body,
        expect: Declared = "ok",
        *,
        replays: Replays | None = None,
        installed: Installed | None = None,
    ) -> None:
        """Add an implementation."""
        _check_name("variant", name)
        if name in self.variants:
            raise UsageError(f"scenario {self.name!r}: variant {name!r} is defined twice")
        if role not in get_args(Role):
            raise UsageError(f"scenario {self.name!r}: role {role!r} is none of {', '.join(get_args(Role))}")
        if role == "installed" and installed is None:
            raise UsageError(f"scenario {self.name!r}: variant {name!r}: add installed code with .installed(...)")
        rules = declared(f"scenario {self.name!r}: variant {name!r}", expect)
        self.variants[name] = Variant(name, role, body, rules, inspect.getdoc(body) or "", replays, installed)

    @overload
    def numeric(self, outputs: Outputs) -> Outputs: ...

    @overload
    def numeric(self, *, tolerance: tuple[float, float]) -> Callable[[Outputs], Outputs]: ...

    def numeric(
        self, outputs: Outputs | None = None, *, tolerance: tuple[float, float] | None = None
    ) -> Outputs | Callable[[Outputs], Outputs]:
        """Decorator: ``outputs(variant, device)`` computes a variant's results on real data at a small size.

        Every variant's results must equal those of ``reference``, or else of the first variant, bit for bit; with
        ``tolerance=(relative, absolute)``, as ``torch.testing.assert_close`` has it. A variant that is declared
        ``wrong`` must differ.
        """

        def add(made: Outputs) -> Outputs:
            self.outputs, self.tolerance = made, tolerance
            return made

        return add if outputs is None else add(outputs)

    def reference(self, expected: Reference) -> Reference:
        """Decorator: ``expected(device)`` computes the right results independently of all variants."""
        self.expected = expected
        return expected

    def values_for(self, preset: str, overrides: Mapping[str, Value]) -> dict[str, Value]:
        """Parameters and preset values of one case, after ``--set``."""
        values: dict[str, Value] = {k: v[0] if isinstance(v, tuple) else v for k, v in self.params.items()}
        values.update(self.presets[preset])
        values.update({k: v for k, v in overrides.items() if k in values})
        return values

    def parse_override(self, name: str, text: str) -> Value | None:
        """The value of ``--set name=text`` for this scenario; None if it has no such parameter.

        Raises:
            UsageError: the text does not fit the parameter.
        """
        choices = self.params.get(name)
        if isinstance(choices, tuple):
            for choice in choices:
                if text == str(choice):
                    return choice
            raise UsageError(f"--set {name}={text}: {self.name} takes one of {', '.join(map(str, choices))}")
        samples = [p[name] for p in self.presets.values() if name in p]
        if choices is not None:
            samples.append(choices)
        if not samples:
            return None
        sample = samples[0]
        try:
            if isinstance(sample, bool):
                return {"true": True, "false": False, "1": True, "0": False}[text.lower()]
            value: Value = type(sample)(text)
        except (KeyError, ValueError):
            raise UsageError(f"--set {name}={text}: {self.name} takes a {type(sample).__name__} here") from None
        _check_value(f"--set {name}", value)
        return value


class Registry:
    """Scenarios defined by the file being loaded."""

    def __init__(self) -> None:
        self.found: list[Scenario] = []


_registries: list[Registry] = []


@contextlib.contextmanager
def collecting() -> Iterator[Registry]:
    """Collect the scenarios that are defined meanwhile."""
    registry = Registry()
    _registries.append(registry)
    try:
        yield registry
    finally:
        _registries.pop()


def scenario(
    name: str | None = None,
    *,
    presets: Mapping[str, Mapping[str, Value]],
    variant: str = "original",
    role: Role = "original",
    params: Mapping[str, Value | tuple[Value, ...]] | None = None,
    source: str = "",
    expect: Declared = "ok",
    replays: Replays | None = None,
) -> Callable[[Body], Scenario]:
    """Decorator: a scenario whose first variant is the decorated function.

    Args:
        name: defaults to the function's name with dashes.
        presets: values by name, for each real model or size; they become attributes of ``case``.
        variant: name of the first variant.
        role: role of the first variant.
        expect: declared outcome of the first variant; see ``Declared``.
        replays: whose code the first variant replays.
        params: parameters with defaults that ``--set`` changes; a tuple lists choices, the first is the default.
        source: where the replayed code comes from.

    Raises:
        UsageError: a name is malformed, or there is no preset.
    """

    def define(body: Body) -> Scenario:
        title = name or body.__name__.strip("_").replace("_", "-")
        _check_name("scenario", title)
        if not presets:
            raise UsageError(f"scenario {title!r}: it has no preset")
        for preset, values in presets.items():
            _check_name("preset", preset)
            _check_values(f"scenario {title!r}: preset {preset!r}", values)
        _check_values(f"scenario {title!r}: params", params or {}, choices=True)
        made = Scenario(
            name=title,
            presets={k: dict(v) for k, v in presets.items()},
            params=dict(params or {}),
            source=source,
            doc=inspect.getdoc(body) or "",
            file=_defining_file(body),
        )
        made.add(variant, role, body, expect, replays=replays)
        if _registries:
            _registries[-1].found.append(made)
        return made

    return define


def _check_name(what: str, name: str) -> None:
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{what} name {name!r}: use lower-case letters, digits, '.', '_' and '-', at most 80, "
            "a letter or digit first"
        )


_TAKEN = frozenset(
    {
        "scenario", "preset", "variant", "values", "device", "device_memory", "kernel", "measured", "measure",
        "skip", "end", "overflow",
    }
)  # fmt: skip
"""What ``case`` has besides its values."""


def _check_values(where: str, values: Mapping[str, Value | tuple[Value, ...]], *, choices: bool = False) -> None:
    for name, value in values.items():
        if not name.isidentifier() or name.startswith("_") or name in _TAKEN:
            taken = " (case has one of its own)" if name in _TAKEN else ""
            raise UsageError(f"{where}: {name!r} cannot name a value{taken}; values become attributes of case")
        if choices and isinstance(value, tuple):
            if not value:
                raise UsageError(f"{where}: {name} has no choices")
            for choice in value:
                _check_value(f"{where}: {name}", choice)
        else:
            _check_value(f"{where}: {name}", value)


def _check_value(where: str, value: object) -> None:
    """A value stands in ids, digests and results.json, so it must be one that they can hold."""
    if not isinstance(value, int | float | str | bool):
        raise UsageError(f"{where} is of type {type(value).__name__}; use int, float, str or bool")
    if isinstance(value, str) and (not value.isprintable() or len(value) > _TEXT_LIMIT):
        shown = printable(value, 40)
        raise UsageError(f"{where}: {shown!r} is not one printable line of at most {_TEXT_LIMIT} characters")
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"{where}: {value} is not a finite number")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise UsageError(f"{where}: an integer of {value.bit_length()} bits does not fit 64")


def _defining_file(body: Body) -> Path:
    """The file whose import defines a scenario.

    Not the one that holds the body's code: a decorator such as ``torch.no_grad()`` wraps it in a function of its own.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "<module>":
            return Path(frame.f_code.co_filename).resolve()
        frame = frame.f_back  # type: ignore[assignment]
    return Path(inspect.getfile(body)).resolve()
