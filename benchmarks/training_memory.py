"""Memory of weights, gradients, optimizer states and averages in training, from the shapes of the networks.

Activations, the images of a step and the buffers of the libraries come on top. The networks are those of the papers,
with the configs written out and without weights, and nothing is downloaded. `measured` counts the tensors of a small
model that is trained for one step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from torch import Tensor, nn

from diffusers_ext.metrics.comparison import markdown_table

from .framework.bench import Bench

WRITES = ("training_memory.md",)

_BYTES = {torch.float32: 4, torch.bfloat16: 2}

SD15: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768}
SDXL: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
TINY: dict[str, Any] = {
    "block_out_channels": (64, 64, 64, 64),
    "cross_attention_dim": 64,
    "norm_num_groups": 8,
}


@dataclass(frozen=True)
class Case:
    """A training run.

    Attributes:
        trained: number of trained parameters. They, their gradients, both moments of AdamW and the averages of
            `--use_ema` are in float32.
        frozen: number of parameters of frozen copies of networks.
        dtype: data type of the frozen ones.
        ema: whether there are averages.
    """

    trained: int
    frozen: int = 0
    dtype: torch.dtype = torch.float32
    ema: bool = True

    def bytes(self, processes: int = 1) -> int:
        """Bytes in one process, if the tensors are divided among `processes` (1: `--multi_gpu`)."""
        total = self.trained * 4 * (4 + self.ema) + self.frozen * _BYTES[self.dtype]
        return -(-total // processes)


def parameters(network: type[nn.Module], **config: Any) -> int:
    """The number of parameters of a network, which is made without memory."""
    with torch.device("meta"):
        return sum(p.numel() for p in network(**config).parameters())


def measured(frozen: torch.dtype) -> tuple[int, int]:
    """Bytes of the tensors after a step of a small UNet with a frozen copy: counted, and by `Case`."""
    model = UNet2DConditionModel(**TINY)
    teacher: Any = UNet2DConditionModel(**TINY).requires_grad_(False)
    teacher.to(frozen)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(1, 4, 8, 8), 1, torch.randn(1, 2, 64)).sample.square().mean().backward()
    optimizer.step()
    averages = [p.detach().clone() for p in model.parameters()]
    tensors: list[Tensor] = [*model.parameters(), *teacher.parameters(), *averages]
    tensors += [p.grad for p in model.parameters() if p.grad is not None]
    # Without the number of steps, one value for each tensor.
    tensors += [v for part in optimizer.state.values() for v in part.values() if v.ndim]
    count = model.num_parameters()
    return sum(t.numel() * t.element_size() for t in tensors), Case(count, count, frozen).bytes()


def table() -> str:
    """The table of docs/training.md, in GB (10⁹ bytes)."""
    sizes = {
        name: parameters(UNet2DConditionModel, **config)
        for name, config in (("SD 1.5", SD15), ("SDXL", SDXL))
    }
    rows = []
    for name, count in sizes.items():
        # A LoRA of rank 8 has less than 1 % of the weights, which is left out.
        half = torch.bfloat16
        rows += [
            (f"Smooth-LoRA, {name}", Case(0, count), Case(0, count, half)),
            (f"A-SDM without cuts, {name}", Case(count, count), Case(count, count, half)),
        ]
        if name == "SD 1.5":  # the projector and the fake score are trained
            rows.append((f"SIGN, {name}", Case(2 * count, count), Case(2 * count, count, half)))
    flux = parameters(FluxTransformer2DModel, guidance_embeds=True)
    rows.append(("*full training, Flux*", Case(flux), Case(flux)))
    lines = []
    for name, full, half_frozen in rows:
        # Not tested in shards.
        shards = () if name.startswith("SIGN") else (half_frozen.bytes(4), half_frozen.bytes(8))
        figures = [f"{value / 1e9:.1f}" for value in (full.bytes(), half_frozen.bytes(), *shards)]
        lines.append([name, *figures, *["–"] * (4 - len(figures))])
    return markdown_table(["Run", "float32", "`bf16`", "`bf16`, 4 shards", "`bf16`, 8 shards"], lines)


def main(bench: Bench) -> None:
    """Writes training_memory.md, and prints how the count agrees with a small model."""
    bench.write("training_memory.md", table())
    for dtype in _BYTES:
        print(dtype, "counted {:,}, computed {:,}".format(*measured(dtype)))
