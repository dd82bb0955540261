"""The JSON file beside a snapshot: what it says replaces what the snapshot leaves out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from builders import CONFS, TRACES

from fragscope.errors import InputFileError
from fragscope.trace import RequestLog, SegmentState, Settings, Trace, with_sidecar
from fragscope.units import MIB

TRACE = Trace(
    RequestLog().finish(),
    torch="2.11",
    settings=Settings(conf="max_split_size_mb:64", recorded={"max_split_size": "67108864"}),
    source="snapshot",
)


def told(tmp_path: Path, **said: Any) -> Trace:
    path = tmp_path / "side.json"
    path.write_text(json.dumps(said))
    return with_sidecar(TRACE, path)


def refusal(path: Path) -> str:
    with pytest.raises(InputFileError) as caught:
        with_sidecar(TRACE, path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    return caught.value.reason


def test_every_key_has_its_place(tmp_path: Path) -> None:
    trace = told(
        tmp_path, torch="2.11.0+cu130", conf="expandable_segments:True", memory_fraction=0.25, total_memory=2**34,
        capacity=2**33, card="h100-80gb",
    )  # fmt: skip
    assert trace == replace(
        TRACE,
        torch="2.11.0+cu130",
        card="h100-80gb",
        device_total=2**34,
        settings=replace(TRACE.settings, conf="expandable_segments:True", memory_fraction=0.25, capacity=2**33),
    )


def test_its_conf_says_how_large_the_pages_of_the_large_pool_are(tmp_path: Path) -> None:
    def ranges(*pages: int) -> tuple[SegmentState, ...]:
        return tuple(SegmentState(2**40 * n, 2**26, 0, 0, (), page) for n, page in enumerate(pages))

    path = tmp_path / "side.json"
    path.write_text(json.dumps({"conf": "expandable_segments:True,large_segment_size_mb:32"}))
    before = replace(TRACE, initial=ranges(0, 2 * MIB, 20 * MIB), final=ranges(20 * MIB))
    after = with_sidecar(before, path)
    assert after.initial == ranges(0, 2 * MIB, 32 * MIB)
    assert after.final == ranges(32 * MIB)
    path.write_text(json.dumps({"card": "h100-80gb"}))
    assert with_sidecar(before, path).initial == before.initial


def test_what_it_does_not_say_stays(tmp_path: Path) -> None:
    assert told(tmp_path) == TRACE


def test_an_empty_conf_is_said_too(tmp_path: Path) -> None:
    assert told(tmp_path, conf="").settings.conf == ""


def test_a_fraction_of_nothing_is_said_too(tmp_path: Path) -> None:
    assert told(tmp_path, memory_fraction=0).settings.memory_fraction == 0.0


def test_the_name_that_cuda_reports_serves_where_no_profile_is_named(tmp_path: Path) -> None:
    assert told(tmp_path, gpu="NVIDIA H100 80GB HBM3").card == "NVIDIA H100 80GB HBM3"
    assert told(tmp_path, gpu="NVIDIA H100 80GB HBM3", card="h100-80gb").card == "h100-80gb"


def test_other_keys_may_stand_beside_them(tmp_path: Path) -> None:
    assert told(tmp_path, memory_stats={"num_ooms": 3}, marks=[[1, ""]], free_at_start=4) == TRACE


@pytest.mark.parametrize("name", ["oom-default", "fp8-dsv3-tp8.orig.split20", *CONFS])
def test_the_files_beside_the_stored_recordings_are_such(name: str) -> None:
    path = TRACES / f"{name}.json"
    said, trace = json.loads(path.read_text()), with_sidecar(TRACE, path)
    assert trace.torch == "2.11.0+cu130"
    assert trace.card == "NVIDIA H100 80GB HBM3"
    assert trace.device_total == 85_017_493_504
    assert trace.settings.conf == said["conf"]
    assert trace.settings.memory_fraction == said.get("memory_fraction")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "is not a sidecar: Input data was truncated"),
        (b"{", "is not a sidecar: Input data was truncated"),
        (b"torch: 2.11", "is not a sidecar: JSON is malformed"),
        (b"\x80\x04]", "is not a sidecar"),
        (b'{"conf": "\xff\xfe"}', "is not a sidecar"),
        (b"[" * 200_000, "is not a sidecar"),
        (b'{"x": ' + b"[" * 200_000, "is not a sidecar"),
        (b"[]", "Expected `object`, got `array`"),
        (b"3", "Expected `object`, got `int`"),
        (b'{"torch": 2.11}', "Expected `str | null`, got `float` - at `$.torch`"),
        (b'{"conf": ["a"]}', "Expected `str | null`, got `array` - at `$.conf`"),
        (b'{"memory_fraction": "0.2"}', "Expected `float | null`, got `str` - at `$.memory_fraction`"),
        (b'{"total_memory": 1.5}', "Expected `int | null`, got `float` - at `$.total_memory`"),
        (b'{"capacity": true}', "Expected `int | null`, got `bool` - at `$.capacity`"),
        (b'{"memory_fraction": -0.1}', "'memory_fraction' is -0.1, not between 0 and 1"),
        (b'{"memory_fraction": 1.01}', "'memory_fraction' is 1.01, not between 0 and 1"),
        (b'{"memory_fraction": 1e999}', "is not a sidecar"),
        (b'{"capacity": 0}', "'capacity' is 0, which is no device's memory in bytes"),
        (b'{"capacity": -5}', "'capacity' is -5, which is no device's memory in bytes"),
        (b'{"total_memory": 4611686018427387904}', "'total_memory' is 4611686018427387904, which is no device's"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(content: bytes, why: str, tmp_path: Path) -> None:
    path = tmp_path / "side.json"
    path.write_bytes(content)
    assert why in refusal(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none.json") == "no such file or directory"


def test_a_folder_is_not_a_file(tmp_path: Path) -> None:
    assert refusal(tmp_path) == "is a folder, not a file"


def test_a_file_too_large_to_be_one_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "large.json"
    with path.open("wb") as f:
        f.truncate(16 * 2**20 + 1)
    assert refusal(path) == "is too large for what a recording leaves out"
