"""Where Gaussian statistics come from: a pipeline's own samples, or images through its autoencoder.

Both are generators of batches in the scale that the denoiser works in, as `GaussianStats.fit` takes them:

    stats = GaussianStats.fit(pipeline_samples(pipe, 1024, prompts=prompts), rank=64)
    stats = GaussianStats.fit(encoded_images(pipe, "folder/of/images", resolution=512), rank=256)
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from tqdm.auto import tqdm

from ..core.images import ImageSource, encode_pixels, image_batches, open_images, vae_of
from ..core.pipeline import quiet
from .scheduler import TeleportScheduler

Batch = Tensor | tuple[Tensor, list[str]]


# --- a pipeline's own samples ---


def check_rank(rank: int, num_samples: int, prompts: Sequence[str] | None = None) -> None:
    """Refuses a rank that so few samples cannot give, before any of them is drawn.

    A pooled covariance of N samples in K groups has N − K degrees of freedom.

    Raises:
        ValueError: `rank` is larger than that.
    """
    groups = len(set(prompts[:num_samples])) if prompts else 1
    freedom = num_samples - groups
    if rank > freedom:
        raise ValueError(
            f"rank={rank} needs more than {num_samples} samples of {groups} prompt(s), which allow at most "
            f"{max(freedom, 0)}: draw at least {rank + groups}, or lower the rank."
        )


def pipeline_samples(
    pipe: Any,
    num_samples: int,
    *,
    batch_size: int = 8,
    prompts: Sequence[str] | None = None,
    seed: int = 0,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    progress: bool = True,
    **call_kwargs: Any,
) -> Iterator[Batch]:
    """The pipeline's own samples, for a model whose training data nobody has.

    With `prompts` the samples go through them in turn and come with their names, so that the fit keeps one
    mean for each prompt and pools the covariance *within* prompts. That is the covariance that belongs with
    a prompt's own mean: what the prompts differ by is in the means already, and a covariance over all
    samples would count it twice.

    Args:
        pipe: a `DiffusionPipeline` that starts from pure noise: latents are taken as its denoiser keeps them
            (Flux: packed), pixel models' images (no `vae`) are brought back to [−1, 1]; those pipelines
            clip them to that range.
        num_samples: N > 0 in all; sample i has the seed `seed + i`, whatever the batch size.
        batch_size: samples a call, > 0.
        prompts: different texts, N / len(prompts) samples of each; None for the empty prompt (no names
            then), for a pipeline without prompts, or with `prompt_embeds=` and the like in `call_kwargs`,
            of one row each.
        seed: see `num_samples`.
        num_inference_steps, guidance_scale: None for the pipeline's own defaults. For a map that follows
            guidance itself (`TeleportScheduler.set_mean(means, guidance_scale)`) draw with prompts and without
            guidance, `guidance_scale=1`; otherwise with the scale that will be used.
        progress: show a progress bar over the samples.
        call_kwargs: passed to the pipeline, such as `height` and `width`.

    Yields:
        (b, *shape) float32 on the pipeline's device, or pairs of that and b prompts.

    Raises:
        ValueError: a count below 1, an empty list of prompts, prompts for a pipeline that takes none, a
            pipeline that takes neither prompts nor a batch size, or one with teleportation on it.
    """
    if num_samples < 1 or batch_size < 1:
        raise ValueError(f"num_samples and batch_size must be 1 or more, got {num_samples} and {batch_size}.")
    if isinstance(pipe.scheduler, TeleportScheduler):
        raise ValueError(
            "Teleportation is on this pipeline, so its samples start from statistics already: take it off "
            "first (dx.remove_teleport(pipe))."
        )
    parameters = inspect.signature(pipe.__call__).parameters
    if prompts is not None:
        prompts = check_prompts(pipe, prompts)
        if "prompt_embeds" in call_kwargs:
            raise ValueError("Give either prompts or prompt_embeds, not both.")
    elif "prompt" not in parameters and "batch_size" not in parameters:
        raise ValueError(
            f"{type(pipe).__name__} takes neither a prompt nor a batch_size, so it cannot be sampled here. "
            "Fit the statistics on batches of its latents yourself: GaussianStats.fit(batches)."
        )
    options = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
    call_kwargs |= {name: value for name, value in options.items() if value is not None}
    return _samples(pipe, num_samples, batch_size, prompts, seed, progress, call_kwargs)


def check_prompts(pipe: Any, prompts: str | Sequence[str]) -> list[str]:
    """`prompts` as a list; ValueError unless they are texts and `pipe` takes prompts."""
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(f"prompts must be one or more texts, got {prompts!r}.")
    if "prompt" not in inspect.signature(pipe.__call__).parameters:
        raise ValueError(f"{type(pipe).__name__} takes no prompt: leave prompts out.")
    return prompts


@torch.no_grad()
def _samples(
    pipe: Any,
    num_samples: int,
    batch_size: int,
    prompts: list[str] | None,
    seed: int,
    progress: bool,
    call_kwargs: dict[str, Any],
) -> Iterator[Batch]:
    takes_prompt = "prompt" in inspect.signature(pipe.__call__).parameters
    pixels = getattr(pipe, "vae", None) is None
    with tqdm(total=num_samples, desc="sampling", disable=not progress) as bar:
        for start in range(0, num_samples, batch_size):
            indices = range(start, min(start + batch_size, num_samples))
            names = [prompts[i % len(prompts)] if prompts else "" for i in indices]
            call = {name: _rows_of(name, value, len(indices)) for name, value in call_kwargs.items()}
            if not takes_prompt:
                call["batch_size"] = len(indices)
            elif "prompt_embeds" not in call:
                call["prompt"] = names
            call["generator"] = [torch.Generator().manual_seed(seed + i) for i in indices]
            with quiet(pipe):
                result = pipe(**call, output_type="np" if pixels else "latent", return_dict=False)[0]
            samples = _pixels(result) if pixels else result.float()
            bar.update(len(indices))
            yield (samples, names) if prompts else samples


def _rows_of(name: str, value: Any, rows: int) -> Any:
    """Embeddings of one prompt repeated for `rows` samples; pipelines do not agree on doing so themselves."""
    if not (name.endswith("embeds") and isinstance(value, Tensor)):
        return value
    if len(value) != 1:
        raise ValueError(f"{name} must hold one row, which every sample gets; it has {len(value)}.")
    return value.expand(rows, *value.shape[1:])


def _pixels(images: Any) -> Tensor:
    """(b, C, H, W) float32 in [−1, 1] from a pipeline's (b, H, W, C) array in [0, 1]."""
    return torch.from_numpy(np.asarray(images, np.float32)).permute(0, 3, 1, 2) * 2.0 - 1.0


# --- images ---


def encoded_images(
    pipe_or_vae: Any,
    images: Any,
    *,
    batch_size: int = 8,
    resolution: int | tuple[int, int] | None = None,
    labels: str | Sequence[str] | None = None,
    image_column: str = "image",
    seed: int = 0,
    progress: bool = True,
) -> Iterator[Batch]:
    """Images in the scale of the denoiser: through the VAE, shifted and scaled as its config says.

    Args:
        pipe_or_vae: a `DiffusionPipeline`, or its VAE alone. A pipeline without a `vae` works on pixels.
        images: a folder (searched with its subfolders, in sorted order), a `datasets.Dataset`, a list of
            PIL images, a uint8 array (N, H, W, C) or (N, H, W), or floats (N, C, H, W) in [−1, 1].
        batch_size: images a call, > 0.
        resolution: side, or (height, width), to resize and centre-crop to; None leaves images as they are,
            which then must have one size. Statistics hold for this one size.
        labels: one name for each image, or the name of a data set's column (captions or class labels), for
            conditional means; each name should come several times.
        image_column: the data set's column of images.
        seed: image i's draw from the VAE's posterior has the seed `seed + i`, as in training, where the
            latents are drawn from it too.
        progress: show a progress bar over the images.

    Yields:
        (b, C, h, w) float32 (Flux: not packed), or pairs of that and b names.

    Raises:
        ValueError: no images, one that cannot be read (named), sizes that differ, values out of range,
            an unknown column, labels that do not match, or a VAE whose scale is not known here.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, got {batch_size}.")
    vae = vae_of(pipe_or_vae)
    if hasattr(vae, "bn"):
        raise ValueError(
            f"{type(vae).__name__} normalises packed latents by batch statistics, which is not supported "
            "here: use pipeline_samples."
        )
    pipe = pipe_or_vae if isinstance(pipe_or_vae, DiffusionPipeline) else None
    opened = open_images(images, labels=labels, image_column=image_column)
    return _encoded(pipe, vae, opened, batch_size, resolution, seed, progress)


@torch.no_grad()
def _encoded(
    pipe: Any,
    vae: Any,
    images: ImageSource,
    batch_size: int,
    resolution: int | tuple[int, int] | None,
    seed: int,
    progress: bool,
) -> Iterator[Batch]:
    model = vae if vae is not None else pipe.unet
    device = model.device if pipe is None else pipe._execution_device
    start = 0
    with tqdm(total=images.count, desc="encoding", disable=not progress) as bar:
        for values, names in image_batches(images, batch_size, model.config.in_channels, resolution):
            values = values.to(device)
            if vae is not None:
                draws = [torch.Generator().manual_seed(seed + start + i) for i in range(len(values))]
                values = encode_pixels(vae, values, draws)
            start += len(values)
            bar.update(len(values))
            yield values if names is None else (values, names)
    if pipe is not None:
        pipe.maybe_free_model_hooks()
