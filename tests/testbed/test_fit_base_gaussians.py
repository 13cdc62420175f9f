"""The script that fits the statistics of the base models, on a flow of random weights."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

import diffusers_ext as dx
from benchmarks import flow_runs, teleport_flow
from diffusers_ext.testbed.fashion_scenes import SAMPLE_DIR
from diffusers_ext.testbed.flow_models import flow_solver

SCRIPT = Path(__file__).parents[2] / "training" / "fit_base_gaussians.py"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    spec: Any = importlib.util.spec_from_file_location("fit_base_gaussians", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    enabled = torch.is_grad_enabled()
    try:
        script.main()
    finally:
        torch.set_grad_enabled(enabled)


@pytest.mark.timeout(300)
def test_a_flow_gets_statistics_a_prompt_map_and_a_calibration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flow_runs.random_pipeline().save_pretrained(tmp_path)
    sizes = {"num_scenes": 300, "rank": 8, "calibration_steps": 4, "num_calibration_images": 2}
    options = [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
    run(monkeypatch, "--train_data_dir", str(SAMPLE_DIR), "--model_dir", str(tmp_path), *options)

    stats = dx.GaussianStats.from_pretrained(tmp_path / "gaussian")
    assert stats.shape == (4, 8, 16)
    assert stats.unconditional is not None
    # The latents have mean 0 and variance 1 per channel over all scenes; 300 differ by a tenth or two.
    assert stats.unconditional.total_variance == pytest.approx(512, rel=0.2)
    assert stats.total_variance < stats.unconditional.total_variance
    # The first text encoder is trained, so even a few prompts predict each other's means.
    assert stats.prompt_map is not None
    assert stats.prompt_map.score > 0.1
    assert stats.prompt_map.center.numel() == 16 * 128 + 128
    # The trials are at the levels of the flow, and not at those of a diffusion with the config of one.
    solver = flow_solver()
    solver.set_timesteps(4)
    trial = stats.calibration["trials"]["4"]["errors"][0]
    sigma = float(solver.sigmas[1])
    assert trial[1] == pytest.approx(sigma / (1 - sigma))
    assert stats.calibration["scheduler"] == "DPMSolverMultistepScheduler"

    pipe: Any = DiffusionPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    dx.apply_teleport(pipe, stats, skip=0.5)
    call = {"height": 32, "width": 64, "num_inference_steps": 4, "output_type": "latent"}
    latents = []
    for length in (2, 256):
        generator = torch.Generator().manual_seed(0)
        pipe("a red bag", **call, generator=generator, guidance_scale=2.0, max_sequence_length=length)
        latents.append(pipe.scheduler._mean)
    # Without layers, T5's tokens are zeros, of any number.
    torch.testing.assert_close(*latents)


def test_the_benchmark_is_refused_before_the_model_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = teleport_flow.Bench(tmp_path, tmp_path, SAMPLE_DIR, workers=0)
    monkeypatch.setattr(flow_runs, "has_card", lambda name: False)
    with pytest.raises(
        ValueError, match=r"fashion-flow lacks transformer, .*gaussian.*--model flow.*--quick"
    ):
        teleport_flow.main(bench)
    (tmp_path / "transformer").mkdir()
    monkeypatch.setattr(flow_runs, "has_card", lambda name: True)
    monkeypatch.setattr(flow_runs, "card_dir", lambda name: tmp_path)
    with pytest.raises(ValueError, match=r"fashion-flow lacks vae, .*fit its statistics"):
        teleport_flow.main(bench)


@pytest.mark.parametrize("solver", ["Euler", "DPM++ 2M"])
def test_every_row_spends_its_calls(solver: str) -> None:
    settings = teleport_flow.Settings(1, (1,), (solver,))
    wanted = teleport_flow.points(settings)
    for point, calls in wanted.items():
        if point.variant == "auto":
            continue
        first = point.variant.startswith("first call")
        assert point.steps - point.skip + first == calls
        if point.skip and point.variant != "zero-init":
            sigmas = teleport_flow.make_solver(solver, point.shift)
            sigmas.set_timesteps(point.steps)
            levels = [float(s) for s in sigmas.sigmas[point.skip : point.skip + 2]]
            ratios = [s / (1 - s) for s in levels]
            # One of the two reaches lies between the level of the first step that is left and the next one.
            assert any(ratios[0] >= r * (1 - 1e-6) and ratios[1] < r for r in teleport_flow.REACHES)
    # At a large shift every number of calls has both reaches, and the controls one.
    for calls in settings.calls:
        row = [p for p in wanted if p.shift == 6 and wanted[p] == calls]
        assert sum(p.variant == "teleport" for p in row) == 2
        controls = {p.variant for p in row} & set(teleport_flow.CONTROLS)
        assert controls == (set(teleport_flow.CONTROLS) if solver == "Euler" else set())
