"""What one step of the distillation computes and which network it moves."""

import copy
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler

from diffusers_ext.core.schedules import levels_at
from diffusers_ext.core.storage import weights_digest
from diffusers_ext.sign.figures import projector_figures
from diffusers_ext.sign.objective import LossWeights
from diffusers_ext.sign.pairs import teacher_flow, teacher_pairs
from diffusers_ext.sign.projector import Projector, nearest_timestep
from diffusers_ext.sign.scores import RENOISED_LEVEL, Scores
from diffusers_ext.sign.source import MixtureSource
from diffusers_ext.sign.training import SIGNObjective
from diffusers_ext.training.encodings import SHARD
from tests import tiny
from tests.sign.test_projector import GaussianUNet

ALL = LossWeights(rec=1, idem=0.5, dmd=1, reg=0.5, flow=1, denoise=0.5, tight=0.1)
OTHERS = LossWeights(dmd=0, reg=0.5, flow=1)


def batch(rows: int = 4, step: int = 0) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(0)
    names = ("noise", "drawn", "data", "data_noise", "score_noise", "fake_noise", "again_noise")
    found: dict[str, Any] = {name: torch.randn(rows, 3, 8, 8, generator=draw) for name in names}
    found |= {name: torch.rand(rows, generator=draw) for name in ("level", "score_time", "fake_time")}
    found |= {name: torch.rand(rows, generator=draw) for name in ("again", "again_level")}
    return {"step": step, **found}


def objective(weights: LossWeights = ALL, warmup_steps: int = 0, **scores: Any) -> SIGNObjective:
    pipe = tiny.build("ddpm")
    projector = Projector(pipe.unet, pipe.scheduler, nearest_timestep(pipe.scheduler))
    settings = Scores(**{"renoised_share": 0.0, **scores})
    return SIGNObjective(projector, copy.deepcopy(pipe.unet), weights, settings, warmup_steps)


def moved(model: SIGNObjective, step: int) -> set[str]:
    """The networks that one step has a gradient for."""
    model.zero_grad()
    model(**batch(step=step)).backward()
    return {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}


def test_whose_turn_it_is() -> None:
    model = objective(warmup_steps=2, fake_updates=3, fake_first_steps=1)
    found = [moved(model, step) for step in range(9)]
    both, fake = {"projector", "fake"}, {"fake"}
    assert found == [{"projector"}, {"projector"}, fake, both, fake, fake, both, fake, fake]
    assert [model.moves(step) for step in range(9)] == ["projector" in names for names in found]
    assert moved(objective(OTHERS), 100) == {"projector"}


@pytest.mark.parametrize("matching", ["dmd", "dmd_l1", "sid"])
def test_scores_alone_move_both_and_not_the_teacher(matching: str) -> None:
    model = objective(LossWeights(rec=0, idem=0), matching=matching)
    assert moved(model, 0) == {"projector", "fake"}
    # The fake score, still the teacher, gives no direction.
    share = [p.grad.abs().max() for p in model.projector.parameters() if p.grad is not None]
    assert max(share) < 1e-6
    with torch.no_grad():
        for parameter in model.fake.parameters():  # type: ignore[union-attr]
            parameter.mul_(1.05)
    moved(model, 0)
    assert max(p.grad.abs().max() for p in model.projector.parameters() if p.grad is not None) > 1e-5


@pytest.mark.parametrize("matching", ["dmd", "sid"])
def test_the_score_loss_leaves_the_fake_score_alone(matching: str) -> None:
    model = objective(LossWeights(rec=0, idem=0), matching=matching)
    given = batch()
    made = model.projector(given["noise"])
    loss = model._matching(made, given["score_noise"], given["score_time"], {}, {})
    loss.backward()
    assert model.fake is not None
    assert all(p.grad is None for p in model.fake.parameters())


def calls(model: SIGNObjective, **changes: Any) -> list[torch.Tensor]:
    """What the projector is called with in a step."""
    found: list[torch.Tensor] = []
    handle = model.projector.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    model(**{**batch(), **changes})
    handle.remove()
    return found


def test_the_scores_see_what_is_made_of_noise_only() -> None:
    given, alone = batch(), objective(LossWeights(rec=0, idem=0))
    (source,) = calls(alone)
    assert torch.equal(source, alone.projector.start(given["noise"]))
    halved = objective(LossWeights(rec=0, idem=0, flow=1))
    (source,) = calls(halved)
    assert torch.equal(source[::2], halved.projector.start(given["noise"])[::2])
    assert not torch.equal(source[1::2], halved.projector.start(given["noise"])[1::2])
    seen: list[int] = []
    halved._fake_loss = lambda made, *_: seen.append(len(made)) or made.sum()  # type: ignore[method-assign]
    halved(**given)
    assert seen == [2]


def test_outputs_are_noised_again() -> None:
    given, model = batch(), objective(LossWeights(rec=0, idem=0), renoised_share=0.5)
    chosen = torch.tensor([True, False, False, True])
    again = torch.where(chosen, 0.4, 0.6)
    first, source = calls(model, again=again)
    z = model.projector.start(given["noise"])
    assert torch.equal(first, z[chosen])
    assert torch.equal(source[~chosen], z[~chosen])
    with torch.no_grad():
        made = model.projector(z[chosen])
    level = RENOISED_LEVEL * model.projector.sigma * given["again_level"][chosen].reshape(-1, 1, 1, 1)
    assert torch.allclose(source[chosen], made + level * given["again_noise"][chosen], atol=1e-6)


def test_a_batch_is_the_mean_of_its_halves() -> None:
    model, whole = objective(warmup_steps=0), batch(8)
    halves = [
        {name: value[rows] if isinstance(value, torch.Tensor) else value for name, value in whole.items()}
        for rows in (slice(0, 4), slice(4, 8))
    ]
    parts = torch.stack([model(**half) for half in halves])
    # Float32 sums in another order.
    assert torch.allclose(model(**whole), parts.mean(), rtol=1e-5)


def test_a_teacher_step_follows_the_flow_of_one_picture() -> None:
    """A teacher that knows one picture alone: its flow is a straight line to it."""
    scheduler = DDPMScheduler()
    teacher = GaussianUNet(scheduler, 0.3, 0.0)
    model = SIGNObjective(Projector(GaussianUNet(scheduler, 0.3, 0.0), scheduler, 440), teacher, OTHERS)
    level, noise = torch.tensor([0.05, 0.35, 0.95]), torch.randn(3, 1, 4, 4)
    times = model._flow_times(level)
    assert times[-1] == 440
    alpha, sigma = levels_at(scheduler, times, noise)
    found = model._teacher_step(alpha * 0.3 + sigma * noise, times, {}, {})
    before = model._flow_times((level - 0.1).clamp_min(0))
    alpha, sigma = levels_at(scheduler, before, noise)
    expected = 0.3 + sigma / alpha * noise
    assert torch.allclose(found[1:], expected[1:], atol=1e-5)
    # The lowest level goes to the first timestep, where hardly any noise is left.
    assert (found[0] - 0.3).abs().max() < (noise[0] * 0.05).abs().max()


def test_scores_are_compared_where_a_picture_can_be_seen() -> None:
    model = objective()
    times = model._score_times(torch.tensor([0.0, 0.5, 1 - 1e-6]))
    _, sigma = levels_at(model.projector.scheduler, times, times)
    assert times[0] == 20
    assert float(sigma[-1] / (1 - sigma[-1] ** 2).sqrt()) == pytest.approx(
        4 * model.projector.sigma, rel=0.02
    )


def test_the_teacher_is_left_alone_and_never_drops_out() -> None:
    model = objective().train()
    assert not model.teacher.training
    assert model.projector.training
    assert not any(p.requires_grad for p in model.teacher.parameters())


def test_guidance_reaches_the_real_score() -> None:
    pipe = tiny.build("sd")
    teacher = copy.deepcopy(pipe.unet)
    projector = Projector(pipe.unet, pipe.scheduler, nearest_timestep(pipe.scheduler))
    given = {
        name: value if name == "step" or value.ndim == 1 else torch.randn(4, 4, 8, 8)
        for name, value in batch().items()
        if name != "step"
    } | {"step": 0}
    given |= {f"{sign}encoder_hidden_states": torch.randn(4, 5, 16) for sign in ("", "negative_")}
    found = []
    for scale in (1.0, 5.0):
        model = SIGNObjective(projector, teacher, LossWeights(), Scores(guidance_scale=scale))
        projector.zero_grad()
        model(**given).backward()
        found.append(torch.cat([p.grad.flatten() for p in projector.parameters() if p.grad is not None]))
    assert not torch.allclose(*found)


def test_figures_know_the_identity_and_the_constant() -> None:
    class Plain(torch.nn.Module):
        sigma = 2.5

        def __init__(self, gain: float) -> None:
            super().__init__()
            self.gain = gain

        def start(self, noise: torch.Tensor, mean: None = None) -> torch.Tensor:
            return self.sigma * noise

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.gain * x + (1 - self.gain)

    noise, data = torch.randn(64, 1, 4, 4), torch.randn(64, 1, 4, 4)
    identity: Any = Plain(1.0)
    found = projector_figures(identity, noise, data)
    assert found["idempotence"] == 0
    assert found["motion"] == 0
    assert found["reconstruction"] == 0
    constant: Any = Plain(0.0)
    found = projector_figures(constant, noise, data)
    assert found["idempotence"] == 0
    assert found["variance"] == 0
    assert found["motion"] > 0.3
    assert found["reconstruction"] > 0.3


def test_the_teachers_flow_is_diffusers_own() -> None:
    from diffusers import DDPMPipeline, DPMSolverMultistepScheduler

    pipe = tiny.build("ddpm")
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    solver: Any = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    other = DDPMPipeline(pipe.unet, solver)
    other.set_progress_bar_config(disable=True)
    same = torch.Generator().manual_seed(3)
    images: Any = other(batch_size=2, generator=same, num_inference_steps=5, output_type="np")
    found = teacher_flow(pipe.unet, pipe.scheduler, noise, 5)
    expected = torch.from_numpy(images.images).movedim(-1, 1)
    assert torch.allclose((found / 2 + 0.5).clamp(0, 1), expected, atol=1e-5)


def test_pairs_resume_and_refuse_another_teacher(tmp_path: Any) -> None:
    from accelerate import Accelerator

    pipe, accelerator = tiny.build("ddpm"), Accelerator(cpu=True)
    recipe = {"teacher": weights_digest(pipe.unet), "steps": 2}
    projector = Projector(pipe.unet, pipe.scheduler, nearest_timestep(pipe.scheduler))

    def collect(recipe: Any) -> list[torch.Tensor]:
        pairs = teacher_pairs(accelerator, tmp_path, SHARD + 1, recipe, projector, (3, 8, 8), 2)
        found = pairs[range(len(pairs))]
        return [found[name].float() for name in ("noise", "drawn")]

    noise, drawn = collect(recipe)
    assert noise.shape == drawn.shape == (2 * SHARD, 3, 8, 8)
    # Stored with 11 bits; the teacher saw the stored noise.
    assert torch.allclose(
        teacher_flow(pipe.unet, pipe.scheduler, noise[:4], 2), drawn[:4], rtol=1e-3, atol=1e-3
    )
    kept, lost = sorted(tmp_path.glob("*.safetensors"))
    stamp = kept.stat().st_mtime_ns
    lost.rename(lost.with_suffix(".partial"))  # as a killed run leaves it
    assert torch.equal(collect(recipe)[1], drawn)
    assert kept.stat().st_mtime_ns == stamp
    with pytest.raises(
        ValueError, match=r"made with other settings \(steps: 2 there, 3 now; teacher: .*other"
    ):
        collect({"teacher": "other", "steps": 3})


def test_pairs_of_a_source_begin_at_its_level(tmp_path: Any) -> None:
    from accelerate import Accelerator

    scheduler = DDPMScheduler()
    unet: Any = GaussianUNet(scheduler, 0.3, 0.6)
    rows = 0.3 + 0.6 * torch.randn(2000, 1, 3, 3, generator=torch.Generator().manual_seed(1))
    level = nearest_timestep(scheduler)
    projector = Projector(unet, scheduler, level, MixtureSource.fit(rows, 8, 1))
    pairs = teacher_pairs(Accelerator(cpu=True), tmp_path, SHARD, {}, projector, (1, 3, 3), 40)
    noise, drawn = (pairs[range(SHARD)][name].float() for name in ("noise", "drawn"))
    # Under the flow of the Gaussian N(.3, .36) a sample keeps its quantile. 40 steps, and a source fitted to
    # 2,000 rows.
    gain = 0.6 / (0.36 + projector.sigma**2) ** 0.5
    assert torch.allclose(drawn, 0.3 + gain * (projector.start(noise) - 0.3), atol=0.03)


def test_a_flow_has_no_more_steps_than_timesteps() -> None:
    pipe = tiny.build("ddpm")
    calls = []
    pipe.unet.register_forward_pre_hook(lambda _, args: calls.append(int(args[1])))
    found = teacher_flow(pipe.unet, pipe.scheduler, torch.randn(2, 3, 8, 8), 50, timestep=3)
    assert calls == [3, 2, 1, 0]
    assert torch.isfinite(found).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup_steps": -1}, "warmup_steps must be 0 or more, got -1"),
        ({"weights": LossWeights(), "warmup_steps": 5}, "no loss for the warmup"),
        ({"fake_updates": 0}, "fake_updates of 1 or more, got 0 and 0"),
        ({"matching": "l2"}, "one of dmd, dmd_l1, sid, got 'l2'"),
        ({"renoised_share": 1.5}, r"in \[0, 1\], got 1.5"),
        ({"fake_rate": 0.0}, "fake_rate must be above 0, got 0"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        objective(**options)
