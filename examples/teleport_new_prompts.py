"""A pipeline with built-in teleportation.

A prompt without statistics gets its mean from one evaluation of the model.
"""

import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import make_image_grid

from diffusers_ext.teleport.pipelines import TeleportStableDiffusionPipeline
from diffusers_ext.testbed.embedded import card_dir

# The class that custom_pipeline=dx.pipeline_path("teleport_sd") loads.
pipe = TeleportStableDiffusionPipeline.from_pretrained(card_dir("fashion-scenes"), dtype=torch.float32)
pipe.set_progress_bar_config(disable=True)
pipe.fit_teleport(64, rank=16, prompts=["a red bag", "a blue boot", "a green dress"], skip=0.3)

new = ["a purple trouser", "a cyan sneaker left of a white bag"]
images = pipe(new, num_images_per_prompt=4, num_inference_steps=20, guidance_scale=2.0).images
make_image_grid(images, rows=len(new), cols=4).save("teleport_new_prompts.png")

# As the class of diffusers, which needs no permission to run code.
StableDiffusionPipeline.from_pipe(pipe.unload_teleport()).save_pretrained("plain-pipeline")
