"""The shapes in models.toml against bytes published for the same models, and models files of strangers."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scenarios"))

from moe_models import gated_preset, launched, preset, whole_preset

from fragscope.errors import InputFileError, UsageError
from fragscope.thresholds import MoeModel, chosen, load_models
from fragscope.thresholds import shipped_models as models

MIB, GIB = 1024**2, 1024**3

# One whole layer: FP8 w13 and w2, then NVFP4 w13, w2, w13 scales and w2 scales; rounded as published.
PUBLISHED = {
    "deepseek-v3": (7.0 * GIB, 3.5 * GIB, 3.5 * GIB, 1.75 * GIB, 448 * MIB, 224 * MIB),
    "kimi-k2": (10.5 * GIB, 5.25 * GIB, 5.25 * GIB, 2.625 * GIB, 672 * MIB, 336 * MIB),
    "kimi-k3": (18.4 * GIB, 9.2 * GIB, 9.2 * GIB, 4.6 * GIB, 1176 * MIB, 588 * MIB),
    "glm-5": (6.0 * GIB, 3.0 * GIB, 3.0 * GIB, 1.5 * GIB, 384 * MIB, 192 * MIB),
    "glm-4.5": (2.34 * GIB, 1.17 * GIB, 1.17 * GIB, 0.59 * GIB, 150 * MIB, 75 * MIB),
    "glm-4.5-air": (1.375 * GIB, 0.69 * GIB, 0.69 * GIB, 0.34 * GIB, 88 * MIB, 44 * MIB),
    "qwen3-235b-a22b": (1.5 * GIB, 0.75 * GIB, 0.75 * GIB, 0.375 * GIB, 96 * MIB, 48 * MIB),
    "qwen3-30b-a3b": (384 * MIB, 192 * MIB, 192 * MIB, 96 * MIB, 24 * MIB, 12 * MIB),
    "qwen3-next-80b": (1.0 * GIB, 0.5 * GIB, 512 * MIB, 256 * MIB, 64 * MIB, 32 * MIB),
    "minimax-m2": (2.25 * GIB, 1.125 * GIB, 1.125 * GIB, 0.56 * GIB, 144 * MIB, 72 * MIB),
    "nemotron-3-super": (1.31 * GIB, 1.31 * GIB, 672 * MIB, 672 * MIB, 84 * MIB, 84 * MIB),
    "nemotron-3-nano": (609 * MIB, 609 * MIB, 304 * MIB, 304 * MIB, 38 * MIB, 38 * MIB),
    "llama-4-scout": (1.25 * GIB, 0.625 * GIB, 640 * MIB, 320 * MIB, 80 * MIB, 40 * MIB),
}
# gpt-oss is published in MXFP4: 4-bit matrices and one byte of scale for 32 values.
PUBLISHED_MXFP4 = {
    "gpt-oss-120b": (1012 * MIB, 506 * MIB, 63 * MIB, 32 * MIB),
    "gpt-oss-20b": (253 * MIB, 127 * MIB, 16 * MIB, 8 * MIB),
}


def elements(name: str) -> tuple[int, int]:
    model = models()[name]
    return model.experts * model.w13_rows * model.hidden, model.experts * model.hidden * model.intermediate


def test_every_model_has_published_bytes_and_a_source():
    assert set(models()) == set(PUBLISHED) | set(PUBLISHED_MXFP4)
    assert all(m.source for m in models().values())


@pytest.mark.parametrize("name", PUBLISHED)
def test_bytes_of_one_layer(name):
    w13, w2 = elements(name)
    ours = (w13, w2, w13 // 2, w2 // 2, w13 // 16, w2 // 16)
    assert ours == pytest.approx(PUBLISHED[name], rel=0.012)


@pytest.mark.parametrize("name", PUBLISHED_MXFP4)
def test_bytes_of_one_layer_in_mxfp4(name):
    w13, w2 = elements(name)
    assert (w13 // 2, w2 // 2, w13 // 32, w2 // 32) == pytest.approx(PUBLISHED_MXFP4[name], rel=0.02)


def test_a_shard_divides_the_width_of_each_expert():
    assert preset("deepseek-v3", tp=8, layers=4) == {"experts": 256, "hidden": 7168, "intermediate": 256, "layers": 4}


def test_a_width_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="not divisible"):
        preset("deepseek-v3", tp=7, layers=1)


def test_a_whole_layer_is_launched():
    wanted = {"experts": 512, "top_k": 22, "hidden": 1024, "intermediate": 2688, "tokens": 5}
    assert launched("nemotron-3-super", 5) == wanted


def test_a_users_models_are_read(tmp_path):
    file = tmp_path / "own.toml"
    file.write_text("[mine]\nexperts = 8\ntop_k = 2\nhidden = 64\nintermediate = 32\ngated = false\n")
    assert load_models(file) == {"mine": MoeModel("mine", 8, 2, 64, 32, gated=False)}


GOOD = "experts = 8\ntop_k = 2\nhidden = 64\nintermediate = 32\n"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "line 1: holds no model; write a table such as [my-model] with experts, top_k, hidden, intermediate"),
        ("mine = 3", "line 1: mine is not a table; write ['mine'] and its keys below"),
        ("[[mine]]\n" + GOOD, "line 1: mine is not a table; write ['mine'] and its keys below"),
        ("[mine]\nexperts = 8", "line 1: mine: top_k is missing; a model needs experts, top_k, hidden, intermediate"),
        ("[mine]\nexpert = 8\n", "line 2: mine: unknown key 'expert'; did you mean 'experts'?"),
        ("[mine]\n" + GOOD + "layers = 0\n", "line 6: mine: layers is 0; write an integer from 1 to 4,096"),
        ("[mine]\nexperts = true\n", "line 2: mine: experts is True; write an integer from 1 to 65,536"),
        ("[mine]\nexperts = 8.0\n", "line 2: mine: experts is 8.0; write an integer from 1 to 65,536"),
        ("[mine]\nexperts = -1\n", "line 2: mine: experts is -1; write an integer from 1 to 65,536"),
        (f"[mine]\nexperts = {'9' * 5000}\n", "line 2: holds a number of 5,000 digits"),
        (f"[mine]\nhidden = 0x{'f' * 900}\n", "line 2: mine: hidden is "),
        ("[mine]\nhidden = 65\n", "line 2: mine: hidden is 65; NVFP4 needs a multiple of 16"),
        ("[mine]\n" + GOOD + "gated = 1\n", "line 6: mine: gated is 1; write true or false"),
        ("[mine]\nsource = 'a\tb'\n", "line 2: mine: source is not one printable line of at most 200 characters"),
        ("[mine]\n" + GOOD.replace("top_k = 2", "top_k = 9"), "line 3: mine: top_k is 9, but there are 8 experts"),
        ('["<b>"]\n' + GOOD, "line 1: '<b>' names no model; use lower-case letters, digits, '.', '_' and '-'"),
        ('["a\\u001b[31m"]\n' + GOOD, "line 1: 'a\\x1b[31m' names no model"),
        ("[mine\n", "line 1: Expected ']' at the end of a table declaration"),
        ("[a]\nb = " + "[" * 200, "line 2: is nested deeper than any model"),
    ],
)
def test_a_bad_models_file_is_one_clear_line(tmp_path, text, complaint):
    file = tmp_path / "own.toml"
    file.write_text(text)
    with pytest.raises(InputFileError) as raised:
        load_models(file)
    assert str(raised.value).startswith(f"{file}: {complaint}")
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 600


def test_a_models_file_that_is_none(tmp_path):
    for name, content, complaint in [
        ("missing.toml", None, "no such file or directory"),
        ("latin.toml", b"[mine]\n# \xe4", "line 2: is not UTF-8 text"),
        ("long.toml", b"#" * (MIB + 1), "holds more than 1.00 MiB; that is not a models file"),
    ]:
        file = tmp_path / name
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(InputFileError, match=complaint):
            load_models(file)


def test_models_are_chosen_by_name_in_the_order_of_the_table():
    names = [m.name for m in chosen(models(), ("qwen3-next-80b", "deepseek-v3"))]
    assert names == ["deepseek-v3", "qwen3-next-80b"]
    assert len(chosen(models(), ())) == len(models())
    with pytest.raises(UsageError, match="no model named 'deepseek'; did you mean 'deepseek-v3'"):
        chosen(models(), ("deepseek",))


def test_a_preset_says_whether_experts_are_gated():
    """Nemotron's have an up projection only."""
    assert gated_preset("llama-4-scout", tp=8, layers=3)["gated"] is True
    assert gated_preset("nemotron-3-super", tp=1, layers=3)["gated"] is False


def test_a_whole_model_has_all_its_layers():
    assert whole_preset("deepseek-v3", tp=4) == {"experts": 256, "hidden": 7168, "intermediate": 512, "layers": 58}


def test_a_whole_model_of_unknown_depth_is_refused():
    with pytest.raises(ValueError, match=r"kimi-k3: models\.toml has no number of layers"):
        whole_preset("kimi-k3", tp=4)
