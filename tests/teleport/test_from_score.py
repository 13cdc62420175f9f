"""Statistics read off the denoiser: exact where it is the one of a Gaussian, refused where it is of no data."""

import dataclasses
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor

import diffusers_ext as dx
from diffusers_ext.core.predictions import vp_level
from diffusers_ext.teleport import probe, score_calls
from diffusers_ext.teleport.apply import check_pipeline
from diffusers_ext.teleport.probe import Denoised
from diffusers_ext.teleport.score_fit import (
    Covariance,
    Pairs,
    fit_covariance,
    implied_means,
    isotropic,
    relative_difference,
    squared_response,
    steps_of,
    top_response,
    unexplained,
    with_means,
)
from tests import families
from tests.contract.probe import statistics
from tests.contract.test_families import KNOWN
from tests.test_cli import run

SHAPE = (1, 8, 8)
KNOWN_LEVELS = {"num_inference_steps": 50, "batch_size": 50, "progress": False}


def gaussian(scale: float = 0.5, rank: int = 4) -> dx.GaussianStats:
    """Eigenvalues that differ by a factor, and variance in all other directions."""
    g = torch.Generator().manual_seed(0)
    vectors = torch.linalg.qr(torch.randn(64, rank, generator=g)).Q
    mean = 0.3 * torch.randn(SHAPE, generator=g)
    values = scale * 3.0 ** -torch.arange(rank, dtype=torch.float32)
    return dx.GaussianStats(mean, vectors, 10 * values, 0.01 * scale, 100)


class ExactUNet(diffusers.UNet2DModel):
    """Predicts exactly what the scheduler's prediction type of Gaussian data is, whatever its weights."""

    stats: Any
    alphas: Tensor
    kind: str

    def forward(self, sample, timestep, return_dict=True):
        level = a, s = vp_level(float(self.alphas[int(timestep)]))
        clean = self.clean(sample, level)
        noise = (sample - a * clean) / s
        output = {"epsilon": noise, "sample": clean, "v_prediction": a * noise - s * clean}[self.kind]
        return UNet2DOutput(sample=output) if return_dict else (output,)

    def clean(self, sample, level):
        return self.stats.denoise(sample.double(), level).to(sample.dtype)


class IdentityUNet(ExactUNet):
    """The denoiser of no data: it takes everything for data."""

    def clean(self, sample, level):
        return sample / level[0]


class NoiseUNet(ExactUNet):
    """Predictions that have nothing to do with the input."""

    def clean(self, sample, level):
        seed = int(1e4 * float(sample.abs().sum()))
        return (
            0.05
            * level[1]
            / level[0]
            * torch.randn(sample.shape, generator=torch.Generator().manual_seed(seed))
        )


def pipeline(stats: Any, kind: str = "epsilon", cls: type = ExactUNet) -> Any:
    # Clipping, the default, would bend the response.
    base: Any = DDPMScheduler.from_config({"prediction_type": kind, "clip_sample": True})
    unet = cls(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8,),
        layers_per_block=1,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
    )
    unet.stats, unet.alphas, unet.kind = stats, base.alphas_cumprod, kind
    pipe = DDPMPipeline(unet, base)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# --- a pipeline whose answer is known ---


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_gaussian_of_an_exact_denoiser_is_recovered(kind: str) -> None:
    stats = gaussian()
    pipe = pipeline(stats, kind)
    scheduler = pipe.scheduler
    found = dx.GaussianStats.from_score(pipe, calls=300, **KNOWN_LEVELS)
    assert pipe.scheduler is scheduler
    # The state is float32, and a noise prediction is divided by a = 1/σ: rounding of 1e-7 · σ, and σ < 20 here, in a
    # sum over a hundred pairs.
    torch.testing.assert_close(found.eigenvalues, stats.eigenvalues, rtol=2e-3, atol=0)
    assert found.residual == pytest.approx(stats.residual, rel=2e-2)
    torch.testing.assert_close(found.mean, stats.mean, rtol=0, atol=2e-3)
    cosines = torch.linalg.svdvals(found.eigenvectors.T @ stats.eigenvectors)
    torch.testing.assert_close(cosines, torch.ones(4), rtol=0, atol=1e-3)
    report = found.calibration["score"]
    assert report["calls"] <= 300
    assert report["error"] < 1e-2
    assert report["unexplained"] < 1e-3


def test_calls_are_counted_and_the_noise_is_not_the_users() -> None:
    pipe, rows = pipeline(gaussian()), []
    pipe.unet.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    found = dx.GaussianStats.from_score(pipe, calls=120, **KNOWN_LEVELS)
    assert torch.equal(torch.get_rng_state(), before)
    assert sum(rows) == found.calibration["score"]["calls"] in (119, 120)


def test_rank_is_an_upper_bound() -> None:
    found = dx.GaussianStats.from_score(pipeline(gaussian()), rank=2, calls=200, **KNOWN_LEVELS)
    assert found.rank == 2
    # The other two are in the isotropic part: their variance is not lost.
    assert found.total_variance == pytest.approx(gaussian().total_variance, rel=0.1)


def test_the_report_survives_saving_and_the_calibration(tmp_path: Any) -> None:
    pipe = pipeline(gaussian())
    found = dx.GaussianStats.from_score(pipe, calls=100, **KNOWN_LEVELS)
    found.save_pretrained(tmp_path)
    loaded = dx.GaussianStats.from_pretrained(tmp_path)
    assert loaded.calibration == found.calibration
    calibrated = dx.calibrate_skip(pipe, loaded, num_inference_steps=4, num_images=2, progress=False)
    assert calibrated.calibration["score"] == found.calibration["score"]


def test_an_interrupted_fit_resumes_to_the_same(tmp_path: Any) -> None:
    whole = dx.GaussianStats.from_score(pipeline(gaussian()), calls=120, **KNOWN_LEVELS)
    pipe, left = pipeline(gaussian()), [60]

    def interrupt(module: Any, args: Any) -> None:
        left[0] -= len(args[0])
        if left[0] < 0:
            raise KeyboardInterrupt

    handle = pipe.unet.register_forward_pre_hook(interrupt)
    options: dict[str, Any] = {"calls": 120, "resume_dir": tmp_path, **KNOWN_LEVELS}
    with pytest.raises(KeyboardInterrupt):
        dx.GaussianStats.from_score(pipe, **options)
    handle.remove()
    rows: list[int] = []
    pipe.unet.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    found = dx.GaussianStats.from_score(pipe, **options)
    assert 60 <= sum(rows) < 119
    assert torch.equal(found.eigenvectors, whole.eigenvectors)
    assert torch.equal(found.mean, whole.mean)
    with pytest.raises(ValueError, match=r"made with other settings.*seed"):
        dx.GaussianStats.from_score(pipe, seed=1, **options)


# --- prompts ---


def prompted(monkeypatch: pytest.MonkeyPatch, within: dx.GaussianStats) -> tuple[Any, dict[str, Tensor]]:
    """A pipeline whose denoiser is that of Gaussians with one covariance, and a mean for each prompt."""
    pipe = families.build("sd")
    g = torch.Generator().manual_seed(1)
    names = [f"a {'abcdefghij'[i % 10] * (1 + i // 10)}" for i in range(60)]
    across = torch.linalg.qr(torch.randn(256, 3, generator=g)).Q * torch.tensor([6.0, 4.0, 2.0])
    means = {name: across @ torch.randn(3, generator=g) for name in names}
    means = {name: mean.reshape(within.shape) for name, mean in means.items()}
    means[""] = torch.stack(list(means.values())).mean(0)

    def exact(
        pipe: Any, stats: Any, index: int, state: Any, *, rows: Any, seeds: Any, **call: Any
    ) -> Denoised:
        ratio = 100 * 0.9**index
        level = vp_level(1 / (1 + ratio**2))
        noisy = state(torch.zeros(len(seeds), *within.shape), level)
        own = torch.stack([means[name] for name in rows["prompt"]])
        return Denoised(level, noisy, within.denoise(noisy.double(), level, own.double()).float())

    levels = [vp_level(1 / (1 + (100 * 0.9**i) ** 2)) for i in range(50)]
    monkeypatch.setattr(score_calls, "denoise_at", exact)
    monkeypatch.setattr(score_calls, "grid_of", lambda pipe, call: (within.shape, levels))
    return pipe, means


def test_within_and_between_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(2)
    vectors = torch.linalg.qr(torch.randn(256, 2, generator=g)).Q
    within = dx.GaussianStats(torch.zeros(4, 8, 8), vectors, torch.tensor([9.0, 3.0]), 0.01, 1)
    pipe, means = prompted(monkeypatch, within)
    names = [name for name in means if name]
    found = dx.GaussianStats.from_score(pipe, names * 2, calls=400, batch_size=20, progress=False)
    torch.testing.assert_close(found.eigenvalues, within.eigenvalues, rtol=5e-3, atol=0)
    # Those whose turn came before the mean of all was known have none.
    asked = [name for name in names if name in (found.class_names or ())]
    assert len(asked) >= 0.9 * len(names)
    assert sum(found.class_counts or ()) > len(names)  # given twice, a prompt is asked twice
    for name in asked[:5]:
        torch.testing.assert_close(found.class_mean(name)[0], means[name], rtol=0, atol=2e-2)
    every = found.unconditional
    assert every is not None
    # This denoiser of the empty prompt has the covariance within prompts, and the mean is solved for with that of all.
    torch.testing.assert_close(every.mean, means[""], rtol=0, atol=0.1)
    rows = torch.stack([means[name] for name in names]).flatten(1)
    exact = torch.cov(rows.T) + within.eigenvectors @ torch.diag(within.eigenvalues) @ within.eigenvectors.T
    # The prompts asked are a sample of the prompts: not all are asked equally often.
    wanted = torch.linalg.eigvalsh(exact).flip(0)[: every.rank]
    torch.testing.assert_close(every.eigenvalues, wanted, rtol=0.15, atol=0.05)
    moved = found.transport(torch.randn(2, 4, 8, 8), (0.1, 0.99), (0.5, 0.8), guidance_scale=2.0)
    assert moved.isfinite().all()


# --- pipelines ---

_QUICK = ("sd", "flux", "zimage", "cogvideox")
_REFUSED = KNOWN["pipeline_samples"]


@pytest.mark.parametrize(
    "name", [n if n in _QUICK else pytest.param(n, marks=pytest.mark.slow) for n in families.NAMES]
)
def test_families(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Levels, layouts and scales of every family, by a prediction that is the same in all layouts: N(0.3, 0.5 I)."""

    def predict(scheduler: Any, output: Tensor, sample: Tensor, level: Any, *, clip: bool) -> Tensor:
        (a, s), sample = level, sample.float()
        return 0.3 + 0.5 * a / (0.5 * a * a + s * s) * (sample - 0.3 * a)

    monkeypatch.setattr(probe, "scheduler_prediction", predict)
    pipe = families.build(name)
    call = {
        key: value
        for key, value in families.inputs(name, 1, guided=False).items()
        if key not in ("prompt", "generator", "batch_size", "output_type", "num_inference_steps", "latents")
    }
    off = ("guidance_scale", "true_cfg_scale", "negative_prompt")
    call = {key: value for key, value in call.items() if key not in off}
    prompts = ["a aaa", "a bbb"] if families.FAMILIES[name].prompted else None

    def fit() -> dx.GaussianStats:
        return dx.GaussianStats.from_score(pipe, prompts, calls=100, batch_size=24, progress=False, **call)

    scheduler = pipe.scheduler
    if name in _REFUSED or not teleports(pipe):
        with pytest.raises(ValueError, match=r"\w"):
            fit()
    else:
        found = fit()
        assert found.shape == statistics(name).shape
        # In float32, and what half of the layouts round to at the pipeline's own dtype, which is float32 too.
        assert found.total_variance / found.mean.numel() == pytest.approx(0.5, rel=0.02)
        assert float((found.mean - 0.3).abs().max()) < 0.02
    assert pipe.scheduler is scheduler


def teleports(pipe: Any) -> bool:
    """Whether teleportation works on the pipeline."""
    try:
        check_pipeline(pipe)
    except ValueError:
        return False
    return True


# --- what is refused ---


def test_response_of_no_data_is_refused() -> None:
    with pytest.raises(ValueError, match=r"response is 1\S* times.*Fit the statistics to images or samples"):
        dx.GaussianStats.from_score(pipeline(None, cls=IdentityUNet), calls=100, **KNOWN_LEVELS)


def test_halves_without_anything_in_common_are_refused() -> None:
    with pytest.raises(ValueError, match=r"differ by \d+% of their sum.*Use more calls"):
        dx.GaussianStats.from_score(pipeline(None, cls=NoiseUNet), calls=100, **KNOWN_LEVELS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"calls": 99}, "calls=99 are too few .* 100 or more"),
        ({"rank": 0}, "rank must be a whole number"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"num_inference_steps": 1}, "no level .* more num_inference_steps"),
        ({"guidance_scale": 2.0}, "takes no guidance_scale"),
        ({"prompts": ["a bag"]}, "takes no prompt"),
    ],
)
def test_arguments(change: dict[str, Any], message: str) -> None:
    options: dict[str, Any] = {"calls": 100, **KNOWN_LEVELS, **change}
    with pytest.raises(ValueError, match=message):
        dx.GaussianStats.from_score(pipeline(gaussian()), **options)


def test_pipeline_with_teleportation_is_refused() -> None:
    pipe = pipeline(gaussian())
    dx.apply_teleport(pipe, gaussian(), skip=0.3)
    with pytest.raises(ValueError, match=r"remove it first \(dx\.remove_teleport\(pipe\)\)"):
        dx.GaussianStats.from_score(pipe, calls=100, **KNOWN_LEVELS)


def test_values_that_are_not_finite_are_refused() -> None:
    stats = gaussian()
    broken = dataclasses.replace(stats)
    pipe = pipeline(broken)
    pipe.unet.clean = lambda sample, level: sample * float("nan")
    with pytest.raises(ValueError, match="NaN or infinite values at σ"):
        dx.GaussianStats.from_score(pipe, calls=100, **KNOWN_LEVELS)


# --- the command line ---


def test_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr("diffusers_ext.teleport.commands.load_pipeline", lambda *args: pipeline(gaussian()))
    options = ("--from-score", "--calls", 120, "--batch-size", 24, "--output", tmp_path / "stats")
    text = run("fit-gaussian", "model", *options, "--resume-dir", tmp_path / "kept")
    assert dx.GaussianStats.from_pretrained(tmp_path / "stats").calibration["score"]["calls"] == 119
    assert "error of the covariance" in text
    assert (tmp_path / "kept" / "recipe.json").is_file()


def test_command_errors(tmp_path: Any) -> None:
    def error(*args: Any) -> str:
        return run("fit-gaussian", "model", *args, code=1)

    assert "Give either --dataset, --from-samples N or --from-score." in error(
        "--from-score", "--dataset", "a"
    )
    assert "--calls and --resume-dir go with --from-score." in error(
        "--from-samples", 4, "--calls", 9, "--resume-dir", tmp_path
    )
    assert "without guidance" in error("--from-score", "--guidance-scale", 2)
    assert "--prompt-map needs prompts" in error("--from-score", "--prompt-map")


# --- the maths ---


def responses(truth: Covariance, count: int, sigma: float, error: float = 0.0, seed: int = 0) -> Pairs:
    g = torch.Generator().manual_seed(seed)
    dimension = len(truth.vectors)
    steps = steps_of(torch.randn(count, dimension, generator=g), isotropic(dimension, 0.0), sigma)
    spectrum = truth.spectrum
    noise = error * torch.randn(2, count, dimension, generator=g)
    odd = truth.apply(steps, spectrum / (spectrum + sigma**2)) + noise[0]
    even = truth.apply(torch.ones(count, dimension), sigma**2 / (spectrum + sigma**2)) + sigma * noise[1]
    return Pairs(sigma, torch.zeros(dimension), steps, odd, even, tuple(range(count)))


def truth(dimension: int = 100) -> Covariance:
    vectors = torch.linalg.qr(torch.randn(dimension, 3, generator=torch.Generator().manual_seed(7))).Q
    return Covariance(vectors, torch.tensor([20.0, 6.0, 2.0]), 0.05)


def test_pairs_of_several_levels_are_pooled() -> None:
    exact = truth()
    pairs = [responses(exact, 20, sigma, seed=int(sigma)) for sigma in (3.0, 6.0, 12.0)]
    found = fit_covariance(pairs, 10)
    # Exact responses: float32 rounding only.
    torch.testing.assert_close(found.values, exact.values, rtol=1e-3, atol=1e-3)
    assert found.residual == pytest.approx(exact.residual, rel=1e-2)
    torch.testing.assert_close(implied_means(pairs[0], exact), torch.ones(20, 100), rtol=0, atol=1e-4)


def test_error_of_the_network_is_not_taken_for_variance() -> None:
    # Without a covariance, everything that is fitted is noise: the semicircle's edge is beyond all or nearly all of it.
    nothing = isotropic(100, 0.0)
    found = fit_covariance([responses(nothing, 120, 3.0, error=0.05)], 50)
    kept = fit_covariance([responses(truth(), 120, 3.0, error=0.05)], 50)
    # The largest noise eigenvalue may exceed the most negative one by a little, and is then shrunk to little.
    assert float(found.values.sum()) - found.values.numel() * found.residual < 0.5
    torch.testing.assert_close(kept.values[:2], torch.tensor([20.0, 6.0]), rtol=0.15, atol=0)
    assert squared_response(responses(nothing, 40, 3.0, error=0.05)) == pytest.approx(0, abs=0.1)


def test_squared_response_and_largest() -> None:
    exact, sigma = truth(), 5.0
    j = exact.spectrum / (exact.spectrum + sigma**2)
    wanted = float((j[:-1] ** 2).sum() + 97 * j[-1] ** 2)
    # 400 pairs: the relative error of a trace estimate of this spectrum is √(2/400), four times that.
    assert squared_response(responses(exact, 400, sigma)) == pytest.approx(wanted, rel=0.3)
    assert top_response(responses(exact, 100, sigma)) == pytest.approx(float(j[0]), rel=1e-2)


def test_agreement() -> None:
    exact, other = truth(), isotropic(100, 0.05)
    assert unexplained(responses(exact, 30, 5.0), exact) == pytest.approx(0, abs=1e-6)
    assert relative_difference(exact, exact) == pytest.approx(0, abs=1e-6)
    # ‖Σ₁ − Σ₂‖ / ‖Σ₁ + Σ₂‖ of the dense matrices.
    dense = [c.apply(torch.eye(100), c.spectrum) for c in (exact, other)]
    wanted = float((dense[0] - dense[1]).norm() / (dense[0] + dense[1]).norm())
    assert relative_difference(exact, other) == pytest.approx(wanted, rel=1e-4)


def test_error_is_subtracted_between_prompts() -> None:
    g = torch.Generator().manual_seed(3)
    within, direction = truth(), torch.linalg.qr(torch.randn(100, 1, generator=g)).Q[:, 0]
    pairs = responses(within, 400, 5.0, error=0.1)
    offsets = 4.0 * torch.randn(400, 1, generator=g) * direction
    shift = within.apply(offsets, 25.0 / (within.spectrum + 25.0))
    found = with_means(within, [pairs._replace(even=pairs.even + shift)], 10)
    wanted = float(within.values.sum()) + 97 * within.residual + float(offsets.var(0).sum())
    # The error adds (σ · 0.1)² = 0.25 in each of 100 directions, which would double the total; 400 pairs leave a few
    # percent of it.
    variance = float(found.values.sum()) + (100 - found.values.numel()) * found.residual
    assert variance == pytest.approx(wanted, rel=0.15)
