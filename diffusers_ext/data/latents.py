"""What a latent diffusion model trains on: its autoencoder's latents of pictures, and what their captions are to it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..pipeline_calls import encode_prompts
from .pictures import pictures_of


@torch.no_grad()
def encode_pictures(pipe: Any, pictures: np.ndarray | Tensor) -> Tensor:
    """Latents of pictures, the posterior's mean times the scaling factor.

    Args:
        pipe: a pipeline with a `vae`.
        pictures: (n, h, w, 3) in [0, 1] as pipelines return them, or a tensor (n, 3, h, w).

    Raises:
        ValueError: another layout or range, or a size that the autoencoder cannot halve evenly.
    """
    x = pictures if isinstance(pictures, Tensor) else torch.from_numpy(np.asarray(pictures)).movedim(-1, 1)
    factor = pipe.vae_scale_factor
    if x.ndim != 4 or x.shape[1] != 3 or not torch.isfinite(x).all() or x.min() < 0 or x.max() > 1:
        raise ValueError(
            f"Expected pictures (n, h, w, 3) in [0, 1] or a tensor (n, 3, h, w), got {tuple(pictures.shape)} of"
            f" {pictures.dtype}."
        )
    if x.shape[2] % factor or x.shape[3] % factor:
        raise ValueError(
            f"Pictures must be multiples of {factor} high and wide, got {x.shape[2]} × {x.shape[3]}: resize or crop."
        )
    x = (2 * x - 1).to(pipe.device, pipe.vae.dtype)
    latents = pipe.vae.encode(x).latent_dist.mode() - (getattr(pipe.vae.config, "shift_factor", None) or 0)
    return latents * pipe.vae.config.scaling_factor


class TrainingLatents:
    """Latents of a data set's pictures by number, encoded when they are asked for or all of them before.

    Args:
        args: as from `add_data_arguments`, and `cache_latents`.
        pipe: a pipeline with a `vae`.
        data: as from `load_dataset`.
    """

    def __init__(self, args: argparse.Namespace, pipe: Any, data: Any) -> None:
        self.args, self.pipe, self.data = args, pipe, data
        self._cached: Tensor | None = None
        if args.cache_latents:
            lows = tqdm(range(0, len(data), 64), desc="encoding")
            self._cached = torch.cat([self(range(low, min(low + 64, len(data)))) for low in lows])

    def __call__(self, index: Sequence[int]) -> Tensor:
        """(len(index), C, h, w), on the CPU."""
        if self._cached is not None:
            return self._cached[list(index)]
        pictures = pictures_of(self.args, [self.data[int(i)] for i in index])
        return encode_pictures(self.pipe, pictures).cpu()


def encode_captions(pipe: Any, captions: Sequence[str], height: int, width: int) -> dict[str, Tensor]:
    """What a UNet is told of pictures: prompt_embeds (n, tokens, width), and for SDXL pooled_prompt_embeds and time_ids.

    Args:
        pipe: Stable Diffusion or SDXL.
        captions: n texts.
        height, width: of the pictures, uncropped.
    """
    found = encode_prompts(pipe, captions, guidance=False)
    if "pooled_prompt_embeds" in found:
        size = torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32)
        found["time_ids"] = size.expand(len(captions), -1)
    return found
