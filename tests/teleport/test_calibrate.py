"""How far to skip: the calibration against models whose answer is known."""

import dataclasses

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, DPMSolverMultistepScheduler
from diffusers.models.unets.unet_2d import UNet2DOutput

import diffusers_ext as dx
from diffusers_ext.core.predictions import vp_level
from tests import tiny

SHAPE = (1, 8, 8)


class GaussianUNet(diffusers.UNet2DModel):
    """A network whose noise prediction is exactly that of Gaussian data, whatever its weights."""

    stats: dx.GaussianStats
    alphas: torch.Tensor

    def forward(self, sample, timestep, return_dict=True):
        level = vp_level(float(self.alphas[int(timestep)]))
        clean = self.stats.denoise(sample, level)
        noise = (sample - level[0] * clean) / level[1]
        return UNet2DOutput(sample=noise) if return_dict else (noise,)


def gaussian_stats(scale: float = 0.05) -> dx.GaussianStats:
    g = torch.Generator().manual_seed(0)
    samples = scale * torch.randn(200, *SHAPE, generator=g).cumsum(-1)
    return dx.GaussianStats.fit([samples], rank=8)


def gaussian_pipe(stats: dx.GaussianStats, scheduler=DPMSolverMultistepScheduler) -> DDPMPipeline:
    base = DDPMScheduler(clip_sample=False)
    unet = GaussianUNet(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8,),
        layers_per_block=1,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
    )
    unet.stats, unet.alphas = stats, base.alphas_cumprod
    pipe = DDPMPipeline(unet, scheduler.from_config(base.config))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_gaussian_model_may_skip_as_the_map_is_exact():
    stats = gaussian_stats()
    found = dx.calibrate_skip(
        gaussian_pipe(stats), stats, num_inference_steps=8, num_images=4, tolerance=0.1, progress=False
    )
    trials = found.calibration["trials"]["8"]
    assert found.calibration["sigma"]["8"] is not None
    # Only the solver's own error is left, over fewer steps.
    assert trials["errors"][0][2] <= 1.1 * trials["full_error"]


class BadAtHighNoise(GaussianUNet):
    """Exact below σ = 10, and wrong by a fixed pattern above, as a noise prediction that is a little off."""

    def forward(self, sample, timestep, return_dict=True):
        noise = super().forward(sample, timestep).sample
        level = vp_level(float(self.alphas[int(timestep)]))
        if level[1] / level[0] > 10:
            noise = noise + 0.1 * torch.linspace(-1, 1, 8)
        return UNet2DOutput(sample=noise) if return_dict else (noise,)


def test_a_model_that_is_wrong_at_high_noise_is_not_the_judge_there():
    stats = gaussian_stats()
    pipe = gaussian_pipe(stats)
    pipe.unet.__class__ = BadAtHighNoise
    samples = stats.sample(32, generator=torch.Generator().manual_seed(3))
    found = dx.calibrate_skip(
        pipe, stats, samples=samples, num_images=32, num_inference_steps=10, progress=False
    ).calibration
    # Below 10 the two denoise alike, and the test for "no worse" cannot tell them apart for long.
    assert found["trusted_sigma"] <= 20
    assert all(excess < 0 for sigma, excess, _ in found["excess_loss"] if sigma > 10)
    # The excess is minus the squared error of the noise prediction.
    expected = -float((0.1 * torch.linspace(-1, 1, 8)).square().mean())
    assert found["excess_loss"][0][1] == pytest.approx(expected, rel=0.1)
    assert found["sigma"]["10"] is not None
    with pytest.raises(ValueError, match="one sample of the statistics' shape per image"):
        dx.calibrate_skip(pipe, stats, samples=samples, num_images=4, progress=False)


def test_wrong_statistics_skip_nothing():
    right = gaussian_stats()
    wrong = dataclasses.replace(right, mean=right.mean + 100)
    found = dx.calibrate_skip(
        gaussian_pipe(right), wrong, num_inference_steps=8, num_images=4, progress=False
    )
    assert found.calibration["sigma"] == {"8": None}
    pipe = gaussian_pipe(right)
    plain = pipe(2, generator=tiny.generators(2), num_inference_steps=8, output_type="np").images
    dx.apply_teleport(pipe, found, skip="auto")
    auto = pipe(2, generator=tiny.generators(2), num_inference_steps=8, output_type="np").images
    assert (plain == auto).all()


def test_auto_uses_the_entry_of_the_next_calibrated_step_count():
    stats = dataclasses.replace(gaussian_stats(), calibration={"sigma": {"10": 5.0, "20": 9.0}})
    scheduler = dx.TeleportScheduler.from_scheduler(DDIMScheduler(clip_sample=False), stats)
    skipped = {}
    for steps in (8, 10, 15, 20, 25):
        scheduler.set_timesteps(steps)
        skipped[steps] = scheduler.skipped_to
    assert skipped[8] >= 5.0
    assert skipped[10] >= 5.0
    assert skipped[15] >= 9.0
    assert skipped[20] >= 9.0
    assert skipped[25] is None


@pytest.mark.parametrize("kind", ["DDPMScheduler", "EulerAncestralDiscreteScheduler"])
def test_a_stochastic_scheduler_is_calibrated_by_its_deterministic_counterpart_and_put_back(kind):
    stats = gaussian_stats()
    pipe = gaussian_pipe(stats, getattr(diffusers, kind))
    before = pipe.scheduler
    found = dx.calibrate_skip(pipe, stats, num_inference_steps=4, num_images=2, progress=False)
    assert pipe.scheduler is before
    assert found.calibration["scheduler"] in ("DDIMScheduler", "EulerDiscreteScheduler")
    assert found.calibration["calls"] > 50  # the reference alone takes at least 50


def test_the_pipeline_is_put_back_after_an_error():
    stats = gaussian_stats()
    pipe = gaussian_pipe(stats)
    before = pipe.scheduler
    wrong = dx.GaussianStats.fit([torch.randn(20, 1, 4, 4)], rank=2)
    with pytest.raises(ValueError, match="shape"):
        dx.calibrate_skip(pipe, wrong, num_inference_steps=4, num_images=2, progress=False)
    assert pipe.scheduler is before
    with pytest.raises(ValueError, match="2 or more"):
        dx.calibrate_skip(pipe, stats, num_inference_steps=1)


def test_a_text_pipeline_is_calibrated_on_prompts():
    pipe = tiny.build("sd")
    stats = tiny.gaussian((4, 8, 8))
    found = dx.calibrate_skip(
        pipe,
        stats,
        prompts=["a red bag", "a blue boot"],
        num_inference_steps=3,
        guidance_scale=2.0,
        height=8,
        width=8,
        progress=False,
    )
    assert set(found.calibration["sigma"]) == {"3"}
