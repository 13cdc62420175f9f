"""The training objective of a projector: its networks, its phases and the losses of every step."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.schedules import levels_at
from ..training.data import Captions, TrainingImages
from ..training.encodings import Shards
from ..training.rows import Rows
from . import objective as losses
from .projector import Projector, denoise, noise_levels

# The two scores are compared from this share of the schedule on. arXiv:2311.18828, section 3.2, uses 0.02 to
# 0.98.
SCORE_START = 0.02
# The two scores are compared up to this multiple of the projector's noise level. Above it, little of the
# image is left, and the error of a noise prediction is amplified by σ/α in the clean prediction. Near the end
# of the schedule the difference of two networks consists mostly of their errors.
SCORE_LEVEL = 4.0
FLOW_LEVELS = 10


@dataclass(frozen=True)
class SIGNRows:
    """Reads data, pairs and prompts.

    Attributes:
        data: (n, C, H, W), or images, which are encoded later and have the same number of rows.
        shape: (C, H, W).
        pairs: shards of `noise` and `drawn`, or None.
        captions: of the data, if the teacher has prompts.
    """

    data: Tensor | TrainingImages
    shape: tuple[int, ...]
    pairs: Shards | None
    captions: Captions | None

    def __call__(self, rows: Rows) -> dict[str, Any]:
        """The arguments of the objective, but `images` instead of `data` and `prompts` instead of embeddings."""
        index = rows.indices(len(self.data))
        found: dict[str, Any] = {"step": torch.tensor(rows.step)}
        if isinstance(self.data, TrainingImages):
            found["images"] = self.data.read(index.tolist(), rows)[0]
        else:
            found["data"] = self.data[index]
        paired = rows.indices(len(self.pairs) if self.pairs else 1).tolist()
        if self.pairs is None:
            found["noise"] = rows.normal(*self.shape)
            found["drawn"] = torch.zeros_like(found["noise"])
        else:
            found |= {name: value.float() for name, value in self.pairs[paired].items()}
        for name in ("data", "score", "fake"):
            found[f"{name}_noise"] = rows.normal(*self.shape)
        for name in ("level", "score_time", "fake_time"):
            found[name] = rows.uniform()
        if self.captions is not None:
            # An even row starts from the noise of a pair and needs the prompt of that pair.
            prompts = self.captions.draw(rows, index.tolist())
            if self.pairs is not None:
                prompts[::2] = [self.captions.numbered(i) for i in paired[::2]]
            found["prompts"] = prompts
        return found


class SIGNObjective(nn.Module):
    """The loss of one step: of the projector, of the fake score, or of both.

    Even rows of a batch start from noise, odd rows from noisy data at one of `FLOW_LEVELS` levels up to that
    of the projector. The projector is thus also trained at the levels of later steps and of projections.

    Args:
        projector: the trained projector. Its network starts as a copy of the teacher.
        teacher: the frozen network.
        weights: weights of the losses.
        warmup_steps: number of steps without scores, in which the other losses train f.
        fake_updates: updates of the fake score per update of the projector, after the warmup. DMD2
            (arXiv:2405.14867) uses 5; with a regression loss 1 is enough.
        guidance_scale: guidance scale of the teacher, if it has prompts.

    Raises:
        ValueError: `warmup_steps` or `fake_updates` is out of range, or there is a warmup without a loss for
            it.
    """

    def __init__(
        self,
        projector: Projector,
        teacher: nn.Module,
        weights: losses.LossWeights,
        warmup_steps: int = 0,
        fake_updates: int = 1,
        guidance_scale: float = 1.0,
    ) -> None:
        super().__init__()
        if warmup_steps < 0 or fake_updates < 1:
            raise ValueError(
                f"Expected warmup_steps of 0 or more and fake_updates of 1 or more, got {warmup_steps} and"
                f" {fake_updates}."
            )
        warm = any(getattr(weights, name) for name in ("reg", "flow", "denoise", "tight"))
        if warmup_steps and not warm:
            raise ValueError(
                "Without reg, flow, denoise and tight there is no loss for the warmup: set warmup_steps to 0."
            )
        self.projector = projector
        self.teacher = teacher.requires_grad_(False).eval()
        self.fake = copy.deepcopy(teacher).requires_grad_(True).train() if weights.dmd else None
        self.weights, self.warmup_steps, self.fake_updates = weights, warmup_steps, fake_updates
        self.guidance_scale = guidance_scale

    def networks(self) -> list[nn.Module]:
        """The trained networks. They share no parameters, so their gradients are clipped separately."""
        return [self.projector] if self.fake is None else [self.projector, self.fake]

    def train(self, mode: bool = True) -> SIGNObjective:
        """Sets the training mode; the teacher stays in evaluation mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(
        self,
        step: int | Tensor,
        noise: Tensor,
        drawn: Tensor,
        data: Tensor,
        data_noise: Tensor,
        level: Tensor,
        score_noise: Tensor,
        score_time: Tensor,
        fake_noise: Tensor,
        fake_time: Tensor,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
    ) -> Tensor:
        """The loss of one batch with an even number of rows b, a scalar.

        All arguments are (b, C, H, W) float32 unless noted otherwise.

        Args:
            step: the optimization step, which determines the phase.
            noise: unit noise for the sources of the even rows.
            drawn: the teacher's images from `noise`. Only even rows are used, and only with `reg`.
            data: clean data.
            data_noise: unit noise for the data of the odd rows.
            level: (b,) in [0, 1), selects the noise level of the odd rows.
            score_noise, score_time: unit noise and (b,) in [0, 1), where the scores are compared.
            fake_noise, fake_time: unit noise and (b,) in [0, 1), where the fake score is trained.
            prompt_embeds, negative_prompt_embeds: (b, tokens, width), if the teacher has prompts.
        """
        conditions = {} if prompt_embeds is None else {"encoder_hidden_states": prompt_embeds}
        negative = {} if negative_prompt_embeds is None else {"encoder_hidden_states": negative_prompt_embeds}
        step = int(step)
        scored = self.fake is not None and step >= self.warmup_steps
        turn = not scored or (step - self.warmup_steps) % self.fake_updates == 0
        odd = torch.arange(len(noise), device=noise.device) % 2 == 1
        times = self._flow_times(level)
        alpha, sigma = levels_at(self.projector.scheduler, times, data)
        noisy = alpha * data + sigma * data_noise
        source = torch.where(odd[:, None, None, None], noisy / alpha, self.projector.start(noise))
        with torch.set_grad_enabled(turn and torch.is_grad_enabled()):
            made = self.projector(source, **conditions)
        total = noise.new_zeros(())
        if turn:
            total = total + self._own_losses(made, drawn, data, noisy, times, odd, conditions, negative)
        if turn and scored:
            total = total + self.weights.dmd * self._matching(
                made, score_noise, score_time, conditions, negative
            )
        if scored:
            total = total + self._fake_loss(made.detach(), fake_noise, fake_time, conditions)
        return total

    def _own_losses(
        self,
        made: Tensor,
        drawn: Tensor,
        data: Tensor,
        noisy: Tensor,
        times: Tensor,
        odd: Tensor,
        conditions: dict[str, Tensor],
        negative: dict[str, Tensor],
    ) -> Tensor:
        """The losses of the projector except the score loss."""
        weights, project = self.weights, self.projector
        total = made.new_zeros(())
        rows = {name: value[odd] for name, value in conditions.items()}
        reconstruction = None
        if weights.rec or weights.tight:
            kept = project(data[odd], **rows)
            reconstruction = losses.distance(kept, data[odd])
            total = total + weights.rec * losses.reconstruction_loss(kept, data[odd])
        if weights.idem:
            total = total + weights.idem * losses.idempotence_loss(
                lambda x: project.frozen(x, **conditions), made
            )
        if weights.reg:
            total = total + weights.reg * losses.regression_loss(made[~odd], drawn[~odd])
        if weights.denoise:
            total = total + weights.denoise * losses.denoising_loss(made[odd], data[odd])
        if weights.flow:
            nearer = self._teacher_step(
                noisy[odd], times[odd], rows, {name: value[odd] for name, value in negative.items()}
            )
            total = total + weights.flow * losses.consistency_loss(
                made[odd], lambda x: project.frozen(x, **rows), nearer
            )
        if weights.tight:
            assert reconstruction is not None
            even = {name: value[~odd] for name, value in conditions.items()}
            fixed = made[~odd].detach()
            total = total + weights.tight * losses.tightness_loss(
                project(fixed, **even), fixed, reconstruction
            )
        return total

    def _flow_times(self, level: Tensor) -> Tensor:
        """(b,) timesteps of the noisy data: one of `FLOW_LEVELS` levels up to that of the projector."""
        return self._time_of(1 + (level * FLOW_LEVELS).long().clamp(max=FLOW_LEVELS - 1))

    def _time_of(self, index: Tensor) -> Tensor:
        first = int(SCORE_START * self.projector.timestep)
        return (first + (self.projector.timestep - first) * index / FLOW_LEVELS).round().long()

    @torch.no_grad()
    def _teacher_step(
        self, noisy: Tensor, times: Tensor, conditions: dict[str, Tensor], negative: dict[str, Tensor]
    ) -> Tensor:
        """One DDIM step of the teacher to the next lower level, in the units of the projector."""
        first = int(SCORE_START * self.projector.timestep)
        index = ((times - first) * FLOW_LEVELS / (self.projector.timestep - first)).round()
        after = self._time_of(index - 1)
        clean = self._teacher_clean(noisy, times, conditions, negative)
        alpha, sigma = levels_at(self.projector.scheduler, times, noisy)
        alpha_after, sigma_after = levels_at(self.projector.scheduler, after, noisy)
        return clean + (sigma_after / alpha_after) * (noisy - alpha * clean) / sigma

    def _teacher_clean(
        self, noisy: Tensor, times: Tensor, conditions: dict[str, Tensor], negative: dict[str, Tensor]
    ) -> Tensor:
        scheduler = self.projector.scheduler
        clean = denoise(self.teacher, scheduler, noisy, times, **conditions)
        if self.guidance_scale == 1 or not negative:
            return clean
        without = denoise(self.teacher, scheduler, noisy, times, **negative)
        return without + self.guidance_scale * (clean - without)

    def _matching(
        self,
        made: Tensor,
        noise: Tensor,
        time: Tensor,
        conditions: dict[str, Tensor],
        negative: dict[str, Tensor],
    ) -> Tensor:
        with torch.no_grad():
            times = self._score_times(time)
            alpha, sigma = levels_at(self.projector.scheduler, times, made)
            noisy = alpha * made + sigma * noise
            real = self._teacher_clean(noisy, times, conditions, negative)
            fake = denoise(self.fake, self.projector.scheduler, noisy, times, **conditions)
        return losses.distribution_matching_loss(made, real, fake)

    def _fake_loss(self, made: Tensor, noise: Tensor, time: Tensor, conditions: dict[str, Tensor]) -> Tensor:
        times = self._score_times(time)
        alpha, sigma = levels_at(self.projector.scheduler, times, made)
        clean = denoise(
            self.fake, self.projector.scheduler, alpha * made + sigma * noise, times, **conditions
        )
        return losses.score_matching_loss(clean, made, alpha, sigma)

    def _score_times(self, time: Tensor) -> Tensor:
        levels = noise_levels(self.projector.scheduler)
        low = SCORE_START * len(levels)
        high = int((levels <= SCORE_LEVEL * self.projector.sigma).sum())
        return (low + (high - low) * time).long()


@torch.no_grad()
def figures_of_images(
    pipe: Any, images: Any, prompt: str | Sequence[str] | None = None, generator: Any = None
) -> dict[str, float]:
    """`projector_figures` in the space of the network, of a `SIGNPipeline` and n test images.

    Args:
        pipe: the pipeline. Its autoencoder, if it has one, encodes the images.
        images: see `SIGNPipeline.project`; two or more, of one size.
        prompt: one for all images or one for each, if the projector has prompts.
        generator: one, or one for each image.

    Raises:
        ValueError: see `SIGNPipeline.project`; also fewer than two images.
    """
    data = pipe._encode(images)
    if len(data) < 2:
        raise ValueError("The variance needs two or more images, got 1.")
    conditions = pipe._conditions(prompt, len(data))
    return projector_figures(pipe.projector, pipe._noise(data.shape, generator), data, **conditions)


@torch.no_grad()
def projector_figures(
    projector: Projector, noise: Tensor, data: Tensor, **conditions: Any
) -> dict[str, float]:
    """Figures that distinguish a projector from the identity and from a constant.

    Args:
        projector: the projector f.
        noise: (n, C, H, W) unit noise, the input of the source for z.
        data: (n, C, H, W) test data x.
        conditions: prompt arguments of the network.

    Returns:
        `idempotence` ‖f(f(z)) − f(z)‖/‖f(z)‖ and `motion` ‖f(z) − z‖/‖z‖ (0 for the identity), both means
        over rows; `variance` of the samples relative to that of the data, summed over elements;
        `reconstruction` mean |f(x) − x|.
    """
    source = projector.start(noise)
    made = projector(source, **conditions)
    again = projector(made, **conditions)

    def norm(x: Tensor) -> Tensor:
        return x.flatten(1).norm(dim=1)

    return {
        "idempotence": float((norm(again - made) / norm(made)).mean()),
        "motion": float((norm(made - source) / norm(source)).mean()),
        "variance": float(made.var(0).sum() / data.var(0).sum()),
        "reconstruction": float(losses.distance(projector(data, **conditions), data).mean()),
    }
