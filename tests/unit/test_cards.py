"""Device profiles: what ships equals what was published, and a repository defines its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from builders import own_settings
from requests_of import MIB, trace_of

from fragscope.allocator import CARDS, OF_PROGRAM, Replay, ReplaySettings, card_like, card_named, replay, rules_for
from fragscope.allocator.cards import Card, defined, is_shipped
from fragscope.allocator.cards import define as forget
from fragscope.allocator.own_cards import use_cards_of
from fragscope.errors import InputFileError, UsageError
from fragscope.testing.options import read_options
from fragscope.trace import Settings, Trace

GIB = 2**30
# As published (the sources are named in allocator/cards.py): memory in all in MiB as printed there, compute capability,
# multiprocessors, L2 in MiB.
PUBLISHED = {
    "NVIDIA A10": (22_516, (8, 6), 72, 6),
    "NVIDIA A10G": (22_587, (8, 6), 80, 6),
    "NVIDIA L4": (22_491, (8, 9), 58, 48),
    "NVIDIA L40S": (45_373, (8, 9), 142, 96),
    "NVIDIA L40": (45_373, (8, 9), 142, 96),
    "NVIDIA GeForce RTX 4090": (24_081, (8, 9), 128, 72),
    "NVIDIA RTX 6000 Ada Generation": (48_622, (8, 9), 142, 96),
    "NVIDIA A100-SXM4-40GB": (40_339, (8, 0), 108, 40),
    "NVIDIA A100-PCIE-40GB": (40_339, (8, 0), 108, 40),
    "NVIDIA A100-SXM4-80GB": (81_158, (8, 0), 108, 40),
    "NVIDIA A100 80GB PCIe": (81_038, (8, 0), 108, 40),
    "NVIDIA H100 80GB HBM3": (81_079, (9, 0), 132, 50),
    "NVIDIA H100 PCIe": (81_106, (9, 0), 114, 50),
    "NVIDIA GH200 480GB": (97_280, (9, 0), 132, 60),
    "NVIDIA H200 NVL": (143_156, (9, 0), 132, 60),
    "NVIDIA RTX PRO 6000 Blackwell Server Edition": (97_250, (12, 0), 188, 128),
    "NVIDIA B300 SXM6 AC": (274_074, (10, 3), 148, 126.5),  # 267.7 GiB, from 267.65 on
    "NVIDIA H200": (143_156, (9, 0), 132, 60),
    "NVIDIA B200": (182_631, (10, 0), 148, 126.5),
}


@pytest.fixture(autouse=True)
def _nothing_stays_defined(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield
    forget(())


def shipped() -> list[Card]:
    return [card for card in CARDS.values() if is_shipped(card.name)]


def test_every_shipped_card_is_as_it_was_published() -> None:
    found = {c.product: (round(c.total / MIB), c.capability, c.multiprocessors, c.l2 / MIB) for c in shipped()}
    assert found == PUBLISHED


def test_what_nobody_measured_is_marked() -> None:
    assert [card.name for card in shipped() if card.measured] == ["h100-80gb"]
    for card in shipped():
        assert card.measured or {"total", "free"} <= set(card.estimated)
        assert card.total - card.free == 85_017_493_504 - 84_465_090_560, "what a context took of the H100"
        assert card.source


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("a11", "a10"),
        ("A100", "a100-40gb"),
        ("h100", "h100-80gb"),
        ("l41", "l4"),
        ("H200", "h200"),
        ("b30", "b300"),
        ("4090", "rtx-4090"),
    ],
)
def test_an_unknown_card_is_answered_with_the_nearest(wrong: str, near: str) -> None:
    with pytest.raises(UsageError, match=f"--card: no profile named '{wrong}'; did you mean .*{near}") as found:
        card_named(wrong)
    assert "known cards: a10, a100-40gb" in str(found.value)


def test_a_card_is_recognised_by_what_cuda_calls_it() -> None:
    assert card_like("NVIDIA A100 80GB PCIe", None) == CARDS["a100-80gb-pcie"]
    assert card_like("NVIDIA A10", CARDS["a10"].total + 1) is None
    assert card_like("NVIDIA GeForce RTX 4090 D", None) is None


# --- what an estimate changes -------------------------------------------------------------------------------------


def effects(found: Replay) -> dict[str, str]:
    return {a.code: a.effect for a in found.assumptions}


def on_a10(*requests: tuple, conf: str = "", **settings: object) -> Replay:
    trace = trace_of(*requests, card="a10", source="virtual")
    own = ReplaySettings.on(CARDS["a10"], rules_for("2.13"), conf)
    for name, value in settings.items():
        own = getattr(own, f"with_{name}")(value)
    return replay(trace, own, compiled=False)


def test_estimated_memory_counts_where_little_of_it_is_left() -> None:
    little = on_a10(("alloc", 0, GIB))
    assert effects(little) == {"free_estimated": "none", "total_estimated": "none"}
    assert little.exact
    for requests in ([("alloc", 0, 21 * GIB)], [("alloc", 0, 30 * GIB)]):
        found = on_a10(*requests)
        assert effects(found)["free_estimated"] == "unknown"
        assert not found.exact
    named = on_a10(("alloc", 0, 21 * GIB), capacity=22 * GIB)
    assert "free_estimated" not in effects(named), "somebody who knows the card said so"
    assert named.exact


def test_estimated_memory_in_all_counts_where_a_share_of_it_is_allowed() -> None:
    assert effects(on_a10(("alloc", 0, GIB), fraction=0.5))["total_estimated"] == "unknown"
    assert effects(on_a10(("alloc", 0, GIB)))["total_estimated"] == "none"


def test_a_measured_card_is_taken_at_its_word() -> None:
    settings = ReplaySettings.on(CARDS["h100-80gb"], rules_for("2.13"))
    assert replay(trace_of(("alloc", 0, 78 * GIB)), settings, compiled=False).assumptions == ()


def recorded(card: str, **fields: object) -> Trace:
    settings = Settings(conf="", capacity=CARDS[card].free)
    return trace_of(("alloc", 0, 21 * GIB), card=card, source="virtual", settings=settings, **fields)


def test_a_trace_of_a_virtual_card_says_what_was_estimated_of_it() -> None:
    assert (
        effects(replay(recorded("a10"), own_settings(recorded("a10")), compiled=False))["free_estimated"] == "unknown"
    )
    measured = trace_of(
        ("alloc", 0, 21 * GIB),
        card="NVIDIA A10",
        device_total=CARDS["a10"].total,
        settings=Settings(conf="", capacity=22 * GIB),
    )
    assert "free_estimated" not in effects(replay(measured, own_settings(measured), compiled=False))


def test_requests_of_another_card_may_be_others() -> None:
    trace = recorded("h100-80gb")
    own = own_settings(trace)
    assert "other_card" not in effects(replay(trace, own, compiled=False))
    there = replay(trace, own.with_card(CARDS["l40s"]), compiled=False)
    assert effects(there)["other_card"] == "unknown"
    assert not there.exact
    assert "other_card" in OF_PROGRAM, "of unchanged requests, fit and others still say what is exact"
    like = replay(trace, own.with_card(CARDS["h200"]), compiled=False)
    assert "other_card" not in effects(like), "same capability, same multiprocessors: only memory differs"
    other_driver = replace(trace, card="NVIDIA H100 80GB HBM3", device_total=CARDS["h100-80gb"].total - 2**20)
    asked = own_settings(other_driver).with_card(CARDS["h100-80gb"])
    assert "other_card" not in effects(replay(other_driver, asked, compiled=False)), "the same product"


def test_moving_to_a_card_leaves_nothing_of_the_old_one() -> None:
    trace = trace_of(("alloc", 0, GIB), card=None)
    own = own_settings(trace)
    assert {s.code for s in own.stand_ins} >= {"card_assumed", "capacity_assumed"}
    for moved in (own.with_card(CARDS["l4"]), own.alone_on(CARDS["l4"])):
        assert {s.code for s in moved.stand_ins if s.of != "limit"} == {"total_estimated", "free_estimated"}
        assert (moved.total, moved.capacity) == (CARDS["l4"].total, CARDS["l4"].free)
    assert own.alone_on(CARDS["l4"], GIB).capacity == CARDS["l4"].free - GIB


# --- a repository's own -------------------------------------------------------------------------------------------


def define(folder: Path, text: str) -> tuple[Card, ...]:
    (folder / "pyproject.toml").write_text(text)
    use_cards_of(folder / "pyproject.toml")
    return defined()


def test_a_card_like_another_differs_in_what_is_said(tmp_path: Path) -> None:
    (card,) = define(
        tmp_path,
        '[tool.fragscope.cards.mig-20gb]\nlike = "h100-80gb"\ntotal = "20 GiB"\nfree = "19.5 GiB"\n'
        'multiprocessors = 32\nl2 = "25 MiB"\n',
    )
    assert card == Card(
        name="mig-20gb",
        product="NVIDIA H100 80GB HBM3",
        total=20 * GIB,
        free=20 * GIB - GIB // 2,
        capability=(9, 0),
        multiprocessors=32,
        l2=25 * MIB,
        source="pyproject.toml:1, like h100-80gb",
    )
    assert card.measured, "its owner names its memory"
    assert card_named("mig-20gb") == card


def test_a_context_is_taken_from_what_is_said_of_the_whole(tmp_path: Path) -> None:
    (card,) = define(tmp_path, '[tool.fragscope.cards.half]\nlike = "h100-80gb"\ntotal = "40 GiB"\n')
    assert card.free == 40 * GIB - (85_017_493_504 - 84_465_090_560)
    assert card.estimated == ("free",)


def test_a_card_can_stand_for_itself_and_for_others_below(tmp_path: Path) -> None:
    first, second = define(
        tmp_path,
        '[tool.fragscope.cards.t4]\ntotal = 15843721216\nfree = "14 GiB"\ncapability = "7.5"\nmultiprocessors = 40\n'
        'l2 = "4 MiB"\nproduct = "Tesla T4"\n[tool.fragscope.cards.t4-shared]\nlike = "t4"\nfree = "7 GiB"\n',
    )
    assert (first.capability, first.product, first.source) == ((7, 5), "Tesla T4", "pyproject.toml:1")
    assert second == replace(first, name="t4-shared", free=7 * GIB, source="pyproject.toml:8, like t4")


def test_what_is_estimated_of_another_card_stays_so(tmp_path: Path) -> None:
    (card,) = define(tmp_path, '[tool.fragscope.cards.half-l4]\nlike = "l4"\nfree = "10 GiB"\n')
    assert card.estimated == ("total",)


def test_the_pytest_plugin_knows_them(tmp_path: Path) -> None:
    text = '[tool.fragscope.pytest]\ncard = "half"\n[tool.fragscope.cards.half]\nlike = "h100-80gb"\ntotal = "40 GiB"\n'
    (tmp_path / "pyproject.toml").write_text(text)
    options = read_options(tmp_path, card=None, require=None, ini_file="pytest.ini", ini_budget=())
    assert card_named(str(options.card)).total == 40 * GIB


def test_cards_defined_before_are_gone(tmp_path: Path) -> None:
    define(tmp_path, '[tool.fragscope.cards.one]\nlike = "l4"\n')
    define(tmp_path, '[tool.fragscope.cards.two]\nlike = "l4"\n')
    assert "one" not in CARDS
    assert is_shipped("l4")
    assert not is_shipped("two")


@pytest.mark.parametrize(
    ("table", "line", "said"),
    [
        ('like = "h10"', 2, "'h10' is no card that ships or stands above; did you mean 'a10'?"),
        ("like = 3", 2, "3 is no card that ships or stands above"),
        ('total = "20 GiB"', 1, "lacks capability, multiprocessors, l2"),
        ('like = "l4"\ntotal = "3 GX"', 3, "total: '3 GX' is not a byte count"),
        ('like = "l4"\ntotal = "99 TiB"', 3, "total: 99 TiB is more than any device has"),
        ('like = "l4"\nl2 = 0', 3, "l2: a card without memory"),
        ('like = "l4"\nfre = 3', 3, "unknown key 'fre'; did you mean 'free'?"),
        ('like = "l4"\nfree = "30 GiB"', 3, "30.00 GiB is more than the card has (21.96 GiB)"),
        ('like = "l4"\ntotal = "100 MiB"', 3, "100.00 MiB is less than a CUDA context takes"),
        ('like = "l4"\ncapability = 9.0', 3, 'capability: 9.0 is none; write it as "9.0"'),
        ('like = "l4"\nmultiprocessors = 0', 3, "multiprocessors: 0 is not a number of them"),
        ('like = "l4"\nmultiprocessors = true', 3, "multiprocessors: True is not a number of them"),
        ('like = "l4"\nproduct = "a\\u001b[2J"', 3, "product: 'a\\x1b[2J' is not a name"),
    ],
)
def test_a_wrong_card_is_named_with_file_line_and_key(table: str, line: int, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputFileError) as found:
        define(tmp_path, f"[tool.fragscope.cards.mine]\n{table}\n")
    assert str(found.value).startswith(f"pyproject.toml: line {line}: [tool.fragscope.cards.mine] ")
    assert said in str(found.value)
    assert defined() == ()


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ("[tool.fragscope.cards.l4]", "is the name of a card that comes with fragscope; choose another"),
        ('[tool.fragscope.cards."../x"]', "is no name of a card"),
        ('[tool.fragscope.cards."a\\u001b"]', "is no name of a card"),
        ("[tool.fragscope.cards]\nmine = 3\n#", "is not a table; write [tool.fragscope.cards.mine]"),
        ("[tool.fragscope]\ncards = 3\n#", "cards is not a table"),
    ],
)
def test_a_name_that_cannot_be(header: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputFileError) as found:
        define(tmp_path, f'{header}\nlike = "a10"\n' if not header.endswith("#") else f"{header}\n")
    assert said in str(found.value)
    assert str(found.value).isprintable()
