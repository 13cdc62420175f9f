"""Memory of weights, gradients, optimizer states and averages in training, from the shapes of the networks.

Activations, the images of a step and the buffers of the libraries come on top. The networks are those of the papers,
with the configs written out and without weights, and nothing is downloaded. `measured` counts the tensors of a small
model that is trained for one step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from torch import Tensor, nn

from diffusers_ext.metrics.comparison import markdown_table
from diffusers_ext.training.lora import TARGETS, add_lora
from diffusers_ext.training.transformers import FLOWS

from .framework.bench import Bench

WRITES = ("training_memory.md", "sign_memory.md")

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
SD35_MEDIUM: dict[str, Any] = {
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "num_attention_heads": 24,
    "attention_head_dim": 64,
    "caption_projection_dim": 1536,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}
FLUX: dict[str, Any] = {"guidance_embeds": True}
# Of the table of SIGN: {name: class, config, layers that get a LoRA}.
DISTILLED: dict[str, tuple[Any, dict[str, Any], tuple[str, ...]]] = {
    "SD 1.5": (UNet2DConditionModel, SD15, TARGETS),
    "SDXL": (UNet2DConditionModel, SDXL, TARGETS),
    "SD 3.5 Medium": (SD3Transformer2DModel, SD35_MEDIUM, FLOWS["StableDiffusion3Pipeline"].targets),
    "Flux.1": (FluxTransformer2DModel, FLUX, FLOWS["FluxPipeline"].targets),
}
RANK = 16
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
        averaged: number of parameters with averages; None for all that are trained.
    """

    trained: int
    frozen: int = 0
    dtype: torch.dtype = torch.float32
    averaged: int | None = None

    def bytes(self, processes: int = 1) -> int:
        """Bytes in one process, if the tensors are divided among `processes` (1: `--multi_gpu`)."""
        averaged = self.trained if self.averaged is None else self.averaged
        total = 4 * (4 * self.trained + averaged) + self.frozen * _BYTES[self.dtype]
        return -(-total // processes)


def parameters(network: type[nn.Module], **config: Any) -> int:
    """The number of parameters of a network, which is made without memory."""
    with torch.device("meta"):
        return sum(p.numel() for p in network(**config).parameters())


def lora_parameters(network: type[nn.Module], targets: tuple[str, ...], **config: Any) -> int:
    """The number of parameters of a LoRA of rank `RANK`."""
    with torch.device("meta"):
        model = network(**config)
        add_lora(model, RANK, targets=targets)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


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
    flux = parameters(FluxTransformer2DModel, **FLUX)
    rows.append(("*full training, Flux*", Case(flux), Case(flux)))
    lines = []
    for name, full, half_frozen in rows:
        found = (full.bytes(), half_frozen.bytes(), half_frozen.bytes(4), half_frozen.bytes(8))
        lines.append([name, *(f"{value / 1e9:.1f}" for value in found)])
    return markdown_table(["Run", "float32", "`bf16`", "`bf16`, 4 shards", "`bf16`, 8 shards"], lines)


def sign_table() -> str:
    """The table of docs/methods/sign.md, in GB: f and the fake score are trained, and f has averages."""
    lines = []
    for name, (network, config, targets) in DISTILLED.items():
        count, lora = parameters(network, **config), lora_parameters(network, targets, **config)
        half = torch.bfloat16
        runs = [Case(2 * count, count, averaged=count), Case(2 * count, count, half, count)]
        runs += [Case(2 * lora, count, averaged=lora), Case(2 * lora, count, half, lora)]
        lines.append([name, f"{count / 1e9:.2f}", *(f"{run.bytes() / 1e9:.1f}" for run in runs)])
    header = ["", "parameters, 10⁹", "all weights, float32", "all weights, `bf16`"]
    return markdown_table([*header, f"LoRA of rank {RANK}, float32", f"LoRA of rank {RANK}, `bf16`"], lines)


def main(bench: Bench) -> None:
    """Writes the tables, and prints how the count agrees with a small model."""
    bench.write("training_memory.md", table())
    bench.write("sign_memory.md", sign_table())
    for dtype in _BYTES:
        print(dtype, "counted {:,}, computed {:,}".format(*measured(dtype)))
