"""Step-wise variation loss: a constant change of the noise should change the prediction by a constant amount.

Guo et al., *Smooth Diffusion: Crafting Smooth Latent Spaces in Diffusion Models*, CVPR 2024,
arXiv:2312.04410, section 3.3. With x_t = αx0 + σε and the clean prediction x̂0(ε), the variation of a row is

    v = ‖∂⟨x̂0, Δ⟩/∂ε‖₂,    Δ = σ · n/√D,  n standard normal with D elements,

and the loss is (v − a)², where a is a running mean of v. It penalizes variations above and below the mean
alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..core.predictions import PREDICTION_TYPES, clean_prediction

_TINY = 1e-12
# Rounding enlarges finite differences by (rounding / step)², and the curvature of the denoiser by step².
_STEPS = {torch.float16: 0.03, torch.bfloat16: 0.15}
_ESTIMATORS = ("vjp", "finite_difference")
_MEANS = ("global", "per_timestep")
_SPREADS = ("absolute", "relative")


class Variation(NamedTuple):
    """The result of `StepwiseVariationLoss`.

    Attributes:
        loss: mean of (v − a)², to be weighted and added to the training loss.
        values: (B,) the variations v, detached.
        output: output of the denoiser for the unchanged noise, for the training loss.
    """

    loss: Tensor
    values: Tensor
    output: Tensor


class StepwiseVariationLoss(nn.Module):
    """The regularizer. Its running mean is a buffer, so it is saved and resumed with the model.

    Args:
        prediction_type: prediction type of the denoiser: `epsilon`, `v_prediction`, `sample` or
            `flow_prediction`.
        estimator: `vjp` is exact and is the paper's estimator. It differentiates through the denoiser, and
            again for the loss, so it needs float32 and attention that can be differentiated twice
            (`double_differentiable`). `finite_difference` compares two evaluations and needs no second
            derivative, so it works with any attention, in half precision and with gradient checkpointing. Its
            values have the same mean square, E‖JᵀΔ‖² = E‖JΔ‖², but differ for single rows.
        mean: `global` is one running mean, as in the paper. `per_timestep` keeps one for each of `num_bins`
            ranges of timesteps, since v depends on the noise level.
        spread: `absolute` is (v − a)², as in the paper. A model can also lower it by reacting less to the
            noise. `relative`, ours, is (log v − a)² with the running mean a of log v, which only a more even
            variation lowers.
        rate: update rate of the running mean, in (0, 1]; 0.01 in the paper.
        num_bins: number of ranges for `per_timestep`.
        step: norm of the noise perturbation of `finite_difference`, relative to the norm of the noise. Default: by the
            data type that the denoiser computes in, 0.01 in float32, 0.03 in float16 and 0.15 in bfloat16. With 0.01
            in bfloat16, the difference is rounding for the most part: values of a UNet were 1.4 to 8 times too large.
            With these they are right to about 10%.

    Raises:
        ValueError: a name is unknown, or a number is out of range.
    """

    running_mean: Tensor

    def __init__(
        self,
        prediction_type: str = "epsilon",
        estimator: str = "vjp",
        mean: str = "global",
        spread: str = "absolute",
        rate: float = 0.01,
        num_bins: int = 20,
        step: float | None = None,
    ) -> None:
        super().__init__()
        for name, value, known in (
            ("prediction_type", prediction_type, PREDICTION_TYPES),
            ("estimator", estimator, _ESTIMATORS),
            ("mean", mean, _MEANS),
            ("spread", spread, _SPREADS),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}.")
        if not 0 < rate <= 1 or num_bins < 1 or (step is not None and step <= 0):
            raise ValueError(
                f"Expected rate in (0, 1], num_bins of 1 or more and step above 0 or None; got {rate}, {num_bins} and"
                f" {step}."
            )
        self.prediction_type, self.estimator, self.rate, self.step = prediction_type, estimator, rate, step
        self.spread = spread
        # The paper's mean starts at 0. For logarithms 0 would be a wrong start, so NaN marks a mean without
        # values.
        start = 0.0 if spread == "absolute" else float("nan")
        self.register_buffer("running_mean", torch.full((num_bins if mean == "per_timestep" else 1,), start))

    def forward(
        self,
        denoise: Callable[[Tensor], Tensor],
        clean: Tensor,
        noise: Tensor,
        alpha: Tensor,
        sigma: Tensor,
        time: Tensor,
        direction: Tensor,
    ) -> Variation:
        """The loss of one batch. Updates the running mean in training mode.

        Args:
            denoise: maps noisy samples (B, ...) to the output of the denoiser (B, ...).
            clean, noise: (B, ...) clean samples and standard normal noise.
            alpha, sigma: (B,) levels of the noisy samples alpha · clean + sigma · noise.
            time: (B,) position in the schedule, in [0, 1), for `per_timestep`.
            direction: (B, ...) standard normal noise, drawn anew for every call.

        Returns:
            A `Variation`.

        Raises:
            ValueError: `vjp` is used in half precision, where second derivatives overflow.
        """
        a, s = (level.reshape(-1, *[1] * (clean.ndim - 1)).to(clean) for level in (alpha, sigma))
        delta = s * direction / direction[0].numel() ** 0.5
        estimate = self._vjp if self.estimator == "vjp" else self._finite_difference
        values, output = estimate(denoise, clean, noise, a, s, delta)
        bins = (time.to(values.device) * len(self.running_mean)).long().clamp(0, len(self.running_mean) - 1)
        compared = values if self.spread == "absolute" else values.clamp_min(_TINY).log()
        target = self._moved_mean(compared, bins)[bins]
        loss = (compared - target).square().mean()
        return Variation(loss, values.detach(), output)

    def _clean(self, output: Tensor, sample: Tensor, a: Tensor, s: Tensor) -> Tensor:
        return clean_prediction(output, sample, a, s, self.prediction_type)

    def _vjp(self, denoise: Any, clean: Tensor, noise: Tensor, a: Tensor, s: Tensor, delta: Tensor) -> Any:
        if clean.dtype != torch.float32 and clean.dtype != torch.float64:
            raise ValueError(
                f'estimator="vjp" differentiates twice, which overflows in {clean.dtype}: train in float32,'
                ' or use estimator="finite_difference".'
            )
        twice = torch.is_grad_enabled()
        with torch.enable_grad():
            noise = noise.detach().requires_grad_()
            sample = a * clean + s * noise
            output = denoise(sample)
            product = (self._clean(output, sample, a, s) * delta).sum()
            (gradient,) = torch.autograd.grad(product, noise, create_graph=twice)
        return gradient.flatten(1).norm(dim=1), output

    def _finite_difference(
        self, denoise: Any, clean: Tensor, noise: Tensor, a: Tensor, s: Tensor, delta: Tensor
    ) -> Any:
        sample = a * clean + s * noise
        # delta has a norm of about sigma, the noise of about √D, so the noise changes by about `step`
        # relative to its norm.
        output = denoise(sample)
        step = _STEPS.get(output.dtype, 0.01) if self.step is None else self.step
        size = step * delta[0].numel() ** 0.5 / s
        moved = a * clean + s * (noise + size * delta)
        change = self._clean(denoise(moved), moved, a, s) - self._clean(output, sample, a, s)
        change = change.to(torch.promote_types(change.dtype, torch.float32))
        return (change / size).flatten(1).norm(dim=1), output

    def _moved_mean(self, values: Tensor, bins: Tensor) -> Tensor:
        """The running means after this batch, with gradients. The stored means have none."""
        count = torch.zeros_like(self.running_mean).index_add(0, bins, torch.ones_like(values))
        total = torch.zeros_like(self.running_mean).index_add(0, bins, values)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            # Differentiable, because the mean that every process compares with depends on the rows of all
            # processes.
            from torch.distributed.nn.functional import all_reduce

            count, total = all_reduce(count), all_reduce(total)
        seen = count > 0
        batch = torch.where(seen, total / count.clamp_min(1), self.running_mean)
        before = torch.where(self.running_mean.isnan(), batch.detach(), self.running_mean)
        moved = before + self.rate * (batch - before)
        if self.training:
            # In place, because distributed training holds a reference to the buffer.
            self.running_mean.copy_(moved.detach())
        return moved


@contextmanager
def double_differentiable(denoiser: Any) -> Iterator[None]:
    """Makes the attention of a denoiser twice differentiable within the `with` block.

    Flash and memory-efficient kernels have no second derivative, so PyTorch's attention uses its math kernel
    instead. xFormers processors are replaced and then restored; diffusers itself would not restore them.

    Raises:
        ValueError: the denoiser uses another attention backend of diffusers than `native`, which PyTorch does not select.
    """
    _check_backend(denoiser)
    before = dict(getattr(denoiser, "attn_processors", {}))
    plain = {
        name: AttnProcessor2_0() if "XFormers" in type(processor).__name__ else processor
        for name, processor in before.items()
    }
    changed = any(plain[name] is not processor for name, processor in before.items())
    if changed:
        denoiser.set_attn_processor(plain)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        if changed:
            denoiser.set_attn_processor(before)


def _check_backend(denoiser: Any) -> None:
    active, _ = _AttentionBackendRegistry.get_active_backend()
    parts: Any = [getattr(module, "processor", None) for module in denoiser.modules()]
    used = {part._attention_backend or active for part in parts if hasattr(part, "_attention_backend")}
    others = sorted(AttentionBackendName(name).value for name in used)
    others = [name for name in others if name != AttentionBackendName.NATIVE.value]
    if others:
        raise ValueError(
            f"The attention of {type(denoiser).__name__} has the backend {others[0]}, which may have no second derivative:"
            ' use set_attention_backend("native") and no DIFFUSERS_ATTN_BACKEND, or estimator="finite_difference".'
        )
