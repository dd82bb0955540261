"""Temporary storage of CUB's device-wide algorithms, as torch calls them.

The tiles are those of CUDA 13.0 on compute capability 9.0, told from the sizes that an H100 recorded; the rest is the
arithmetic of ``dispatch_radix_sort.cuh``, ``single_pass_scan_operators.cuh`` and ``util_temporary_storage.cuh`` in
CUB. Other cards and toolkits cut other tiles.
"""

from __future__ import annotations

_ALIGNMENT = 256
_RADIX = 2048
"""Bytes of 256 counts, one a digit."""
_TILES = {(2, 8): 5632, (4, 8): 5376, (8, 8): 4608, (8, 0): 5760}
"""Elements a block sorts, by bytes of key and value."""
_SCAN_TILES = {2: (7282, 8192), 4: (1920, 1920), 8: (896, 896)}
"""Elements a block adds up, by their bytes, at least and at most."""
_STATE_OF = {2: 8, 4: 4, 8: 8}
"""Bytes of a sum that tiles tell each other; what is no word of its own is widened."""
_ONE_TILE = (1600, 2400)
"""So many are sorted by one block, and so many by several; between them nobody looked."""


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def radix_sort(count: int, key: int, value: int, passes: int | None = None) -> int | None:
    """Bytes of a sort of pairs; None where it was not seen.

    Args:
        count: of pairs.
        key: bytes of a key.
        value: bytes of a value, 0 for keys alone.
        passes: digits of eight bits that are sorted by; all of a key's without it.
    """
    tile = _TILES.get((key, value))
    if count <= _ONE_TILE[0]:
        return 1
    if tile is None or count < _ONE_TILE[1]:
        return None
    digits = key if passes is None else passes
    other = _aligned(count * key) + _aligned(count * value) if value or digits > 1 else 0
    return other + _aligned(digits * _RADIX) + -(-count // tile) * _RADIX // 2 + 2 * _ALIGNMENT - 1


def segmented_sort(count: int, key: int, value: int) -> int:
    """Bytes of a sort of many segments at once: room for another copy of keys and values."""
    return _aligned(count * key) + _aligned(count * value) + _ALIGNMENT - 1


def scan(count: int, item: int) -> int | None:
    """Bytes of a running sum; None where it was not seen."""
    bounds = _SCAN_TILES.get(item)
    return None if bounds is None else tiled_states(count, _STATE_OF[item], *bounds)


def _states(tiles: int, item: int) -> int:
    """What tiles tell each other: as much as two values each, and room for a warp that looks back."""
    inner = _aligned((tiles + 32) * 2 * item) + _ALIGNMENT - 1
    return _aligned(inner) + _ALIGNMENT - 1


def tiled_states(count: int, item: int, least: int, most: int) -> int | None:
    """As :func:`scan`, for a tile of which only the bounds are known; None where they differ in bytes."""
    sizes = {_states(-(-count // tile), item) for tile in (least, most)}
    return sizes.pop() if len(sizes) == 1 else None
