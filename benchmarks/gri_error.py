"""Errors of GRI attention against full attention, without training: the embedded UNet's self-attention and smooth fields.

The control has the same windows and cells, but every cell counts as one key, those of the own window too. The error is
‖o − f‖ ÷ ‖f‖, o and f the outputs of the attention before its last projection, over all tokens, heads and timesteps of
a prompt; the table has its mean over prompts (or draws of a field) with a bootstrap interval.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from diffusers_ext.asdm.calibration import record_calibration_inputs
from diffusers_ext.asdm.gri_attention import joint_gri_attention
from diffusers_ext.metrics.comparison import bootstrap, markdown_table
from diffusers_ext.testbed.runs import held_out_prompts

from .asdm_runs import SIZE, load
from .framework.bench import Bench

WRITES = ("gri_error.md",)
HEADER = [
    "attention",
    "tokens",
    "window",
    "pool",
    "cells counted once",
    "GRI attention",
    "GRI ÷ counted once",
]
SETTINGS = [(8, 2), (8, 4), (4, 2), (4, 4), (2, 2)]
FIELD, BLUR = 32, 4
GRID_OF = {128: (8, 16), 32: (4, 8), 8: (2, 4)}
QKV = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Settings:
    """How large the benchmark is: prompts, which is also the number of smooth fields, and timesteps of 20."""

    prompts: int = 32
    timesteps: int = 5


def full_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax attention of (b, n, heads, d)."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)


def counted_once(
    query: Tensor, key: Tensor, value: Tensor, height: int, width: int, window: int, pool: int
) -> Tensor:
    """The window, all cells and all text in one softmax, each cell as one key; arguments as of `joint_gri_attention`."""
    text = query.shape[1] - height * width
    everything = key, value
    (text_key, key), (text_value, value) = ((x[:, :text], x[:, text:]) for x in everything)

    def cells(x: Tensor) -> Tensor:
        image = x.flatten(2).transpose(1, 2).unflatten(2, (height, width))
        means = F.avg_pool2d(image, pool, ceil_mode=True, count_include_pad=False)
        return means.flatten(2).transpose(1, 2).unflatten(2, x.shape[2:])

    window_of = [torch.arange(size) // window for size in (height, width)]
    near = [of[:, None] == of for of in window_of]
    own = (near[0][:, None, :, None] & near[1][None, :, None, :]).flatten(2).flatten(0, 1)
    pooled = cells(key)
    seen = torch.cat([own, torch.ones(len(own), pooled.shape[1] + text, dtype=torch.bool)], 1)
    keys, values = torch.cat([key, pooled, text_key], 1), torch.cat([value, cells(value), text_value], 1)
    tensors = (x.transpose(1, 2) for x in (query[:, text:], keys, values))
    image = F.scaled_dot_product_attention(*tensors, attn_mask=seen).transpose(1, 2)
    return torch.cat([full_attention(query[:, :text], *everything), image], 1)


@torch.no_grad()
def recorded(num_prompts: int, num_timesteps: int) -> dict[str, list[QKV]]:
    """Queries, keys and values of every self-attention, by timestep; row i is of prompt i mod `num_prompts`."""
    pipe = load()
    prompts = held_out_prompts(num_prompts, seed=5)
    inputs = record_calibration_inputs(pipe, prompts, num_timesteps=num_timesteps, guidance_scale=2.0, **SIZE)
    found: dict[str, list[QKV]] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(attn: Any, args: tuple[Any, ...]) -> None:
            layers = (attn.to_q, attn.to_k, attn.to_v)
            query, key, value = (layer(args[0]).unflatten(-1, (attn.heads, -1)) for layer in layers)
            found.setdefault(name, []).append((query, key, value))

        return hook

    for name, module in pipe.unet.named_modules():
        if name.endswith("attn1"):
            module.register_forward_pre_hook(note(name))
    for item in inputs:
        pipe.unet(**item)
    return found


def smooth_fields(count: int) -> QKV:
    """Queries, keys and values (count, FIELD², 4, 32): white noise after a Gaussian blur, of unit variance."""
    draw = torch.Generator().manual_seed(0)
    place = torch.arange(FIELD)
    apart = torch.minimum((place[:, None] - place).abs(), FIELD - (place[:, None] - place).abs())
    blur = torch.exp(-0.5 * (apart / BLUR) ** 2)
    blur = blur / blur.square().sum(1, keepdim=True).sqrt()
    made = []
    for _ in range(3):
        noise = torch.randn(count, 128, FIELD, FIELD, generator=draw)
        made.append((blur @ noise @ blur).flatten(2).transpose(1, 2).unflatten(2, (4, 32)))
    return made[0], made[1], made[2]


def relative_errors(
    found: list[QKV], approximation: Callable[..., Tensor], count: int, image: int
) -> np.ndarray:
    """(count,): of every prompt over its timesteps and its rows with and without guidance, at its last `image` tokens."""
    off, norm = torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
    for tensors in found:
        wanted = full_attention(*tensors)
        for total, x in ((off, approximation(*tensors) - wanted), (norm, wanted)):
            total += x[:, -image:].double().square().flatten(1).sum(1).view(-1, count).sum(0)
    return (off / norm).sqrt().numpy()


def cells_of(found: list[QKV], height: int, width: int, window: int, pool: int, count: int) -> list[str]:
    """One row of the table, after the name of the attention; text tokens, if there are any, come first in `found`."""
    grid = (height, width, window, pool)
    before, after = (
        relative_errors(found, lambda *tensors, of=of: of(*tensors, *grid), count, height * width)
        for of in (counted_once, joint_gri_attention)
    )
    estimates = [bootstrap(lambda rows, x=x: float(x[rows].mean()), count) for x in (before, after)]
    estimates.append(bootstrap(lambda rows: float(after[rows].mean() / before[rows].mean()), count))
    return [f"{height} × {width}", str(window), str(pool), *(e.format(3) for e in estimates)]


def rows_of(settings: Settings) -> Iterator[list[str]]:
    """The rows of the table."""
    found = recorded(settings.prompts, settings.timesteps)
    for name, tensors in found.items():
        height, width = GRID_OF[tensors[0][0].shape[1]]
        for window, pool in SETTINGS:
            # A window over the image is full attention.
            if window < width and window <= height:
                label = name.replace(".transformer_blocks.0.attn1", "")
                yield [f"`{label}`", *cells_of(tensors, height, width, window, pool, settings.prompts)]
    fields = [smooth_fields(settings.prompts)]
    for window, pool in SETTINGS[:2]:
        yield ["smooth fields", *cells_of(fields, FIELD, FIELD, window, pool, settings.prompts)]


@torch.no_grad()
def main(bench: Bench) -> None:
    """Measures and writes the page."""
    settings = bench.pick(Settings(), Settings(2, 1))
    bench.write(
        "gri_error.md",
        markdown_table(HEADER, list(rows_of(settings))),
        f"Relative error against full attention, mean and 95% interval over {settings.prompts} held-out prompts"
        f" ({settings.timesteps} timesteps of 20, guidance 2) or as many draws of smooth random fields (white noise after a"
        f" Gaussian blur of {BLUR} tokens, 4 heads × 32). The weights are not trained for it. “Cells counted once”: the same"
        " windows and cells, but each cell is one key, those of the own window too.",
    )
