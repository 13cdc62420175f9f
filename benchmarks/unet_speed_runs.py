"""The UNets that `unet_speed` compares, built with random weights, and how each is called, counted and timed."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from diffusers_ext.asdm.condconv import add_cond_convs, fold_cond_convs
from diffusers_ext.asdm.cost import example_inputs
from diffusers_ext.asdm.plan import PruningPlan
from diffusers_ext.asdm.presets import preset_stages
from diffusers_ext.asdm.prune import cut_network, removed_convs
from diffusers_ext.asdm.unet import unet_config
from diffusers_ext.core.extras import require

SHAPES = {"sd15": "Stable Diffusion 1.5", "sdxl": "SDXL"}
# A cycle of DeepCache; all others are called once, with the first.
TIMESTEPS = (501, 500, 499)
TOME_RATIO = 0.5


@dataclass(frozen=True)
class Variant:
    """What is done to the original.

    Attributes:
        preset: name of a plan, see `preset_stages`; None: nothing is cut.
        gri: whether the finest self-attention is GRI attention.
        experts: whether kept convolutions inherit the removed ones as CLME-CondConv layers.
        folded: whether these are folded to plain convolutions again.
        library: "tomesd" or "DeepCache", if one of them patches the UNet.
    """

    preset: str | None = None
    gri: bool = False
    experts: bool = False
    folded: bool = False
    library: str | None = None

    @property
    def calls(self) -> int:
        """UNet calls in a cycle."""
        return len(TIMESTEPS) if self.library == "DeepCache" else 1

    def cuts(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        """In order; see `diffusers_ext.asdm.shape`.

        Raises:
            ValueError: a preset that this UNet does not allow.
        """
        stages = preset_stages(self.preset, config) if self.preset else []
        found = [cut for stage in stages for cut in stage if not cut.startswith("gri.")]
        return (*found, f"gri.{finest_attention(config)}") if self.gri else tuple(found)


ORIGINAL = "original"
VARIANTS = {
    ORIGINAL: Variant(),
    "BK-SDM Base": Variant("bk-base"),
    "BK-SDM Small": Variant("bk-small"),
    "BK-SDM Tiny": Variant("bk-tiny"),
    f"ToMe, ratio {TOME_RATIO}": Variant(library="tomesd"),
    f"DeepCache, interval {len(TIMESTEPS)}": Variant(library="DeepCache"),
    "GRI alone": Variant(gri=True),
    "pruned": Variant("incubation"),
    "pruned + GRI": Variant("incubation", gri=True),
    "pruned + CondConv": Variant("incubation", experts=True),
    "pruned + GRI + CondConv": Variant("incubation", gri=True, experts=True),
    "pruned + GRI + CondConv, folded": Variant("incubation", gri=True, experts=True, folded=True),
}


def shape_config(shape: str, sample_size: int | None = None, width: int = 320) -> dict[str, Any]:
    """Arguments of `UNet2DConditionModel`, as published for a `width` of 320.

    Args:
        shape: a key of `SHAPES`.
        sample_size: side of the latents; None: 64 or 128.
        width: channels of the first resolution, a multiple of 64.
    """
    if shape == "sd15":
        widths = (width, 2 * width, 4 * width, 4 * width)
        return {
            "sample_size": sample_size or 64,
            "block_out_channels": widths,
            "attention_head_dim": 8,
            "cross_attention_dim": 768,
        }
    return {
        "sample_size": sample_size or 128,
        "block_out_channels": (width, 2 * width, 4 * width),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        # diffusers' name for the number of heads.
        "attention_head_dim": (width // 64, width // 32, width // 16),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    }


def finest_attention(config: Mapping[str, Any]) -> int:
    """The finest resolution that has attention, 0 being that of the latents."""
    return next(s for s, kind in enumerate(config["down_block_types"]) if kind.startswith("CrossAttn"))


def on_meta(config: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    """The original UNet without weights."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            return UNet2DConditionModel(**config).eval()
    finally:
        torch.set_default_dtype(before)


@torch.no_grad()
def materialise(unet: Any, device: torch.device) -> Any:
    """Gives a UNet on the meta device random weights; returns it."""
    unet.to_empty(device=device)
    for module in unet.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
        else:
            for parameter in module.parameters(recurse=False):
                parameter.uniform_(-0.02, 0.02)
    return unet


def make(variant: Variant, original: Any) -> Any:
    """A UNet that shares the original's weights, so that all of them fit into memory at once.

    Raises:
        ValueError: a preset that this UNet does not allow.
    """
    config = unet_config(original)
    cuts = variant.cuts(config)
    unet = cut_network(original, *cuts)
    # Folding looks at weights. Without any, the plain convolutions that it would leave stand there already.
    if not variant.experts or (variant.folded and original.device.type == "meta"):
        return unet
    pairs = removed_convs(original, PruningPlan(config, (cuts,)))
    experts = {kept: [original.get_submodule(path) for path in paths] for kept, paths in pairs.items()}
    added: Any = add_cond_convs(unet, experts)
    if variant.folded:
        fold_cond_convs(unet)
    else:
        for path in added:
            # As after training: a batch of images then has a kernel each.
            layer: Any = unet.get_submodule(path)
            torch.nn.init.normal_(layer.routing.weight, std=0.01)
    return unet


class Runner:
    """One variant and its inputs; to call it is to run its cycle of UNet calls.

    Args:
        variant: which.
        unet: what `make` returned for it; patched in place.
        inputs: of `example_inputs`; `timestep` is not used.

    Raises:
        MissingExtraError: the variant needs a library that is not installed.
    """

    def __init__(self, variant: Variant, unet: Any, inputs: Mapping[str, Any]) -> None:
        self.unet = unet
        if variant.library == "tomesd":
            patch_tome(unet)
        self.cache: Any = patch_deep_cache(unet) if variant.library == "DeepCache" else None
        self.wrapped: dict[Any, Any] = self.cache.function_dict if self.cache else {}
        self.sample: Tensor = inputs["sample"]
        self.rest = {k: v for k, v in inputs.items() if k not in ("sample", "timestep")}
        # DeepCache asks for their values: on the CPU, so that this doesn't wait for a GPU.
        self.timesteps = [torch.tensor(t) for t in TIMESTEPS[: variant.calls]]

    def __call__(self) -> Tensor:
        """The last call's prediction. Sample and timestep by position, since both libraries read them there."""
        if self.cache:
            self.cache.function_dict = self.wrapped
        return [self.unet(self.sample, t, **self.rest).sample for t in self.timesteps][-1]

    def compiled(self) -> Runner:
        """The same UNet compiled; this takes place at the first calls.

        As one graph, but for DeepCache, whose cache would have it compiled anew in every cycle: there each of the
        modules that it wraps is a graph.
        """
        other = copy.copy(self)
        if self.cache is None:
            other.unet = torch.compile(self.unet)
            return other
        outer = [key for key in self.wrapped if key == "unet_forward" or key[1] == "block"]
        other.wrapped = {k: f if k in outer else torch.compile(f) for k, f in self.wrapped.items()}
        return other


def patch_tome(unet: Any) -> None:
    """Merges tokens at the finest resolution with attention: ToMe's default for Stable Diffusion; for SDXL that would
    be nowhere.

    Raises:
        MissingExtraError: tomesd is not installed.
    """
    downsample = 2 ** finest_attention(unet.config)
    require("tomesd", "bench").apply_patch(unet, ratio=TOME_RATIO, max_downsample=downsample)


def patch_deep_cache(unet: Any) -> Any:
    """DeepCache's helper, at work with its shallowest branch. Calls that it skips compute conv_in, the time embedding,
    the last layer of the last up block and conv_out; all else is the last full call's.

    Raises:
        MissingExtraError: DeepCache is not installed.
    """
    # All that the helper looks at in a pipeline.
    pipe = SimpleNamespace(unet=unet, scheduler=SimpleNamespace(timesteps=TIMESTEPS))
    helper = require("DeepCache", "bench").DeepCacheSDHelper(pipe)
    helper.set_params(cache_interval=len(TIMESTEPS), cache_branch_id=0)
    helper.enable()
    return helper


@torch.no_grad()
def count(variant: Variant, config: Mapping[str, Any]) -> tuple[int, float]:
    """(parameters, multiply-accumulates of a UNet call for one image, the mean over a cycle).

    Counted as `count_macs` does, without weights, on the module itself: no config says what the libraries patch.

    Raises:
        ValueError: a preset that this UNet does not allow.
        MissingExtraError: a library that is not installed.
    """
    unet = make(variant, on_meta(config))
    run = Runner(variant, unet, example_inputs(unet.config, device="meta"))
    with FlopCounterMode(display=False) as counter:
        run()
    parameters = sum(p.numel() for p in unet.parameters())
    return parameters, counter.get_total_flops() / 2 / variant.calls
