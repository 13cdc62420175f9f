"""The flow base model of several pages: where it is, how it is called, and a random one for quick runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from torch import nn
from transformers import CLIPTextModel

import diffusers_ext as dx
from diffusers_ext.core.autoencoders import encode_pixels
from diffusers_ext.core.images import as_tensor
from diffusers_ext.teleport.prompt_map import PromptMap
from diffusers_ext.teleport.prompts import prompt_features
from diffusers_ext.testbed import base_models, fashion_scenes, flow_models
from diffusers_ext.testbed.embedded import card_dir, has_card

from .framework.bench import Bench
from .framework.samples import CARDS

NAME = "fashion-flow"
# What images depend on.
PARTS = ("transformer", "vae", "text_encoder", "text_encoder_2")
# T5's tokens are zeros here, and the model knows 2 of them as well as the 256 of the default, with which a call takes
# several times longer.
SHORT: dict[str, Any] = {"max_sequence_length": flow_models.T5_TOKENS[0]}


def call_options(pipe: Any) -> dict[str, Any]:
    """What calls of a base model need to be as fast as they can."""
    return SHORT if isinstance(pipe, StableDiffusion3Pipeline) else {}


def flow_reads(folder: Path) -> tuple[Path, ...]:
    """What the images of the model in a folder, and their grades, depend on."""
    return (*(folder / part for part in PARTS), *CARDS.values())


def model_folder(bench: Bench, *more: str, layers: int = 1) -> Path:
    """Where the model is; a random one for quick runs.

    Args:
        bench: the run.
        more: folders that it must have besides `PARTS`, such as "gaussian".
        layers: of the random one.

    Raises:
        ValueError: the model has not been trained, or has no statistics.
    """
    if bench.quick:
        return random_model(bench.cache_dir / f"random-flow-{layers}", bench.data_dir, layers)
    folder = card_dir(NAME) if has_card(NAME) else None
    missing = [part for part in (*PARTS, *more) if folder is None or not (folder / part).is_dir()]
    if folder is None or missing:
        raise ValueError(
            f"model_cards/{NAME} lacks {', '.join(missing)}. Train it (training/train_base.py --model flow), copy"
            " its model there, and fit its statistics (training/fit_base_gaussians.py --model_dir"
            f" model_cards/{NAME}). --quick runs with random weights."
        )
    return folder


def included(name: str, how: str) -> Path:
    """The folder of a card that was trained on the model.

    Raises:
        ValueError: there is none; the message says which page tells `how` it is made.
    """
    if not has_card(name):
        raise ValueError(
            f"model_cards/{name} does not exist. Train it ({how}), and copy its model there. --quick runs"
            " without it."
        )
    return card_dir(name)


def random_model(folder: Path, data_dir: Path, layers: int, scenes: int = 60) -> Path:
    """A pipeline of the model's layout with random weights, with statistics of a few scenes and a map to their mean."""
    if (folder / "gaussian" / "config.json").is_file():
        return folder
    pipe = random_pipeline(num_layers=layers)
    pipe.save_pretrained(folder)
    images, _ = fashion_scenes.scene_arrays(data_dir, "train", scenes)
    with torch.no_grad():
        latents = encode_pixels(pipe.vae, as_tensor(images) * 2 - 1)
        length = prompt_features(pipe, ["a red bag"]).shape[1]
    fitted = dx.GaussianStats.fit([latents], rank=8)
    flat = PromptMap(
        torch.zeros(length),
        torch.eye(length, 1),
        torch.zeros(1, latents[0].numel()),
        fitted.mean.flatten(),
        1.0,
    )
    calibration = {"sigma": {"6": 2.0}}
    stats = replace(fitted, prompt_map=flat, unconditional=fitted, calibration=calibration)
    stats.save_pretrained(folder / "gaussian")
    return folder


def random_pipeline(width: int = 64, num_layers: int = 1) -> Any:
    """A small pipeline of the model's layout with random weights, and the autoencoder and text encoder of the UNet."""
    torch.manual_seed(0)
    card, tokenizer = card_dir("fashion-scenes"), base_models.build_tokenizer()
    transformer = flow_models.build_transformer(width, num_layers)
    for parameter in transformer.parameters():
        # The zeros that it begins with would be no flow at all.
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.05)
    start = CLIPTextModel.from_pretrained(card / "text_encoder", dtype=torch.float32)
    starts = (start, None)
    first, second = (flow_models.build_clip(tokenizer, w, own) for w, own in zip(flow_models.WIDTHS, starts))
    vae: Any = AutoencoderKL.from_pretrained(card / "vae", dtype=torch.float32)
    objective = flow_models.VelocityObjective(transformer, first, second).eval()
    return flow_models.flow_pipeline(objective, tokenizer, vae)
