"""Colours by what they mean, for a light and a dark page.

Figures are made before anyone knows which page they will stand on. They carry placeholders, valid colours that nothing
else uses, and the page's script puts in the colour of the scheme that is on.
"""

from __future__ import annotations

_PLACEHOLDER = "#f0f1{:02x}"

SCHEMES: dict[str, tuple[str, str]] = {
    # name: (light, dark)
    "paper": ("#ffffff", "#15181c"),
    "panel": ("#f6f7f9", "#1c2025"),
    "ink": ("#16191d", "#e8eaed"),
    "muted": ("#5b636e", "#9aa3ae"),
    "rule": ("#e1e4e8", "#2d333b"),
    "grid": ("#eceef1", "#262b32"),
    "link": ("#1f5fbf", "#7db0f7"),
    "bad": ("#b42318", "#ff8a7a"),
    "good": ("#17703f", "#5fcf92"),
    "caution": ("#8a5a00", "#e5b455"),
    # Variants: apart in lightness too, and each also carries a letter.
    "line-0": ("#d1491b", "#ff8a5c"),
    "line-1": ("#2563c9", "#6ea6ff"),
    "line-2": ("#0f8a6d", "#45c9a5"),
    "line-3": ("#8a3fb8", "#c98bf0"),
    "line-4": ("#9a7400", "#d9b23c"),
    "line-5": ("#5b636e", "#a7b0bb"),
    # The memory map, in the order of CellState.
    "cell-0": ("#ffffff", "#15181c"),
    "cell-1": ("#ead9b0", "#5a4b27"),
    "cell-2": ("#c3cad3", "#4a5360"),
    "cell-3": ("#5b8fd6", "#4f82c9"),
    "cell-4": ("#d9a291", "#8a5346"),
    "cell-5": ("#a86a9a", "#a8659a"),
    "cell-6": ("#e0401f", "#ff6a45"),
    "cell-7": ("#9ad3c2", "#2f6b5c"),
}
NAMES = tuple(SCHEMES)
LINES = 6


def placeholder(name: str) -> str:
    """The colour that stands for ``name`` until a page is shown."""
    return _PLACEHOLDER.format(NAMES.index(name))


def line_name(number: int) -> str:
    """The colour name of a group's variant; after the last they begin again, and the letter tells them apart."""
    return f"line-{number % LINES}"
