"""A run that is stopped keeps what it finished and leaves no process behind."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
from pathlib import Path

import pytest
from scenario_files import cases_in, command, results_in, run_in, write_scenarios

from fragscope.cli import run

pytest.importorskip("torch")
pytestmark = pytest.mark.torch

WAITS = """
    import os, subprocess, threading
    from pathlib import Path

    HERE = Path(__file__).parent

    @fragscope.scenario("first", presets={"p": {}})
    def _(case):
        with (HERE / "runs.txt").open("a") as runs:
            runs.write("first ")
        with case.measure():
            kept = on_card(512)

    @fragscope.scenario("second", presets={"p": {}})
    def _(case):
        with case.measure():
            kept = on_card(1024)
        if not (HERE / "go").exists():
            child = subprocess.Popen(["sleep", "1000"])
            with (HERE / "pipe").open("w") as pipe:
                pipe.write(f"{os.getpid()} {child.pid}")
            threading.Event().wait()
"""
PATIENCE = 60  # seconds until a test that waits in vain fails


class Running:
    """A run whose second scenario waits; its processes are held by descriptor, so that no number is mistaken."""

    def __init__(self, folder: Path) -> None:
        write_scenarios(folder, "waits", WAITS)
        os.mkfifo(folder / "pipe")
        self.folder = folder
        self.pipe = os.open(folder / "pipe", os.O_RDONLY | os.O_NONBLOCK)
        self.process = subprocess.Popen(
            command(".", "--jobs", "1"), cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert select.select([self.pipe], [], [], PATIENCE)[0], "the second scenario was never reached"
        text = b""
        while chunk := self._read():
            text += chunk
        self.others = [os.pidfd_open(int(pid)) for pid in text.split()]
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        assert children  # the fork server above all
        self.others += [os.pidfd_open(int(pid)) for pid in children]

    def _read(self) -> bytes:
        assert select.select([self.pipe], [], [], PATIENCE)[0]
        return os.read(self.pipe, 100)

    def ended(self, *, but: int = 0) -> tuple[int, str, str]:
        """Exit code, stdout and stderr, once it and all but so many of the processes it started are gone."""
        out, err = self.process.communicate(timeout=PATIENCE)
        gone = select.poll()
        for other in self.others:
            gone.register(other, select.POLLIN)
        left = len(self.others)
        while left > but:
            events = gone.poll(PATIENCE * 1000)
            assert events, f"{left} processes are still there"
            for other, _ in events:
                gone.unregister(other)
                left -= 1
        return self.process.returncode, out, err

    def close(self) -> None:
        """Leave nothing, whatever the test found."""
        self.process.kill()
        for other in self.others:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(other, signal.SIGKILL)
            os.close(other)
        os.close(self.pipe)
        self.process.communicate(timeout=PATIENCE)


@pytest.fixture
def running(tmp_path: Path, request: pytest.FixtureRequest) -> Running:
    made = Running(tmp_path)
    request.addfinalizer(made.close)
    return made


def test_ctrl_c_keeps_what_is_finished_and_resume_completes_it(running: Running) -> None:
    folder = running.folder
    running.process.send_signal(signal.SIGINT)
    code, out, err = running.ended()
    assert (code, out) == (130, "")
    assert "Traceback" not in err
    assert err.splitlines()[-2:] == [
        "fragscope: what is finished is in out; the same command with --resume goes on",
        "fragscope: interrupted",
    ]
    content = results_in(folder)
    assert (content["run"]["complete"], content["run"]["planned"]) == (False, 2)
    assert not (folder / "out" / "work").exists(), "what workers and the run say to each other"
    first = cases_in(folder)
    assert list(first) == ["first/original"]

    (folder / "go").touch()
    run_in(folder, ".", "--resume")
    second = cases_in(folder)
    assert results_in(folder)["run"]["complete"] is True
    assert list(second) == ["first/original", "second/original"]
    assert second["first/original"] == first["first/original"]
    assert second["second/original"]["end_live"] == 1024
    assert (folder / "runs.txt").read_text().split() == ["first"]


def test_a_second_run_in_the_same_folder_is_refused_and_sigterm_stops_the_first(
    running: Running, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = running.folder
    monkeypatch.chdir(folder)
    assert run(["run", "scenario_waits.py", "--device", "virtual", "--out", "out"]) == 2
    assert f"another run is writing there (process {running.process.pid})" in capfd.readouterr().err
    running.process.send_signal(signal.SIGTERM)
    code, _, err = running.ended()
    assert code == 130
    assert "Traceback" not in err
    assert list(cases_in(folder)) == ["first/original"]


def test_after_a_kill_the_journal_is_enough(running: Running) -> None:
    folder = running.folder
    running.process.kill()
    # What the program itself had started is nobody's once all of ours is dead.
    assert running.ended(but=1)[0] == -signal.SIGKILL
    assert results_in(folder)["run"]["complete"] is False
    (folder / "go").touch()
    run_in(folder, ".", "--resume")
    assert list(cases_in(folder)) == ["first/original", "second/original"]
    assert (folder / "runs.txt").read_text().split() == ["first"]
