"""What a noise network costs beside one denoiser call at SDXL's shape, in multiply-adds.

    python benchmarks/golden_noise_cost.py --output_dir benchmarks/results

Nothing is computed: shapes alone are counted. With a CUDA device milliseconds are measured too, in float16.
"""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

import diffusers_ext as dx
from diffusers_ext.metrics.comparison import markdown_table

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


def main() -> None:
    """Counts, measures where it can, and writes golden_noise_cost.md."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output_dir", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    gpu = torch.cuda.is_available()
    with torch.no_grad(), torch.device("cuda" if gpu else "meta"):
        text = table(gpu)
    (args.output_dir / "golden_noise_cost.md").write_text(text + "\n")
    print(text)


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
    work: dict[str, tuple[Any, Callable[[], Any]]] = {
        "SDXL's UNet, one row": (
            unet,
            lambda: unet(noise, step, encoder_hidden_states=text, added_cond_kwargs=extra),
        ),
        "NPNet, ours": (compact, lambda: compact(noise, text)),
        "NPNet, released": (released, lambda: released(noise, text)),
    }
    rows, base = [], None
    for name, (model, function) in work.items():
        with FlopCounterMode(display=False) as counter:
            function()
        figures = [counter.get_total_flops() / 2e9] + ([milliseconds(function)] if measure else [])
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


def milliseconds(function: Callable[[], Any], repeats: int = 20) -> float:
    """Median on the GPU, after three calls to warm up."""
    times = []
    for number in range(repeats + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        if number >= 3:
            times.append(start.elapsed_time(end))
    return statistics.median(times)


if __name__ == "__main__":
    main()
