"""Record the programs of programs.py on this machine's GPU, and hold the model against what its allocator did.

    python tests/gpu/record_programs.py FOLDER [PROGRAM ...]

A process for each program and conf; one line tells how it went, and ``NAME.fscope`` is written to the folder.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

SECONDS = 200


def record(name: str, conf: str, folder: Path) -> dict[str, Any]:
    """Record one program in this process."""
    from programs import CONFS, PROGRAMS

    from fragscope import Recorder, RecorderOptions, Stacks
    from fragscope.allocator import ReplaySettings, recorded_under, replay, settle, tape_of
    from fragscope.trace import RequestKind, write_trace

    out: dict[str, Any] = {}
    for stacks in (Stacks.NONE, Stacks.PYTHON):
        recorder = Recorder(RecorderOptions(stacks=stacks, sample_non_torch=0.5))
        recorder.start()
        recorder.begin_phase(name)
        PROGRAMS[name]()()
        recorder.end_phase()
        trace = recorder.stop({"program": name, "conf": conf})
        settings = ReplaySettings.of(recorded_under(trace))
        replayed = replay(settle(tape_of(trace), settings), settings, verify=True)
        verify, measured, theirs = replayed.verify, replayed.measured, recorder.statistics
        assert verify is not None
        assert measured is not None
        assert theirs is not None
        differ = [
            f"{which} {key}: {value} != {getattr(counters, key)}"
            for which, counters, values in (("peak", measured.peak, theirs.peak), ("end", measured.end, theirs.end))
            for key, value in values.items()
            # PyTorch's requested bytes go down when deferred frees complete, and ours when the program lets go.
            if getattr(counters, key) != value and not (key == "requested" and trace.count(RequestKind.RECORD_STREAM))
        ]
        out[str(stacks)] = {
            "requests": len(trace.requests),
            "compared": verify.compared,
            "mismatches": verify.mismatches,
            "first": None if verify.first is None else str(verify.first),
            "statistics_differ": differ,
            "lost": [[x.code, x.events, x.detail] for x in trace.lost],
            "assumptions": [[a.code, a.effect, a.events] for a in replayed.assumptions],
            "stacks": len(trace.stacks),
        }
        tag = next(tag for tag, named in CONFS.items() if named == conf)
        write_trace(trace, folder / f"{name}-{tag}-{stacks}.fscope")
    return out


def main() -> None:
    if sys.argv[1] == "--job":
        name, conf, folder = sys.argv[2:5]
        print(json.dumps(record(name, conf, Path(folder))))
        return
    from programs import CONFS, PROGRAMS

    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    results = {}
    for name in sys.argv[2:] or PROGRAMS:
        for tag, conf in CONFS.items():
            environment = {**os.environ, "PYTORCH_CUDA_ALLOC_CONF": conf}
            command = [sys.executable, __file__, "--job", name, conf, str(folder)]
            try:
                done = subprocess.run(
                    command, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False
                )
            except subprocess.TimeoutExpired:
                print(f"{name:8} {tag:11} timed out")
                continue
            if done.returncode:
                print(f"{name:8} {tag:11} failed: {done.stderr[-1500:]}")
                continue
            made = results[f"{name}-{tag}"] = json.loads(done.stdout.splitlines()[-1])
            for stacks, r in made.items():
                differ = f"{r['mismatches']} differ, statistics {r['statistics_differ'] or 'equal'}"
                lost = [x[:2] for x in r["lost"]]
                print(
                    f"{name:8} {tag:11} {stacks:6} {r['compared']:7} compared {differ} lost {lost} {r['first'] or ''}"
                )
                sys.stdout.flush()
    (folder / "results.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
