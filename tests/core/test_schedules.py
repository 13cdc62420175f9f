"""What is read off schedulers, against the schedulers' own steps."""

import copy
import inspect
import warnings
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from diffusers_ext.core.predictions import PREDICTION_TYPES
from diffusers_ext.core.schedules import (
    SUPPORTED,
    FlowSolverEulerScheduler,
    counterpart,
    first_order_scheduler,
    grid_levels,
    inverse_scheduler,
    levels_at,
    noising_scheduler,
    prediction_type,
    same_grid_deterministic,
    scaling,
    scheduler_class,
)

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


# PNDM repeats grid points, which tests/teleport/test_scheduler.py follows; the EDM schedulers' add_noise wants the
# preconditioned time.
@pytest.mark.parametrize("name", [n for n in SUPPORTED if "EDM" not in n and n != "PNDMScheduler"])
def test_grid_levels_are_those_that_the_scheduler_noises_to(name: str) -> None:
    scheduler = scheduler_class(name)(**({} if "FlowMatch" in name else SD))
    scheduler.set_timesteps(6)
    levels = grid_levels(scheduler)
    assert len(levels) == 6
    zeros, ones = torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2)

    def noised(clean: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> float:
        if "FlowMatch" in name:
            scheduler._step_index = None  # Heun's noises to the level it looked up first
            return float(scheduler.scale_noise(clean, t, noise).mean())
        return float(scheduler.add_noise(clean, noise, t if t.is_floating_point() else t.long()).mean())

    for index, (a, s) in enumerate(levels):
        t = scheduler.timesteps[index * scheduler.order][None]
        # The schedules are kept in float32.
        assert noised(zeros, ones, t) == pytest.approx(s, rel=1e-4)
        assert noised(ones, zeros, t) == pytest.approx(a, rel=1e-4)


def test_levels_of_timesteps_multiply_a_batch() -> None:
    scheduler = diffusers.DDPMScheduler(**SD)
    times, like = torch.tensor([0, 999]), torch.zeros(2, 3, 4, 4)
    a, s = levels_at(scheduler, times, like)
    assert a.shape == s.shape == (2, 1, 1, 1)
    assert torch.allclose(a**2 + s**2, torch.ones(2, 1, 1, 1))
    assert torch.allclose(a.flatten(), scheduler.alphas_cumprod[times].sqrt())


def test_first_order_counterparts() -> None:
    for name in ("DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler"):
        found = first_order_scheduler(getattr(diffusers, name)(**SD, prediction_type="v_prediction"))
        assert type(found) is diffusers.DDIMScheduler
        assert found.config.prediction_type == "v_prediction"
        assert found.config.beta_end == SD["beta_end"]
        assert not found.config.clip_sample
        assert type(inverse_scheduler(found)) is diffusers.DDIMInverseScheduler
    flow = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True)
    found = first_order_scheduler(flow)
    assert (found.config.shift, found.config.stochastic_sampling) == (3.0, False)
    with pytest.raises(ValueError, match="EDMEulerScheduler has no alphas_cumprod and is not a flow"):
        first_order_scheduler(diffusers.EDMEulerScheduler())


# --- counterparts depend on the values of a config, and not on its history ---


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    # numpy warns, thousands of times, about how diffusers calls it.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    SD,
    {"timestep_spacing": "trailing"},
    {"timestep_spacing": "linspace", "prediction_type": "v_prediction"},
    {"timestep_spacing": "leading", "steps_offset": 1},
    {"trained_betas": [1e-3 + 1e-5 * i for i in range(1000)]},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"rescale_betas_zero_snr": True},
    {"use_karras_sigmas": True},
    {**FLOW, "flow_shift": 3.0},
    {**FLOW, "use_dynamic_shifting": True},
    {"shift": 3.0},
    {"use_dynamic_shifting": True},
    {"stochastic_sampling": True, "shift": 2.0},
)
CASES = [
    (name, number)
    for name in SUPPORTED
    for number, options in enumerate(OPTIONS)
    if set(options) <= set(inspect.signature(getattr(diffusers, name)).parameters)
]


def values(scheduler: Any) -> dict[str, Any]:
    return {key: value for key, value in scheduler.config.items() if not key.startswith("_")}


def grid(scheduler: Any, steps: int = 7) -> list[torch.Tensor]:
    mu = {"mu": 0.8} if scheduler.config.get("use_dynamic_shifting") else {}
    scheduler.set_timesteps(steps, **mu)
    return [scheduler.timesteps, getattr(scheduler, "sigmas", torch.zeros(1))]


def is_flow(scheduler: Any) -> bool:
    return prediction_type(scheduler) == "flow_prediction"


def all_counterparts(scheduler: Any) -> list[Any]:
    found = [same_grid_deterministic(scheduler)]
    if "EDM" not in type(scheduler).__name__:
        found += [first_order_scheduler(scheduler), inverse_scheduler(scheduler)]
    if getattr(scheduler, "alphas_cumprod", None) is not None and not is_flow(scheduler):
        solver = counterpart(
            scheduler,
            diffusers.DPMSolverMultistepScheduler,
            algorithm_type="dpmsolver++",
            use_karras_sigmas=False,
        )
        found += [noising_scheduler(scheduler), solver]
    return found


def remade(scheduler: Any, folder: Path) -> list[Any]:
    """The same scheduler with other histories."""
    kind = type(scheduler)
    scheduler.save_pretrained(folder)
    again = kind.from_pretrained(folder)
    explicit = kind(**{k: v for k, v in values(scheduler).items() if k in inspect.signature(kind).parameters})
    used = copy.deepcopy(scheduler)
    grid(used, 12)
    return [kind.from_config(scheduler.config), again, kind.from_config(again.config), explicit, used]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "number"), CASES)
def test_counterparts_depend_on_values_alone(name: str, number: int, tmp_path: Path) -> None:
    # Else, its set_timesteps sets this value in its config.
    final = {"lower_order_final": True} if name == "DPMSolverSinglestepScheduler" else {}
    scheduler = getattr(diffusers, name)(**OPTIONS[number], **final)
    expected = all_counterparts(scheduler)
    for other in remade(scheduler, tmp_path):
        assert values(other) == values(scheduler)
        for one, two in zip(expected, all_counterparts(other), strict=True):
            assert type(one) is type(two)
            assert values(one) == values(two)
            assert all(map(torch.equal, grid(one), grid(two)))
            assert torch.equal(
                getattr(one, "alphas_cumprod", torch.ones(1)), getattr(two, "alphas_cumprod", torch.ones(1))
            )


@pytest.mark.parametrize(("name", "number"), CASES)
def test_counterparts_have_the_noise_schedule_of_their_source(name: str, number: int) -> None:
    scheduler = getattr(diffusers, name)(**OPTIONS[number])
    if getattr(scheduler, "alphas_cumprod", None) is None or is_flow(scheduler):
        return
    for found in all_counterparts(scheduler):
        # DPM-Solver keeps off zero.
        floor = 2**-24 if isinstance(found, diffusers.DPMSolverMultistepScheduler) else 0
        alphas = scheduler.alphas_cumprod.float()  # CogVideoX has float64
        assert torch.equal(found.alphas_cumprod.float(), alphas.where(alphas > 0, floor))
        assert prediction_type(found) == prediction_type(scheduler)


def test_noise_schedules_that_the_betas_do_not_tell() -> None:
    zero_snr = diffusers.DDIMScheduler(**SD, rescale_betas_zero_snr=True)
    # Heun does not rescale, but keeps the word in its config.
    heun = diffusers.HeunDiscreteScheduler.from_config(zero_snr.config)
    moved: Any = diffusers.DDIMScheduler(**SD, set_alpha_to_one=False)
    moved.alphas_cumprod = moved.alphas_cumprod**1.1
    for source in (
        zero_snr,
        heun,
        moved,
        diffusers.CogVideoXDDIMScheduler(snr_shift_scale=3.0),
        diffusers.DDPMScheduler(beta_schedule="sigmoid"),
        diffusers.HeunDiscreteScheduler(beta_schedule="exp"),
        diffusers.DDIMParallelScheduler(**SD),
    ):
        alphas = source.alphas_cumprod.float()
        forward, inverse = first_order_scheduler(source), inverse_scheduler(source)
        for found in (forward, inverse, noising_scheduler(source), first_order_scheduler(forward)):
            assert torch.equal(found.alphas_cumprod, alphas)
    assert first_order_scheduler(moved).final_alpha_cumprod == moved.alphas_cumprod[0]
    assert inverse_scheduler(moved).initial_alpha_cumprod == moved.alphas_cumprod[0]


def test_what_another_class_left_in_the_config_is_not_the_grid() -> None:
    karras = diffusers.DPMSolverMultistepScheduler(**SD, use_karras_sigmas=True)
    noisy = diffusers.EulerAncestralDiscreteScheduler.from_config(karras.config)
    assert noisy.config["use_karras_sigmas"]
    assert torch.equal(grid(noisy)[1], grid(same_grid_deterministic(noisy))[1])
    solver = diffusers.UniPCMultistepScheduler(**FLOW, flow_shift=3.0)
    euler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(solver.config, shift=2.0)
    assert torch.equal(grid(euler)[1], grid(first_order_scheduler(euler))[1])


def test_a_checkpoints_own_sampling_survives_other_solvers() -> None:
    repository = {**SD, "steps_offset": 1, "set_alpha_to_one": False, "skip_prk_steps": True}
    pndm = diffusers.PNDMScheduler.from_config(repository)
    expected = diffusers.DDIMScheduler.from_config(repository, clip_sample=False)
    for name in (
        "PNDMScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "EulerDiscreteScheduler",
    ):
        found = first_order_scheduler(getattr(diffusers, name).from_config(pndm.config))
        assert values(found) == values(first_order_scheduler(expected))
        assert torch.equal(grid(found)[0], grid(expected)[0])
        assert found.final_alpha_cumprod == expected.final_alpha_cumprod


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"])
def test_inversion_returns_with_every_spacing(name: str, spacing: str) -> None:
    source = getattr(diffusers, name)(**SD, timestep_spacing=spacing)
    forward, inverse = first_order_scheduler(source), inverse_scheduler(source)
    assert forward.config.timestep_spacing == ("leading" if spacing == "linspace" else spacing)
    forward.set_timesteps(20)
    inverse.set_timesteps(20)
    assert torch.equal(forward.timesteps, inverse.timesteps.flip(0))
    x, output = torch.randn(1, 1, 4, 4), torch.randn(1, 1, 4, 4)
    back = x
    for t in inverse.timesteps:
        back = inverse.step(output, t, back).prev_sample
    for t in forward.timesteps:
        back = forward.step(output, t, back).prev_sample
    # A constant noise prediction is integrated exactly in either direction.
    assert torch.allclose(back, x, atol=1e-4)


# --- the grids of flows ---

FLOW_SOLVERS: list[Any] = [
    *(
        (name, {**FLOW, **options})
        for name in (
            "UniPCMultistepScheduler",
            "DPMSolverMultistepScheduler",
            "DPMSolverSinglestepScheduler",
            "DEISMultistepScheduler",
            "SASolverScheduler",
        )
        for options in (
            {},
            {"flow_shift": 3.0},
            {"flow_shift": 5.0, "final_sigmas_type": "sigma_min"},
            {"use_dynamic_shifting": True},
        )
        if set(options) <= set(inspect.signature(getattr(diffusers, name)).parameters)
    ),
    ("UniPCMultistepScheduler", {**FLOW, "use_karras_sigmas": True}),
    ("UniPCMultistepScheduler", {**FLOW, "flow_shift": 2.0, "shift_terminal": 0.1}),
    *(
        ("FlowMatchEulerDiscreteScheduler", options)
        for options in (
            {},
            {"shift": 3.0},
            {"use_dynamic_shifting": True},
            {"use_dynamic_shifting": True, "time_shift_type": "linear"},
            {"use_karras_sigmas": True},
            {"use_exponential_sigmas": True},
            {"use_beta_sigmas": True},
            {"shift": 2.0, "shift_terminal": 0.1},
            {"stochastic_sampling": True},
        )
    ),
    ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}),
]


@pytest.mark.parametrize(("name", "options"), FLOW_SOLVERS)
def test_euler_has_the_grid_of_a_flows_own_solver(name: str, options: dict[str, Any]) -> None:
    """Sana and Wan run DPM-Solver and UniPC on a flow: their counterpart is Euler on the same levels, not DDIM."""
    solver = getattr(diffusers, name)(**options)
    found, inverse = first_order_scheduler(solver), inverse_scheduler(solver)
    assert isinstance(found, diffusers.FlowMatchEulerDiscreteScheduler)
    assert not found.config.stochastic_sampling
    assert inspect.signature(found.set_timesteps) == inspect.signature(solver.set_timesteps)
    for steps in (2, 5, 20) if "shift_terminal" in options else (1, 5, 20):
        times, sigmas = grid(solver, steps)
        for scheduler in (found, first_order_scheduler(found), copy.deepcopy(found)):
            assert torch.equal(
                grid(scheduler, steps)[1], torch.cat([sigmas[:-1][:: solver.order], sigmas[-1:]])
            )
            assert torch.equal(scheduler.timesteps, times[:: solver.order].float())
            assert len(scheduler.timesteps) == scheduler.num_inference_steps == steps
            assert grid_levels(scheduler) == [(1 - float(s), float(s)) for s in scheduler.sigmas[:-1]]
        assert torch.equal(grid(inverse, steps)[1], found.sigmas.flip(0))
        assert torch.equal(inverse.timesteps, found.timesteps.flip(0))
        # The velocity of a straight path is constant.
        clean, noise = torch.randn(2, 1, 1, 4, 4).unbind()
        start, end = (float(found.sigmas[i]) for i in (0, -1))
        x = noise * start + clean * (1 - start)
        for t in found.timesteps:
            x = found.step(noise - clean, t, x).prev_sample
        assert torch.allclose(x, noise * end + clean * (1 - end), atol=1e-4)
        for t in inverse.timesteps:
            x = inverse.step(noise - clean, t, x).prev_sample
        assert torch.allclose(x, noise * start + clean * (1 - start), atol=1e-4)


def test_the_levels_of_sana_and_wan() -> None:
    solver = diffusers.UniPCMultistepScheduler(**FLOW, flow_shift=3.0)
    found = first_order_scheduler(solver)
    found.set_timesteps(20)
    expected = [3 * t / (1 + 2 * t) for t in (1.0, 0.95005, 0.9001)]
    assert [float(s) for s in found.sigmas[:3]] == pytest.approx(expected, abs=2e-5)


def test_a_shift_set_by_hand_and_custom_schedules() -> None:
    euler: Any = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    euler.set_shift(6.0)
    assert torch.equal(grid(euler)[1], grid(first_order_scheduler(euler))[1])
    sigmas = [1.0, 0.7, 0.4, 0.1]
    for scheduler in (euler, diffusers.UniPCMultistepScheduler(**FLOW, flow_shift=2.0)):
        forward, inverse = first_order_scheduler(scheduler), inverse_scheduler(scheduler)
        for one in (scheduler, forward, inverse):
            one.set_timesteps(sigmas=np.array(sigmas))
        assert torch.equal(forward.sigmas, scheduler.sigmas)
        assert torch.equal(inverse.sigmas, scheduler.sigmas.flip(0))


def test_settings_that_pipelines_read_stay_in_the_config() -> None:
    flux = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_image_seq_len=128)
    solver = diffusers.UniPCMultistepScheduler.from_config(flux.config, **FLOW)
    for found in (first_order_scheduler(solver), inverse_scheduler(solver), inverse_scheduler(flux)):
        assert found.config["base_image_seq_len"] == 128
        assert found.config["use_dynamic_shifting"]


@pytest.mark.parametrize(
    "option", ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas"]
)
def test_grids_that_are_not_a_flows_are_refused(option: str) -> None:
    found = first_order_scheduler(diffusers.DPMSolverMultistepScheduler(**FLOW, **{option: True}))
    with pytest.raises(
        ValueError,
        match=r"DPMSolverMultistepScheduler goes from σ = .*levels of a flow.*use_flow_sigmas=True",
    ):
        found.set_timesteps(10)
    plain = first_order_scheduler(diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction"))
    with pytest.raises(ValueError, match="expected levels of a flow"):
        plain.set_timesteps(10)


@pytest.mark.parametrize(
    "name",
    [
        "LCMScheduler",
        "TCDScheduler",
        "FlowMatchLCMScheduler",
        "SCMScheduler",
        "CMStochasticIterativeScheduler",
    ],
)
def test_schedulers_of_distilled_models_are_refused(name: str) -> None:
    scheduler = getattr(diffusers, name)()
    for convert in (first_order_scheduler, inverse_scheduler):
        with pytest.raises(
            ValueError, match=rf"{name} belongs to a model that is distilled .* Load the model that it"
        ):
            convert(scheduler)


def test_training_needs_the_noise_schedule_of_a_diffusion_model() -> None:
    for flow in (
        diffusers.FlowMatchEulerDiscreteScheduler(),
        diffusers.UniPCMultistepScheduler(**FLOW),
        diffusers.EDMEulerScheduler(),
    ):
        with pytest.raises(ValueError, match=type(flow).__name__):
            noising_scheduler(flow)
    unknown = diffusers.HeliosScheduler()
    with pytest.raises(ValueError, match=r"levels of HeliosScheduler are not known\. Expected"):
        first_order_scheduler(unknown)


def test_a_subclass_that_passes_its_arguments_on() -> None:
    class Mine(diffusers.DDIMScheduler):
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs)

    source = Mine(**SD, prediction_type="v_prediction", steps_offset=1)
    assert torch.equal(first_order_scheduler(source).alphas_cumprod, source.alphas_cumprod)
    assert first_order_scheduler(source).config.prediction_type == "v_prediction"
    assert type(FlowSolverEulerScheduler(diffusers.FlowMatchHeunDiscreteScheduler()).config.shift) is float


def test_the_inverse_goes_through_the_same_levels_upwards() -> None:
    forward: Any = first_order_scheduler(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
    inverse: Any = inverse_scheduler(forward)
    forward.set_timesteps(5)
    inverse.set_timesteps(5)
    assert torch.equal(inverse.sigmas, forward.sigmas.flip(0))
    assert torch.equal(inverse.timesteps, forward.timesteps.flip(0))
    x, velocity = torch.randn(1, 1, 4, 4), torch.randn(1, 1, 4, 4)
    for t in forward.timesteps:
        x = forward.step(velocity, t, x).prev_sample
    back = x
    for t in inverse.timesteps:
        back = inverse.step(velocity, t, back).prev_sample
    # A constant velocity is integrated exactly in either direction.
    assert torch.allclose(back, x + velocity, atol=1e-5)


def test_the_deterministic_solver_on_the_same_grid() -> None:
    for name, expected in (
        ("DDPMScheduler", "DDIMScheduler"),
        ("EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler"),
        ("KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler"),
    ):
        noisy = getattr(diffusers, name)(**SD)
        found = same_grid_deterministic(noisy)
        assert type(found).__name__ == expected
        noisy.set_timesteps(7)
        found.set_timesteps(7)
        assert [s for _, s in grid_levels(found)] == pytest.approx([s for _, s in grid_levels(noisy)])
    euler = diffusers.EulerDiscreteScheduler(**SD)
    assert same_grid_deterministic(euler) is euler


@pytest.mark.parametrize(
    "noisy",
    [
        diffusers.DPMSolverMultistepScheduler(**SD, algorithm_type="sde-dpmsolver++", use_karras_sigmas=True),
        diffusers.DPMSolverSinglestepScheduler(**SD, algorithm_type="sde-dpmsolver++"),
        diffusers.EDMDPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"),
        diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True, shift=3.0),
    ],
)
def test_options_that_make_a_solver_stochastic_are_turned_off(noisy: Any) -> None:
    found = same_grid_deterministic(noisy)
    assert type(found) is type(noisy)
    assert all(map(torch.equal, grid(found), grid(noisy)))
    x, runs = torch.randn(1, 2, 4, 4), []
    for _ in range(2):
        found.set_timesteps(7)
        now = x
        for t in found.timesteps:
            now = found.step(torch.sin(now), t, now, return_dict=False)[0]
        runs.append(now)
    assert torch.equal(*runs)


def test_prediction_types() -> None:
    assert prediction_type(diffusers.FlowMatchEulerDiscreteScheduler()) == "flow_prediction"
    assert prediction_type(diffusers.DDIMScheduler()) == "epsilon"
    assert prediction_type(diffusers.LCMScheduler(prediction_type="sample")) == "sample"
    assert {prediction_type(scheduler_class(n)()) for n in SUPPORTED} <= set(PREDICTION_TYPES)


def test_unknown_schedulers_are_refused() -> None:
    class Mine(diffusers.DDIMScheduler):
        pass

    with pytest.raises(ValueError, match="noise levels of Mine are not known"):
        scaling(Mine())
    with pytest.raises(ValueError, match="invert_sigmas=True is not supported"):
        scaling(diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True))
    with pytest.raises(ValueError, match="'Mine' is not a supported scheduler"):
        scheduler_class("Mine")
