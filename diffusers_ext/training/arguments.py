"""Arguments that the training scripts share, with the names and meanings of diffusers' own examples."""

from __future__ import annotations

import argparse
from typing import Any

from diffusers import DiffusionPipeline


def add_training_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds the arguments of optimisation, checkpoints, logging and publishing."""
    add = parser.add_argument
    add("--output_dir", required=True, help="folder for the model, checkpoints and logs")
    add("--seed", type=int, default=0)
    add("--train_batch_size", type=int, default=64, help="per process and accumulation step")
    add("--gradient_accumulation_steps", type=int, default=1)
    add("--max_train_steps", type=int, default=1000, help="total number of optimisation steps")
    add("--learning_rate", type=float, default=1e-3)
    add("--lr_scheduler", default="cosine")
    add("--lr_warmup_steps", type=int, default=200)
    add("--adam_weight_decay", type=float, default=1e-2)
    add("--max_grad_norm", type=float, default=1.0)
    add("--use_ema", action="store_true")
    add("--ema_decay", type=float, default=0.999)
    add("--mixed_precision", choices=["no", "fp16", "bf16"], default="no")
    add("--checkpointing_steps", type=int, default=500)
    add("--checkpoints_total_limit", type=int, default=1)
    add("--resume_from_checkpoint", default=None, help="checkpoint folder, or 'latest'")
    add("--validation_steps", type=int, default=0, help="0: only at the end")
    add("--report_to", default=None, help="accelerate tracker: tensorboard, wandb, ...")
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


def load_pipeline(args: argparse.Namespace, **options: Any) -> Any:
    """Loads the pipeline of `add_model_arguments`; `options` are arguments of `from_pretrained`."""
    named = {"revision": args.revision, "variant": args.variant}
    return DiffusionPipeline.from_pretrained(args.pretrained_model_name_or_path, **named, **options)
