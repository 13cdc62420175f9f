"""Images from the same seeds without and with golden noise; writes golden_noise.png."""

from typing import Any

import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler
from diffusers.utils.pil_utils import make_image_grid

import diffusers_ext as dx
from diffusers_ext.testbed.embedded import card_dir

pipe: Any = DiffusionPipeline.from_pretrained(card_dir("fashion-scenes"))
pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
npnet: Any = dx.NPNetModel.from_pretrained(card_dir("npnet-fashion-scenes"), torch_dtype=torch.float32)
prompts = ["a red bag left of a blue boot", "a white coat", "a cyan sneaker left of a orange dress"]


def generate() -> list:
    """Generates one image per prompt, without guidance, in six steps."""
    seeds = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    return pipe(
        prompts, height=32, width=64, num_inference_steps=6, guidance_scale=1.0, generator=seeds
    ).images


plain = generate()
dx.apply_golden_noise(pipe, npnet)
print(dx.summary(pipe))
golden = generate()
dx.remove_golden_noise(pipe)
make_image_grid([*plain, *golden], rows=2, cols=len(prompts)).save("golden_noise.png")
