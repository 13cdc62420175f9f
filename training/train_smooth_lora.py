"""Trains a Smooth-LoRA: a LoRA with which images change evenly with the noise.

    accelerate launch training/train_smooth_lora.py --pretrained_model_name_or_path MODEL \\
        --train_data_dir FOLDER --resolution 512 --output_dir runs/smooth-lora

MODEL is a pipeline of Stable Diffusion, SDXL, Stable Diffusion 3, Flux.1, Flux.2, Qwen-Image, Z-Image, Sana
or Lumina 2. FOLDER is an image folder with captions in metadata.jsonl, as
for the training scripts of diffusers. --dataset_name selects a data set on the Hub, or `fashion-scenes`,
which needs the files of Fashion-MNIST in --train_data_dir. --variation_weight 0 trains a plain LoRA. The
weights and their model card are saved to OUTPUT_DIR/model:
`diffusers_ext.load_smooth_lora(pipe, "OUTPUT_DIR/model")`, or `pipe.load_lora_weights`. An interrupted run resumes with
--resume_from_checkpoint latest. On several CPUs, start one process per CPU with
`ACCELERATE_USE_CPU=true torchrun --nproc_per_node N`.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DynamoBackend
from diffusers.training_utils import cast_training_params
from torch import nn

from diffusers_ext.core.families import denoiser_of, guidance_of
from diffusers_ext.core.schedules import noising_scheduler
from diffusers_ext.metrics.istd import compute_istd
from diffusers_ext.smooth_lora.training import (
    FlowSmoothLoraObjective,
    SmoothLoraObjective,
    SmoothLoraRows,
    check_class,
    check_pipeline,
)
from diffusers_ext.smooth_lora.variation import StepwiseVariationLoss
from diffusers_ext.training.arguments import (
    add_model_arguments,
    add_training_arguments,
    non_negative_float,
    positive_float,
    positive_int,
    stored_class,
)
from diffusers_ext.training.captioned import CaptionedBatches
from diffusers_ext.training.cards import create_hub_repo, publish
from diffusers_ext.training.checkpoints import check_resume
from diffusers_ext.training.data import (
    add_augmentation_arguments,
    add_data_arguments,
    load_dataset,
    require_data,
)
from diffusers_ext.training.levels import add_flow_arguments, check_flow_arguments
from diffusers_ext.training.loop import make_accelerator, train
from diffusers_ext.training.lora import TARGETS, add_lora, lora_state, save_lora
from diffusers_ext.training.models import load_frozen
from diffusers_ext.training.recipes import dataset_record, run_recipe
from diffusers_ext.training.sampling import GUIDANCE_HELP, default_guidance, image_call
from diffusers_ext.training.sharding import is_sharded, refuse_shards
from diffusers_ext.training.start import set_train_steps
from diffusers_ext.training.transformers import Flow, flow_of_class

# Arguments that only act on the validation images.
VALIDATION = ("num_inference_steps", "guidance_scale")

ABOUT = """\
# Smooth-LoRA for {model}

A LoRA (rank {rank}) trained with the step-wise variation loss of Smooth Diffusion (Guo et al.,
arXiv:2312.04410), weight {weight:g}. Images change more evenly with the initial noise.

```python
import diffusers_ext as dx
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("BASE")
dx.apply_smooth_lora(pipe, "FOLDER")
```

`ISTD` in the table was measured on a few validation prompts, with images in [−1, 1]. Lower is smoother."""


def parse_args() -> argparse.Namespace:
    """Parses the arguments of Smooth-LoRA and those that all training scripts share."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add_model_arguments(parser)
    add_data_arguments(parser)
    add_augmentation_arguments(parser)
    add("--rank", type=positive_int, default=8, help="rank of the LoRA")
    add(
        "--variation_weight",
        type=non_negative_float,
        default=1.0,
        help="weight λ of the loss; 0 trains a plain LoRA",
    )
    add(
        "--estimator",
        choices=["vjp", "finite_difference"],
        default=None,
        help="estimator of the variation; default: vjp, or finite_difference with FSDP and with torch.compile",
    )
    add(
        "--running_mean",
        choices=["global", "per_timestep"],
        default="global",
        help="mean of the variation; per_timestep: one for each range of noise levels σ of a flow",
    )
    add("--spread", choices=["absolute", "relative"], default="absolute", help="relative compares logarithms")
    add(
        "--snr_gamma",
        type=positive_float,
        default=None,
        help="γ of min-SNR weights, not of flow-matching models; default: equal weights",
    )
    add_flow_arguments(parser)
    add("--validation_prompts", nargs="*", default=[], help="prompts for measuring the ISTD")
    add("--num_inference_steps", type=positive_int, default=20, help="for the validation images")
    add("--guidance_scale", type=non_negative_float, default=None, help=GUIDANCE_HELP)
    add_training_arguments(parser)
    args = parser.parse_args()
    require_data(parser, args)
    return args


def main() -> None:
    """Trains; the main process saves, prints and uploads the result."""
    args = parse_args()
    accelerator = make_accelerator(args)
    settle_estimator(args, accelerator)
    check_resume(accelerator, args, VALIDATION)
    repo_id = create_hub_repo(args) if accelerator.is_main_process else None
    kind = stored_class(args)
    if kind is not None:  # else a class of another package
        check_class(kind)
        check_flow_arguments(args, flow_of_class(kind))
    data = load_dataset(args)
    set_train_steps(args, accelerator, len(data))
    pipe, stored = load_frozen(args, accelerator)
    check_pipeline(pipe)
    flow, guidance = flow_of_class(type(pipe)), guidance_of(pipe)
    check_flow_arguments(args, flow)
    made_of = {"model": stored, "data": dataset_record(args, data)}
    if args.guidance_scale is None:
        args.guidance_scale = default_guidance(pipe)
    embedded = args.guidance_scale if guidance.embedded else None
    # An argument of the validation may change, but not what the model is told in training.
    own = {} if embedded is None else {"embedded guidance": embedded}
    recipe = run_recipe(accelerator, args, {**made_of, **own}, VALIDATION)
    if flow is not None:
        args.weighting_scheme = args.weighting_scheme or flow.weighting_scheme
    denoiser = denoiser_of(pipe)
    add_lora(denoiser, args.rank, targets=flow.targets if flow else TARGETS)
    cast_training_params(denoiser)  # PEFT gives the layers the data type of the frozen ones
    objective = make_objective(args, pipe, flow, embedded)
    batches = CaptionedBatches(args, accelerator, pipe, data, made_of)

    def validate(model: nn.Module, step: int) -> dict[str, float]:
        if not args.validation_prompts:
            return {}
        call = image_call(pipe, args, *batches.size)
        steps = args.num_inference_steps
        found = compute_istd(pipe, args.validation_prompts, progress=False, num_inference_steps=steps, **call)
        return {"ISTD": found.istd, "mean adjacent distance": found.mean_distance, "relative": found.relative}

    rows = SmoothLoraRows(batches.read)
    record = train(accelerator, args, objective, rows, validate, recipe=recipe, encode=batches.encode)
    if accelerator.is_main_process:
        record["pictures"] = len(data)
        name = Path(args.pretrained_model_name_or_path).name
        about = ABOUT.format(model=name, rank=args.rank, weight=args.variation_weight)
        state = {key: value.half() for key, value in lora_state(denoiser).items()}

        def save(folder: Path) -> None:
            save_lora(pipe, state, folder)

        tags = ["smooth-diffusion", "lora"]
        publish(args, sys.argv, record, save, about, tags, repo_id, "text-to-image")
        print(json.dumps(record, indent=1))


def make_objective(
    args: argparse.Namespace, pipe: Any, flow: Flow | None, guidance: float | None
) -> nn.Module:
    """The objective of the pipeline's denoiser."""

    def variation(kind: str) -> StepwiseVariationLoss:
        return StepwiseVariationLoss(kind, args.estimator, args.running_mean, args.spread)

    weight = args.variation_weight
    if flow is not None:
        return FlowSmoothLoraObjective(
            pipe.transformer, flow, variation("flow_prediction"), weight, args.weighting_scheme, guidance
        )
    scheduler: Any = noising_scheduler(pipe.scheduler)
    return SmoothLoraObjective(
        pipe.unet, scheduler, variation(scheduler.config.prediction_type), weight, args.snr_gamma
    )


def settle_estimator(args: argparse.Namespace, accelerator: Accelerator) -> None:
    """Sets `estimator`, unless it is given, to what `accelerate launch` leaves possible."""
    state: Any = accelerator.state
    compiled = state.dynamo_plugin.backend != DynamoBackend.NO
    if args.estimator is None:
        args.estimator = "finite_difference" if compiled or is_sharded(accelerator) else "vjp"
    if args.estimator == "vjp" and args.variation_weight:
        check_second_derivatives(accelerator)


def check_second_derivatives(accelerator: Accelerator) -> None:
    """Raises a ValueError if `accelerate launch` asks for what cannot be differentiated twice."""
    advice = "pass --estimator finite_difference"
    refuse_shards(
        accelerator, "--estimator vjp differentiates twice, through weights that FSDP has freed", advice
    )
    state: Any = accelerator.state
    if state.dynamo_plugin.backend != DynamoBackend.NO:
        raise ValueError(
            "`accelerate launch` asks for torch.compile, which cannot compile the second derivatives of --estimator"
            f" vjp: {advice}."
        )


if __name__ == "__main__":
    main()
