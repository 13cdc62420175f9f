"""The students of `search_plans`: their training, and their losses on held-out images."""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..core.storage import write_json
from ..training.captioned import CaptionedBatches
from ..training.checkpoints import list_checkpoints
from ..training.loop import make_accelerator, train
from ..training.models import freeze, frozen_dtype
from ..training.recipes import run_recipe
from ..training.rows import Batch, Rows, on_device, rows_of_step
from . import training as asdm
from .candidates import Candidate
from .halving import Halving
from .teaching import Teaching

_CHOICE_SEED, _COMPARISON_SEED = 10**9, 10**9 + 1


@dataclass(frozen=True)
class _InTurn(Rows):
    """Rows of the data set in its order, from `first` on."""

    first: int = 0

    def indices(self, num_examples: int) -> Tensor:
        return torch.arange(self.first, self.first + len(self)) % num_examples


class Students:
    """Trains and evaluates the students; every result is kept in a file.

    Args:
        args: as of the training scripts, with the folder of the search as `output_dir`.
        accelerator: of the search; every student has its own.
        pipe: the pipeline, as from `load_teacher`. Its network is cast as mixed precision asks.
        candidates: {name: candidate}.
        batches: what the students are trained on.
        made_of: records of the pipeline, of the images and of the search.
        halving: the budget.
        held_out: the images for the losses, a `datasets.Dataset`.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        accelerator: Accelerator,
        pipe: Any,
        candidates: Mapping[str, Candidate],
        batches: CaptionedBatches,
        made_of: Mapping[str, Any],
        halving: Halving,
        held_out: Any,
    ) -> None:
        self.args, self.pipe, self.candidates, self.batches = args, pipe, candidates, batches
        self.made_of, self.halving = made_of, halving
        self.teaching = Teaching(args, pipe)
        teacher = self.teaching.teacher
        uncached = argparse.Namespace(**{**vars(args), "cache_latents": False})
        rows = CaptionedBatches(uncached, accelerator, pipe, held_out, made_of)
        # By the full network in float32, before it is cast.
        self.choice, self.comparison = (
            self._inputs(rows, len(held_out), seed) for seed in (_CHOICE_SEED, _COMPARISON_SEED)
        )
        self.wanted = [self.teaching.predict(teacher, inputs) for inputs in (self.choice, self.comparison)]
        exact = frozen_dtype(accelerator) == torch.float32
        self.source = teacher if exact else copy.deepcopy(teacher).cpu()
        freeze(teacher, accelerator)
        steps = halving.steps_of_rungs
        self.added = [steps[0], *(b - a for a, b in itertools.pairwise(steps))]
        sizes = halving.sizes(len(candidates))
        # One more in later rungs if the control is not among the best.
        most = sum(added * (size + (size < sizes[0])) for added, size in zip(self.added, sizes))
        self.bar = tqdm(total=most, unit="step")

    def evaluate(self, name: str, rung: int) -> float:
        """The loss of a student after a rung."""
        path = self._folder(name) / f"rung-{rung + 1}.json"
        self.bar.set_description(f"rung {rung + 1} of {self.halving.rungs}, {name}")
        if not path.is_file():
            write_json(path, self._train(name, rung))
        self.bar.update(self.added[rung])
        return json.loads(path.read_text(encoding="utf-8"))["loss"]

    def comparison_rows(self, name: str) -> np.ndarray:
        """The losses of a student of the last rung on the rows that chose nothing, (n,)."""
        path = self._folder(name) / f"rung-{self.halving.rungs}.json"
        return np.array(json.loads(path.read_text(encoding="utf-8"))["comparison rows"])

    def drop(self, names: Iterable[str]) -> None:
        """Deletes the checkpoints of students that are not trained further."""
        for name in names:
            for checkpoint in list_checkpoints(self._folder(name)):
                shutil.rmtree(checkpoint)

    def _folder(self, name: str) -> Path:
        return Path(self.args.output_dir) / "candidates" / name

    def _inputs(self, batches: CaptionedBatches, count: int, seed: int) -> list[Batch]:
        """Every held-out image once, with the noise and the noise level of the seed."""
        found, size = [], self.args.train_batch_size
        for step, first in enumerate(range(0, count, size)):
            draws = rows_of_step(seed, step, 0, min(size, count - first)).generators
            read = on_device(batches.read(_InTurn(draws, first=first)), self.pipe.device)
            found.append(batches.encode(read))
        return found

    def _train(self, name: str, rung: int) -> dict[str, Any]:
        """Trains a student from its checkpoint, or from the full network, to the steps of a rung."""
        steps = self.halving.steps_of_rungs[rung]
        own = {"output_dir": str(self._folder(name)), "max_train_steps": steps}
        args = argparse.Namespace(**{**vars(self.args), **own})
        accelerator = make_accelerator(args)
        plan = asdm.in_one_go(self.candidates[name].plan)
        student = asdm.make_student(self.source, plan, 1, cond_convs=False).to(accelerator.device)
        objective = self.teaching.objective(student, plan, 1)
        record: dict[str, Any] = {"steps": steps}

        def validate(model: nn.Module, step: int) -> dict[str, float]:
            rows = row_losses(self.teaching.predict(student, self.choice), self.wanted[0])
            record.update(loss=float(rows.mean()), rows=rows.tolist())
            if rung == self.halving.rungs - 1:
                fresh = row_losses(self.teaching.predict(student, self.comparison), self.wanted[1])
                record["comparison rows"] = fresh.tolist()
            return {"loss": record["loss"]}

        cuts = {"fingerprint": plan.fingerprint, "stages": plan.stages}
        recipe = run_recipe(accelerator, args, {**self.made_of, "plan": cuts})
        train(
            accelerator,
            args,
            objective,
            self.batches.read,
            validate,
            last=False,
            recipe=recipe,
            encode=self.batches.encode,
        )
        return record


def row_losses(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> np.ndarray:
    """The mean squared difference of every row, (n,) float64, from batches (b, ...)."""
    rows = [(one - other).flatten(1).double().square().mean(1) for one, other in zip(found, wanted)]
    return torch.cat(rows).cpu().numpy()
