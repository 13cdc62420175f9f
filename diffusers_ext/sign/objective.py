"""The losses of SIGN, each a function of tensors.

Zaman, Liu and Chiu, *SIGN*, arXiv:2509.21470, distil a projector f from a diffusion model's scores. The paper names its
losses and gives few of their formulas; where a reading is ours, the function says so. Idempotent generation is Shocher
et al., *Idempotent Generative Network*, ICLR 2024, arXiv:2311.01462.

All distances are L1, the mean over a row's elements, and every loss is a mean over rows (b, ...): the loss of a
batch is the mean of its parts' losses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

Network = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class LossWeights:
    """The weight of every loss; 0 leaves it out, and its cost with it.

    The default is our recommendation: in runs of equal time the scores (`dmd`), which the paper is named after, changed
    nothing, and they cost two networks more (benchmarks/sign.py). `rec` and `idem` alone are minimised by the identity,
    so one of the others, which look at what noise becomes, must be there.

    Raises:
        ValueError: a negative weight, or nothing that tells where noise shall go.
    """

    rec: float = 1.0
    idem: float = 0.5
    dmd: float = 0.0
    reg: float = 0.5
    flow: float = 1.0
    denoise: float = 0.0
    tight: float = 0.0

    def __post_init__(self) -> None:
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        negative = [f"{name}={value:g}" for name, value in given.items() if value < 0]
        if negative:
            raise ValueError(f"The weight of a loss must be 0 or more, got {', '.join(negative)}.")
        if not any(given[name] for name in ("dmd", "reg", "flow", "denoise", "tight")):
            raise ValueError(
                "The identity is the best projector under these weights: give one of dmd, reg, flow, denoise and"
                " tight a weight above 0."
            )


def distance(a: Tensor, b: Tensor) -> Tensor:
    """(b,) mean absolute difference of every row."""
    return (a - b).abs().flatten(1).mean(1)


def reconstruction_loss(projected: Tensor, data: Tensor) -> Tensor:
    """d(f(x), x) on data: what is on the manifold stays. IGN equation 2; SIGN's L_rec."""
    return distance(projected, data).mean()


def idempotence_loss(frozen: Network, made: Tensor) -> Tensor:
    """d(f'(f(z)), f(z)): what was projected stays. IGN equation 7; SIGN's L_idem.

    Args:
        frozen: f' with constant weights, so that f(z) moves to where f is the identity rather than the reverse.
        made: f(z), with its gradient.
    """
    return distance(frozen(made), made).mean()


def distribution_matching_loss(made: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    """A loss whose gradient in `made` follows the difference of two scores: SIGN's L_dmd.

    Yin et al., *One-step Diffusion with Distribution Matching Distillation*, CVPR 2024, arXiv:2311.18828, equations 7
    and 8: the gradient of a row is (D_fake − D_real) / mean|f(z) − D_real| at a re-noised f(z), as the noise level's
    factor σ²/α undoes what a score has more than a clean prediction; the remaining α is left out, as in the authors'
    practice. Divided by the number of elements of the batch, as a mean's gradient is.

    Args:
        made: f(z), (b, ...), with its gradient.
        real, fake: clean predictions of the re-noised f(z) by the teacher and by the network that has learnt f's outputs.
    """
    with torch.no_grad():
        scale = distance(made, real).clamp_min(1e-6).reshape(-1, *[1] * (made.ndim - 1))
        direction = torch.nan_to_num((fake - real) / scale)
    return (made * direction).flatten(1).mean(1).mean()


def regression_loss(made: Tensor, drawn: Tensor) -> Tensor:
    """d(f(z), the teacher's own picture from that noise): SIGN's L_reg; equation 9 of arXiv:2311.18828 with L1."""
    return distance(made, drawn).mean()


def consistency_loss(projected: Tensor, frozen: Network, nearer: Tensor) -> Tensor:
    """d(f(x_n), f'(x_{n−1})), x_{n−1} one teacher step along the flow from x_n: SIGN's L_flow in our reading.

    Song et al., *Consistency Models*, ICML 2023, arXiv:2303.01469, algorithm 2, with the current weights held
    constant as the target network (Song and Dhariwal, arXiv:2310.14189). What anchors the chain is the
    reconstruction loss at level 0.

    Args:
        projected: f(x_n), with its gradient.
        frozen: f'.
        nearer: x_{n−1}, without gradient.
    """
    with torch.no_grad():
        target = frozen(nearer)
    return distance(projected, target).mean()


def denoising_loss(projected: Tensor, data: Tensor) -> Tensor:
    """d(f(x + σε), x): L_denoise read as a loss of f, ours. Pulls towards the middle of what a noisy x may have been."""
    return distance(projected, data).mean()


def score_matching_loss(
    clean: Tensor, made: Tensor, alpha: Tensor, sigma: Tensor, snr_gamma: float = 5.0
) -> Tensor:
    """min((α/σ)², γ) ‖D_fake(x_t) − f(z)‖²: L_denoise read as the fake score's loss, as in DMD.

    DMD has the noise prediction's error, (α/σ)² without a limit. What f makes is not noise-free, so at the lowest levels
    that error is many times 1 and drowns all others; hence min-SNR weights (Hang et al. 2023, arXiv:2303.09556).

    Args:
        clean: D_fake's clean prediction at αf(z) + σε.
        made: f(z), without gradient.
        alpha, sigma: (b, 1, ...), the level's.
        snr_gamma: γ.
    """
    weight = (alpha / sigma).square().clamp(max=snr_gamma)
    return (weight * (clean - made).square()).flatten(1).mean(1).mean()


def tightness_loss(reprojected: Tensor, made: Tensor, reconstruction: Tensor, ratio: float = 1.5) -> Tensor:
    """−d(f(f'(z)), f'(z)): the manifold shall be no larger than it must. IGN equations 9 and 17; replaced in SIGN.

    Args:
        reprojected: f(f'(z)), with the gradient of the outer f alone.
        made: f'(z), without gradient.
        reconstruction: (b,) d(f(x), x) of as many data rows, which bounds the loss smoothly to `ratio` times it.
        ratio: a in IGN.
    """
    bound = ratio * reconstruction.detach().clamp_min(1e-6)
    return -(torch.tanh(distance(reprojected, made) / bound) * bound).mean()
