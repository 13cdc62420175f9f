"""Pixels to latents in the scale of the denoiser and back, as the pipelines themselves do it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.nn import functional

from .families import denoiser_of, family_of, known_class, token_side, uncompiled

Takes = Literal["images", "frames", "videos"]

# What autoencoders take, by class: "images" (n, C, h, w); "frames" are images as videos of one frame,
# (n, C, 1, h, w); "videos" (n, C, T, h, w). A subclass is like its base class.
AUTOENCODERS: dict[str, Takes] = {
    "AutoencoderKL": "images",
    "AsymmetricAutoencoderKL": "images",
    "AutoencoderTiny": "images",
    "VQModel": "images",
    "AutoencoderDC": "images",
    "AutoencoderKLFlux2": "images",
    "AutoencoderKLQwenImage": "frames",
    "AutoencoderKLWan": "videos",
    "AutoencoderKLLTXVideo": "videos",
    "AutoencoderKLCogVideoX": "videos",
}


def vae_of(pipe_or_vae: Any) -> Any:
    """The autoencoder of a pipeline (None for a pipeline that works on pixels), or the given autoencoder.

    Raises:
        ValueError: neither a pipeline nor an autoencoder, an autoencoder that is not known, or a pipeline that has
            lost its autoencoder.
    """
    if isinstance(pipe_or_vae, DiffusionPipeline):
        vae = _component(pipe_or_vae)
        if vae is None:
            return None
    elif isinstance(pipe_or_vae, nn.Module) and hasattr(pipe_or_vae, "encode"):
        vae = pipe_or_vae
    else:
        advice = ": use its vae" if hasattr(pipe_or_vae, "vae") else ""  # modular pipelines
        raise ValueError(
            f"Expected a DiffusionPipeline or an autoencoder with encode, got {type(pipe_or_vae).__name__}{advice}."
        )
    _takes(vae)
    return vae


def _component(pipe: Any) -> Any:
    # Latent diffusion calls it vqvae.
    vae = next((v for v in (getattr(pipe, name, None) for name in ("vae", "vqvae")) if v is not None), None)
    if vae is not None:
        return vae
    parts = pipe.components
    lost = [name for name in ("vae", "vqvae") if name in parts and name not in pipe._optional_components]
    if lost:
        raise ValueError(
            f"{type(pipe).__name__} has no {lost[0]}, so it can neither encode nor decode images."
        )
    others = [name for name, part in parts.items() if isinstance(part, nn.Module) and hasattr(part, "decode")]
    if others:
        raise ValueError(
            f"{type(pipe).__name__} has an autoencoder by the name of {others[0]}, which is not supported: expected"
            " vae or vqvae."
        )
    return None


def _takes(vae: Any) -> Takes:
    kind = type(uncompiled(vae))
    found = known_class(kind, AUTOENCODERS)
    if found is None:
        raise ValueError(
            f"The scale and the layout of the latents of {kind.__name__} are not known. The known autoencoders are"
            f" {', '.join(AUTOENCODERS)}. Another one with a scaling_factor, a shift_factor or latents_mean and latents_std"
            ' in its config can be added: diffusers_ext.core.autoencoders.AUTOENCODERS["ClassName"] = "images".'
        )
    return AUTOENCODERS[found]


def downsampling_of(pipe_or_vae: Any) -> int:
    """Pixels of an image side for each element of the latents; sides must be multiples of it.

    Raises:
        ValueError: see `vae_of` and `family_of`.
    """
    vae = vae_of(pipe_or_vae)
    if vae is None:
        return 1
    factor = getattr(vae, "spatial_compression_ratio", None)
    if factor is None:
        names = ("block_out_channels", "encoder_block_out_channels", "down_block_out_channels")
        factor = 2 ** (len(next(vae.config[name] for name in names if name in vae.config)) - 1)
    return factor * (vae.config.patch_size[0] if _batch_norm(vae) is not None else 1)


def side_of(pipe_or_vae: Any) -> int:
    """The number of pixels that image sides must be multiples of.

    Raises:
        ValueError: see `vae_of` and `family_of`.
    """
    tokens = token_side(pipe_or_vae) if isinstance(pipe_or_vae, DiffusionPipeline) else 1
    return downsampling_of(pipe_or_vae) * tokens


def channels_of(pipe_or_vae: Any) -> int:
    """Channels of the images that an autoencoder encodes, or that a pipeline without one denoises.

    Raises:
        ValueError: see `vae_of` and `family_of`.
    """
    vae = vae_of(pipe_or_vae)
    if vae is None:
        family_of(pipe_or_vae)
        return denoiser_of(pipe_or_vae).config.in_channels
    if _takes(vae) == "videos":
        return 3  # in_channels of some of Wan are those of patches
    return vae.config.get("in_channels") or vae.config.input_channels  # Qwen-Image has another name


def latent_channels_of(vae: Any) -> int:
    """Channels of the latents of an autoencoder in the grid layout."""
    channels = vae.config.get("latent_channels") or vae.config["z_dim"]
    return channels * (math.prod(vae.config.patch_size) if _batch_norm(vae) is not None else 1)


@torch.no_grad()
def encode_pixels(
    pipe_or_vae: Any, pixels: Tensor, generators: list[torch.Generator] | None = None
) -> Tensor:
    """Encodes pixels to latents in the grid layout (see `families`) and the scale of the denoiser.

    Args:
        pipe_or_vae: a pipeline with an autoencoder, or an autoencoder. A float16 autoencoder with `force_upcast` in
            its config encodes in float32. A pipeline may ignore statistics in the config of its autoencoder; of an
            autoencoder alone, all of them are used.
        pixels: (n, C, h, w) in [−1, 1], on the device of the autoencoder.
        generators: one per image, to sample the posterior; None for the mean of the posterior.

    Returns:
        (n, c, h', w') float32; (n, c, 1, h', w') from an autoencoder of videos, for which an image is one frame.

    Raises:
        ValueError: `pixels` has another shape, or see `vae_of`.
    """
    vae = vae_of(pipe_or_vae)
    if pixels.ndim != 4:
        raise ValueError(f"Expected images (n, channels, h, w), got {tuple(pixels.shape)}.")
    takes = _takes(vae)
    with _upcast(vae):
        encoded = vae.encode((pixels if takes == "images" else pixels.unsqueeze(2)).to(vae.dtype))
        posterior = getattr(encoded, "latent_dist", None)
        if posterior is None:
            # VQModel calls them `latents`, AutoencoderDC `latent`.
            latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent
        else:
            latents = posterior.mode() if generators is None else posterior.sample(generators)
    latents = latents.float()
    if _batch_norm(vae) is not None:
        latents = functional.pixel_unshuffle(latents, vae.config.patch_size[0])
    shift, scale = _latent_scale(pipe_or_vae, vae, latents)
    latents = (latents - shift) * scale
    return latents.squeeze(2) if takes == "frames" else latents


@torch.no_grad()
def decode_latents(pipe_or_vae: Any, latents: Tensor) -> Tensor:
    """Decodes latents in the layout and scale of `encode_pixels`.

    Args:
        pipe_or_vae: see `encode_pixels`.
        latents: (n, c, h', w'), or (n, c, t, h', w') for an autoencoder of videos.

    Returns:
        Pixels (n, C, h, w), or (n, C, T, h, w) from an autoencoder of videos, about in [−1, 1], not clipped, in the
        dtype in which the autoencoder runs.

    Raises:
        ValueError: see `vae_of`.
    """
    vae = vae_of(pipe_or_vae)
    takes = _takes(vae)
    x = latents.unsqueeze(2) if takes == "frames" else latents
    shift, scale = _latent_scale(pipe_or_vae, vae, x)
    x = x / scale + shift
    if _batch_norm(vae) is not None:
        x = functional.pixel_shuffle(x, vae.config.patch_size[0])
    more: dict[str, Any] = {}
    if vae.config.get("timestep_conditioning"):  # some of LTX; their pipeline decodes at time 0 by default
        more["temb"] = torch.zeros(len(x), device=x.device, dtype=vae.dtype)
    with _upcast(vae):
        pixels = vae.decode(x.to(vae.dtype), **more).sample
    return pixels[:, :, 0] if takes == "frames" else pixels


def _batch_norm(vae: Any) -> Any:
    """The normalisation of latents in patches, which Flux.2 has."""
    return getattr(vae, "bn", None)


def _latent_scale(pipe_or_vae: Any, vae: Any, like: Tensor) -> tuple[Any, Any]:
    """(shift, scale), such that scaled latents are (latents − shift) · scale."""
    columns = (1, -1, *[1] * (like.ndim - 2))
    norm = _batch_norm(vae)
    if norm is not None:
        mean, variance = (v.to(like.device, torch.float32) for v in (norm.running_mean, norm.running_var))
        return mean.view(columns), (variance + vae.config.batch_norm_eps).rsqrt().view(columns)
    used = _used_statistics(pipe_or_vae)
    # LTX has the mean and the standard deviation in buffers, the others in their configs.
    given = {**vae.config, **dict(vae.named_buffers(recurse=False))}
    scale, shift, mean, std = (given.get(name) for name in STATISTICS)
    scale = 1.0 if scale is None or "scaling_factor" not in used else scale
    if mean is None or std is None or "latents_mean" not in used:
        return (shift if shift is not None and "shift_factor" in used else 0.0), scale
    # Per-channel statistics replace the shift, as in diffusers' training scripts.
    mean, std = (torch.as_tensor(v, device=like.device).float().view(columns) for v in (mean, std))
    return mean, scale / std


STATISTICS = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")


def _used_statistics(pipe_or_vae: Any) -> set[str]:
    """Which of `STATISTICS` the code of the pipeline's class reads. Kandinsky 5, for example, reads no shift.

    All of them for an autoencoder alone, and for a class that reads none because other code decodes its latents.
    """
    if not isinstance(pipe_or_vae, DiffusionPipeline):
        return set(STATISTICS)
    methods = (inspect.unwrap(v) for c in type(pipe_or_vae).__mro__ for v in vars(c).values() if callable(v))
    names = {name for method in methods if inspect.isfunction(method) for name in method.__code__.co_names}
    return names & set(STATISTICS) or set(STATISTICS)


@contextmanager
def _upcast(vae: Any) -> Iterator[None]:
    """Runs the block in float32 if the VAE's config says that it overflows in float16. Loses no precision."""
    needed = vae.dtype == torch.float16 and vae.config.get("force_upcast", False)
    if needed:
        vae.to(torch.float32)
    try:
        yield
    finally:
        if needed:
            vae.to(torch.float16)
