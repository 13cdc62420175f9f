"""Fits the Gaussian statistics that are included with the base models, to their training data.

    python training/fit_base_gaussians.py --train_data_dir DIR --model_dir model_cards/fashion-ddpm
    python training/fit_base_gaussians.py --train_data_dir DIR --model_dir model_cards/fashion-scenes
    python training/fit_base_gaussians.py --train_data_dir DIR --model_dir model_cards/fashion-flow

Writes MODEL_DIR/gaussian. For a model with prompts, the covariance is the within-prompt one, which belongs to
the mean of a single prompt. The statistics of all images are the unconditional part, and a map predicts the
mean from the prompt's embeddings. The script then calibrates how far DPM++ 2M may skip, for `skip="auto"`;
--calibrate_only does only this.
"""

import argparse
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor
from tqdm.auto import tqdm

import diffusers_ext as dx
from diffusers_ext.core.autoencoders import encode_pixels
from diffusers_ext.core.images import as_tensor
from diffusers_ext.testbed import fashion_scenes
from diffusers_ext.testbed.flow_models import T5_TOKENS, flow_solver
from diffusers_ext.training.arguments import non_negative_float, positive_int, seed


def main() -> None:
    """Parses the arguments, fits, calibrates and saves."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train_data_dir", default=None, help="folder with Fashion-MNIST's idx files")
    parser.add_argument("--model_dir", type=Path, required=True)
    parser.add_argument("--rank", type=positive_int, default=128)
    parser.add_argument("--num_scenes", type=positive_int, default=40_000)
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument("--calibrate_only", action="store_true")
    parser.add_argument("--calibration_steps", type=positive_int, nargs="+", default=[6, 10, 20])
    parser.add_argument("--num_calibration_images", type=positive_int, default=64)
    parser.add_argument("--guidance_scale", type=non_negative_float, default=2.0)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    pipe = DiffusionPipeline.from_pretrained(args.model_dir, dtype=torch.float32)
    folder = args.model_dir / "gaussian"
    stats = dx.GaussianStats.from_pretrained(folder) if args.calibrate_only else fit(args, pipe)
    stats = calibrate(args, pipe, stats)
    stats.save_pretrained(folder)
    print(f"{folder}: {stats}\nmay skip to σ: {stats.calibration['sigma']}")


def fit(args: argparse.Namespace, pipe: Any) -> dx.GaussianStats:
    """Statistics of the pixels, or of the latents with their prompts."""
    if not hasattr(pipe, "vae"):
        images, _ = fashion_scenes.load_garments(args.train_data_dir, "train")
        return dx.GaussianStats.fit(_pixels(images), args.rank)
    images, prompts = fashion_scenes.scene_arrays(args.train_data_dir, "train", args.num_scenes, args.seed)
    latents = _latents(pipe.vae, images)
    names = np.array(prompts)
    pairs = (
        (x, list(n)) for x, n in zip(latents.split(1000), np.split(names, range(1000, len(names), 1000)))
    )
    within = dx.GaussianStats.fit(pairs, args.rank)
    # The map predicts the means of all prompts, including held-out ones, so the table of means is not saved.
    mapped = dx.fit_prompt_map(pipe, within)
    return dataclasses.replace(mapped, class_means=None, class_names=None, class_counts=None)


def calibrate(args: argparse.Namespace, pipe: Any, stats: dx.GaussianStats) -> dx.GaussianStats:
    """`stats` with the result of `calibrate_skip` for training images and their prompts."""
    config = pipe.scheduler.config
    flow = isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler)
    # from_config would take the flow's config for that of a diffusion.
    pipe.scheduler = flow_solver(config.shift) if flow else DPMSolverMultistepScheduler.from_config(config)
    pipe.set_progress_bar_config(disable=True)
    n = args.num_calibration_images
    options: dict[str, Any] = {
        "num_inference_steps": args.calibration_steps,
        "num_images": n,
        "seed": args.seed,
    }
    if hasattr(pipe, "vae"):
        images, prompts = fashion_scenes.scene_arrays(args.train_data_dir, "train", n, args.seed + 1)
        options |= {"samples": _latents(pipe.vae, images), "prompts": prompts}
        options |= {"height": fashion_scenes.HEIGHT, "width": fashion_scenes.WIDTH}
        options |= {"guidance_scale": args.guidance_scale}
        # As good as the default of 256 zero tokens, in a fraction of its time.
        options |= {"max_sequence_length": T5_TOKENS[0]} if flow else {}
    else:
        images, _ = fashion_scenes.load_garments(args.train_data_dir, "train")
        options["samples"] = as_tensor(images[:n]) * 2 - 1
    return dx.calibrate_skip(pipe, stats, **options)


def _pixels(images: np.ndarray) -> Iterator[Tensor]:
    for chunk in np.array_split(images, max(1, len(images) // 1000)):
        yield as_tensor(chunk) * 2 - 1


def _latents(vae: Any, images: np.ndarray) -> Tensor:
    chunks = np.array_split(images, max(1, len(images) // 250))
    return torch.cat([encode_pixels(vae, as_tensor(c) * 2 - 1) for c in tqdm(chunks, desc="encoding")])


if __name__ == "__main__":
    main()
