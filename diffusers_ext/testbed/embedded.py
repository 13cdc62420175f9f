"""Paths of the embedded models, in the checkout or in an installed wheel."""

from __future__ import annotations

from pathlib import Path

from ..core.shipped import shipped

# The wheel contains only some of the checkout's models; pyproject.toml lists them.
REPOSITORY = "https://github.com/diffusers-ext/diffusers-ext"


def card_dir(name: str) -> Path:
    """The folder of an embedded model, laid out like its Hub repository.

    Args:
        name: name of the model, such as "fashion-ddpm".

    Raises:
        FileNotFoundError: the name is wrong, or the model is only in a checkout.
    """
    cards = shipped("model_cards")
    if name not in cards:
        raise FileNotFoundError(
            f"model_cards/{name} is not installed; there are: {', '.join(cards) or 'none'}. An installed wheel contains"
            f" only some of them. Clone {REPOSITORY} and install it with pip install -e ."
        )
    return cards[name]


def has_card(name: str) -> bool:
    """Whether `card_dir(name)` exists."""
    return name in shipped("model_cards")
