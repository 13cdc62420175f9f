"""Predicts the mean of a prompt's samples from its embeddings by linear regression, without a model call.

If the embeddings e of a prompt and its samples x are jointly Gaussian, then E[x | e] = x̄ + Σ_xe Σ_ee⁻¹ (e −
ē): the regression *is* the conditional Gaussian. It is fitted to the class means of labelled statistics and
also predicts the means of new prompts. This is our addition; arXiv:2412.09726 has no conditional case.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

_RIDGES = tuple(10.0**e for e in range(-9, 0))


@dataclass(frozen=True, eq=False)
class PromptMap:
    """mean(e) = offset + (e − center) · components · weights.

    Attributes:
        center: (E,), float32, average features of the prompts.
        components: (E, q), float32, orthonormal principal directions of the features.
        weights: (q, D), float32.
        offset: (D,), float32, average of the means.
        score: R² of the prompts' means, where each is predicted from the other prompts.
        options: arguments of the pipeline's call that the features depend on (`encoding_options`), as JSON has them.
            Empty for maps of earlier versions, which are not checked.

    Raises:
        ValueError: shapes that do not match.
    """

    center: Tensor
    components: Tensor
    weights: Tensor
    offset: Tensor
    score: float
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        e, q, d = self.center.numel(), self.weights.shape[0], self.offset.numel()
        if (tuple(self.components.shape), tuple(self.weights.shape)) != ((e, q), (q, d)):
            raise ValueError(
                f"A prompt map of {e} features and {d} dimensions needs components ({e}, q) and weights (q, {d}),"
                f" got {tuple(self.components.shape)} and {tuple(self.weights.shape)}."
            )

    def __repr__(self) -> str:
        return f"PromptMap(features={self.center.numel()}, rank={len(self.weights)}, score={self.score:.3f})"

    @classmethod
    def fit(cls, features: Tensor, means: Tensor, counts: Tensor, rank: int = 256) -> PromptMap:
        """Ridge regression of K means on K features, in the features' `rank` leading principal directions.

        The ridge is chosen from nine powers of ten, as the one that predicts each prompt's mean best from the
        others.

        Args:
            features: (K, E), any float dtype.
            means: (K, D).
            counts: (K,) numbers of samples behind the means, > 0.
            rank: largest number of principal directions, ≥ 1.

        Raises:
            ValueError: shapes that do not match, or features that do not predict the means (score ≤ 0).
        """
        if features.ndim != 2 or means.ndim != 2 or not len(features) == len(means) == counts.numel() > 2:
            raise ValueError(
                "A prompt map needs features (K, E), means (K, D) and counts (K,) of at least 3 prompts, got"
                f" {tuple(features.shape)}, {tuple(means.shape)} and {tuple(counts.shape)}."
            )
        e, y = features.double(), means.double()
        share = (counts.double() / counts.sum())[:, None]
        center, offset = (share * e).sum(0), (share * y).sum(0)
        y = share.sqrt() * (y - offset)
        u, s, v = torch.linalg.svd(share.sqrt() * (e - center), full_matrices=False)
        q = min(rank, int((s > 1e-8 * s[0]).sum()))
        u, s, v = u[:, :q], s[:q], v[:q]
        projected, best = u.T @ y, (-float("inf"), s)
        for ridge in _RIDGES:
            kept = s.square() / (s.square() + ridge * s[0] ** 2)
            leverage = (u.square() * kept).sum(1, keepdim=True) + share
            left_out = (y - u @ (kept[:, None] * projected)) / (1 - leverage).clamp(min=1e-9)
            score = 1 - float(left_out.square().sum() / y.square().sum())
            best = max(best, (score, kept), key=lambda pair: pair[0])
        if not best[0] > 0:
            raise ValueError(
                f"The embeddings of these {len(e)} prompts do not predict each other's means (R² {best[0]:.2f}):"
                " fit to more prompts, or to more samples per prompt."
            )
        weights = (best[1] / s)[:, None] * projected
        return cls(center.float(), v.T.float().contiguous(), weights.float(), offset.float(), best[0])

    def __call__(self, features: Tensor) -> Tensor:
        """Means (B, D), float32, on the features' device; ValueError unless `features` is (B, E)."""
        if features.ndim != 2 or features.shape[1] != self.center.numel():
            raise ValueError(
                f"The prompt map was fitted on {self.center.numel()} features per prompt, these have shape"
                f" {tuple(features.shape)}: use it with the text encoder it was fitted with, and with prompts of the"
                " same options (max_sequence_length and the like)."
            )
        center, components, weights, offset = (
            t.to(features.device) for t in (self.center, self.components, self.weights, self.offset)
        )
        with torch.autocast(features.device.type, enabled=False):
            return offset + ((features.float() - center) @ components) @ weights
