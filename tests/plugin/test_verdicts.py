"""The marker, its defaults, and what becomes of a test that is over, within, malformed or not measured."""

from __future__ import annotations

import pytest
from sessions import WITHOUT_GPU, prepare, properties, run

pytest_plugins = ["pytester"]
MIB = 2**20

LOADER = """
    import pytest
    from fake_gpu import alloc

    def load():
        old = alloc(100)
        new = alloc(120)
        old.free()
        return new
"""


def test_a_test_within_its_budget_passes_and_says_what_it_needs(pytester):
    prepare(
        pytester,
        test_load=LOADER
        + """
    @pytest.mark.gpu_memory_budget(peak_allocated="220 MiB", transient="100 MiB", retained="120 MiB")
    def test_load():
        load()
""",
    )
    run(pytester).assert_outcomes(passed=1)
    found = properties(pytester, "test_load")
    assert found == {
        "fragscope_peak_requested": str(220 * MIB),
        "fragscope_peak_allocated": str(220 * MIB),
        "fragscope_peak_reserved": str(220 * MIB),
        "fragscope_peak_hbm": str(220 * MIB),
        "fragscope_transient": str(100 * MIB),
        "fragscope_retained": str(120 * MIB),
        "fragscope_stranded": "0",
        "fragscope_budget_peak_allocated": str(220 * MIB),
        "fragscope_budget_transient": str(100 * MIB),
        "fragscope_budget_retained": str(120 * MIB),
        "fragscope_recorded_on": "the GPU",
    }


def test_a_test_over_its_budget_fails_with_the_places_that_hold_the_memory(pytester):
    prepare(
        pytester,
        test_load=LOADER
        + """
    @pytest.mark.gpu_memory_budget(
        peak_allocated="200 MiB", retained=0, stranded="1 MiB"
    )
    def test_load():
        load()
""",
    )
    result = run(pytester)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            "GPU memory over budget: retained 120.00 MiB of 0 B, peak_allocated 220.00 MiB of 200.00 MiB",
            "*- fragscope -*",
            "over  retained  budget 0 B  value 120.00 MiB  excess 120.00 MiB  [[]test_load.py:10[]]",
            "over  peak_allocated  budget 200.00 MiB  value 220.00 MiB  excess 20.00 MiB (+10.0 %)  *:10[]]",
            "within  stranded  budget 1.00 MiB  value 0 B  [[]test_load.py:10[]]",
            "held at the end: 120.00 MiB in 1 block",
            "      120.00 MiB  1 block  test_load.py:6 (load) < test_load.py:14 (test_load)",
            "recorded on the GPU; its own requests under the default conf, rules of torch 2.13",
            "FAILED test_load.py::test_load - Failed: GPU memory over budget: *",
        ],
        consecutive=False,
    )


def test_the_peak_is_shown_by_who_holds_it(pytester):
    prepare(
        pytester,
        test_load=LOADER
        + """
    @pytest.mark.gpu_memory_budget(peak_allocated="219 MiB")
    def test_load():
        load()
""",
    )
    lines = run(pytester).outlines
    at = lines.index("held at the peak of allocated bytes: 220.00 MiB in 2 blocks")
    assert lines[at + 1 : at + 3] == [
        "      120.00 MiB  1 block  test_load.py:6 (load) < test_load.py:12 (test_load)",
        "      100.00 MiB  1 block  test_load.py:5 (load) < test_load.py:12 (test_load)",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("peak_alocated='1 GiB'", "unknown metric 'peak_alocated'; did you mean 'peak_allocated'?"),
        ("crad='h100-80gb'", "unknown metric 'crad'; did you mean 'card'?"),
        ("zzz=1", "unknown metric 'zzz'; known: peak_requested, *, stranded, card"),
        ("transient='2 gigs'", "transient: '2 gigs' is not a byte count; *"),
        ("transient=True", "transient: True is not a byte count; *"),
        ("transient=-1", "transient: -1 is negative; a byte count is 0 or more"),
        ("transient=2**63", "transient: the limit is beyond any memory; *"),
        ("'2 GiB'", "'2 GiB' has no name; write such as peak_allocated=*"),
        ("card=7, transient=1", "card: 7 is not the name of a card"),
        ("", "states no limit, and there is no default; give at least one of peak_requested, *"),
    ],
)
def test_a_malformed_marker_is_one_line_with_file_and_marker(pytester, arguments, message):
    prepare(
        pytester,
        test_load=f"""
            import pytest

            @pytest.mark.gpu_memory_budget({arguments})
            def test_load():
                raise AssertionError("never runs")
        """,
    )
    result = run(pytester)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(
        ["*ERROR at setup of test_load*", f"test_load.py:3: @pytest.mark.gpu_memory_budget: {message}"]
    )
    assert "Traceback" not in result.stdout.str()
    assert "During handling" not in result.stdout.str()


def test_the_nearest_statement_about_a_metric_decides(pytester):
    pytester.makepyprojecttoml("[tool.fragscope.pytest.budget]\npeak_allocated = '50 MiB'\nretained = '1 GiB'\n")
    prepare(
        pytester,
        test_load=LOADER
        + """
    pytestmark = pytest.mark.gpu_memory_budget(transient="90 MiB")

    def test_default():
        alloc(52)

    class TestHeavy:
        pytestmark = pytest.mark.gpu_memory_budget(peak_allocated="220 MiB")

        def test_module():
            load()

        @pytest.mark.gpu_memory_budget(transient="100 MiB")
        def test_own(self):
            load()

        @pytest.mark.gpu_memory_budget(transient=None, peak_allocated=None)
        def test_lifted(self):
            load()
""".replace("def test_module():", "def test_module(self):"),
    )
    result = run(pytester)
    result.assert_outcomes(passed=2, failed=2)
    result.stdout.fnmatch_lines(
        [
            "over  peak_allocated  *value 52.00 MiB  *[[]pyproject.toml: [[]tool.fragscope.pytest.budget[]][]]",
            "over  transient  budget 90.00 MiB  value 100.00 MiB  *[[]test_load.py:*[]]",
        ]
    )
    assert properties(pytester, "test_lifted").keys() & {"fragscope_budget_transient", "fragscope_budget_retained"} == {
        "fragscope_budget_retained"
    }


def test_ini_options_win_over_the_table_of_pyproject(pytester):
    pytester.makepyprojecttoml("[tool.fragscope.pytest.budget]\npeak_allocated = '50 MiB'\n")
    pytester.makefile(
        ".ini", pytest="[pytest]\nfragscope_budget =\n    peak_allocated = 60 MiB\n    stranded = 5 MiB\n"
    )
    prepare(
        pytester,
        test_load=LOADER
        + """
    def test_marked_by_its_fixture(fragscope_recorder):
        alloc(62)
""",
    )
    result = run(pytester)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        ["over  peak_allocated  budget 60.00 MiB  value 62.00 MiB  *[[]pytest.ini: fragscope_budget[]]"]
    )


@pytest.mark.parametrize(
    ("project", "ini", "message"),
    [
        (
            "[tool.fragscope.pytest.budget]\nstrandet = 1\n",
            "",
            "pyproject.toml: *unknown metric 'strandet'; did you mean 'stranded'?",
        ),
        (
            "[tool.fragscope.pytest]\nbugdet = 1\n",
            "",
            "*pyproject.toml: [[]tool.fragscope.pytest[]] has no key 'bugdet'; did you mean 'budget'?",
        ),
        (
            "[tool.fragscope.pytest]\nrequire = 'yes'\n",
            "",
            "*[[]tool.fragscope.pytest[]] require: 'yes' is neither true nor false",
        ),
        (
            "[tool.fragscope.pytest]\nbudget = '2 GiB'\n",
            "",
            "*[[]tool.fragscope.pytest[]] budget: '2 GiB' is not a table *",
        ),
        ("", "fragscope_budget = 2 GiB", "pytest.ini: fragscope_budget: '2 GiB' is no limit; *"),
        (
            "",
            "fragscope_budget = stranded = much",
            "pytest.ini: fragscope_budget: stranded: 'much' is not a byte count; *",
        ),
    ],
)
def test_malformed_defaults_are_one_line_of_each_measured_test(pytester, project, ini, message):
    pytester.makepyprojecttoml(project)
    pytester.makefile(".ini", pytest=f"[pytest]\n{ini}\n")
    prepare(
        pytester,
        test_load="""
            import pytest

            @pytest.mark.gpu_memory_budget(transient=0)
            def test_measured():
                pass

            def test_other():
                pass
        """,
    )
    result = run(pytester)
    result.assert_outcomes(errors=1, passed=1)
    result.stdout.fnmatch_lines(["*ERROR at setup of test_measured*", message])


MARKED = """
    import pytest

    @pytest.mark.gpu_memory_budget(transient=0)
    def test_marked():
        pass

    @pytest.mark.skipif(True, reason="not today")
    @pytest.mark.gpu_memory_budget(transient=0)
    def test_skipped():
        pass

    def test_recorded(fragscope_recorder):
        pass

    def test_other():
        pass
"""


def test_without_a_gpu_a_measured_test_is_skipped_with_the_reason_where_it_stands(pytester):
    prepare(pytester, WITHOUT_GPU, test_load=MARKED)
    result = run(pytester)
    result.assert_outcomes(passed=1, skipped=3)
    result.stdout.fnmatch_lines(
        ["SKIPPED [[]1[]] test_load.py:3: its GPU memory cannot be measured: there is no usable NVIDIA GPU"]
    )


@pytest.mark.parametrize("how", ["option", "ini", "table"])
def test_a_required_budget_that_is_skipped_fails(pytester, how):
    if how == "ini":
        pytester.makefile(".ini", pytest="[pytest]\nfragscope_require = true\n")
    elif how == "table":
        pytester.makepyprojecttoml("[tool.fragscope.pytest]\nrequire = true\n")
    prepare(pytester, WITHOUT_GPU, test_load=MARKED)
    result = run(pytester, *(["--fragscope-require"] if how == "option" else []))
    # The recorded test has no budget: nothing of it is required.
    result.assert_outcomes(passed=1, skipped=1, errors=2)
    result.stdout.fnmatch_lines(
        [
            "test_load.py:3: GPU memory budget not measured: its GPU memory cannot be measured: there is no usable *",
            "test_load.py:7: GPU memory budget not measured: *not today",
        ]
    )
    assert result.ret == pytest.ExitCode.TESTS_FAILED


def test_where_recording_cannot_work_the_reason_is_the_skip(pytester):
    conftest = (
        "import fake_gpu\nfake_gpu.install()\nfake_gpu.FakeGpu.broken = 'the history belongs to another recorder'\n"
    )
    prepare(pytester, conftest, test_load=MARKED)
    result = run(pytester)
    result.assert_outcomes(passed=1, skipped=3)
    result.stdout.fnmatch_lines(
        ["SKIPPED [[]1[]] test_load.py:3: its GPU memory cannot be measured: the history belongs to another recorder"]
    )


def test_a_test_that_fails_anyway_keeps_its_failure_and_shows_its_memory(pytester):
    prepare(
        pytester,
        test_load=LOADER
        + """
    @pytest.mark.gpu_memory_budget(peak_allocated="200 MiB")
    def test_load():
        load()
        assert 1 == 2
""",
    )
    result = run(pytester)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        ["E*assert 1 == 2", "*- fragscope -*", "over  peak_allocated  budget 200.00 MiB  value 220.00 MiB  *"]
    )
    assert "GPU memory over budget" not in result.stdout.str()


def test_an_expected_failure_is_one_whatever_made_it_fail(pytester):
    prepare(
        pytester,
        test_load=LOADER
        + """
    @pytest.mark.xfail(strict=True)
    @pytest.mark.gpu_memory_budget(peak_allocated="200 MiB")
    def test_load():
        load()
""",
    )
    run(pytester).assert_outcomes(xfailed=1)


def test_a_test_that_skips_itself_is_skipped(pytester):
    prepare(
        pytester,
        test_load=LOADER
        + """
    @pytest.mark.gpu_memory_budget(peak_allocated=0)
    def test_load():
        load()
        pytest.skip("no weights here")
""",
    )
    result = run(pytester)
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["SKIPPED*no weights here"])


def test_phases_are_measured_each(pytester):
    prepare(
        pytester,
        test_load=LOADER
        + """
    @pytest.mark.gpu_memory_budget(transient="90 MiB", peak_allocated="221 MiB", retained="131 MiB")
    def test_load(fragscope_recorder):
        alloc(500).free()
        with fragscope_recorder.phase("load"):
            weights = load()
        weights.free()
        with fragscope_recorder.phase("decode"):
            alloc(130)
""",
    )
    result = run(pytester)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            "over  phase load  transient  budget 90.00 MiB  value 100.00 MiB  *",
            "within  phase decode  retained *value 130.00 MiB *",
        ],
    )
    assert properties(pytester, "test_load")["fragscope_peak_allocated"] == str(220 * MIB)


def test_the_fixture_gives_the_trace(pytester):
    prepare(
        pytester,
        test_load=LOADER
        + """
    from fragscope.trace import RequestKind

    @pytest.fixture
    def after(fragscope_recorder):
        yield
        assert fragscope_recorder.trace.count(RequestKind.ALLOC) == 2

    def test_load(after, fragscope_recorder):
        assert fragscope_recorder.trace is None
        load()

    def test_stopped(fragscope_recorder):
        load()
        assert fragscope_recorder.stop().count(RequestKind.ALLOC) == 2
        alloc(300)  # no longer measured
        with pytest.raises(Exception, match="when the recording is over"):
            with fragscope_recorder.phase("late"):
                pass

    def test_nested(fragscope_recorder):
        with fragscope_recorder.phase("outer"):
            with pytest.raises(Exception, match="inside another"):
                with fragscope_recorder.phase("inner"):
                    pass
""",
    )
    run(pytester).assert_outcomes(passed=3)
    assert properties(pytester, "test_stopped")["fragscope_peak_allocated"] == str(220 * MIB)


def test_a_test_is_recorded_once(pytester):
    prepare(
        pytester,
        test_load="""
            import pytest

            def test_both(fragscope_recorder, fragscope_device):
                pass

            @pytest.mark.gpu_memory_budget(peak_allocated=0)
            def test_late(request):
                request.getfixturevalue("fragscope_recorder")
        """,
    )
    result = run(pytester)
    result.assert_outcomes(errors=1, failed=1)
    result.stdout.fnmatch_lines(
        [
            "test_load.py:3: takes both fragscope_recorder and fragscope_device; a test is recorded once",
            "test_load.py:6: fragscope_recorder came too late to record the test; take it as an argument",
        ]
    )


def test_requests_that_ran_out_of_memory_do_not_count_and_are_named(pytester):
    prepare(
        pytester,
        test_load="""
            import pytest
            from fake_gpu import alloc
            from fragscope.allocator import OutOfMemoryError

            @pytest.mark.gpu_memory_budget(peak_allocated="99 MiB")
            def test_load():
                block = alloc(100)
                with pytest.raises(OutOfMemoryError):
                    alloc(2000)
        """,
    )
    result = run(pytester)
    result.stdout.fnmatch_lines(
        ["over  peak_allocated *value 100.00 MiB *", "1 request ran out of memory and do* not count"]
    )


def test_names_with_control_characters_are_shown_escaped(pytester):
    prepare(
        pytester,
        test_load="""
            import pytest
            from fake_gpu import alloc

            @pytest.mark.gpu_memory_budget(peak_allocated=0)
            def test_load(fragscope_recorder):
                space = {"alloc": alloc}
                exec(compile("alloc(1)", "evil\\x1b[31m.py", "exec"), space)
                with fragscope_recorder.phase("red\\x1b[31m"):
                    exec(compile("alloc(1)", "evil\\x1b[31m.py", "exec"), space)
        """,
    )
    result = run(pytester)
    result.assert_outcomes(failed=1)
    section = result.stdout.str()
    assert "\x1b" not in section
    assert "phase red\\x1b[31m  peak_allocated" in section
    assert "evil\\x1b[31m.py:1" in section


def test_garbage_of_a_test_lives_until_it_is_over_whatever_the_collector_has_seen(pytester):
    """A collection in mid-test would free the cycle early; when it strikes depends on what a process did before."""
    prepare(
        pytester,
        test_load="""
            import gc
            import pytest
            from fake_gpu import alloc

            class Cycle:
                def __init__(self):
                    self.me, self.block = self, alloc(10)

                def __del__(self):
                    self.block.free()

            @pytest.mark.gpu_memory_budget(peak_allocated="100 MiB", retained="50 MiB")
            def test_load():
                for _ in range(5):
                    Cycle()
                    [[] for _ in range(5000)]  # enough for the youngest generation to be looked at

            def test_collects_again():
                assert gc.isenabled()
        """,
    )
    run(pytester).assert_outcomes(passed=2)
    assert properties(pytester, "test_load")["fragscope_retained"] == str(50 * MIB)


def test_markers_are_known(pytester):
    result = pytester.runpytest_inprocess("-p", "no:fragscope", "-p", "fragscope.pytest_plugin", "--markers")
    result.stdout.fnmatch_lines(["@pytest.mark.gpu_memory_budget(peak_requested=, peak_allocated=, *"])
