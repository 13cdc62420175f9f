"""The measurements of `asdm`: images, latencies and sizes of pruned students."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline

import diffusers_ext as dx
from diffusers_ext.asdm.apply import gri_attention_of
from diffusers_ext.asdm.block_scores import macs_of
from diffusers_ext.asdm.calibration import record_calibration_inputs, with_rows
from diffusers_ext.asdm.condconv import fold_cond_convs
from diffusers_ext.asdm.cost import example_inputs
from diffusers_ext.asdm.prune import cut_network
from diffusers_ext.asdm.sensitivity import output_change, predict
from diffusers_ext.asdm.training import cost_figures, load_student
from diffusers_ext.asdm.unet import unet_config
from diffusers_ext.core.families import denoiser_of
from diffusers_ext.testbed.embedded import card_dir
from diffusers_ext.testbed.runs import held_out_prompts, run_scenes

from .flow_runs import call_options
from .framework.samples import graded
from .framework.timing import take_turns

TEACHER = card_dir("fashion-scenes")
SIZE: dict[str, Any] = {"height": 32, "width": 64}
LATENT = (8, 16)
BATCHES = (8, 1)
# How a network is run: as it was saved, with GRI attention put on or taken off, with its CLME-CondConv layers folded.
AS_IS, GRI_ON, GRI_OFF, FOLDED = "as is", "GRI on", "GRI off", "folded"
# A flow is called with as few of T5's tokens as possible, unless it is asked for all.
ALL_TOKENS = "256 T5 tokens"


@dataclass(frozen=True)
class Sampling:
    """How images and times are measured: images of each seed, steps, guidance scale, and rounds of calls."""

    images: int = 250
    seeds: tuple[int, ...] = (31, 32)
    steps: int = 6
    guidance: float = 2.0
    rounds: int = 30


def load(folder: Path = TEACHER, teacher: Path = TEACHER) -> Any:
    """A pipeline with a pruned UNet or transformer, or the teacher's."""
    own: dict[str, Any] = {}
    if not (folder / "model_index.json").is_file():
        # A card of a pruned network alone.
        part = "transformer" if (teacher / "transformer").is_dir() else "unet"
        own[part] = load_student(folder / part)
        folder = teacher
    pipe: Any = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32, **own)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def variant_of(folder: Path, variant: str, teacher: Path = TEACHER) -> Any:
    """A pipeline of its own with the network as `variant` says.

    Raises:
        ValueError: CLME-CondConv layers that mix anew for every image cannot be folded.
    """
    pipe = load(folder, teacher)
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
    folder: Path,
    variant: str,
    seed: int,
    num_images: int,
    steps: int,
    guidance: float,
    teacher: Path = TEACHER,
) -> dict[str, Any]:
    """One seed's images, graded."""
    texts, pipe = held_out_prompts(num_images, seed), variant_of(folder, variant, teacher)
    options: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": guidance}
    options |= {} if variant == ALL_TOKENS else call_options(pipe)
    return graded(run_scenes(pipe, texts, seed=seed, **options).images, texts)


def inputs_of(pipe: Any, batch: int) -> dict[str, Any]:
    """The arguments of a call of the pipeline's network with `batch` rows."""
    if not call_options(pipe):
        return example_inputs(unet_config(pipe.unet), batch, *LATENT, pipe.tokenizer.model_max_length)
    return with_rows(probes_of(pipe, 1, num_timesteps=1, num_inference_steps=1)[0], batch)


def probes_of(pipe: Any, num_prompts: int, **options: Any) -> list[dict[str, Any]]:
    """Inputs of the pipeline's network in guided calls."""
    texts = held_out_prompts(num_prompts, seed=5)
    call = {**SIZE, **call_options(pipe), "guidance_scale": 2.0, **options}
    return record_calibration_inputs(pipe, texts, **call)


@torch.no_grad()
def latency(folder: Path, variant: str, rounds: int, teacher: Path = TEACHER) -> dict[str, Any]:
    """Seconds of one call of the teacher's network and of another, in turns, by batch size; one thread."""
    # Until the end of the cell.
    torch.set_num_threads(1)
    first, found = load(teacher, teacher), {}
    pipes = {"teacher": first, "own": variant_of(folder, variant, teacher)}
    networks = {name: denoiser_of(pipe).eval() for name, pipe in pipes.items()}
    for batch in BATCHES:
        inputs = inputs_of(first, batch)
        work = {f"{name} {batch}": partial(network, **inputs) for name, network in networks.items()}
        found |= take_turns(work, rounds, 3, torch.device("cpu"), f"batches of {batch}")
    return found


def size(folder: Path, teacher: Path = TEACHER) -> dict[str, Any]:
    """Parameters, and MACs of one call for one image."""
    pipe = load(folder, teacher)
    if not call_options(pipe):
        return dict(cost_figures(pipe.unet, *LATENT, pipe.tokenizer.model_max_length))
    network, inputs = pipe.transformer, inputs_of(pipe, 1)
    macs = macs_of(network, lambda: network(**inputs))[""]
    return {"parameters": network.num_parameters(), "MACs": macs}


def plan(folder: Path, teacher: Path = TEACHER) -> dict[str, Any]:
    """How much the teacher's output changes by a plan's cuts without training, each alone and all together."""
    pipe, cuts = load(teacher, teacher), dx.PruningPlan.load(folder / "plan.json").cuts
    network, probes = denoiser_of(pipe), probes_of(pipe, 8)
    whole = predict(network, probes)
    alone = [output_change(cut_network(network, cut), probes, whole) for cut in cuts]
    return {
        "cuts": np.array(cuts),
        "alone": np.array(alone),
        "together": output_change(cut_network(network, *cuts), probes, whole),
    }


def training(folder: Path) -> dict[str, Any]:
    """What its training script noted."""
    return json.loads((folder / "training.json").read_text(encoding="utf-8"))
