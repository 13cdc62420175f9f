"""Interpolates between two noises with an included Smooth-LoRA and edits the color of the last frame.

Writes smooth_lora.png.
"""

from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from PIL import Image

import diffusers_ext as dx
from diffusers_ext.testbed.embedded import card_dir

pipe: Any = DiffusionPipeline.from_pretrained(card_dir("fashion-scenes"), dtype=torch.float32)
pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
pipe.set_progress_bar_config(disable=True)
options: dict[str, Any] = {"height": 32, "width": 64, "num_inference_steps": 10, "guidance_scale": 2.0}

dx.apply_smooth_lora(pipe, card_dir("smooth-lora-fashion-scenes"))
print(dx.summary(pipe))
ends = [torch.Generator().manual_seed(seed) for seed in (4, 5)]
frames = dx.interpolate(pipe, "a green bag", generator=ends, num_frames=8, progress=False, **options)

# Invert the last frame to its noise, and edit it to a blue bag.
noise = dx.ddim_invert(pipe, dx.encode_images(pipe, frames[-1:]), "a green bag", num_inference_steps=10)
edited = dx.edit(
    pipe, "a green bag", "a blue bag", latents=noise, strength=0.7, output_type="np", **options
).images
dx.remove_smooth_lora(pipe)

strip = np.concatenate([*frames, *edited], 1)
Image.fromarray((strip * 255).round().astype(np.uint8)).save("smooth_lora.png")
