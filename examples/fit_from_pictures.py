"""Gaussian statistics of a set of images in a pipeline's latent space: fit, save, load, inspect."""

import torch
from diffusers import DiffusionPipeline

import diffusers_ext as dx
from diffusers_ext.teleport.sources import encoded_images
from diffusers_ext.testbed.embedded import card_dir
from diffusers_ext.testbed.fashion_scenes import SAMPLE_DIR, scene_arrays

pipe = DiffusionPipeline.from_pretrained(card_dir("fashion-scenes"), dtype=torch.float32)
images, captions = scene_arrays(SAMPLE_DIR, "train", 256)

# A folder of images or a datasets.Dataset works as well.
stats = dx.GaussianStats.fit(encoded_images(pipe, images, batch_size=32), rank=32)
stats.save_pretrained("fashion-scenes-stats")
stats = dx.GaussianStats.from_pretrained("fashion-scenes-stats")
print(stats)
print(f"{stats.eigenvalues.sum() / stats.total_variance:.0%} of the variance in {stats.rank} directions")

# Samples of the Gaussian alone have the right colors in the right places, but no garments.
latents = stats.sample(4) / pipe.vae.config.scaling_factor
blurs = pipe.image_processor.postprocess(pipe.vae.decode(latents).sample.detach())
for number, image in enumerate(blurs):
    image.save(f"gaussian_{number}.png")
