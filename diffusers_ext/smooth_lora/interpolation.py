"""Images along a path between two noises and two prompts (arXiv:2312.04410, section 4.3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..core.noise import noise_path
from ..core.pipeline import call_pipeline, initial_noise, quiet
from ..core.prompts import encode_prompts


@torch.no_grad()
def interpolate(
    pipe: Any,
    prompt: str | Sequence[str],
    *,
    latents: Tensor | None = None,
    generator: Sequence[torch.Generator] | None = None,
    num_frames: int = 24,
    batch_size: int = 8,
    progress: bool = True,
    **call_kwargs: Any,
) -> np.ndarray:
    """Generates images along a path between two noises and two prompts.

    The noises are interpolated spherically, the prompt embeddings linearly.

    Args:
        pipe: a text-to-image pipeline (SD, SDXL, SD3, Flux).
        prompt: one text, or two texts for the first and the last image.
        latents: (2, ...) unit-variance noise of the ends, for example from `ddim_invert`. None draws them.
        generator: two generators for the noise of the ends, if `latents` is None.
        num_frames: number of images, 2 or more, including both ends.
        batch_size: images per pipeline call.
        progress: show a progress bar.
        call_kwargs: arguments of the pipeline, such as `num_inference_steps`, `guidance_scale` and `height`.

    Returns:
        float32 (num_frames, h, w, 3) in [0, 1].

    Raises:
        ValueError: there are not one or two prompts, not two noises or generators, fewer than two frames, or
            the batch size is below 1.
    """
    prompts = [prompt] * 2 if isinstance(prompt, str) else list(prompt)
    if len(prompts) == 1:
        prompts *= 2
    if len(prompts) != 2 or not all(isinstance(text, str) and text is not None for text in prompts):
        raise ValueError(f"Expected one or two prompts, for the ends of the path; got {prompts!r}.")
    if num_frames < 2 or batch_size < 1:
        raise ValueError(
            f"num_frames must be 2 or more and batch_size 1 or more, got {num_frames}, {batch_size}."
        )
    if latents is not None and len(latents) != 2:
        raise ValueError(f"Expected latents with the noises of the two ends, got {tuple(latents.shape)}.")
    if generator is not None and len(generator) != 2:
        raise ValueError(f"Expected two generators, one for the noise of each end; got {len(generator)}.")
    with quiet(pipe):
        if latents is None:
            drawn = {**call_kwargs, "prompt": prompts, "generator": list(generator) if generator else None}
            latents, _ = initial_noise(pipe, drawn)
        noises, shares = noise_path(latents, num_frames)
        encoded = {name: _line(value, shares) for name, value in encode_prompts(pipe, prompts).items()}
        frames = []
        for rows in tqdm(
            torch.arange(num_frames).split(batch_size), disable=not progress, desc="interpolation"
        ):
            chosen = {name: value[rows] for name, value in encoded.items()}
            images = call_pipeline(
                pipe, **call_kwargs, **chosen, latents=noises[rows], output_type="np"
            ).images
            frames.append(np.asarray(images, dtype=np.float32))
    return np.concatenate(frames)


def _line(ends: Tensor, shares: Tensor) -> Tensor:
    """(frames, ...) linear interpolation of two rows; the ends are exact."""
    share = shares.to(ends.device).reshape(-1, *[1] * (ends.ndim - 1))
    line = (1 - share) * ends[:1].double() + share * ends[1:].double()
    return line.to(ends.dtype)
