"""Temporary storage of CUB's device-wide algorithms, as torch calls them.

The tiles are those of CUDA 13.0 on compute capability 9.0; other cards and toolkits cut other ones. Every size that an
H100 recorded is that of these tiles.

Source: CCCL 3.0, cub/device/dispatch/tuning for tiles; ``dispatch_radix_sort.cuh``, ``dispatch_reduce.cuh``,
``dispatch_select_if.cuh``, ``dispatch_scan_by_key.cuh``, agent/single_pass_scan_operators.cuh and
util_temporary_storage.cuh there for the arithmetic.
"""

from __future__ import annotations

from fragscope.allocator import Card

_ALIGNMENT = 256
_RADIX = 2048
"""Bytes of 256 counts, one a digit."""
_TILES = {(2, 8): 512 * 11, (4, 8): 384 * 14, (8, 8): 384 * 12, (8, 0): 384 * 15}
"""Elements a block sorts, by bytes of key and value."""
_ONE_TILE = 256 * 9
"""So many elements of eight bytes one block sorts alone."""
_PORTION = 1 << 28
"""So many elements, less a part of a tile, are sorted at a time."""
_SCAN_TILES = {2: 128 * 30, 4: 128 * 15, 8: 128 * 7}
"""Elements a block adds up with an operator of torch's own, by their bytes."""
_SCANNED_AT_ONCE = 1 << 30
"""Longer running sums are cut by torch."""
_PLAIN_SUM_TILE = 128 * 24
"""The same with CUB's own sum of int32."""
_SELECT_TILE = 384 * 11
"""Elements of eight bytes that a block selects from."""
_UNIQUE_TILE = 448 * 11
"""Pairs of eight bytes each from which a block drops repeated keys."""
_BY_KEY_TILE = 288 * 14
"""Elements of four bytes that a block adds up by keys of four bytes."""
COUNT_TILE = 256 * 16
"""Elements that a block counts; fewer take one block, which keeps no partial results."""
_COUNT_BLOCKS = 5 * 8
"""Partial counts a multiprocessor: five for each block that it holds, as recorded."""
_LOOKED_BACK_AT = 32
"""States before the first tile's, for a warp that looks back."""


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _together(*sizes: int) -> int:
    """Bytes of several pieces in one, each aligned, wherever that begins."""
    return sum(map(_aligned, sizes)) + _ALIGNMENT - 1


def radix_sort(count: int, key: int, value: int, passes: int | None = None) -> int | None:
    """Bytes of a sort of pairs; None where it was not seen.

    Args:
        count: of pairs.
        key: bytes of a key.
        value: bytes of a value, 0 for keys alone.
        passes: digits of eight bits that are sorted by; all of a key's without it.
    """
    tile = _TILES.get((key, value))
    if tile is None:
        return None
    if count <= _ONE_TILE:
        return 1
    digits = key if passes is None else passes
    portion = (_PORTION - 1) // tile * tile
    portions, tiles = -(-count // portion), -(-min(count, portion) // tile)
    other = (count * key, count * value) if digits > 1 else ()
    return _together(portions * digits * _RADIX, tiles * _RADIX // 2, *other, 4 * portions * digits)


def segmented_sort(count: int, key: int, value: int) -> int:
    """Bytes of a sort of many segments at once: room for another copy of keys and values."""
    return _together(count * key, count * value)


def scan(count: int, item: int, *, is_word: bool = True) -> int | None:
    """Bytes of a running sum with an operator of torch's own; None where it was not seen.

    Args:
        count: of elements.
        item: bytes of one.
        is_word: a sum and the state of a tile are told in one word; not so of half precision.
    """
    tile = _SCAN_TILES.get(item)
    if tile is None or is_word == (item == 2) or count > _SCANNED_AT_ONCE:
        return None
    states = -(-count // tile) + _LOOKED_BACK_AT
    return _together(_together(2 * item * states) if is_word else _together(4 * states, item * states, item * states))


def plain_sum(count: int) -> int:
    """Bytes of a running sum of int32 with CUB's own operator."""
    return _together(_states(count, _PLAIN_SUM_TILE, 4))


def select(count: int) -> int:
    """Bytes of picking some of int64 by flags, or those that differ from the one before."""
    return _together(_states(count, _SELECT_TILE, 4))


def unique_by_key(count: int) -> int:
    """Bytes of dropping pairs of int64 whose key is that of the one before."""
    return _together(_states(count, _UNIQUE_TILE, 8))


def sum_by_key(count: int) -> int:
    """Bytes of running sums of uint32, one for each run of equal keys of uint32."""
    tiles = -(-count // _BY_KEY_TILE)
    return _together(16 * (tiles + _LOOKED_BACK_AT), 4 * (tiles + 1))


def count_nonzero(count: int, card: Card) -> int:
    """Bytes of counting what is not zero, in int32."""
    return 1 if count <= COUNT_TILE else _together(4 * _COUNT_BLOCKS * card.multiprocessors)


def _states(count: int, tile: int, item: int) -> int:
    """Bytes of what tiles tell each other, a value and how far it reaches in one word."""
    return _together(2 * item * (-(-count // tile) + _LOOKED_BACK_AT))
