"""Settings of the scores that train a projector."""

from __future__ import annotations

from dataclasses import dataclass

# f's own outputs are noised again up to this share of the projector's level: that of strong projections. The levels
# of the second and later steps are below it.
RENOISED_LEVEL = 0.4
MATCHINGS = ("dmd", "dmd_l1", "sid")


@dataclass(frozen=True)
class Scores:
    """How f is trained by two scores.

    Attributes:
        matching: the loss: "dmd" with `level_weight`, "dmd_l1" with `row_weight`, or "sid".
        sid_alpha: a of `score_identity_loss`.
        guidance_scale: w of the real score u + w(c − u), if the teacher has prompts. 1 is the conditional score.
        fake_guidance_scale: the same of the fake score, in its own loss too. 1 in DMD2 (arXiv:2405.14867). SiD's
            long-short guidance (arXiv:2406.01561) has the same scale above 1 for both.
        fake_rate: learning rate of the fake score relative to that of f.
        fake_first_steps: steps before the first one that moves f by scores, in which only the fake score learns.
        fake_updates: updates of the fake score per update of f. DMD2 uses 5 with equal learning rates.
        renoised_share: share of the rows of the scores that are f(f(z) + σε) instead of f(z), for a random σ up to
            `RENOISED_LEVEL` times that of the projector: the backward simulation of DMD2 at the levels of projections and
            of later steps, where f has to draw from the same distribution.

    Raises:
        ValueError: a value is out of range.
    """

    matching: str = "dmd"
    sid_alpha: float = 1.0
    guidance_scale: float = 1.0
    fake_guidance_scale: float = 1.0
    fake_rate: float = 10.0
    fake_first_steps: int = 0
    fake_updates: int = 1
    renoised_share: float = 0.25

    def __post_init__(self) -> None:
        if self.matching not in MATCHINGS:
            raise ValueError(f"matching must be one of {', '.join(MATCHINGS)}, got {self.matching!r}.")
        if self.fake_first_steps < 0 or self.fake_updates < 1:
            raise ValueError(
                "Expected fake_first_steps of 0 or more and fake_updates of 1 or more, got"
                f" {self.fake_first_steps} and {self.fake_updates}."
            )
        if not 0 <= self.renoised_share <= 1:
            raise ValueError(f"renoised_share must be in [0, 1], got {self.renoised_share:g}.")
        if not self.fake_rate > 0:
            raise ValueError(f"fake_rate must be above 0, got {self.fake_rate:g}.")
