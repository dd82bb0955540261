"""``fragscope gate --against REF`` in repositories made here: what a change costs, and which line costs it."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from textwrap import dedent

import pytest
from repositories import FILES, LOADER, PROJECT, SCENARIO, Team, git

pytest.importorskip("torch")
pytestmark = pytest.mark.torch

MIB = 2**20
CASE = "acme-experts/small/loader"
EXPERT = 2 * 704 * 1024 * 2  # bytes of one expert's w13 in bfloat16; its w2 is half of that
WHERE = "acme/loader.py"

STEPS = '''\
"""What loaders do, one step each; sizes are MiB."""

import torch

CACHE = {}


def on_card(mib, dtype=torch.uint8):
    return torch.empty(mib * 2**20, dtype=dtype, device="cuda")


def listed():
    parts = [on_card(64), on_card(64)]
    whole = torch.cat(parts)
    del parts
    return torch.cat([whole, whole])


def deleted():
    first = on_card(256)
    total = first[:1].clone()
    del first
    second = on_card(256)


def viewed(weight):
    part = weight[:128 * 2**20]
    return part


def scratched():
    scratch = on_card(128)
    scratch.zero_()


def typed():
    weight = on_card(64, torch.uint8)
    weight.zero_()


def chunked():
    for _ in range(8):
        chunk = on_card(32)
        chunk.zero_()


def per_layer(layers):
    buffer = on_card(96)
    for layer in range(layers):
        buffer.zero_()


def cached(key):
    value = on_card(160)
    return value.sum() if False else None


def remembered(size, seen=None):
    seen = [] if seen is None else seen
    seen.append(on_card(size))
'''
STEP_SCENARIOS = """\
import torch
from acme import steps

import fragscope


def step(name, call):
    @fragscope.scenario(name, presets={"p": {}}, variant="v")
    def _(case):
        weight = steps.on_card(256)
        with case.measure():
            kept = call(weight)


step("listed", lambda weight: steps.listed())
step("deleted", lambda weight: steps.deleted())
step("viewed", lambda weight: steps.viewed(weight))
step("scratched", lambda weight: steps.scratched())
step("typed", lambda weight: steps.typed())
step("chunked", lambda weight: steps.chunked())
step("per-layer", lambda weight: steps.per_layer(4))
step("cached", lambda weight: [steps.cached(key) for key in range(3)])
step("remembered", lambda weight: [steps.remembered(48) for _ in range(3)])
"""
STEP_FILES = {**FILES, "acme/steps.py": STEPS, "scenarios/scenario_acme.py": STEP_SCENARIOS}
SEEDED = [
    # what is written for what; case, metric, by how many MiB it is more; the line that holds it, and why
    (("    del parts\n", ""), "listed", "transient", 128, "parts = [on_card(64), on_card(64)]", "longer"),
    (("    del first\n", ""), "deleted", "transient", 256, "first = on_card(256)", "longer"),
    (("    return part\n", "    return part.clone()\n"), "viewed", "retained", 128, "return part.clone()", ""),
    (("scratch = on_card(128)", "scratch = on_card(2 * 128)"), "scratched", "transient", 128, "(2 * 128)", "larger"),
    (("on_card(64, torch.uint8)", "on_card(64, torch.int32)"), "typed", "transient", 192, "torch.int32", "larger"),
    (("range(8):\n        chunk = on_card(32)", "range(1):\n        chunk = on_card(8 * 32)"), "chunked", "transient",
     192, "on_card(8 * 32)", ""),
    (("    for layer in range(layers):\n        buffer.zero_()", "    buffers = [on_card(96) for _ in range(layers)]"),
     "per-layer", "transient", 384, "buffers = [on_card(96)", ""),
    (("    return value.sum() if False else None\n", "    CACHE[key] = value\n"), "cached", "retained", 480,
     "value = on_card(160)", "longer"),
    (("seen=None):\n    seen = [] if seen is None else seen", "seen=[]):"), "remembered", "retained", 144,
     "seen.append(on_card(size))", "longer"),
]  # fmt: skip


def test_seeded_regressions_are_found_with_case_metric_and_line(tmp_path: Path) -> None:
    """One edit for each case; sizes follow from what is written there."""
    team = Team.made(tmp_path / "theirs", STEP_FILES)
    for (old, new), *_ in SEEDED:
        team.edit("acme/steps.py", old, new)
    gated = team.gate()
    assert gated.code == 3, gated.err
    assert gated.verdict["against"]["compared"] == len(SEEDED)
    assert {c["case"]["scenario"] for c in gated.regressions} == {name for _, name, *_ in SEEDED}
    for _, name, metric, more, text, why in SEEDED:
        (change,) = [c for c in gated.regressions if (c["case"]["scenario"], c["metric"]) == (name, metric)]
        assert change["after"] - change["before"] == more * MIB, name
        place = change["stacks"][0]
        assert (place["file"], place["line"]) == ("acme/steps.py", team.line("acme/steps.py", text)), name
        assert text in place["code"]
        assert place["why"] == why, name
        if metric == "retained":
            assert sum(s["after"] - s["before"] for s in change["stacks"]) == more * MIB


def test_the_message_names_the_line_its_cost_and_where_the_peak_is_now(tmp_path: Path) -> None:
    """All experts' swapped weights are kept: beside the last of them only the copy of one w2 is needed."""
    team = Team.made(tmp_path / "theirs")
    was = team.run()
    team.edit(
        WHERE, "        for expert in range(experts):\n", "        kept = []\n        for expert in range(experts):\n"
    )
    made = "            swapped = torch.cat([up, gate])\n"
    team.edit(WHERE, made, f"{made}            kept.append(swapped)\n")
    now = team.run()
    gated = team.gate()
    change = gated.regressed("transient")
    (before,), (after,) = was.values(), now.values()
    assert (change["before"], change["after"]) == (before["transient"], after["transient"])
    requested = gated.regressed("peak_requested")
    assert (requested["before"], requested["after"]) == (before["peak"]["requested"], after["peak"]["requested"])
    (held,) = requested["stacks"]
    assert (held["line"], held["kind"], held["why"]) == (team.line(WHERE, "swapped = torch.cat"), "grown", "longer")
    assert (held["before"], held["after"]) == (EXPERT, 8 * EXPERT)  # while the last w2 is copied
    assert requested["peak_after"]["line"] == team.line(WHERE, "down = self.w2")
    assert requested["peak_before"]["code"] == "swapped = torch.cat([up, gate])"
    text = team.gate(layout="text")
    line = team.line(WHERE, "swapped = torch.cat")
    was_held, is_held = (change["stacks"][0][key] / MIB for key in ("before", "after"))
    held_text = f"held {was_held:.2f} MiB, now {is_held:.2f} MiB: the same memory is kept longer"
    assert f"acme/loader.py:{line}  swapped = torch.cat([up, gate])  {held_text}" in text.out
    assert text.out.splitlines()[-1].startswith("fail: 2 values regressed; 1 case of ")


HARMLESS = {
    "a local is renamed": ("swapped", "turned"),
    "comments move every line": (
        '"""Expert weights of one MoE layer',
        "# a line\n" * 30 + '"""Expert weights of one MoE layer',
    ),
    "a function is extracted": (
        "            down = self.w2.data[expert].clone()\n"
        "            self.w2.data[expert].view(down.shape[1], hidden).copy_(down.t())\n",
        "            self._turn_w2(expert, hidden)\n",
    ),
}
EXTRACTED = """
    def _turn_w2(self, expert: int, hidden: int) -> None:
        down = self.w2.data[expert].clone()
        self.w2.data[expert].view(down.shape[1], hidden).copy_(down.t())
"""


def refactored(team: Team) -> None:
    text = LOADER
    for old, new in HARMLESS.values():
        assert old in text
        text = text.replace(old, new)
    team.write({"acme/weights.py": text + EXTRACTED})
    (team.folder / WHERE).unlink()
    team.edit("scenarios/scenario_acme.py", "acme.loader", "acme.weights")


def test_refactorings_stay_green_and_do_not_hide_what_costs(tmp_path: Path) -> None:
    """Renamed file, renamed local, moved lines and an extracted function, all at once; then one line that costs."""
    team = Team.made(tmp_path / "theirs")
    refactored(team)
    gated = team.gate()
    assert (gated.code, gated.verdict["decision"], gated.regressions) == (0, "pass", [])
    # The copy of a w2 ends with the extracted function now, and no more when the next one is made.
    better = {c["metric"]: c["before"] - c["after"] for c in gated.verdict["changes"] if c["improved"]}
    assert better["peak_requested"] == EXPERT // 2
    team.edit(
        "acme/weights.py",
        "gate, up = self.w13.data[expert].chunk(2)",
        "gate, up = self.w13.data[expert].clone().chunk(2)",
    )
    gated = team.gate()
    assert gated.code == 3
    change = gated.regressed("peak_requested")
    assert change["after"] - change["before"] == EXPERT // 2
    places = {place["code"]: place for place in change["stacks"]}
    place = places["gate, up = self.w13.data[expert].clone().chunk(2)"]
    assert (place["file"], place["kind"], place["before"]) == ("acme/weights.py", "new", 0)
    assert place["after"] % EXPERT == 0
    assert place["line"] == team.line("acme/weights.py", ".clone().chunk(2)")


# --- whose code runs ----------------------------------------------------------------------------------------------

COSTLY = ("            swapped = torch.cat([up, gate])\n", "            swapped = torch.cat([up, gate]).clone()\n")


def moved_to(folder: str) -> dict[str, str]:
    """The repository with its package below a folder."""
    return {(f"{folder}/{name}" if name.startswith("acme/") else name): text for name, text in FILES.items()}


def finder(folder: Path, package: Path) -> dict[str, str]:
    """An editable install by a finder that comes before every path, as meson-python and scikit-build-core make them."""
    text = f"""
        import sys
        from importlib.machinery import PathFinder

        class Finder:
            @staticmethod
            def find_spec(name, path=None, target=None):
                return PathFinder.find_spec(name, [{str(package)!r}]) if name == "acme" else None

        sys.meta_path.insert(0, Finder)
    """
    (folder / "sitecustomize.py").write_text(dedent(text))
    return {"PYTHONPATH": os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH", ""))))}


def test_an_install_that_leads_every_import_to_one_tree_is_refused(tmp_path: Path) -> None:
    team = Team.made(tmp_path / "theirs")
    team.edit(WHERE, *COSTLY)
    gated = team.gate(environment=finder(tmp_path, team.folder))
    assert (gated.code, gated.out) == (2, "")
    assert "base (" in gated.err
    assert (
        "imports acme from another tree of the repository, acme/__init__.py: both sides would run the same code"
        in gated.err
    )
    assert "import_paths" in gated.err


def test_an_installed_copy_is_refused_until_the_project_says_where_its_code_lies(tmp_path: Path) -> None:
    team = Team.made(tmp_path / "theirs", moved_to("lib"))
    site = tmp_path / "env" / "site-packages"
    information = site / "acme-1.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1\n")
    (information / "RECORD").write_text("acme/__init__.py,,\nacme/loader.py,,\n")
    (site / "acme").mkdir()
    (site / "acme" / "__init__.py").write_text("")
    (site / "acme" / "loader.py").write_text(LOADER)
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH", ""))))}
    team.edit("lib/acme/loader.py", *COSTLY)
    gated = team.gate(environment=environment)
    assert (gated.code, gated.out) == (2, "")
    assert "from the copy that is installed" in gated.err
    # Only the working tree says it; the other side's code lies there, too.
    team.edit("pyproject.toml", "[tool.fragscope]\n", '[tool.fragscope]\nimport_paths = ["lib"]\n')
    gated = team.gate(environment=environment)
    assert gated.code == 3, gated.err
    assert gated.regressed("peak_requested")["stacks"][0]["file"] == "lib/acme/loader.py"


def test_a_src_layout_that_is_on_the_import_path_runs_from_each_tree(tmp_path: Path) -> None:
    """A .pth file, as editable installs of setuptools and hatchling write, puts the folder on the import path."""
    team = Team.made(tmp_path / "theirs", moved_to("src"))
    team.edit("src/acme/loader.py", *COSTLY)
    environment = {
        "PYTHONPATH": os.pathsep.join(filter(None, (str(team.folder / "src"), os.environ.get("PYTHONPATH", ""))))
    }
    gated = team.gate(environment=environment)
    assert gated.code == 3, gated.err
    change = gated.regressed("peak_requested")
    assert change["after"] - change["before"] == EXPERT
    assert change["stacks"][0]["file"] == "src/acme/loader.py"


# --- scenarios of one side ----------------------------------------------------------------------------------------


def test_the_pull_request_that_brings_the_gate_is_gated(tmp_path: Path) -> None:
    """The other commit has the loader, and neither a scenario nor a line about fragscope."""
    bare = {name: text for name, text in FILES.items() if not name.startswith("scenarios/")}
    team = Team.made(tmp_path / "theirs", {**bare, "pyproject.toml": '[project]\nname = "acme"\n'})
    shared = SCENARIO.replace("PRESETS = {", "from shapes import LAYERS\nPRESETS = {").replace(
        '"layers": 2', '"layers": LAYERS'
    )
    team.write({"pyproject.toml": PROJECT, "scenarios/scenario_acme.py": shared, "scenarios/shapes.py": "LAYERS = 2\n"})
    team.edit(WHERE, *COSTLY)
    gated = team.gate()
    assert gated.code == 3, gated.err
    assert gated.regressed("peak_requested")["stacks"][0]["line"] == team.line(WHERE, "torch.cat([up, gate]).clone()")
    assert any("scenarios/scenario_acme.py is not in base" in note for note in gated.verdict["against"]["notes"])
    assert git(team.folder, "status", "--porcelain").split() == ["M", WHERE, "M", "pyproject.toml", "??", "scenarios/"]


def test_what_only_one_side_has_is_said_and_fails_nothing(tmp_path: Path) -> None:
    """A loader that comes with its scenario, a case that goes, a preset that changes; what is left is compared."""
    extra = SCENARIO.replace('"acme-experts"', '"old"')
    grown = SCENARIO.replace('"acme-experts"', '"grown"')
    team = Team.made(
        tmp_path / "theirs", {**FILES, "scenarios/scenario_old.py": extra, "scenarios/scenario_grown.py": grown}
    )
    (team.folder / "scenarios" / "scenario_old.py").unlink()
    team.edit("scenarios/scenario_grown.py", '"experts": 8', '"experts": 16')
    team.write({"acme/fresh.py": LOADER})
    fresh = SCENARIO.replace("acme.loader", "acme.fresh").replace('"acme-experts"', '"fresh"')
    team.write({"scenarios/scenario_fresh.py": fresh})
    gated = team.gate()
    assert gated.code == 0, gated.err
    verdict = gated.verdict
    assert verdict["against"]["compared"] == 1
    assert {one["case"]["scenario"]: one["reason"] for one in verdict["appeared"]}.keys() == {"fresh", "grown"}
    reasons = {one["case"]["scenario"]: one["reason"] for one in verdict["appeared"]}
    assert reasons["grown"] == "its values are others: experts 8 → 16"
    assert "No module named 'acme.fresh'" in reasons["fresh"]
    assert [one["case"]["scenario"] for one in verdict["removed"]] == ["old"]


def test_a_package_that_comes_with_the_change_is_new_where_the_project_is_editable(tmp_path: Path) -> None:
    """A .pth file, here what it does, leads the import of what the other commit lacks to the working tree."""
    team = Team.made(tmp_path / "theirs")
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.path.append({str(team.folder)!r})\n")
    fresh = SCENARIO.replace("acme.loader", "acme2.loader").replace('"acme-experts"', '"fresh"')
    team.write({"acme2/__init__.py": "", "acme2/loader.py": LOADER, "scenarios/scenario_fresh.py": fresh})
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH", ""))))}
    gated = team.gate(environment=environment)
    assert gated.code == 0, gated.err
    assert gated.verdict["against"]["compared"] == 1
    (new,) = gated.verdict["appeared"]
    assert new["case"]["scenario"] == "fresh"
    assert "No module named 'acme2'" in new["reason"]


# --- outcomes, limits ---------------------------------------------------------------------------------------------

ENDS = """\
import torch
from acme.ends import size, stop

import fragscope


@fragscope.scenario("ends", presets={"p": {}}, variant="fits")
def ends(case):
    with case.measure():
        kept = torch.empty(64 * 2**20, dtype=torch.uint8, device="cuda")
        kept = [kept, torch.empty(size() * 2**20, dtype=torch.uint8, device="cuda")]


@ends.variant("stops", role="fixed")
def _(case):
    with case.measure():
        kept = torch.empty(64 * 2**20, dtype=torch.uint8, device="cuda")
        stop(kept)


@ends.variant("unsorted", role="fixed")
def _(case):
    with case.measure():
        kept = torch.empty(2**20, device="cuda")
        from acme.ends import order
        order(kept)
"""
ENDS_CODE = """\
def size():
    return 64


def stop(tensor):
    float(tensor[0])


def order(tensor):
    return tensor
"""


def test_outcomes_limits_and_what_is_not_measured_are_said(tmp_path: Path) -> None:
    budgets = '[budget."ends/*/*"]\npeak_reserved = "1 GiB"\n\n[budget."ends/p/fits"]\nretained = "128 MiB"\n'
    files = {**FILES, "scenarios/scenario_acme.py": ENDS, "acme/ends.py": ENDS_CODE, "budgets.toml": budgets}
    team = Team.made(tmp_path / "theirs", files)
    team.edit("acme/ends.py", "return 64", "return 90 * 1024")
    team.edit("acme/ends.py", "    float(tensor[0])\n", "    pass\n")
    team.edit("acme/ends.py", "    return tensor\n", "    return tensor.mode()\n")
    team.edit("budgets.toml", '"1 GiB"', '"1.5 GiB"')
    team.edit("budgets.toml", 'retained = "128 MiB"', "transient = 0")
    gated = team.gate()
    assert gated.code == 3, gated.err
    verdict = gated.verdict
    outcomes = {o["case"]["variant"]: o for o in verdict["outcomes"]}
    assert {k: (o["before"], o["after"], o["regressed"]) for k, o in outcomes.items()} == {
        "fits": ("ok", "oom", True),
        "stops": ("unsupported", "ok", False),
    }
    assert outcomes["fits"]["place"]["line"] == team.line("scenarios/scenario_acme.py", "kept = [kept,")
    assert verdict["undeclared"] == []
    assert any(
        n["case"] and n["case"]["variant"] == "unsorted" and "mode" in n["reason"] for n in verdict["not_measured"]
    )
    policy = [(p["what"], p["metric"], p["kind"], p["before"], p["after"]) for p in verdict["policy"]]
    assert policy == [
        ("ends/*/*", "peak_reserved", "raised", 1024 * MIB, 1536 * MIB),
        ("ends/p/fits", "retained", "removed", 128 * MIB, None),
        ("ends/p/fits", "transient", "new", None, 0),
    ]
    assert verdict["budgets"] == 2
    first = team.gate(layout="text").out.splitlines()[0]
    assert (
        first
        == "policy  budgets.toml:2  ends/*/*  peak_reserved  raised by 512.00 MiB, from 1,024.00 MiB to 1,536.00 MiB"
    )


def test_a_budget_holds_for_the_working_tree_in_the_same_verdict(tmp_path: Path) -> None:
    """The same limit on both sides, which a tolerated change breaks."""
    budgets = '[budget."acme-experts/*/*"]\npeak_allocated = 1\n'
    team = Team.made(tmp_path / "theirs", {**FILES, "budgets.toml": budgets})
    gated = team.gate()
    assert gated.code == 3
    assert gated.verdict["changes"] == []
    assert [c["metric"] for c in gated.verdict["checks"] if c["over"]] == ["peak_allocated"]
    assert gated.verdict["policy"] == []
    assert "both sides are the same code" in gated.verdict["against"]["notes"][0]


# --- repositories of all kinds ------------------------------------------------------------------------------------


def test_a_project_in_a_subfolder_with_a_submodule_and_a_hook(tmp_path: Path) -> None:
    """The loader is the submodule's; its old commit is what the other side needs."""
    library = Team.made(tmp_path / "library", {"acme/__init__.py": "", "acme/loader.py": LOADER})
    files = {name: text for name, text in FILES.items() if not name.startswith("acme/")}
    files["pyproject.toml"] += 'import_paths = ["vendor"]\n'
    team = Team.made(tmp_path / "theirs", {f"project/{name}": text for name, text in files.items()}, commit=False)
    git(
        team.folder, "-c", "protocol.file.allow=always", "submodule", "-q", "add", str(library.folder), "project/vendor"
    )
    team.commit("base")
    hook = team.folder / ".git" / "hooks" / "post-checkout"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text(f"#!/bin/sh\ntouch {tmp_path}/the-hook-ran\n")
    hook.chmod(0o755)
    inner = Team(team.folder / "project" / "vendor")
    inner.edit("acme/loader.py", *COSTLY)
    inner.commit()
    before = git(team.folder, "status", "--porcelain", "--ignored")
    gated = team.gate(inside="project")
    assert gated.code == 3, gated.err
    change = gated.regressed("peak_requested")
    assert change["stacks"][0]["file"] == "project/vendor/acme/loader.py"
    assert change["after"] - change["before"] == EXPERT
    assert not (tmp_path / "the-hook-ran").exists()
    assert git(team.folder, "worktree", "list").count("\n") == 1
    after = [
        line for line in git(team.folder, "status", "--porcelain", "--ignored").splitlines() if ".fragscope" not in line
    ]
    assert after == before.splitlines()


OWN_CARD = PROJECT + '\n[tool.fragscope.cards.mine]\nlike = "l4"\ntotal = "{0} GiB"\nfree = "{0} GiB"\n'


def test_cards_of_the_repository_itself_are_one_on_both_sides(tmp_path: Path) -> None:
    """The change makes the card smaller than the case needs; what that does is not what its code costs."""
    needs = SCENARIO.replace('"experts": 8', '"experts": 400')  # two layers of 1,650 MiB
    files = {**FILES, "pyproject.toml": OWN_CARD.format(8), "scenarios/scenario_acme.py": needs}
    team = Team.made(tmp_path / "theirs", files)
    team.write({"pyproject.toml": OWN_CARD.format(2).replace("scenarios =", 'card = "mine"\nscenarios =')})
    small = team.gate().verdict
    assert [(c["case"]["card"], c["outcome"]) for c in small["undeclared"]] == [("mine", "oom")]
    assert small["against"]["compared"] == 1
    assert small["policy"][0]["detail"] == "card was the default, now mine"
    both = team.gate("--card", "mine", "--card", "l4", "--card", "mine").verdict
    assert [c["case"]["card"] for c in both["undeclared"]] == ["mine"]
    assert both["against"]["compared"] == 2


def test_the_verdict_is_the_same_every_time(tmp_path: Path) -> None:
    team = Team.made(tmp_path / "theirs")
    team.edit(WHERE, *COSTLY)
    assert len({team.gate().out for _ in range(3)}) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_nothing_behind(tmp_path: Path, number: signal.Signals) -> None:
    waits = SCENARIO.replace(
        "    with case.measure():\n", "    import time\n    time.sleep(600)\n    with case.measure():\n"
    )
    team = Team.made(tmp_path / "theirs", {**FILES, "scenarios/scenario_acme.py": waits})
    temporary = Path(tempfile.mkdtemp(dir="/tmp"))  # sockets of workers need a short path
    process = subprocess.Popen(
        team.command(), cwd=team.folder, env=os.environ | {"TMPDIR": str(temporary)}, stderr=subprocess.PIPE, text=True
    )
    logs = [team.folder / ".fragscope" / "against" / side / "logs" for side in ("before", "after")]
    until = time.monotonic() + 120
    while not all(any(folder.glob("*.log")) for folder in logs if folder.parent.exists()) or not logs[0].exists():
        assert time.monotonic() < until and process.poll() is None, "no case was ever begun"
        time.sleep(0.1)
    begun = [os.pidfd_open(child) for child in children(process.pid)]
    assert len(begun) >= 4  # on each side the process itself and a server of workers
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "fragscope: interrupted"
    assert git(team.folder, "worktree", "list").count("\n") == 1
    assert not (team.folder / ".git" / "worktrees").exists() or not list((team.folder / ".git" / "worktrees").iterdir())
    assert list(temporary.glob("fragscope*")) == []
    for child in begun:
        assert select.select([child], [], [], 60)[0], "a process is still there"
        os.close(child)


def children(pid: int) -> list[int]:
    """All processes below one."""
    direct = [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return direct + [below for child in direct for below in children(child)]


# --- calls that are wrong -----------------------------------------------------------------------------------------


@pytest.fixture
def team(tmp_path: Path) -> Team:
    return Team.made(tmp_path / "theirs")


@pytest.mark.parametrize(
    ("against", "words"),
    [
        ("bsae", ["no branch, tag or commit of that name is here", "did you mean base?"]),
        ("zzz", ["there are base, work"]),
        ("0123456789012345678901234567890123456789", ["no branch, tag or commit"]),
        ("-x", ["is no name of a commit"]),
        ("a\nb", ["is no name of a commit"]),
    ],
)
def test_a_commit_that_is_not_here_is_a_usage_error(team: Team, against: str, words: list[str]) -> None:
    gated = team.gate(f"--against={against}", against="base")
    assert (gated.code, gated.out) == (2, "")
    assert gated.err.count("\n") == 1
    for word in words:
        assert word in gated.err


def test_a_shallow_clone_is_told_what_to_fetch(team: Team, tmp_path: Path) -> None:
    git(tmp_path, "clone", "-q", "--depth=1", f"file://{team.folder}", "shallow")
    gated = Team(tmp_path / "shallow").gate(against="release-1")
    assert gated.code == 2
    assert "the clone is shallow; 'git fetch --depth=1 origin release-1' gets it" in gated.err
    assert "fetch-depth: 0" in gated.err
    parent = Team(tmp_path / "shallow").gate(against="HEAD^1")
    assert parent.code == 2
    assert "'git fetch --unshallow' gets it (actions/checkout: fetch-depth: 2 for HEAD^1" in parent.err


def test_a_branch_that_only_the_remote_has_is_the_nearest(team: Team, tmp_path: Path) -> None:
    git(tmp_path, "clone", "-q", f"file://{team.folder}", "clone")
    gated = Team(tmp_path / "clone").gate(against="base")
    assert gated.code == 2
    assert "did you mean origin/base?" in gated.err


def test_other_calls_that_are_wrong(team: Team, tmp_path: Path) -> None:
    def refused(*arguments: str, folder: Path = team.folder, code: int = 2) -> str:
        done = Team(folder).gate(*arguments)
        assert (done.code, done.out) == (code, "")
        assert done.err.count("\n") == 1
        return done.err

    assert "takes no results" in refused("results.json")
    assert "h900" in refused("--card", "h900")
    assert "is no share" in refused("--tolerance", "200 %")
    assert "is not a byte count" in refused("--tolerance", "much")
    done = subprocess.run(
        [sys.executable, "-m", "fragscope", "gate", "--only", "x"],
        cwd=team.folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (2, "fragscope: --only goes with --against REF\n")
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "pyproject.toml").write_text(PROJECT)
    assert "is in none" in refused(folder=alone)
    team.write({"pyproject.toml": "[tool.fragscope]\n"})
    assert "no scenarios are configured" in refused()


def test_a_scenario_file_whose_name_is_not_utf8_is_refused(team: Team) -> None:
    team.write({os.fsdecode(b"scenarios/scenario_caf\xe9.py"): SCENARIO})
    gated = team.gate()
    assert (gated.code, gated.out) == (2, "")
    assert "scenario_caf\\udce9.py: the name is not UTF-8, and cannot be compared; rename it\n" in gated.err
    assert "Traceback" not in gated.err


def test_a_scenario_that_cannot_be_imported_ends_the_command_and_the_other_side(team: Team) -> None:
    team.edit("scenarios/scenario_acme.py", "import torch\n", "import torch\nimport nowhere\n")
    gated = team.gate()
    assert (gated.code, gated.out) == (2, "")
    assert "the working tree: scenarios/scenario_acme.py: cannot be imported: line 2:" in gated.err
    assert git(team.folder, "worktree", "list").count("\n") == 1
