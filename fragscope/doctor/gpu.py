"""What can be done on the GPUs of this machine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from fragscope.allocator.cards import CARDS, card_like
from fragscope.doctor.check import Check, Status
from fragscope.doctor.machine import Machine, Missing, TorchFacts
from fragscope.errors import printable
from fragscope.units import format_bytes


def gpu(machine: Machine) -> Check:
    """The GPUs, the driver, and whether torch can use them."""
    name = "gpu"
    nvml, devices = machine.nvml, machine.devices
    visible = machine.environ.get("CUDA_VISIBLE_DEVICES")
    limited = "" if visible is None else f" (CUDA_VISIBLE_DEVICES={printable(visible, 80)!r})"
    if isinstance(nvml, Missing) or not nvml.devices:
        if devices:
            return Check(name, "ok", f"{_kinds((d.name, d.total) for d in devices)}{limited}; driver not known")
        why = nvml.reason if isinstance(nvml, Missing) else "the driver knows none"
        if isinstance(machine.torch, TorchFacts):
            why = f"{why}; {machine.no_devices}"
        return Check(
            name, "absent", f"none: {why}{limited}", "replays, searches, gates and the virtual device need none"
        )
    found = f"{_kinds(nvml.devices)}, driver {nvml.driver}"
    if devices:
        same = Counter(d.name for d in devices) == Counter(product for product, _ in nvml.devices)
        of_them = "" if same else f"; torch uses {_kinds((d.name, d.total) for d in devices)}"  # also a MIG instance
        return Check(name, "ok", f"{found}{of_them}{limited}")
    if isinstance(machine.torch, Missing):
        return Check(name, "warn", f"{found}; {machine.no_devices}")
    hidden = f"{found}; torch can use none{limited}: {machine.no_devices}"
    if machine.torch.cuda is None:
        return Check(name, "warn", hidden, "install a CUDA build of torch")
    if visible is not None:
        return Check(name, "warn", hidden, "unset CUDA_VISIBLE_DEVICES to use them")
    return Check(name, "fail", hidden, "torch's CUDA must be one that the driver supports; see nvidia-smi")


def card(machine: Machine) -> Check:
    """The device profile that fits, for replays that take place elsewhere, and whether it is the one in use."""
    name = "card profile"
    default = printable(machine.default_card, 80)
    if machine.default_card not in CARDS:
        return Check(
            name,
            "fail",
            f"none is named {default!r}, which 'card' in pyproject.toml makes the default",
            "'fragscope cards' lists what there is",
        )
    if not machine.devices:
        return Check(
            name, "absent", f"no GPU that torch can use; the virtual device is {default} where --card names no other"
        )
    unknown = {d.name: d for d in reversed(machine.devices) if card_like(d.name, d.total) is None}
    known = {c.name: None for d in machine.devices if (c := card_like(d.name, d.total)) is not None}
    if not unknown:
        guessed = [name for name in known if not CARDS[name].measured]
        hint = (
            f"{', '.join(guessed)}: free memory is estimated there; with --device cuda it is measured"
            if guessed
            else ""
        )
        said = f"{', '.join(known)} has the same name and memory"
        if machine.default_card in known:
            return Check(name, "ok", said, hint)
        first = next(iter(known))
        switch = (
            f'--card {first}, or card = "{first}" in pyproject.toml, makes the virtual device the card that is here'
        )
        return Check(name, "warn", f"{said}, but the default is {default}", "; ".join(filter(None, (switch, hint))))
    device = next(iter(unknown.values()))
    free = "" if device.free is None else f", free = {device.free}"
    major, minor = device.capability
    return Check(
        name,
        "warn",
        f"none for {', '.join(f'{printable(d.name, 100)} with {d.total:,} bytes' for d in unknown.values())}",
        "'fragscope run --device cuda' measures its own; for replays elsewhere define it in pyproject.toml: "
        f"[tool.fragscope.cards.NAME] with product = {printable(repr(device.name), 100)}, total = {device.total}{free}"
        f', capability = "{major}.{minor}", multiprocessors = {device.multiprocessors}, l2 = {device.l2}',
    )


def recording(machine: Machine) -> Check:
    """Whether a tiny recording holds what was done, and the model agrees with it."""
    name = "recording"
    if not machine.devices:
        return Check(name, "absent", f"needs a GPU that torch can use: {machine.no_devices}")
    trial = machine.recording
    if isinstance(trial, Missing):
        return Check(name, "fail" if trial.broken else "absent", trial.reason)
    said = f"{trial.events:,} events recorded, {trial.compared:,} decisions compared with the model's"
    if not trial.seen:
        return Check(name, "fail", f"{said}; requests that were made are missing", "please report this")
    if trial.mismatches:
        return Check(
            name, "fail", f"{said}, {trial.mismatches:,} differ", "the model is wrong for this torch; please report it"
        )
    return Check(name, "ok", f"{said}, none differs")


def tracker(machine: Machine) -> Check:
    """Whether the native allocator tracker can be built."""
    name = "tracker"
    if machine.tracker is None:
        return Check(name, "ok", "the native allocator tracker can be built")
    advice = "recordings go through PyTorch's own history" if machine.devices else ""
    return Check(name, "absent", f"cannot be built: {machine.tracker.reason}", advice)


def nvml(machine: Machine) -> Check:
    """Whether device memory can be told by process."""
    name = "nvml"
    facts = machine.nvml
    there = facts.reason if isinstance(facts, Missing) else f"driver {facts.driver}"
    if not machine.devices:
        status: Status = "fail" if isinstance(facts, Missing) and facts.broken else "absent"
        return Check(name, status, there if isinstance(facts, Missing) else f"{there}; no GPU that torch can use")
    memory = machine.memory
    if isinstance(memory, Missing):
        return Check(name, "warn", f"memory outside the allocator cannot be sampled: {memory.reason}")
    cost = f"a sample takes {memory.microseconds:,} µs"
    if memory.scope == "process":
        return Check(name, "ok", f"{there}; memory is told by process, {cost}")
    return Check(
        name,
        "warn",
        f"memory only of the whole device ({cost}), other processes' included: {'; '.join(memory.passed_over)}",
    )


def _kinds(devices: Iterable[tuple[str, int | None]]) -> str:
    """``2 x NVIDIA H100 80GB HBM3 (79.18 GiB)``."""
    counted = Counter(
        f"{printable(name, 100)} ({'memory not told' if total is None else format_bytes(total)})"
        for name, total in devices
    )
    return ", ".join(kind if count == 1 else f"{count} x {kind}" for kind, count in counted.items())
