"""Collects pairs of random and golden noise, the training data of NPNet, from any text-to-image pipeline.

    accelerate launch training/collect_noise_pairs.py --pretrained_model_name_or_path MODEL \\
        --prompts prompts.txt --num_pairs 20000 --output_dir runs/pairs --scorer pickscore --margin 0.1

Golden noise is the random noise after re-denoising (arXiv:2411.09502): one step down with --guidance_scale,
one step back up with --inversion_guidance_scale. --gap says what these scale: an input of the model, the embeddings
of the prompts, or classifier-free guidance. With --scorer, an image is generated from each of the two
noises, and a pair is kept if the score of the golden noise's image is higher by more than --margin. To resume
an interrupted run, start it again. Several processes share the work. On a CPU, start several processes with
`ACCELERATE_USE_CPU=true torchrun --nproc_per_node N`.
"""

import argparse
import json
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import torch
from accelerate import Accelerator

import diffusers_ext  # noqa: F401
from diffusers_ext.core.commands import read_prompts
from diffusers_ext.core.extras import SHORT_NAMES, load_function
from diffusers_ext.golden_noise.gaps import Gap
from diffusers_ext.golden_noise.pairs import PairSettings, collect_pairs
from diffusers_ext.golden_noise.scorers import load_scorer
from diffusers_ext.training.arguments import (
    PRECISIONS,
    add_model_arguments,
    finite_float,
    positive_int,
    seed,
)
from diffusers_ext.training.models import load_frozen
from diffusers_ext.training.start import lock_folder, settle_precision

HELP = {
    "gap": "what makes the step down differ from the step up; default: what the pipeline has",
    "num_inference_steps": "steps of the schedule; without --jump, its first step is taken; default: 50",
    "jump": "how far the step goes down, in the shifted sigma of a flow; default: 0.1 for a flow",
    "guidance_scale": "weight of the step down; default: 5.5, or 1.5 for --gap embedding",
    "inversion_guidance_scale": "weight of the step up; default: 1, or 0.5 for --gap embedding",
    "sampling_guidance_scale": "of the scored images; default: 5.5, or 1 for a model without guidance",
}


def parse_args() -> argparse.Namespace:
    """Parses the arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add_model_arguments(parser)
    add(
        "--prompts",
        required=True,
        help="text file with one prompt per line, or package.module:function of (count, seed)",
    )
    add("--num_pairs", type=positive_int, default=20_000, help="total number of attempts")
    add("--output_dir", required=True)
    add("--seed", type=seed, default=0)
    add("--train_batch_size", type=positive_int, default=8, help="attempts per shard, made in one batch")
    add("--height", type=positive_int, default=None, help="image height; default: the pipeline's")
    add("--width", type=positive_int, default=None, help="image width; default: the pipeline's")
    add(
        "--call_arguments",
        type=json.loads,
        default={},
        help="""more arguments of the pipeline's call, as JSON: '{"clip_skip": 2}'; training uses the same""",
    )
    add(
        "--mixed_precision",
        choices=PRECISIONS,
        default=None,
        help="data type of the pipeline; default: that of `accelerate launch`, else no",
    )
    add(
        "--scorer",
        default=None,
        help="clip[:MODEL], pickscore, package.module:function or FILE.py:FUNCTION",
    )
    for field in fields(PairSettings):
        kind: Any = type(field.default)
        if field.name == "gap":
            add("--gap", choices=get_args(Gap), default=None, help=HELP["gap"])
        elif kind is bool:
            add(f"--{field.name}", action="store_true")
        else:
            kind = positive_int if kind is int or field.name == "num_inference_steps" else finite_float
            add(f"--{field.name}", type=kind, default=field.default, help=HELP.get(field.name))
    return parser.parse_args()


def main() -> None:
    """Loads the pipeline, collects the pairs, and prints how many were kept."""
    args = parse_args()
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    settle_precision(args, accelerator)
    prompts = find_prompts(args.prompts, args.num_pairs, args.seed)
    if accelerator.is_main_process:
        lock_folder(args.output_dir)
    pipe, stored = load_frozen(args, accelerator)
    size = {name: value for name in ("height", "width") if (value := getattr(args, name)) is not None}
    mine = collect_pairs(
        pipe,
        prompts,
        args.num_pairs,
        args.output_dir,
        PairSettings(**{field.name: getattr(args, field.name) for field in fields(PairSettings)}),
        seed=args.seed,
        batch_size=args.train_batch_size,
        scorer=load_scorer(args.scorer, accelerator.device) if args.scorer else None,
        scorer_name=args.scorer,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        progress=accelerator.is_local_main_process,
        model=stored,
        **size,
        **args.call_arguments,
    )
    counts: Any = accelerator.reduce(torch.tensor([mine.kept, mine.tried], device=accelerator.device), "sum")
    accelerator.print(f"{args.output_dir}: {int(counts[0])} pairs kept of {int(counts[1])} tried")
    accelerator.end_training()


def find_prompts(source: str, count: int, seed: int) -> list[str]:
    """The lines of a file, or the result of a function."""
    source = SHORT_NAMES.get(source, source)
    if ":" in source:
        return list(load_function(source, "prompts")(count, seed))
    return read_prompts(Path(source))


if __name__ == "__main__":
    main()
