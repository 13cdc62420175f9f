"""Errors of GRI attention against full attention in transformers, without training: random layouts and smooth fields.

As `gri_error`, on joint attention: image tokens attend to their window, to the cells of the rest of the image and to all
text tokens. The error is of the image tokens alone, since text tokens attend to everything. The transformers have the
published structure with few heads, four blocks and random weights, so that their attention is not that of a trained one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from diffusers_ext.asdm import gri_processors
from diffusers_ext.asdm.apply import apply_gri_attention, remove_gri_attention
from diffusers_ext.core.pipeline import call_pipeline
from diffusers_ext.metrics.comparison import markdown_table
from diffusers_ext.testbed.runs import held_out_prompts

from .framework.bench import Bench
from .gri_error import FIELD, HEADER, QKV, cells_of, full_attention, smooth_fields
from .transformer_layouts import LAYOUTS, Layout, smaller

WRITES = ("gri_joint.md",)
SETTINGS = [(8, 2), (8, 4), (4, 4)]
SIDE, TEXT, BLUR = 32, 64, 4
# Blocks of every kind, and few heads, for a page in minutes.
HEADS = {"Stable Diffusion 3.5 Medium": 6, "Flux.1": 3, "Qwen-Image": 3}
BLOCKS: dict[str, dict[str, Any]] = {
    "Stable Diffusion 3.5 Medium": {
        "num_layers": 4,
        "dual_attention_layers": (0, 1),
        "pos_embed_max_size": 64,
    },
    "Flux.1": {"num_layers": 2, "num_single_layers": 2},
    "Qwen-Image": {"num_layers": 4},
}
TRAINED = Path(__file__).parents[1] / "model_cards" / "fashion-flow"
SIZE = {"height": 32, "width": 64}


@dataclass(frozen=True)
class Settings:
    """How large the benchmark is.

    Attributes:
        draws: of smooth images, or prompts of the trained model.
        sigmas: noise levels of every draw.
    """

    draws: int = 8
    sigmas: tuple[float, ...] = (0.9, 0.6, 0.3)


@torch.no_grad()
def recorded(transformer: Any, calls: list[dict[str, Any]]) -> list[QKV]:
    """Queries, keys and values of every joint attention of every call, the text first; the attention itself is full."""
    found: list[QKV] = []

    def note(query: Tensor, key: Tensor, value: Tensor, *sizes: int, **rest: Any) -> Tensor:
        found.append((query, key, value))
        return full_attention(query, key, value)

    apply_gri_attention(transformer)
    with mock.patch.object(gri_processors, "joint_gri_attention", note):
        for inputs in calls:
            transformer(**inputs)
    remove_gri_attention(transformer)
    return found


def smooth_images(channels: int, size: int, count: int) -> Tensor:
    """(count, channels, size, size): white noise after a Gaussian blur of `BLUR` tokens, of unit variance."""
    draw = torch.Generator().manual_seed(1)
    place = torch.arange(size)
    apart = (place[:, None] - place).abs()
    blur = torch.exp(-0.5 * (torch.minimum(apart, size - apart) * SIDE / size / BLUR) ** 2)
    blur = blur / blur.square().sum(1, keepdim=True).sqrt()
    return blur @ torch.randn(count, channels, size, size, generator=draw) @ blur


def of_layout(name: str, settings: Settings) -> list[QKV]:
    """Of every attention at every noise level, with a row for each draw."""
    layout: Layout = smaller(LAYOUTS[name], HEADS[name], **BLOCKS[name])
    torch.manual_seed(0)
    transformer = layout.build("cpu")
    found: list[QKV] = []
    for sigma in settings.sigmas:
        one = layout.inputs(SIDE, SIDE, TEXT)
        inputs = {
            key: value.repeat(settings.draws, *[1] * (value.ndim - 1))
            if isinstance(value, Tensor) and key not in ("img_ids", "txt_ids")
            else value
            for key, value in one.items()
        }
        if "img_shapes" in inputs:
            inputs["img_shapes"] = one["img_shapes"] * settings.draws
        inputs["timestep"] = inputs["timestep"] * sigma / 0.5
        inputs["hidden_states"] = _noisy(inputs["hidden_states"], sigma)
        inputs["encoder_hidden_states"] = torch.randn_like(inputs["encoder_hidden_states"])
        found += recorded(transformer, [inputs])
    return found


def _noisy(like: Tensor, sigma: float) -> Tensor:
    """Smooth images with noise, as latents or as patches in the shape of `like`."""
    channels = like.shape[1] if like.ndim == 4 else like.shape[2]
    image = smooth_images(channels, like.shape[2] if like.ndim == 4 else SIDE, len(like))
    image = image if like.ndim == 4 else image.flatten(2).transpose(1, 2)
    return (1 - sigma) * image + sigma * torch.randn_like(image)


def of_the_trained(settings: Settings) -> list[QKV]:
    """The same of `model_cards/fashion-flow` in calls for held-out prompts, at guidance 2."""
    pipe = DiffusionPipeline.from_pretrained(TRAINED)
    pipe.set_progress_bar_config(disable=True)
    calls: list[dict[str, Any]] = []

    def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(kwargs)

    steps = 4 * len(settings.sigmas)
    with pipe.transformer.register_forward_pre_hook(note, with_kwargs=True):
        call_pipeline(
            pipe,
            held_out_prompts(settings.draws, seed=5),
            num_inference_steps=steps,
            guidance_scale=2.0,
            max_sequence_length=1,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
            **SIZE,
        )
    return recorded(pipe.transformer, calls[2::4])


def rows_of(settings: Settings) -> Iterator[list[str]]:
    """The rows of the table."""
    for name in LAYOUTS:
        found = of_layout(name, settings)
        for window, pool in SETTINGS:
            yield [name, *cells_of(found, SIDE, SIDE, window, pool, settings.draws)]
    image, words = smooth_fields(settings.draws), torch.randn(3, settings.draws, TEXT, 4, 32)
    query, key, value = (torch.cat([text, x], 1) for text, x in zip(words, image))
    for window, pool in SETTINGS[:2]:
        yield ["smooth fields", *cells_of([(query, key, value)], FIELD, FIELD, window, pool, settings.draws)]
    if TRAINED.is_dir():
        found = of_the_trained(settings)
        # 4 × 8 tokens.
        for window, pool in ((4, 2), (4, 4), (2, 2)):
            yield ["fashion-flow", *cells_of(found, 4, 8, window, pool, settings.draws)]


@torch.no_grad()
def main(bench: Bench) -> None:
    """Measures and writes the page."""
    settings = bench.pick(Settings(), Settings(2, (0.6,)))
    bench.write(
        "gri_joint.md",
        markdown_table(HEADER, list(rows_of(settings))),
        f"Relative error against full attention at the image tokens, mean and 95% interval over {settings.draws} draws"
        f" (noise levels σ {', '.join(map(str, settings.sigmas))}), over all attentions of a transformer. The published"
        f" structures with {', '.join(f'{n} heads ({k})' for k, n in HEADS.items())}, four blocks and random weights"
        f" are given {SIDE} × {SIDE} image tokens, smooth images with noise, and {TEXT} text tokens. Smooth fields are"
        f" {FIELD} × {FIELD} tokens with {TEXT} random text tokens. “Cells counted once”: the same windows, cells and text,"
        " but each cell is one key, those of the own window too.",
    )
