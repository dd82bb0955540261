"""Real pytest sessions with the plugin, beside a GPU that is a stand-in or none."""

from __future__ import annotations

import os
import re
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

# A session in this process must not import them anew: numpy cannot be, and classes would be two of a name.
import fragscope.pytest_plugin
import fragscope.testing.options
import fragscope.testing.properties
import fragscope.testing.sections  # noqa: F401
from fragscope.testing import devices

ROOT = Path(__file__).parents[2]
PLUGIN = ("-p", "no:cacheprovider", "-p", "no:fragscope", "-p", "fragscope.pytest_plugin")
"""As its entry point gives it, whether or not fragscope is installed here."""

_UNUSED = ("-p", "no:hypothesispytest")  # imports hypothesis in every session

WITH_FAKE_GPU = "import fake_gpu\nfake_gpu.install()\n"
WITHOUT_GPU = f"{WITH_FAKE_GPU}fake_gpu.FakeGpu.reason = 'there is no usable NVIDIA GPU'\n"


def prepare(pytester: pytest.Pytester, conftest: str = WITH_FAKE_GPU, **files: str) -> None:
    """Files of a repository whose tests are to be run."""
    shutil.copy(Path(__file__).with_name("fake_gpu.py"), pytester.path / "fake_gpu.py")
    pytester.syspathinsert()
    pytester.makeconftest(conftest)
    pytester.makepyfile(**files)


def run(pytester: pytest.Pytester, *arguments: str, subprocess: bool = False) -> pytest.RunResult:
    """A session of its own, writing junit.xml."""
    start = pytester.runpytest_subprocess if subprocess else pytester.runpytest_inprocess
    try:
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
            for variable in [name for name in os.environ if name.startswith("PYTEST_XDIST")]:
                environment.delenv(variable)  # the session is none of a worker's, even if this test runs in one
            return start(*PLUGIN, *_UNUSED, "-ra", "--junitxml=junit.xml", *arguments)
    finally:
        devices.gpu = devices.CudaGpu


def properties(pytester: pytest.Pytester, name: str) -> dict[str, str]:
    """The JUnit properties of a test that ran once, by its name."""
    (found,) = properties_of_runs(pytester, name)
    return found


def properties_of_runs(pytester: pytest.Pytester, name: str) -> list[dict[str, str]]:
    """The JUnit properties of each run of a test; none of them twice."""
    found = []
    for case in ET.parse(pytester.path / "junit.xml").iter("testcase"):
        if case.get("name") == name:
            pairs = [(p.attrib["name"], p.attrib["value"]) for p in case.iter("property")]
            found.append(dict(pairs))
            assert len(found[-1]) == len(pairs)
    return found


def verdicts(result: pytest.RunResult) -> dict[str, str]:
    """What the report says of each failed test: its message and its section."""
    text = "\n".join(result.outlines)
    failures = text.partition("= FAILURES =")[2].partition("- generated xml file")[0]
    parts = re.split(r"^_{3,} (\S+) _{3,}$", failures, flags=re.MULTILINE)[1:]
    found = dict(zip(parts[::2], parts[1::2], strict=True))
    # Workers add a line that names themselves, and rules are as wide as the terminal.
    return {
        name: re.sub(r"^\[gw\d+\].*\n|-{3,}|^[-=]+.*={3,}$", "", body, flags=re.MULTILINE).strip()
        for name, body in found.items()
    }
