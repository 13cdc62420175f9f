"""Arguments that the training scripts share, with the names and meanings of diffusers' own examples."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

import diffusers
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType
from diffusers import DiffusionPipeline
from diffusers.optimization import SchedulerType

PRECISIONS = ("no", "fp16", "bf16")
# Without the one that needs rules, for which there is no argument.
_SCHEDULERS = [s.value for s in SchedulerType if s is not SchedulerType.PIECEWISE_CONSTANT]


# --- types of arguments: `type=` of argparse ---


def _number(kind: type, expected: str, allowed: Callable[[Any], bool]) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and allowed(value)):
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text}")
        return value

    return parse


positive_int = _number(int, "a whole number of 1 or more", lambda x: x >= 1)
non_negative_int = _number(int, "a whole number of 0 or more", lambda x: x >= 0)
even_int = _number(int, "an even number of 2 or more", lambda x: x >= 2 and x % 2 == 0)
seed = _number(int, "a whole number from 0 to 4294967295", lambda x: 0 <= x < 2**32)
finite_float = _number(float, "a finite number", lambda x: True)
positive_float = _number(float, "a number above 0", lambda x: x > 0)
non_negative_float = _number(float, "a number of 0 or more", lambda x: x >= 0)
share = _number(float, "a number from 0 to 1", lambda x: 0 <= x <= 1)
below_one = _number(float, "a number from 0 to below 1", lambda x: 0 <= x < 1)


def _tracker(name: str) -> str:
    # Accelerate ignores a tracker whose package is missing.
    known, there = LoggerType.list(), [tracker.value for tracker in get_available_trackers()]
    if name not in known:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(known)}, got {name}")
    if not there if name == "all" else name not in there:
        raise argparse.ArgumentTypeError(
            f"the package of {name} is not installed: install it, or choose from"
            f" {', '.join(there) or 'none, since no tracker is installed'}"
        )
    return name


# --- the arguments ---


def add_training_arguments(
    parser: argparse.ArgumentParser, batch_size: Callable[[str], int] = positive_int
) -> argparse.ArgumentParser:
    """Adds the arguments of optimisation, checkpoints, logging and publishing; `batch_size` is the type of that."""
    add = parser.add_argument
    add("--output_dir", required=True, help="folder for the model, checkpoints and logs")
    add("--seed", type=seed, default=0)
    add(
        "--train_batch_size",
        type=batch_size,
        default=64,
        help="per process and accumulation step; 64, not 16 as in diffusers",
    )
    add(
        "--gradient_accumulation_steps",
        type=positive_int,
        default=None,
        help="default: that of `accelerate launch`, else 1",
    )
    add(
        "--max_train_steps",
        type=positive_int,
        default=None,
        help="total number of optimisation steps, instead of --num_train_epochs; default: 1000",
    )
    add(
        "--num_train_epochs",
        type=positive_int,
        default=None,
        help="as many steps as this number of passes over the data has. Images are drawn with replacement, so a pass"
        " need not contain every image. Default: --max_train_steps, unlike in diffusers",
    )
    add("--learning_rate", type=positive_float, default=1e-3, help="1e-3, not 1e-4 as in diffusers")
    add(
        "--scale_lr",
        action="store_true",
        help="multiply the learning rate by the number of images of a step",
    )
    add("--lr_scheduler", choices=_SCHEDULERS, default="cosine", help="cosine, not constant as in diffusers")
    add("--lr_warmup_steps", type=non_negative_int, default=200, help="200, not 500 as in diffusers")
    add(
        "--optimizer",
        choices=["adamw", "muon", "drop_muon"],
        default="adamw",
        help="muon: Muon for the matrices in the blocks of the network, also of convolutions and LoRAs, and AdamW for"
        " all else. drop_muon: each step updates only the blocks from a random one on, and backpropagation stops there."
        " The first block, with what is before it (input layer, embeddings, text encoder), has a share of 1 / number"
        " of blocks in the steps. With several processes or torch.compile only the updates are skipped, which saves no time",
    )
    add(
        "--drop_muon_sharp",
        action="store_true",
        help="for drop_muon: multiply the update of a matrix by the nuclear norm of its momentum, as in the paper",
    )
    add("--use_8bit_adam", action="store_true", help="AdamW with states of 8 bits; needs bitsandbytes")
    add("--adam_beta1", type=below_one, default=0.9)
    add("--adam_beta2", type=below_one, default=0.999)
    add("--adam_epsilon", type=positive_float, default=1e-8)
    add("--adam_weight_decay", type=non_negative_float, default=1e-2)
    add("--max_grad_norm", type=positive_float, default=1.0)
    add("--use_ema", action="store_true")
    add("--ema_decay", type=below_one, default=0.999)
    add(
        "--mixed_precision",
        choices=PRECISIONS,
        default=None,
        help="default: that of `accelerate config` and `accelerate launch`, else no",
    )
    add(
        "--allow_tf32",
        action="store_true",
        help="faster matrix products in float32 on Ampere GPUs and later, less exact",
    )
    add(
        "--dataloader_num_workers",
        type=non_negative_int,
        default=0,
        help="processes that read and augment images ahead, per process of training; 0: it reads them itself",
    )
    add(
        "--gradient_checkpointing",
        action="store_true",
        help="compute activations again in the backward pass: less memory, about a third slower, equal weights",
    )
    add(
        "--enable_xformers_memory_efficient_attention",
        action="store_true",
        help="attention of xFormers; needs a GPU",
    )
    add("--checkpointing_steps", type=positive_int, default=500)
    add(
        "--checkpoints_total_limit",
        type=non_negative_int,
        default=1,
        help="how many to keep; 0: all, as in diffusers",
    )
    add("--resume_from_checkpoint", default=None, help="checkpoint folder, or 'latest'")
    add("--validation_steps", type=non_negative_int, default=0, help="0: only at the end")
    add(
        "--report_to",
        type=_tracker,
        default=None,
        help="accelerate tracker: tensorboard, wandb, ...; default: none, unlike in diffusers",
    )
    add("--logging_dir", default="logs")
    add("--push_to_hub", action="store_true")
    add("--hub_model_id", default=None)
    return parser


def add_model_arguments(parser: argparse.ArgumentParser, about: str | None = None) -> None:
    """Adds the arguments that select a pipeline; `about` is the help text of its path."""
    add = parser.add_argument
    add("--pretrained_model_name_or_path", required=True, help=about)
    add("--revision", default=None)
    add("--variant", default=None)
    add(
        "--cache_dir",
        default=None,
        help="folder for downloaded models and data sets; default: Hugging Face's",
    )


def load_pipeline(args: argparse.Namespace, **options: Any) -> Any:
    """Loads the pipeline of `add_model_arguments`; `options` are arguments of `from_pretrained`."""
    named = {"revision": args.revision, "variant": args.variant, "cache_dir": args.cache_dir}
    return DiffusionPipeline.from_pretrained(args.pretrained_model_name_or_path, **named, **options)


def stored_class(args: argparse.Namespace) -> type | None:
    """The class of the pipeline of `add_model_arguments`, before anything else of it is loaded.

    None for a class that is not of diffusers, which `load_pipeline` finds or refuses.
    """
    named = {"revision": args.revision, "cache_dir": args.cache_dir}
    config: Any = DiffusionPipeline.load_config(args.pretrained_model_name_or_path, **named)
    return getattr(diffusers, str(config.get("_class_name")), None)
