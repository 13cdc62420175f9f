"""`search_plans`: chooses a pruning plan by students that are trained for a short time."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..core.checks import check_counts
from ..core.storage import check_recipe, write_json
from ..metrics.comparison import Estimate, paired_difference
from ..training.arguments import add_model_arguments, add_training_arguments
from ..training.captioned import CaptionedBatches
from ..training.data import Captions, add_augmentation_arguments, add_data_arguments, load_dataset
from ..training.levels import add_flow_arguments
from ..training.loop import make_accelerator
from ..training.recipes import dataset_record, run_recipe
from ..training.sampling import image_call
from .calibration import record_calibration_inputs
from .candidates import Candidate, find_candidates
from .halving import Halving, Rung, ranking, successive_halving
from .incubation import load_teacher
from .networks import prunable
from .plan import PruningPlan
from .search import check_goal
from .students import Students

_NUM_PROMPTS, _NUM_TIMESTEPS = 4, 4  # of the calibration inputs
_EMPTY_PROMPTS = 0.1  # as train_asdm.py


@dataclass(frozen=True)
class SearchResult:
    """What `search_plans` found.

    Attributes:
        candidates: {name: candidate}, the plain search's first, which is the control.
        rungs: the losses of every rung.
        comparison: the loss of the best plan less that of the control, both trained to the last rung, on noise
            and timesteps that chose nothing; None if the control is the best plan.
    """

    candidates: dict[str, Candidate]
    rungs: list[Rung]
    comparison: Estimate | None

    @property
    def control(self) -> str:
        """The plan of the plain search."""
        return next(iter(self.candidates))

    @property
    def best(self) -> PruningPlan:
        """The best plan."""
        return self.candidates[ranking(self.rungs)[0]].plan

    def record(self) -> dict[str, Any]:
        """The content of `search.json`."""
        rows = [
            {
                "name": name,
                "source": (candidate := self.candidates[name]).source,
                "stages": candidate.plan.stages,
                "times": candidate.times,
                "losses": [rung.losses[name] for rung in self.rungs if name in rung.losses],
            }
            for name in ranking(self.rungs)
        ]
        return {
            "control": self.control,
            "steps of rungs": [rung.steps for rung in self.rungs],
            "candidates": rows,
            "best less control": None if self.comparison is None else asdict(self.comparison),
        }


def search_plans(
    model: str,
    output_dir: str | Path,
    target: float,
    *,
    batch_sizes: Sequence[int] = (8, 1),
    num_candidates: int = 12,
    halving: Halving | None = None,
    stock_only: bool = False,
    num_validation_images: int = 256,
    num_inference_steps: int = 20,
    guidance_scale: float | None = None,
    repeats: int = 10,
    **training: Any,
) -> SearchResult:
    """Finds plans that reach a target of measured time, and the best of them by successive halving.

    A student of every plan is trained for a few steps by distillation, with all cuts made at once and without
    CLME-CondConv. The best students are trained further, see `successive_halving`. The loss is the mean squared
    difference between the outputs of student and full UNet on images that no student is trained on, with the
    same noise and timesteps for all. The learning rate is constant after the warmup, and the loss is that of the
    averaged weights (EMA), so that a rung continues the one before.

    Everything is in `output_dir`: `plan.json`, the best plan; `search.json`, see `SearchResult.record`; and the
    checkpoints of the students of the last rung. Started again with the same arguments, an interrupted search
    continues.

    Args:
        model: folder or Hub repository of a pipeline whose students can be trained, see `check_teacher`.
        output_dir: the folder.
        target, batch_sizes, num_candidates, stock_only, repeats: see `find_candidates`.
        halving: the budget.
        num_validation_images: number of images to keep from training, for the loss.
        num_inference_steps: of the sampling runs on which the losses of cuts are measured.
        guidance_scale: of these runs, and what a transformer with embedded guidance is told; see `training.sampling`.
        training: arguments of the training scripts by name, such as `train_data_dir`, `resolution`,
            `train_batch_size`, `learning_rate` and `seed`.

    Raises:
        ValueError: an argument is out of range or of another value than the search needs; the folder has another
            search; there are too few images; the search runs in several processes; or see `find_candidates`,
            `Halving.sizes` and `load_dataset`.
    """
    halving = Halving() if halving is None else halving
    check_goal(target, "milliseconds")
    check_counts(num_validation_images=num_validation_images, num_candidates=num_candidates, repeats=repeats)
    if not batch_sizes:
        raise ValueError("Give at least one batch size.")
    for size in batch_sizes:
        check_counts(batch_sizes=size)
    halving.sizes(num_candidates)
    args = _arguments(model, output_dir, halving, training)
    args.guidance_scale = guidance_scale
    accelerator = make_accelerator(args)
    if accelerator.num_processes > 1:
        raise ValueError(f"The search runs in one process, got {accelerator.num_processes}.")
    output = Path(output_dir)
    trained_on, held_out, data_record = _split(args, load_dataset(args), num_validation_images)
    pipe, stored = load_teacher(args, accelerator)
    asked = {
        "target": target,
        "batch sizes": list(batch_sizes),
        "candidates": num_candidates,
        "halving": asdict(halving),
        "stock only": stock_only,
        "inference steps": num_inference_steps,
        "guidance scale": args.guidance_scale,
        "repeats": repeats,
    }
    made_of = {"model": stored, "data": data_record, "search": asked}
    recipe = run_recipe(accelerator, args, made_of).fixed
    if not check_recipe(output / "recipe.json", recipe, "continue it with its own, or choose another folder"):
        write_json(output / "recipe.json", recipe)
    batches = CaptionedBatches(args, accelerator, pipe, trained_on, made_of, _EMPTY_PROMPTS)
    if not (output / "candidates.json").is_file():
        captions = Captions(args, held_out)
        inputs = record_calibration_inputs(
            pipe,
            [captions.numbered(i) for i in range(_NUM_PROMPTS)],
            num_timesteps=min(_NUM_TIMESTEPS, num_inference_steps),
            num_inference_steps=num_inference_steps,
            # The students are trained with prompts of this length, so times and losses are those of such calls.
            **image_call(pipe, args, *batches.size),
        )
        found = find_candidates(
            prunable(pipe),
            inputs,
            target,
            batch_sizes=list(dict.fromkeys(batch_sizes)),
            num_candidates=num_candidates,
            stock_only=stock_only,
            repeats=repeats,
            seed=args.seed,
            progress=True,
        )
        _save_candidates(output, found)
    candidates = _load_candidates(output)
    students = Students(args, accelerator, pipe, candidates, batches, made_of, halving, held_out)
    control = next(iter(candidates))
    rungs = []
    for rung in successive_halving(list(candidates), halving, students.evaluate, control):
        rungs.append(rung)
        if rung.kept:
            students.drop(rung.losses.keys() - rung.kept)
    students.bar.close()
    best, comparison = ranking(rungs)[0], None
    if best != control:
        comparison = paired_difference(students.comparison_rows(best), students.comparison_rows(control))
    result = SearchResult(candidates, rungs, comparison)
    write_json(output / "search.json", result.record())
    result.best.save(output / "plan.json")
    return result


def _arguments(
    model: str, output_dir: str | Path, halving: Halving, training: Mapping[str, Any]
) -> argparse.Namespace:
    """The arguments of the training scripts, with those that the search sets itself."""
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_model_arguments(parser)
    add_data_arguments(parser)
    add_augmentation_arguments(parser)
    add_training_arguments(parser)
    add_flow_arguments(parser)
    own = {
        "lr_scheduler": "constant_with_warmup",
        "lr_warmup_steps": max(halving.steps // 10, 1),
        "use_ema": True,
        "checkpointing_steps": halving.steps,
        "checkpoints_total_limit": 1,
        "resume_from_checkpoint": "latest",
        "validation_steps": 0,
        "max_train_steps": halving.steps_of_rungs[-1],
    }
    taken = sorted(training.keys() & {*own, "num_train_epochs", "cache_latents", "push_to_hub"})
    if taken:
        raise ValueError(f"The search sets {', '.join(taken)} itself: omit it.")
    given = ["--pretrained_model_name_or_path", model, "--output_dir", str(output_dir)]
    for name, value in training.items():
        if value is not None and value is not parser.get_default(name):
            given += [f"--no-{name}" if value is False else f"--{name}"]
            given += [] if isinstance(value, bool) else [str(value)]
    try:
        args, unknown = parser.parse_known_args(given)
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from error
    if unknown:
        raise ValueError(f"The training scripts have no argument {unknown[0]}.")
    if args.dataset_name is None and args.train_data_dir is None:
        raise ValueError("Give a data set, dataset_name or train_data_dir, to train the students on.")
    vars(args).update(own, cache_latents=args.center_crop and not args.random_flip)
    return args


def _split(args: argparse.Namespace, data: Any, num_held_out: int) -> tuple[Any, Any, dict[str, Any]]:
    """The images to train on, those to keep from it, and the record of both."""
    if len(data) < max(num_held_out + 1, _NUM_PROMPTS):
        raise ValueError(
            f"There are {len(data)} images, of which {num_held_out} are for validation: give more images, or choose fewer"
            " for validation."
        )
    order = np.random.default_rng(args.seed).permutation(len(data)).tolist()
    record = {**dataset_record(args, data), "held out": num_held_out, "seed": args.seed}
    return data.select(order[num_held_out:]), data.select(order[:num_held_out]), record


def _save_candidates(output: Path, found: Sequence[Candidate]) -> None:
    records = {}
    for number, candidate in enumerate(found, 1):
        name = f"plan-{number:02d}"
        (output / "candidates" / name).mkdir(parents=True, exist_ok=True)
        candidate.plan.save(output / "candidates" / name / "plan.json")
        records[name] = {"source": candidate.source, "times": candidate.times}
    # Last, since it says that all are there.
    write_json(output / "candidates.json", records)


def _load_candidates(output: Path) -> dict[str, Candidate]:
    found = {}
    for name, record in json.loads((output / "candidates.json").read_text(encoding="utf-8")).items():
        times = {int(rows): share for rows, share in record["times"].items()}
        plan = PruningPlan.load(output / "candidates" / name / "plan.json")
        found[name] = Candidate(record["source"], plan, times)
    return found
