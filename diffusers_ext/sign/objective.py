"""The losses of SIGN as functions of tensors.

Zaman, Liu and Chiu, *SIGN*, arXiv:2509.21470, distill a projector f from the scores of a diffusion model. The
paper names its losses but gives few formulas. Where a formula is our reading, the docstring says so.
Idempotent generation is from Shocher et al., *Idempotent Generative Network* (IGN), ICLR 2024,
arXiv:2311.01462.

All distances are L1: the mean absolute difference over the elements of a row. Every loss is a mean over rows
(b, ...), so the loss of a batch is the mean of the losses of equal parts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

Network = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class LossWeights:
    """The weight of every loss. A loss with weight 0 is not computed.

    The defaults are our recommendation: the scores move f, and the others are small beside them. The gradient of the
    level-weighted score loss has a root mean square of about 0.1 for each element, where that of an L1 loss has 1. The
    identity minimizes `rec` and `idem`, so at least one other loss is required.

    Raises:
        ValueError: a weight is negative, or all weights except `rec` and `idem` are 0.
    """

    rec: float = 0.1
    idem: float = 0.05
    dmd: float = 1.0
    reg: float = 0.0
    flow: float = 0.0
    denoise: float = 0.0
    tight: float = 0.0

    def __post_init__(self) -> None:
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        negative = [f"{name}={value:g}" for name, value in given.items() if value < 0]
        if negative:
            raise ValueError(f"The weight of a loss must be 0 or more, got {', '.join(negative)}.")
        if not any(given[name] for name in ("dmd", "reg", "flow", "denoise", "tight")):
            raise ValueError(
                "The identity is the best projector under these weights: set at least one of dmd, reg, flow,"
                " denoise and tight above 0."
            )


def distance(a: Tensor, b: Tensor) -> Tensor:
    """(b,) mean absolute difference of every row."""
    return (a - b).abs().flatten(1).mean(1)


def reconstruction_loss(projected: Tensor, data: Tensor) -> Tensor:
    """d(f(x), x) for data x: the projector should not change data. IGN equation 2; SIGN's L_rec.

    Args:
        projected: (b, ...) f(x).
        data: (b, ...) x.
    """
    return distance(projected, data).mean()


def idempotence_loss(frozen: Network, made: Tensor) -> Tensor:
    """d(f'(f(z)), f(z)): a second projection should change nothing. IGN equation 7; SIGN's L_idem.

    Args:
        frozen: f' with constant weights. The gradient then changes f(z) instead of making f closer to the
            identity at f(z).
        made: (b, ...) f(z), with its gradient.
    """
    return distance(frozen(made), made).mean()


def level_weight(alpha: Tensor, sigma: Tensor) -> Tensor:
    """α/σ, which turns a difference of clean predictions into one of noise predictions.

    x_t = αD + σε̂ for both networks, so ε̂_real − ε̂_fake = (D_fake − D_real) · α/σ. Of a flow, α = 1 − σ. The weight is 1
    at the noise level σ/α = 1, whatever the scale of the noisy data.

    Args:
        alpha, sigma: (b, 1, ...).
    """
    return alpha / sigma


def row_weight(made: Tensor, real: Tensor) -> Tensor:
    """(b, 1, ...) 1/mean|f(z) − D_real| of every row, without gradient: equation 8 of arXiv:2311.18828.

    The factor between scores and clean predictions, which that weight cancels up to α, is left out, as in the code of
    the authors.
    """
    scale = distance(made, real).detach().clamp_min(1e-6)
    return (1 / scale).reshape(-1, *[1] * (made.ndim - 1))


def distribution_matching_loss(made: Tensor, real: Tensor, fake: Tensor, weight: Tensor) -> Tensor:
    """A loss whose gradient with respect to `made` is the difference of two scores: SIGN's L_dmd.

    Yin et al., *One-step Diffusion with Distribution Matching Distillation* (DMD), CVPR 2024,
    arXiv:2311.18828, equation 7. The gradient of a row is weight · (D_fake − D_real) at a re-noised f(z), in terms of
    clean predictions D. It is divided by the number of elements of the batch, like that of a mean.

    Args:
        made: (b, ...) f(z), with its gradient.
        real, fake: (b, ...) clean predictions for the re-noised f(z), by the teacher and by the network that
            is trained on the outputs of f.
        weight: (b, 1, ...), `level_weight` or `row_weight`.
    """
    with torch.no_grad():
        direction = torch.nan_to_num((fake - real) * weight)
    return (made * direction).flatten(1).mean(1).mean()


def score_identity_loss(
    made: Tensor, real: Tensor, fake: Tensor, weight: Tensor, alpha: float = 1.0
) -> Tensor:
    """weight · ⟨D_real − D_fake, (D_real − f(z)) − a(D_real − D_fake)⟩: the generator's loss of SiD.

    Zhou et al., *Score identity Distillation*, ICML 2024, arXiv:2404.04057, equation 23. If D_fake is the
    denoiser of the outputs of f, the mean of ⟨D_real − D_fake, D_fake − f(z)⟩ is 0, so that the loss is (1 − a)
    times the mean of ‖D_real − D_fake‖². Its gradient is not: it flows through f(z), and through f(z) into both
    denoisers, whose weights are constant. The paper recommends a = 1 or 1.2.

    Args:
        made: (b, ...) f(z), with its gradient.
        real, fake: (b, ...) clean predictions for the re-noised f(z), with their gradients.
        weight: (b, 1, ...) without gradient; `row_weight` in the paper.
        alpha: a.
    """
    gap = real - fake
    return (weight * gap * ((real - made) - alpha * gap)).flatten(1).mean(1).mean()


def regression_loss(made: Tensor, drawn: Tensor) -> Tensor:
    """d(f(z), y), where y is the image that the teacher generates from z: SIGN's L_reg.

    Equation 9 of arXiv:2311.18828 with L1.

    Args:
        made: (b, ...) f(z), with its gradient.
        drawn: (b, ...) y.
    """
    return distance(made, drawn).mean()


def consistency_loss(projected: Tensor, frozen: Network, nearer: Tensor) -> Tensor:
    """d(f(x_n), f'(x_{n−1})), where x_{n−1} is one teacher step from x_n: our reading of SIGN's L_flow.

    Song et al., *Consistency Models*, ICML 2023, arXiv:2303.01469, algorithm 2, with the current weights held
    constant as the target network (Song and Dhariwal, arXiv:2310.14189). The reconstruction loss provides the
    boundary condition at level 0.

    Args:
        projected: (b, ...) f(x_n), with its gradient.
        frozen: f'.
        nearer: (b, ...) x_{n−1}, without gradient.
    """
    with torch.no_grad():
        target = frozen(nearer)
    return distance(projected, target).mean()


def denoising_loss(projected: Tensor, data: Tensor) -> Tensor:
    """d(f(x + σε), x): L_denoise, read here as a loss of f.

    This reading is ours. The loss favors the median of all clean x that fit the input.

    Args:
        projected: (b, ...) f(x + σε), with its gradient.
        data: (b, ...) x.
    """
    return distance(projected, data).mean()


def score_matching_loss(
    clean: Tensor, made: Tensor, alpha: Tensor, sigma: Tensor, snr_gamma: float = 5.0
) -> Tensor:
    """min((α/σ)², γ) ‖D_fake(x_t) − f(z)‖²: L_denoise read as the loss of the fake score, as in DMD.

    DMD uses the error of the noise prediction, which is (α/σ)² without the limit γ. The outputs of f are not
    free of noise, so at the lowest noise levels that error would dominate the loss. We therefore use min-SNR
    weights (Hang et al. 2023, arXiv:2303.09556).

    Args:
        clean: (b, ...) clean prediction of D_fake at αf(z) + σε.
        made: (b, ...) f(z), without gradient.
        alpha, sigma: (b, 1, ...) α and σ.
        snr_gamma: γ.
    """
    weight = (alpha / sigma).square().clamp(max=snr_gamma)
    return (weight * (clean - made).square()).flatten(1).mean(1).mean()


def tightness_loss(reprojected: Tensor, made: Tensor, reconstruction: Tensor, ratio: float = 1.5) -> Tensor:
    """−d(f(f'(z)), f'(z)): keeps the manifold as small as possible. IGN equations 9 and 17; SIGN replaces it.

    Args:
        reprojected: (b, ...) f(f'(z)), with the gradient of the outer f only.
        made: (b, ...) f'(z), without gradient.
        reconstruction: (b,) d(f(x), x) for as many rows of data. A smooth bound keeps the loss within `ratio`
            times this value.
        ratio: a in IGN.
    """
    bound = ratio * reconstruction.detach().clamp_min(1e-6)
    return -(torch.tanh(distance(reprojected, made) / bound) * bound).mean()
