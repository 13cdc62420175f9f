"""The measurements of `asdm`: images, latencies and sizes of pruned students."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline

import diffusers_ext as dx
from diffusers_ext.asdm.apply import gri_attention_of
from diffusers_ext.asdm.calibration import record_calibration_inputs
from diffusers_ext.asdm.condconv import fold_cond_convs
from diffusers_ext.asdm.cost import example_inputs
from diffusers_ext.asdm.prune import cut_network
from diffusers_ext.asdm.sensitivity import output_change, predict
from diffusers_ext.asdm.training import cost_figures, load_student
from diffusers_ext.asdm.unet import unet_config
from diffusers_ext.testbed.embedded import card_dir
from diffusers_ext.testbed.runs import held_out_prompts, run_scenes

from .framework.samples import graded
from .framework.timing import take_turns

TEACHER = card_dir("fashion-scenes")
SIZE: dict[str, Any] = {"height": 32, "width": 64}
LATENT = (8, 16)
BATCHES = (8, 1)
# How a UNet is run: as it was saved, with GRI attention put on or taken off, with its CLME-CondConv layers folded.
AS_IS, GRI_ON, GRI_OFF, FOLDED = "as is", "GRI on", "GRI off", "folded"


def load(folder: Path = TEACHER) -> Any:
    """A pipeline with a pruned UNet, or the embedded one."""
    own: dict[str, Any] = {}
    if not (folder / "model_index.json").is_file():
        # A card of a pruned UNet alone.
        own["unet"] = load_student(folder / "unet")
        folder = TEACHER
    pipe: Any = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32, **own)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def variant_of(folder: Path, variant: str) -> Any:
    """A pipeline of its own with the UNet as `variant` says.

    Raises:
        ValueError: CLME-CondConv layers that mix anew for every image cannot be folded.
    """
    pipe = load(folder)
    if variant == GRI_ON:
        dx.apply_gri_attention(pipe)
    elif variant == GRI_OFF:
        dx.remove_gri_attention(pipe)
    elif variant == FOLDED:
        fold_cond_convs(pipe.unet)
    return pipe


def variants(folder: Path) -> list[str]:
    """How a UNet can be run."""
    unet = load(folder).unet
    found = [AS_IS, GRI_ON if gri_attention_of(unet) is None else GRI_OFF]
    if unet.config.get("cond_convs"):
        try:
            variant_of(folder, FOLDED)
        except ValueError:
            return found
        found.append(FOLDED)
    return found


def pictures(
    folder: Path, variant: str, seed: int, num_images: int, steps: int, guidance: float
) -> dict[str, Any]:
    """One seed's images, graded."""
    texts = held_out_prompts(num_images, seed)
    options: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": guidance}
    return graded(run_scenes(variant_of(folder, variant), texts, seed=seed, **options).images, texts)


@torch.no_grad()
def latency(folder: Path, variant: str, rounds: int) -> dict[str, Any]:
    """Seconds of one call of the teacher's UNet and of another, in turns, by batch size; one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    own = variant_of(folder, variant)
    tokens, found = own.tokenizer.model_max_length, {}
    unets = {"teacher": load().unet.eval(), "own": own.unet.eval()}
    for batch in BATCHES:
        inputs = example_inputs(unet_config(unets["teacher"]), batch, *LATENT, tokens)
        work = {f"{name} {batch}": partial(unet, **inputs) for name, unet in unets.items()}
        found |= take_turns(work, rounds, 3, torch.device("cpu"), f"batches of {batch}")
    torch.set_num_threads(threads)
    return found


def size(folder: Path) -> dict[str, Any]:
    """Parameters, and MACs of one call for one image."""
    pipe = load(folder)
    return dict(cost_figures(pipe.unet, *LATENT, pipe.tokenizer.model_max_length))


def plan(folder: Path) -> dict[str, Any]:
    """How much the teacher's output changes by a plan's cuts without training, each alone and all together."""
    teacher, cuts = load(), dx.PruningPlan.load(folder / "plan.json").cuts
    probes = record_calibration_inputs(teacher, held_out_prompts(8, seed=5), **SIZE, guidance_scale=2.0)
    whole = predict(teacher.unet, probes)
    alone = [output_change(cut_network(teacher.unet, cut), probes, whole) for cut in cuts]
    return {
        "cuts": np.array(cuts),
        "alone": np.array(alone),
        "together": output_change(cut_network(teacher.unet, *cuts), probes, whole),
    }


def training(folder: Path) -> dict[str, Any]:
    """What its training script noted."""
    return json.loads((folder / "training.json").read_text(encoding="utf-8"))
