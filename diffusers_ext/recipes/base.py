"""The model that a recipe was made for, and the comparison with the one that it is applied to."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..core.families import denoiser_of, uncompiled
from ..core.hooks import parameters_of
from ..core.methods import ROOMS
from ..core.records import json_settings
from ..core.schedules import unwrapped
from ..core.storage import differences, show_differences
from ..training.cards import portable

# Entries of an autoencoder's config that give the latents their scale.
_SCALES = ("latent_channels", "z_dim", "scaling_factor", "shift_factor", "latents_mean", "latents_std")
# What is compared. The rest says where a recipe comes from.
_COMPARED = ("denoiser", "config", "latents")


def base_record(pipe: Any) -> dict[str, Any]:
    """Name and class of a pipeline, the class and the config of its denoiser, and its latents, as values of JSON.

    Raises:
        ValueError: there is no unet and no transformer.
    """
    denoiser = uncompiled(denoiser_of(pipe))
    if denoiser is None:
        raise ValueError(
            f"{type(pipe).__name__} has neither a unet nor a transformer: give a pipeline that has."
        )
    written = {name for room in ROOMS if room.recipe for name in room.part_module().CONFIG}
    config = {name: value for name, value in json_settings(denoiser.config).items() if name not in written}
    return {
        "name": portable(str(getattr(pipe, "name_or_path", None) or "")) or None,
        "pipeline": type(pipe).__name__,
        "prompts": "prompt" in parameters_of(pipe),
        "scheduler": type(unwrapped(getattr(pipe, "scheduler", None))).__name__,
        "denoiser": type(denoiser).__name__,
        "config": config,
        "latents": _latents(pipe, denoiser),
    }


def _latents(pipe: Any, denoiser: Any) -> dict[str, Any]:
    vae = next((v for v in (getattr(pipe, name, None) for name in ("vae", "vqvae")) if v is not None), None)
    config = json_settings({} if vae is None else uncompiled(vae).config)
    scales = {name: config[name] for name in _SCALES if config.get(name) is not None}
    side = getattr(pipe, "vae_scale_factor", None) or getattr(pipe, "vae_scale_factor_spatial", None) or 1
    return {"channels": denoiser.config.get("in_channels"), "pixels of a side": side, **scales}


def check_base(pipe: Any, made_for: dict[str, Any]) -> None:
    """Raises a ValueError if a pipeline has another denoiser or other latents than `made_for`, from `base_record`.

    Other versions of Diffusers have further entries in a config, so entries that only one of them has do not count.
    """
    found = base_record(pipe)
    if found["denoiser"] != made_for["denoiser"]:
        raise ValueError(
            f"The recipe was made for a {made_for['denoiser']} ({_name(made_for)}), and {found['pipeline']} has a"
            f" {found['denoiser']}: use a pipeline of the same model, or make the recipe again with this one."
        )
    pair = [_common(record, other) for record, other in ((made_for, found), (found, made_for))]
    differ = differences(*pair)
    if differ:
        raise ValueError(
            f"The recipe was made for another model ({_name(made_for)}) than this {found['pipeline']}"
            f" ({show_differences(differ)}): use a pipeline of the same model, or make the recipe again with this one."
        )


def _name(record: dict[str, Any]) -> str:
    return record["name"] or f"a {record['pipeline']}"


def _common(record: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    def both(name: str) -> Iterable[str]:
        return record[name].keys() & other[name].keys()

    return {name: {key: record[name][key] for key in both(name)} for name in _COMPARED[1:]}
