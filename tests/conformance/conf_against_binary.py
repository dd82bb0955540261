"""Conf strings, read by the releases' own binaries and by fragscope.

usage: python tests/conformance/conf_against_binary.py [--count N] [--seed N] [--write] [RELEASE ...]

Needs the oracles (oracle/build.py) and g++. Writes strings one after another, of which the later ones change what the
earlier ones left; compares whether each is accepted and every setting that is then in force. Also strings and variables
that a process starts with. ``--write`` keeps the cases and the binaries' answers for test_conf_answers.py.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import lzma
import multiprocessing
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from oracle.build import RELEASES, default_directory

from fragscope.allocator import RULES, Conf, Rules, rules_for
from fragscope.allocator.conf import UNLIMITED, conf_from_environment, effective_conf
from fragscope.errors import UnmodelledError, UsageError

HERE = Path(__file__).parent
KEPT = HERE.parent / "data" / "golden" / "conf.json.xz"
VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF", "PYTORCH_ALLOC_CONF")

Answer = list[Any] | None
"""The settings in force, or None where the string was refused."""
Answers = dict[str, list[Any]]
"""``sequences``: a list of answers for each; ``starts``: one answer for each."""


def settings_of(conf: Conf) -> list[Any]:
    """A Conf in the form of the binaries' answers."""
    return [
        conf.max_split_size,
        conf.max_non_split_rounding,
        conf.large_segment_size,
        conf.garbage_collection_threshold,
        conf.per_process_memory_fraction,
        int(conf.expandable_segments),
        int(conf.throw_on_cudamalloc_oom),
        int(conf.graph_capture_record_stream_reuse),
        *conf.roundup_power2_divisions,
    ]


def read_sequence(texts: Sequence[str], rules: Rules) -> list[Answer]:
    """What fragscope makes of strings in a running process, up to the first that it refuses."""
    conf, answers = Conf(), []
    for text in texts:
        try:
            conf = effective_conf(text, rules, conf)
        except UsageError:
            return [*answers, None]
        answers.append(settings_of(conf))
    return answers


def read_start(variables: Mapping[str, str], rules: Rules) -> Answer | str:
    """What fragscope makes of the variables that a process starts with; text where it does not cover them."""
    try:
        return settings_of(effective_conf(conf_from_environment(variables, rules)[1], rules))
    except UnmodelledError as error:
        return str(error)
    except UsageError:
        return None


class _Binary:
    """A release's settings. Each question is put to a fork, since a refused string leaves settings half changed."""

    def __init__(self, release: str) -> None:
        directory = default_directory(release)
        for variable in VARIABLES:
            os.environ.pop(variable, None)
        for library in (*directory.glob("libcudart.so.*"), *(directory / "torch/lib" / n for n in _LIBRARIES)):
            ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
        self._shim = ctypes.CDLL(str(_compiled_shim(release, directory)))
        self._shim.conf_values.restype = self._shim.conf_set.restype = ctypes.c_char_p

    def sequence(self, texts: Sequence[str]) -> list[Answer]:
        def ask() -> Iterator[Answer]:
            for text in texts:
                answer = _parsed(self._shim.conf_set(text.encode()))
                yield answer
                if answer is None:
                    return

        return list(_in_fork(ask))

    def start(self, variables: Mapping[str, str]) -> Answer:
        def ask() -> Iterator[Answer]:
            os.environ.update(variables)
            yield _parsed(self._shim.conf_values())

        return next(_in_fork(ask))


_LIBRARIES = ("libc10.so", "libc10_cuda.so")


def _compiled_shim(release: str, directory: Path) -> Path:
    source, shim = HERE / "oracle_conf" / "shim.cpp", directory / "libconf.so"
    if not shim.exists() or shim.stat().st_mtime < source.stat().st_mtime:
        major, minor = release.split(".")[:2]
        headers = [f"-I{directory / 'torch/include'}", f"-I{directory / 'cuda'}", f"-DRELEASE={major}{int(minor):02d}"]
        libraries = [f"-L{directory / 'torch/lib'}", "-lc10", "-lc10_cuda", "-Wl,--allow-shlib-undefined"]
        command = ["g++", "-std=c++20", "-O1", "-fPIC", "-shared", *headers, str(source), *libraries, "-o", str(shim)]
        subprocess.run(command, check=True)
    return shim


def _parsed(answer: bytes) -> Answer:
    """The line that the shim gives; it counts a max_split_size beyond every size as no limit, as fragscope does."""
    if answer.startswith(b"!"):
        return None
    words = answer.decode().split()
    sizes = [min(int(words[0]), UNLIMITED), int(words[1]), int(words[2])]
    return [*sizes, float(words[3]), float(words[4]), *(int(word) for word in words[5:])]


def _in_fork(ask: Any) -> Iterator[Answer]:
    """What ``ask`` yields in a child process; a child that dies ends it early."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())  # torch warns about some settings
            os.write(writer, json.dumps(list(ask())).encode())
        finally:
            os._exit(0)
    os.close(writer)
    text = b""
    while part := os.read(reader, 1 << 16):
        text += part
    os.close(reader)
    os.waitpid(child, 0)
    return iter(json.loads(text))


def binary_answers(release: str, sequences: Sequence[Sequence[str]], starts: Sequence[Mapping[str, str]]) -> Answers:
    """A release's own answers; call it in a process of its own, since only one release fits into one."""
    binary = _Binary(release)
    return {
        "sequences": [binary.sequence(texts) for texts in sequences],
        "starts": [binary.start(variables) for variables in starts],
    }


# --- cases ------------------------------------------------------------------------------------------------------------

KEYS = sorted({key for rules in RULES for key in rules.conf_keys})
_FLAGS = ["True"] * 6 + ["False"] * 6 + ["true", "TRUE", "1", "0", "Tru", "Truee", "", "False]"]
_WHOLE = [
    "0", "1", "2", "3", "4", "8", "10", "11", "12", "19", "20", "21", "22", "32", "33", "40", "64", "127", "128", "129",
    "256", "512", "1000", "1024", "4096", "32768", "65536", "1048576", "2147483647", "2147483648", "4294967296",
    "17592186044415", "17592186044416", "9223372036854775807", "9223372036854775808", "18446744073709551615",
    "18446744073709551616", "99999999999999999999999", "-1", "-20", "-2147483648", "-2147483649",
    "-9223372036854775808", "-18446744073709551615", "-18446744073709551616", "+25", "+-25", "025", "0x20", "20abc",
    "32.9", "3e1", "1_0", "abc", "", "-", "+", "\u0664", "64MB", "\u00a064", "0" * 30 + "64",
]  # fmt: skip
_REAL = [
    "0", "0.0", "-0.0", "1", "1.0", "0.5", ".5", "5.", "0.8", "0.999999999999999999999", "0.9999999999999999", "1.0001",
    "1e-1", "1E-3", "1e", "1e+", "0.5x", "-0.5", "+0.5", "nan", "inf", "-inf", "infinity", "nan(1)", "0x1p-1", "0x.8",
    "0x", "0x1p-1074", "0x1p-1075", "0x1.8p-1074", "1e-307", "1e-308", "1e-310", "1e-324", "1e-400", "0e-400", "1e400",
    "2.2250738585072014e-308", "2.2250738585072011e-308", "4.9e-324", "0,5", "abc", "", ".", "1e-99999999999999999999",
]  # fmt: skip
_LISTS = [
    "[64:8,256:4,1024:4,>:1]", "[>:8]", "[]", "[", "[64:8", "[64:8,", "[64:8,]", "[1:2]", "[2:4,1:2]", "[0:4]", "[3:4]",
    "[64:3]", "[64:0]", "[32768:2]", "[65536:2]", "[>:4,64:8]", "[64:8,>:4,256:2,>:1]", "[64]8]", "[64:8,256]",
    "[64:8:256:4]", "[64,8,256,4]", "[:8]", "[64:]", "[64:8]]", "[[64:8]]", "[64:8,,128:4]", "[>>:8]", "[>:x]",
    "[64:8,128:16,256:32,512:64,1024:128,>:256]", "[16:1,>:0]", "[64: 8, 128 :4]", "[-9223372036854775808:2]",
    "[9223372036854775808:2]", "[32768:2,>:4]", "[16384:2,>:4]", "[64:8,>:4]", "[0x40:8]", "[64x:8]", "[+64:8]",
]  # fmt: skip
_KINDS = {
    "backend": ["native"] * 8 + ["Native", "cudaMallocAsync", "x", ""],
    "roundup_power2_divisions": _LISTS + _WHOLE,
    "garbage_collection_threshold": _REAL,
    "per_process_memory_fraction": _REAL,
}
_SOON = [
    "expandable_segments:True,max_split_size_mb:64",
    "max_split_size_mb:20,max_non_split_rounding_mb:21,garbage_collection_threshold:0.8,roundup_power2_divisions:4",
    "large_segment_size_mb:32",
    "large_segment_size_mb:33,expandable_segments:True",
    "max_split_size_mb:31,large_segment_size_mb:32",
    "max_split_size_mb:12,large_segment_size_mb:12,max_non_split_rounding_mb:13",
    "max_non_split_rounding_mb:64",
    "per_process_memory_fraction:0.5,throw_on_cudamalloc_oom:True",
    "",
]
_STRUCTURE = [
    ",", ":", "[", "]", "a", "a:", "a:1", ":1", "expandable_segments", "expandable_segments:",
    ",expandable_segments:True",
    "expandable_segments:True,", "expandable_segments:True,,", "expandable_segments:True,,max_split_size_mb:64",
    "expandable_segments:True:max_split_size_mb:64", "expandable_segments:True]max_split_size_mb:64",
    "expandable_segments,True,max_split_size_mb,64", "expandable_segments[True]", "expandable_segments::True",
    "expandable_segments True", "expandable_segments=True", "expandable_segments:True max_split_size_mb:64",
    "expandable_segments:True;max_split_size_mb:64", " expandable_segments : True , ", "expandable_segments:\tTrue",
    "expandable_segments:True\n", "\tmax_split_size_mb:64", "max_split_size_mb:\t64", "max_split_size_mb:64\t",
    "max_split_size_mb:\v64", "max_split_size_mb:6 4", "max_ split_size_mb:64", "max_split_size_mb:6\t4",
    "max_split_size_mb:64,max_split_size_mb:128", "max_split_size_mb:128,max_split_size_mb:64",
    "max_split_size_mb:19,max_split_size_mb:64", "expandable_segments:True,expandable_segments:False",
    "roundup_power2_divisions:8,roundup_power2_divisions:[4:2]",
    "roundup_power2_divisions:[4:2],roundup_power2_divisions:8",
    "large_segment_size_mb:32,large_segment_size_mb:16,max_split_size_mb:16", "backend:large_segment_size_mb:32",
    "roundup_power2_divisions:[large_segment_size_mb:32]", "large_segment_size_mb", "large_segment_size_mb:",
    "large_segment_size_mb:[32]", "large_segment_size_mb:large_segment_size_mb:32", "max_split_size_mb:[64]",
    "backend:[native]", "pinned_free_catch_all:[True]", "large_segment_size_mb:[32", "unknown_key:1",
    "unknown_key:[1,2]", "unknown_key:[1", "Max_split_size_mb:64", "max_split_size:64",
    "expandable_segments:True,unknown:1",
    "expandable_segments_reserve:0.5", "expandable_segments\u00a0:True", "backend:native,expandable_segments:True",
    "expandable_segments:True,backend:native",
]  # fmt: skip


def written_sequences() -> Iterator[list[str]]:
    """Every key with every value of its kind, structure, and strings that follow one another."""
    for key in KEYS:
        flag = key not in _KINDS and not key.endswith(("_mb", "_threads"))
        for value in dict.fromkeys(_FLAGS if flag else _KINDS.get(key, _WHOLE)):
            yield [f"{key}:{value}"]
    for text in _STRUCTURE:
        yield [text]
    for first in _SOON:
        for second in _SOON:
            yield [first, second, ""]


def random_sequence(chance: random.Random) -> list[str]:
    """One to four strings, of which many are accepted by some release."""
    keys = sorted(chance.choice(RULES).conf_keys)
    return [_random_text(keys, chance) for _ in range(chance.choice((1, 1, 2, 3, 4)))]


def _random_text(keys: Sequence[str], chance: random.Random) -> str:
    text = ",".join(_random_pair(keys, chance) for _ in range(chance.choice((1, 1, 2, 3, 5))))
    for _ in range(chance.choice((0, 0, 0, 0, 1, 2))):
        at = chance.randrange(len(text) + 1)
        kept = at + chance.choice((0, 0, 1))
        text = (
            text[:at] + chance.choice(["", " ", "\t", "\n", ",", ":", "[", "]", ">", "8", "T", "x", "-"]) + text[kept:]
        )
    return text


def _random_pair(keys: Sequence[str], chance: random.Random) -> str:
    key = chance.choice(keys)
    if chance.random() < 0.8:
        return f"{key}:{_likely_value(key, chance)}"
    flag = key not in _KINDS and not key.endswith(("_mb", "_threads"))
    return f"{key}:{chance.choice(_FLAGS if flag else _KINDS.get(key, _WHOLE))}"


def _likely_value(key: str, chance: random.Random) -> str:
    """A value that most releases accept."""
    if key == "backend":
        return "native"
    if key in ("garbage_collection_threshold", "per_process_memory_fraction"):
        return repr(chance.random())
    if key == "roundup_power2_divisions":
        if chance.random() < 0.4:
            return str(2 ** chance.randrange(6))
        pairs = [
            f"{chance.choice(['>', *(str(2**i) for i in range(17))])}:{chance.choice((0, 1, 2, 4, 8, 16))}"
            for _ in range(chance.randrange(5))
        ]
        return f"[{','.join(pairs)}]"
    if key == "pinned_num_register_threads":
        return str(2 ** chance.randrange(8))
    if key.endswith("_mb"):
        return str(chance.choice((chance.randrange(11, 40), chance.randrange(20, 3000))))
    return chance.choice(("True", "False"))


def all_starts(sequences: Sequence[Sequence[str]]) -> list[dict[str, str]]:
    """What a process starts with: strings in the variable that every release reads, then combinations of variables."""
    alone = [{"PYTORCH_CUDA_ALLOC_CONF": texts[0]} for texts in sequences if "cudaMallocAsync" not in texts[0]]
    texts = (None, "", "max_split_size_mb:64", "max_split_size_mb:128,graph_capture_record_stream_reuse:True", "nope:1")
    return alone + [
        {variable: text for variable, text in zip(VARIABLES, chosen, strict=True) if text is not None}
        for chosen in ((a, b, c) for a in texts for b in texts for c in texts)
    ]


# --- comparison -------------------------------------------------------------------------------------------------------


def differences(rules: Rules, sequences: Any, starts: Any, answers: Answers) -> Iterator[str]:
    """One line for each case that fragscope reads otherwise than the binary."""
    for texts, answer in zip(sequences, answers["sequences"], strict=True):
        own = read_sequence(texts, rules)
        if own != answer:
            yield f"torch {rules.release}: {texts!r}: fragscope {own}, the binary {answer}"
    for variables, answer in zip(starts, answers["starts"], strict=True):
        started = read_start(variables, rules)
        if started != answer and not isinstance(started, str):
            yield f"torch {rules.release}, started with {variables!r}: fragscope {started}, the binary {answer}"


def keep(sequences: Any, starts: Any, answers: Mapping[str, Answers]) -> None:
    """Write the cases, with each answer as its place in a list of different ones."""
    places: dict[str, int] = {}

    def place(answer: Answer) -> int:
        return places.setdefault(json.dumps(answer), len(places))

    releases = {
        release: {
            "sequences": [[place(answer) for answer in sequence] for sequence in own["sequences"]],
            "starts": [place(answer) for answer in own["starts"]],
        }
        for release, own in answers.items()
    }
    kept = {"sequences": sequences, "starts": starts, "answers": [json.loads(a) for a in places], "releases": releases}
    KEPT.write_bytes(lzma.compress(json.dumps(kept, separators=(",", ":")).encode(), preset=9 | lzma.PRESET_EXTREME))


def kept() -> tuple[Any, Any, dict[str, Answers]]:
    """Sequences, starts and answers by release, as ``keep`` wrote them."""
    data = json.loads(lzma.decompress(KEPT.read_bytes()))
    answers = data["answers"]
    releases = {
        release: {
            "sequences": [[answers[i] for i in sequence] for sequence in own["sequences"]],
            "starts": [answers[i] for i in own["starts"]],
        }
        for release, own in data["releases"].items()
    }
    return data["sequences"], data["starts"], releases


def main() -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("releases", nargs="*", default=list(RELEASES), metavar="RELEASE")
    parser.add_argument("--count", type=int, default=2000, help="random sequences beside the written ones")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true", help=f"keep cases and answers in {KEPT.name}")
    given = parser.parse_args()
    chance = random.Random(given.seed)
    sequences = [*written_sequences(), *(random_sequence(chance) for _ in range(given.count))]
    starts = all_starts(sequences)
    answers: dict[str, Answers] = {}
    found = 0
    for release in given.releases:
        with multiprocessing.get_context("fork").Pool(1) as process:
            answers[release] = own = process.apply(binary_answers, (release, sequences, starts))
        for line in differences(rules_for(release).rules, sequences, starts, own):
            print(line)
            found += 1
        strings = [answer for sequence in own["sequences"] for answer in sequence] + own["starts"]
        refused = sum(answer is None for answer in strings)
        print(f"torch {release}: {len(strings)} strings, {refused} of them refused", file=sys.stderr)
    print(f"{found} differences", file=sys.stderr)
    if given.write:
        keep(sequences, starts, answers)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
