"""Generates garments in one step, projects corrupted ones and inpaints one half with an included projector.

Writes sign.png.
"""

from typing import Any

import numpy as np
import torch
from PIL import Image

import diffusers_ext as dx
from diffusers_ext.testbed.embedded import card_dir

sign: Any = dx.SIGNPipeline.from_pretrained(card_dir("sign-fashion-ddpm"), dtype=torch.float32)
print(dx.summary(sign))
generators = [torch.Generator().manual_seed(seed) for seed in range(8)]
generated = sign(batch_size=8, num_inference_steps=1, generator=generators, output_type="pt").images

noise = torch.randn(generated.shape, generator=torch.Generator().manual_seed(0))
corrupted = (generated + 0.25 * noise).clamp(0, 1)
projected = sign.project(corrupted, output_type="pt").images

# White marks the part to generate: the lower half of every image.
mask = torch.zeros(1, 1, 32, 32)
mask[..., 16:, :] = 1
edited = sign.edit(generated, mask, num_inference_steps=4, output_type="pt").images

rows = [torch.cat(list(images[:, 0]), 1) for images in (generated, corrupted, projected, edited)]
Image.fromarray((torch.cat(rows).numpy() * 255).round().astype(np.uint8)).save("sign.png")
