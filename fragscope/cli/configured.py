"""What the repository around a command sets, with the cards that it defines."""

from __future__ import annotations

from fragscope.config import Config, load_config


def configured() -> Config:
    """The settings of the nearest pyproject.toml; the cards of its own are known to ``--card`` from then on.

    Raises:
        UsageError: a key or value that means nothing.
        InputFileError: the file cannot be read, or a card is not right; names file, line and key.
    """
    config = load_config()
    if config.own_cards is not None:
        from fragscope.allocator.own_cards import use_cards_of

        use_cards_of(config.own_cards)
    return config
