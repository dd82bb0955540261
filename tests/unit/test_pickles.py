"""The reader of pickles that may be hostile: what it accepts, what it refuses, and that nothing is ever called."""

from __future__ import annotations

import copyreg
import os
import pickle
import struct
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from snapshots import hostile_pickle, small_snapshot, text

from fragscope.errors import InputFileError
from fragscope.trace import pickles
from fragscope.trace.pickles import load_plain_pickle

FILE = Path("some.pickle")


def load(data: bytes) -> Any:
    return load_plain_pickle(data, FILE)


def refusal(data: bytes) -> str:
    with pytest.raises(InputFileError) as caught:
        load(data)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("some.pickle: ")
    return caught.value.reason


plain = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.text() | st.binary() | st.integers(-(2**63), 2**64),
    lambda inner: (
        st.lists(inner, max_size=5) | st.dictionaries(st.text(), inner, max_size=5) | st.tuples(inner, inner, inner)
        | st.lists(inner, max_size=5).map(tuple)
    ),
    max_leaves=25,
)  # fmt: skip


@given(value=plain, protocol=st.sampled_from([3, 4, 5]))
def test_every_plain_value_comes_back(value: Any, protocol: int) -> None:
    assert load(pickle.dumps(value, protocol=protocol)) == value


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("pickler", [pickle._Pickler, pickle.Pickler])
def test_a_snapshot_comes_back_in_every_binary_protocol(protocol: int, pickler: Any, tmp_path: Path) -> None:
    with (tmp_path / "s").open("wb") as f:
        pickler(f, protocol=protocol).dump(small_snapshot())
    assert load((tmp_path / "s").read_bytes()) == small_snapshot()


def test_values_referred_to_twice_stay_one_value() -> None:
    shared = {"filename": "a.py"}
    value = load(pickle.dumps([shared, shared]))
    assert value[0] is value[1]


@given(value=plain)
def test_padding_with_zeros_is_accepted_and_anything_else_is_not(value: Any) -> None:
    data = pickle.dumps(value)
    assert load(data + b"\0" * 7) == value
    assert "after the pickle's end" in refusal(data + b"\0N")


class Creates:
    """Unpickling it the ordinary way would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.system, (f"touch '{self.path}'",))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"segments": [x]}, lambda x: (1, [x], "text")])
def test_a_pickle_that_would_call_something_calls_nothing(protocol: int, wrap: Any, tmp_path: Path) -> None:
    target = tmp_path / "created"
    reason = refusal(pickle.dumps(wrap(Creates(target)), protocol=protocol))
    assert "tries to run code" in reason
    assert "nothing was called" in reason
    assert not target.exists()


CALLING = {
    "GLOBAL": b"cos\nsystem\n",
    "STACK_GLOBAL": text("os") + text("system") + b"\x93",
    "REDUCE": b"N)R",
    "BUILD": b"}}b",
    "INST": b"(ios\nsystem\n",
    "OBJ": b"(No",
    "NEWOBJ": b"N)\x81",
    "NEWOBJ_EX": b"N)}\x92",
    "EXT1": b"\x82\x01",
    "EXT2": b"\x83\x01\x00",
    "EXT4": b"\x84\x01\x00\x00\x00",
    "PERSID": b"Pid\n",
    "BINPERSID": b"NQ",
    "NEXT_BUFFER": b"\x97",
    "READONLY_BUFFER": b"N\x98",
}


@pytest.mark.parametrize("name", CALLING)
def test_every_opcode_that_imports_calls_or_reaches_outside_is_refused_by_name(name: str) -> None:
    assert f"pickle opcode {name} " in refusal(hostile_pickle(CALLING[name]))


def test_registered_extensions_are_refused_even_when_python_has_them_cached() -> None:
    copyreg.add_extension("os", "system", 241)
    try:
        assert "EXT1" in refusal(hostile_pickle(b"\x82\xf1"))
    finally:
        copyreg.remove_extension("os", "system", 241)


def test_opcodes_hidden_behind_a_wrong_length_are_still_seen() -> None:
    # A walker that took the length as one byte would see only text here.
    hidden = b"cos\nsystem\n(" + text("true") + b"tR"
    assert "tries to run code" in refusal(hostile_pickle(b"\x8c\x00" + hidden))
    assert "tries to run code" in refusal(hostile_pickle(b"\x95" + struct.pack("<Q", 2**40) + hidden))


@pytest.mark.parametrize("opcode", sorted(set(range(256)) - {0x2E}))
def test_no_single_opcode_leads_to_anything_but_a_value_or_a_refusal(opcode: int) -> None:
    for tail in (b"", b"N", b"\0" * 9, text("os") * 2):
        with suppress(InputFileError):
            load(hostile_pickle(bytes([opcode]) + tail))


def test_every_truncation_is_refused() -> None:
    data = pickle.dumps(small_snapshot())
    for length in range(len(data)):
        refusal(data[:length])


@given(at=st.integers(0), value=st.integers(0, 255))
@settings(max_examples=400)
def test_a_changed_byte_gives_a_value_or_a_refusal(at: int, value: int) -> None:
    data = bytearray(pickle.dumps(small_snapshot()))
    data[at % len(data)] = value
    try:
        load(bytes(data))
    except InputFileError as e:
        assert "\n" not in str(e)


@given(body=st.lists(st.sampled_from([*b"(]}).aesut\x85\x86\x87\x94NK0q\0h\0X2\x8c\x8a1"]), max_size=60))
@settings(max_examples=600)
def test_random_structure_gives_a_value_or_a_refusal(body: list[int]) -> None:
    with suppress(InputFileError):
        load(hostile_pickle(bytes(body)))


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "no binary pickle"),
        (b"\x80", "no binary pickle"),
        (b"hello, this is text", "no binary pickle"),
        (b"PAR1 something else", "no binary pickle"),
        (b"\x80\x06N.", "protocol 6"),
        (pickle.dumps({"a": 1}, protocol=0), "no binary pickle"),
        (hostile_pickle(b"2"), "out of place"),
        (hostile_pickle(b"\x8f"), "out of place"),
        (hostile_pickle(b"NN"), "not well-formed"),
        (hostile_pickle(b"(N"), "not well-formed"),
        (hostile_pickle(b"h\x05"), "not well-formed"),
        (hostile_pickle(b"N(NNu"), "out of place"),
        (hostile_pickle(b"}(Nu"), "out of place"),
        (hostile_pickle(b"X\xff\xff\xff\xff"), "reaches past the end"),
        (hostile_pickle(b"\x8d" + b"\xff" * 8), "reaches past the end"),
    ],
)
def test_foreign_and_damaged_data_is_refused_with_the_reason(data: bytes, why: str) -> None:
    assert why in refusal(data)


@pytest.mark.parametrize("key", [b"K\x01", b"N", b"K\x01K\x02\x86", b"G" + b"\0" * 8, b"C\x01a", b"]"])
@pytest.mark.parametrize("form", [b"}%bNs", b"}(%bNu", b"}(X\x01\0\0\0aN%bNu"])
def test_only_text_may_be_a_key(key: bytes, form: bytes) -> None:
    # Hashes of numbers and tuples are not seeded: keys could be chosen to collide.
    assert "key that is not text" in refusal(hostile_pickle(form.replace(b"%b", key)))


def test_a_number_from_the_memo_is_not_taken_for_text() -> None:
    assert "key that is not text" in refusal(hostile_pickle(b"K\x01q\x00}(h\x00Nu" + b"\x860"))


def test_a_key_that_would_take_forever_to_hash_is_refused() -> None:
    # Each tuple holds the one before twice: hashing the last would take 2**200 steps.
    doubled = b"N\x85q\x00" + b"".join(b"h\x00h\x00\x86q\x00" for _ in range(200))
    assert "key that is not text" in refusal(hostile_pickle(b"}(" + doubled + b"Nu"))


def test_an_integer_longer_than_any_address_is_refused() -> None:
    assert load(pickle.dumps(2**64)) == 2**64
    assert "integer of 200 bytes" in refusal(hostile_pickle(b"\x8a\xc8" + b"\x01" * 200))
    assert "integer of 1000000 bytes" in refusal(hostile_pickle(b"\x8b" + struct.pack("<I", 10**6) + b"\x01" * 10**6))


def test_a_memo_slot_beyond_the_file_is_refused_before_it_is_allocated() -> None:
    assert "memo of 4294967295 slots" in refusal(hostile_pickle(b"Nr\xff\xff\xff\xff"))


def test_more_containers_than_a_snapshot_has_are_refused() -> None:
    bomb = hostile_pickle(b"](" + b"}" * 600_000 + b"e")
    assert "far more containers" in refusal(bomb)
    assert len(load(hostile_pickle(b"](" + b"}" * 1000 + b"e"))) == 1000


@pytest.mark.parametrize("opener", [b"]" * 100_000 + b"a" * 99_999, b"N" + b"\x85" * 100_000])
def test_deep_nesting_crashes_neither_decoding_nor_deallocation(opener: bytes, tmp_path: Path) -> None:
    file = tmp_path / "deep.pickle"
    file.write_bytes(hostile_pickle(opener))
    code = (
        "import sys; from pathlib import Path; from fragscope.trace.pickles import load_plain_pickle as load\n"
        "value = load(Path(sys.argv[1]).read_bytes(), Path('f')); del value; print('alive')"
    )
    done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "alive\n", "")


def test_the_collector_is_switched_on_again() -> None:
    import gc

    assert gc.isenabled()
    load(pickle.dumps([1]))
    refusal(b"\x80\x04N")
    assert gc.isenabled()


def many_events() -> bytes:
    """A snapshot with enough values that the walk takes whole events at once."""
    value = small_snapshot()
    frames = [{"filename": "model.py", "line": n, "name": f"function {n}"} for n in range(200)]
    for n in range(100):
        event = {"action": "alloc", "addr": 2**46 + n, "size": 2**33 + n, "stream": n, "time_us": 10**15, "x": "N/A"}
        value["device_traces"][0].append(event | {"frames": [frames[2 * n], frames[2 * n + 1]]})
        value["device_traces"][0].append(dict(event))
    return pickle.dumps(value, protocol=4)


def verdict(data: bytes) -> Any:
    try:
        return load(data)
    except InputFileError as e:
        return e.reason


@given(changes=st.lists(st.tuples(st.integers(0), st.integers(0, 255)), max_size=3))
@settings(max_examples=300)
def test_taking_whole_events_at_once_changes_no_verdict(changes: list[tuple[int, int]]) -> None:
    data = bytearray(many_events())
    for at, value in changes:
        data[len(data) // 2 + at % (len(data) // 2)] = value
    at_once = verdict(bytes(data))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pickles, "_flat_dict", lambda _: None)
        assert repr(verdict(bytes(data))) == repr(at_once)


def test_an_overwritten_memo_slot_is_not_taken_for_the_text_it_held() -> None:
    texts = b"".join(text(str(n)) + b"q" + bytes([n]) + b"0" for n in range(256))
    event = b"}\x94(h\x05K\x01u0"
    assert load(hostile_pickle(texts + event + b"N")) is None
    assert "key that is not text" in refusal(hostile_pickle(texts + event + b"K\x01q\x050" + event + b"N"))
    assert "key that is not text" in refusal(hostile_pickle(texts + event + b"K\x01r\x05\0\0\x000" + event + b"N"))


def test_code_between_events_is_seen() -> None:
    data = many_events()
    for at in range(len(data) // 2, len(data) - 1, 997):
        assert "Traceback" not in str(verdict(data[:at] + b"cos\nsystem\n" + data[at:]))
    end = data.rindex(b"u")
    assert "tries to run code" in refusal(data[: end + 1] + b"cos\nsystem\n(tR0" + data[end + 1 :])
