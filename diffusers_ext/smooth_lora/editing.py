"""Editing of inverted images by a change of prompt during sampling (arXiv:2312.04410, section 4.4).

An edit is two calls. The call with the image's own prompt ends after its share of the steps. In the call with the target
prompt, the networks return in these steps what they returned in the first call, and are not computed. After that, this
call is like any other: whatever a pipeline makes of its prompt comes along.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..core.checks import check_counts, check_latents
from ..core.families import denoisers_of
from ..core.hooks import add_hook, parameters_of, stand_in
from ..core.latents import starting_from
from ..core.pipeline import Stop, call_pipeline, prompt_per_row, quiet, running_call, scheduler_of, until_stop
from ..core.schedules import first_order_scheduler
from .calls import check_not_distilled, check_text_to_image, prompts_per_row, refuse

_ONE_PROMPT = "it would be that of the image and of the target; give prompt and target_prompt as texts"
_REFUSED = {
    "num_images_per_prompt": "there is one image for each row of the latents",
    "callback_on_step_end": "the first steps are made in two calls of the pipeline",
    "denoising_end": "the number of its steps is not known",
}


def check_pipeline(pipe: Any) -> None:
    """Raises a ValueError if `edit` does not work on the pipeline."""
    check_text_to_image(pipe)
    check_not_distilled(pipe)
    first_order_scheduler(pipe.scheduler)


@torch.no_grad()
def edit(
    pipe: Any,
    prompt: str | Sequence[str],
    target_prompt: str | Sequence[str],
    *,
    latents: Tensor,
    strength: float = 0.7,
    null_embeds: Tensor | None = None,
    num_inference_steps: int = 50,
    **call_kwargs: Any,
) -> Any:
    """Generates images from inverted noise, first with their own prompt and then with the target prompt.

        noise = dx.ddim_invert(pipe, latents, "a red bag")
        image = dx.edit(pipe, "a red bag", "a blue bag", latents=noise, guidance_scale=2.0).images[0]

    The pipeline samples with DDIM, or with Euler steps if it is a flow model. Its scheduler is restored
    afterwards.

    Args:
        pipe: a text-to-image pipeline.
        prompt: description of the inverted images: one text for all, or one per image.
        target_prompt: description of the edited images: one text for all, or one per image.
        latents: the noise of the images, from `ddim_invert` or `null_text_invert(...).noise`. Packed noise, as that
            of Flux, needs `height=` and `width=` of the images.
        strength: share of the steps that use the target prompt, in [0, 1]. 0 reconstructs the image; 1
            generates a new one from its noise. The paper uses 0.6 to 0.9.
        null_embeds: `null_text_invert(...).null_embeds`. The number of steps and the guidance scale must be
            those of the inversion.
        num_inference_steps, call_kwargs: arguments of the pipeline, such as `guidance_scale` and `negative_prompt`,
            which is the same for both prompts.

    Returns:
        The output of the pipeline.

    Raises:
        ValueError: an unsupported pipeline, scheduler or argument, the strength is outside [0, 1], the number of
            prompts does not match the latents, packed latents without a size, latents of another shape, `null_embeds`
            for another number of steps or without guidance, or steps that come out differently in a second call
            (`eta=`).
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must lie in [0, 1], got {strength}.")
    check_pipeline(pipe)
    prompts = [name for name in call_kwargs if name.startswith(("prompt_", "pooled_prompt_"))]
    refuse("edit", call_kwargs, {**_REFUSED, **dict.fromkeys(prompts, _ONE_PROMPT)})
    check_counts(num_inference_steps=num_inference_steps)
    check_latents(latents)
    call = {**call_kwargs, "num_inference_steps": num_inference_steps}
    call = prompts_per_row(call | null_text(pipe, null_embeds, call), latents)
    own, target = (prompt_per_row(text, latents) for text in (prompt, target_prompt))
    call = starting_from(pipe, latents, {**call, "prompt": own})
    start = first_steps(pipe, call, 1 - strength) if 0 < strength < 1 else FirstSteps()
    return continued(pipe, {**call, "prompt": own if strength == 0 else target}, start)


# --- two calls ---


@dataclass
class FirstSteps:
    """The first steps of a call.

    Attributes:
        outputs: what the networks returned, in order.
        states: the latents after each step, in the loop layout.
    """

    outputs: list[Any] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)


def first_steps(pipe: Any, call: Mapping[str, Any], share: float) -> FirstSteps:
    """Runs `pipe(**call)` for this share of the steps of its schedule."""
    found = FirstSteps()

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        if running_call(pipe) is not None:
            found.outputs.append(copy.deepcopy(output))  # pipelines change it in place

    def count(given: dict[str, Any], result: Any) -> Any:
        wanted = round(share * len(pipe.scheduler.timesteps))
        if wanted == 0:
            found.outputs.clear()
        else:
            found.states.append(_sample(result).clone())
        if len(found.states) == wanted:
            raise Stop
        return result

    with sampling(pipe), until_stop(pipe), ExitStack() as hooks:
        for part in denoisers_of(pipe):
            hooks.callback(part.register_forward_hook(keep).remove)
        hooks.callback(add_hook(pipe.scheduler, "step", count).remove)
        call_pipeline(pipe, **{**call, "output_type": "latent"})
    return found


def continued(pipe: Any, call: Mapping[str, Any], start: FirstSteps) -> Any:
    """`pipe(**call)` with the outputs of the networks in the first steps replaced by those of `start`.

    Raises:
        ValueError: the states after these steps are not those of `start`.
    """
    left, states = deque(start.outputs), deque(start.states)

    def replay(part: nn.Module) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            # Another pipeline may use the same network on another thread.
            if left and running_call(pipe) is not None:
                return left.popleft()
            return vars(part)["forward"].original(*args, **kwargs)

        return forward

    def compare(given: dict[str, Any], result: Any) -> Any:
        if not states:
            return result
        same = torch.equal(_sample(result), states.popleft())
        if not same or bool(left) != bool(states):
            raise ValueError(
                f"The first {len(start.states)} steps of {type(pipe).__name__} come out differently in a second call, so"
                " its prompt cannot be changed after them. Leave out arguments that add noise at every step, such as"
                " eta=, and caches that skip network calls."
            )
        return result

    with sampling(pipe), ExitStack() as hooks:
        if start.outputs:
            for part in denoisers_of(pipe):
                hooks.enter_context(stand_in(part, "forward", replay(part)))
            hooks.callback(add_hook(pipe.scheduler, "step", compare).remove)
        return call_pipeline(pipe, **call)


@contextmanager
def sampling(pipe: Any) -> Iterator[None]:
    """Calls within the block sample with the first-order scheduler, without a progress bar."""
    with scheduler_of(pipe, first_order_scheduler(pipe.scheduler)), quiet(pipe):
        yield


def _sample(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result.prev_sample


# --- null-text embeddings ---


def null_text(pipe: Any, null_embeds: Tensor | None, call: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a Stable Diffusion call with other unconditional embeddings at every step.

    Raises:
        ValueError: see `edit`.
    """
    if null_embeds is None:
        return {}
    steps = call["num_inference_steps"]
    scale = call.get("guidance_scale")
    scale = parameters_of(pipe)["guidance_scale"].default if scale is None else scale
    if len(null_embeds) != steps or scale <= 1:
        raise ValueError(
            f"null_embeds were made for {len(null_embeds)} steps with guidance, got num_inference_steps"
            f" {steps} and guidance_scale {scale}: use the values of the inversion."
        )

    def next_step(pipe: Any, number: int, t: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if number + 1 < steps:
            _, positive = tensors["prompt_embeds"].chunk(2)
            tensors["prompt_embeds"] = torch.cat([null_embeds[number + 1].to(positive), positive])
        return tensors

    return {
        "negative_prompt_embeds": null_embeds[0],
        "callback_on_step_end": next_step,
        "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
    }
