"""What a projector's samples start from."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from .. import registration  # noqa: F401

# More rows than these hardly change the directions.
MOST_ROWS = 8192


class GaussianSource(ModelMixin, ConfigMixin):
    """Noisy data's Gaussian: unit noise ε becomes μ + (UΛUᵀ + σ²)^½ ε, the mean and directions being the data's.

    At a level σ at which the strongest directions of the data are not yet drowned, σ · ε is nothing that a denoiser at
    that level has ever seen, and the Gaussian is. It is also where the flow of a diffusion model takes ε, as far as its
    data are Gaussian (Wang and Vastola, arXiv:2412.09726), so pairs of the teacher's noise and pictures fit to it. SIGN
    starts from white noise; IGN (arXiv:2311.01462) fits its source to the spectrum of the data. This one is ours.

    Args:
        shape: (C, H, W) of one sample.
        rank: directions that are kept; beyond them the source has σ² alone.
    """

    @register_to_config
    def __init__(self, shape: tuple[int, int, int], rank: int) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(*shape), requires_grad=False)
        self.directions = nn.Parameter(torch.zeros(rank, self.mean.numel()), requires_grad=False)
        self.variances = nn.Parameter(torch.zeros(rank), requires_grad=False)

    @classmethod
    def fit(cls, data: Tensor, rank: int) -> GaussianSource:
        """The source of data (n, C, H, W), by a randomised singular value decomposition with a fixed seed.

        Raises:
            ValueError: a rank that is not below both the number of rows and the number of elements.
        """
        rows = data[:MOST_ROWS].flatten(1).float()
        if not 0 < rank < min(rows.shape):
            raise ValueError(
                f"The source's rank must be between 1 and {min(rows.shape) - 1} for {len(rows)} samples of"
                f" {rows.shape[1]} elements, got {rank}."
            )
        mean = rows.mean(0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            _, singular, directions = torch.svd_lowrank(rows - mean, q=rank, niter=4)
        channels, height, width = data.shape[1:]
        source: Any = cls((channels, height, width), rank)
        source.mean.copy_(mean.reshape(data.shape[1:]))
        source.directions.copy_(directions.T)
        source.variances.copy_(singular.square() / (len(rows) - 1))
        return source.to(data.device)

    def forward(self, noise: Tensor, sigma: float) -> Tensor:
        """Unit noise (n, C, H, W) as a sample of noisy data at the level `sigma`."""
        flat = noise.flatten(1)
        gains = (self.variances.float() + sigma**2).sqrt() - sigma
        moved = ((flat @ self.directions.T.to(flat)) * gains.to(flat)) @ self.directions.to(flat)
        return self.mean.to(noise) + sigma * noise + moved.reshape(noise.shape)
