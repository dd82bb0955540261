"""Conf strings: what leaves device blocks alone is accepted, what does not is refused by name."""

from __future__ import annotations

import pytest

from fragscope.allocator import Conf, parse_conf, recorded_conf, rules_for
from fragscope.errors import UnmodelledError, UsageError
from fragscope.trace import Settings

RULES = rules_for("2.14").rules


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
        "release_lock_on_cudamalloc:True",
        "large_segment_size_mb:20",
        "max_non_split_rounding_mb:20",
        "per_process_memory_fraction:1.0",
        "throw_on_cudamalloc_oom:False",
    ],
)
def test_what_does_not_move_device_blocks_is_accepted(text: str) -> None:
    assert parse_conf(text, RULES) == Conf(text)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("expandable_segments:True", "expandable_segments"),
        ("max_split_size_mb:128", "max_split_size_mb"),
        ("garbage_collection_threshold:0.8", "garbage_collection_threshold"),
        ("roundup_power2_divisions:4", "roundup_power2_divisions"),
        ("roundup_power2_divisions:[256:1,512:2,>:4]", "roundup_power2_divisions"),
        ("backend:cudaMallocAsync", "backend"),
        ("large_segment_size_mb:64", "large_segment_size_mb"),
        ("max_non_split_rounding_mb:64", "max_non_split_rounding_mb"),
        ("per_process_memory_fraction:0.5", "per_process_memory_fraction"),
        ("throw_on_cudamalloc_oom:True", "throw_on_cudamalloc_oom"),
        ("graph_capture_record_stream_reuse:True", "graph_capture_record_stream_reuse"),
        ("expandable_segments:False,max_split_size_mb:64", "max_split_size_mb"),
        ("expandable_segments:true", "expandable_segments"),
    ],
)
def test_what_moves_device_blocks_is_refused_by_key(text: str, key: str) -> None:
    with pytest.raises(UnmodelledError) as caught:
        parse_conf(text, RULES)
    assert caught.value.key == key
    assert caught.value.exit_code == 2
    assert key in str(caught.value)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("no_such_key:1", "'no_such_key' is not a key of PYTORCH_ALLOC_CONF"),
        ("expandable_segments", "not of the form key:value"),
        ("expandable_segments:", "not of the form key:value"),
        ("roundup_power2_divisions:[256:1", "a bracket is not closed"),
    ],
)
def test_what_torch_would_not_read_is_a_usage_error(text: str, why: str) -> None:
    with pytest.raises(UsageError, match=why.replace("[", r"\[")):
        parse_conf(text, RULES)


def test_a_key_of_a_later_release_is_refused_with_the_release() -> None:
    with pytest.raises(UsageError, match=r"'large_segment_size_mb' is not a key of torch 2\.9"):
        parse_conf("large_segment_size_mb:20", rules_for("2.9").rules)


def test_a_default_conf_has_a_label() -> None:
    assert Conf("").label == "default"
    assert Conf("backend:native").label == "backend:native"


DEFAULTS = {
    "max_split_size": "-1", "garbage_collection_threshold": "0.0", "expandable_segments": "False",
    "roundup_power2_divisions.1": "0", "pinned_num_register_threads": "1",
}  # fmt: skip


def test_a_recording_under_defaults_has_the_default_conf() -> None:
    assert recorded_conf(Settings()) == ""
    assert recorded_conf(Settings(recorded=DEFAULTS)) == ""
    assert recorded_conf(Settings(recorded=DEFAULTS | {"pinned_num_register_threads": "8"})) == ""


def test_a_recorded_conf_string_is_passed_on_for_parsing() -> None:
    assert recorded_conf(Settings(conf="max_split_size_mb:64")) == "max_split_size_mb:64"


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("max_split_size", "20971520", "max_split_size"),
        ("garbage_collection_threshold", "0.8", "garbage_collection_threshold"),
        ("expandable_segments", "True", "expandable_segments"),
        ("roundup_power2_divisions.1", "4", "roundup_power2_divisions"),
    ],
)
def test_settings_changed_at_run_time_are_not_hidden_by_an_empty_string(key: str, value: str, named: str) -> None:
    """A snapshot's conf string is only the last one given; the effective values stand beside it."""
    with pytest.raises(UnmodelledError) as caught:
        recorded_conf(Settings(recorded=DEFAULTS | {key: value}))
    assert caught.value.key == named
