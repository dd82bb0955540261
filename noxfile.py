"""Everything a contributor or CI runs: ``nox -s suite tests lint typing bench conformance browser gpu``."""

from __future__ import annotations

from pathlib import Path

import nox

nox.needs_version = ">=2024.10.9"
nox.options.sessions = ["tests", "lint", "typing"]
nox.options.reuse_existing_virtualenvs = True

PROJECT = nox.project.load_toml("pyproject.toml")
CONSTRAINTS = ("-c", "constraints.txt")
# Some run commands in processes of their own, whose lines are not counted anyway; millions of requests go through the
# allocator's loop in the others, and counting their lines would take most of the time. What takes longest comes first,
# so that no process is left with it at the end.
WITHOUT_COVERAGE = (
    *(
        f"tests/integration/test_{name}.py"
        for name in (
            "own_loader_guide", "scenarios", "sweep_command", "moe_chunking", "installed_variants", "kv_cache_growth",
            "hazard_outcome", "moe_layouts", "run_command", "alltoall_scenarios", "pytest_guide", "ranks",
            "gate_against_lock", "w4a8_convert", "device_memory", "recorded_traces", "lock_guide", "record_command",
            "run_outcomes", "run_resume",
        )
    ),
    "tests/property", "tests/conformance", "tests/unit/test_compiled.py", "tests/unit/test_late_measures.py",
    "tests/unit/test_timeline_elsewhere.py", "tests/unit/test_timeline_properties.py",
)  # fmt: skip


# A file's tests stay together: what they share, such as a run of every scenario, is made once. Files with few tests are
# often the longest; they keep their place, where xdist would move them to the end.
PARALLEL = ("-n", "auto", "--dist", "loadfile", "--no-loadscope-reorder")


def group(name: str) -> list[str]:
    return nox.project.dependency_groups(PROJECT, name)


@nox.session
def suite(session: nox.Session) -> None:
    """The main job: every scenario on the virtual device, the report, the results against budgets and the lock."""
    session.install(*CONSTRAINTS, ".[torch,flashinfer,report]", *group("scenarios"))
    session.run("fragscope", "run", "--device", "virtual", *session.posargs)
    session.run("fragscope", "gate")
    print(f"report: {Path('.fragscope/report.html').resolve()}")


@nox.session
def tests(session: nox.Session) -> None:
    """All tests that need neither a GPU nor a browser, with branch coverage, which may only rise."""
    session.install(*CONSTRAINTS, "-e", ".[torch,flashinfer,report,fast]", *group("test"), *group("scenarios"))
    if session.posargs:
        session.run("pytest", *session.posargs)
        return
    session.run("pytest", *PARALLEL, *WITHOUT_COVERAGE)
    left_out = [f"--ignore={path}" for path in (*WITHOUT_COVERAGE, "tests/browser", "tests/benchmarks")]
    session.run("pytest", *PARALLEL, "--cov", "--cov-report=term:skip-covered", *left_out)


@nox.session
def no_torch(session: nox.Session) -> None:
    """What a laptop or a gate job without torch can do: read, replay, gate, report."""
    session.install("-e", ".[report]", *group("test"))
    session.run("pytest", "-m", "not torch", "--ignore=tests/browser", "--ignore=tests/benchmarks", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Style, formatting and likely mistakes."""
    session.install(*group("lint"))
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def typing(session: nox.Session) -> None:
    """mypy in strict mode over the package and the scenarios."""
    session.install(*CONSTRAINTS, "-e", ".[torch,flashinfer,report,fast]", *group("typing"))
    session.run("mypy")


@nox.session
def bench(session: nox.Session) -> None:
    """Speed, as ratios measured side by side in one run."""
    session.install(*CONSTRAINTS, "-e", ".[torch,flashinfer,report,fast]", *group("bench"))
    session.run("pytest", "tests/benchmarks", "--benchmark-columns=min,median,stddev,rounds", *session.posargs)


@nox.session
def conformance(session: nox.Session) -> None:
    """Random programs on the releases' own allocators, beside the model; downloads a wheel of each release."""
    session.install(*CONSTRAINTS, "-e", ".", *group("test"))
    for release in session.posargs or ("2.9.1", "2.10.0", "2.11.0", "2.12.0", "2.13.0", "2.14.1"):
        session.run("python", "tests/conformance/oracle/build.py", release)
        session.run("python", "tests/conformance/fuzz.py", "--release", release, "--model", "engine")


@nox.session
def browser(session: nox.Session) -> None:
    """Report pages in the distribution's headless Chromium."""
    session.install(*CONSTRAINTS, "-e", ".[report]", *group("browser"))
    session.run("pytest", "tests/browser", *session.posargs)


@nox.session(venv_backend="none")
def gpu(session: nox.Session) -> None:
    """On a machine with an NVIDIA GPU, in the environment at hand: record operators' footprints and compare."""
    session.run("python", "-m", "pytest", "tests/gpu", "-m", "gpu", *session.posargs)
