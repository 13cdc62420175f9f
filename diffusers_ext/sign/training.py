"""The training objective of a projector: its networks, its phases and the losses of every step."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..training.data import Captions, TrainingImages
from ..training.encodings import Shards
from ..training.rows import Rows
from . import objective as losses
from .projector import Constant, Projector
from .scores import RENOISED_LEVEL, Scores

# The two scores are compared in this range of the schedule. arXiv:2311.18828, section 3.2.
SCORE_START, SCORE_END = 0.02, 0.98
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
        for name in ("data", "score", "fake", "again"):
            found[f"{name}_noise"] = rows.normal(*self.shape)
        for name in ("level", "score_time", "fake_time", "again", "again_level"):
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

    With scores and idempotence only, all rows of a batch start from noise. With `reg`, `flow`, `denoise` or `tight`,
    odd rows start from noisy data at one of `FLOW_LEVELS` levels up to that of the projector. Odd rows are those whose
    data `rec` uses. The scores see what f makes of noise only.

    Args:
        projector: the trained projector. Its network starts as a copy of the teacher.
        teacher: the frozen network.
        weights: weights of the losses.
        scores: settings of the score loss.
        warmup_steps: number of steps without scores, in which the other losses train f.
        fake: the network of the fake score. None copies the teacher if `dmd` has a weight.

    Raises:
        ValueError: `warmup_steps` is negative, or there is a warmup without a loss for it.
    """

    def __init__(
        self,
        projector: Projector,
        teacher: nn.Module,
        weights: losses.LossWeights,
        scores: Scores | None = None,
        warmup_steps: int = 0,
        fake: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps must be 0 or more, got {warmup_steps}.")
        others = any(getattr(weights, name) for name in ("reg", "flow", "denoise", "tight"))
        if warmup_steps and not others:
            raise ValueError(
                "Without reg, flow, denoise and tight there is no loss for the warmup: set warmup_steps to 0."
            )
        self.projector = projector
        if weights.dmd and fake is None:
            fake = copy.deepcopy(teacher).requires_grad_(True)
        self.fake = fake.train() if fake is not None and weights.dmd else None
        self.teacher = teacher.requires_grad_(False).eval()
        self.weights, self.warmup_steps, self.halved = weights, warmup_steps, others
        self.scores = scores or Scores()

    # --- what the training loop asks ---

    def networks(self) -> list[nn.Module]:
        """The trained networks. They share no trained parameters, so their gradients are clipped separately."""
        return [self.projector] if self.fake is None else [self.projector, self.fake]

    def rate_factors(self) -> list[float]:
        """The learning rates of the networks, relative to that of the projector."""
        return [1.0, self.scores.fake_rate][: len(self.networks())]

    def moves(self, step: int) -> bool:
        """Whether a step trains the projector."""
        after = step - self.warmup_steps - self.scores.fake_first_steps
        return not self._scored(step) or (after >= 0 and after % self.scores.fake_updates == 0)

    def _scored(self, step: int) -> bool:
        return self.fake is not None and step >= self.warmup_steps

    def train(self, mode: bool = True) -> SIGNObjective:
        """Sets the training mode; the teacher stays in evaluation mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    # --- one step ---

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
        again: Tensor,
        again_level: Tensor,
        again_noise: Tensor,
        start_mean: Tensor | None = None,
        **texts: Tensor,
    ) -> Tensor:
        """The loss of one batch with an even number of rows b, a scalar.

        All arguments are (b, C, H, W) float32 unless noted otherwise.

        Args:
            step: the optimization step, which determines the phase.
            noise: unit noise for the sources.
            drawn: the teacher's images from `noise`. Only even rows are used, and only with `reg`.
            data: clean data.
            data_noise: unit noise for the data of the odd rows.
            level: (b,) in [0, 1), selects the noise level of the odd rows.
            score_noise, score_time: unit noise and (b,) in [0, 1), where the scores are compared.
            fake_noise, fake_time: unit noise and (b,) in [0, 1), where the fake score is trained.
            again, again_level: (b,) in [0, 1), select the rows that are noised again and their levels.
            again_noise: unit noise for them.
            start_mean: means of the prompts, for a `PromptSource`.
            texts: prompt arguments of the network, if the teacher has prompts; those of the empty prompt begin with
                `negative_`, and are needed for a guidance scale other than 1.
        """
        conditions = {name: v for name, v in texts.items() if not name.startswith("negative_")}
        negative = {name.removeprefix("negative_"): v for name, v in texts.items() if name not in conditions}
        step, project = int(step), self.projector
        scored, turn = self._scored(step), self.moves(step)
        odd = torch.arange(len(noise), device=noise.device) % 2 == 1
        drawing = ~odd if self.halved else torch.ones_like(odd)
        times = self._flow_times(level)
        alpha, sigma = project.levels(times, data)
        noisy = alpha * data + sigma * data_noise
        source = torch.where(
            drawing[:, None, None, None], project.start(noise, mean=start_mean), noisy / alpha
        )
        renoised = drawing & (again < self.scores.renoised_share) & scored
        if renoised.any():
            with torch.no_grad():
                first = project(source[renoised], **rows_of(conditions, renoised))
            levels = (RENOISED_LEVEL * project.sigma * again_level[renoised])[:, None, None, None]
            source = source.index_put((renoised,), first + levels * again_noise[renoised])
        with torch.set_grad_enabled(turn and torch.is_grad_enabled()):
            made = project(source, **conditions)
        total = noise.new_zeros(())
        if turn:
            total = total + self._data_losses(made, data, odd, conditions)
            total = total + self._teacher_losses(
                made, drawn, data, noisy, times, odd, renoised, conditions, negative
            )
        if scored:
            own, none = rows_of(conditions, drawing), rows_of(negative, drawing)
            if turn:
                total = total + self.weights.dmd * self._matching(
                    made[drawing], score_noise[drawing], score_time[drawing], own, none
                )
            total = total + self._fake_loss(
                made[drawing].detach(), fake_noise[drawing], fake_time[drawing], own, none
            )
        return total

    def _data_losses(self, made: Tensor, data: Tensor, odd: Tensor, conditions: dict[str, Tensor]) -> Tensor:
        """Reconstruction and tightness, which share f(x), and idempotence."""
        weights, project = self.weights, self.projector
        total = made.new_zeros(())
        if weights.rec or weights.tight:
            kept = project(data[odd], **rows_of(conditions, odd))
            total = total + weights.rec * losses.reconstruction_loss(kept, data[odd])
            if weights.tight:
                fixed = made[~odd].detach()
                again = project(fixed, **rows_of(conditions, ~odd))
                apart = losses.distance(kept, data[odd])
                total = total + weights.tight * losses.tightness_loss(again, fixed, apart)
        if weights.idem:
            # Of equal rows, half are enough for a small weight.
            chosen = torch.ones_like(odd) if self.halved else ~odd
            own = rows_of(conditions, chosen)
            total = total + weights.idem * losses.idempotence_loss(
                lambda x: project.frozen(x, **own), made[chosen]
            )
        return total

    def _teacher_losses(
        self,
        made: Tensor,
        drawn: Tensor,
        data: Tensor,
        noisy: Tensor,
        times: Tensor,
        odd: Tensor,
        renoised: Tensor,
        conditions: dict[str, Tensor],
        negative: dict[str, Tensor],
    ) -> Tensor:
        """The losses of f compared with the teacher's images and steps, and with data."""
        weights, project = self.weights, self.projector
        total = made.new_zeros(())
        paired = ~odd & ~renoised
        if weights.reg and paired.any():
            total = total + weights.reg * losses.regression_loss(made[paired], drawn[paired])
        if weights.denoise:
            total = total + weights.denoise * losses.denoising_loss(made[odd], data[odd])
        if weights.flow:
            own = rows_of(conditions, odd)
            nearer = self._teacher_step(noisy[odd], times[odd], own, rows_of(negative, odd))
            total = total + weights.flow * losses.consistency_loss(
                made[odd], lambda x: project.frozen(x, **own), nearer
            )
        return total

    def _flow_times(self, level: Tensor) -> Tensor:
        """(b,) timesteps of the noisy data: one of `FLOW_LEVELS` levels up to that of the projector."""
        return self._time_of(1 + (level * FLOW_LEVELS).long().clamp(max=FLOW_LEVELS - 1))

    def _time_of(self, index: Tensor) -> Tensor:
        first = int(SCORE_START * self.projector.timestep)
        return self.projector.times(first + (self.projector.timestep - first) * index / FLOW_LEVELS)

    @torch.no_grad()
    def _teacher_step(
        self, noisy: Tensor, times: Tensor, conditions: dict[str, Tensor], negative: dict[str, Tensor]
    ) -> Tensor:
        """One DDIM step of the teacher to the next lower level, in the units of the projector."""
        first = int(SCORE_START * self.projector.timestep)
        index = ((times - first) * FLOW_LEVELS / (self.projector.timestep - first)).round()
        clean = self._guided(self.teacher, noisy, times, conditions, negative, self.scores.guidance_scale)
        alpha, sigma = self.projector.levels(times, noisy)
        alpha_after, sigma_after = self.projector.levels(self._time_of(index - 1), noisy)
        return clean + (sigma_after / alpha_after) * (noisy - alpha * clean) / sigma

    def _guided(
        self,
        network: Any,
        noisy: Tensor,
        times: Tensor,
        conditions: dict[str, Tensor],
        negative: dict[str, Tensor],
        scale: float,
    ) -> Tensor:
        """The clean prediction u + w(c − u) of a network."""
        clean = self.projector.denoise(network, noisy, times, **conditions)
        if scale == 1 or not conditions:
            return clean
        without = self.projector.denoise(network, noisy, times, **negative)
        return without + scale * (clean - without)

    def _matching(
        self,
        made: Tensor,
        noise: Tensor,
        time: Tensor,
        conditions: dict[str, Tensor],
        negative: dict[str, Tensor],
    ) -> Tensor:
        scores, identity = self.scores, self.scores.matching == "sid"
        with torch.set_grad_enabled(identity):
            noisy, times, alpha, sigma = self._noised(made, noise, time)
            fake_network = Constant(self.fake) if identity and self.fake else self.fake
            given = noisy, times, conditions, negative
            real = self._guided(self.teacher, *given, scores.guidance_scale)
            fake = self._guided(fake_network, *given, scores.fake_guidance_scale)
        if identity:
            weight = losses.row_weight(made, real)
            return losses.score_identity_loss(made, real, fake, weight, scores.sid_alpha)
        level = scores.matching == "dmd"
        weight = losses.level_weight(alpha, sigma) if level else losses.row_weight(made, real)
        return losses.distribution_matching_loss(made, real, fake, weight)

    def _fake_loss(
        self,
        made: Tensor,
        noise: Tensor,
        time: Tensor,
        conditions: dict[str, Tensor],
        negative: dict[str, Tensor],
    ) -> Tensor:
        noisy, times, alpha, sigma = self._noised(made, noise, time)
        clean = self._guided(self.fake, noisy, times, conditions, negative, self.scores.fake_guidance_scale)
        return losses.score_matching_loss(clean, made, alpha, sigma)

    def _noised(self, made: Tensor, noise: Tensor, share: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What f made, noised again at random times of the scores: αf(z) + σε, the times, α and σ."""
        times = self._score_times(share)
        alpha, sigma = self.projector.levels(times, made)
        return alpha * made + sigma * noise, times, alpha, sigma

    def _score_times(self, share: Tensor) -> Tensor:
        count = self.projector.num_times
        low, high = SCORE_START * count, SCORE_END * count
        high = min(high, self.projector.time_at(SCORE_LEVEL * self.projector.sigma))
        return self.projector.times(low + (high - low) * share)


def rows_of(conditions: dict[str, Tensor], chosen: Tensor) -> dict[str, Tensor]:
    """The prompt arguments of the rows where `chosen`, (b,) bool, is True."""
    return {name: value[chosen] for name, value in conditions.items()}
