"""Every check over machines that are made up, and the process that asks torch."""

from __future__ import annotations

import json
import subprocess
import tomllib
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from fragscope.doctor import CHECKS, Check, Diagnosis, diagnose, gpu, settings, software
from fragscope.doctor.gather import look_at
from fragscope.doctor.machine import (
    Device,
    Flashinfer,
    Folder,
    ImportTime,
    Machine,
    MemorySource,
    Missing,
    NvmlFacts,
    TorchFacts,
    Trial,
)
from fragscope.doctor.probe import ANSWERS, ask
from fragscope.doctor.render import as_text

GIB = 1024**3
# As an H100 and torch 2.11.0+cu130 reported themselves (tests/data/footprints, allocator/cards.py)
H100 = Device("NVIDIA H100 80GB HBM3", 85_017_493_504, 84_465_090_560, (9, 0), 132, 52_428_800)
H200 = Device("NVIDIA H200", 150_110_011_392, None, (9, 0), 132, 62_914_560)
NO_TORCH = Missing("torch is not installed")
NO_DRIVER = Missing("no NVIDIA driver is installed: libnvidia-ml.so.1 is not there")


def torch_facts(release="2.11.0+cu130", devices=(H100,), **more):
    cuda = None if release.endswith("cpu") else "13.0"
    return TorchFacts(release=release, cuda=cuda, hip=None, devices=devices, **more)


CARD = Machine(
    fragscope="0.1.0",
    environ={},
    torch_release="2.11.0+cu130",
    torch=torch_facts(conf=""),
    recording=Trial(events=6, seen=True, compared=12, mismatches=0),
    memory=MemorySource("process", "NVML, by process", 900),
    nvml=NvmlFacts("580.159.04", ((H100.name, 85_520_809_984),)),
    tracker=None,
    flashinfer=Flashinfer("0.7.2", (), ImportTime(2.5)),
    programs={"nvcc": "/usr/local/cuda/bin/nvcc", "ninja": "/usr/bin/ninja", "c++": "/usr/bin/c++"},
    numba="0.60.0",
    compiled=True,
    cache=Folder(Path("/home/u/.cache/fragscope"), 50 * GIB, True),
    out=Folder(Path(".fragscope"), 50 * GIB, True),
)
LAPTOP = replace(
    CARD,
    torch_release="2.13.0+cpu",
    torch=torch_facts("2.13.0+cpu", devices=(), no_devices="torch 2.13.0+cpu is a CPU build"),
    recording=Missing("torch can use no GPU"),
    memory=Missing("torch can use no GPU"),
    nvml=NO_DRIVER,
    tracker=Missing("it needs a CUDA build of torch"),
    flashinfer=None,
    numba=None,
)
NOTHING = replace(LAPTOP, torch_release=None, torch=NO_TORCH, recording=NO_TORCH, memory=NO_TORCH)


def statuses(machine: Machine) -> dict[str, str]:
    return {check.name: check.status for check in diagnose(machine).checks}


def with_conf(machine: Machine, release: str | None = None, **environ: str) -> Machine:
    facts = machine.torch
    if release is not None:
        facts = torch_facts(release)
    return replace(
        machine,
        torch=msgspec.structs.replace(facts, conf=None),
        torch_release=release or machine.torch_release,
        environ=environ,
    )


# Whole machines


def test_a_machine_on_which_everything_works():
    assert set(statuses(CARD).values()) == {"ok"}
    assert diagnose(CARD).exit_code == 0


@pytest.mark.parametrize("machine", [LAPTOP, NOTHING])
def test_a_machine_without_a_gpu_fails_nothing(machine):
    found = statuses(machine)
    assert diagnose(machine).exit_code == 0
    assert {found[name] for name in ("gpu", "card profile", "recording", "tracker", "nvml")} == {"absent"}


def test_without_torch_nothing_is_said_about_settings_but_what_is_set():
    assert (statuses(NOTHING)["torch"], statuses(NOTHING)["conf"]) == ("absent", "absent")
    check = settings.conf_variable(replace(NOTHING, environ={"PYTORCH_ALLOC_CONF": "a"}))
    assert check.detail == "PYTORCH_ALLOC_CONF is set; torch is not installed, so nothing reads it"


def test_one_failed_check_is_the_exit_code():
    assert diagnose(replace(CARD, recording=Missing("it crashed", broken=True))).exit_code == 1


# GPU and driver


def test_gpus_of_one_kind_are_counted():
    total = 85_520_809_984  # 79.65 GiB
    machine = replace(
        CARD,
        environ={"CUDA_VISIBLE_DEVICES": "1"},
        nvml=NvmlFacts("580", ((H100.name, total), (H100.name, total), ("A30", None))),
    )
    assert gpu.gpu(machine).detail == (
        "2 x NVIDIA H100 80GB HBM3 (79.65 GiB), A30 (memory not told), driver 580; "
        "torch uses NVIDIA H100 80GB HBM3 (79.18 GiB) (CUDA_VISIBLE_DEVICES='1')"
    )


def test_a_mig_instance_is_told_beside_the_gpu_it_is_on():
    part = msgspec.structs.replace(H100, name="NVIDIA H100 80GB HBM3 MIG 1g.10gb", total=10 * GIB)
    machine = replace(CARD, torch=torch_facts(devices=(part,)), nvml=NvmlFacts("580", ((H100.name, None),)))
    assert gpu.gpu(machine).detail == (
        "NVIDIA H100 80GB HBM3 (memory not told), driver 580; torch uses NVIDIA H100 80GB HBM3 MIG 1g.10gb (10.00 GiB)"
    )


@pytest.mark.parametrize(
    ("torch", "environ", "status", "advice"),
    [
        (torch_facts("2.13.0+cpu", ()), {}, "warn", "CUDA build"),
        (torch_facts(devices=(), no_devices="no CUDA-capable device"), {"CUDA_VISIBLE_DEVICES": ""}, "warn", "unset"),
        (torch_facts(devices=(), no_devices="driver is too old"), {}, "fail", "driver supports"),
        (NO_TORCH, {}, "warn", ""),
    ],
)
def test_a_gpu_that_torch_cannot_use(torch, environ, status, advice):
    check = gpu.gpu(replace(CARD, torch=torch, environ=environ))
    assert check.status == status
    assert advice in check.advice


def test_torch_sees_a_gpu_where_nvml_is_not_there():
    check = gpu.gpu(replace(CARD, nvml=NO_DRIVER))
    assert (check.status, check.detail) == ("ok", "NVIDIA H100 80GB HBM3 (79.18 GiB); driver not known")


# The card's profile


def test_the_profile_that_fits_is_named():
    assert gpu.card(CARD).detail == "h100-80gb has the same name and memory"


def test_a_default_card_that_is_not_here_is_told():
    l4 = Device("NVIDIA L4", 23_583_784_960, None, (8, 9), 58, 50_331_648)
    machine = replace(CARD, torch=torch_facts(devices=(l4,)))
    check = gpu.card(machine)
    assert (check.status, check.detail) == (
        "warn", "l4 has the same name and memory, but the default is h100-80gb",
    )  # fmt: skip
    assert '--card l4, or card = "l4" in pyproject.toml' in check.advice
    assert gpu.card(replace(machine, default_card="l4")).status == "ok"


def test_a_default_card_that_nobody_knows_is_broken():
    for machine in (CARD, LAPTOP):
        check = gpu.card(replace(machine, default_card="h1000\n"))
        assert check.status == "fail"
        assert r"none is named 'h1000\\n'" in check.detail


@pytest.mark.parametrize(
    "device", [H200, msgspec.structs.replace(H100, total=85_017_493_503), msgspec.structs.replace(H100, name="H100")]
)
def test_a_card_that_differs_in_name_or_memory_has_no_profile(device):
    check = gpu.card(replace(CARD, torch=torch_facts(devices=(device,))))
    assert check.status == "warn"
    assert f"product = '{device.name}', total = {device.total}" in check.advice
    assert (f"free = {device.free}" in check.advice) == (device.free is not None)
    table = check.advice.partition("[tool.fragscope.cards.NAME] with ")[2].replace(", ", "\n")
    assert set(tomllib.loads(table)) - {"free"} == {"product", "total", "capability", "multiprocessors", "l2"}


# Recording, tracker, NVML


@pytest.mark.parametrize(
    ("trial", "status", "says"),
    [
        (Trial(6, True, 12, 0), "ok", "6 events recorded, 12 decisions compared with the model's, none differs"),
        (Trial(6, True, 12, 2), "fail", "2 differ"),
        (Trial(0, False, 0, 0), "fail", "requests that were made are missing"),
        (Missing("the process was ended by SIGSEGV", broken=True), "fail", "SIGSEGV"),
    ],
)
def test_recording(trial, status, says):
    check = gpu.recording(replace(CARD, recording=trial))
    assert check.status == status
    assert says in check.detail


def test_a_tracker_that_cannot_be_built_is_no_failure():
    check = gpu.tracker(replace(CARD, tracker=Missing("it needs a C++ compiler")))
    assert (check.status, check.detail) == ("absent", "cannot be built: it needs a C++ compiler")
    assert "PyTorch's own history" in check.advice


@pytest.mark.parametrize(
    ("memory", "status", "says"),
    [
        (MemorySource("process", "NVML", 4500), "ok", "told by process, a sample takes 4,500 µs"),
        (MemorySource("device", "CUDA", 10, ("NVML lists 3 processes and not this one",)), "warn", "and not this one"),
        (Missing("CUDA failed", broken=True), "warn", "cannot be sampled: CUDA failed"),
    ],
)
def test_nvml(memory, status, says):
    check = gpu.nvml(replace(CARD, memory=memory))
    assert check.status == status
    assert says in check.detail


def test_nvml_that_is_there_and_refuses_fails():
    assert gpu.nvml(replace(LAPTOP, nvml=Missing("NVML: Insufficient Permissions", broken=True))).status == "fail"


# Which variable is obeyed. Names and precedence: c10/cuda/CUDAAllocatorConfig.h of 2.9, c10/core/AllocatorConfig.cpp

CUDA, NEW, HIP = "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"


@pytest.mark.parametrize(
    ("release", "environ", "status", "says"),
    [
        ("2.9.1", {}, "ok", f"none is set; torch 2.9 reads {CUDA}"),
        ("2.9.1", {CUDA: "x"}, "ok", f"{CUDA} is obeyed"),
        ("2.9.1", {NEW: "x"}, "fail", f"{NEW} is ignored"),
        ("2.9.1", {NEW: "x", CUDA: "x"}, "warn", f"{CUDA} is obeyed; {NEW} says the same and is ignored"),
        ("2.9.1", {NEW: "x", HIP: "y"}, "fail", f"{NEW} and {HIP} are ignored"),
        ("2.9.1", {CUDA: "x", NEW: "x", HIP: "y"}, "fail", f"{CUDA}='x' is obeyed, and {NEW} and {HIP} ignored"),
        ("2.13.0", {NEW: "x"}, "ok", f"{NEW} is obeyed; torch 2.13 reads {CUDA}, else {NEW}"),
        ("2.13.0", {NEW: "x", CUDA: "y"}, "fail", f"{CUDA}='y' is obeyed, and {NEW} ignored"),
        ("2.13.0", {NEW: "x", CUDA: ""}, "fail", f"{CUDA}='' is obeyed, and {NEW} ignored"),
        ("2.13.0", {CUDA: "x", HIP: "y"}, "fail", f"{HIP} ignored"),
        ("2.13.0", {NEW: "x", HIP: "y"}, "fail", "takes some keys from it and others not"),
        ("2.5.0", {CUDA: "x"}, "absent", f"{CUDA} is set; no rules are known for torch 2.5.0"),
    ],
)
def test_which_conf_variable_is_obeyed(release, environ, status, says):
    check = settings.conf_variable(with_conf(CARD, release, **environ))
    assert check.status == status
    assert says in check.detail
    assert bool(check.advice) == (status == "fail")


def test_the_line_to_export_can_be_pasted():
    check = settings.conf_variable(with_conf(CARD, "2.9.1", **{NEW: "roundup_power2_divisions:[256:1,>:4]"}))
    assert check.advice == f"export {CUDA}='roundup_power2_divisions:[256:1,>:4]'"


@pytest.mark.parametrize(
    ("text", "status", "says"),
    [
        ("", "ok", "the defaults of torch 2.13"),
        ("expandable_segments:True", "ok", "expandable_segments True"),
        # From 2.11 on the rounding limit follows the segment's size (c10/core/AllocatorConfig.cpp)
        ("large_segment_size_mb:64", "ok", "max_non_split_rounding 64.00 MiB, large_segment_size 64.00 MiB"),
        ("roundup_power2_divisions:8", "ok", "roundup_power2_divisions 8"),
        ("roundup_power2_divisions:[256:4,>:1]", "ok", "roundup_power2_divisions 4 from 0, 1 from 512 MiB"),
        ("pinned_use_background_threads:True", "ok", "changes nothing that memory depends on"),
        ("backend:cudaMallocAsync", "warn", "not modelled: backend: the allocator model covers backend:native"),
        ("expandable_segments:true", "fail", "torch 2.13 rejects it"),
        ("max_split_size:20", "fail", "did you mean max_split_size_mb?"),
    ],
)
def test_what_a_conf_means(text, status, says):
    check = settings.conf(with_conf(CARD, "2.13.0", **({NEW: text} if text else {})))
    assert check.status == status
    assert says in check.detail


def test_a_conf_that_torch_does_not_have_in_force():
    machine = replace(CARD, environ={NEW: "expandable_segments:True"})
    check = settings.conf(replace(machine, torch=torch_facts(conf="expandable_segments:True")))
    assert check.status == "ok"
    assert check.detail.endswith("; torch says the same")
    check = settings.conf(replace(machine, torch=torch_facts(conf="max_split_size_mb:64")))
    assert check.status == "fail"
    assert "torch says that 'max_split_size_mb:64' is in force" in check.detail


def test_without_a_caching_allocator_there_is_nothing_to_record():
    check = settings.conf(with_conf(CARD, PYTORCH_NO_CUDA_MEMORY_CACHING="0"))  # any value counts
    assert (check.status, check.advice) == ("warn", "unset PYTORCH_NO_CUDA_MEMORY_CACHING")


# What is installed


@pytest.mark.parametrize(
    ("release", "status", "says"),
    [
        ("2.11.0+cu130", "ok", "2.11.0+cu130, CUDA 13.0; the rules of 2.11 are known"),
        ("2.13.0+cpu", "ok", "a CPU build: the virtual device works"),
        ("2.99.0+cu140", "warn", "newer than the rules known, those of 2.14 are assumed"),
        ("2.5.1+cu124", "warn", "older than the oldest rules known (2.9)"),
    ],
)
def test_torch(release, status, says):
    check = software.torch(replace(CARD, torch=torch_facts(release), torch_release=release))
    assert check.status == status
    assert says in check.detail


def test_a_torch_that_cannot_be_imported_fails():
    crashed = Missing("the process was ended by SIGABRT", broken=True)
    check = software.torch(replace(CARD, torch=crashed))
    assert (check.status, check.detail) == (
        "fail", "2.11.0+cu130 cannot be imported: the process was ended by SIGABRT"
    )  # fmt: skip


def test_a_build_for_rocm_is_not_modelled():
    facts = TorchFacts(release="2.11.0+rocm7.0", cuda=None, hip="7.0")
    assert software.torch(replace(CARD, torch=facts)).status == "warn"


@pytest.mark.parametrize(
    ("found", "programs", "status", "says"),
    [
        (None, (), "absent", "not installed"),
        (Flashinfer("0.7.2", (), ImportTime(2.5)), ("nvcc", "ninja", "c++"), "ok", "imported in 2.5 s; kernels are"),
        (Flashinfer("0.7.2", (), ImportTime(2.5)), ("nvcc", "c++"), "warn", "no kernels can be built: ninja not found"),
        (Flashinfer("0.7.2", ("flashinfer-jit-cache",), ImportTime(2.5)), (), "ok", "flashinfer-jit-cache installed"),
        (Flashinfer("0.7.2", ("flashinfer-cubin",), ImportTime(2.5)), (), "warn", "flashinfer-cubin installed"),
        (Flashinfer("0.7.2", (), Missing("ImportError: x", broken=True)), ("nvcc",), "fail", "ImportError: x"),
    ],
)
def test_flashinfer(found, programs, status, says):
    check = software.flashinfer(replace(CARD, flashinfer=found, programs={p: f"/bin/{p}" for p in programs}))
    assert check.status == status
    assert says in check.detail


def test_flashinfer_needs_no_compiler_where_there_is_no_gpu():
    check = software.flashinfer(replace(LAPTOP, flashinfer=Flashinfer("0.7.2", (), None), programs={}))
    assert check.status == "ok"
    assert "not imported" in check.detail


@pytest.mark.parametrize(
    ("cache", "status", "says"),
    [
        (Folder(Path("/c"), 50 * GIB, True), "ok", "cache in /c: 50.00 GiB free"),
        (Folder(Path("/c"), GIB - 1, True), "warn", "free"),
        (Folder(Path("/c"), 50 * GIB, False), "warn", "cache in /c: cannot be written"),
        (Folder(Path("/c"), 50 * GIB, False, "FRAGSCOPE_CACHE_DIR"), "fail", "cannot be written"),
        (Folder(Path("/c"), None, True), "ok", "free space not known"),
    ],
)
def test_disk(cache, status, says):
    check = software.disk(replace(CARD, cache=cache))
    assert check.status == status
    assert says in check.detail


def test_a_folder_to_be_made_is_judged_by_the_one_above(tmp_path):
    there, later = look_at(tmp_path), look_at(tmp_path / "a" / "b")
    assert there.writable and later.writable
    assert later.free is not None
    (tmp_path / "file").write_text("")
    assert not look_at(tmp_path / "file" / "b").writable
    assert [p.name for p in tmp_path.iterdir()] == ["file"]  # looking leaves nothing behind


# Text


def test_text_has_a_line_a_check_and_the_advice_below():
    lines = as_text(diagnose(LAPTOP)).plain.splitlines()
    checks = diagnose(LAPTOP).checks
    assert len(lines) == len(checks) + sum(bool(c.advice) for c in checks) + 2
    assert lines[0].startswith("absent gpu  ")
    assert lines[1].lstrip().startswith("-> replays")
    assert lines[-1] == "4 ok, 7 absent"
    rows = [line for line in lines if line.startswith(("ok ", "absent "))]
    assert all(row.endswith(check.detail) for row, check in zip(rows, checks, strict=True))
    columns = {len(row) - len(check.detail) for row, check in zip(rows, checks, strict=True)}
    assert columns == {lines[1].index("->")}


def test_text_is_broken_at_a_terminals_edge():
    lines = as_text(diagnose(CARD), width=80).plain.splitlines()
    assert max(map(len, lines)) <= 80


def test_control_characters_of_the_environment_do_not_reach_the_terminal():
    hostile = with_conf(CARD, "2.13.0", **{NEW: "a\x1b[31m\nb", CUDA: "c\x07"})
    assert not {"\x1b", "\x07"} & set(as_text(diagnose(hostile)).plain)
    assert len(as_text(diagnose(hostile)).plain.splitlines()) == len(CHECKS) + 2 + 2  # both settings checks advise


def test_control_characters_of_a_driver_do_not_reach_the_terminal():
    hostile = Diagnosis.of("0.1.0", [Check("gpu", "fail", "a\x1b[31m", "b\x07\nc")])
    assert as_text(hostile).plain == "fail   gpu  a\\x1b[31m\n            -> b\\x07\\nc\n\n1 fail\n"


# The process that asks torch


def answering(*lines: str, then: str = "") -> str:
    return f"import sys\n{''.join(f'print({line!r}, flush=True){chr(10)}' for line in lines)}{then}"


def test_answers_given_before_a_crash_are_kept():
    first = json.dumps({"question": "torch", "answer": msgspec.to_builtins(torch_facts())})
    second = json.dumps({"question": "memory", "missing": {"reason": "no", "broken": False}})
    start = answering(
        first, second, '{"question": "rec', then="import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
    )
    answers = ask({}, start=start)
    assert answers["torch"] == torch_facts()
    assert answers["memory"] == Missing("no")
    assert answers["recording"] == Missing("the process was ended by SIGSEGV", broken=True)
    assert set(answers) == set(ANSWERS)


def test_the_last_words_of_a_failed_process_are_told():
    answers = ask({}, start="raise SystemExit('libcudart.so.13: not found')")
    assert answers["torch"] == Missing(
        "the process ended with exit code 1; its last words: libcudart.so.13: not found", broken=True
    )


def test_a_process_that_hangs_is_ended(monkeypatch):
    line = json.dumps({"question": "torch", "answer": msgspec.to_builtins(torch_facts())}).encode()

    def hangs(command, timeout, **_):
        raise subprocess.TimeoutExpired(command, timeout, output=line)

    monkeypatch.setattr(subprocess, "run", hangs)
    answers = ask({}, timeout=90)
    assert answers["torch"] == torch_facts()
    assert answers["recording"] == Missing("no answer within 90 s", broken=True)


def test_answers_that_are_none_are_not_believed():
    lines = ["noise", "[]", '{"question": "weather", "answer": {}}', '{"question": "torch", "answer": {"release": 1}}']
    assert all(isinstance(a, Missing) for a in ask({}, start=answering(*lines)).values())


def test_a_diagnosis_survives_json():
    diagnosis = diagnose(CARD)
    assert msgspec.json.decode(msgspec.json.encode(diagnosis), type=Diagnosis) == diagnosis
