"""What the prompts of a call are encoded to: read during the call, and used again in other calls."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .families import guidance_of
from .hooks import HookHandle, add_hook, parameters_of, stand_in
from .pipeline import RunningCall, running_call, stop_at_first_step


@dataclass(frozen=True)
class PromptEmbeds:
    """Embeddings of prompts, without anything that depends on the other prompts of the batch.

    Attributes:
        embeds: (B, tokens, width), zero at padding.
        mask: (B, tokens) bool, False at padding; None for an encoder that does not mask its padding, which is then a
            part of the embeddings, as in Stable Diffusion.
        padded: `embeds` with the encoder's own values at padding; None if they are the same. Networks for prompts of
            one fixed length may have been trained with them.
    """

    embeds: Tensor
    mask: Tensor | None = None
    padded: Tensor | None = None

    def mean(self) -> Tensor:
        """(B, width) float32, the average over the tokens that are not padding."""
        if self.mask is None:
            return self.embeds.float().mean(1)
        share = self.mask.float() / self.mask.sum(1, keepdim=True).clamp(min=1)
        return (self.embeds.float() * share[..., None]).sum(1)

    def repeat_to(self, rows: int) -> PromptEmbeds:
        """One row for each of `rows` images, with the images of a prompt one after the other.

        Raises:
            ValueError: `rows` is not a multiple of the number of prompts.
        """
        if rows % len(self.embeds):
            raise ValueError(f"{rows} images cannot have {len(self.embeds)} prompts.")
        return self.rows(torch.arange(len(self.embeds)).repeat_interleave(rows // len(self.embeds)))

    def rows(self, chosen: Tensor) -> PromptEmbeds:
        """The rows with the numbers `chosen`, (n,) int64."""

        def choose(value: Tensor | None) -> Tensor | None:
            return None if value is None else value[chosen.to(value.device)]

        return PromptEmbeds(
            self.embeds[chosen.to(self.embeds.device)], choose(self.mask), choose(self.padded)
        )


def embeddings_of(pipe: Any, encoded: Any) -> list[PromptEmbeds]:
    """The embeddings among the values of `encode_prompt`: those of the prompt and, if there are any, of the negative.

    Args:
        pipe: the pipeline.
        encoded: what its `encode_prompt` returned: a tensor, or values among which the first is a tensor (B, tokens,
            width) or a list of B tensors (tokens, width).

    Raises:
        ValueError: the first value is neither.
    """
    values = encoded if isinstance(encoded, tuple) else (encoded,)
    if _is_rows(values[0]):
        return [_padded(value) for value in values if _is_rows(value)]
    first = values[0]
    if not (_is_float(first) and first.ndim == 3):
        shown = f"{tuple(first.shape)} {first.dtype}" if isinstance(first, Tensor) else type(first).__name__
        raise ValueError(
            f"{type(pipe).__name__}.encode_prompt returns {shown} and not embeddings (prompts, tokens, width), which"
            " is not supported."
        )
    embeds = [v for v in values if _is_float(v) and v.ndim == 3 and v.shape[-1] == first.shape[-1]]
    masks = [value for value in values if _is_mask(value, embeds)] or [
        _mask_of_lengths(value, first) for value in values if _is_cumulative(value, first)
    ]
    if len(masks) not in (0, len(embeds)):
        raise ValueError(
            f"{type(pipe).__name__}.encode_prompt returns {len(embeds)} embeddings and {len(masks)} masks of their"
            " padding, which is not supported."
        )
    if not masks:
        return [PromptEmbeds(value) for value in embeds]
    return [
        PromptEmbeds(value * mask[..., None].to(value), mask.bool(), value)
        for value, mask in zip(embeds, masks)
    ]


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(_is_float(v) and v.ndim == 2 for v in value)


def _is_mask(value: Any, embeds: list[Tensor]) -> bool:
    # A pooled embedding may have the same shape by chance.
    fits = isinstance(value, Tensor) and any(value.shape == v.shape[:2] for v in embeds)
    return fits and bool(((value == 0) | (value == 1)).all())


def _is_cumulative(value: Any, embeds: Tensor) -> bool:
    # Kandinsky 5 returns 0, n₁, n₁ + n₂, … for prompts of n₁, n₂, … tokens.
    integers = isinstance(value, Tensor) and not value.is_floating_point()
    return integers and value.shape == (len(embeds) + 1,) and int(value[0]) == 0


def _mask_of_lengths(cumulative: Tensor, embeds: Tensor) -> Tensor:
    return torch.arange(embeds.shape[1], device=cumulative.device) < cumulative.diff()[:, None]


def _padded(rows: list[Tensor]) -> PromptEmbeds:
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(row), dtype=torch.bool) for row in rows], True)
    return PromptEmbeds(torch.nn.utils.rnn.pad_sequence(rows, True), mask.to(rows[0].device))


# --- during a call ---


class PromptReader:
    """Reads the prompts of every call of one pipeline; its method `read` is a hook of `encode_prompt`.

    What a call encodes first are its prompts, with the negative prompts if `encode_prompt` has an argument for them.
    Otherwise the negative prompts are second, as in Flux and Qwen-Image. Anything after that is for another text
    encoder, as in Hunyuan-DiT. What is encoded outside of a call is ignored.

    Attributes:
        prompt, negative: embeddings of the present call; None before they were encoded. `negative` stays None in a
            call that encodes no negative prompt.
        arguments: the arguments of the present call.
    """

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.forget()

    def forget(self) -> None:
        """Forgets the present call."""
        self.prompt: PromptEmbeds | None = None
        self.negative: PromptEmbeds | None = None
        self.arguments: dict[str, Any] = {}
        self._call: RunningCall | None = None

    def read(self, given: dict[str, Any], encoded: Any) -> Any:
        """Hook of `encode_prompt`. Returns `encoded` unchanged.

        Raises:
            ValueError: see `embeddings_of`.
        """
        call = running_call(self.pipe)
        if call is None:
            return encoded
        if call != self._call:
            self.forget()
            # Some pipelines change the caller's lists while they encode; those of `given` are copies made before.
            texts = {name: given[name] for name in call.arguments if "prompt" in name and name in given}
            self._call, self.arguments = call, {**call.arguments, **texts}
        takes_negative = "negative_prompt" in parameters_of(self.pipe, "encode_prompt")
        if self.prompt is None:
            self.prompt, *rest = embeddings_of(self.pipe, encoded)
            self.negative = rest[0] if takes_negative and rest else None
        elif self.negative is None and not takes_negative:
            self.negative = embeddings_of(self.pipe, encoded)[0]
        return encoded

    @property
    def present(self) -> bool:
        """Whether the prompts are those of the call that is running."""
        return self._call is not None and running_call(self.pipe) == self._call

    def attach(self) -> HookHandle:
        """Adds the hook.

        Raises:
            ValueError: the pipeline has no `encode_prompt`.
        """
        check_encodes(self.pipe)
        return add_hook(self.pipe, "encode_prompt", self.read)

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the pipeline starts without the call, which cannot be copied.
        return {"pipe": self.pipe, "prompt": None, "negative": None, "arguments": {}, "_call": None}


def check_encodes(pipe: Any) -> None:
    """Raises a ValueError unless the pipeline has an `encode_prompt`."""
    if not hasattr(pipe, "encode_prompt"):
        raise ValueError(f"{type(pipe).__name__} has no encode_prompt, so its prompts cannot be read.")


# --- one recorded call, and calls that use what it encoded ---


def recorded_encodings(pipe: Any, call: Mapping[str, Any]) -> list[Any]:
    """What `encode_prompt` returns in `pipe(**call)`, in order; the call ends before its first denoiser call.

    Raises:
        ValueError: the pipeline has no `encode_prompt`, or does not call it.
    """
    check_encodes(pipe)
    found: list[Any] = []

    def keep(given: dict[str, Any], encoded: Any) -> Any:
        found.append(encoded)
        return encoded

    handle = add_hook(pipe, "encode_prompt", keep)
    try:
        stop_at_first_step(pipe, call)
    finally:
        handle.remove()
    if not found:
        raise ValueError(f"{type(pipe).__name__} did not call its encode_prompt.")
    return found


@contextmanager
def encoded_as(pipe: Any, encodings: Sequence[Any]) -> Iterator[None]:
    """Calls within the block get `encodings` from `encode_prompt`, in this order, whatever their prompts are.

    The calls must have the same options as the one that was recorded.
    """
    state: dict[str, Any] = {"call": None, "number": 0}

    def answer(*args: Any, **kwargs: Any) -> Any:
        call = running_call(pipe)
        if call != state["call"]:
            state.update(call=call, number=0)
        state["number"] += 1
        return encodings[state["number"] - 1]

    try:
        with stand_in(pipe, "encode_prompt", answer):
            yield
    finally:
        state.clear()


@torch.no_grad()
def prompt_embeddings(pipe: Any, prompts: Sequence[str], **call: Any) -> PromptEmbeds:
    """Embeddings of prompts without guidance, as a call of the pipeline has them.

    Args:
        pipe: the pipeline.
        prompts: texts.
        call: other arguments of the call, among them those that act on the encoding, such as `clip_skip` and
            `max_sequence_length`.

    Raises:
        ValueError: the pipeline has no `encode_prompt`, or see `embeddings_of`.
    """
    check_encodes(pipe)
    unguided = {**guidance_of(pipe).call(1.0), **call, "prompt": list(prompts)}
    return embeddings_of(pipe, recorded_encodings(pipe, unguided)[0])[0]


_NO_OPTIONS = ("device", "dtype", "do_classifier_free_guidance", "lora_scale")


def prompt_options(pipe: Any, call: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call that act on how prompts are encoded, such as `clip_skip` and `max_sequence_length`.

    Args:
        pipe: a pipeline with an `encode_prompt`.
        call: arguments of its call.

    Returns:
        Every such argument with its value in the call, or else its default.
    """
    parameters = parameters_of(pipe)
    return {
        name: call.get(name, parameters[name].default)
        for name in parameters_of(pipe, "encode_prompt")
        if name in parameters
        and name not in _NO_OPTIONS
        and not name.startswith(("prompt", "negative_prompt", "num_"))
        and not any(part in name for part in ("embeds", "mask", "image"))
    }


# --- embeddings as arguments of a call ---

# Call arguments for the values that encode_prompt returns, by the number of values.
_ENCODED = {
    2: ("prompt_embeds", "negative_prompt_embeds"),
    3: ("prompt_embeds", "pooled_prompt_embeds"),
    4: (
        "prompt_embeds",
        "negative_prompt_embeds",
        "pooled_prompt_embeds",
        "negative_pooled_prompt_embeds",
    ),
}


@torch.no_grad()
def encode_prompts(
    pipe: Any, prompts: Sequence[str], guidance: bool = True, **options: Any
) -> dict[str, Tensor]:
    """Encodes prompts to keyword arguments of the pipeline's call, with one row per prompt.

    Args:
        pipe: SD, SDXL, SD3, Flux or a pipeline whose `encode_prompt` returns the same values.
        prompts: texts.
        guidance: also encode the empty negative prompt, which calls with guidance need.
        options: other arguments of `encode_prompt`, such as `clip_skip` and `max_sequence_length`.

    Raises:
        ValueError: the pipeline has no `encode_prompt`, or it returns other values.
    """
    encoded = encoded_prompts(pipe, prompts, guidance, **options)
    names = (_ENCODED.get(len(encoded)) or ()) if isinstance(encoded, tuple) else ()
    found: dict[str, Tensor] = {name: value for name, value in zip(names, encoded) if value is not None}
    # Others return as many values, among them masks.
    axes = {name: 2 if "pooled" in name else 3 for name in names}
    embeds = all(_is_float(value) and value.ndim == axes[name] for name, value in found.items())
    # Kandinsky 5 has a pooled embedding too, by another name.
    unknown = {name for name in found if "pooled" in name} - parameters_of(pipe).keys()
    if not embeds or unknown or "prompt_embeds" not in found:
        raise ValueError(
            f"{type(pipe).__name__}.encode_prompt returns other values than that of SD, SDXL, SD3 or Flux, so its"
            " prompts cannot be encoded here."
        )
    return found


def encoded_prompts(pipe: Any, prompts: Sequence[str], guidance: bool = True, **options: Any) -> Any:
    """What `encode_prompt` returns. Arguments and errors are those of `encode_prompts`, for any pipeline."""
    check_encodes(pipe)
    given: dict[str, Any] = {"prompt_2": None, "prompt_3": None, "device": pipe._execution_device}
    given |= {"num_images_per_prompt": 1, "do_classifier_free_guidance": guidance}
    names = parameters_of(pipe, "encode_prompt")
    known = {name: value for name, value in given.items() if name in names}
    return pipe.encode_prompt(prompt=list(prompts), **{**known, **options})
