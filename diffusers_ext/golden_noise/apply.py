"""Golden noise for a whole pipeline: `apply_golden_noise`, `remove_golden_noise` and `golden_latents`.

A pipeline encodes its prompt and draws its noise in two methods that nearly all diffusers pipelines have,
`encode_prompt` and `prepare_latents`. Golden noise uses the result of the first to change the result of the
second.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.families import noise_scale, pack, unpack, unpacked_shape
from ..core.hooks import HookHandle, add_hook, parameters_of
from ..core.pipeline import initial_noise
from ..core.prompts import embeddings_of
from .npnet import NPNetModel

# Attribute of a pipeline with its `GoldenNoise`.
_ATTRIBUTE = "_golden_noise"


class GoldenNoise:
    """The golden noise of one pipeline. `start`, `remember` and `replace` are hooks of its methods (`add_hook`).

    Args:
        pipe: the pipeline.
        npnet: the network.
        strength: 0 for random noise, 1 for golden noise; other values interpolate or extrapolate linearly.
    """

    def __init__(self, pipe: Any, npnet: NPNetModel, strength: float = 1.0) -> None:
        self.pipe, self.npnet, self.strength = pipe, npnet, strength
        self._prompt_embeds: Tensor | None = None
        self.handles: list[HookHandle] = []

    def start(self, given: dict[str, Any], result: Any) -> Any:
        """Follows `check_inputs`, at the start of a pipeline call; clears the state of an interrupted one."""
        self._prompt_embeds = None
        return result

    def remember(self, given: dict[str, Any], encoded: Any) -> Any:
        """Stores the first embeddings of a call, those of the prompt; Flux encodes the negative one later."""
        if self._prompt_embeds is None:
            self._prompt_embeds = embeddings_of(self.pipe, encoded)[0]
        return encoded

    def replace(self, given: dict[str, Any], prepared: Any) -> Any:
        """`prepared`, the result of `prepare_latents(**given)`, with golden noise in place of random noise.

        Latents that the caller has passed are used as they are.

        Raises:
            ValueError: the pipeline draws its noise before it encodes the prompt, or see `mix`.
        """
        embeds, self._prompt_embeds = self._prompt_embeds, None
        if self.strength == 0 or given.get("latents") is not None:
            return prepared
        if embeds is None:
            raise ValueError(
                f"{type(self.pipe).__name__} drew its noise before it encoded a prompt, so golden noise cannot use"
                " the prompt. Pass latents=golden_latents(...) of a pipeline with the same text encoder."
            )
        latents = prepared[0] if isinstance(prepared, tuple) else prepared
        golden = self._golden(latents, embeds, given)
        return (golden, *prepared[1:]) if isinstance(prepared, tuple) else golden

    @torch.no_grad()
    def _golden(self, latents: Tensor, embeds: Tensor, given: dict[str, Any]) -> Tensor:
        scale = noise_scale(self.pipe)
        noise = latents.float() / scale
        packed = noise.ndim == 3
        if packed:
            noise = unpack(noise, unpacked_shape(self.pipe, noise, given))
        if len(embeds) != len(noise) and len(noise) % len(embeds) == 0:
            embeds = embeds.repeat_interleave(len(noise) // len(embeds), 0)
        golden = mix(self.npnet, noise, embeds, self.strength)
        return ((pack(golden) if packed else golden) * scale).to(latents)


def mix(npnet: NPNetModel, noise: Tensor, prompt_embeds: Tensor, strength: float = 1.0) -> Tensor:
    """noise + strength · (golden − noise), with golden = `npnet(noise, prompt_embeds).sample`.

    Raises:
        ValueError: a shape that the network does not support, or an output that is not finite.
    """
    golden: Tensor = npnet(noise, prompt_embeds).sample
    if not torch.isfinite(golden).all():
        raise ValueError(
            "The output of NPNet has values that are not finite: its weights are corrupted, or overflow in"
            f" {npnet.dtype}; load it with torch.float32."
        )
    return golden if strength == 1 else noise + strength * (golden - noise)


def check_pipeline(pipe: Any) -> None:
    """Rejects pipelines that take no prompt or do not start from pure noise.

    Raises:
        ValueError: no `encode_prompt` or `prepare_latents`, or a pipeline that starts from an image.
    """
    missing = [name for name in ("encode_prompt", "prepare_latents") if not hasattr(pipe, name)]
    if missing:
        raise ValueError(
            f"{type(pipe).__name__} has no {' and no '.join(missing)}: golden noise needs a pipeline that draws"
            " its noise for a prompt. Pass latents=npnet(noise, prompt_embeds).sample yourself."
        )
    if "image" in parameters_of(pipe, "prepare_latents"):
        raise ValueError(
            f"{type(pipe).__name__} starts from an image, which is mixed with the noise, and at a lower noise"
            " level than golden noise is made for. Use the text-to-image pipeline."
        )


def check_npnet(npnet: Any) -> None:
    """Raises a ValueError unless `npnet` is an `NPNetModel`."""
    if not isinstance(npnet, NPNetModel):
        raise ValueError(
            f"npnet must be an NPNetModel, got {type(npnet).__name__}: NPNetModel.from_pretrained(path) loads one,"
            " NPNetModel.from_original(file) the released weights."
        )


def apply_golden_noise(pipe: Any, npnet: NPNetModel, strength: float = 1.0) -> Any:
    """Makes `pipe` start from golden noise. Works with every text-to-image pipeline, including Flux.

    The random noise is drawn as before. The same seed without and with golden noise therefore gives a pair of
    images. `latents=` of a call are used as they are.

    Args:
        pipe: a `DiffusionPipeline` that starts from pure noise.
        npnet: a network for the pipeline's latents and prompt embeddings.
        strength: 0 for random noise, 1 for golden noise; other values interpolate or extrapolate linearly.

    Returns:
        `pipe` itself.

    Raises:
        ValueError: golden noise is on this pipeline already, the pipeline is not supported, or `npnet` is not
            an `NPNetModel`. Sizes that do not match raise an error when the pipeline is called.
    """
    if golden_noise_of(pipe) is not None or getattr(pipe, "npnet", None) is not None:
        raise ValueError(
            "Golden noise is on this pipeline already: it cannot be applied twice. Call"
            " dx.remove_golden_noise(pipe) first, or set pipe.npnet = None where it is a component."
        )
    check_npnet(npnet)
    check_pipeline(pipe)
    golden = GoldenNoise(pipe, npnet, strength)
    # Every pipeline checks its inputs first, and only once per call.
    begin = [add_hook(pipe, "check_inputs", golden.start)] if hasattr(pipe, "check_inputs") else []
    golden.handles = [
        *begin,
        add_hook(pipe, "encode_prompt", golden.remember),
        add_hook(pipe, "prepare_latents", golden.replace),
    ]
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

    It is computed from the random noise that `pipe(prompt, generator=...)` would draw.

    Args:
        pipe: see `apply_golden_noise`. It is not changed.
        npnet: the network.
        prompt: one or more texts; None with `prompt_embeds=`.
        strength: see `apply_golden_noise`.
        call_kwargs: the arguments of the call that generates the image: `generator`, `height`, `width`,
            `num_images_per_prompt`, `prompt_2`, `prompt_embeds`, ...

    Returns:
        Unit-variance latents in the pipeline's layout, (B, C, H, W) or packed (B, tokens, 4C).

    Raises:
        ValueError: the pipeline is not supported or has golden noise already, or its sizes do not match the
            network.
    """
    if prompt is not None:
        call_kwargs["prompt"] = prompt
    apply_golden_noise(pipe, npnet, strength)
    try:
        return initial_noise(pipe, call_kwargs)[0]
    finally:
        remove_golden_noise(pipe)


def describe(pipe: Any) -> str | None:
    """The line of `dx.summary` about golden noise on `pipe`; None if it is off."""
    applied = golden_noise_of(pipe)
    npnet = applied.npnet if applied else getattr(pipe, "npnet", None)
    if npnet is None:
        return None
    kind = "released architecture" if npnet.config.legacy else "compact"
    parts = [f"{kind} NPNet, {npnet.num_parameters() / 1e6:.2f}M parameters"]
    parts.append(f"strength {applied.strength:g}" if applied else "a component of the pipeline")
    return ", ".join(parts)
