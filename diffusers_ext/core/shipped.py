"""The folders that are shipped with the package: in the checkout, or inside an installed wheel."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


def pipeline_path(name: str) -> str:
    """The folder of a custom pipeline of this package, for `custom_pipeline=` of diffusers.

    A relative path, such as "pipelines/teleport_sd", is only a folder in a clone of the repository. Anywhere else
    diffusers takes it for a repository on the Hub, and runs the code of whoever owns that name.

    Args:
        name: name of the folder, such as "teleport_sd".

    Raises:
        ValueError: there is no such pipeline.
    """
    folders = shipped("pipelines")
    if name not in folders:
        raise ValueError(
            f"There is no custom pipeline {name!r}: expected one of {', '.join(folders) or 'none'}."
        )
    return str(folders[name])


def shipped(kind: str) -> dict[str, Path]:
    """The folders of a kind, "pipelines" or "model_cards", by name."""
    # Beside an installed package are other packages, so the checkout's place is only looked at without that of a wheel.
    share = _PACKAGE / "_share"
    place = (share if share.is_dir() else _PACKAGE.parent) / kind
    return {path.name: path for path in sorted(place.glob("[a-z]*")) if path.is_dir()}
