"""Plans and prunes the UNet of an included model, and loads the result with plain Diffusers."""

from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler, UNet2DConditionModel

import diffusers_ext as dx
from diffusers_ext.testbed.embedded import card_dir

pipe: Any = DiffusionPipeline.from_pretrained(card_dir("fashion-scenes"), dtype=torch.float32)
pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
pipe.set_progress_bar_config(disable=True)
prompts = ["a red bag", "a blue boot left of a green dress"]
sampling = {"num_inference_steps": 6, "guidance_scale": 2.0, "height": 32, "width": 64}
probes = dx.record_calibration_inputs(pipe, prompts, num_timesteps=2, **sampling)

plan = dx.plan_pruning(pipe.unet, probes, target=0.9, stock_only=True)
for number, stage in enumerate(plan.stages, 1):
    predicted = plan.predictions[number]
    share = predicted.cost.macs / plan.predictions[0].cost.macs
    print(f"stage {number}: {', '.join(stage)}: {share:.1%} of the MACs, predicted loss {predicted.loss:.3g}")

student = dx.prune_network(pipe.unet, plan)
with TemporaryDirectory() as folder:
    student.save_pretrained(folder)
    loaded: Any = UNet2DConditionModel.from_pretrained(folder)
print(
    f"{loaded.num_parameters():,} of {pipe.unet.num_parameters():,} parameters are left."
    " training/train_asdm.py trains them."
)
