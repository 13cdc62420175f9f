"""Fits the Gaussian statistics that travel with the two base models, from their training data.

    python training/fit_base_gaussians.py --train_data_dir DIR --model_dir model_cards/fashion-ddpm
    python training/fit_base_gaussians.py --train_data_dir DIR --model_dir model_cards/fashion-scenes

Writes MODEL_DIR/gaussian. For a model with prompts the covariance is the one that is left when the prompt is
known, which belongs with a prompt's own mean, and the statistics of all pictures are its unconditional part.
"""

import argparse
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from tqdm.auto import tqdm

import diffusers_ext as dx
from diffusers_ext.data import fashion_scenes
from diffusers_ext.data.base_models import encode
from diffusers_ext.evaluation.grader import to_tensor


def main() -> None:
    """Reads the arguments, fits and saves."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train_data_dir", default=None, help="folder with Fashion-MNIST's idx files")
    parser.add_argument("--model_dir", type=Path, required=True)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--num_scenes", type=int, default=40_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    pipe = DiffusionPipeline.from_pretrained(args.model_dir, dtype=torch.float32)
    if not hasattr(pipe, "vae"):
        images, _ = fashion_scenes.load_garments(args.train_data_dir, "train")
        save(dx.GaussianStats.fit(_pixels(images), args.rank), args.model_dir / "gaussian")
        return
    pictures, prompts = fashion_scenes.scene_arrays(args.train_data_dir, "train", args.num_scenes, args.seed)
    latents = _latents(pipe.vae, pictures)
    names = np.array(prompts)
    pairs = (
        (x, list(n)) for x, n in zip(latents.split(1000), np.split(names, range(1000, len(names), 1000)))
    )
    within = dx.GaussianStats.fit(pairs, args.rank)
    # A prompt's mean comes from a call of the model, which also knows the prompts that training held out.
    save(dataclasses.replace(within, class_means=None, class_names=None), args.model_dir / "gaussian")


def save(stats: dx.GaussianStats, folder: Path) -> None:
    stats.save_pretrained(folder)
    print(f"{folder}: {stats}")


def _pixels(images: np.ndarray) -> Iterator[Tensor]:
    for chunk in np.array_split(images, max(1, len(images) // 1000)):
        yield to_tensor(chunk) * 2 - 1


def _latents(vae, pictures: np.ndarray) -> Tensor:
    chunks = np.array_split(pictures, max(1, len(pictures) // 250))
    return torch.cat([encode(vae, to_tensor(c) * 2 - 1) for c in tqdm(chunks, desc="encoding")])


if __name__ == "__main__":
    main()
