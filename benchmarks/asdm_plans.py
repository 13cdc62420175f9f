"""The plans of `asdm`: what is cut, chosen by hand or drawn at the same time of the UNet.

What can go is the attentions, the mid block and a layer at the finest resolution: the embedded UNet has one layer at
each of three resolutions, of 64, 96 and 128 channels. The cuts of `ours` were chosen by hand among nine sets of cuts, by what
students drew for 96 held-out prompts after 50 or 100 steps of training with 16 images each, one run a set, CLME-CondConv on.
After 50 steps these came to 72% prompt accuracy (teacher 92%), and the plan of equal milliseconds with the least change of
the untrained output, which `PruningProfile.plan` finds, to 9%: the output hardly shows whether the prompt still gets in.
"""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffusers_ext.asdm.calibration import record_calibration_inputs
from diffusers_ext.asdm.plan import PruningPlan, make_plan
from diffusers_ext.asdm.search import PruningProfile, profile_unet
from diffusers_ext.asdm.shape import fingerprint
from diffusers_ext.testbed.runs import held_out_prompts

from .asdm_runs import TEACHER, load
from .framework.bench import Bench
from .framework.cells import Cell

Stages = tuple[tuple[str, ...], ...]
MILD: Stages = (("attention.down.0",), ("attention:up_blocks.2.attentions.1",))
STAGES: dict[str, Stages] = {
    # To take an attention of the middle resolution instead of the mid block's was not told apart from it (84% and 85% after
    # 100 steps); but with the mid block's goes a layer, whose convolutions CLME-CondConv can inherit, and the student is a
    # stock UNet.
    "ours": (("attention.down.0",), ("attention.up.0",), ("mid.attention",)),
    "ours78": MILD,
    "ours78-gri": (*MILD, ("gri.0",)),
    # BK-SDM takes one layer of two from every resolution, BK-Small the mid block too. With one layer each, only that of
    # the finest resolution can go: at the others it changes the number of channels.
    "bk": (("layer.0", "mid"),),
}
NUM_DRAWS = 3


def plans_of(bench: Bench) -> dict[str, Path]:
    """Files of all plans, by name."""
    cell = Cell(plans, (bench.pick(30, 1),), (TEACHER / "unet",), alone=True)
    folder = bench.cache_dir / "plans"
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for name, text in bench.run([cell])[cell].items():
        found[name] = folder / f"{name}.json"
        found[name].write_text(str(text), encoding="utf-8")
    return found


def plans(repeats: int) -> dict[str, Any]:
    """All plans as JSON; the times of the random ones are measured on one thread, `repeats` times."""
    torch.set_num_threads(1)
    pipe = load()
    # With guidance eight rows.
    options: dict[str, Any] = {"height": 32, "width": 64, "guidance_scale": 2.0}
    probes = record_calibration_inputs(pipe, held_out_prompts(4, seed=5), **options)
    profile = profile_unet(pipe.unet, probes, repeats=repeats)
    found = {name: staged(profile, stages) for name, stages in STAGES.items()}
    left = found["ours"].predictions[-1].cost.of("milliseconds") / profile.costs.total.of("milliseconds")
    found |= random_plans(profile, left, found["ours"])
    return {name: np.array(_text(plan)) for name, plan in found.items()}


def _text(plan: PruningPlan) -> str:
    with tempfile.TemporaryDirectory() as folder:
        plan.save(Path(folder) / "plan.json")
        return (Path(folder) / "plan.json").read_text(encoding="utf-8")


def staged(profile: PruningProfile, stages: Stages) -> PruningPlan:
    """A plan of given cuts with what is expected of it."""
    losses = [
        sum(profile.sensitivity.cuts[(cut,)] for stage in stages[: k + 1] for cut in stage)
        for k in range(len(stages))
    ]
    return make_plan(profile.config, stages, profile.costs, losses)


def random_plans(profile: PruningProfile, left: float, ours: PruningPlan) -> dict[str, PruningPlan]:
    """Plans of one stage at the same milliseconds, all different; a draw of the same cuts as `ours` does not count."""
    found: dict[str, PruningPlan] = {}
    seen = {fingerprint(ours.shape().config())}
    for seed in itertools.count():
        plan = profile.random_plan(left, "milliseconds", seed)
        name = fingerprint(plan.shape().config())
        if name not in seen:
            found[f"random-{len(found) + 1}"] = plan
            seen.add(name)
        if len(found) == NUM_DRAWS:
            return found
    raise AssertionError
