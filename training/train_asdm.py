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
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from diffusers_ext.asdm import training as asdm
from diffusers_ext.asdm.distill import DistillWeights
from diffusers_ext.asdm.plan import PRESETS, PruningPlan, preset_stages
from diffusers_ext.asdm.prune import teacher_blocks
from diffusers_ext.checkpoints import checkpoint_only_what_is_trained
from diffusers_ext.data.base_training import save_grid
from diffusers_ext.data.latents import TrainingLatents, encode_captions
from diffusers_ext.data.pictures import add_data_arguments, load_dataset, require_data
from diffusers_ext.extras import require
from diffusers_ext.files import whole_folder, write_json
from diffusers_ext.publishing import create_hub_repo, publish
from diffusers_ext.training_utils import (
    Rows,
    add_model_arguments,
    add_training_arguments,
    load_pipeline,
    make_accelerator,
    rows_of_step,
    train,
)

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
        record = asdm.summarise(run.figures(pipe.unet), records, len(data))
        about = describe(args, plan, student)
        pipe.unet = student

        def save(folder: Path) -> None:
            save_pipeline(pipe, folder)
            plan.save(folder / "plan.json")

        publish(args, sys.argv, record, save, about, ["asdm", "pruning"], repo_id)
        print(json.dumps(record, indent=1))


def load_teacher(args: argparse.Namespace, accelerator: Accelerator) -> Any:
    """The pipeline, nothing in it trained."""
    pipe: Any = load_pipeline(args, dtype=torch.float32)
    missing = [name for name in ("unet", "vae", "text_encoder") if pipe.components.get(name) is None]
    if missing or pipe.unet.config.in_channels != pipe.vae.config.latent_channels:
        what = (
            f"no {', '.join(missing)}" if missing else f"{pipe.unet.config.in_channels} channels to its UNet"
        )
        raise ValueError(
            f"{type(pipe).__name__} has {what}: expected Stable Diffusion or SDXL, from text alone."
        )
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False)
    pipe.to(accelerator.device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_plan(args: argparse.Namespace, unet: Any) -> tuple[PruningPlan, list[int]]:
    """The plan whose stages are trained, and each one's steps."""
    if args.plan:
        plan = PruningPlan.load(args.plan)
    else:
        stages = preset_stages(args.preset, unet.config)
        plan = PruningPlan(dict(unet.config), tuple(map(tuple, stages)))
    plan.check(unet)
    steps = asdm.stage_steps(args.steps_per_stage, len(plan.stages), args.one_shot)
    return (asdm.in_one_go(plan) if args.one_shot else plan), steps


def start_or_resume(
    args: argparse.Namespace,
    accelerator: Accelerator,
    plan: PruningPlan,
    steps: list[int],
    weights: DistillWeights,
) -> None:
    """Refuses a folder that holds another run; notes what this one is."""
    output = Path(args.output_dir)
    recipe = {
        "fingerprint": plan.fingerprint,
        "stages": plan.stages,
        "steps_per_stage": steps,
        "weights": asdict(weights),
        "cond_convs": not args.no_cond_convs,
        "from_scratch": args.from_scratch,
        "seed": args.seed,
    }
    asdm.check_run(output, recipe, args.resume_from_checkpoint is not None)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        asdm.write_recipe(output, recipe)
        plan.save(output / "plan.json")


def use_xformers(plan: PruningPlan, teacher: Any) -> None:
    """The teacher's attention by xformers, if the plan allows it."""
    if plan.shape().gri():
        raise ValueError(
            "--enable_xformers_memory_efficient_attention would replace the plan's GRI attention (a gri.S cut): leave"
            " the option out, PyTorch's own attention is memory-efficient too."
        )
    require("xformers", "xformers")
    teacher.enable_xformers_memory_efficient_attention()


class Batches:
    """Training examples by number, as the objective takes them."""

    def __init__(self, args: argparse.Namespace, pipe: Any, data: Any) -> None:
        self.args, self.pipe, self.data = args, pipe, data
        self.num_timesteps = pipe.scheduler.config.num_train_timesteps
        self.encoded = TrainingLatents(args, pipe, data)
        height, width = self.encoded([0]).shape[2:]
        self.size: tuple[int, int] = height, width

    def __call__(self, rows: Rows) -> dict[str, Tensor]:
        """The tensors of the given rows."""
        index = rows.indices(len(self.data)).tolist()
        latents = self.encoded(index)
        empty = (rows.uniform() < self.args.proportion_empty_prompts).tolist()
        captions = [
            "" if drop else str(self.data[i][self.args.caption_column]) for i, drop in zip(index, empty)
        ]
        height, width = (side * self.pipe.vae_scale_factor for side in self.size)
        batch = encode_captions(self.pipe, captions, height, width)
        batch |= {"latents": latents, "noise": rows.normal(*latents.shape[1:])}
        return {**batch, "timesteps": rows.integers(self.num_timesteps)}


@dataclass
class Incubation:
    """The stages one after another; a stage depends on the student before it and on nothing else that ran."""

    args: argparse.Namespace
    pipe: Any
    plan: PruningPlan
    steps: list[int]
    weights: DistillWeights
    batches: Batches

    def all_stages(self) -> tuple[UNet2DConditionModel, list[dict[str, Any]]]:
        """The last student and every stage's record; stages whose student is there already are not trained."""
        done = 0
        while done < len(self.steps) and (self._folder(done + 1) / "unet").is_dir():
            done += 1
        if done:
            student = asdm.load_student(self._folder(done) / "unet").to(self.pipe.device).eval()
        else:
            student = (
                asdm.random_unet(self.pipe.unet, self.args.seed) if self.args.from_scratch else self.pipe.unet
            )
        paths = [self._folder(k) / "unet" / "stage.json" for k in range(1, done + 1)]
        records = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
        for stage in range(done + 1, len(self.steps) + 1):
            student, record = self._stage(stage, student)
            records.append(record)
        return student, records

    def figures(self, unet: Any) -> dict[str, int]:
        """What a UNet costs on the pictures trained on."""
        return asdm.cost_figures(unet, *self.batches.size, self.pipe.tokenizer.model_max_length)

    def _folder(self, stage: int) -> Path:
        return Path(self.args.output_dir) / f"stage-{stage}"

    def _stage(self, stage: int, source: Any) -> tuple[UNet2DConditionModel, dict[str, Any]]:
        folder, steps = self._folder(stage), self.steps[stage - 1]
        own = {"output_dir": str(folder), "max_train_steps": steps, "seed": 1000 * self.args.seed + stage}
        args = argparse.Namespace(**{**vars(self.args), **own})
        # With neither loss on the prediction, the last layers have no gradient.
        accelerator = make_accelerator(args, idle_parameters=not (self.weights.task or self.weights.output))
        student = asdm.make_student(source, self.plan, stage, not args.no_cond_convs).to(accelerator.device)
        if args.gradient_checkpointing:
            student.enable_gradient_checkpointing()
        if args.enable_xformers_memory_efficient_attention:
            student.enable_xformers_memory_efficient_attention()
        scheduler: Any = DDPMScheduler.from_config(self.pipe.scheduler.config)
        blocks = teacher_blocks(self.plan, stage)
        objective = asdm.StageObjective(
            student, self.pipe.unet, blocks, scheduler, self.weights, args.snr_gamma
        )
        checkpoint_only_what_is_trained(accelerator)

        def validate(model: nn.Module, step: int) -> dict[str, float]:
            if args.validation_prompts:
                self._draw(student, folder / f"validation-{step}.png")
            return self._fixed_losses(objective)

        record = train(accelerator, args, objective, self.batches, validate, last=False)
        record |= self.figures(student)
        if accelerator.is_main_process:
            with whole_folder(folder / "unet") as partial:
                student.save_pretrained(partial)
                write_json(partial / "stage.json", record)
        return student, record

    def _fixed_losses(self, objective: asdm.StageObjective) -> dict[str, float]:
        """On the same 64 rows for every student."""
        found: list[dict[str, Tensor]] = []
        for step in range(16):
            batch = self.batches(rows_of_step(10**9, step, 0, 1, 4))
            found.append(objective.losses(**{k: v.to(self.pipe.device) for k, v in batch.items()}))
        return {name: float(torch.stack([part[name] for part in found]).mean()) for name in found[0]}

    def _draw(self, student: Any, path: Path) -> None:
        """The teacher's pictures above the student's."""
        args, pipe, rows, teacher = self.args, self.pipe, [], self.pipe.unet
        height, width = (side * pipe.vae_scale_factor for side in self.batches.size)
        call = {"num_inference_steps": args.num_inference_steps, "guidance_scale": args.guidance_scale}
        call |= {"height": height, "width": width}
        try:
            for unet in (teacher, student):
                pipe.unet = unet
                seeds = [torch.Generator().manual_seed(i) for i in range(len(args.validation_prompts))]
                found = pipe(args.validation_prompts, generator=seeds, output_type="pt", **call).images
                rows.append(found.float().cpu())
        finally:
            pipe.unet = teacher
        save_grid(torch.cat(rows), len(args.validation_prompts), path)


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


def save_pipeline(pipe: Any, folder: Path) -> None:
    """In half precision, but for what transformers loads as it was saved."""
    pipe.to("cpu").to(torch.float16)
    for part in pipe.components.values():
        if isinstance(part, PreTrainedModel):
            part.float()
    pipe.save_pretrained(folder)


if __name__ == "__main__":
    main()
