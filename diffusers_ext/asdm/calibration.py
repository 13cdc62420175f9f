"""Calibration inputs: the inputs of a UNet or transformer on which its parts are measured."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from ..core.hooks import parameters_of
from ..core.pipeline import call_pipeline, quiet
from ..core.schedules import noising_scheduler
from .networks import prunable

CalibrationInput = dict[str, Any]


@torch.no_grad()
def record_calibration_inputs(
    pipe: Any,
    prompts: Sequence[Any],
    *,
    num_timesteps: int = 4,
    num_inference_steps: int = 20,
    seed: int = 0,
    **call_kwargs: Any,
) -> list[CalibrationInput]:
    """Records the inputs of a pipeline's UNet or transformer during sampling, at timesteps spread evenly over the run.

    Args:
        pipe: a pipeline whose UNet or transformer can be pruned.
        prompts: one image is sampled per prompt, or class label of DiT, all in one batch. Guidance doubles the rows, or the calls of pipelines
            that call their transformer twice.
        num_timesteps: number of timesteps to record, at most `num_inference_steps`.
        num_inference_steps: steps of the sampling run.
        seed: seed of the noise.
        call_kwargs: arguments of the pipeline, such as height, width and guidance_scale.

    Returns:
        Keyword arguments for a call of the network, one dict per timestep, or one for each of the calls at it.

    Raises:
        ValueError: there are no prompts, `num_timesteps` is out of range, or the network cannot be pruned or has a
            ControlNet, see `prunable`.
    """
    network = prunable(pipe)
    if not prompts or not 1 <= num_timesteps <= num_inference_steps:
        raise ValueError(
            f"Expected prompts, and num_timesteps from 1 to num_inference_steps={num_inference_steps}; got"
            f" {len(prompts)} prompts and {num_timesteps}."
        )
    found: list[CalibrationInput] = []
    names = list(inspect.signature(type(network).forward).parameters)[1:]

    def note(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kept = {name: value for name, value in kwargs.items() if value is not None and name != "return_dict"}
        found.append({**dict(zip(names, args)), **kept})

    handle = network.register_forward_pre_hook(note, with_kwargs=True)
    try:
        with quiet(pipe):
            call_pipeline(
                pipe,
                **{"prompt" if "prompt" in parameters_of(pipe) else "class_labels": list(prompts)},
                num_inference_steps=num_inference_steps,
                generator=[torch.Generator().manual_seed(seed + i) for i in range(len(prompts))],
                output_type="latent",
                **call_kwargs,
            )
    finally:
        handle.remove()
    calls = [[given] for given in found]
    if not isinstance(network, UNet2DConditionModel):
        # Several pipelines call their transformer twice for guidance.
        calls = [list(group) for _, group in itertools.groupby(found, the_time)]
    # The middle of each of num_timesteps equal parts of the run.
    chosen = [calls[int((k + 0.5) * len(calls) / num_timesteps)] for k in range(num_timesteps)]
    return list(itertools.chain.from_iterable(chosen))


def the_latents(given: CalibrationInput) -> Any:
    """The latents among the arguments of a network: a tensor, or one stacked from the list of Z-Image."""
    found = next(given[name] for name in ("sample", "hidden_states", "x") if name in given)
    return torch.stack(found) if isinstance(found, list) else found


def the_time(given: CalibrationInput) -> float:
    """The time of the first row among the arguments of a network, in its own units."""
    return float(torch.as_tensor(given["timestep"] if "timestep" in given else given["t"]).flatten()[0])


def num_rows(given: CalibrationInput) -> int:
    """The number of rows of a call."""
    return len(the_latents(given))


# Positions of tokens, without rows in some families and with as many as the batch has by chance.
_NO_ROWS = ("img_ids", "txt_ids")


def with_rows(given: CalibrationInput, count: int) -> CalibrationInput:
    """The inputs of a transformer with `count` rows, which are those of `given` in turns.

    Args:
        given: tensors (b, ...), lists of b entries, dicts of these, and values without rows.
        count: number of rows, 1 or more.
    """
    rows = num_rows(given)
    chosen = [i % rows for i in range(count)]

    def choose(name: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: choose(key, entry) for key, entry in value.items()}
        if isinstance(value, list) and len(value) == rows:
            return [value[i] for i in chosen]
        shared = name in _NO_ROWS and isinstance(value, Tensor) and value.ndim == 2
        if isinstance(value, Tensor) and value.ndim and len(value) == rows and not shared:
            return value[chosen]
        return value

    return {name: choose(name, value) for name, value in given.items()}


def noised_calibration_inputs(
    latents: Tensor, timesteps: Sequence[int], scheduler: Any, seed: int = 0, **conditioning: Any
) -> list[CalibrationInput]:
    """Calibration inputs from real images: their latents with noise added.

    Args:
        latents: (b, C, H, W) scaled latents, as the UNet expects them.
        timesteps: each from 0 to the number of training timesteps less 1.
        scheduler: a scheduler like that of Stable Diffusion. Only its noise schedule is used.
        seed: seed of the noise.
        conditioning: further arguments of the UNet, such as encoder_hidden_states (b, tokens, width).

    Returns:
        Keyword arguments for a call of the UNet, one dict per timestep.
    """
    schedule: Any = noising_scheduler(scheduler)
    draw = torch.Generator().manual_seed(seed)
    found = []
    for timestep in timesteps:
        noise = torch.randn(latents.shape, generator=draw).to(latents)
        when = torch.full((len(latents),), timestep, device=latents.device)
        found.append({"sample": schedule.add_noise(latents, noise, when), "timestep": when, **conditioning})
    return found
