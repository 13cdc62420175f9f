"""Training of the testbed's models: the two graders, the autoencoder, the scenes and the pixel model.

Each function trains one model. It returns the record for the model card and a function that writes the model
into a folder. Code that draws from torch's global generator must keep its order, which determines the initial
weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import (
    AutoencoderKL,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
)
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextModel

from ..core.autoencoders import decode_latents, encode_pixels
from ..core.images import as_tensor, save_grid
from ..core.pipeline import call_pipeline, scheduler_of
from ..core.records import part_record
from ..core.storage import digest
from ..training.encodings import Shards, encode_once
from ..training.loop import train
from ..training.recipes import Recipe, run_recipe
from ..training.rows import Batch, Rows
from ..training.start import set_train_steps
from . import base_models, fashion_scenes, flow_models
from .grader import GarmentClassifier, Grader, augment, grade
from .judge import GarmentJudge, warp

# Arguments that only act on the validation images.
VALIDATION = ("guidance_scale",)

Trained = tuple[dict[str, Any], Callable[[Path], Any]]


class GarmentObjective(nn.Module):
    """Cross entropy of a classifier, with smoothed labels."""

    def __init__(self, classifier: Grader) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, grey: Tensor, target: Tensor) -> Tensor:
        """Grey images (b, 1, 32, 32) in [0, 1] and indices into `ITEMS` (b,) → the loss."""
        return F.cross_entropy(self.classifier(grey), target, label_smoothing=0.05)


def train_grader(accelerator: Accelerator, args: argparse.Namespace) -> Trained:
    """Trains the first grader on the training garments."""
    classifier = GarmentClassifier(tuple(args.block_out_channels or (32, 64, 64)))
    return _train_classifier(accelerator, args, classifier, _garment_rows)


def train_judge(accelerator: Accelerator, args: argparse.Namespace) -> Trained:
    """Trains the second grader on the test garments, which no other model of the testbed has seen."""
    return _train_classifier(accelerator, args, GarmentJudge(), _judge_rows)


def _train_classifier(
    accelerator: Accelerator,
    args: argparse.Namespace,
    classifier: Grader,
    rows: Callable[[Tensor, Tensor, Rows], Batch],
) -> Trained:
    """Trains on the garments of one split and validates on the other."""
    own, other = (
        fashion_scenes.load_garments(args.train_data_dir, s)
        for s in (classifier.trained_on, classifier.unseen)
    )
    images, items = map(torch.from_numpy, own)
    unseen, unseen_items = map(torch.from_numpy, other)
    set_train_steps(args, accelerator, len(images))

    def validate(model: nn.Module, step: int) -> dict[str, float]:
        parts = unseen.to(accelerator.device).split(1000)
        logits = torch.cat([classifier(x[:, None] / 255) for x in parts])
        return {"accuracy on unseen garments": float((logits.argmax(1).cpu() == unseen_items).float().mean())}

    recipe = _recipe(accelerator, args, {"data": digest(images.numpy().tobytes() + items.numpy().tobytes())})
    read = partial(rows, images, items)
    record = train(accelerator, args, GarmentObjective(classifier), read, validate, recipe=recipe)
    return record, lambda folder: classifier.cpu().save_pretrained(folder)


def train_vae(accelerator: Accelerator, args: argparse.Namespace) -> Trained:
    """Trains the autoencoder of scenes and standardises its latents at the end."""
    vae = base_models.build_vae(args.block_out_channels or (24, 48, 64))
    pictures, _ = fashion_scenes.scene_arrays(args.train_data_dir, "train", args.num_scenes, args.seed)
    test, prompts = fashion_scenes.scene_arrays(
        args.train_data_dir, "test", args.num_validation_images, args.seed
    )
    grader = _load_grader(args)
    set_train_steps(args, accelerator, len(pictures))
    objective = base_models.VaeObjective(vae)

    def validate(model: nn.Module, step: int) -> dict[str, float]:
        real = as_tensor(test).to(accelerator.device)
        back = reconstruct(vae, real).cpu()
        save_grid(torch.cat([real.cpu()[:16], back[:16]]), 16, _validation_path(args, step))
        results = {"test_mse": float((back - real.cpu()).square().mean() * 4)}
        return results | (_grade_means(grader, back, prompts) if grader else {})

    def save(folder: Path) -> None:
        base_models.standardise_latents(vae.cpu(), as_tensor(pictures[:4096]) * 2 - 1)
        vae.save_pretrained(folder)

    recipe = _recipe(accelerator, args, {"data": digest(pictures.tobytes())})
    return train(
        accelerator, args, objective, partial(_picture_rows, pictures), validate, recipe=recipe
    ), save


def train_scenes(accelerator: Accelerator, args: argparse.Namespace) -> Trained:
    """Trains the text-to-image model, a small Stable Diffusion, together with its text encoder."""
    tokenizer = base_models.build_tokenizer()
    vae = _load_vae(args)
    unet = base_models.build_unet(args.block_out_channels or (64, 96, 128))
    scheduler = base_models.stable_diffusion_scheduler()
    latents, prompts, made_of = scene_latents(accelerator, args, vae.to(accelerator.device))
    set_train_steps(args, accelerator, len(latents))
    text_encoder = base_models.build_text_encoder(tokenizer)
    objective = base_models.NoiseObjective(unet, scheduler, text_encoder, args.snr_gamma)
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,  # type: ignore[arg-type]
        safety_checker=None,  # type: ignore[arg-type]
        feature_extractor=None,  # type: ignore[arg-type]
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    grader = _load_grader(args)
    held_out = _held_out_prompts(args)

    def validate(model: nn.Module, step: int) -> dict[str, float]:
        with scheduler_of(pipe, DPMSolverMultistepScheduler.from_config(scheduler.config)):
            images = _sample_scenes(pipe, held_out, args.guidance_scale)
        return _validated(args, grader, images, held_out, step)

    def save(folder: Path) -> None:
        pipe.to("cpu").to(torch.float16)
        # Without torch_dtype, diffusers loads its models in float32, but transformers in the saved dtype.
        text_encoder.float()
        pipe.save_pretrained(folder)

    made_of = {**made_of, "prompts": digest(prompts)}
    recipe = _recipe(accelerator, args, made_of)
    captions = _captions(args, tokenizer, latents, prompts)
    read = _SceneRows(captions, scheduler.config.num_train_timesteps)
    record = train(accelerator, args, objective, read, validate, recipe=recipe)
    record["parameters"] = base_models.count_parameters(unet, text_encoder, vae)
    return record, save


def train_flow(accelerator: Accelerator, args: argparse.Namespace) -> Trained:
    """Trains the flow-matching transformer, a small Stable Diffusion 3, together with its text encoders."""
    tokenizer = base_models.build_tokenizer()
    vae = _load_vae(args)
    latents, prompts, made_of = scene_latents(accelerator, args, vae.to(accelerator.device))
    set_train_steps(args, accelerator, len(latents))
    start = CLIPTextModel.from_pretrained(args.text_encoder) if args.text_encoder else None
    first, second = (
        flow_models.build_clip(tokenizer, width, own) for width, own in zip(flow_models.WIDTHS, (start, None))
    )
    objective = flow_models.VelocityObjective(flow_models.build_transformer(), first, second)
    pipe = flow_models.flow_pipeline(objective, tokenizer, vae)
    pipe.set_progress_bar_config(disable=True)
    grader = _load_grader(args)
    held_out = _held_out_prompts(args)

    def validate(model: nn.Module, step: int) -> dict[str, float]:
        images = _sample_scenes(pipe, held_out, args.guidance_scale)
        return _validated(args, grader, images, held_out, step)

    def save(folder: Path) -> None:
        pipe.to("cpu").to(torch.float16)
        # Without torch_dtype, diffusers loads its models in float32, but transformers in the saved dtype.
        for encoder in (pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3):
            encoder.float()
        pipe.save_pretrained(folder)

    made_of = {**made_of, "prompts": digest(prompts), "text encoder": part_record(start) if start else None}
    recipe = _recipe(accelerator, args, made_of)
    read = _FlowRows(_captions(args, tokenizer, latents, prompts))
    record = train(accelerator, args, objective, read, validate, recipe=recipe)
    record["parameters"] = base_models.count_parameters(objective, vae, pipe.text_encoder_3)
    return record, save


def train_ddpm(accelerator: Accelerator, args: argparse.Namespace) -> Trained:
    """Trains the unconditional model of grey garments, in pixel space."""
    images = torch.from_numpy(fashion_scenes.load_garments(args.train_data_dir, "train")[0])
    set_train_steps(args, accelerator, len(images))
    unet = base_models.build_pixel_unet(args.block_out_channels or (32, 64, 64))
    scheduler = DDPMScheduler(clip_sample=False)
    objective = base_models.NoiseObjective(unet, scheduler, snr_gamma=args.snr_gamma)

    def validate(model: nn.Module, step: int) -> dict[str, float]:
        solver: Any = DPMSolverMultistepScheduler.from_config(scheduler.config)
        pipe = DDPMPipeline(unet, solver)
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        output: Any = call_pipeline(
            pipe, batch_size=64, num_inference_steps=20, generator=generator, output_type="np"
        )
        save_grid(as_tensor(output.images), 16, _validation_path(args, step))
        return {}

    recipe = _recipe(accelerator, args, {"data": digest(images.numpy().tobytes())})
    read = partial(_grey_rows, images, scheduler.config.num_train_timesteps)
    record = train(accelerator, args, objective, read, validate, recipe=recipe)
    record["parameters"] = base_models.count_parameters(unet)
    return record, lambda folder: DDPMPipeline(unet.cpu().half(), scheduler).save_pretrained(folder)


def scene_latents(
    accelerator: Accelerator, args: argparse.Namespace, vae: AutoencoderKL
) -> tuple[Shards, list[str], dict[str, Any]]:
    """`latents` (n, 4, 8, 16) of the training scenes, their prompts, and the record of what they are made of.

    Raises:
        ValueError: the run's folder has latents of other images or of another autoencoder.
    """
    images, prompts = fashion_scenes.scene_arrays(args.train_data_dir, "train", args.num_scenes, args.seed)
    made_of = {"data": digest(images.tobytes()), "vae": part_record(vae)}

    def encode(rows: Sequence[int]) -> dict[str, Tensor]:
        pixels = as_tensor(images[list(rows)]).to(accelerator.device)
        return {"latents": encode_pixels(vae, pixels * 2 - 1)}

    folder = Path(args.output_dir) / "encodings" / "latents"
    return encode_once(accelerator, folder, made_of, len(images), encode, 256), prompts, made_of


# --- what workers read ---


def _garment_rows(images: Tensor, items: Tensor, rows: Rows) -> Batch:
    index = rows.indices(len(images))
    return {"grey": augment(images[index, None] / 255, rows), "target": items[index]}


def _judge_rows(images: Tensor, items: Tensor, rows: Rows) -> Batch:
    index = rows.indices(len(images))
    return {"grey": augment(warp(images[index, None] / 255, rows), rows), "target": items[index]}


def _picture_rows(pictures: np.ndarray, rows: Rows) -> Batch:
    index = rows.indices(len(pictures)).numpy()
    return {"pictures": as_tensor(pictures[index]) * 2 - 1, "noise": rows.normal(4, 8, 16)}


@dataclass(frozen=True)
class _CaptionRows:
    """Latents, noise, and prompts of which a share is empty."""

    latents: Shards
    input_ids: Tensor
    empty: Tensor
    proportion_empty_prompts: float

    def __call__(self, rows: Rows) -> Batch:
        index = rows.indices(len(self.latents))
        latents = self.latents[index.tolist()]["latents"]
        dropped = rows.uniform(1) < self.proportion_empty_prompts
        return {
            "x": latents,
            "noise": rows.normal(*latents.shape[1:]),
            "input_ids": torch.where(dropped, self.empty, self.input_ids[index]),
        }


def _captions(
    args: argparse.Namespace, tokenizer: Any, latents: Shards, prompts: Sequence[str]
) -> _CaptionRows:
    ids, empty = (base_models.tokenize(tokenizer, texts) for texts in (prompts, [""]))
    return _CaptionRows(latents, ids, empty, args.proportion_empty_prompts)


@dataclass(frozen=True)
class _SceneRows:
    captions: _CaptionRows
    num_timesteps: int

    def __call__(self, rows: Rows) -> Batch:
        return {**self.captions(rows), "timesteps": rows.integers(self.num_timesteps)}


@dataclass(frozen=True)
class _FlowRows:
    captions: _CaptionRows

    def __call__(self, rows: Rows) -> Batch:
        return {
            **self.captions(rows),
            "sigmas": flow_models.draw_sigmas(rows.normal(), rows.uniform(), rows.uniform()),
            "counts": flow_models.draw_counts(rows.uniform()),
        }


def _grey_rows(images: Tensor, num_timesteps: int, rows: Rows) -> Batch:
    return {
        "x": images[rows.indices(len(images)), None] / 127.5 - 1,
        "noise": rows.normal(1, 32, 32),
        "timesteps": rows.integers(num_timesteps),
    }


# --- validation and results ---


@torch.no_grad()
def reconstruct(vae: Any, pictures: Tensor) -> Tensor:
    """Encodes and decodes images (n, 3, h, w) in [0, 1] with the autoencoder."""
    parts = [decode_latents(vae, encode_pixels(vae, p * 2 - 1)) for p in pictures.split(256)]
    return (torch.cat(parts) / 2 + 0.5).clamp(0, 1)


def _load_vae(args: argparse.Namespace) -> Any:
    vae: Any = AutoencoderKL.from_pretrained(args.vae).eval()
    vae.register_to_config(_name_or_path="")  # a saved pipeline should not contain a local path
    return vae


def _validated(
    args: argparse.Namespace, grader: Any, images: np.ndarray, prompts: Sequence[str], step: int
) -> dict[str, float]:
    """Saves some of the images, and grades all."""
    save_grid(as_tensor(images[:48]), 8, _validation_path(args, step))
    return _grade_means(grader, images, prompts) if grader else {}


def _held_out_prompts(args: argparse.Namespace) -> list[str]:
    scenes = fashion_scenes.draw_scenes("test", args.num_validation_images, 0)
    return [fashion_scenes.caption(scene) for scene in scenes]


def _sample_scenes(pipe: Any, prompts: Sequence[str], guidance_scale: float) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    settings = {"height": 32, "width": 64, "num_inference_steps": 20, "guidance_scale": guidance_scale}
    chunks = [list(prompts[i : i + 64]) for i in range(0, len(prompts), 64)]
    images = [
        call_pipeline(pipe, c, generator=generator, output_type="np", **settings).images for c in chunks
    ]
    return np.concatenate(images)


def _recipe(accelerator: Accelerator, args: argparse.Namespace, made_of: dict[str, Any]) -> Recipe:
    return run_recipe(accelerator, args, made_of, VALIDATION)


def _load_grader(args: argparse.Namespace) -> Any:
    return GarmentClassifier.from_pretrained(args.grader).eval() if args.grader else None


def _grade_means(
    grader: GarmentClassifier, pictures: np.ndarray | Tensor, prompts: Sequence[str]
) -> dict[str, float]:
    return {name: float(right.mean()) for name, right in grade(grader, pictures, prompts).items()}


def _validation_path(args: argparse.Namespace, step: int) -> Path:
    return Path(args.output_dir) / f"validation-{step}.png"
