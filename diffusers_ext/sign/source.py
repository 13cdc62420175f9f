"""The distribution that the samples of a projector start from."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

# More rows hardly change the principal directions.
MOST_ROWS = 16_384


class MixtureSource(ModelMixin, ConfigMixin):
    """Noisy data as a mixture of Gaussians: maps unit noise ε to μₖ + (UₖΛₖUₖᵀ + σ²)^½ ε.

    The first element of ε selects the component k. A projector starts at a level σ where the noise does not
    yet hide the strongest directions of the data. A denoiser at that level was trained on noisy data, not on
    the pure noise σ · ε, so samples start from the distribution of noisy data. With one component, the source
    maps ε to the point to which the flow of a diffusion model takes it, as far as the data are Gaussian (Wang
    and Vastola, arXiv:2412.09726). SIGN starts from white noise, and IGN (arXiv:2311.01462) from noise with
    the spectrum of the data. This source is ours.

    Args:
        shape: (C, H, W) of one sample.
        rank: number of principal directions per component. In all other directions the variance is σ².
        num_components: number of Gaussians.
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
        """Fits the source to data (n, C, H, W), one component to each part of `split_rows`.

        Args:
            data: (n, C, H, W); at most the first `MOST_ROWS` rows are used.
            rank, num_components: see the class.

        Raises:
            ValueError: data of another shape, the number of components is below 1, the rank is not below the number of
                elements and of rows per component, or there are too few different rows.
        """
        if data.ndim != 4:
            raise ValueError(f"Expected data (n, C, H, W), got {tuple(data.shape)}.")
        rows = data[:MOST_ROWS].flatten(1).float()
        most = min(rows.shape[1] - 1, len(rows) // max(num_components, 1) - 1)
        if num_components < 1 or not 0 < rank <= most:
            raise ValueError(
                f"{len(rows)} samples of {rows.shape[1]} elements allow a source of one or more components,"
                " each with a rank of at least 1 and below the numbers of elements and of samples per"
                f" component: got {num_components} of rank {rank}."
            )
        channels, height, width = data.shape[1:]
        source: Any = cls((channels, height, width), rank, num_components)
        for k, part in enumerate(split_rows(rows, num_components)):
            source.weights[k] = len(part) / len(rows)
            source.means[k] = part.mean(0)
            own = min(rank, len(part) - 1)  # a small part has fewer directions; the rest stay 0
            if own:
                singular, directions = principal_directions(part - source.means[k], own)
                source.directions[k, :own] = directions
                source.variances[k, :own] = singular.square() / (len(part) - 1)
        return source.to(data.device)

    def forward(self, noise: Tensor, sigma: float) -> Tensor:
        """Maps unit noise (n, C, H, W) to samples of noisy data at the level `sigma`.

        Every row depends on its own noise only.
        """
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
        """(C, H, W) mean of the data."""
        weights = self.weights.float()
        return (weights @ self.means.float() / weights.sum()).reshape(self.config["shape"])

    def _component(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """Selects a component for every row: (n,) indices, and (n, d) unit noise that is independent of them.

        The quantile of a row's first element selects the component. Its relative position within the
        component's interval is again uniform, so the normal value with that quantile replaces the first
        element.
        """
        weights = self.weights.double()
        ends = (weights / weights.sum()).cumsum(0)
        quantile = torch.special.ndtr(flat[:, 0].double()).clamp(1e-9, 1 - 1e-9)
        component = torch.searchsorted(ends, quantile).clamp(max=len(ends) - 1)
        low = torch.cat([ends.new_zeros(1), ends])[component]
        within = ((quantile - low) / (ends[component] - low)).clamp(1e-9, 1 - 1e-9)
        first = flat[:, :1].double() if len(ends) == 1 else torch.special.ndtri(within)[:, None]
        return component, torch.cat([first.to(flat), flat[:, 1:]], 1)


class PromptSource(ModelMixin, ConfigMixin):
    """Noisy data of a prompt as a Gaussian: maps unit noise ε to μ(prompt) + (UΛUᵀ + s̄²(I − UUᵀ) + σ²)^½ ε.

    The mean is the regression of teleportation's prompt map, μ = offset + (e − center) · components · weights, of the
    prompt's features e; the covariance is that within prompts. Both are taken over from `GaussianStats`, see `of`.

    Args:
        shape: (C, H, W) of one sample.
        rank: number of principal directions.
        num_features: E, the length of e.
        num_components: rank of the regression.
        residual: s̄², the variance in all other directions.
    """

    @register_to_config
    def __init__(
        self,
        shape: tuple[int, int, int],
        rank: int,
        num_features: int,
        num_components: int,
        residual: float,
    ) -> None:
        super().__init__()
        size = shape[0] * shape[1] * shape[2]

        def zeros(*of: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(*of), requires_grad=False)

        self.directions, self.variances = zeros(rank, size), zeros(rank)
        self.center, self.offset = zeros(num_features), zeros(size)
        self.components, self.weights = zeros(num_features, num_components), zeros(num_components, size)

    @classmethod
    def of(cls, stats: Any) -> PromptSource:
        """The source of `diffusers_ext.GaussianStats` with a prompt map.

        Raises:
            ValueError: there is no prompt map, or the statistics are of packed latents or of videos.
        """
        found = stats.prompt_map
        if found is None:
            raise ValueError(
                "These statistics have no prompt map, so that no prompt has a mean: make one with"
                " dx.fit_prompt_map(pipe, stats), or use another source."
            )
        if len(stats.shape) != 3:
            raise ValueError(f"Expected statistics of latents (C, H, W), got {stats.shape}.")
        features, components = found.components.shape
        source = cls(stats.shape, stats.rank, features, components, stats.residual)
        for name in ("center", "components", "weights", "offset"):
            getattr(source, name).data = getattr(found, name).float().clone()
        source.directions.data = stats.eigenvectors.T.float().clone()
        source.variances.data = stats.eigenvalues.float().clone()
        return source

    def means(self, features: Tensor) -> Tensor:
        """Means (n, C, H, W), float32, of prompts with features (n, E), see `core.features.features_of`.

        Raises:
            ValueError: features of another length.
        """
        if features.ndim != 2 or features.shape[1] != len(self.center):
            raise ValueError(
                f"The source was fitted to {len(self.center)} features for each prompt, got {tuple(features.shape)}:"
                " use the text encoder of its statistics and prompts with the same options (max_sequence_length)."
            )
        moved = (features.float() - self.center.float()) @ self.components.float() @ self.weights.float()
        return (self.offset.float() + moved).reshape(-1, *self.config["shape"])

    def forward(self, noise: Tensor, sigma: float, mean: Tensor) -> Tensor:
        """Maps unit noise (n, C, H, W) to samples of noisy data with means (n, C, H, W) at the level `sigma`."""
        flat, directions = noise.flatten(1).float(), self.directions.float()
        rest = (self.config["residual"] + sigma**2) ** 0.5
        gains = (self.variances.float() + sigma**2).sqrt() - rest
        moved = rest * flat + ((flat @ directions.T) * gains) @ directions
        return (mean.float() + moved.reshape(noise.shape)).to(noise.dtype)


Source = MixtureSource | PromptSource


def split_rows(rows: Tensor, num_parts: int) -> list[Tensor]:
    """Divides rows (n, d) into parts of similar rows.

    The part with the largest total squared deviation from its mean is split repeatedly, at the mean along its
    first principal direction.

    Raises:
        ValueError: there are fewer different rows than parts.
    """
    parts, spreads = [rows], [0.0]
    while len(parts) < num_parts:
        widest = max(range(len(parts)), key=spreads.__getitem__)
        if not spreads[widest] and len(parts) > 1:
            raise ValueError(
                f"The data have {len(parts)} different samples, too few for {num_parts} components: use fewer"
                " components."
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
    """(rank,) singular values and (rank, d) directions of centered rows (n, d).

    Uses a randomized SVD with a fixed seed.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _, singular, directions = torch.svd_lowrank(centred, q=min(rank + 4, *centred.shape), niter=4)
    return singular[:rank], directions.T[:rank]
