"""Where the embedded models and the custom pipelines are: in the checkout, or inside an installed wheel."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
# The wheel carries a part of the checkout's models; pyproject.toml says which.
REPOSITORY = "https://github.com/diffusers-ext/diffusers-ext"


def card_dir(name: str) -> Path:
    """The folder of an embedded model, laid out as its Hub repository is.

    Args:
        name: such as "fashion-ddpm".

    Raises:
        FileNotFoundError: it is not there: the name is wrong, or only a checkout has this model.
    """
    return _find("model_cards", name)


def pipeline_dir(name: str) -> Path:
    """The folder of a custom pipeline, for `custom_pipeline=`; errors as for `card_dir`."""
    return _find("pipelines", name)


def has_card(name: str) -> bool:
    """Whether `card_dir(name)` is there."""
    return any((place / "model_cards" / name).is_dir() for place in _places())


def _places() -> list[Path]:
    return [_PACKAGE / "_share", _PACKAGE.parent]


def _find(kind: str, name: str) -> Path:
    for place in _places():
        if (place / kind / name).is_dir():
            return place / kind / name
    have = sorted({p.name for place in _places() for p in (place / kind).glob("*") if p.is_dir()})
    raise FileNotFoundError(
        f"{kind}/{name} is not installed; there are: {', '.join(have) or 'none'}. An installed wheel holds a part of"
        f" them. Get a checkout of {REPOSITORY} and install it with pip install -e ."
    )
