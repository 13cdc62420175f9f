"""Pipelines that change their lists in place, as Z-Image does with its prompts, change no list of ours."""

import ast
import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

import diffusers_ext as dx
from diffusers_ext.golden_noise.pairs import PairSettings, _pairs
from tests import tiny
from tests.teleport.test_prompt_map import mapped

SIZE = {"height": 8, "width": 8}


class Templating(diffusers.StableDiffusionPipeline):
    """Puts its prompts into a template, in the lists that it is given if `in_place`."""

    in_place = True

    @functools.wraps(diffusers.StableDiffusionPipeline.encode_prompt)
    def encode_prompt(self, *args: Any, **kwargs: Any) -> Any:
        call = inspect.signature(diffusers.StableDiffusionPipeline.encode_prompt).bind(self, *args, **kwargs)
        for name in ("prompt", "negative_prompt"):
            texts = call.arguments.get(name)
            if isinstance(texts, list):
                templated = [f"user {text}" for text in texts]
                if self.in_place:
                    texts[:] = templated
                call.arguments[name] = templated
        return super().encode_prompt(*call.args[1:], **call.kwargs)


def build(in_place: bool) -> Any:
    pipe = Templating(**tiny.build("sd").components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    pipe.in_place = in_place
    return pipe


def noise(rows: int) -> torch.Tensor:
    return torch.randn(rows, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def samples(pipe: Any, prompts: list[str]) -> Any:
    found = dx.pipeline_samples(pipe, 4, prompts=prompts, num_inference_steps=2, progress=False, **SIZE)
    return [part for batch in found for part in batch]


def calibrated(pipe: Any, prompts: list[str]) -> Any:
    stats = tiny.gaussian((4, 8, 8), rank=6)
    return dx.calibrate_skip(
        pipe, stats, prompts=prompts, num_inference_steps=3, progress=False, **SIZE
    ).calibration["trials"]


def means(pipe: Any, prompts: list[str]) -> Any:
    return dx.prompt_means(pipe, tiny.gaussian((4, 8, 8), rank=6), prompts, num_calls=2, **SIZE)


def prompt_map(pipe: Any, prompts: list[str]) -> Any:
    dx.apply_teleport(pipe, mapped(tiny.build("sd")), skip=0.5)
    call = {"num_inference_steps": 4, "output_type": "pt", **SIZE}
    empty = [""] * len(prompts)
    generators = tiny.generators(len(prompts))
    return pipe(list(prompts), negative_prompt=empty, generator=generators, **call).images


def frames(pipe: Any, prompts: list[str]) -> Any:
    options: dict[str, Any] = {"num_inference_steps": 2, "num_frames": 3, "batch_size": 2}
    return dx.interpolate(pipe, prompts, generator=tiny.generators(2), progress=False, **options, **SIZE)


def istd(pipe: Any, prompts: list[str]) -> Any:
    options: dict[str, Any] = {"num_frames": 3, "batch_size": 2, "num_inference_steps": 2}
    return [dx.compute_istd(pipe, prompts, progress=False, **options, **SIZE).deviations]


def redenoised(pipe: Any, prompts: list[str]) -> Any:
    return dx.redenoise(pipe, noise(2), prompt=prompts, num_rounds=2, num_inference_steps=4, **SIZE)


def golden(pipe: Any, prompts: list[str]) -> Any:
    return dx.golden_latents(pipe, tiny.npnet("sd"), prompts, generator=tiny.generators(2), **SIZE)


def calibration_inputs(pipe: Any, prompts: list[str]) -> Any:
    negative = ["b", "b"]
    found = [
        dx.record_calibration_inputs(
            pipe, prompts, num_timesteps=1, num_inference_steps=2, negative_prompt=negative, **SIZE
        )
        for _ in range(2)
    ]
    return [negative, *(part[0][key] for part in found for key in ("sample", "encoder_hidden_states"))]


def inverted(pipe: Any, prompts: list[str]) -> Any:
    negative = ["b", "b"]
    call = {"num_inference_steps": 2, "guidance_scale": 3.0, "negative_prompt": negative}
    return [negative, *(dx.ddim_invert(pipe, noise(2), prompts, **call) for _ in range(2))]


def edited(pipe: Any, prompts: list[str]) -> Any:
    call = {"latents": noise(2), "num_inference_steps": 2, "output_type": "pt"}
    return dx.edit(pipe, prompts, prompts[::-1], strength=0.5, **call).images


def pairs(pipe: Any, prompts: list[str]) -> Any:
    settings = PairSettings(num_inference_steps=4, num_rounds=2, sampling_steps=2, margin=-1.0)
    seen: list[list[str]] = []

    def score(images: np.ndarray, texts: Any) -> np.ndarray:
        seen.append(list(texts))
        return np.zeros(len(images))

    tensors, names = _pairs(pipe, range(2), prompts, 0, settings, score, SIZE)
    return [seen, names, *tensors.values()]


USES: list[Callable[[Any, list[str]], Any]] = [
    samples,
    calibrated,
    means,
    prompt_map,
    frames,
    istd,
    redenoised,
    golden,
    calibration_inputs,
    inverted,
    edited,
    pairs,
]


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    return len(a) == len(b) and all(map(equal, a, b)) if isinstance(a, list | tuple) else a == b


@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
def test_a_pipeline_that_changes_its_lists_gives_what_one_that_copies_them_gives(
    use: Callable[[Any, list[str]], Any],
) -> None:
    found = []
    for in_place in (True, False):
        prompts = ["aaa", "bbb"]
        found.append(use(build(in_place), prompts))
        assert prompts == ["aaa", "bbb"]
    assert equal(*found)


PACKAGE = Path(dx.__file__).parent


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_the_package_calls_pipelines_through_one_function(path: Path) -> None:
    """A call of something called `pipe`, other than in `core.pipeline.call_pipeline`."""
    calls = [
        node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)
    ]
    found = [
        ast.unparse(call) for call in calls if ast.unparse(call.func).split(".")[-1] in ("pipe", "pipeline")
    ]
    assert len(found) == (path.relative_to(PACKAGE) == Path("core/pipeline.py")), found
