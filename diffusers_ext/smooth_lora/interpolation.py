"""Pictures along a path between two noises and two prompts (arXiv:2312.04410, section 4.3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..core.noise import noise_path
from ..core.pipeline import encode_prompts, initial_noise, quiet


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
    """Pictures from one end to the other: slerp between the noises, a straight line between the prompts' embeddings.

    Args:
        pipe: a text-to-image pipeline (SD, SDXL, SD3, Flux).
        prompt: one text, or two, for the first and the last picture.
        latents: (2, ...) unit noises of the ends, for example of `ddim_invert`; None draws them.
        generator: two generators, for the noise of the ends, if `latents` is None.
        num_frames: pictures, 2 or more, both ends included.
        batch_size: pictures a call.
        progress: show a bar.
        call_kwargs: of the pipeline: `num_inference_steps`, `guidance_scale`, `height`, ...

    Returns:
        float32 (num_frames, h, w, 3) in [0, 1].

    Raises:
        ValueError: not one or two prompts, not two noises, or fewer than two frames.
    """
    prompts = [prompt] * 2 if isinstance(prompt, str) else list(prompt)
    if len(prompts) == 1:
        prompts *= 2
    if len(prompts) != 2 or not all(isinstance(text, str) and text is not None for text in prompts):
        raise ValueError(f"Give one or two prompts, for the ends of the path; got {prompts!r}.")
    if num_frames < 2 or batch_size < 1:
        raise ValueError(
            f"num_frames must be 2 or more and batch_size 1 or more, got {num_frames}, {batch_size}."
        )
    if latents is not None and len(latents) != 2:
        raise ValueError(f"latents must hold the noises of the two ends, got {tuple(latents.shape)}.")
    if generator is not None and len(generator) != 2:
        raise ValueError(f"Give two generators, one for the noise of each end; got {len(generator)}.")
    with quiet(pipe):
        if latents is None:
            drawn = {**call_kwargs, "prompt": prompts, "generator": list(generator) if generator else None}
            latents, _ = initial_noise(pipe, drawn)
        noises, shares = noise_path(latents, num_frames)
        encoded = {name: _line(value, shares) for name, value in encode_prompts(pipe, prompts).items()}
        pictures = []
        for rows in tqdm(
            torch.arange(num_frames).split(batch_size), disable=not progress, desc="interpolation"
        ):
            chosen = {name: value[rows] for name, value in encoded.items()}
            images = pipe(**call_kwargs, **chosen, latents=noises[rows], output_type="np").images
            pictures.append(np.asarray(images, dtype=np.float32))
    return np.concatenate(pictures)


def _line(ends: Tensor, shares: Tensor) -> Tensor:
    """(frames, ...) on the straight line between two rows, the ends exact."""
    share = shares.to(ends.device).reshape(-1, *[1] * (ends.ndim - 1))
    line = (1 - share) * ends[:1].double() + share * ends[1:].double()
    return line.to(ends.dtype)
