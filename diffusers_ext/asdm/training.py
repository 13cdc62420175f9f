"""Progressive incubation of A-SDM (arXiv:2312.15516), as rebuilt here: students, objective and records."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from ..core.storage import check_recipe, write_json
from ..training.checkpoints import list_checkpoints
from .cost import count_macs
from .distill import DistillObjective, DistillWeights
from .networks import empty_network, network_config
from .plan import PruningPlan
from .prune import inherit_convs, prune_network
from .shape import UNetShape
from .transformers import LISTS
from .unet import ASDMUNet2DConditionModel, unet_config

RECIPE_NAME = "incubation.json"


class StageObjective(nn.Module):
    """The loss of a stage's student compared with the full UNet, with tensors as its only arguments.

    Args:
        student: the trained UNet.
        teacher: the UNet that the plan is for.
        blocks: {block of the student: block of the teacher}.
        scheduler, weights, snr_gamma: see `DistillObjective`.

    Raises:
        ValueError: see `DistillObjective`.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        blocks: Mapping[str, str],
        scheduler: Any,
        weights: DistillWeights | None = None,
        snr_gamma: float | None = None,
    ) -> None:
        super().__init__()
        self.distill = DistillObjective(student, teacher, scheduler, weights, snr_gamma, blocks)

    def forward(self, **batch: Tensor) -> Tensor:
        """The loss of one batch; see `losses` for the arguments."""
        return self.distill(**conditioned(**batch))

    def losses(self, **batch: Tensor) -> dict[str, Tensor]:
        """The losses by name, without weights.

        Args:
            batch: latents and noise (b, C, H, W), timesteps (b,), prompt_embeds (b, tokens, width), and for
                SDXL pooled_prompt_embeds (b, width) and time_ids (b, 6).
        """
        return self.distill.losses(**conditioned(**batch))


def conditioned(
    latents: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    prompt_embeds: Tensor,
    pooled_prompt_embeds: Tensor | None = None,
    time_ids: Tensor | None = None,
) -> dict[str, Any]:
    """A batch with its conditions as arguments of the UNet; see `StageObjective.losses` for the arguments."""
    found: dict[str, Any] = {
        "latents": latents,
        "noise": noise,
        "timesteps": timesteps,
        "encoder_hidden_states": prompt_embeds,
    }
    if pooled_prompt_embeds is not None:
        found["added_cond_kwargs"] = {"text_embeds": pooled_prompt_embeds, "time_ids": time_ids}
    return found


def make_student(source: Any, plan: PruningPlan, stage: int, cond_convs: bool = True) -> Any:
    """The untrained student of a stage.

    Args:
        source: the student of the previous stage, or the full network for stage 1. It is not changed.
        plan: see `PruningPlan`.
        stage: number of the stage, from 1.
        cond_convs: keep the removed convolutions of a UNet as experts (CLME-CondConv).

    Raises:
        ValueError: see `prune_network`.
    """
    stages = {"from_stage": stage - 1, "num_stages": stage}
    student = prune_network(source, plan, **stages)
    convs = cond_convs and isinstance(plan.shape(), UNetShape)
    return inherit_convs(student, source, plan, **stages) if convs else student


def random_network(network: Any, seed: int) -> Any:
    """An untrained network with the same config.

    It depends on the seed only, and the global random state does not change.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return empty_network(network_config(network))


def load_student(folder: str | Path) -> Any:
    """Loads a saved student in float32."""
    kind = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))["_class_name"]
    ours = kind == ASDMUNet2DConditionModel.__name__
    loader: Any = ASDMUNet2DConditionModel if ours else UNet2DConditionModel
    loader = getattr(diffusers, kind) if kind in LISTS else loader
    return loader.from_pretrained(folder, torch_dtype=torch.float32)


def in_one_go(plan: PruningPlan) -> PruningPlan:
    """The same cuts as a plan with one stage, the control for training in stages."""
    predictions = (plan.predictions[0], plan.predictions[-1]) if plan.predictions else ()
    return PruningPlan(plan.config, (plan.cuts,), predictions, plan.height, plan.width, plan.tokens)


def stage_steps(steps: Sequence[int], num_stages: int, one_shot: bool = False) -> list[int]:
    """The number of optimization steps of every stage.

    Args:
        steps: one number for all stages, or one per stage.
        num_stages: number of stages of the original plan.
        one_shot: add up the steps of all stages for a single stage.

    Raises:
        ValueError: the number of values does not match the stages, a value is below 1, or the plan has no
            stages.
    """
    if num_stages == 0:
        raise ValueError("The plan has no stages, so there is nothing to train.")
    if len(steps) not in (1, num_stages) or min(steps) < 1:
        raise ValueError(
            f"--steps_per_stage takes one number for all stages or one for each of the plan's {num_stages},"
            f" each 1 or more; got {len(steps)}: {' '.join(map(str, steps))}."
        )
    each = list(steps) * (num_stages if len(steps) == 1 else 1)
    return [sum(each)] if one_shot else each


def check_run(output: Path, recipe: Mapping[str, Any], resumed: bool) -> None:
    """Checks that an output folder is empty, or that a run with the same recipe is to be resumed.

    Args:
        output: the output folder.
        recipe: everything that the students depend on.
        resumed: whether --resume_from_checkpoint was given.

    Raises:
        ValueError: the folder contains a run that is not resumed, or that has another recipe. The message
            names the differences.
    """
    stages = sorted(output.glob("stage-*"))
    begun = [p for p in stages if any(map(_is_begun, (p, p / "intervals")))]
    if not begun:
        return
    if not resumed:
        raise ValueError(
            f"{output} contains {begun[-1].name} of an earlier run: resume it with --resume_from_checkpoint"
            " latest, delete its stages, or choose another --output_dir."
        )
    check_recipe(
        output / RECIPE_NAME, recipe, "resume it with its own arguments, or choose another --output_dir"
    )


def _is_begun(folder: Path) -> bool:
    done = any((folder / part).is_dir() for part in ("unet", "transformer"))
    return done or (folder.is_dir() and bool(list_checkpoints(folder)))


def write_recipe(output: Path, recipe: Mapping[str, Any]) -> None:
    """Writes the recipe that `check_run` reads."""
    write_json(output / RECIPE_NAME, recipe)


def cost_figures(unet: Any, height: int, width: int, tokens: int) -> dict[str, int]:
    """Parameters, and MACs of one call for one image, including CLME-CondConv layers."""
    macs = count_macs(unet_config(unet), height, width, tokens)[""]
    return {"parameters": unet.num_parameters(), "MACs": macs}


def summarise(
    teacher: Mapping[str, int], records: Sequence[Mapping[str, Any]], pictures: int
) -> dict[str, Any]:
    """One record of all stages, for `publish`.

    Args:
        teacher: `cost_figures` of the teacher.
        records: one per stage, from `train` and `cost_figures`.
        pictures: number of training images.
    """
    found: dict[str, Any] = {name: sum(r[name] for r in records) for name in ("steps", "images", "seconds")}
    found |= {"hardware": records[-1]["hardware"], "pictures": pictures}
    changes: list[dict[str, Any]] = []
    found |= {f"teacher {name}": value for name, value in teacher.items()}
    for stage, record in enumerate(records, 1):
        known = ("images", "seconds", "hardware", "resumptions")
        found |= {f"stage {stage} {name}": value for name, value in record.items() if name not in known}
        changes += [{"stage": stage, **change} for change in record.get("resumptions", [])]
    return {**found, "resumptions": changes} if changes else found
