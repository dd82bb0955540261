"""Questions to torch and CUDA, asked in a process of their own.

torch may abort while it is imported, a driver may hang, a recording may crash: answers are written one by one, so that
what ends the process takes only the answers after it along.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from fragscope.doctor.machine import Device, ImportTime, MemorySource, Missing, TorchFacts, Trial
from fragscope.errors import FragscopeError, NotMeasuredError, printable

ANSWERS: dict[str, Any] = {
    "torch": TorchFacts,
    "memory": MemorySource,
    "recording": Trial,
    "flashinfer": ImportTime,
}
"""What each question is answered with, in the order in which they are asked; or with ``Missing``."""

_SECONDS = 120.0  # the first recording on a machine compiles the tracker
_TRIED = 1_000_003  # bytes asked for in the trial: no size that anything else asks for
# The child finds packages just where this process finds them.
_START = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from fragscope.doctor.probe import main; main()"


def ask(environ: Mapping[str, str], timeout: float = _SECONDS, start: str = _START) -> dict[str, Any]:
    """Ask a new process; a question that it did not answer is ``Missing`` with the reason.

    Args:
        environ: the environment it gets.
        timeout: seconds after which it is ended.
        start: the code it runs.
    """
    command = [sys.executable, "-P", "-c", start, json.dumps(sys.path)]
    try:
        done = subprocess.run(  # noqa: S603 - this Python, this code
            command, env=dict(environ), stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout, check=False
        )
        written, ending = done.stdout, _ending(done.returncode, done.stderr)
    except subprocess.TimeoutExpired as e:
        written, ending = e.stdout or b"", f"no answer within {timeout:g} s"
    except OSError as e:
        written, ending = b"", f"no process can be started: {e.strerror}"
    answers = dict.fromkeys(ANSWERS, Missing(ending, broken=True))
    for line in written.splitlines():
        with contextlib.suppress(msgspec.MsgspecError, ValueError, KeyError, TypeError):  # a line cut short
            answer = msgspec.json.decode(line)
            kind = Missing if "missing" in answer else ANSWERS[answer["question"]]
            answers[answer["question"]] = msgspec.convert(answer.get("missing") or answer["answer"], kind)
    return answers


def _ending(code: int, stderr: bytes) -> str:
    lines = [line for line in stderr.decode(errors="replace").splitlines() if line.strip()]
    how = f"the process ended with exit code {code}"
    if code < 0:
        with contextlib.suppress(ValueError):
            how = f"the process was ended by {signal.Signals(-code).name}"
    return f"{how}; its last words: {printable(lines[-1].strip(), 300)}" if lines else how


def main() -> None:
    """In the child: answer every question on stdout, a line each."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what imports print is no answer
    questions: list[tuple[str, Callable[[], Any]]] = [
        ("torch", _torch),
        ("memory", _memory),
        ("recording", _recording),
        ("flashinfer", _flashinfer),
    ]
    for question, answer in questions:
        try:
            found = {"answer": msgspec.to_builtins(answer())}
        except (_NotThereError, NotMeasuredError) as e:  # such as an allocator that is not PyTorch's
            found = {"missing": msgspec.to_builtins(Missing(str(e)))}
        except Exception as e:
            found = {"missing": msgspec.to_builtins(Missing(_one_line(e), broken=True))}
        print(json.dumps({"question": question, **found}), file=out, flush=True)


class _NotThereError(Exception):
    """There is nothing to be asked."""


def _one_line(e: Exception) -> str:
    first = str(e).partition("\n")[0]
    return printable(first if isinstance(e, FragscopeError) else f"{type(e).__name__}: {first}", 300)


def _torch() -> TorchFacts:
    import torch  # noqa: PLC0415 - the question is whether this works

    facts = TorchFacts(release=str(torch.__version__), cuda=torch.version.cuda, hip=torch.version.hip)
    if not torch.backends.cuda.is_built():
        return msgspec.structs.replace(facts, no_devices=f"torch {facts.release} is a CPU build")
    try:
        torch.cuda.init()
        devices = tuple(_device(torch, index) for index in range(torch.cuda.device_count()))
    except Exception as e:
        return msgspec.structs.replace(facts, no_devices=_one_line(e))
    conf = None
    with contextlib.suppress(Exception):  # such as a backend that has none, or a conf that torch rejects
        snapshot: Any = torch.cuda.memory._snapshot()
        conf = str(snapshot["allocator_settings"]["PYTORCH_CUDA_ALLOC_CONF"])
    return msgspec.structs.replace(facts, devices=devices, conf=conf)


def _device(torch: Any, index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    free = None
    if index == 0:  # asking for it makes a CUDA context, which takes time and memory
        with contextlib.suppress(RuntimeError):
            free = int(torch.cuda.mem_get_info(index)[0])
    return Device(
        name=properties.name,
        total=properties.total_memory,
        free=free,
        capability=(properties.major, properties.minor),
        multiprocessors=properties.multi_processor_count,
        l2=properties.L2_cache_size,
    )


def _needs_device() -> Any:
    import torch  # noqa: PLC0415 - asked before

    if not torch.cuda.is_available():
        raise _NotThereError("torch can use no GPU")
    return torch


def _memory() -> MemorySource:
    from fragscope.record.cuda.non_torch import device_memory  # noqa: PLC0415 - only in the child

    _needs_device()
    chosen = device_memory(0)
    begin = time.perf_counter()
    chosen.memory.used()
    return MemorySource(
        scope=chosen.memory.scope,
        source=chosen.memory.source,
        microseconds=round((time.perf_counter() - begin) * 1e6),
        passed_over=chosen.passed_over,
    )


def _recording() -> Trial:
    torch = _needs_device()
    # fmt: off
    from fragscope.allocator import ReplaySettings, recorded_under, replay  # noqa: PLC0415 - only in the child
    from fragscope.record.cuda.recorder import Recorder  # noqa: PLC0415
    from fragscope.trace import RequestKind, Trace  # noqa: PLC0415 - only in the child
    # fmt: on

    recorder = Recorder()
    recorder.start()
    for _ in range(3):
        torch.empty(_TRIED, dtype=torch.uint8, device="cuda:0")  # freed at once
    trace: Trace = recorder.stop()
    tried = (trace.requests.kind == RequestKind.ALLOC) & (trace.requests.size == _TRIED)
    verified = replay(trace, ReplaySettings.of(recorded_under(trace)), verify=True).verify
    assert verified is not None
    return Trial(
        events=len(trace.requests),
        seen=int(tried.sum()) == 3,
        compared=verified.compared,
        mismatches=verified.mismatches,
    )


def _flashinfer() -> ImportTime:
    if importlib.util.find_spec("flashinfer") is None:
        raise _NotThereError("flashinfer is not installed")
    _needs_device()  # elsewhere nothing of it runs, and its import takes seconds
    begin = time.perf_counter()
    importlib.import_module("flashinfer")
    return ImportTime(time.perf_counter() - begin)
