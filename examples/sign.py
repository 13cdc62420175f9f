"""Garments in one step, spoilt ones cleaned and one redrawn in part by the embedded projector; writes sign.png."""

from typing import Any

import numpy as np
import torch
from PIL import Image

import diffusers_ext as dx
from diffusers_ext.testbed.embedded import card_dir

sign: Any = dx.SIGNPipeline.from_pretrained(card_dir("sign-fashion-ddpm"), dtype=torch.float32)
print(dx.summary(sign))
generators = [torch.Generator().manual_seed(seed) for seed in range(8)]
drawn = sign(batch_size=8, num_inference_steps=1, generator=generators, output_type="pt").images

noise = torch.randn(drawn.shape, generator=torch.Generator().manual_seed(0))
spoilt = (drawn + 0.25 * noise).clamp(0, 1)
cleaned = sign.project(spoilt, output_type="pt").images

# White is drawn anew: the lower half of every picture.
mask = torch.zeros(1, 1, 32, 32)
mask[..., 16:, :] = 1
redrawn = sign.edit(drawn, mask, num_inference_steps=4, output_type="pt").images

rows = [torch.cat(list(pictures[:, 0]), 1) for pictures in (drawn, spoilt, cleaned, redrawn)]
Image.fromarray((torch.cat(rows).numpy() * 255).round().astype(np.uint8)).save("sign.png")
