"""Draws `picture.png` of the embedded models' cards, with their own weights and fixed seeds.

python training/make_card_pictures.py            # of all models
python training/make_card_pictures.py fashion-scenes npnet-fashion-scenes
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)

import diffusers_ext as dx
from diffusers_ext.core.images import as_tensor, save_grid
from diffusers_ext.testbed.embedded import card_dir
from diffusers_ext.testbed.fashion_scenes import ITEMS, SAMPLE_DIR, load_garments
from diffusers_ext.testbed.grader import read_grader

PROMPTS = (
    *(
        "a red bag left of a blue boot",
        "a green dress",
        "a purple trouser left of a white bag",
        "a cyan sneaker",
    ),
    *(
        "a yellow sandal",
        "a blue dress left of a red sandal",
        "a white trouser",
        "a green bag left of a cyan boot",
    ),
)
SCENE = {"height": 32, "width": 64, "guidance_scale": 2.0}
ROWS = 4  # of the garments of a classifier


def load(name: str, **components: Any) -> Any:
    """An embedded base model; a UNet with DPM++ 2M."""
    pipe: Any = DiffusionPipeline.from_pretrained(card_dir(name), dtype=torch.float32, **components)
    if hasattr(pipe, "unet"):
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, count: int, **call: Any) -> torch.Tensor:
    """Images (n, 3, 32, 64) of the first prompts, one seed each."""
    short = {} if hasattr(pipe, "unet") else {"max_sequence_length": 2}
    generators = [torch.Generator().manual_seed(seed) for seed in range(count)]
    options = {**SCENE, "num_inference_steps": 10, **short, **call}
    return as_tensor(pipe(list(PROMPTS[:count]), generator=generators, output_type="np", **options).images)


def scenes(name: str) -> tuple[torch.Tensor, int]:
    """Images of a text-to-image model."""
    return draw(load(name), 8, num_inference_steps=20), 4


def garments(name: str) -> tuple[torch.Tensor, int]:
    """Images of the unconditional model."""
    made = load(name)(
        batch_size=16, generator=torch.Generator().manual_seed(0), num_inference_steps=20, output_type="np"
    )
    return as_tensor(made.images), 8


def golden_noise(name: str, base: str) -> tuple[torch.Tensor, int]:
    """Random noise above, golden noise below, without guidance."""
    pipe, call = load(base), {"num_inference_steps": 6, "guidance_scale": 1.0}
    plain = draw(pipe, 4, **call)
    dx.apply_golden_noise(pipe, dx.NPNetModel.from_pretrained(card_dir(name), torch_dtype=torch.float32))
    return torch.cat([plain, draw(pipe, 4, **call)]), 4


def smooth_lora(name: str, base: str) -> tuple[torch.Tensor, int]:
    """The same path of noise without the LoRA above, with it below."""
    pipe, rows = load(base), []
    short = {} if hasattr(pipe, "unet") else {"max_sequence_length": 2}
    for added in (False, True):
        if added:
            dx.apply_smooth_lora(pipe, card_dir(name))
        ends = [torch.Generator().manual_seed(seed) for seed in (4, 5)]
        options = {**SCENE, "num_inference_steps": 10, **short}
        found = dx.interpolate(pipe, "a green bag", generator=ends, num_frames=6, progress=False, **options)
        rows.append(as_tensor(np.stack(list(found))))
    return torch.cat(rows), 6


def pruned(name: str, base: str) -> tuple[torch.Tensor, int]:
    """The full network above, the pruned one below."""
    kinds: dict[str, Any] = {"unet": UNet2DConditionModel, "transformer": SD3Transformer2DModel}
    part = "unet" if (card_dir(name) / "unet").is_dir() else "transformer"
    student = kinds[part].from_pretrained(card_dir(name), subfolder=part, torch_dtype=torch.float32)
    return torch.cat([draw(load(base), 4), draw(load(base, **{part: student}), 4)]), 4


def sign(name: str) -> tuple[torch.Tensor, int]:
    """Samples of one step."""
    pipe: Any = dx.SIGNPipeline.from_pretrained(card_dir(name), torch_dtype=torch.float32)
    made = pipe(batch_size=16, generator=torch.Generator().manual_seed(0), output_type="np")
    return as_tensor(made.images), 8


def sign_scenes(name: str, base: str) -> tuple[torch.Tensor, int]:
    """Images of one step of a projector that is a LoRA."""
    pipe = dx.load_sign_lora(load(base), card_dir(name))
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in range(8)]
    made = pipe(list(PROMPTS), num_inference_steps=1, generator=generators, output_type="np")
    return as_tensor(made.images), 4


def sorted_garments(name: str) -> tuple[torch.Tensor, int]:
    """Test garments, in a column for each item for which the classifier takes them."""
    pictures, _ = load_garments(SAMPLE_DIR, "test")
    grey = torch.from_numpy(pictures[:400]).float().div(255)[:, None]
    with torch.no_grad():
        items = read_grader(card_dir(name))(grey).argmax(1)
    columns = [grey[items == item][:ROWS] for item in range(len(ITEMS))]
    return torch.stack(columns, 1).flatten(0, 1), len(ITEMS)


PICTURES: dict[str, Callable[[str], tuple[torch.Tensor, int]]] = {
    "fashion-scenes": scenes,
    "fashion-flow": scenes,
    "fashion-ddpm": garments,
    "fashion-grader": sorted_garments,
    "fashion-judge": sorted_garments,
    "sign-fashion-ddpm": sign,
    **{f"npnet-{base}": partial(golden_noise, base=base) for base in ("fashion-scenes", "fashion-flow")},
    **{f"smooth-lora-{base}": partial(smooth_lora, base=base) for base in ("fashion-scenes", "fashion-flow")},
    **{f"sign-{base}": partial(sign_scenes, base=base) for base in ("fashion-scenes", "fashion-flow")},
    **{f"asdm-{base}": partial(pruned, base=base) for base in ("fashion-scenes", "fashion-flow")},
}


def main(argv: Sequence[str] | None = None) -> None:
    """Parses the names and writes the pictures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help=f"models; default: all of {', '.join(PICTURES)}")
    names = parser.parse_args(argv).names
    unknown = sorted(set(names) - set(PICTURES))
    if unknown:
        parser.error(f"no models {', '.join(unknown)}: expected {', '.join(PICTURES)}")
    for name in names or PICTURES:
        images, columns = PICTURES[name](name)
        path = Path(card_dir(name)) / "picture.png"
        save_grid(images, columns, path)
        print(path)


if __name__ == "__main__":
    main()
