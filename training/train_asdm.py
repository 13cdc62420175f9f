"""Prunes a UNet by a plan and trains what is left stage by stage: A-SDM's progressive incubation.

    accelerate launch training/train_asdm.py --pretrained_model_name_or_path MODEL --preset incubation \\
        --train_data_dir FOLDER --resolution 512 --use_ema --steps_per_stage 5000 --output_dir runs/asdm

MODEL is a Stable Diffusion or SDXL pipeline, FOLDER an image folder with captions in metadata.jsonl, as for diffusers' own
scripts; --dataset_name takes a data set on the Hub, or `fashion-scenes` with Fashion-MNIST's files in --train_data_dir.
--plan takes a plan.json of `diffusers-ext asdm`. Every stage starts from the student before it and learns from the whole
UNet; it lies in OUTPUT_DIR/stage-1, stage-2, … The finished pipeline is in OUTPUT_DIR/model with its card. A killed run goes
on with --resume_from_checkpoint latest, in whichever stage it was. On several CPUs, start one process each with
`ACCELERATE_USE_CPU=true torchrun --nproc_per_node N`.
"""

import argparse
import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from diffusers import UNet2DConditionModel

from diffusers_ext.asdm.distill import DistillWeights
from diffusers_ext.asdm.incubation import (
    Batches,
    Incubation,
    load_plan,
    load_teacher,
    save_pipeline,
    start_or_resume,
    use_xformers,
)
from diffusers_ext.asdm.plan import PRESETS, PruningPlan
from diffusers_ext.asdm.training import summarise
from diffusers_ext.training.arguments import add_model_arguments, add_training_arguments
from diffusers_ext.training.cards import create_hub_repo, publish
from diffusers_ext.training.data import add_data_arguments, load_dataset, require_data
from diffusers_ext.training.loop import make_accelerator

ABOUT = """\
# {model}, pruned

`{model}` with a smaller UNet: pruned in {stages} and trained after each against the whole one ({how}).
A-SDM (Zhu et al., arXiv:2312.15516) as rebuilt in diffusers-ext; the cuts are in `plan.json`.

{usage}

In the table, MACs are multiply-accumulates of one UNet call for one picture of the size trained on; `loss` is the last
training loss, and task, output, feature and semantic its parts, unweighted, on 64 fixed noisy training pictures."""

STOCK = """\
The UNet is a stock `UNet2DConditionModel`: plain diffusers loads it, without this package.

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("FOLDER")
```"""

SUBCLASS = """\
The UNet is an `ASDMUNet2DConditionModel`, which diffusers knows once the package is imported.

```python
import diffusers_ext
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("FOLDER")
```"""


def parse_args() -> argparse.Namespace:
    """The arguments: A-SDM's own and those that all training scripts share."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add_model_arguments(parser, "the teacher, a pipeline")
    cuts = parser.add_mutually_exclusive_group(required=True)
    cuts.add_argument("--plan", default=None, help="a plan.json that was made for this UNet")
    cuts.add_argument("--preset", choices=PRESETS, default=None, help="a plan known by name")
    add("--steps_per_stage", type=int, nargs="+", default=[1000], help="one number for all, or one each")
    add("--one_shot", action="store_true", help="all cuts at once and all steps after them: the control")
    add("--no_cond_convs", action="store_true", help="forget the removed convolutions (no CLME-CondConv)")
    add("--from_scratch", action="store_true", help="start from random weights: a control")
    add_data_arguments(parser)
    add("--cache_latents", action="store_true", help="encode every picture once, before training")
    add("--proportion_empty_prompts", type=float, default=0.1)
    for field in fields(DistillWeights):
        add(f"--{field.name}_weight", type=float, default=field.default)
    add("--snr_gamma", type=float, default=None)
    add("--gradient_checkpointing", action="store_true")
    add("--enable_xformers_memory_efficient_attention", action="store_true")
    add("--validation_prompts", nargs="*", default=[], help="drawn by the teacher and by each student")
    add("--num_inference_steps", type=int, default=20, help="of the validation pictures")
    add("--guidance_scale", type=float, default=7.5, help="of the validation pictures")
    add_training_arguments(parser)
    parser.set_defaults(max_train_steps=None)
    args = parser.parse_args()
    require_data(parser, args)
    if args.max_train_steps is not None:
        parser.error("--max_train_steps: stages have their own numbers, give --steps_per_stage")
    if args.resume_from_checkpoint not in (None, "latest"):
        parser.error("--resume_from_checkpoint: only 'latest', which finds the stage and its checkpoint")
    if not 0 <= args.proportion_empty_prompts <= 1:
        parser.error(f"--proportion_empty_prompts must be 0 to 1, got {args.proportion_empty_prompts}")
    return args


def main() -> None:
    """Trains all stages; the main process writes, prints and uploads the outcome."""
    args = parse_args()
    weights = DistillWeights(**{f.name: getattr(args, f"{f.name}_weight") for f in fields(DistillWeights)})
    # Every stage has its own accelerator, and with it its own tracker.
    accelerator = make_accelerator(argparse.Namespace(**{**vars(args), "report_to": None}))
    repo_id = create_hub_repo(args) if accelerator.is_main_process else None
    pipe = load_teacher(args, accelerator)
    plan, steps = load_plan(args, pipe.unet)
    start_or_resume(args, accelerator, plan, steps, weights)
    if args.enable_xformers_memory_efficient_attention:
        use_xformers(plan, pipe.unet)
    data = load_dataset(args)
    run = Incubation(args, pipe, plan, steps, weights, Batches(args, pipe, data))
    student, records = run.all_stages()
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if accelerator.is_main_process:
        record = summarise(run.figures(pipe.unet), records, len(data))
        about = describe(args, plan, student)
        pipe.unet = student

        def save(folder: Path) -> None:
            save_pipeline(pipe, folder)
            plan.save(folder / "plan.json")

        publish(args, sys.argv, record, save, about, ["asdm", "pruning"], repo_id)
        print(json.dumps(record, indent=1))


def describe(args: argparse.Namespace, plan: PruningPlan, student: Any) -> str:
    """The card's text."""
    number = len(plan.stages)
    how = "from random weights" if args.from_scratch else "from its weights"
    how += ", removed convolutions forgotten" if args.no_cond_convs else ""
    return ABOUT.format(
        model=Path(args.pretrained_model_name_or_path).name,
        stages="one stage" if number == 1 else f"{number} stages",
        how=how,
        usage=STOCK if type(student) is UNet2DConditionModel else SUBCLASS,
    )


if __name__ == "__main__":
    main()
