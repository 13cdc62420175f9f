"""Progressive incubation of A-SDM (arXiv:2312.15516), as rebuilt here: the students of a plan and what they train on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from ..core.storage import check_recipe, write_json
from ..training.checkpoints import list_checkpoints
from .cost import count_macs
from .distill import DistillObjective, DistillWeights
from .plan import PruningPlan
from .prune import inherit_convs, prune_unet
from .unet import ASDMUNet2DConditionModel, empty_unet, unet_config

RECIPE_NAME = "incubation.json"


class StageObjective(nn.Module):
    """The loss of one stage's student against the whole UNet, of tensors alone; see `DistillObjective`.

    Args:
        student: trained.
        teacher: the UNet that the plan is for.
        blocks: {student's block: the teacher's}.
        scheduler, weights, snr_gamma: of `DistillObjective`.

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
        """The loss of one batch, see `losses`."""
        return self.distill(**_conditioned(**batch))

    def losses(self, **batch: Tensor) -> dict[str, Tensor]:
        """The losses by name, unweighted.

        Args:
            batch: latents, noise (b, C, H, W), timesteps (b,), prompt_embeds (b, tokens, width), and for SDXL
                pooled_prompt_embeds (b, width) and time_ids (b, 6).
        """
        return self.distill.losses(**_conditioned(**batch))


def _conditioned(
    latents: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    prompt_embeds: Tensor,
    pooled_prompt_embeds: Tensor | None = None,
    time_ids: Tensor | None = None,
) -> dict[str, Any]:
    found: dict[str, Any] = {
        "latents": latents,
        "noise": noise,
        "timesteps": timesteps,
        "encoder_hidden_states": prompt_embeds,
    }
    if pooled_prompt_embeds is not None:
        found["added_cond_kwargs"] = {"text_embeds": pooled_prompt_embeds, "time_ids": time_ids}
    return found


def make_student(source: Any, plan: PruningPlan, stage: int, cond_convs: bool = True) -> UNet2DConditionModel:
    """The untrained student of a stage, counted from 1.

    Args:
        source: the student of the stage before, for stage 1 the whole UNet; left alone.
        plan: see `PruningPlan`.
        stage: which.
        cond_convs: the removed convolutions live on as experts (CLME-CondConv).

    Raises:
        ValueError: see `prune_unet`.
    """
    stages = {"from_stage": stage - 1, "num_stages": stage}
    student = prune_unet(source, plan, **stages)
    return inherit_convs(student, source, plan, **stages) if cond_convs else student


def random_unet(unet: Any, seed: int) -> UNet2DConditionModel:
    """An untrained UNet of the same config; it depends on the seed alone, and nothing else on it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return empty_unet(unet_config(unet))


def load_student(folder: str | Path) -> UNet2DConditionModel:
    """What `save_pretrained` of a student wrote, in float32."""
    kind = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))["_class_name"]
    ours = kind == ASDMUNet2DConditionModel.__name__
    loader: Any = ASDMUNet2DConditionModel if ours else UNet2DConditionModel
    return loader.from_pretrained(folder, torch_dtype=torch.float32)


def in_one_go(plan: PruningPlan) -> PruningPlan:
    """The same cuts as a plan of one stage: the control for making them in several."""
    predictions = (plan.predictions[0], plan.predictions[-1]) if plan.predictions else ()
    return PruningPlan(plan.config, (plan.cuts,), predictions, plan.height, plan.width, plan.tokens)


def stage_steps(steps: Sequence[int], num_stages: int, one_shot: bool = False) -> list[int]:
    """Optimisation steps by stage.

    Args:
        steps: one number for all stages or one for each.
        num_stages: of the plan as it was made.
        one_shot: all stages' steps go to a single one.

    Raises:
        ValueError: another number of numbers, steps below 1, or a plan without stages.
    """
    if num_stages == 0:
        raise ValueError("The plan has no stages, so there is nothing to train.")
    if len(steps) not in (1, num_stages) or min(steps) < 1:
        raise ValueError(
            f"--steps_per_stage takes one number for all stages or one for each of the plan's {num_stages}, each 1 or"
            f" more; got {len(steps)}: {' '.join(map(str, steps))}."
        )
    each = list(steps) * (num_stages if len(steps) == 1 else 1)
    return [sum(each)] if one_shot else each


def check_run(output: Path, recipe: Mapping[str, Any], resumed: bool) -> None:
    """Refuses a folder whose students were made otherwise than `recipe` says, or that nobody asked to go on with.

    Raises:
        ValueError: names what differs.
    """
    begun = [p for p in sorted(output.glob("stage-*")) if list_checkpoints(p) or (p / "unet").is_dir()]
    if not begun:
        return
    if not resumed:
        raise ValueError(
            f"{output} holds {begun[-1].name} of an earlier run: continue it with --resume_from_checkpoint latest,"
            " delete its stages, or choose another --output_dir."
        )
    check_recipe(
        output / RECIPE_NAME, recipe, "resume it with its own arguments, or choose another --output_dir"
    )


def write_recipe(output: Path, recipe: Mapping[str, Any]) -> None:
    """Writes what `check_run` reads."""
    write_json(output / RECIPE_NAME, recipe)


def cost_figures(unet: Any, height: int, width: int, tokens: int) -> dict[str, int]:
    """Parameters, and multiply-accumulates of one call for one picture, CLME-CondConv layers included."""
    macs = count_macs(unet_config(unet), height, width, tokens)[""]
    return {"parameters": unet.num_parameters(), "MACs": macs}


def summarise(
    teacher: Mapping[str, int], records: Sequence[Mapping[str, Any]], pictures: int
) -> dict[str, Any]:
    """One record of all stages, as `publish` takes it.

    Args:
        teacher: see `cost_figures`.
        records: of the stages, what `train` returned and `cost_figures`.
        pictures: trained on.
    """
    found: dict[str, Any] = {name: sum(r[name] for r in records) for name in ("steps", "images", "seconds")}
    found |= {"hardware": records[-1]["hardware"], "pictures": pictures}
    found |= {f"teacher {name}": value for name, value in teacher.items()}
    for stage, record in enumerate(records, 1):
        own = {name: value for name, value in record.items() if name not in ("images", "seconds", "hardware")}
        found |= {f"stage {stage} {name}": value for name, value in own.items()}
    return found
