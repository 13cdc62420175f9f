"""Paths of the embedded models and the custom pipelines, in the checkout or in an installed wheel."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
# The wheel contains only some of the checkout's models; pyproject.toml lists them.
REPOSITORY = "https://github.com/diffusers-ext/diffusers-ext"


def card_dir(name: str) -> Path:
    """The folder of an embedded model, laid out like its Hub repository.

    Args:
        name: name of the model, such as "fashion-ddpm".

    Raises:
        FileNotFoundError: the name is wrong, or the model is only in a checkout.
    """
    return _find("model_cards", name)


def pipeline_dir(name: str) -> Path:
    """The folder of a custom pipeline, for `custom_pipeline=`; errors as for `card_dir`."""
    return _find("pipelines", name)


def has_card(name: str) -> bool:
    """Whether `card_dir(name)` exists."""
    return any((place / "model_cards" / name).is_dir() for place in _places())


def _places() -> list[Path]:
    return [_PACKAGE / "_share", _PACKAGE.parent]


def _find(kind: str, name: str) -> Path:
    for place in _places():
        if (place / kind / name).is_dir():
            return place / kind / name
    have = sorted({p.name for place in _places() for p in (place / kind).glob("*") if p.is_dir()})
    raise FileNotFoundError(
        f"{kind}/{name} is not installed; there are: {', '.join(have) or 'none'}. An installed wheel contains only"
        f" some of them. Clone {REPOSITORY} and install it with pip install -e ."
    )
