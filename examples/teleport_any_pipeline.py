"""Teleportation with statistics of the pipeline's own samples. Runs offline in one or two minutes."""

import time
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import make_image_grid

import diffusers_ext as dx
from diffusers_ext.teleport.sources import pipeline_samples
from diffusers_ext.testbed.embedded import card_dir

prompts = ["a red bag", "a blue boot", "a green dress", "a white coat left of a yellow sandal"]
pipe: Any = DiffusionPipeline.from_pretrained(card_dir("fashion-scenes"), dtype=torch.float32)
pipe.set_progress_bar_config(disable=True)


def generate() -> list:
    start = time.perf_counter()
    images = pipe(prompts, num_inference_steps=20, guidance_scale=2.0, latents=noise).images
    print(f"{pipe.num_timesteps} steps, {time.perf_counter() - start:.2f} s")
    return images


# One mean per prompt and a shared covariance. Sampled without guidance, because teleportation applies it
# itself.
samples = pipeline_samples(pipe, 64, prompts=prompts, num_inference_steps=20, guidance_scale=1.0)
stats = dx.GaussianStats.fit(samples, rank=16)
noise = stats.sample(len(prompts), level=(0.0, 1.0))

full = generate()
dx.apply_teleport(pipe, stats, skip=0.3)
pipe.scheduler.set_mean(stats.class_mean(prompts), guidance_scale=2.0)
fast = generate()
print(dx.summary(pipe))
dx.remove_teleport(pipe)

make_image_grid([*full, *fast], rows=2, cols=len(prompts)).save("teleport_any_pipeline.png")
