"""Distills a one- or few-step generator and projector from a diffusion model (SIGN).

    accelerate launch training/train_sign.py --pretrained_model_name_or_path MODEL \\
        --train_data_dir FOLDER --resolution 64 --use_ema --output_dir runs/sign

MODEL is a DDPM pipeline, or a text-to-image pipeline of Stable Diffusion, SDXL, Stable Diffusion 3, Flux.1, Flux.2,
Qwen-Image, Z-Image, Sana or Lumina 2, with --guidance_scale. FOLDER is an image folder,
with captions in metadata.jsonl if MODEL has prompts. --dataset_name selects a data set on the Hub, or
`fashion-mnist` or `fashion-scenes`, which need the files of Fashion-MNIST in --train_data_dir. By default the projector
learns from the scores of the teacher and of a second network, which follows its images. With --recipe regression, the
teacher first generates --num_pairs images, which are stored in --pairs_dir. The projector and its model card are
saved to OUTPUT_DIR/model: `diffusers_ext.SIGNPipeline.from_pretrained("OUTPUT_DIR/model")`. An interrupted
run resumes with --resume_from_checkpoint latest. On several CPUs, start one process per CPU with
`ACCELERATE_USE_CPU=true torchrun --nproc_per_node N`.
"""

import argparse
import copy
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from diffusers_ext import GaussianStats
from diffusers_ext.core.autoencoders import downsampling_of
from diffusers_ext.core.families import DENOISERS
from diffusers_ext.core.records import part_record
from diffusers_ext.core.storage import tensors_digest
from diffusers_ext.sign.arguments import add_sign_arguments, parse, scores_of, weights_of
from diffusers_ext.sign.conditions import Texts, start_means
from diffusers_ext.sign.figures import projector_figures
from diffusers_ext.sign.flows import hold_in_weights, holds_in_weights
from diffusers_ext.sign.inputs import encode_data
from diffusers_ext.sign.lora import lora_copy, save_sign_lora
from diffusers_ext.sign.source import PromptSource
from diffusers_ext.sign.teacher import (
    collect_pairs,
    load_data,
    load_start,
    load_teacher,
    make_source,
    save_samples,
    settle_guidance,
    untrained_projector,
)
from diffusers_ext.sign.training import SIGNObjective, SIGNRows
from diffusers_ext.training.arguments import (
    add_model_arguments,
    add_training_arguments,
    even_int,
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
{load}
images = sign({prompt}batch_size=8, num_inference_steps=1).images
cleaned = sign.project(images, {prompt}strength=0.2).images
```

In the table, `idempotence` is ‖f(f(z)) − f(z)‖/‖f(z)‖ (0 is ideal), `motion` is ‖f(z) − z‖/‖z‖ (0 for the
identity), `variance` is the variance of the samples relative to that of the data, and `reconstruction` is the
mean |f(x) − x| on data, in the space of the network."""


WHOLE = """
sign = dx.SIGNPipeline.from_pretrained("FOLDER")"""
LORA = """\
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("BASE")
sign = dx.load_sign_lora(pipe, "FOLDER")"""


def parse_args() -> argparse.Namespace:
    """Parses the arguments of SIGN and those that all training scripts share."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_arguments(parser, "the teacher, a pipeline")
    add_data_arguments(parser)
    add_augmentation_arguments(parser, cache=False)
    add_sign_arguments(parser)
    parser.add_argument(
        "--max_sequence_length",
        type=positive_int,
        default=None,
        help="of flow-matching models: number of tokens of a prompt; default: that of the pipeline",
    )
    add_training_arguments(parser, batch_size=even_int)
    args = parse(parser)
    require_data(parser, args)
    return args


def main() -> None:
    """Trains; the main process saves, prints and uploads the result."""
    args = parse_args()
    weights = weights_of(args)
    accelerator = make_accelerator(args, idle_parameters=True)
    refuse_shards(accelerator, "SIGN differentiates through its projector with constant weights")
    check_resume(accelerator, args)
    repo_id = create_hub_repo(args) if accelerator.is_main_process else None
    stats = load_statistics(args)
    stock, stored = load_teacher(args, accelerator)
    start = load_start(args, accelerator, stock)
    guidance_scale, embedded = settle_guidance(args, stock)
    pipe = untrained_projector(
        stock, args.sigma, max_sequence_length=args.max_sequence_length, in_weights=False
    )
    if embedded is not None:
        pipe.register_to_config(guidance=embedded)
    pipe.set_progress_bar_config(disable=True)
    data, images, captions, found = load_data(args, pipe)
    set_train_steps(args, accelerator, len(data))
    source = make_source(args, stock, data, stats)
    made_of = {"model": stored, "data": found, "source": record_of(args, source)}
    made_of |= {} if start is None else {"projector": part_record(start)}
    recipe = run_recipe(accelerator, args, made_of)
    if source is not None:
        pipe.register_modules(source=source.to(accelerator.device))
    if pipe.flow is not None:
        pipe.register_to_config(sample_size=list(data.shape[2:]))
    texts = Texts(stock, pipe, accelerator.device, args.max_sequence_length)
    height, width = (length * downsampling_of(stock) for length in data.shape[2:])
    texts.size = height, width
    pairs = None
    if weights.reg:
        pairs = collect_pairs(args, accelerator, pipe, texts, captions, made_of, guidance_scale)
    teacher, fake = make_networks(args, accelerator, stock, pipe, start)
    scores = scores_of(args, guidance_scale)
    objective = SIGNObjective(pipe.projector, teacher, weights, scores, args.warmup_steps, fake)
    if not args.rank:
        freeze(teacher, accelerator)  # not before the fake score was copied from it
    augmented = args.random_flip or not args.center_crop
    rows = SIGNRows(images if augmented else data, tuple(data.shape[1:]), pairs, captions)
    guided = guidance_scale != 1 or args.fake_guidance_scale != 1

    def encode(found: dict[str, Any]) -> dict[str, Tensor]:
        if "images" in found:
            found["data"] = encode_data(pipe, found.pop("images") / 255).float()
        if "prompts" in found:
            found |= texts.batch(found.pop("prompts"), guided)
        return found

    def validate(model: nn.Module, step: int) -> dict[str, float]:
        draw = torch.Generator().manual_seed(0)
        few = data[:256].to(accelerator.device)
        noise = torch.randn(few.shape, generator=draw).to(accelerator.device)
        prompts = None if captions is None else [captions.numbered(i) for i in range(len(few))]
        conditions = {} if prompts is None else texts.conditions(prompts)
        save_samples(pipe, few[:16], prompts, Path(args.output_dir) / f"validation-{step}.png")
        mean = start_means(pipe, conditions)
        return projector_figures(pipe.projector, noise, few, mean, **conditions)

    record = train(accelerator, args, objective, rows, validate, recipe=recipe, encode=encode)
    if accelerator.is_main_process:
        record["parameters"] = pipe.network.num_parameters()
        name = Path(args.pretrained_model_name_or_path).name
        prompt = "" if pipe.text_encoder is None else '"a red bag", '
        load = LORA if args.rank else WHOLE
        about = ABOUT.format(model=name, prompt=prompt, load=load)
        save = partial(save_projector, args, accelerator, pipe, stock)
        tags = ["sign", "lora"] if args.rank else ["sign"]
        task = "text-to-image" if prompt else "unconditional-image-generation"
        publish(args, sys.argv, record, save, about, tags, repo_id, task)
        print(json.dumps(record, indent=1))


def load_statistics(args: argparse.Namespace) -> GaussianStats | None:
    """The statistics of `--gaussian`, or those beside the model, or None."""
    if args.gaussian is not None:
        return GaussianStats.from_pretrained(args.gaussian, cache_dir=args.cache_dir)
    beside = Path(args.pretrained_model_name_or_path) / "gaussian"
    wanted = args.source in (None, "prompts") and beside.is_dir()
    return GaussianStats.from_pretrained(beside) if wanted else None


def make_networks(
    args: argparse.Namespace, accelerator: Accelerator, stock: Any, pipe: Any, start: nn.Module | None
) -> tuple[nn.Module, nn.Module | None]:
    """Gives the projector `pipe` the network that is trained, and returns those of the real and of the fake score.

    Without a LoRA, the fake score is None: the objective makes it.
    """
    part, teacher = ("unet" if pipe.flow is None else "transformer"), pipe.network
    if not args.rank:
        teacher = copy.deepcopy(teacher)
        pipe.register_modules(**{part: (pipe.network if start is None else start).requires_grad_(True)})
        return teacher, None
    own = lora_copy(teacher if start is None else start, stock, args.rank)
    pipe.register_modules(**{part: own})
    return teacher, lora_copy(teacher, stock, args.rank) if args.dmd_weight else None


def save_projector(
    args: argparse.Namespace, accelerator: Accelerator, pipe: Any, stock: Any, folder: Path
) -> None:
    """Writes the projector, or its LoRA, into a folder. The networks are then on the CPU, and in half precision."""
    if args.rank:
        save_sign_lora(pipe, stock, folder)
        return
    if holds_in_weights(pipe):
        hold_in_weights(pipe)
    as_stored(pipe, args, accelerator, trained=(*DENOISERS, "source")).to(torch.float16)
    for part in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        if getattr(pipe, part) is not None:
            getattr(pipe, part).float()
    pipe.save_pretrained(folder)


def record_of(args: argparse.Namespace, source: nn.Module | None) -> str | dict[str, Any]:
    """What tells a source from others, besides the data."""
    if isinstance(source, PromptSource):
        return {"digest": tensors_digest(source.state_dict())}
    # Not the digest of a mixture, which depends on the number of threads in its last bits.
    mixture = {"components": args.source_components, "rank": args.source_rank}
    return "white noise" if source is None else mixture


if __name__ == "__main__":
    main()
