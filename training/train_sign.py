"""Distills a one- or few-step generator and projector from a diffusion model (SIGN).

    accelerate launch training/train_sign.py --pretrained_model_name_or_path MODEL \\
        --train_data_dir FOLDER --resolution 64 --use_ema --output_dir runs/sign

MODEL is a DDPM pipeline, or a Stable Diffusion pipeline with --guidance_scale. FOLDER is an image folder,
with captions in metadata.jsonl if MODEL has prompts. --dataset_name selects a data set on the Hub, or
`fashion-mnist` or `fashion-scenes`, which need the files of Fashion-MNIST in --train_data_dir. The teacher
first generates --num_pairs images, which are stored in --pairs_dir. The projector and its model card are
saved to OUTPUT_DIR/model: `diffusers_ext.SIGNPipeline.from_pretrained("OUTPUT_DIR/model")`. An interrupted
run resumes with --resume_from_checkpoint latest. On several CPUs, start one process per CPU with
`ACCELERATE_USE_CPU=true torchrun --nproc_per_node N`.
"""

import argparse
import copy
import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffusers_ext.sign.objective import LossWeights
from diffusers_ext.sign.projector import SIGMA
from diffusers_ext.sign.source import MixtureSource
from diffusers_ext.sign.teacher import Texts, collect_pairs, load_data, load_teacher, save_samples
from diffusers_ext.sign.training import SIGNObjective, SIGNRows, projector_figures
from diffusers_ext.training.arguments import (
    add_model_arguments,
    add_training_arguments,
    even_int,
    non_negative_float,
    non_negative_int,
    positive_float,
    positive_int,
)
from diffusers_ext.training.cards import create_hub_repo, publish
from diffusers_ext.training.checkpoints import check_resume
from diffusers_ext.training.data import add_augmentation_arguments, add_data_arguments, require_data
from diffusers_ext.training.loop import make_accelerator, train
from diffusers_ext.training.models import as_stored, freeze
from diffusers_ext.training.recipes import run_recipe
from diffusers_ext.training.sharding import refuse_shards
from diffusers_ext.training.start import set_train_steps

ABOUT = """\
# SIGN projector of {model}

A projector distilled from `{model}` (Zaman et al., arXiv:2509.21470). It generates images in one or a few
steps and projects corrupted images onto the data.

```python
import diffusers_ext as dx

sign = dx.SIGNPipeline.from_pretrained("FOLDER")
images = sign(batch_size=8, num_inference_steps=1).images
cleaned = sign.project(images, strength=0.2).images
```

In the table, `idempotence` is ‖f(f(z)) − f(z)‖/‖f(z)‖ (0 is ideal), `motion` is ‖f(z) − z‖/‖z‖ (0 for the
identity), `variance` is the variance of the samples relative to that of the data, and `reconstruction` is the
mean |f(x) − x| on data, in the space of the network."""


def parse_args() -> argparse.Namespace:
    """Parses the arguments of SIGN and those that all training scripts share."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add_model_arguments(parser, "the teacher, a pipeline")
    add_data_arguments(parser)
    add_augmentation_arguments(parser, cache=False)
    add("--sigma", type=positive_float, default=SIGMA, help="noise level of the projector")
    add(
        "--source_components",
        type=non_negative_int,
        default=32,
        help="Gaussians of the source; 0: white noise",
    )
    add("--source_rank", type=positive_int, default=32, help="principal directions per Gaussian")
    add("--guidance_scale", type=non_negative_float, default=1.0, help="for the teacher, if it has prompts")
    add("--warmup_steps", type=non_negative_int, default=0, help="steps without the score loss")
    add("--fake_updates", type=positive_int, default=1, help="fake score updates per projector update")
    for field in fields(LossWeights):
        add(
            f"--{field.name}_weight",
            type=non_negative_float,
            default=field.default,
            help=f"weight of the {field.name} loss",
        )
    add("--num_pairs", type=positive_int, default=10_000, help="images of the teacher, for --reg_weight")
    add("--pairs_dir", default=None, help="folder for the pairs; default: OUTPUT_DIR/pairs")
    add("--num_inference_steps", type=positive_int, default=20, help="for the images of the teacher")
    add_training_arguments(parser, batch_size=even_int)
    args = parser.parse_args()
    require_data(parser, args)
    return args


def main() -> None:
    """Trains; the main process saves, prints and uploads the result."""
    args = parse_args()
    weights = LossWeights(**{f.name: getattr(args, f"{f.name}_weight") for f in fields(LossWeights)})
    accelerator = make_accelerator(args, idle_parameters=True)
    refuse_shards(accelerator, "SIGN differentiates through its projector with constant weights")
    check_resume(accelerator, args)
    repo_id = create_hub_repo(args) if accelerator.is_main_process else None
    pipe, stored = load_teacher(args, accelerator)
    data, images, captions, found = load_data(args, pipe)
    set_train_steps(args, accelerator, len(data))
    made_of = {"model": stored, "data": found}
    recipe = run_recipe(accelerator, args, made_of)
    if args.source_components:
        source = MixtureSource.fit(data, args.source_rank, args.source_components)
        pipe.register_modules(source=source.to(accelerator.device))
    teacher = copy.deepcopy(pipe.unet).eval().requires_grad_(False)
    texts = Texts(pipe, accelerator.device)
    pairs = None
    if weights.reg:
        pairs = collect_pairs(args, accelerator, pipe, texts, captions, made_of)
    objective = SIGNObjective(
        pipe.projector, teacher, weights, args.warmup_steps, args.fake_updates, args.guidance_scale
    )
    freeze(objective.teacher, accelerator)  # not before the fake score was copied from it
    augmented = args.random_flip or not args.center_crop
    rows = SIGNRows(images if augmented else data, tuple(data.shape[1:]), pairs, captions)

    def encode(found: dict[str, Any]) -> dict[str, Tensor]:
        if "images" in found:
            found["data"] = pipe._encode(found.pop("images") / 255).float()
        if "prompts" in found:
            found |= texts.batch(found.pop("prompts"), args.guidance_scale)
        return found

    def validate(model: nn.Module, step: int) -> dict[str, float]:
        draw = torch.Generator().manual_seed(0)
        few = data[:256].to(accelerator.device)
        noise = torch.randn(few.shape, generator=draw).to(accelerator.device)
        prompts = None if captions is None else [captions.numbered(i) for i in range(len(few))]
        conditions = {} if prompts is None else texts.conditions(prompts)
        save_samples(pipe, few[:16], prompts, Path(args.output_dir) / f"validation-{step}.png")
        return projector_figures(pipe.projector, noise, few, **conditions)

    record = train(accelerator, args, objective, rows, validate, recipe=recipe, encode=encode)
    if accelerator.is_main_process:
        record["parameters"] = pipe.unet.num_parameters()
        name = Path(args.pretrained_model_name_or_path).name
        as_stored(pipe, args, accelerator, trained=("unet", "source")).to(torch.float16)
        if pipe.text_encoder is not None:
            pipe.text_encoder.float()
        publish(args, sys.argv, record, pipe.save_pretrained, ABOUT.format(model=name), ["sign"], repo_id)
        print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
