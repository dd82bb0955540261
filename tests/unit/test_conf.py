"""Conf strings: what they set, what is refused, and how a recording's settings become a conf."""

from __future__ import annotations

import random

import pytest

from fragscope.allocator import RULES, Conf, parse_conf, rules_for
from fragscope.allocator.conf import UNLIMITED, conf_from_environment, recorded_conf
from fragscope.errors import UnmodelledError, UsageError
from fragscope.trace import Settings
from fragscope.units import MIB

NEW = rules_for("2.14").rules
OLD = rules_for("2.9").rules
OFF = (0,) * 16


def rules(release: str):
    return rules_for(release).rules


@pytest.mark.parametrize(
    "text",
    [
        "",
        "backend:native",
        "expandable_segments:False",
        "expandable_segments:False,backend:native",
        " expandable_segments : False , ",
        "pinned_use_cuda_host_register:True,pinned_num_register_threads:8",
        "pinned_reserve_segment_size_mb:64",
        "pinned_max_cached_size_mb:0,pinned_max_round_threshold_mb:64,pinned_free_catch_all:True",
        "release_lock_on_cudamalloc:True",
        "large_segment_size_mb:20",
        "max_non_split_rounding_mb:20",
        "per_process_memory_fraction:1.0",
        "throw_on_cudamalloc_oom:False",
        "graph_capture_record_stream_reuse:False",
    ],
)
def test_what_does_not_move_device_blocks_is_the_default(text: str) -> None:
    assert parse_conf(text, NEW) == Conf(text)


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        ("expandable_segments:True", {"expandable_segments": True}),
        ("max_split_size_mb:128", {"max_split_size": 128 * MIB}),
        ("max_split_size_mb:-1", {"max_split_size": UNLIMITED}),
        ("garbage_collection_threshold:0.8", {"garbage_collection_threshold": 0.8}),
        ("roundup_power2_divisions:4", {"roundup_power2_divisions": (4,) * 16}),
        (
            "roundup_power2_divisions:[64:8,256:4,1024:4,>:1]",
            {"roundup_power2_divisions": (8, 8, 8, 8, 8, 8, 8, 0, 4, 0, 4, 1, 1, 1, 1, 1)},
        ),
        ("max_non_split_rounding_mb:64", {"max_non_split_rounding": 64 * MIB}),
        ("large_segment_size_mb:64", {"large_segment_size": 64 * MIB, "max_non_split_rounding": 64 * MIB}),
        ("max_split_size_mb:12,large_segment_size_mb:12", {
            "max_split_size": 12 * MIB, "large_segment_size": 12 * MIB, "max_non_split_rounding": 12 * MIB,
        }),
        ("per_process_memory_fraction:0.5", {"per_process_memory_fraction": 0.5}),
        ("throw_on_cudamalloc_oom:True", {"throw_on_cudamalloc_oom": True}),
    ],
)  # fmt: skip
def test_what_each_key_sets(text: str, settings: dict[str, object]) -> None:
    assert parse_conf(text, NEW) == Conf(text, **settings)  # type: ignore[arg-type]


def test_above_covers_the_last_named_interval_only_up_to_2_9() -> None:
    text = "roundup_power2_divisions:[64:8,>:2]"
    assert parse_conf(text, OLD).roundup_power2_divisions == (8,) * 6 + (2,) * 10
    assert parse_conf(text, NEW).roundup_power2_divisions == (8,) * 7 + (2,) * 9


def test_a_string_resets_some_settings_and_leaves_others() -> None:
    first = parse_conf(
        "max_split_size_mb:64,roundup_power2_divisions:4,garbage_collection_threshold:0.5,expandable_segments:True,"
        "large_segment_size_mb:32,max_non_split_rounding_mb:64,per_process_memory_fraction:0.5",
        NEW,
    )
    assert parse_conf("", NEW, first) == Conf(
        expandable_segments=True,
        large_segment_size=32 * MIB,
        max_non_split_rounding=32 * MIB,
        per_process_memory_fraction=0.5,
    )


@pytest.mark.parametrize(("release", "rounding"), [("2.9", 64), ("2.10", 64), ("2.11", 20), ("2.14", 20)])
def test_the_rounding_limit_is_kept_up_to_2_10(release: str, rounding: int) -> None:
    first = parse_conf("max_non_split_rounding_mb:64", rules(release))
    assert parse_conf("", rules(release), first).max_non_split_rounding == rounding * MIB


def test_the_segment_size_that_an_earlier_string_left_limits_later_ones() -> None:
    first = parse_conf("large_segment_size_mb:32", NEW)
    with pytest.raises(UsageError, match=r"at least large_segment_size \(32\)"):
        parse_conf("max_split_size_mb:31", NEW, first)


@pytest.mark.parametrize(
    ("release", "text", "message"),
    [
        ("2.11", "max_split_size_mb:10",
         "conf 'max_split_size_mb:10': max_split_size_mb is 10, but torch 2.11 wants at least large_segment_size (20)"),
        ("2.9", "max_split_size_mb:20",
         "max_split_size_mb is 20, but torch 2.9 wants more than large_segment_size (20)"),
        ("2.14", "large_segment_size_mb:10", "large_segment_size_mb is 10, but torch wants more than 10"),
        ("2.14", "max_splt_size_mb:64",
         "'max_splt_size_mb' is not a key of torch 2.14; did you mean max_split_size_mb?"),
        ("2.14", "zzz:1", "'zzz' is not a key of torch 2.14; known are backend, "),
        ("2.9", "large_segment_size_mb:20", "'large_segment_size_mb' is a key of torch 2.11 and newer, not of 2.9"),
        ("2.14", "expandable_segments", "expandable_segments has no value; write expandable_segments:value"),
        ("2.14", "expandable_segments:", "expandable_segments has no value"),
        ("2.14", "expandable_segments:true", "expandable_segments is true, but torch wants True or False, spelled so"),
        ("2.14", "a:1,,b:1", "'a' is not a key"),
        ("2.14", "expandable_segments:True,,", "a key is expected before ','; write key:value,key:value"),
        ("2.9", "expandable_segments:True:", "expandable_segments: ',' is expected before ':'"),
        ("2.14", "max_split_size_mb:abc", "max_split_size_mb is abc, but that is not a whole number"),
        ("2.14", "max_split_size_mb:99999999999999999999", "but that does not fit in 64 bits"),
        ("2.9", "max_split_size_mb:2147483648", "but that does not fit in 32 bits"),
        ("2.14", "roundup_power2_divisions:3",
         "roundup_power2_divisions is 3, but torch wants a power of two (1 is off)"),
        ("2.14", "roundup_power2_divisions:[64:3]", "is 3, but torch wants powers of two as divisions, or 0 for none"),
        ("2.14", "roundup_power2_divisions:[48:4]", "torch wants powers of two as intervals, not 48"),
        ("2.14", "roundup_power2_divisions:[x:4]", "the interval x is not a whole number"),
        ("2.14", "roundup_power2_divisions:[256:1", "the list is not closed by ']'"),
        ("2.14", "roundup_power2_divisions:[", "the list is not closed by ']'"),
        ("2.14", "backend:[native", "the list is not closed by ']'"),
        ("2.14", "garbage_collection_threshold:1",
         "is 1, but torch wants a number between 0 and 1, neither of them included"),
        ("2.14", "garbage_collection_threshold:x", "garbage_collection_threshold is x, but that is not a number"),
        ("2.14", "garbage_collection_threshold:1e-310", "but that is out of a double's range"),
        ("2.14", "per_process_memory_fraction:1.5", "is 1.5, but torch wants a number from 0 to 1"),
        ("2.14", "pinned_num_register_threads:256", "is 256, but torch wants a power of two up to 128"),
        ("2.14", "pinned_reserve_segment_size_mb:0", "is 0, but torch wants more than 0"),
        ("2.14", "backend:Native", "backend is Native, but torch has native and cudaMallocAsync"),
    ],
)  # fmt: skip
def test_what_torch_refuses_is_refused_with_the_rule(release: str, text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_conf(text, rules(release))
    assert not isinstance(caught.value, UnmodelledError)
    assert message in str(caught.value)
    assert str(caught.value).startswith("conf '")


def test_an_error_is_one_harmless_line() -> None:
    with pytest.raises(UsageError) as caught:
        parse_conf("ex\x1b[31mpand\n:1" + "x" * 5000, NEW)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1500


def test_separators_of_the_wrong_kind_pass_from_2_10() -> None:
    """PyTorch ignores what its own check of them says."""
    assert parse_conf("expandable_segments,True", NEW).expandable_segments
    with pytest.raises(UsageError, match="':' is expected before ','"):
        parse_conf("expandable_segments,True", OLD)


def test_a_tab_is_white_space_from_2_10() -> None:
    assert parse_conf("expandable_segments:\tTrue", NEW).expandable_segments
    with pytest.raises(UsageError, match="True or False"):
        parse_conf("expandable_segments:\tTrue", OLD)


@pytest.mark.parametrize(
    ("text", "key", "why"),
    [
        ("backend:cudaMallocAsync", "backend", "covers backend:native, not cudaMallocAsync"),
        ("graph_capture_record_stream_reuse:True", "graph_capture_record_stream_reuse", "does not cover"),
        ("expandable_segments:True,large_segment_size_mb:33", "large_segment_size_mb", "33 MiB are no multiple of it"),
        ("large_segment_size_mb:-1", "large_segment_size_mb", "overflow in PyTorch"),
        ("max_non_split_rounding_mb:-1", "max_non_split_rounding_mb", "overflow in PyTorch"),
        ("roundup_power2_divisions:9223372036854775808", "roundup_power2_divisions", "overflow in PyTorch"),
    ],
)
def test_what_the_model_does_not_cover_is_refused_by_key(text: str, key: str, why: str) -> None:
    with pytest.raises(UnmodelledError, match=why) as caught:
        parse_conf(text, NEW)
    assert caught.value.key == key
    assert caught.value.exit_code == 2
    assert text in str(caught.value)


def test_what_torch_refuses_comes_before_what_the_model_does_not_cover() -> None:
    with pytest.raises(UsageError, match="zzz"):
        parse_conf("backend:cudaMallocAsync,zzz:1", NEW)


def test_an_odd_segment_size_left_by_an_earlier_string_counts() -> None:
    first = parse_conf("large_segment_size_mb:33", NEW)
    with pytest.raises(UnmodelledError, match="33 MiB"):
        parse_conf("expandable_segments:True", NEW, first)


def test_the_backend_cannot_change_while_a_process_runs() -> None:
    with pytest.raises(UsageError, match="the process began with native"):
        parse_conf("backend:cudaMallocAsync", NEW, Conf())


def test_a_default_conf_has_a_label() -> None:
    assert Conf("").label == "default"
    assert Conf("backend:native").label == "backend:native"


@pytest.mark.parametrize(
    ("environ", "release", "found"),
    [
        ({}, "2.14", ("", "")),
        ({"PYTORCH_ALLOC_CONF": "a", "PYTORCH_CUDA_ALLOC_CONF": "b"}, "2.14", ("PYTORCH_CUDA_ALLOC_CONF", "b")),
        ({"PYTORCH_ALLOC_CONF": "a", "PYTORCH_CUDA_ALLOC_CONF": ""}, "2.14", ("PYTORCH_CUDA_ALLOC_CONF", "")),
        ({"PYTORCH_ALLOC_CONF": "a"}, "2.10", ("PYTORCH_ALLOC_CONF", "a")),
        ({"PYTORCH_ALLOC_CONF": "a"}, "2.9", ("", "")),
        ({"PYTORCH_HIP_ALLOC_CONF": "a"}, "2.9", ("", "")),
        ({"PYTORCH_HIP_ALLOC_CONF": "a", "PYTORCH_CUDA_ALLOC_CONF": "b"}, "2.14", ("PYTORCH_CUDA_ALLOC_CONF", "b")),
    ],
)
def test_the_first_variable_that_is_set_wins(environ: dict[str, str], release: str, found: tuple[str, str]) -> None:
    assert conf_from_environment(environ, rules(release)) == found


def test_a_variable_that_only_some_keys_are_read_from_is_refused() -> None:
    with pytest.raises(UnmodelledError, match="PYTORCH_HIP_ALLOC_CONF"):
        conf_from_environment({"PYTORCH_HIP_ALLOC_CONF": "a", "PYTORCH_ALLOC_CONF": "b"}, NEW)


DEFAULTS = {
    "PYTORCH_CUDA_ALLOC_CONF": "", "max_split_size": "-1", "garbage_collection_threshold": "0.0",
    "expandable_segments": "False", "pinned_num_register_threads": "1", "graph_capture_record_stream_reuse": "False",
    **{f"roundup_power2_divisions.{1 << i}": "0" for i in range(16)},
}  # fmt: skip


def reported(conf: Conf) -> dict[str, str]:
    """The settings as a snapshot of a process under this conf reports them."""
    return DEFAULTS | {
        "max_split_size": "-1" if conf.max_split_size == UNLIMITED else str(conf.max_split_size),
        "garbage_collection_threshold": str(conf.garbage_collection_threshold),
        "expandable_segments": str(conf.expandable_segments),
        **{f"roundup_power2_divisions.{1 << i}": str(v) for i, v in enumerate(conf.roundup_power2_divisions)},
    }


def test_a_recording_under_defaults_has_the_default_conf() -> None:
    assert recorded_conf(Settings(), NEW) == Conf()
    assert recorded_conf(Settings(recorded=DEFAULTS), NEW) == Conf()
    assert recorded_conf(Settings(recorded=DEFAULTS | {"pinned_num_register_threads": "8"}), NEW) == Conf()


def test_a_recorded_string_that_says_all_is_kept_as_it_is() -> None:
    text = " max_split_size_mb : 64 "
    conf = recorded_conf(Settings(text, recorded=reported(Conf(max_split_size=64 * MIB))), NEW)
    assert conf == Conf(text, max_split_size=64 * MIB)
    assert recorded_conf(Settings(text), NEW) == conf


@pytest.mark.parametrize(
    ("text", "changed", "spelled"),
    [
        ("", {"max_split_size": "20971520"}, "max_split_size_mb:20"),
        ("", {"garbage_collection_threshold": "0.8"}, "garbage_collection_threshold:0.8"),
        ("", {"expandable_segments": "True"}, "expandable_segments:True"),
        ("", {"roundup_power2_divisions.64": "4"}, "roundup_power2_divisions:[1:0,64:4]"),
        ("large_segment_size_mb:32", {"expandable_segments": "True"},
         "large_segment_size_mb:32,expandable_segments:True"),
        ("max_split_size_mb:64", {}, ""),  # what a string sets can be undone without one
    ],
)  # fmt: skip
def test_settings_that_earlier_strings_left_are_not_hidden_by_the_last_one(
    text: str, changed: dict[str, str], spelled: str
) -> None:
    conf = recorded_conf(Settings(text, recorded=DEFAULTS | changed), NEW)
    assert conf.text == spelled
    assert conf == parse_conf(spelled, NEW)


@pytest.mark.parametrize("row", RULES, ids=lambda r: r.release)
def test_the_text_of_a_recorded_conf_gives_its_settings(row) -> None:
    chance = random.Random(row.release)
    for _ in range(100):
        first = f"roundup_power2_divisions:[{2 ** chance.randrange(17)}:{2 ** chance.randrange(5)},>:2]"
        second = ",".join(
            chance.sample(
                [
                    f"max_split_size_mb:{chance.randrange(21, 99)}",
                    f"max_non_split_rounding_mb:{chance.randrange(21, 99)}",
                    f"garbage_collection_threshold:{chance.uniform(0.01, 0.99)}",
                    f"expandable_segments:{chance.random() < 0.5}",
                    f"roundup_power2_divisions:{2 ** chance.randrange(5)}",
                ],
                chance.randrange(6),
            )
        )
        under = parse_conf(second, row, parse_conf(first, row))
        conf = recorded_conf(Settings(second, recorded=reported(under)), row)
        assert parse_conf(conf.text, row) == conf


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_split_size", "many"),
        ("garbage_collection_threshold", "1.5"),
        ("garbage_collection_threshold", "nan"),
        ("expandable_segments", "dict"),
        ("roundup_power2_divisions.1", "3"),
        ("roundup_power2_divisions.1", "-4"),
        ("roundup_power2_divisions.65536", "4"),
        ("roundup_power2_divisions.x", "4"),
        ("graph_capture_record_stream_reuse", "True"),
    ],
)
def test_recorded_values_without_meaning_or_model_are_refused_by_key(key: str, value: str) -> None:
    with pytest.raises(UnmodelledError) as caught:
        recorded_conf(Settings(recorded=DEFAULTS | {key: value}), NEW)
    assert caught.value.key == key.partition(".")[0]


def test_recorded_values_that_the_release_cannot_have_are_refused() -> None:
    with pytest.raises(UsageError, match=r"max_split_size_mb:20\) cannot be those of torch 2\.9"):
        recorded_conf(Settings(recorded=DEFAULTS | {"max_split_size": str(20 * MIB)}), OLD)
    with pytest.raises(UsageError, match=r"cannot be those of torch 2\.14"):
        recorded_conf(Settings(recorded=DEFAULTS | {"max_split_size": str(20 * MIB + 1)}), NEW)
