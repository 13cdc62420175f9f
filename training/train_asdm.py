"""Prunes a UNet or transformer by a plan and trains it stage by stage: progressive incubation of A-SDM.

    accelerate launch training/train_asdm.py --pretrained_model_name_or_path MODEL --preset incubation \\
        --train_data_dir FOLDER --resolution 512 --use_ema --steps_per_stage 5000 --output_dir runs/asdm

MODEL is a pipeline of Stable Diffusion, SDXL, Stable Diffusion 3, Flux.1, Flux.2, Qwen-Image, Z-Image, Sana or
Lumina 2. FOLDER is an image folder with captions in metadata.jsonl, as
for the training scripts of diffusers. --dataset_name selects a data set on the Hub, or `fashion-scenes`,
which needs the files of Fashion-MNIST in --train_data_dir. --plan takes a plan.json of
`diffusers-ext asdm plan`. Every stage starts from the student of the previous one and learns from the full
network. With --interval_steps, the blocks of a transformer that stand for removed ones first learn this alone, from what
enters them in the full network. The stages are saved to OUTPUT_DIR/stage-1, stage-2, …; the final pipeline and its model card to
OUTPUT_DIR/model. An interrupted run resumes in its current stage with --resume_from_checkpoint latest. On
several CPUs, start one process per CPU with `ACCELERATE_USE_CPU=true torchrun --nproc_per_node N`.
"""

import argparse
import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from diffusers_ext.asdm.distill import DistillWeights
from diffusers_ext.asdm.incubation import (
    Incubation,
    check_xformers,
    load_plan,
    load_teacher,
    save_pipeline,
    start_or_resume,
)
from diffusers_ext.asdm.networks import network_name
from diffusers_ext.asdm.plan import PruningPlan
from diffusers_ext.asdm.presets import BLOCK_PRESETS, PRESETS
from diffusers_ext.asdm.training import summarise
from diffusers_ext.asdm.unet import ASDMUNet2DConditionModel
from diffusers_ext.core.families import denoiser_of
from diffusers_ext.training.arguments import (
    add_model_arguments,
    add_training_arguments,
    non_negative_float,
    positive_float,
    positive_int,
    share,
)
from diffusers_ext.training.captioned import CaptionedBatches
from diffusers_ext.training.cards import create_hub_repo, publish
from diffusers_ext.training.data import (
    add_augmentation_arguments,
    add_data_arguments,
    load_dataset,
    require_data,
)
from diffusers_ext.training.levels import add_flow_arguments
from diffusers_ext.training.loop import make_accelerator
from diffusers_ext.training.recipes import dataset_record
from diffusers_ext.training.sampling import GUIDANCE_HELP

ABOUT = """\
# {model}, pruned

`{model}` with a smaller {kind}, pruned in {stages} and trained by distillation from the full {kind} ({how}).
A-SDM (Zhu et al., arXiv:2312.15516) as rebuilt in diffusers-ext. The cuts are in `plan.json`.

{usage}

In the table, MACs are multiply-accumulates of one {kind} call for one image of the training size. `loss` is
the last training loss; task, output, feature and semantic are its terms without weights, on 64 fixed noisy
training images."""

STOCK = """\
The {kind} is a stock `{name}`: plain diffusers loads it, without this package.

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("FOLDER")
```"""

SUBCLASS = """\
The {kind} is an `{name}`, which diffusers can load once this package is imported.

```python
import diffusers_ext
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("FOLDER")
```"""


def parse_args() -> argparse.Namespace:
    """Parses the arguments of A-SDM and those that all training scripts share."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add_model_arguments(parser, "the teacher, a pipeline")
    cuts = parser.add_mutually_exclusive_group(required=True)
    cuts.add_argument("--plan", default=None, help="a plan.json for this network")
    cuts.add_argument("--preset", choices=[*PRESETS, *BLOCK_PRESETS], default=None, help="a published plan")
    add(
        "--steps_per_stage",
        type=positive_int,
        nargs="+",
        default=[1000],
        help="one for all stages, or one each",
    )
    add("--one_shot", action="store_true", help="make all cuts at once, with the steps of all stages")
    add("--no_cond_convs", action="store_true", help="discard the removed convolutions (no CLME-CondConv)")
    add(
        "--interval_steps",
        type=positive_int,
        default=None,
        help="of transformers: steps of every stage in which the blocks that stand for removed ones learn this alone, before"
        " the whole student is trained; default: none",
    )
    add("--from_scratch", action="store_true", help="start from random weights, as a control")
    add_data_arguments(parser)
    add_augmentation_arguments(parser)
    add("--proportion_empty_prompts", type=share, default=0.1, help="share of captions to drop")
    for field in fields(DistillWeights):
        add(
            f"--{field.name}_weight",
            type=non_negative_float,
            default=field.default,
            help=f"weight of the {field.name} loss",
        )
    add("--snr_gamma", type=positive_float, default=None, help="γ of min-SNR weights; default: equal weights")
    add(
        "--validation_prompts",
        nargs="*",
        default=[],
        help="prompts for images of the full network and of the students",
    )
    add("--num_inference_steps", type=positive_int, default=20, help="for the validation images")
    add("--guidance_scale", type=non_negative_float, default=None, help=GUIDANCE_HELP)
    add_flow_arguments(parser)
    add_training_arguments(parser)
    args = parser.parse_args()
    require_data(parser, args)
    for name in ("max_train_steps", "num_train_epochs"):
        if getattr(args, name) is not None:
            parser.error(f"--{name} is not supported: use --steps_per_stage")
    if args.optimizer == "drop_muon" and not (args.task_weight or args.output_weight):
        parser.error(
            "--optimizer drop_muon needs --task_weight or --output_weight: the last blocks have no gradient"
        )
    if args.resume_from_checkpoint not in (None, "latest"):
        parser.error("--resume_from_checkpoint must be 'latest', which finds the stage and its checkpoint")
    return args


def main() -> None:
    """Trains all stages; the main process saves, prints and uploads the result."""
    args = parse_args()
    weights = DistillWeights(**{f.name: getattr(args, f"{f.name}_weight") for f in fields(DistillWeights)})
    accelerator = make_accelerator(args, trackers=False)  # every stage has its own
    repo_id = create_hub_repo(args) if accelerator.is_main_process else None
    data = load_dataset(args)
    pipe, stored = load_teacher(args, accelerator)
    plan, steps = load_plan(args, denoiser_of(pipe))
    made_of = {"model": stored, "data": dataset_record(args, data)}
    start_or_resume(args, accelerator, plan, steps, made_of)
    if args.enable_xformers_memory_efficient_attention:
        check_xformers(plan)
    batches = CaptionedBatches(args, accelerator, pipe, data, made_of, args.proportion_empty_prompts)
    run = Incubation(args, pipe, plan, steps, weights, batches, accelerator, made_of)
    student, records = run.all_stages()
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if accelerator.is_main_process:
        record = summarise(run.figures(run.teaching.teacher), records, len(data))
        about = describe(args, plan, student)
        setattr(pipe, run.teaching.part, student)

        def save(folder: Path) -> None:
            save_pipeline(pipe, folder, args, accelerator)
            plan.save(folder / "plan.json")

        publish(args, sys.argv, record, save, about, ["asdm", "pruning"], repo_id, "text-to-image")
        print(json.dumps(record, indent=1))


def describe(args: argparse.Namespace, plan: PruningPlan, student: Any) -> str:
    """The text of the model card."""
    number, kind = len(plan.stages), network_name(student)
    usage = SUBCLASS if isinstance(student, ASDMUNet2DConditionModel) else STOCK
    how = "starting from random weights" if args.from_scratch else "starting from its weights"
    how += ", removed convolutions discarded" if args.no_cond_convs else ""
    return ABOUT.format(
        model=Path(args.pretrained_model_name_or_path).name,
        stages="one stage" if number == 1 else f"{number} stages",
        how=how,
        kind=kind,
        usage=usage.format(kind=kind, name=type(student).__name__),
    )


if __name__ == "__main__":
    main()
