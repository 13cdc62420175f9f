"""Facts about pipelines that cannot be read from a call, in one record for each kind of denoiser (`FAMILIES`).

Latents have two layouts. In the *loop layout* the pipeline denoises them and gives them to its scheduler; there may be
one token for each patch. The *grid layout* is that of the autoencoder: (B, C, H, W) for images, (B, C, T, H, W) for
videos. Statistics, networks and encoded images of this package are in the grid layout.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor, nn

from .hooks import parameters_of

Layout = Literal["grid", "patches", "positions", "frames first", "channels last"]


@dataclass(frozen=True)
class Family:
    """What the pipelines of one class of denoisers have in common.

    Attributes:
        layout: of the latents in the denoising loop. "grid" is (B, C, H, W) or (B, C, T, H, W); "patches" has one
            token for each 2 × 2 patch, (B, H/2 · W/2, 4C), with the channel as the slowest index; "positions" has one
            token for each position, (B, T · H · W, C); "frames first" is (B, T, C, H, W); "channels last" is
            (B, T, H, W, C), with T = 1 for images.
        unpacked: the call's `latents=` are in the grid layout, whatever the layout of the loop.
        reversed_time: the denoiser is given 1 − t/1000 and predicts −v. All others are given t or t/1000.
        guidance_off: the scale at which classifier-free guidance is off. It is 1 for u + w(c − u), and 0 for
            c + w(c − u), where c and u are the outputs with and without the prompt.
        rescaled: the guided output always gets the norm of c.
        clip_first: the prompt's embeddings begin with CLIP's tokens, `tokenizer.model_max_length` of them, and those of
            T5 follow.
    """

    layout: Layout = "grid"
    unpacked: bool = False
    reversed_time: bool = False
    guidance_off: float = 1.0
    rescaled: bool = False
    clip_first: bool = False


# By the class of the denoiser. A subclass has the record of its base class.
FAMILIES: dict[str, Family] = {
    "UNet2DModel": Family(),  # works on pixels
    "UNet2DConditionModel": Family(),  # Stable Diffusion 1, 2 and XL, Kolors, ControlNet, LCM, latent diffusion
    "DiTTransformer2DModel": Family(),
    "PixArtTransformer2DModel": Family(),
    "HunyuanDiT2DModel": Family(),
    "SD3Transformer2DModel": Family(clip_first=True),
    "SanaTransformer2DModel": Family(),
    "AuraFlowTransformer2DModel": Family(),
    "CogView4Transformer2DModel": Family(),
    "FluxTransformer2DModel": Family("patches"),
    "ChromaTransformer2DModel": Family("patches"),
    "QwenImageTransformer2DModel": Family("patches", rescaled=True),
    "Flux2Transformer2DModel": Family("positions", unpacked=True),
    "ZImageTransformer2DModel": Family(reversed_time=True, guidance_off=0.0),
    "Lumina2Transformer2DModel": Family(reversed_time=True),
    "Kandinsky5Transformer3DModel": Family("channels last"),
    "WanTransformer3DModel": Family(),
    "LTXVideoTransformer3DModel": Family("positions"),
    "CogVideoXTransformer3DModel": Family("frames first"),
}


def family_of(pipe: Any) -> Family:
    """The record of the pipeline's denoiser.

    Raises:
        ValueError: there is no record for the class of the denoiser.
    """
    part = uncompiled(denoiser_of(pipe))
    found = known_class(type(part), FAMILIES)
    if found is None:
        what = "no unet and no transformer" if part is None else f"a {type(part).__name__}"
        raise ValueError(
            f"{type(pipe).__name__} has {what}, of which the layout of the latents, the time and the guidance are not"
            f" known. The known denoisers are {', '.join(FAMILIES)}. The facts of another one can be added:"
            ' diffusers_ext.core.families.FAMILIES["ClassName"] = Family(...).'
        )
    record = FAMILIES[found]
    # A pipeline of another package or of this one may take its latents as they are encoded, and pack them by itself.
    return replace(record, layout="grid", unpacked=False) if getattr(pipe, "grid_latents", False) else record


def known_class(kind: type, known: Collection[str]) -> str | None:
    """The name of a class, or of its nearest base class, that is among `known`; None if there is none."""
    return next((cls.__name__ for cls in kind.__mro__ if cls.__name__ in known), None)


# --- the pipeline's networks ---

DENOISERS = ("unet", "transformer", "transformer_2")


def denoisers_of(pipe: Any) -> list[nn.Module]:
    """The networks that predict the noise or the velocity; Wan 2.2 has two, for different noise levels."""
    parts = (getattr(pipe, name, None) for name in DENOISERS)
    return [part for part in parts if isinstance(part, nn.Module)]


def denoiser_of(pipe: Any) -> Any:
    """The pipeline's `unet` or `transformer`; None if it has neither."""
    return next(iter(denoisers_of(pipe)), None)


def uncompiled(model: Any) -> Any:
    """The model inside of `torch.compile(model)`; any other value itself."""
    return getattr(model, "_orig_mod", model)


# --- layouts of the latents ---


def to_grid(layout: Layout, x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Latents in the loop layout → (B, *shape).

    Args:
        layout: see `Family`.
        x: the latents, of any dtype.
        shape: (C, H, W) or (C, T, H, W), from `grid_shape`.

    Raises:
        ValueError: the latents do not have this shape.
    """
    if tuple(x.shape[1:]) != loop_shape(layout, shape):
        raise ValueError(
            f"The latents have shape {tuple(x.shape[1:])}, and an image or video with latents of shape {shape} has"
            f" {loop_shape(layout, shape)}."
        )
    if layout == "patches":
        channels, height, width = shape
        patches = x.reshape(len(x), height // 2, width // 2, channels, 2, 2)
        return patches.permute(0, 3, 1, 4, 2, 5).reshape(len(x), *shape)
    if layout == "positions":
        return x.movedim(-1, 1).reshape(len(x), *shape)
    if layout == "frames first":
        return x.movedim(2, 1)
    if layout == "channels last":
        return x.movedim(-1, 1).reshape(len(x), *shape)
    return x


def from_grid(layout: Layout, x: Tensor) -> Tensor:
    """The inverse of `to_grid`: (B, C, H, W) or (B, C, T, H, W) → latents in the loop layout."""
    if layout == "patches":
        batch, channels, height, width = x.shape
        patches = x.reshape(batch, channels, height // 2, 2, width // 2, 2)
        return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, height * width // 4, 4 * channels)
    if layout == "positions":
        return x.flatten(2).movedim(1, -1)
    if layout == "frames first":
        return x.movedim(1, 2)
    if layout == "channels last":
        return (x if x.ndim == 5 else x.unsqueeze(2)).movedim(1, -1)
    return x


def loop_shape(layout: Layout, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of one sample in the loop layout, for `shape` = (C, H, W) or (C, T, H, W) in the grid layout."""
    channels, *sizes = shape
    if layout == "patches":
        return sizes[0] // 2 * (sizes[1] // 2), 4 * channels
    if layout == "positions":
        count = 1
        for size in sizes:
            count *= size
        return count, channels
    if layout == "frames first":
        return sizes[0], channels, *sizes[1:]
    if layout == "channels last":
        return (*([1] if len(sizes) == 2 else []), *sizes, channels)
    return shape


def token_side(pipe: Any) -> int:
    """What the height and width of latents in the grid layout are multiples of: the side of a patch.

    Raises:
        ValueError: an unknown family.
    """
    if family_of(pipe).layout == "patches":
        return 2
    config = uncompiled(denoiser_of(pipe)).config
    size = config.get("patch_size") or config.get("all_patch_size") or 1
    return size if isinstance(size, int) else size[-1]


def grid_shape(pipe: Any, x: Tensor, call: Mapping[str, Any]) -> tuple[int, ...]:
    """The shape of one sample in the grid layout: (C, H, W), or (C, T, H, W) of a video.

    Args:
        pipe: the pipeline.
        x: its latents in the loop layout.
        call: arguments with the `height` and `width` of the image, and the `num_frames` of a video, such as those of
            `prepare_latents`.

    Raises:
        ValueError: an unknown family, or latents of another size than the call says.
    """
    layout, rows = family_of(pipe).layout, tuple(x.shape[1:])
    if layout == "grid":
        return rows
    if layout == "frames first":
        return rows[1], rows[0], *rows[2:]
    if layout == "channels last":
        return (rows[-1], *(rows[1:3] if rows[0] == 1 else rows[:3]))
    if layout == "patches":
        side = 2 * pipe.vae_scale_factor
        shape: tuple[int, ...] = (
            rows[1] // 4,
            *(2 * (int(call[name]) // side) for name in ("height", "width")),
        )
    elif hasattr(pipe, "vae_temporal_compression_ratio"):
        sizes = (int(call[name]) // pipe.vae_spatial_compression_ratio for name in ("height", "width"))
        shape = (rows[1], (int(call["num_frames"]) - 1) // pipe.vae_temporal_compression_ratio + 1, *sizes)
    else:
        shape = (rows[1], *(int(call[name]) // (2 * pipe.vae_scale_factor) for name in ("height", "width")))
    if loop_shape(layout, shape) != rows:
        raise ValueError(
            f"{type(pipe).__name__} has latents of shape {rows}, which are not those of an image of"
            f" {call['height']} × {call['width']} pixels."
        )
    return shape


# --- guidance ---

# Arguments that change u + w(c − u), or at which steps it is used, and the values with which they do not.
_ALTERATIONS = {
    "guidance_rescale": 0.0,
    "cfg_normalization": False,
    "cfg_truncation": 1.0,
    "cfg_trunc_ratio": 1.0,
    "use_dynamic_cfg": False,
}


@dataclass(frozen=True)
class Guidance:
    """How a pipeline is guided.

    Attributes:
        argument: the argument of the call that is the scale of classifier-free guidance; None if there is no such
            guidance.
        off: the scale at which it is off, see `Family.guidance_off`.
        needs_negative: it is off, too, in a call without a negative prompt.
        embedded: the argument of the call that the denoiser is given as an input; None if there is none.
        rescaled: see `Family.rescaled`.
    """

    argument: str | None
    off: float = 1.0
    needs_negative: bool = False
    embedded: str | None = None
    rescaled: bool = False

    @property
    def scale(self) -> str | None:
        """The argument of the call that is a guidance scale of either kind; None if there is none."""
        return self.argument or self.embedded

    def weight(self, call: Mapping[str, Any]) -> float:
        """w of u + w(c − u) in this call; 1 without classifier-free guidance."""
        value = None if self.argument is None else call.get(self.argument)
        negative = any(call.get(name) is not None for name in ("negative_prompt", "negative_prompt_embeds"))
        if value is None or float(value) <= self.off or (self.needs_negative and not negative):
            return 1.0
        return float(value) + 1.0 - self.off

    def altered(self, call: Mapping[str, Any]) -> str | None:
        """Why a guided call does not follow u + w(c − u), and what to set so that it does; None if it follows it."""
        if self.rescaled:
            return f"The pipeline scales every guided output to the norm of the unguided one: use {self.argument}=1."
        for name, neutral in _ALTERATIONS.items():
            if call.get(name) is not None and float(call[name]) != neutral:
                return f"{name}={call[name]!r} changes the guided output: use {name}={neutral!r}."
        second = call.get("guidance_scale_2")  # of Wan's second network
        if second is not None and second != call.get("guidance_scale"):
            return f"guidance_scale_2={second!r} is another scale: use guidance_scale_2=None."
        return None

    def call(self, weight: float) -> dict[str, Any]:
        """Arguments of a call with this w of u + w(c − u).

        Raises:
            ValueError: w is not 1, and the pipeline has no classifier-free guidance.
        """
        if self.argument is None:
            if weight != 1:
                raise ValueError(f"This pipeline has no classifier-free guidance, got a scale of {weight:g}.")
            return {}
        if self.needs_negative and weight != 1:
            return {self.argument: weight - 1.0 + self.off, "negative_prompt": " "}
        return {self.argument: weight - 1.0 + self.off}


def guidance_of(pipe: Any) -> Guidance:
    """How the pipeline is guided.

    Raises:
        ValueError: an unknown family.
    """
    family, names, config = family_of(pipe), parameters_of(pipe), denoiser_of(pipe).config
    # LCM's UNet has an embedding of the scale as well.
    embeds = config.get("guidance_embeds") or config.get("time_cond_proj_dim") is not None
    embedded = "guidance_scale" if embeds and "guidance_scale" in names else None
    if "true_cfg_scale" in names:
        return Guidance("true_cfg_scale", needs_negative=True, embedded=embedded, rescaled=family.rescaled)
    if embedded or pipe.config.get("is_distilled") or "guidance_scale" not in names:
        return Guidance(None, embedded=embedded)
    return Guidance("guidance_scale", family.guidance_off)


# --- the noise at the start ---


def check_starts_from_noise(pipe: Any) -> None:
    """Raises a ValueError unless the pipeline draws noise in `prepare_latents` and starts from it."""
    if not hasattr(pipe, "prepare_latents"):
        raise ValueError(
            f"{type(pipe).__name__} has no prepare_latents, in which other pipelines draw their noise, so its noise"
            " can neither be read nor replaced."
        )
    if "image" in parameters_of(pipe, "prepare_latents"):
        raise ValueError(
            f"{type(pipe).__name__} starts from an image, mixed with noise of a lower level. Use the text-to-image"
            " pipeline."
        )


def check_steps(pipe: Any) -> None:
    """Raises a ValueError for a projector, which never calls `step` of its scheduler."""
    if not getattr(pipe, "steps_scheduler", True):
        raise ValueError(
            f"{type(pipe).__name__} is a projector and takes no steps of its scheduler, so that there is no path between"
            " noise and images. Use the pipeline that it was distilled from."
        )


def noise_scale(pipe: Any) -> float:
    """The factor between unit-variance noise for `latents=` and the result of `prepare_latents`."""
    # Flow pipelines do not multiply by init_noise_sigma, even if their scheduler has it. All classes are
    # searched, because a subclass may only wrap the method.
    methods = [vars(c)["prepare_latents"] for c in type(pipe).__mro__ if "prepare_latents" in vars(c)]
    scales = any("init_noise_sigma" in inspect.unwrap(method).__code__.co_names for method in methods)
    return float(pipe.scheduler.init_noise_sigma) if scales else 1.0
