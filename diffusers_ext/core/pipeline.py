"""Calls of one pipeline object of any class: temporary settings, and values that are read during a call."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor

from .families import (
    check_starts_from_noise,
    check_steps,
    denoisers_of,
    family_of,
    from_grid,
    grid_shape,
    noise_scale,
    to_grid,
)
from .hooks import add_hook, own_list


def call_pipeline(pipe: Any, *args: Any, **kwargs: Any) -> Any:
    """`pipe(*args, **kwargs)` with copies of the given lists. The package calls pipelines with this function.

    Some pipelines change their lists in place. For example, Z-Image replaces prompts with its chat template.
    """
    return pipe(*map(own_list, args), **{name: own_list(value) for name, value in kwargs.items()})


# --- temporary settings ---


@contextmanager
def quiet(pipe: Any) -> Iterator[None]:
    """Turns off the pipeline's progress bar within the block."""
    before = getattr(pipe, "_progress_bar_config", None)
    pipe.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**(before or {}))


@contextmanager
def scheduler_of(pipe: Any, scheduler: Any) -> Iterator[None]:
    """Replaces the pipeline's scheduler with `scheduler` within the block."""
    original, pipe.scheduler = pipe.scheduler, scheduler
    try:
        yield
    finally:
        pipe.scheduler = original


# --- the call that is running ---


class RunningCall:
    """The call of a pipeline from which the current function is called, and its arguments.

    Attributes:
        arguments: the arguments of `__call__` by name, with the values that they have now. Most pipelines tell
            neither their guidance scale nor their negative prompt anywhere else.
    """

    def __init__(self, frame: Any) -> None:
        # The frame itself is the identity of the call. Until it is dropped, no other call can have its id.
        self._frame = frame
        code = frame.f_code
        names = code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount]
        self.arguments = {name: frame.f_locals[name] for name in names if name in frame.f_locals}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RunningCall) and self._frame is other._frame

    __hash__ = None  # type: ignore[assignment]


def running_call(pipe: Any) -> RunningCall | None:
    """The innermost call of `pipe` that is running on this thread; None outside of calls."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "__call__" and frame.f_locals.get("self") is pipe:
            return RunningCall(frame)
        frame = frame.f_back
    return None


# --- values read from one call ---


class Stop(Exception):
    """Ends a call of a pipeline when the wanted value has been read."""


@contextmanager
def until_stop(pipe: Any) -> Iterator[None]:
    """Ends the block at a `Stop`, and does what the pipeline would have done at the end of its call.

    Perturbed-attention guidance restores the attention processors there. Offloading and caches are reset.
    """
    parts: list[Any] = [part for part in denoisers_of(pipe) if hasattr(part, "attn_processors")]
    processors = [(part, dict(part.attn_processors)) for part in parts]
    try:
        yield
    except Stop:
        for part, before in processors:
            if part.attn_processors != before:
                part.set_attn_processor(before)
        if hasattr(pipe, "maybe_free_model_hooks"):
            pipe.maybe_free_model_hooks()


def initial_noise(pipe: Any, call: Mapping[str, Any]) -> Tensor:
    """The unit-variance noise that `pipe(**call)` would start from, in the layout of `latents=`.

    Raises:
        ValueError: a pipeline that does not draw its noise in `prepare_latents`, one that starts from an image, or an
            unknown family.
    """
    return given_latents(pipe, initial_grid(pipe, call))


def initial_grid(pipe: Any, call: Mapping[str, Any]) -> Tensor:
    """The noise of `initial_noise` in the grid layout.

    Raises:
        ValueError: see `initial_noise`.
    """
    check_starts_from_noise(pipe)
    family = family_of(pipe)
    found: list[Tensor] = []

    def stop(given: dict[str, Any], prepared: Any) -> Any:
        latents = prepared[0] if isinstance(prepared, tuple) else prepared
        grid = to_grid(family.layout, latents, grid_shape(pipe, latents, given))
        found.append(grid / noise_scale(pipe))
        raise Stop

    handle = add_hook(pipe, "prepare_latents", stop)
    try:
        with quiet(pipe), until_stop(pipe):
            call_pipeline(pipe, **call, output_type="latent")
    finally:
        handle.remove()
    return found[0]


def model_output(pipe: Any, latents: Tensor, call: Mapping[str, Any]) -> Tensor:
    """The denoiser's guided output for `latents` at the first timestep of a call, float32.

    Args:
        pipe: the pipeline.
        latents: unit-variance noise, or a state at the first level, in the layout of `latents=`.
        call: the other arguments.

    Returns:
        What the pipeline gives to its scheduler, in the layout of `latents`.

    Raises:
        ValueError: see `initial_noise`.
    """
    check_starts_from_noise(pipe)
    check_steps(pipe)
    family = family_of(pipe)
    found: list[Tensor] = []

    def read(given: dict[str, Any], result: Any) -> Any:
        output = given["model_output"].float()
        if family.unpacked:
            output = to_grid(family.layout, output, tuple(latents.shape[1:]))
        found.append(output)
        raise Stop

    handle = add_hook(pipe.scheduler, "step", read)
    try:
        with quiet(pipe), until_stop(pipe):
            call_pipeline(pipe, **{**call, "latents": latents, "output_type": "latent"})
    finally:
        handle.remove()
    return found[0]


def final_latents(pipe: Any, call: Mapping[str, Any]) -> Tensor:
    """The latents after the last step of `pipe(**call)`, in the grid layout and the scale of the denoiser.

    `output_type="latent"` is in another scale and layout in some pipelines.

    Raises:
        ValueError: an unknown family, a projector, or a pipeline that packs its latents and has no `prepare_latents`.
    """
    check_steps(pipe)
    family = family_of(pipe)
    if family.layout != "grid" and not hasattr(pipe, "prepare_latents"):
        raise ValueError(
            f"{type(pipe).__name__} has no prepare_latents, which tells the size of its latents."
        )
    shape: list[tuple[int, ...]] = []
    last: list[Tensor] = []

    def size(given: dict[str, Any], prepared: Any) -> Any:
        shape[:] = [grid_shape(pipe, prepared[0] if isinstance(prepared, tuple) else prepared, given)]
        return prepared

    def keep(given: dict[str, Any], result: Any) -> Any:
        last[:] = [result[0] if isinstance(result, tuple) else result.prev_sample]
        return result

    with ExitStack() as hooks:
        if hasattr(pipe, "prepare_latents"):
            hooks.callback(add_hook(pipe, "prepare_latents", size).remove)
        hooks.callback(add_hook(pipe.scheduler, "step", keep).remove)
        images = call_pipeline(pipe, **{"output_type": "latent", **call, "return_dict": False})[0]
    rows = last[0][: len(images)]  # guided, DiT has two in its loop for each image
    return to_grid(family.layout, rows, shape[0] if shape else tuple(rows.shape[1:]))


def given_latents(pipe: Any, grid: Tensor) -> Tensor:
    """Latents in the grid layout → the layout of `latents=`."""
    family = family_of(pipe)
    return grid if family.unpacked else from_grid(family.layout, grid)


def stop_at_first_step(pipe: Any, call: Mapping[str, Any]) -> None:
    """Runs `pipe(**call)` up to the noise or the first denoiser call, so that hooks see what comes before."""

    def stop(*_: Any) -> Any:
        raise Stop

    with ExitStack() as hooks, quiet(pipe):
        if hasattr(pipe, "prepare_latents"):
            hooks.callback(add_hook(pipe, "prepare_latents", stop).remove)
        for part in denoisers_of(pipe):
            hooks.callback(part.register_forward_pre_hook(stop).remove)
        with until_stop(pipe):
            call_pipeline(pipe, **call)


# --- arguments ---


def prompt_per_row(prompt: str | Sequence[str], latents: Tensor) -> list[str]:
    """One prompt for each row of `latents`.

    Raises:
        ValueError: the number of prompts is neither 1 nor the number of rows.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    prompts = prompts * len(latents) if len(prompts) == 1 else prompts
    if len(prompts) != len(latents):
        raise ValueError(
            f"Give one prompt, or one for each of the {len(latents)} rows of the latents, got {len(prompts)}."
        )
    return prompts
