"""What a noise network costs beside one denoiser call at SDXL's shape, in multiply-adds.

Nothing is computed: shapes alone are counted. With a CUDA device milliseconds are measured too, in float16.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel

import diffusers_ext as dx
from diffusers_ext.metrics.comparison import markdown_table

from .framework.bench import Bench
from .framework.timing import multiply_adds, take_turns

WRITES = ("golden_noise_cost.md",)
TOKENS, TEXT, POOLED = 77, 2048, 1280
SDXL: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": TEXT,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


def main(bench: Bench) -> None:
    """Counts, measures where it can, and writes golden_noise_cost.md."""
    gpu = torch.cuda.is_available()
    with torch.no_grad(), torch.device("cuda" if gpu else "meta"):
        bench.write("golden_noise_cost.md", table(gpu))


def table(measure: bool) -> str:
    """The networks and SDXL's UNet, one image, one row of it."""
    dtype = torch.float16 if measure else torch.float32
    noise, text = torch.randn(1, 4, 128, 128, dtype=dtype), torch.randn(1, TOKENS, TEXT, dtype=dtype)
    extra = {
        "text_embeds": torch.randn(1, POOLED, dtype=dtype),
        "time_ids": torch.randn(1, 6, dtype=dtype),
    }
    models: list[Any] = [UNet2DConditionModel(**SDXL), dx.NPNetModel(), dx.NPNetModel(legacy=True)]
    unet, compact, released = (model.to(dtype).eval() for model in models)
    step = torch.tensor(900)
    work: dict[str, Callable[[], Any]] = {
        "SDXL's UNet, one row": lambda: unet(
            noise, step, encoder_hidden_states=text, added_cond_kwargs=extra
        ),
        "NPNet, ours": lambda: compact(noise, text),
        "NPNet, released": lambda: released(noise, text),
    }
    times = take_turns(work, 20, 3, noise.device, "calls in turns") if measure else {}
    rows, base = [], None
    for model, (name, function) in zip((unet, compact, released), work.items()):
        figures = [multiply_adds(function) / 1e9]
        if measure:
            figures.append(1e3 * float(np.median(times[name])))
        base = base or figures
        cells = [name, f"{model.num_parameters() / 1e6:.2f}"]
        for figure, reference in zip(figures, base):
            cells += [f"{figure:.2f}", f"{100 * figure / reference:.3f} %"]
        rows.append(cells)
    header = ["", "parameters, 10⁶", "multiply-adds, 10⁹", "share"] + ["milliseconds", "share"] * measure
    note = (
        "Latents 4 × 128 × 128, 77 tokens of width 2,048, one image; matrix products and convolutions are counted,"
        " not the released network's singular value decomposition of one 256 × 256 matrix."
    )
    return f"{markdown_table(header, rows)}\n\n{note}"
