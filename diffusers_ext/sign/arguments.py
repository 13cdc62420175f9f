"""The arguments of `train_sign.py`: its recipes, and what contradicts each other."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

from ..training.arguments import (
    non_negative_float,
    non_negative_int,
    positive_float,
    positive_int,
    share,
)
from .objective import LossWeights
from .projector import SIGMA
from .scores import MATCHINGS, Scores

# What a recipe sets, also of the shared arguments. An argument that is given wins.
RECIPES: dict[str, dict[str, Any]] = {
    "scores": {
        "learning_rate": 1e-4,
        "fake_learning_rate": 1e-3,
        "adam_beta1": 0.0,
        "adam_weight_decay": 0.0,
        "lr_warmup_steps": 0,
        "matching": "dmd",
        "renoised_share": Scores.renoised_share,
        **{f"{name}_weight": value for name, value in asdict(LossWeights()).items()},
    },
    "regression": {
        "learning_rate": 1e-3,
        "fake_learning_rate": 1e-3,
        "adam_beta1": 0.9,
        "adam_weight_decay": 1e-2,
        "lr_warmup_steps": 200,
        "matching": "dmd_l1",
        "renoised_share": 0.0,
        **{f"{name}_weight": value for name, value in asdict(LossWeights(1, 0.5, 0, 0.5, 1)).items()},
    },
}
# Arguments of the scores, and the values with which they do nothing.
_OFF: dict[str, Any] = {
    "warmup_steps": 0,
    "fake_first_steps": 0,
    "fake_updates": 1,
    "fake_guidance_scale": 1.0,
    "renoised_share": 0.0,
}


def add_sign_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of SIGN; the model, the data and the training have theirs elsewhere."""
    add = parser.add_argument
    add(
        "--recipe",
        choices=list(RECIPES),
        default="scores",
        help="defaults of the losses and of the optimizer. scores: distribution matching by two score networks, a"
        " learning rate of 1e-4 and one of 1e-3 for the fake score, momentum 0, no weight decay. regression: images and"
        " steps of the teacher, which it generates first, and a learning rate of 1e-3",
    )
    add(
        "--projector",
        default=None,
        help="a pipeline with the network that the projector starts from: one that train_asdm.py has pruned from the teacher,"
        " or a projector that was trained with another recipe; default: the teacher's",
    )
    add(
        "--rank",
        type=positive_int,
        default=None,
        help="train a LoRA of this rank on the network, and the fake score as a second one: one copy of the weights in"
        " memory. Default: all weights of two copies beside the teacher",
    )
    add("--sigma", type=positive_float, default=SIGMA, help="noise level of the projector")
    add(
        "--source",
        choices=["prompts", "mixture", "white"],
        default=None,
        help="where samples start: a Gaussian around the mean of their prompt, a mixture of Gaussians fitted to the data,"
        " or white noise. Default: prompts if MODEL/gaussian or --gaussian has a prompt map, else mixture",
    )
    add(
        "--gaussian",
        default=None,
        help="folder or repository of the teacher's GaussianStats; default: MODEL/gaussian, if that folder exists",
    )
    add("--source_components", type=positive_int, default=32, help="Gaussians of the mixture")
    add("--source_rank", type=positive_int, default=32, help="principal directions of each of them")
    add(
        "--guidance_scale",
        type=non_negative_float,
        default=None,
        help="w of u + w(c − u) in the score of the teacher, if it has prompts, 1 is off on every model; or what a"
        " transformer with embedded guidance (Flux.1 dev, Flux.2) is told. Default: 1, or that of the pipeline",
    )
    for field in fields(LossWeights):
        add(
            f"--{field.name}_weight",
            type=non_negative_float,
            default=field.default,
            help=f"weight of the {field.name} loss",
        )
    _add_score_arguments(parser)
    add("--num_pairs", type=positive_int, default=10_000, help="images of the teacher, for --reg_weight")
    add("--pairs_dir", default=None, help="folder for the pairs; default: OUTPUT_DIR/pairs")
    add("--num_inference_steps", type=positive_int, default=20, help="for the images of the teacher")


def _add_score_arguments(parser: argparse.ArgumentParser) -> None:
    add, own = parser.add_argument, Scores()
    add("--fake_learning_rate", type=positive_float, default=None, help="learning rate of the fake score")
    add("--warmup_steps", type=non_negative_int, default=0, help="first steps, without the score loss")
    add(
        "--fake_first_steps",
        type=non_negative_int,
        default=own.fake_first_steps,
        help="steps in which only the fake score learns, before scores move the projector",
    )
    add("--fake_updates", type=positive_int, default=1, help="fake score updates per projector update")
    add(
        "--matching",
        choices=MATCHINGS,
        default=own.matching,
        help="loss of the scores. dmd: their difference, weighted by α/σ. dmd_l1: divided by the distance of each row, as in"
        " the paper of DMD. sid: score identity distillation",
    )
    add("--sid_alpha", type=non_negative_float, default=own.sid_alpha, help="α of --matching sid")
    add(
        "--fake_guidance_scale",
        type=non_negative_float,
        default=own.fake_guidance_scale,
        help="guidance of the fake score; equal to --guidance_scale in SiD's long-short guidance",
    )
    add(
        "--renoised_share",
        type=share,
        default=own.renoised_share,
        help="share of the rows of the scores that start from noised outputs of the projector",
    )


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses arguments with the defaults of their recipe; contradictions are usage errors."""
    known, _ = parser.parse_known_args(argv)
    parser.set_defaults(**RECIPES[known.recipe])
    args = parser.parse_args(argv)
    _check(parser, args)
    return args


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if not args.dmd_weight:
        given = [n for n, off in _OFF.items() if getattr(args, n) not in (off, parser.get_default(n))]
        given += ["matching sid"] if args.matching == "sid" else []
        if given:
            parser.error(
                f"--{given[0]} is for the scores, and --dmd_weight is 0: omit it, or use --recipe scores"
            )
    if args.sid_alpha != Scores.sid_alpha and args.matching != "sid":
        parser.error(f"--sid_alpha is for --matching sid, got {args.matching}")
    if args.gaussian is not None and args.source in ("mixture", "white"):
        parser.error(f"--gaussian is for --source prompts, got {args.source}: omit one of them")
    first = args.warmup_steps + args.fake_first_steps
    if args.max_train_steps is not None and first >= args.max_train_steps:
        parser.error(
            f"--warmup_steps and --fake_first_steps are {first} steps before the scores train the projector, and"
            f" --max_train_steps is {args.max_train_steps}: give more"
        )


def weights_of(args: argparse.Namespace) -> LossWeights:
    """The weights of the losses."""
    return LossWeights(**{f.name: getattr(args, f"{f.name}_weight") for f in fields(LossWeights)})


def scores_of(args: argparse.Namespace, guidance_scale: float) -> Scores:
    """The settings of the scores.

    Args:
        args: from `parse`.
        guidance_scale: of the real score, see `settle_guidance`.
    """
    names = ("matching", "sid_alpha", "fake_guidance_scale", "fake_first_steps", "fake_updates")
    given = {name: getattr(args, name) for name in (*names, "renoised_share")}
    rate = args.fake_learning_rate / args.learning_rate
    return Scores(guidance_scale=guidance_scale, fake_rate=rate, **given)
