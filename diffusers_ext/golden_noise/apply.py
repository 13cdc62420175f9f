"""Golden noise for a whole pipeline: `apply_golden_noise`, `remove_golden_noise` and `golden_latents`.

A pipeline encodes its prompt and draws its noise in two methods that nearly all diffusers pipelines have,
`encode_prompt` and `prepare_latents`. Golden noise uses the result of the first to change the result of the
second.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..core.checks import check_finite
from ..core.families import (
    check_starts_from_noise,
    check_steps,
    denoiser_of,
    family_of,
    from_grid,
    grid_shape,
    noise_scale,
    to_grid,
)
from ..core.hooks import HookHandle, add_hook, parameters_of
from ..core.pipeline import initial_noise
from ..core.prompts import PromptEmbeds, PromptReader, check_encodes, differing_options
from .npnet import NPNetModel

# Attribute of a pipeline with its `GoldenNoise`.
_ATTRIBUTE = "_golden_noise"


class GoldenNoise:
    """The golden noise of one pipeline. `replace` is a hook of its `prepare_latents` (`add_hook`).

    Args:
        pipe: the pipeline.
        npnet: the network.
        strength: 0 for random noise, 1 for golden noise; other values interpolate or extrapolate linearly.

    Attributes:
        reader: reads the prompts of the calls.
        changes_given: whether latents that the caller has passed are changed, too.
    """

    def __init__(self, pipe: Any, npnet: NPNetModel, strength: float = 1.0) -> None:
        self.pipe, self.npnet, self.strength = pipe, npnet, strength
        self.reader = PromptReader(pipe)
        self.changes_given = False
        self.handles: list[HookHandle] = []

    def replace(self, given: dict[str, Any], prepared: Any) -> Any:
        """`prepared`, the result of `prepare_latents(**given)`, with golden noise in place of random noise.

        Raises:
            ValueError: the prompt of the call was not encoded before, the call has other options than the
                network was trained with, or see `mix`.
        """
        reader = self.reader
        embeds, call = (reader.prompt, reader.arguments) if reader.present else (None, {})
        reader.forget()
        if self.strength == 0 or (given.get("latents") is not None and not self.changes_given):
            return prepared
        if embeds is None:
            raise ValueError(
                f"{type(self.pipe).__name__} drew its noise before it encoded a prompt, so golden noise cannot use"
                " the prompt. Give a call of the pipeline prompt= instead of prompt_embeds=, or call it with"
                " latents=golden_latents(...)."
            )
        check_prompt_options(self.npnet, call)
        latents = prepared[0] if isinstance(prepared, tuple) else prepared
        golden = self._golden(latents, embeds, given)
        return (golden, *prepared[1:]) if isinstance(prepared, tuple) else golden

    @torch.no_grad()
    def _golden(self, latents: Tensor, embeds: PromptEmbeds, given: dict[str, Any]) -> Tensor:
        scale, layout = noise_scale(self.pipe), family_of(self.pipe).layout
        noise = to_grid(layout, latents.float() / scale, grid_shape(self.pipe, latents, given))
        golden = mix(self.npnet, noise, embeds.repeat_to(len(noise)), self.strength)
        return (from_grid(layout, golden) * scale).to(latents)


def predict(npnet: NPNetModel, noise: Tensor, embeds: PromptEmbeds) -> Tensor:
    """The output of `npnet` for noise (B, C, H, W) and the embeddings of B prompts."""
    config: Any = npnet.config
    if config.legacy:
        return npnet(noise, embeds.embeds if embeds.padded is None else embeds.padded).sample
    pooled = None if config.pooled_dim is None else embeds.pooled
    return npnet(noise, embeds.embeds, embeds.mask, pooled).sample


def mix(npnet: NPNetModel, noise: Tensor, embeds: PromptEmbeds, strength: float = 1.0) -> Tensor:
    """noise + strength · (golden − noise), with the output of the network as golden noise.

    Raises:
        ValueError: a shape that the network does not support, or an output that is not finite.
    """
    golden = predict(npnet, noise, embeds)
    if not torch.isfinite(golden).all():
        raise ValueError(
            "The output of NPNet has values that are not finite: its weights are corrupted, or overflow in"
            f" {npnet.dtype}; load it with torch.float32."
        )
    return golden if strength == 1 else noise + strength * (golden - noise)


# --- what golden noise works on ---


def check_pipeline(pipe: Any) -> None:
    """Rejects pipelines that golden noise does not work on.

    Raises:
        ValueError: no `encode_prompt` or `prepare_latents`, a pipeline that starts from an image or makes
            videos, or an unknown family.
    """
    check_encodes(pipe)
    check_starts_from_noise(pipe)
    check_steps(pipe)  # the noise of a projector is that of its source
    family_of(pipe)
    if "num_frames" in parameters_of(pipe):
        raise ValueError(
            f"{type(pipe).__name__} makes videos. Golden noise is for images: its networks take noise"
            " (B, C, H, W). Use a text-to-image pipeline."
        )


def check_npnet(npnet: Any) -> None:
    """Raises a ValueError unless `npnet` is an `NPNetModel`."""
    if isinstance(getattr(npnet, "_orig_mod", None), NPNetModel):
        raise ValueError("npnet is wrapped by torch.compile(npnet): call npnet.compile() instead, in place.")
    if not isinstance(npnet, NPNetModel):
        raise ValueError(
            f"npnet must be an NPNetModel, got {type(npnet).__name__}: NPNetModel.from_pretrained(path) loads one,"
            " NPNetModel.from_original(file) the released weights."
        )


def check_channels(pipe: Any, npnet: NPNetModel) -> None:
    """Raises a ValueError if the pipeline's latents have another number of channels than the network's."""
    if family_of(pipe).layout == "positions":
        channels = denoiser_of(pipe).config.in_channels
    else:
        config = getattr(getattr(pipe, "vae", None), "config", {})
        channels = config.get("latent_channels") or config.get("z_dim")
    wanted = npnet.config.latent_channels  # type: ignore[union-attr]
    if channels not in (None, wanted):
        raise ValueError(
            f"NPNet was made for latents of {wanted} channels, and those of {type(pipe).__name__} have {channels}:"
            " it belongs to another model. Train one for this model (training/train_npnet.py)."
        )


def check_prompt_options(npnet: NPNetModel, call: Mapping[str, Any]) -> None:
    """Raises a ValueError if the call encodes its prompts in another way than the network was trained with."""
    differing = differing_options(npnet.config.prompt_options or {}, call)  # type: ignore[union-attr]
    if differing:
        raise ValueError(
            f"NPNet was trained with other embeddings of the prompts than this call has: {differing}"
        )


# --- on and off ---


def apply_golden_noise(pipe: Any, npnet: NPNetModel, strength: float = 1.0) -> Any:
    """Makes `pipe` start from golden noise.

    It works on the text-to-image pipelines of `diffusers_ext.core.families.FAMILIES`. The random noise is drawn
    as before. The same seed without and with golden noise therefore gives a pair of images. `latents=` of a
    call are used as they are, and not made golden: pass them to `golden_latents` first.

    Args:
        pipe: a `DiffusionPipeline` that starts from pure noise.
        npnet: a network for the pipeline's latents and prompt embeddings.
        strength: 0 for random noise, 1 for golden noise; other values interpolate or extrapolate linearly.

    Returns:
        `pipe` itself.

    Raises:
        ValueError: golden noise is on this pipeline already; the pipeline is not supported (see
            `check_pipeline`); `npnet` is not an `NPNetModel`, or one for latents with other channels. Other sizes
            that do not match raise an error when the pipeline is called, and so do arguments that encode the
            prompt in another way than in training, such as another `clip_skip`.
    """
    check_pipeline(pipe)
    if golden_noise_of(pipe) is not None or getattr(pipe, "npnet", None) is not None:
        raise ValueError(
            "Golden noise is on this pipeline already: it cannot be applied twice. Call"
            " dx.remove_golden_noise(pipe) first, or set pipe.npnet = None where it is a component."
        )
    check_npnet(npnet)
    check_channels(pipe, npnet)
    check_finite(strength=strength)
    golden = GoldenNoise(pipe, npnet, strength)
    golden.handles = [golden.reader.attach(), add_hook(pipe, "prepare_latents", golden.replace)]
    vars(pipe)[_ATTRIBUTE] = golden
    return pipe


def remove_golden_noise(pipe: Any) -> Any:
    """Removes golden noise and all its hooks; no-op if it is off. Returns `pipe`."""
    golden = vars(pipe).pop(_ATTRIBUTE, None)
    for handle in golden.handles if golden else ():
        handle.remove()
    return pipe


def golden_noise_of(pipe: Any) -> GoldenNoise | None:
    """The `GoldenNoise` that `apply_golden_noise` has added to `pipe`, or None."""
    return vars(pipe).get(_ATTRIBUTE)


def golden_latents(
    pipe: Any, npnet: NPNetModel, prompt: Any = None, *, strength: float = 1.0, **call_kwargs: Any
) -> Tensor:
    """Golden noise for the `latents=` of any text-to-image pipeline.

        latents = golden_latents(pipe, npnet, prompt, generator=torch.Generator().manual_seed(0))
        image = pipe(prompt, latents=latents).images[0]

    It is computed from the random noise that `pipe(prompt, generator=...)` would draw, or from the noise that
    is given as `latents=`.

    Args:
        pipe: see `apply_golden_noise`. It is not changed.
        npnet: the network.
        prompt: one or more texts; None with `prompt_embeds=`.
        strength: see `apply_golden_noise`.
        call_kwargs: the arguments of the call that generates the image: `generator`, `height`, `width`,
            `num_images_per_prompt`, `prompt_2`, `prompt_embeds`, ... With `latents=`, unit-variance noise in the
            pipeline's layout for `latents=`, this noise is made golden.

    Returns:
        Unit-variance latents in the pipeline's layout for `latents=`: (B, C, H, W), packed (B, tokens, 4C), ...

    Raises:
        ValueError: the pipeline is not supported or has golden noise already, or its sizes do not match the
            network.
    """
    if prompt is not None:
        call_kwargs["prompt"] = prompt
    apply_golden_noise(pipe, npnet, strength)
    vars(pipe)[_ATTRIBUTE].changes_given = True
    try:
        return initial_noise(pipe, call_kwargs)
    finally:
        remove_golden_noise(pipe)


def describe(pipe: Any) -> str | None:
    """The line of `dx.summary` about golden noise on `pipe`; None if it is off."""
    applied = golden_noise_of(pipe)
    npnet: Any = applied.npnet if applied else getattr(pipe, "npnet", None)
    if npnet is None:
        return None
    kind = "released architecture" if npnet.config.legacy else "compact"
    parts = [f"{kind} NPNet, {npnet.num_parameters() / 1e6:.2f}M parameters"]
    parts.append(f"strength {applied.strength:g}" if applied else "a component of the pipeline")
    return ", ".join(parts)
