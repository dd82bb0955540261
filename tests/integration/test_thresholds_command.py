"""``fragscope thresholds`` as a user calls it."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
from pathlib import Path

import pytest
from commands import error_of, json_of

from fragscope.cli import run
from fragscope.thresholds import most_tokens, shipped_models

GIB = 1024**3


@pytest.fixture(scope="module")
def documented(tmp_path_factory):
    """What one call prints and writes: all shipped models, which takes a while."""
    out, printed = tmp_path_factory.mktemp("thresholds"), io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert run(["thresholds", "--torch", "2.11.0", "--format", "markdown", "--out", str(out)]) == 0
    return printed.getvalue(), json.loads((out / "thresholds.json").read_text())


def test_every_shipped_model_has_its_limits(documented):
    _, answer = documented
    assert answer["schema_version"] == 1
    assert (answer["max_grid_y"], answer["upstream_cap"]) == (65_535, 300_000)
    assert answer["settings"]["card"] == "h100-80gb"
    assert [m["name"] for m in answer["models"]] == list(shipped_models())
    super_ = next(m for m in answer["models"] if m["name"] == "nemotron-3-super")
    assert super_["tokens"]["launch_grid"] == 378_344
    assert super_["tokens"]["launch_grid_by_tile"]["64"] == 189_183
    for model in answer["models"]:
        tokens = model["tokens"]
        assert tokens["binds"] == "upstream cap"
        assert tokens["largest"] == 300_000 < min(tokens["launch_grid"], tokens["memory"])
        assert 0 < tokens["recommended"] < tokens["largest"]
        assert model["peak_at_recommended"]["reserved"] < model["peak_at_largest"]["reserved"]
        assert model["assumptions"] == []


def test_memory_and_tile_change_what_binds(capsys):
    arguments = ["--model", "qwen3-next-80b", "--free", "4 GiB"]
    (model,) = json_of("thresholds", capsys, *arguments)["models"]
    tokens = model["tokens"]
    assert (tokens["binds"], tokens["largest"]) == ("memory", tokens["memory"])
    assert 3 * GIB < model["peak_at_largest"]["reserved"] <= 4 * GIB

    (model,) = json_of("thresholds", capsys, "--model", "qwen3-next-80b", "--tile", "16")["models"]
    assert model["tokens"]["binds"] == "launch grid"
    assert model["tokens"]["largest"] == most_tokens(10, 512, 16) == 104_089


def test_more_memory_than_the_card_has_stands_for_a_larger_card(capsys):
    small = json_of("thresholds", capsys, "--model", "deepseek-v3")
    large = json_of("thresholds", capsys, "--model", "deepseek-v3", "--free", "170 GiB")
    assert large["settings"]["total"] == large["settings"]["capacity"] == 170 * GIB
    assert large["models"][0]["tokens"]["memory"] > 2 * small["models"][0]["tokens"]["memory"]


def test_conf_and_release_decide_what_is_reserved(capsys):
    def peak(*arguments: str) -> int:
        answer = json_of("thresholds", capsys, "--model", "kimi-k3", *arguments)
        return answer["models"][0]["peak_at_largest"]["reserved"]

    assert peak("--conf", "expandable_segments:True") <= peak() < peak("--conf", "roundup_power2_divisions:4")
    assert json_of("thresholds", capsys, "--torch", "2.9.1", "--model", "kimi-k3")["settings"]["rules"] == "2.9"


def test_rules_that_stand_in_are_named(capsys):
    assert run(["thresholds", "--model", "glm-5", "--torch", "99.0"]) == 0
    assert "rules_assumed (effect unknown" in capsys.readouterr().out


def test_text_names_limits_and_what_they_do_not_know(capsys):
    assert run(["thresholds", "--model", "minimax-m2", "--model", "glm-5"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"1,044,511 .* 300,000 +300,000 .* glm-5 \(upstream cap\)", text)
    assert "the kernels' own workspaces are not known" in text
    assert "measured by vLLM (#43599)" in text
    assert "its speed was not measured" in text


def test_markdown_has_a_row_for_each_model(capsys):
    assert run(["thresholds", "--format", "markdown", "--model", "glm-5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.endswith("glm-5 (upstream cap) |")]) == 1
    assert len([line for line in lines if line.endswith("| glm-5 |")]) == 1


def test_a_folder_gets_page_json_and_csv(tmp_path, capsys):
    out = tmp_path / "new" / "folder"
    answer = json_of("thresholds", capsys, "--model", "gpt-oss-20b", "--out", str(out))
    assert sorted(p.name for p in out.iterdir()) == ["thresholds.csv", "thresholds.html", "thresholds.json"]
    assert json.loads((out / "thresholds.json").read_text()) == answer
    with (out / "thresholds.csv").open(newline="") as f:
        rows = list(csv.DictReader(f))
    curve = answer["models"][0]["curve"]
    assert [(int(r["tokens"]), int(r["reserved"])) for r in rows] == [(p["tokens"], p["reserved"]) for p in curve]
    assert {r["fits"] for r in rows} == {"1"}
    assert "gpt-oss-20b" in (out / "thresholds.html").read_text()


def test_models_of_ones_own_take_the_place_of_the_shipped(tmp_path, capsys):
    file = tmp_path / "own.toml"
    file.write_text("[mine]\nexperts = 64\ntop_k = 4\nhidden = 4096\nintermediate = 1024\n")
    (model,) = json_of("thresholds", capsys, "--models", str(file))["models"]
    assert (model["name"], model["tokens"]["launch_grid"]) == ("mine", most_tokens(4, 64, 128))


def test_several_cards_are_answered_one_after_the_other(tmp_path, capsys):
    out = tmp_path / "out"
    cards = ["--card", "l4", "--card", "b200", "--card", "l4"]
    both = json_of("thresholds", capsys, "--model", "deepseek-v3", *cards, "--out", str(out))
    alone = [json_of("thresholds", capsys, "--model", "deepseek-v3", "--card", card) for card in ("l4", "b200")]
    assert both.pop("other_cards") == [alone[1]]
    assert both == alone[0]
    # A launch takes at least what its largest tensor does, 2 bytes for each of 7,168 numbers of 8 rows a token.
    assert both["models"][0]["tokens"]["memory"] < 23_583_784_960 // (2 * 7168 * 8) < 300_000
    assert sorted(file.parent.name for file in out.rglob("thresholds.json")) == ["b200", "l4"]
    assert json.loads((out / "l4" / "thresholds.json").read_text()) == both


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--free", "9 GiB", "--card", "l4", "--card", "a10"], "--free: it says what is free of one card"),
        (["--model", "deepseek"], "--model: no model named 'deepseek'; did you mean 'deepseek-v3'?"),
        (["--card", "h100"], "--card: no profile named 'h100'"),
        (["--free", "lots"], "--free: 'lots' is not a byte count"),
        (["--free", "17 TiB"], "--free: 17 TiB is more than any device has"),
        (["--tile", "100"], "'100' is not one of"),
        (["--conf", "nonsense:1"], "nonsense"),
        (["--torch", "1.13"], "--torch: 1.13 is older than the oldest rules known"),
    ],
)
def test_a_wrong_call_is_one_line(capsys, arguments, complaint):
    assert complaint in error_of("thresholds", capsys, *arguments)


def test_a_bad_models_file_is_one_line(tmp_path, capsys):
    file = tmp_path / "own.toml"
    file.write_text("[mine]\nexperts = 64\n")
    message = error_of("thresholds", capsys, "--models", str(file), code=5)
    assert f"{file}: line 1: mine: top_k is missing" in message


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    message = error_of("thresholds", capsys, "--model", "glm-5", "--out", str(tmp_path / "file" / "x"))
    assert "cannot be written (not a directory)" in message


def test_without_memory_no_launch_fits(capsys):
    (model,) = json_of("thresholds", capsys, "--model", "glm-5", "--free", "1 MiB")["models"]
    assert (model["tokens"]["largest"], model["tokens"]["recommended"]) == (0, 0)
    assert model["tokens"]["binds"] == "memory"
    assert model["peak_at_largest"]["reserved"] == 0


def test_the_documented_tables_are_those_of_the_command(documented):
    printed, _ = documented
    made = printed.strip()
    assert made in (Path(__file__).parents[2] / "docs" / "thresholds.md").read_text()


@pytest.mark.parametrize(
    ("free", "said"),
    [
        ("200 GiB", "fragscope: h100-80gb has 79.18 GiB; it is taken to have 200.00 GiB, as --free says\n"),
        ("70 GiB", ""),
    ],
)
def test_more_than_the_card_has_is_said(free: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What cudaMemGetInfo says an H100 has in all: 81,079 MiB (fragscope/allocator/cards.py)."""
    assert run(["thresholds", "--model", "glm-5", "--card", "h100-80gb", "--free", free]) == 0
    assert capsys.readouterr().err == said
