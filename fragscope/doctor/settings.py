"""Allocator settings in the environment: which variable the installed torch obeys, and what its string means."""

from __future__ import annotations

import shlex
from dataclasses import fields

from fragscope.allocator import Conf, Rules, conf_from_environment, parse_conf, rules_for
from fragscope.allocator.conf import UNLIMITED
from fragscope.doctor.check import Check
from fragscope.doctor.machine import Machine, Missing
from fragscope.errors import UnmodelledError, UsageError, printable
from fragscope.units import format_bytes

VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
_UNCACHED = "PYTORCH_NO_CUDA_MEMORY_CACHING"  # c10/cuda/CUDACachingAllocator.cpp: counts whatever it is set to
_SIZES = {"max_split_size", "max_non_split_rounding", "large_segment_size"}


def conf_variable(machine: Machine) -> Check:
    """Whether the conf variables that are set are those that torch obeys."""
    name = "conf variable"
    present = [v for v in VARIABLES if v in machine.environ]
    rules = _rules(machine)
    if rules is None:
        found = f"{_and(present)} {_is(present)} set" if present else "none is set"
        return Check(name, "absent", f"{found}; {_no_rules(machine)}")
    order = f"torch {rules.release} reads {', else '.join(rules.conf_variables)}"
    if not present:
        return Check(name, "ok", f"none is set; {order}")
    try:
        obeyed, text = conf_from_environment(machine.environ, rules)
    except UnmodelledError as e:
        return Check(name, "fail", str(e), "set PYTORCH_ALLOC_CONF instead")
    ignored = [v for v in present if v != obeyed]
    if not ignored:
        return Check(name, "ok", f"{obeyed} is obeyed; {order}")
    if not obeyed:
        advice = f"export {rules.conf_variables[0]}={shlex.quote(machine.environ[ignored[0]])}"
        return Check(name, "fail", f"{_and(ignored)} {_is(ignored)} ignored; {order}", advice)
    if all(machine.environ[v] == text for v in ignored):
        return Check(name, "warn", f"{obeyed} is obeyed; {_and(ignored)} says the same and is ignored; {order}")
    return Check(
        name,
        "fail",
        f"{obeyed}={printable(text)!r} is obeyed, and {_and(ignored)} ignored; {order}",
        f"unset {' '.join(ignored)}, or put everything into {obeyed}",
    )


def conf(machine: Machine) -> Check:
    """What the string in force means, and whether the allocator model covers it."""
    name = "conf"
    rules = _rules(machine)
    if rules is None:
        return Check(name, "absent", _no_rules(machine))
    if _UNCACHED in machine.environ:
        return Check(
            name,
            "warn",
            f"{_UNCACHED} is set: torch asks the driver for each tensor, and there is no caching allocator to record",
            f"unset {_UNCACHED}",
        )
    try:
        variable, text = conf_from_environment(machine.environ, rules)
    except UnmodelledError as e:
        return Check(name, "warn", f"what is in force is not known: {e}")
    try:
        parsed = parse_conf(text, rules)
    except UnmodelledError as e:
        return Check(name, "warn", f"not modelled: {e}", "a recording under it can be neither verified nor replayed")
    except UsageError as e:
        return Check(name, "fail", f"torch {rules.release} rejects it: {e}", f"correct or unset {variable}")
    meaning = _meaning(parsed, rules)
    reported = None if isinstance(machine.torch, Missing) else machine.torch.conf
    if reported is not None and reported != text:
        return Check(
            name,
            "fail",
            f"torch says that {printable(reported)!r} is in force, and the environment says {printable(text)!r}",
            "something sets it when torch is imported, such as sitecustomize; name the conf with --conf",
        )
    says = "" if reported is None else "; torch says the same"
    if not text:
        return Check(name, "ok", f"the defaults of torch {rules.release}{says}")
    return Check(name, "ok", f"{printable(text)!r}: {meaning}{says}")


def _meaning(parsed: Conf, rules: Rules) -> str:
    """The settings that differ from the release's defaults."""
    default = parse_conf("", rules)
    said = []
    for field in fields(Conf):
        value = getattr(parsed, field.name)
        if field.name == "text" or value == getattr(default, field.name):
            continue
        if field.name == "roundup_power2_divisions":
            value = value[0] if len(set(value)) == 1 else _intervals(value)
        elif field.name in _SIZES:
            value = "unlimited" if value == UNLIMITED else format_bytes(value)
        said.append(f"{field.name} {value}")
    return ", ".join(said) or "changes nothing that memory depends on"


def _intervals(steps: tuple[int, ...]) -> str:
    """``4 from 256 MiB, 1 from 512 MiB``; the first interval begins at nothing."""
    begins = [i for i in range(len(steps)) if not i or steps[i] != steps[i - 1]]
    return ", ".join(f"{steps[i]} from {f'{1 << i} MiB' if i else '0'}" for i in begins)


def _rules(machine: Machine) -> Rules | None:
    if machine.torch_release is None:
        return None
    try:
        return rules_for(machine.torch_release).rules
    except UsageError:
        return None


def _no_rules(machine: Machine) -> str:
    if machine.torch_release is None:
        return "torch is not installed, so nothing reads it"
    return f"no rules are known for torch {printable(machine.torch_release, 60)}"


def _and(names: list[str]) -> str:
    return " and ".join(names)


def _is(names: list[str]) -> str:
    return "is" if len(names) == 1 else "are"
