"""TeleportScheduler on the exact denoiser of a Gaussian, where the right answer is known in closed form."""

import copy
import inspect
import json
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import diffusers_ext as dx
from diffusers_ext.core import families, schedules
from diffusers_ext.core.predictions import Level
from diffusers_ext.teleport.saving import ARCHIVE_NAME
from diffusers_ext.teleport.scheduler import TeleportScheduler
from tests import tiny

STEPS = 20
SHAPE = (2, 2, 4)
VP = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
UNCLIPPED = {**VP, "clip_sample": False}
V = {"prediction_type": "v_prediction"}

DETERMINISTIC: dict[str, Callable[[], Any]] = {
    "ddim": lambda: diffusers.DDIMScheduler(**UNCLIPPED),
    "ddim-v-zero-snr": lambda: diffusers.DDIMScheduler(
        **UNCLIPPED, **V, rescale_betas_zero_snr=True, timestep_spacing="trailing"
    ),
    "cogvideox-v-zero-snr": lambda: diffusers.CogVideoXDDIMScheduler(
        **V, rescale_betas_zero_snr=True, timestep_spacing="trailing"
    ),
    "ddim-sample": lambda: diffusers.DDIMScheduler(**UNCLIPPED, prediction_type="sample"),
    "pndm": lambda: diffusers.PNDMScheduler(**VP, skip_prk_steps=True),
    "pndm-runge-kutta": lambda: diffusers.PNDMScheduler(**VP),
    "dpm": lambda: diffusers.DPMSolverMultistepScheduler(**VP),
    "dpm-karras": lambda: diffusers.DPMSolverMultistepScheduler(**VP, use_karras_sigmas=True),
    "dpm-v": lambda: diffusers.DPMSolverMultistepScheduler(**VP, **V),
    "dpm-sample": lambda: diffusers.DPMSolverMultistepScheduler(**VP, prediction_type="sample"),
    "dpm-third": lambda: diffusers.DPMSolverMultistepScheduler(**VP, solver_order=3),
    "dpm-flow": lambda: diffusers.DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    ),
    "singlestep": lambda: diffusers.DPMSolverSinglestepScheduler(**VP, lower_order_final=True),
    "unipc": lambda: diffusers.UniPCMultistepScheduler(**VP),
    "deis": lambda: diffusers.DEISMultistepScheduler(**VP),
    "euler": lambda: diffusers.EulerDiscreteScheduler(**VP),
    "euler-karras": lambda: diffusers.EulerDiscreteScheduler(**VP, use_karras_sigmas=True),
    "euler-v": lambda: diffusers.EulerDiscreteScheduler(**VP, **V),
    "heun": lambda: diffusers.HeunDiscreteScheduler(**VP),
    "kdpm2": lambda: diffusers.KDPM2DiscreteScheduler(**VP),
    "lms": lambda: diffusers.LMSDiscreteScheduler(**VP),
    "edm-euler": lambda: diffusers.EDMEulerScheduler(),
    "edm-dpm": lambda: diffusers.EDMDPMSolverMultistepScheduler(),
    "flow-euler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(),
    "flow-euler-shift": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "flow-heun": lambda: diffusers.FlowMatchHeunDiscreteScheduler(),
}
STOCHASTIC: dict[str, Callable[[], Any]] = {
    "ddpm": lambda: diffusers.DDPMScheduler(**UNCLIPPED),
    "dpm-sde": lambda: diffusers.DPMSolverMultistepScheduler(**VP, algorithm_type="sde-dpmsolver++"),
    "euler-ancestral": lambda: diffusers.EulerAncestralDiscreteScheduler(**VP),
    "kdpm2-ancestral": lambda: diffusers.KDPM2AncestralDiscreteScheduler(**VP),
    "flow-euler-stochastic": lambda: diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
}
ALL = {**DETERMINISTIC, **STOCHASTIC}


def current_level(inner: Any, t: Tensor) -> Level:
    """The level at which `inner` expects its next model call, second-order midpoints included."""
    kind = schedules.scaling(inner)
    if kind == "alphas":
        alpha_bar = float(inner.alphas_cumprod[int(t)])
        return alpha_bar**0.5, (1 - alpha_bar) ** 0.5
    index = inner.step_index if inner.step_index is not None else inner.begin_index or 0
    sigma = inner.sigmas[index]
    if isinstance(inner, diffusers.KDPM2DiscreteScheduler) and not inner.state_in_first_order:
        sigma = inner.sigmas_interpol[index]
    if isinstance(inner, diffusers.KDPM2AncestralDiscreteScheduler) and not inner.state_in_first_order:
        sigma = inner.sigmas_interpol[index - 1]
    if kind == "solver":
        a, s = inner._sigma_to_alpha_sigma_t(sigma)
        return float(a), float(s)
    return (1 - float(sigma), float(sigma)) if kind == "flow" else (1.0, float(sigma))


def exact_output(inner: Any, clean: Tensor, x: Tensor, level: Level) -> Tensor:
    """What a model of `inner`'s prediction type returns when its x0-prediction is `clean`."""
    (a, s), kind = level, schedules.scaling(inner)
    if kind == "edm":
        data = inner.config.sigma_data
        norm = s**2 + data**2
        return (clean - data**2 / norm * x) * norm**0.5 / (s * data)
    prediction = "flow_prediction" if kind == "flow" else inner.config.prediction_type
    noise = (x - a * clean) / s
    norm = (a * a + s * s) ** 0.5
    outputs = {"sample": clean, "epsilon": noise, "flow_prediction": noise - clean}
    outputs["v_prediction"] = (a * noise - s * clean) / norm
    return outputs[prediction]


def sample(scheduler: Any, noise: Tensor, stats: Any, steps: int = STEPS, **options: Any) -> Tensor:
    """A pipeline's loop around the exact denoiser; `options`: mean, double (the batch), schedule, step."""
    mean, double = options.get("mean"), options.get("double", False)
    inner = getattr(scheduler, "inner", scheduler)
    scheduler.set_timesteps(**options.get("schedule", {"num_inference_steps": steps}))
    x = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    for t in scheduler.timesteps:
        seen = torch.cat([x, x]) if double else x
        if hasattr(scheduler, "scale_model_input"):
            seen = scheduler.scale_model_input(seen, t)
            level = current_level(inner, t)
            seen = seen / inner.scale_model_input(torch.ones(1), t)
        else:
            seen = scheduler.map_model_input(seen, t) if scheduler is not inner else seen
            level = current_level(inner, t)
        seen = seen[len(x) :] if double else seen
        output = exact_output(inner, stats.denoise(seen, level, mean), seen, level).to(noise.dtype)
        x = scheduler.step(output, t, x, **options.get("step", {}), return_dict=False)[0]
    return x


def rms(x: Tensor, y: Tensor) -> float:
    return float((x - y).pow(2).mean().sqrt())


def wrap(name: str, stats: Any, skip: float | str = 0.3, **options: Any) -> TeleportScheduler:
    return TeleportScheduler.from_scheduler(ALL[name](), stats, skip, **options)


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    # numpy warns, thousands of times, about how diffusers calls it; pytest's own filters make that slow.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture
def stats() -> Any:
    return tiny.gaussian(SHAPE)


@pytest.fixture
def noise() -> Tensor:
    return torch.randn(16, *SHAPE, generator=torch.Generator().manual_seed(3))


def seeded(name: str) -> dict[str, Any]:
    return {"step": {"generator": torch.Generator().manual_seed(1)}} if name in STOCHASTIC else {}


# -- accuracy


@pytest.mark.parametrize("mean_from", ["stats", "first_call"])
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_skipping_costs_no_accuracy(name: str, mean_from: str, stats: Any, noise: Tensor) -> None:
    full = DETERMINISTIC[name]()
    result = sample(full, noise, stats)
    teleport = wrap(name, stats, mean_from=mean_from)
    skipped = sample(teleport, noise, stats)
    start = schedules.grid_levels(full)[0]
    reference = stats.transport(noise * getattr(full, "init_noise_sigma", 1.0), start, (1.0, 0.0))
    # Data have a standard deviation around 0.6: errors below 0.002 are no longer the skipped part's.
    assert rms(skipped, reference) <= max(1.1 * rms(result, reference), 0.002)
    assert teleport.num_skipped_steps == (6 if mean_from == "stats" else 5)
    assert len(teleport.timesteps) < len(full.timesteps)


@pytest.mark.parametrize("name", STOCHASTIC)
def test_stochastic_samplers_keep_the_distribution(name: str) -> None:
    shape, count = (2, 2, 2), 4000
    stats = tiny.gaussian(shape)
    noise = torch.randn(count, *shape, generator=torch.Generator().manual_seed(5))

    def whitened(x: Tensor) -> Tensor:
        full_basis, _ = torch.linalg.qr(
            torch.cat([stats.eigenvectors, torch.randn(8, 1, generator=torch.Generator().manual_seed(0))], 1)
        )
        spectrum = torch.cat([stats.eigenvalues, torch.tensor([stats.residual])])
        return (x - stats.mean).flatten(1) @ full_basis / spectrum.sqrt()

    full = whitened(sample(ALL[name](), noise, stats, **seeded(name)))
    skipped = whitened(sample(wrap(name, stats), noise, stats, **seeded(name)))
    # Six standard errors over the full schedule's own bias: mean 1/√n, variance √(2/n), correlation 1/√n.
    error = count**-0.5
    assert (skipped.mean(0).abs() <= full.mean(0).abs() + 6 * error).all()
    covariance, biased = skipped.T.cov() - torch.eye(8), full.T.cov() - torch.eye(8)
    assert (covariance.abs() <= biased.abs().max() + 6 * 2**0.5 * error).all()


@pytest.mark.parametrize("name", ALL)
def test_any_reach_runs(name: str, stats: Any, noise: Tensor) -> None:
    for skip, mean_from in ((0.5, "first_call"), (0.99, "stats")):
        x = sample(wrap(name, stats, skip, mean_from=mean_from), noise[:2], stats, **seeded(name))
        assert torch.isfinite(x).all()


# -- off means off


@pytest.mark.parametrize("name", ALL)
def test_off_is_bit_equal(name: str, stats: Any, noise: Tensor) -> None:
    plain = sample(ALL[name](), noise, stats, **seeded(name))
    off = [wrap(name, stats, 0.0), wrap(name, stats, 0.0, mean_from="first_call")]
    one = wrap(name, stats, 1 / STEPS, mean_from="first_call")  # would save nothing
    unreachable = wrap(name, stats, "auto", sigma=1e9) if "zero-snr" not in name else off[0]
    flow = name.startswith("flow") or name == "dpm-flow"
    for scheduler in [*off, one, *([] if flow else [unreachable])]:
        assert torch.equal(sample(scheduler, noise, stats, **seeded(name)), plain)
        assert scheduler.num_skipped_steps == 0
        assert scheduler.skipped_to is None


def test_uncalibrated_and_calibrated_auto(stats: Any, noise: Tensor) -> None:
    with pytest.raises(ValueError, match="calibrate_skip"):
        wrap("euler", stats, "auto")
    nothing = wrap("euler", tiny.gaussian(SHAPE, calibration={"sigma": None}), "auto")
    assert torch.equal(sample(nothing, noise, stats), sample(ALL["euler"](), noise, stats))
    calibrated = wrap("euler", tiny.gaussian(SHAPE, calibration={"sigma": 9.0}), "auto")
    sample(calibrated, noise, stats)
    by_hand = wrap("euler", stats, sigma=9.0, skip="auto")
    sample(by_hand, noise, stats)
    assert calibrated.skipped_to == by_hand.skipped_to
    assert calibrated.skipped_to is not None
    assert calibrated.skipped_to >= 9.0
    assert calibrated.inner.sigmas[calibrated.num_skipped_steps + 1] < 9.0


# -- the mean


@pytest.mark.parametrize("name", ["ddim", "dpm-v", "euler", "lms", "edm-dpm", "flow-euler", "heun", "pndm"])
def test_first_call_finds_the_prompts_own_mean(name: str, stats: Any, noise: Tensor) -> None:
    prompt = stats.mean + 1.5 * torch.randn(16, *SHAPE, generator=torch.Generator().manual_seed(8))
    told = wrap(name, stats)
    told.set_mean(prompt)
    expected = sample(told, noise, stats, mean=prompt)
    found = sample(wrap(name, stats, mean_from="first_call"), noise, stats, mean=prompt)
    unaware = sample(wrap(name, stats), noise, stats, mean=prompt)
    told.set_mean(None)
    again = sample(told, noise, stats, mean=prompt)
    assert rms(found, expected) < 2e-3
    assert rms(unaware, expected) > 4 * rms(found, expected)
    assert torch.equal(again, unaware)


def test_means_follow_a_batch_doubled_for_guidance(stats: Any, noise: Tensor) -> None:
    means = stats.mean + torch.randn(16, *SHAPE, generator=torch.Generator().manual_seed(8))
    for name in ("euler", "flow-euler", "ddim"):
        teleport = wrap(name, stats)
        teleport.set_mean(means)
        doubled = sample(teleport, noise, stats, mean=means, double=True)
        assert torch.allclose(doubled, sample(teleport, noise, stats, mean=means), atol=1e-5)


def test_wrong_means_are_refused(stats: Any, noise: Tensor) -> None:
    teleport = wrap("euler", stats)
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        teleport.set_mean(torch.zeros(3))
    with pytest.raises(ValueError, match="NaN"):
        teleport.set_mean(torch.full(SHAPE, torch.nan))
    teleport.set_mean(torch.zeros(3, *SHAPE))
    with pytest.raises(ValueError, match="3 means"):
        sample(teleport, noise, stats)
    teleport.set_mean(torch.zeros(8, *SHAPE))
    with pytest.raises(ValueError, match="8 means for 16 images"):
        sample(teleport, noise, stats)


# -- layouts and precisions


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["ddim", "dpm", "euler", "flow-euler"])
def test_half_precision(name: str, dtype: torch.dtype, stats: Any, noise: Tensor) -> None:
    exact = sample(wrap(name, stats), noise, stats)
    for mean_from in ("stats", "first_call"):
        half = sample(wrap(name, stats, mean_from=mean_from), noise.to(dtype), stats)
        assert half.dtype == dtype
        assert rms(half.float(), exact) < (0.15 if dtype == torch.bfloat16 else 0.03)


@pytest.mark.parametrize("mean_from", ["stats", "first_call"])
@pytest.mark.parametrize(
    ("layout", "shape"),
    [
        ("patches", SHAPE),
        ("positions", SHAPE),
        ("positions", (2, 3, 2, 4)),
        ("frames first", (2, 3, 2, 4)),
        ("channels last", SHAPE),
        ("channels last", (2, 3, 2, 4)),
    ],
)
def test_layouts(layout: Any, shape: tuple[int, ...], mean_from: str) -> None:
    stats = tiny.gaussian(shape)
    noise = torch.randn(16, *shape, generator=torch.Generator().manual_seed(0))
    plain, packed = (wrap("flow-euler", stats, mean_from=mean_from) for _ in range(2))
    plain.set_layout("grid")
    packed.set_layout(layout, shape)
    means = torch.randn(16, *shape)
    if mean_from == "stats":
        plain.set_mean(means)
        packed.set_mean(means)

    class Packed:  # the same exact denoiser, on latents in the layout
        @staticmethod
        def denoise(x: Tensor, level: Level, mean: Any = None) -> Tensor:
            grid = families.to_grid(layout, x, shape)
            return families.from_grid(layout, stats.denoise(grid, level, mean))

    result = sample(packed, families.from_grid(layout, noise), Packed)
    expected = sample(plain, noise, stats)
    assert torch.allclose(families.to_grid(layout, result, shape), expected, atol=1e-5)


@pytest.mark.parametrize("shape", [(8, 16), (4, 3, 2, 4), (16,)])
@pytest.mark.parametrize("mean_from", ["stats", "first_call"])
def test_latents_whose_layout_only_the_pipeline_knows_are_refused(
    shape: tuple[int, ...], mean_from: str
) -> None:
    # Also where the shapes are those of the statistics: (4, 4, H, W) may have the frames first.
    stats = tiny.gaussian(shape)
    with pytest.raises(ValueError, match=r"dx\.apply_teleport"):
        sample(wrap("flow-euler", stats, mean_from=mean_from), torch.randn(1, *shape), stats)


def test_latents_of_another_size_are_refused(stats: Any) -> None:
    with pytest.raises(ValueError, match=r"\(2, 4, 4\).*fitted on \(2, 2, 4\)"):
        sample(wrap("euler", stats), torch.randn(1, 2, 4, 4), stats)


# -- schedules


def test_user_supplied_schedules(stats: Any, noise: Tensor) -> None:
    timesteps = list(range(980, 0, -50))
    for name in ("ddpm", "dpm", "euler", "heun"):
        schedule = {"schedule": {"timesteps": timesteps}}
        teleport = wrap(name, stats)
        x = sample(teleport, noise, stats, **schedule, **seeded(name))
        assert teleport.num_skipped_steps == 6
        assert rms(x, stats.mean.expand_as(x)) < 3
        off = sample(wrap(name, stats, 0), noise, stats, **schedule, **seeded(name))
        assert torch.equal(off, sample(ALL[name](), noise, stats, **schedule, **seeded(name)))
    for name in ("euler", "flow-euler"):
        sigmas = [14.0, 10.0, 6.0, 3.0, 1.0, 0.3, 0.0] if name == "euler" else [1.0, 0.8, 0.6, 0.4, 0.2]
        teleport = wrap(name, stats, 0.4)
        sample(teleport, noise, stats, schedule={"sigmas": sigmas})
        assert teleport.num_skipped_steps == 2
        assert float(teleport.sigmas[0]) == pytest.approx(sigmas[2])
    with pytest.raises(TypeError):
        wrap("ddim", stats).set_timesteps(timesteps=timesteps)


def test_the_view_on_the_schedule(stats: Any, noise: Tensor) -> None:
    for mean_from in ("stats", "first_call"):
        teleport, full = wrap("heun", stats, mean_from=mean_from), ALL["heun"]()
        teleport.set_timesteps(STEPS)
        full.set_timesteps(STEPS)
        kept = full.timesteps[12:]
        first = [full.timesteps[:1]] if mean_from == "first_call" else []
        assert torch.equal(teleport.timesteps, torch.cat([*first, kept]))
        assert teleport.init_noise_sigma == full.init_noise_sigma
        assert teleport.order == 2
        assert len(teleport) == len(full)
        assert teleport.num_inference_steps == STEPS
        assert teleport.skipped_to == pytest.approx(float(full.sigmas[12]))
        x = noise * full.init_noise_sigma
        for i, t in enumerate(teleport.timesteps):
            teleport.set_begin_index(0) if i == 0 else None
            teleport.scale_model_input(x, t)
            assert teleport.step_index == i
            x = teleport.step(torch.zeros_like(x), t, x).prev_sample


METHODS = ("set_timesteps", "step", "scale_model_input", "add_noise", "scale_noise", "set_begin_index")


@pytest.mark.parametrize("name", ["ddim", "ddpm", "pndm", "dpm", "euler", "lms", "edm-euler", "flow-euler"])
def test_signatures_are_the_wrapped_ones(name: str, stats: Any) -> None:
    inner = ALL[name]()
    teleport = TeleportScheduler(inner, stats, 0.3)
    for method in METHODS:
        assert hasattr(teleport, method) == hasattr(inner, method)
        if hasattr(inner, method):
            expected = inspect.signature(getattr(inner, method))
            assert inspect.signature(getattr(teleport, method)) == expected
    assert hasattr(teleport, "init_noise_sigma") == hasattr(inner, "init_noise_sigma")
    assert not hasattr(teleport, "no_such_attribute")


def test_keyword_calls(stats: Any, noise: Tensor) -> None:
    for mean_from in ("stats", "first_call"):
        results = []
        for keywords in (False, True):
            teleport = wrap("lms", stats, mean_from=mean_from)
            teleport.set_timesteps(num_inference_steps=STEPS)
            x = noise * teleport.init_noise_sigma
            for t in teleport.timesteps:
                if keywords:
                    seen = teleport.scale_model_input(sample=x, timestep=t)
                    x = teleport.step(model_output=seen, timestep=t, sample=x, order=3).prev_sample
                else:
                    x = teleport.step(teleport.scale_model_input(x, t), t, x, 3, False)[0]
            results.append(x)
        assert torch.equal(*results)


# -- copies and files


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_behave_alike(copied: Callable[[Any], Any], stats: Any, noise: Tensor) -> None:
    teleport = wrap("dpm", stats)
    other = copied(teleport)
    expected = sample(teleport, noise, stats)
    assert other.inner is not teleport.inner
    assert torch.equal(sample(other, noise, stats), expected)
    assert torch.equal(sample(copied(teleport), noise, stats), expected)


def public(config: Any) -> dict[str, Any]:
    return {key: value for key, value in config.items() if not key.startswith("_")}


@pytest.mark.parametrize("name", ALL)
def test_save_and_load(name: str, stats: Any, noise: Tensor, tmp_path: Any) -> None:
    teleport = wrap(name, stats, 0.25, mean_from="first_call")
    teleport.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"scheduler_config.json", ARCHIVE_NAME}
    loaded = TeleportScheduler.from_pretrained(tmp_path)
    assert type(loaded.inner) is type(teleport.inner)
    assert public(loaded.config) == public(teleport.config)
    expected = sample(teleport, noise, stats, **seeded(name))
    assert torch.equal(sample(loaded, noise, stats, **seeded(name)), expected)
    plain = type(teleport.inner).from_pretrained(tmp_path)
    assert public(plain.config) == public(teleport.inner.config)


def test_damaged_files_are_refused(stats: Any, tmp_path: Any) -> None:
    teleport = wrap("euler", stats)
    teleport.save_pretrained(tmp_path / "whole")
    content = (tmp_path / "whole" / ARCHIVE_NAME).read_bytes()
    for kept in (0, 100, len(content) // 2, len(content) - 1):
        (tmp_path / "whole" / ARCHIVE_NAME).write_bytes(content[:kept])
        with pytest.raises(ValueError, match="damaged or incomplete"):
            TeleportScheduler.from_pretrained(tmp_path / "whole")
    (tmp_path / "whole" / ARCHIVE_NAME).unlink()
    with pytest.raises(ValueError, match=ARCHIVE_NAME):
        TeleportScheduler.from_pretrained(tmp_path / "whole")
    teleport.inner.save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="plain scheduler"):
        TeleportScheduler.from_pretrained(tmp_path / "plain")
    config = json.loads((tmp_path / "whole" / "scheduler_config.json").read_text())
    config["_teleport"]["scheduler"] = "LCMScheduler"
    (tmp_path / "whole" / "scheduler_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="LCMScheduler"):
        TeleportScheduler.from_pretrained(tmp_path / "whole")


def test_other_schedulers_from_its_config(stats: Any, noise: Tensor) -> None:
    teleport = wrap("dpm-karras", stats)
    expected = diffusers.EulerDiscreteScheduler.from_config(teleport.inner.config)
    other = diffusers.EulerDiscreteScheduler.from_config(teleport.config)
    assert dict(other.config) == dict(expected.config)
    again = TeleportScheduler.from_scheduler(other, teleport.stats, skip=0.3)
    assert torch.isfinite(sample(again, noise, stats)).all()
    back = type(teleport.inner).from_config(again.config)
    assert torch.equal(
        sample(TeleportScheduler(back, stats, 0.3), noise, stats), sample(teleport, noise, stats)
    )
    assert teleport.compatibles == teleport.inner.compatibles
    with pytest.raises(ValueError, match="needs statistics"):
        TeleportScheduler.from_config(teleport.config)


# -- refusals


@pytest.mark.parametrize(
    "make",
    [
        diffusers.CogVideoXDPMScheduler,
        diffusers.IPNDMScheduler,
        diffusers.DDIMInverseScheduler,
        diffusers.SASolverScheduler,
        type("DDIMScheduler", (diffusers.DDIMScheduler,), {}),
    ],
)
def test_unknown_schedulers_are_refused(make: Any, stats: Any) -> None:
    with pytest.raises(ValueError, match=f"{make.__name__}.*Supported schedulers: DDIMScheduler"):
        TeleportScheduler.from_scheduler(make(), stats, 0.3)


def test_refusals_of_schedulers_say_what_to_do(stats: Any) -> None:
    for make in (
        diffusers.LCMScheduler,
        diffusers.TCDScheduler,
        diffusers.CMStochasticIterativeScheduler,
    ):
        with pytest.raises(ValueError, match=f"{make.__name__}.*distilled to a few steps.*Use the model"):
            TeleportScheduler.from_scheduler(make(), stats, 0.3)
    dpm = diffusers.CogVideoXDPMScheduler(prediction_type="v_prediction")
    with pytest.raises(ValueError, match=r"CogVideoXDDIMScheduler\.from_config\(pipe\.scheduler\.config\)"):
        TeleportScheduler.from_scheduler(dpm, stats, 0.3)
    TeleportScheduler.from_scheduler(diffusers.CogVideoXDDIMScheduler.from_config(dpm.config), stats, 0.3)


def test_wrong_arguments_are_refused(stats: Any) -> None:
    teleport = wrap("euler", stats)
    with pytest.raises(ValueError, match="already"):
        TeleportScheduler.from_scheduler(teleport, stats, 0.3)
    for skip in (1.0, -0.1, float("nan"), True, "half", None):
        with pytest.raises(ValueError, match="skip must be"):
            wrap("euler", stats, skip)  # type: ignore[arg-type]
    for sigma in (0.0, -1.0, float("inf"), float("nan"), "big", True):
        with pytest.raises(ValueError, match="sigma must be"):
            wrap("euler", stats, "auto", sigma=sigma)
    with pytest.raises(ValueError, match="not both"):
        wrap("euler", stats, 0.3, sigma=5.0)
    with pytest.raises(ValueError, match="mean_from must be"):
        wrap("euler", stats, mean_from="prompt")
    with pytest.raises(ValueError, match="GaussianStats"):
        wrap("euler", None)
    inverted = diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    with pytest.raises(ValueError, match="invert_sigmas"):
        TeleportScheduler(inverted, stats, 0.3)


def test_an_unmapped_model_input_is_refused(stats: Any, noise: Tensor) -> None:
    teleport = wrap("flow-euler", stats)
    teleport.set_timesteps(STEPS)
    with pytest.raises(ValueError, match=r"dx\.apply_teleport\(pipe.*first_call"):
        teleport.step(noise, teleport.timesteps[0], noise)


def test_other_latents_in_step_than_shown_are_refused(stats: Any, noise: Tensor) -> None:
    for name in ("euler", "flow-euler"):
        teleport = wrap(name, stats)
        teleport.set_timesteps(STEPS)
        show = teleport.scale_model_input if name == "euler" else teleport.map_model_input
        show(noise, teleport.timesteps[0])
        with pytest.raises(ValueError, match="other latents"):
            teleport.step(noise, teleport.timesteps[0], noise + 1)


def test_noised_starts_are_refused(stats: Any, noise: Tensor) -> None:
    for name in ("euler", "ddim", "flow-euler"):
        teleport = wrap(name, stats)
        teleport.set_timesteps(STEPS)
        method = "scale_noise" if name == "flow-euler" else "add_noise"
        with pytest.raises(ValueError, match="pure noise"):
            getattr(teleport, method)(noise, teleport.timesteps[:1], noise)
        if hasattr(teleport, "set_begin_index"):
            with pytest.raises(ValueError, match="pure noise"):
                teleport.set_begin_index(3)
    plain, off = ALL["euler"](), wrap("euler", stats, 0)
    for scheduler in (plain, off):
        scheduler.set_timesteps(STEPS)
        scheduler.set_begin_index(3)
    time = plain.timesteps[3:4]
    assert torch.equal(plain.add_noise(noise, noise, time), off.add_noise(noise, noise, time))


def test_it_is_exported() -> None:
    assert dx.TeleportScheduler is TeleportScheduler
