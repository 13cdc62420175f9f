"""Progressive incubation: the teacher, the plan, the batches and the training of all stages."""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..core.images import save_grid
from ..core.pipeline import call_pipeline
from ..core.storage import whole_folder, write_json
from ..training.captioned import CaptionedBatches
from ..training.levels import check_flow_arguments
from ..training.loop import make_accelerator, train
from ..training.models import as_stored, freeze, frozen_dtype, load_frozen
from ..training.recipes import Recipe, run_recipe
from ..training.rows import on_device, rows_of_step
from ..training.transformers import flow_of_class
from . import training as asdm
from .distill import DistillWeights
from .flow_distill import IntervalObjective
from .networks import network_config
from .plan import PruningPlan
from .presets import preset_stages
from .teaching import Teaching, check_teacher


def load_teacher(args: argparse.Namespace, accelerator: Accelerator) -> tuple[Any, dict[str, Any]]:
    """The pipeline of the teacher, with all parameters frozen, and its record.

    Its UNet or transformer is in float32, for the students that start from it.

    Raises:
        ValueError: see `check_teacher` and `check_flow_arguments`.
    """
    pipe, stored = load_frozen(args, accelerator, trained=("unet", "transformer"))
    check_teacher(pipe)
    check_flow_arguments(args, flow_of_class(type(pipe)))
    return pipe, stored


def load_plan(args: argparse.Namespace, network: Any) -> tuple[PruningPlan, list[int]]:
    """The plan to train and the number of steps per stage."""
    if args.plan:
        plan = PruningPlan.load(args.plan)
    else:
        config = network_config(network)
        plan = PruningPlan(config, tuple(map(tuple, preset_stages(args.preset, config))))
    plan.check(network)
    steps = asdm.stage_steps(args.steps_per_stage, len(plan.stages), args.one_shot)
    return (asdm.in_one_go(plan) if args.one_shot else plan), steps


def start_or_resume(
    args: argparse.Namespace,
    accelerator: Accelerator,
    plan: PruningPlan,
    steps: list[int],
    made_of: Mapping[str, Any],
) -> None:
    """Checks that the output folder is empty or belongs to this run, and stores the recipe of the run.

    Args:
        args: all arguments.
        accelerator: of the run.
        plan, steps: from `load_plan`.
        made_of: records of the teacher, `model`, and of the images and captions, `data`.

    Raises:
        ValueError: the folder contains another run, see `check_run`.
    """
    output = Path(args.output_dir)
    # One number of steps for all stages means the same as one for each.
    args.steps_per_stage = steps
    recipe = recipe_of(args, accelerator, plan, made_of).fixed
    asdm.check_run(output, recipe, args.resume_from_checkpoint is not None)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        asdm.write_recipe(output, recipe)
        plan.save(output / "plan.json")


def recipe_of(
    args: argparse.Namespace, accelerator: Accelerator, plan: PruningPlan, made_of: Mapping[str, Any]
) -> Recipe:
    """The recipe of the run, or of a stage with its arguments."""
    cuts = {"fingerprint": plan.fingerprint, "stages": plan.stages}
    # A transformer with embedded guidance is told the scale in training too.
    embedded = bool(plan.config.get("guidance_embeds"))
    free = ("num_inference_steps",) if embedded else ("num_inference_steps", "guidance_scale")
    return run_recipe(accelerator, args, {**made_of, "plan": cuts}, free)


def check_xformers(plan: PruningPlan) -> None:
    """Raises a ValueError if the plan has GRI attention, which xFormers would replace."""
    if plan.shape().gri():
        raise ValueError(
            "--enable_xformers_memory_efficient_attention would replace the plan's GRI attention (a gri.S"
            " cut): omit the option. PyTorch's own attention is memory-efficient too."
        )


@dataclass
class Incubation:
    """The training of all stages. A stage depends on the student of the stage before and on nothing else."""

    args: argparse.Namespace
    pipe: Any
    plan: PruningPlan
    steps: list[int]
    weights: DistillWeights
    batches: CaptionedBatches
    accelerator: Accelerator
    made_of: Mapping[str, Any]

    def __post_init__(self) -> None:
        self.teaching = Teaching(self.args, self.pipe)
        if self.args.interval_steps and self.teaching.flow is None:
            raise ValueError(
                f"--interval_steps is for transformers, and {type(self.pipe).__name__} has a UNet: omit it."
            )

    def all_stages(self) -> tuple[Any, list[dict[str, Any]]]:
        """Trains all stages and skips those whose student is already saved.

        Returns:
            The student of the last stage, and the record of every stage.
        """
        done, part, teacher = 0, self.teaching.part, self.teaching.teacher
        while done < len(self.steps) and (self._folder(done + 1) / part).is_dir():
            done += 1
        if done:
            student = asdm.load_student(self._folder(done) / part).to(self.pipe.device).eval()
        elif self.args.from_scratch:
            student = asdm.random_network(teacher, self.args.seed)
        else:
            # A teacher that stays in float32 is not changed by training.
            exact = frozen_dtype(self.accelerator) == torch.float32
            student = teacher if exact else copy.deepcopy(teacher).cpu()
        freeze(teacher, self.accelerator)
        paths = [self._folder(k) / part / "stage.json" for k in range(1, done + 1)]
        records = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
        sources = [student]
        del student
        for stage in range(done + 1, len(self.steps) + 1):
            student, record = self._stage(stage, sources)
            sources.append(student)
            del student  # `sources` alone keeps it, until the next one is made of it
            records.append(record)
        return sources.pop(), records

    def figures(self, network: Any) -> Mapping[str, int]:
        """The cost of a network for images of the training size."""
        return self.teaching.figures(network, self.batches)

    def _folder(self, stage: int) -> Path:
        return Path(self.args.output_dir) / f"stage-{stage}"

    def _stage(self, stage: int, sources: list[Any]) -> tuple[Any, dict[str, Any]]:
        """The student of a stage, made of the last of `sources`, which is taken out and not kept in memory."""
        folder, part = self._folder(stage), self.teaching.part
        student = asdm.make_student(sources.pop(), self.plan, stage, not self.args.no_cond_convs)
        if self.args.interval_steps:
            student = self._intervals(student, stage)
        args = self._arguments(folder, self.steps[stage - 1], stage)
        # Without the task and output losses, the last layers have no gradient. The last text states of a transformer
        # have none either, if they are not compared.
        idle = self.teaching.flow is not None or not (self.weights.task or self.weights.output)
        accelerator = make_accelerator(args, idle_parameters=idle)
        student = student.to(accelerator.device)
        objective = self.teaching.objective(student, self.plan, stage, self.weights)

        def validate(model: nn.Module, step: int) -> dict[str, float]:
            if args.validation_prompts:
                with accelerator.autocast():  # the student is in float32, the other parts may not be
                    self._draw(student, folder / f"validation-{step}.png")
            return self._fixed_losses(objective)

        recipe = recipe_of(args, accelerator, self.plan, self.made_of)
        record = train(
            accelerator,
            args,
            objective,
            self.batches.read,
            validate,
            last=False,
            recipe=recipe,
            encode=self.batches.encode,
        )
        record |= self.figures(student)
        self._save(accelerator, student, folder / part, {"stage.json": record})
        return student, record

    def _intervals(self, student: Any, stage: int) -> Any:
        """The student after its blocks have learned their intervals alone, see `IntervalObjective`."""
        teaching, folder = self.teaching, self._folder(stage) / "intervals"
        if (folder / teaching.part).is_dir():
            return asdm.load_student(folder / teaching.part)
        assert teaching.flow is not None
        args = self._arguments(folder, self.args.interval_steps, stage)
        accelerator = make_accelerator(args)
        student = student.to(accelerator.device)
        shape: Any = self.plan.shape(stage)
        objective = IntervalObjective(
            student, teaching.teacher, teaching.flow, shape.intervals(), teaching.guidance
        )
        recipe = recipe_of(args, accelerator, self.plan, self.made_of)
        train(
            accelerator,
            args,
            objective,
            self.batches.read,
            last=False,
            recipe=recipe,
            encode=self.batches.encode,
        )
        self._save(accelerator, student, folder / teaching.part, {})
        return student.requires_grad_(True)

    def _arguments(self, folder: Path, steps: int, stage: int) -> argparse.Namespace:
        own = {
            "output_dir": str(folder),
            "max_train_steps": steps,
            "seed": (1000 * self.args.seed + stage) % 2**32,
        }
        return argparse.Namespace(**{**vars(self.args), **own})

    def _save(self, accelerator: Accelerator, student: Any, folder: Path, records: Mapping[str, Any]) -> None:
        if accelerator.is_main_process:
            with whole_folder(folder) as partial:
                student.save_pretrained(partial)
                for name, record in records.items():
                    write_json(partial / name, record)

    def _fixed_losses(self, objective: Any) -> dict[str, float]:
        """The losses on 64 rows that are the same for every student."""
        found: list[dict[str, Tensor]] = []
        for step in range(16):
            read = self.batches.read(rows_of_step(10**9, step, 0, 4))
            found.append(objective.losses(**self.batches.encode(on_device(read, self.pipe.device))))
        return {name: float(torch.stack([part[name] for part in found]).mean()) for name in found[0]}

    def _draw(self, student: Any, path: Path) -> None:
        """Saves validation images of the teacher (top row) and of the student."""
        args, pipe, rows = self.args, self.pipe, []
        part, teacher = self.teaching.part, self.teaching.teacher
        height, width = (length * self.batches.read.side for length in self.batches.size)
        call = {"num_inference_steps": args.num_inference_steps, "guidance_scale": args.guidance_scale}
        call |= {"height": height, "width": width}
        try:
            for network in (teacher, student):
                setattr(pipe, part, network)
                seeds = [torch.Generator().manual_seed(i) for i in range(len(args.validation_prompts))]
                found = call_pipeline(
                    pipe, args.validation_prompts, generator=seeds, output_type="pt", **call
                ).images
                rows.append(found.float().cpu())
        finally:
            setattr(pipe, part, teacher)
        save_grid(torch.cat(rows), len(args.validation_prompts), path)


def save_pipeline(pipe: Any, folder: Path, args: argparse.Namespace, accelerator: Accelerator) -> None:
    """Saves the pipeline in half precision, except for the models of transformers (float32)."""
    as_stored(pipe, args, accelerator, trained=("unet", "transformer")).to(torch.float16)
    for part in pipe.components.values():
        if isinstance(part, PreTrainedModel):
            part.float()
    pipe.save_pretrained(folder)
