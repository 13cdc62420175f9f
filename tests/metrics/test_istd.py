"""ISTD on paths whose distances are known, and on a tiny pipeline."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffusers_ext.core.noise import slerp
from diffusers_ext.metrics.istd import ISTD, compute_istd, path_statistics
from tests import tiny

CALL: dict[str, Any] = {
    "height": 8,
    "width": 8,
    "num_inference_steps": 2,
    "guidance_scale": 1.0,
    "progress": False,
}


def test_known_paths() -> None:
    steps = np.array([1.0, 3.0, 2.0])
    line = np.concatenate([[0], np.cumsum(steps)])[:, None, None] * np.full((2, 8), 0.25)
    deviation, mean, end = path_statistics(line)  # sixteen elements of a quarter: of length 1
    assert (deviation, mean, end) == pytest.approx((steps.std(), 2.0, 6.0))
    assert path_statistics(line, ddof=1)[0] == pytest.approx(1.0)
    even = np.linspace(0, 1, 11)[:, None] * np.ones(5)
    assert path_statistics(even)[0] == pytest.approx(0, abs=1e-12)
    with pytest.raises(ValueError, match="three or more finite images"):
        path_statistics(line[:2])
    with pytest.raises(ValueError, match="finite"):
        path_statistics(line + np.nan)


def test_means_over_prompts() -> None:
    result = ISTD(np.array([1.0, 3.0]), np.array([2.0, 4.0]), np.array([5.0, 7.0]))
    assert (result.istd, result.mean_distance, result.endpoint_distance) == (2.0, 3.0, 6.0)
    assert result.relative == pytest.approx((0.5 + 0.75) / 2)


def test_it_is_the_path_of_the_pipelines_own_noises() -> None:
    pipe, prompts = tiny.build("sd"), ["a aaa", "a bbb"]
    result = compute_istd(pipe, prompts, num_frames=4, **CALL)
    call = {**CALL, "output_type": "np"}
    call.pop("progress")
    for i, prompt in enumerate(prompts):
        a, b = (
            torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2 * i + end)) for end in (0, 1)
        )
        pictures = [
            pipe(prompt, latents=slerp(a, b, share), **call).images[0] for share in np.linspace(0, 1, 4)
        ]
        found = result.deviations[i], result.distances[i], result.endpoints[i]
        # Pictures one by one and all at once, of a few hundred values that differ by rounding.
        assert found == pytest.approx(path_statistics(2 * np.stack(pictures) - 1), abs=1e-3)
    unit = compute_istd(pipe, prompts, num_frames=4, value_range=(0.0, 1.0), batch_size=3, **CALL)
    assert unit.istd == pytest.approx(result.istd / 2, rel=1e-3)
    assert compute_istd(pipe, prompts, num_frames=4, seed=1, **CALL).istd != result.istd


def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: Any) -> None:
    pipe, prompts = tiny.build("sd"), ["a aaa", "a bbb"]
    whole = compute_istd(pipe, prompts, num_frames=3, cache_dir=tmp_path, **CALL)
    files = sorted(tmp_path.iterdir())
    assert len(files) == 2
    files[1].unlink()
    drawn: list[Any] = []
    original = type(pipe).__call__
    monkeypatch.setattr(
        type(pipe), "__call__", lambda self, **kw: drawn.append(kw["prompt"]) or original(self, **kw)
    )
    again = compute_istd(pipe, prompts, num_frames=3, cache_dir=tmp_path, **CALL)
    assert {p for batch in drawn for p in batch} == {"a bbb"}
    assert again.istd == pytest.approx(whole.istd)
    compute_istd(pipe, prompts, num_frames=3, cache_dir=tmp_path, **{**CALL, "guidance_scale": 2.0})
    assert len(list(tmp_path.iterdir())) == 4


def test_refusals() -> None:
    pipe = tiny.build("sd")
    with pytest.raises(ValueError, match="at least one prompt"):
        compute_istd(pipe, [], **CALL)
    with pytest.raises(ValueError, match="num_frames must be 3 or more"):
        compute_istd(pipe, ["a aaa"], num_frames=2, **CALL)
