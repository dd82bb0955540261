"""Cases, their results, and the file that holds them: results.json."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from fragscope.errors import InputFileError, printable
from fragscope.trace.containers import first_bytes, write_atomically
from fragscope.units import MIB

SCHEMA_VERSION = 1
_FILE_LIMIT = 512 * MIB

Outcome = Literal["ok", "oom", "overflow", "wrong", "hazard", "crash", "timeout", "unsupported", "skipped"]
CAME_TO_ITS_END: tuple[Outcome, ...] = ("ok", "hazard")
"""Outcomes of programs that did all they were to do; a race between streams does not stop one."""
Role = Literal["original", "fixed", "newest", "proposed", "installed"]
Effect = Literal["none", "bounded", "unknown"]
DeviceKind = Literal["virtual", "cuda"]

# What a file may say: reports divide and draw figures, which ends beyond what a float can hold, and a size below
# nothing would pass every limit.
Size = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
"""Bytes that something takes or has."""
Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
"""How many there are, or which of many it is."""
Difference = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
"""Bytes by which one size is above another; negative where it is below."""
Handle = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
"""What a driver names something by, as a signed number of 64 bits."""
Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e9)]
"""How long something took; 1e9 are 32 years."""


class Peak(msgspec.Struct, frozen=True):
    """Byte counters; see the design's word list for each."""

    requested: Size = 0
    allocated: Size = 0
    active: Size = 0
    reserved: Size = 0
    stranded: Size = 0
    inactive_split: Size = 0
    pool_idle: Size = 0
    raw: Size = 0
    hbm: Size = 0


class AfterEmptyCache(msgspec.Struct, frozen=True):
    """What ``empty_cache()`` would leave at the end of the phase; bytes."""

    reserved: Size = 0


class Calls(msgspec.Struct, frozen=True):
    """Driver calls during the phase."""

    alloc: Count = 0
    free: Count = 0
    sync: Count = 0


class OomRecord(msgspec.Struct, frozen=True):
    """A request that failed: event number in the trace, bytes, stream."""

    event: Count
    requested: Size
    rounded: Size
    stream: Handle


class AssumptionRecord(msgspec.Struct, frozen=True):
    """Something the figures take for granted, in terms a program can read."""

    code: str
    effect: Effect
    events: Count
    detail: str = ""


class VerifyRecord(msgspec.Struct, frozen=True):
    """Comparison of the model with what a card's allocator did, and with PyTorch's own figures of the phase.

    Attributes:
        compared: decisions, blocks at the end and figures that were compared.
        mismatches: how many differ. If any does, the case's figures are the model's and not the card's.
        first: the first difference.
    """

    compared: Count
    mismatches: Count
    first: str | None = None


class PrecheckRecord(msgspec.Struct, frozen=True):
    """What the model said of a case before it was run on a card; bytes.

    Attributes:
        needs: most that it would hold from the driver at once; None where that could not be told.
        free: of the card, beside a CUDA context.
        exact: ``needs`` is all of it, and not a part or an estimate.
        note: why it was run although it was not known to fit, or was known not to; ``""`` where it was known to fit.
    """

    needs: Size | None
    free: Size
    exact: bool
    note: str = ""


class Prediction(msgspec.Struct, frozen=True, kw_only=True):
    """What the virtual device said of a phase before it ran on a card, under that card's rules and memory; bytes.

    Attributes:
        exact: every operator's memory is known, and nothing assumed can change the figures.
    """

    base: Size
    transient: Size
    retained: Difference
    peak: Peak
    end: Peak
    allocs: Count
    exact: bool


class InstalledCode(msgspec.Struct, frozen=True):
    """The code of a package that a variant runs as it is.

    Attributes:
        package: the distribution.
        version: the release that ran; ``"unknown"`` where the package has no metadata.
        function: ``module:function``, ``module:Class`` or ``module:Class.method``.
        digest: of its source, as ``fragscope upstream --digest`` prints it; ``""`` where the source was not found
            or cannot be read.
    """

    package: str
    version: str
    function: str
    digest: str = ""


class LossRecord(msgspec.Struct, frozen=True):
    """Something a recording does not hold."""

    code: str
    detail: str
    events: Count = 0


class EstimatedOp(msgspec.Struct, frozen=True):
    """An operator whose hidden temporaries are not known."""

    op: str
    calls: Count
    where: str = ""


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """One measurement and its outcome. All sizes are bytes; figures are those of the measured phase.

    Attributes:
        id: readable and unique within a run.
        digest: of everything that decides the result except the code measured.
        scenario, preset, variant, role: what was run.
        params: the scenario's parameters and the preset's values by name.
        changed: of these, the ones that were set away from their defaults.
        conf, torch, card, device: what it was decided under; ``torch`` is the release whose rules apply.
        torch_installed: the release that ran the code.
        capacity: bytes that segments could take together.
        outcome: what happened.
        expected_outcome: what the scenario declares should happen.
        missing: bytes that something of a fixed size lacked, where the outcome is ``overflow`` and it could be told.
        replays: whose code the variant replays, as package, release and function.
        installed: the code that the variant ran as it is installed.
        exact: every allocation of the phase has a known size and nothing assumed can change the figures.
        estimated_ops: operators with unknown temporaries.
        any_card: it ran on the virtual device, and neither it nor a library asked what the card is: on others it asks
            for the same.
        base, end_live: allocated bytes when the phase began and ended.
        base_requested: requested bytes when the phase began.
        transient: peak allocated beyond base and end.
        retained: end minus base.
        non_torch_peak: highest sample of what is in use less what PyTorch had reserved then, which can be put off by a
            segment, and below 0 where there is nothing else.
        precheck: what was known of its need before it ran on a card; None on the virtual device, and for a case that
            is declared to run out of memory.
        predicted: what the virtual device said of it beforehand; None on the virtual device, and where it said nothing.
        message: one line about what went wrong.
        seconds: wall time of the recording or replay.
        trace: path of the Trace, relative to the results file.
        sources: SHA-256 of each source file the case ran, by path; what ``--resume`` compares.
    """

    id: str
    digest: str
    scenario: str
    preset: str
    variant: str
    role: Role
    params: dict[str, Any] = {}
    changed: dict[str, Any] = {}
    conf: str = ""
    torch: str
    torch_installed: str
    card: str
    device: DeviceKind
    capacity: Size = 0
    outcome: Outcome
    expected_outcome: Outcome = "ok"
    missing: Size | None = None
    replays: str | None = None
    installed: InstalledCode | None = None
    exact: bool = False
    estimated_ops: list[EstimatedOp] = []
    any_card: bool = False
    base: Size = 0
    end_live: Size = 0
    base_requested: Size = 0
    transient: Size = 0
    retained: Difference = 0
    peak: Peak = Peak()
    end: Peak = Peak()
    after_empty_cache: AfterEmptyCache = AfterEmptyCache()
    non_torch_peak: Difference | None = None
    segments_peak: Count = 0
    allocs: Count = 0
    driver_calls: Calls = Calls()
    ooms: list[OomRecord] = []
    retries: Count = 0
    numeric: dict[str, Any] | None = None
    verify: VerifyRecord | None = None
    precheck: PrecheckRecord | None = None
    predicted: Prediction | None = None
    lost: list[LossRecord] = []
    assumptions: list[AssumptionRecord] = []
    findings: list[dict[str, Any]] = []
    seconds: Seconds = 0.0
    trace: str | None = None
    message: str = ""
    sources: dict[str, str] = {}

    @property
    def measured(self) -> bool:
        """Whether the figures mean anything: the phase ran to its end, or to the OOM that ended it."""
        return self.outcome in ("ok", "oom", "wrong", "hazard", "overflow")

    @property
    def refuted(self) -> bool:
        """Whether the recording shows that the model, and with it the figures, is wrong."""
        return self.verify is not None and self.verify.mismatches > 0

    @property
    def surprises(self) -> dict[str, int]:
        """By how much each figure differs from what the virtual device said; only those that do. Bytes, or a count."""
        said = self.predicted
        if said is None or not self.measured:
            return {}
        pairs = [
            (name, getattr(self, name), getattr(said, name)) for name in ("base", "transient", "retained", "allocs")
        ]
        for which in ("peak", "end"):
            ours, theirs = getattr(self, which), getattr(said, which)
            pairs += [
                (f"{which} {name}", getattr(ours, name), getattr(theirs, name)) for name in Peak.__struct_fields__
            ]
        return {name: measured - predicted for name, measured, predicted in pairs if measured != predicted}

    @property
    def as_expected(self) -> bool:
        """Whether the outcome is the declared one."""
        return self.outcome == self.expected_outcome


class NotApplicable(msgspec.Struct, frozen=True):
    """What was asked for and does not exist here.

    Attributes:
        conf, torch: a conf, and a release that refuses it.
        reason: one line.
        variant: ``scenario/variant`` whose package is not installed; then there is no conf and no release.
    """

    conf: str
    torch: str
    reason: str
    variant: str = ""


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """How a set of cases came to be.

    Attributes:
        started: ISO 8601, UTC.
        seconds: wall time.
        complete: every selected case has a result.
        planned: how many cases were selected.
        versions: fragscope, python, torch and the like.
        command: the command line as it was given.
        card: name to facts about the card, bytes.
        not_applicable: what was asked for and left out.
    """

    started: str
    seconds: Seconds
    complete: bool
    planned: Count
    versions: dict[str, str] = {}
    command: list[str] = []
    cards: dict[str, dict[str, Any]] = {}
    not_applicable: list[NotApplicable] = []


class Results(msgspec.Struct, frozen=True, kw_only=True):
    """The content of results.json."""

    schema_version: Count = SCHEMA_VERSION
    run: Run
    cases: list[Case]


def load_results(path: Path) -> Results:
    """Read results.json, or the file of that name in a folder. The content may come from strangers.

    Raises:
        InputFileError: missing, not JSON, of another schema, or with a value that is of the wrong type or that nothing
            can measure (names the key), or two cases have one id.
    """
    file = path / "results.json" if path.is_dir() else path
    first_bytes(file)
    if file.stat().st_size > _FILE_LIMIT:
        raise InputFileError(file, "is too large to be a results file")
    raw = file.read_bytes()
    try:
        version = msgspec.json.decode(raw, type=_Versioned).schema_version
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
        raise InputFileError(file, f"is not a results file ({printable(str(e), 160)})") from None
    if version != SCHEMA_VERSION:
        raise InputFileError(file, f"has schema version {version}; this fragscope reads {SCHEMA_VERSION}")
    try:
        results = msgspec.json.decode(raw, type=Results)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
        raise InputFileError(file, f"is not a usable results file ({printable(str(e), 160)})") from None
    first: dict[str, int] = {}
    for at, case in enumerate(results.cases):
        if first.setdefault(case.id, at) != at:
            said = f"`$.cases[{at}].id` is that of `$.cases[{first[case.id]}]`, {printable(case.id, 160)}"
            raise InputFileError(file, f"is not a usable results file ({said}, and an id names one case)")
    return results


class _Versioned(msgspec.Struct):
    schema_version: Count


def save_results(results: Results, path: Path) -> None:
    """Write results.json, whole or not at all."""
    write_atomically(path, msgspec.json.format(msgspec.json.encode(results), indent=1) + b"\n")
