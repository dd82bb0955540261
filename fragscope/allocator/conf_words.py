"""The words of a conf string, and the numbers among them, as torch's C++ splits and reads them.

The C++ functions read as much of a word as is a number and ignore the rest: ``20abc`` is 20, ``0x20`` is the integer 0
and the double 32.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction

WORD = 2**64
"""Unsigned 64-bit integers (size_t) wrap here; a negative number becomes ``WORD`` minus its magnitude."""

_SPECIAL = frozenset(",:[]")
_INT_MAX = 2**31 - 1
_MOST_DIGITS = 20  # of 2**64 - 1
_SPACE = r"[ \t\n\v\f\r]*"
_INTEGER = re.compile(_SPACE + r"([+-]?)0*([0-9]+)")
_DOUBLE = re.compile(
    _SPACE
    + r"""([+-]?)(?:
        0[xX](?P<hexadecimal>(?:[0-9a-fA-F]+\.?[0-9a-fA-F]*|\.[0-9a-fA-F]+)(?:[pP][+-]?[0-9]+)?)
        |(?P<decimal>(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)
        |(?P<infinite>[iI][nN][fF])
        |(?P<nan>[nN][aA][nN]))""",
    re.VERBOSE,
)
_SMALLEST_NORMAL = 2.0**-1022


def split_words(text: str, white_space: str) -> list[str]:
    """Words and the special characters ``, : [ ]`` between them; white space is dropped, also within a word."""
    words: list[str] = []
    word = ""
    for character in text:
        if character in _SPECIAL:
            if word:
                words.append(word)
            words.append(character)
            word = ""
        elif character not in white_space:
            word += character
    return [*words, word] if word else words


def read_unsigned(word: str) -> int:
    """``std::stoull``: 0 to 2**64 - 1; a negative number wraps.

    Raises:
        ValueError: nothing to read, or out of range; says which.
    """
    sign, magnitude = _integer(word)
    if magnitude >= WORD:
        raise ValueError("does not fit in 64 bits")
    return -magnitude % WORD if sign == "-" else magnitude


def read_signed(word: str) -> int:
    """``size_t(std::stoi)``: a 32-bit integer, of which a negative one wraps in 64 bits.

    Raises:
        ValueError: nothing to read, or out of range; says which.
    """
    sign, magnitude = _integer(word)
    if magnitude > _INT_MAX + (sign == "-"):
        raise ValueError("does not fit in 32 bits")
    return -magnitude % WORD if sign == "-" else magnitude


def read_double(word: str) -> float:
    """``std::stod``.

    Raises:
        ValueError: nothing to read, too large, or too small to be read exactly; says which.
    """
    match = _DOUBLE.match(word)
    if match is None:
        raise ValueError("is not a number")
    if match["nan"]:
        return math.nan
    value = math.inf
    if match["decimal"]:
        value = float(match["decimal"])
    elif match["hexadecimal"]:
        try:
            value = float.fromhex(match["hexadecimal"])
        except OverflowError:
            raise ValueError("is out of a double's range") from None
    if not match["infinite"] and (math.isinf(value) or _underflows(match, value)):
        raise ValueError("is out of a double's range")
    return -value if match[1] == "-" else value


def _integer(word: str) -> tuple[str, int]:
    match = _INTEGER.match(word)
    if match is None:
        raise ValueError("is not a whole number")
    return match[1], int(match[2]) if len(match[2]) <= _MOST_DIGITS else WORD


def _underflows(match: re.Match[str], value: float) -> bool:
    """Whether strtod reports a range error: the value is below the normal doubles and had to be rounded."""
    if value >= _SMALLEST_NORMAL:
        return False
    digits = re.split("[pP]" if match["hexadecimal"] else "[eE]", match["hexadecimal"] or match["decimal"])[0]
    if not digits.strip("0."):
        return False
    if value == 0.0:
        return True
    return Fraction(value) != _exactly(match)


def _exactly(match: re.Match[str]) -> Fraction:
    """The number as written; only for what is close to the smallest doubles, else its exponent may be huge."""
    if match["decimal"]:
        return Fraction(match["decimal"])
    mantissa, _, exponent = match["hexadecimal"].lower().partition("p")
    whole, _, part = mantissa.partition(".")
    return int(whole + part, 16) * Fraction(2) ** (int(exponent or "0") - 4 * len(part))
