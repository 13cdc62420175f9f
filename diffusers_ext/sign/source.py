"""What a projector's samples start from."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

# More rows than these hardly change the directions.
MOST_ROWS = 16_384


class MixtureSource(ModelMixin, ConfigMixin):
    """Noisy data as a mixture of Gaussians: unit noise ε becomes μₖ + (UₖΛₖUₖᵀ + σ²)^½ ε for a component k drawn by ε itself.

    At a level σ at which the strongest directions of the data are not yet drowned, σ · ε is nothing that a denoiser at
    that level has ever seen, and noisy data's own distribution is. With one component this is where the flow of a
    diffusion model takes ε, as far as its data are Gaussian (Wang and Vastola, arXiv:2412.09726). SIGN starts from white
    noise; IGN (arXiv:2311.01462) fits its source to the spectrum of the data. This one is ours.

    Args:
        shape: (C, H, W) of one sample.
        rank: directions that are kept of each component; beyond them it has σ² alone.
        num_components: of the mixture.
    """

    @register_to_config
    def __init__(self, shape: tuple[int, int, int], rank: int, num_components: int = 1) -> None:
        super().__init__()
        size = shape[0] * shape[1] * shape[2]

        def zeros(*of: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(num_components, *of), requires_grad=False)

        self.weights, self.means = zeros(), zeros(size)
        self.directions, self.variances = zeros(rank, size), zeros(rank)

    @classmethod
    def fit(cls, data: Tensor, rank: int, num_components: int = 1) -> MixtureSource:
        """The source of data (n, C, H, W): a component is a part of the rows, see `split_rows`.

        Raises:
            ValueError: a rank that is not below the number of elements, or components and a rank that the rows, shared
                evenly, would not allow, or rows of which too few differ.
        """
        rows = data[:MOST_ROWS].flatten(1).float()
        most = min(rows.shape[1] - 1, len(rows) // max(num_components, 1) - 1)
        if num_components < 1 or not 0 < rank <= most:
            raise ValueError(
                f"{len(rows)} samples of {rows.shape[1]} elements allow a source of one component or more, each of"
                f" rank 1 to one below the elements and its share of the samples: got {num_components} of rank"
                f" {rank}."
            )
        channels, height, width = data.shape[1:]
        source: Any = cls((channels, height, width), rank, num_components)
        for k, part in enumerate(split_rows(rows, num_components)):
            source.weights[k] = len(part) / len(rows)
            source.means[k] = part.mean(0)
            own = min(rank, len(part) - 1)  # a small part has fewer directions, the others stay 0
            if own:
                singular, directions = principal_directions(part - source.means[k], own)
                source.directions[k, :own] = directions
                source.variances[k, :own] = singular.square() / (len(part) - 1)
        return source.to(data.device)

    def forward(self, noise: Tensor, sigma: float) -> Tensor:
        """Unit noise (n, C, H, W) as a sample of noisy data at the level `sigma`; a row depends on its own noise alone."""
        component, flat = self._component(noise.flatten(1).float())
        found = torch.empty_like(flat)
        for k in component.unique().tolist():
            of = component == k
            directions = self.directions[k].float()
            gains = (self.variances[k].float() + sigma**2).sqrt() - sigma
            moved = ((flat[of] @ directions.T) * gains) @ directions
            found[of] = self.means[k].float() + sigma * flat[of] + moved
        return found.reshape(noise.shape).to(noise.dtype)

    @property
    def mean(self) -> Tensor:
        """(C, H, W) of the data."""
        weights = self.weights.float()
        return (weights @ self.means.float() / weights.sum()).reshape(self.config["shape"])

    def _component(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """(n,) which component, and (n, d) unit noise that doesn't depend on it.

        The quantile of a row's first element says which; its place within that component's share is a quantile again, and
        as uniform, so the element that has it is unit noise whatever the component.
        """
        weights = self.weights.double()
        ends = (weights / weights.sum()).cumsum(0)
        quantile = torch.special.ndtr(flat[:, 0].double()).clamp(1e-9, 1 - 1e-9)
        component = torch.searchsorted(ends, quantile).clamp(max=len(ends) - 1)
        low = torch.cat([ends.new_zeros(1), ends])[component]
        within = ((quantile - low) / (ends[component] - low)).clamp(1e-9, 1 - 1e-9)
        first = flat[:, :1].double() if len(ends) == 1 else torch.special.ndtri(within)[:, None]
        return component, torch.cat([first.to(flat), flat[:, 1:]], 1)


def split_rows(rows: Tensor, num_parts: int) -> list[Tensor]:
    """Parts of rows (n, d) that are alike: the part with the most variance is cut in halves along its first direction."""
    parts, spreads = [rows], [0.0]
    while len(parts) < num_parts:
        widest = max(range(len(parts)), key=spreads.__getitem__)
        if not spreads[widest] and len(parts) > 1:
            raise ValueError(
                f"The data have {len(parts)} different samples, too few for {num_parts} components."
            )
        part = parts.pop(widest)
        spreads.pop(widest)
        centred = part - part.mean(0)
        _, directions = principal_directions(centred, 1)
        above = centred @ directions[0] > 0
        for half in (part[above], part[~above]):
            parts.append(half)
            spreads.append(float((half - half.mean(0)).square().sum()))
    return parts


def principal_directions(centred: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(rank,) singular values and (rank, d) directions of centred rows (n, d), randomised with a fixed seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _, singular, directions = torch.svd_lowrank(centred, q=min(rank + 4, *centred.shape), niter=4)
    return singular[:rank], directions.T[:rank]
