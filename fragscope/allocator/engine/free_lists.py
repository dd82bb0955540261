"""Ordered sets of blocks: the free lists, and the unmapped ranges of expandable segments.

Each is a treap whose nodes are the blocks themselves: a search tree by (stream, size, tie, address) that is a heap by a
pseudo-random priority, so that insertion, removal and search take logarithmic time. Unmapped ranges have size and tie 0
in their keys and are thereby ordered by (stream, address).
"""

from __future__ import annotations

from fragscope.allocator.engine.state import (
    ADDR,
    KEY_SIZE,
    KEY_STREAM,
    KEY_TIE,
    LEFT,
    PARENT,
    PRIORITY,
    RIGHT,
    State,
)


def before(s: State, a: int, stream: int, size: int, tie: int, addr: int) -> bool:
    """Whether block ``a`` sorts before a key."""
    t = s.t
    if t[KEY_STREAM][a] != stream:
        return bool(t[KEY_STREAM][a] < stream)
    if t[KEY_SIZE][a] != size:
        return bool(t[KEY_SIZE][a] < size)
    if t[KEY_TIE][a] != tie:
        return bool(t[KEY_TIE][a] < tie)
    return bool(t[ADDR][a] < addr)


def insert(s: State, root: int, which: int, block: int, stream: int, size: int, tie: int) -> None:
    """Put a block into the tree at ``t[root][which]`` under the given key and its address."""
    t = s.t
    left, right, parent, priority = t[LEFT], t[RIGHT], t[PARENT], t[PRIORITY]
    t[KEY_STREAM][block] = stream
    t[KEY_SIZE][block] = size
    t[KEY_TIE][block] = tie
    addr = t[ADDR][block]
    mine = priority[block]
    # Go down to where the block's priority allows it to stand.
    above, went_right = -1, False
    at = t[root][which]
    while at >= 0 and priority[at] >= mine:
        above = at
        went_right = before(s, at, stream, size, tie, addr)
        at = right[at] if went_right else left[at]
    parent[block] = above
    if above < 0:
        t[root][which] = block
    elif went_right:
        right[above] = block
    else:
        left[above] = block
    # What stood there is split into what sorts before the block and what sorts after it.
    low, high = block, block  # where the next piece of either side is hung; the block itself at first
    left[block] = -1
    right[block] = -1
    while at >= 0:
        if before(s, at, stream, size, tie, addr):
            if low == block:
                left[block] = at
            else:
                right[low] = at
            parent[at] = low
            low = at
            at = right[at]
        else:
            if high == block:
                right[block] = at
            else:
                left[high] = at
            parent[at] = high
            high = at
            at = left[at]
    if low != block:
        right[low] = -1
    if high != block:
        left[high] = -1


def remove(s: State, root: int, which: int, block: int) -> None:
    """Take a block out of the tree at ``t[root][which]``."""
    t = s.t
    left, right, parent, priority = t[LEFT], t[RIGHT], t[PARENT], t[PRIORITY]
    above = parent[block]
    went_right = above >= 0 and right[above] == block
    # The two subtrees are joined where the block stood.
    a, b = left[block], right[block]
    while True:
        take_a = b < 0 or (a >= 0 and priority[a] >= priority[b])
        joined = a if take_a else b
        if above < 0:
            t[root][which] = joined
        elif went_right:
            right[above] = joined
        else:
            left[above] = joined
        if joined < 0:
            return
        parent[joined] = above
        above, went_right = joined, take_a
        if take_a:
            a = right[joined]
        else:
            b = left[joined]


def first_from(s: State, root: int, which: int, stream: int, size: int, tie: int, addr: int) -> int:
    """The first block whose key is not before the given one, or -1."""
    t = s.t
    at = t[root][which]
    found = -1
    while at >= 0:
        if before(s, at, stream, size, tie, addr):
            at = t[RIGHT][at]
        else:
            found = at
            at = t[LEFT][at]
    return found


def last_before(s: State, root: int, which: int, stream: int, size: int, tie: int, addr: int) -> int:
    """The last block whose key is before the given one, or -1."""
    t = s.t
    at = t[root][which]
    found = -1
    while at >= 0:
        if before(s, at, stream, size, tie, addr):
            found = at
            at = t[RIGHT][at]
        else:
            at = t[LEFT][at]
    return found


def following(s: State, block: int) -> int:
    """The block after this one, which is in a tree, or -1."""
    t = s.t
    at = t[RIGHT][block]
    if at >= 0:
        while t[LEFT][at] >= 0:
            at = t[LEFT][at]
        later: int = at
        return later
    at, above = block, t[PARENT][block]
    while above >= 0 and t[RIGHT][above] == at:
        at, above = above, t[PARENT][above]
    above_it: int = above
    return above_it


def preceding(s: State, block: int) -> int:
    """The block before this one, which is in a tree, or -1."""
    t = s.t
    at = t[LEFT][block]
    if at >= 0:
        while t[RIGHT][at] >= 0:
            at = t[RIGHT][at]
        earlier: int = at
        return earlier
    at, above = block, t[PARENT][block]
    while above >= 0 and t[LEFT][above] == at:
        at, above = above, t[PARENT][above]
    above_it: int = above
    return above_it


def first(s: State, root: int, which: int) -> int:
    """The first block of all, or -1."""
    t = s.t
    at = t[root][which]
    found = -1
    while at >= 0:
        found = at
        at = t[LEFT][at]
    return found


def last(s: State, root: int, which: int) -> int:
    """The last block of all, or -1."""
    t = s.t
    at = t[root][which]
    found = -1
    while at >= 0:
        found = at
        at = t[RIGHT][at]
    return found
