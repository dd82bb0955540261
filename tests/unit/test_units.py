"""Byte counts as users write and read them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fragscope.errors import UsageError
from fragscope.units import MOST_MEMORY, format_bytes, mib, parse_bytes, parse_memory


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("0", 0), ("512", 512), (512, 512), ("1 KiB", 1024), ("1kB", 1000), ("2 GiB", 2 * 1024**3), ("2GB", 2 * 10**9),
        ("24 MB", 24_000_000), ("1.5 MiB", 1_572_864), (" 7 MiB ", 7 * 1024**2), ("0.5 KiB", 512), ("1 TiB", 1024**4),
    ],
)  # fmt: skip
def test_binary_and_decimal_units(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize(
    "text", ["", "GiB", "2 gib", "2 G", "-1", "1e9", "2 GiB 3", "0x10", "1.1 B", "nan", True, 1.5, None, -1]
)
def test_anything_else_is_an_error_that_names_the_place(text):
    with pytest.raises(UsageError, match="--capacity"):
        parse_bytes(text, "--capacity")


@given(st.integers(0, 2**60))
def test_a_bare_integer_is_bytes(count):
    assert parse_bytes(str(count)) == count == parse_bytes(f"{count} B")


def test_people_read_mib_where_engineers_compare_them():
    assert format_bytes(0) == "0 B"
    assert format_bytes(2048) == "2.00 KiB"
    assert format_bytes(9012 * 1024**2) == "9,012.00 MiB"
    assert format_bytes(40 * 1024**3) == "40.00 GiB"
    assert format_bytes(-(3 * 1024**2)) == "-3.00 MiB"
    assert mib(1024**2 * 5 // 2) == "2.50"


def test_more_memory_than_any_device_has_is_refused() -> None:
    assert parse_memory("16 TiB", "--capacity") == MOST_MEMORY == 2**44
    with pytest.raises(UsageError, match=r"--capacity: 17 TiB is more than any device has; 16,384.00 GiB are the most"):
        parse_memory("17 TiB", "--capacity")
