"""Where the files that are not code lie: the custom pipelines and the embedded weights with their cards."""

from __future__ import annotations

from pathlib import Path

NAMES = ("pipelines", "model_cards")
_PACKAGE = Path(__file__).resolve().parent


def resource_dir(name: str) -> Path:
    """The folder `pipelines` or `model_cards`: inside an installed wheel, else in the checkout.

    Raises:
        ValueError: there is no resource of this name.
        FileNotFoundError: neither place has the folder.
    """
    if name not in NAMES:
        raise ValueError(f"No resource is called {name!r}: expected {' or '.join(map(repr, NAMES))}.")
    places = [_PACKAGE / "_share" / name, _PACKAGE.parent / name]
    for place in places:
        if place.is_dir():
            return place
    raise FileNotFoundError(
        f"The folder {name!r} of diffusers-ext is neither at {places[0]} nor at {places[1]}: install the"
        " wheel again, or run from a whole checkout."
    )
