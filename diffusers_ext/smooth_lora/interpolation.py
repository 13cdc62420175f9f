"""Images along a path between two noises and two prompts (arXiv:2312.04410, section 4.3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..core.families import denoiser_of
from ..core.latents import starting_from
from ..core.noise import noise_path
from ..core.pipeline import call_pipeline, initial_noise, quiet
from ..core.prompts import encoded_as, recorded_encodings
from .calls import check_text_to_image, is_prompt, refuse

_REFUSED = {
    "num_images_per_prompt": "every frame is one image; use num_frames=",
    "output_type": "the result is an array",
    "return_dict": "the result is an array",
}


def check_pipeline(pipe: Any) -> None:
    """Raises a ValueError if `interpolate` does not work on the pipeline."""
    check_text_to_image(pipe)
    if type(denoiser_of(pipe)).__name__ == "Kandinsky5Transformer3DModel":
        raise ValueError(
            f"{type(pipe).__name__} does not mask the padding of prompts but gives their lengths to the transformer, and"
            " between two lengths there is none. Interpolate the noise only: call the pipeline with"
            " latents=diffusers_ext.core.noise.noise_path(...)."
        )


@torch.no_grad()
def interpolate(
    pipe: Any,
    prompt: str | Sequence[str],
    *,
    latents: Tensor | None = None,
    generator: Sequence[torch.Generator] | None = None,
    num_frames: int = 24,
    batch_size: int = 8,
    progress: bool = True,
    **call_kwargs: Any,
) -> np.ndarray:
    """Generates images along a path between two noises and two prompts.

    The noises are interpolated spherically, and linearly what the pipeline encodes the prompts to in one call with
    both of them. Between the ends, a token counts as padding only if it is padding in both encodings.

    The first and the last frame are the images of `pipe([prompt_1, prompt_2], latents=latents, ...)`: exactly with
    two frames, else up to rounding, because the frames are in batches of another size. The noise that a stochastic
    scheduler adds is drawn from PyTorch's global generator.

    Args:
        pipe: a text-to-image pipeline.
        prompt: one text, or two texts for the first and the last image.
        latents: unit-variance noise of the two ends as the pipeline takes it, (2, ...), for example from
            `ddim_invert`. None draws it. Packed noise, as that of Flux, needs `height=` and `width=`.
        generator: two generators for the noise of the ends, if `latents` is None.
        num_frames: number of images, 2 or more, including both ends.
        batch_size: images per pipeline call.
        progress: show a progress bar.
        call_kwargs: arguments of the pipeline, such as `num_inference_steps`, `guidance_scale` and `height`. Other
            prompts, such as `negative_prompt`, are one text, or two for the ends.

    Returns:
        float32 (num_frames, h, w, 3) in [0, 1].

    Raises:
        ValueError: an unsupported pipeline or argument, there are not one or two prompts, not two noises or
            generators, fewer than two frames, or the batch size is below 1.
    """
    check_pipeline(pipe)
    _check_arguments(pipe, call_kwargs)
    texts = {name: value for name, value in call_kwargs.items() if is_prompt(name) and value is not None}
    texts = {name: _two(name, value) for name, value in {"prompt": prompt, **texts}.items()}
    if num_frames < 2 or batch_size < 1:
        raise ValueError(
            f"num_frames must be 2 or more and batch_size 1 or more, got {num_frames}, {batch_size}."
        )
    if latents is not None and len(latents) != 2:
        raise ValueError(f"Expected latents with the noises of the two ends, got {tuple(latents.shape)}.")
    count = len(generator) if isinstance(generator, Sequence) else 1
    if generator is not None and count != 2:
        raise ValueError(f"Expected two generators, one for the noise of each end; got {count}.")
    call = {**call_kwargs, **texts}
    with quiet(pipe):
        if latents is None:
            latents = initial_noise(pipe, {**call, "generator": list(generator) if generator else None})
        else:
            call = starting_from(pipe, latents, call)
        encodings = recorded_encodings(pipe, {**call, "latents": latents})
        noises, shares = noise_path(latents, num_frames)
        frames = []
        for rows in tqdm(
            torch.arange(num_frames).split(batch_size), disable=not progress, desc="interpolation"
        ):
            # Of the prompts, the calls use the number only.
            call |= {name: ends[:1] * len(rows) for name, ends in texts.items()}
            call |= {"latents": noises[rows], "output_type": "np"}
            with encoded_as(pipe, [between(ends, shares[rows]) for ends in encodings]):
                images = call_pipeline(pipe, **call, return_dict=False)[0]
            frames.append(np.asarray(images, dtype=np.float32))
    return np.concatenate(frames)


# --- arguments ---


def _two(name: str, given: str | Sequence[str]) -> list[str]:
    ends = [given] * 2 if isinstance(given, str) else list(given)
    ends = ends * 2 if len(ends) == 1 else ends
    if len(ends) != 2 or not all(isinstance(text, str) for text in ends):
        kind = "prompts" if name == "prompt" else f"texts as {name}="
        raise ValueError(f"Expected one or two {kind}, for the ends of the path; got {ends!r}.")
    return ends


def _check_arguments(pipe: Any, call: Mapping[str, Any]) -> None:
    refuse("interpolate", call, _REFUSED)
    several = len(getattr(getattr(pipe, "controlnet", None), "nets", [0])) > 1
    for name, value in call.items():
        if "prompt" in name and "_embeds" in name and value is not None:
            raise ValueError(f"interpolate does not take {name}=: give the prompts as texts.")
        if name in ("image", "control_image"):
            # Several ControlNets have a list with one entry for each.
            counts = map(_count, value) if several and isinstance(value, list) else [_count(value)]
            if max(counts, default=1) > 1:
                raise ValueError(f"All frames have the same {name}=: give one image.")


def _count(images: Any) -> int:
    if isinstance(images, list):
        return max([len(images), *map(_count, images)])
    return len(images) if getattr(images, "ndim", 0) == 4 else 1


# --- what the prompts are encoded to ---


def between(ends: Any, shares: Tensor) -> Any:
    """What `encode_prompt` returns for the frames at `shares` of the way between two prompts.

    Args:
        ends: what it returned for the two prompts: tensors with two rows, lists of two tensors (tokens, width), or
            values that do not depend on the prompts (None, and the positions of tokens).
        shares: (B,) in [0, 1].

    Returns:
        The same structure with B rows; exactly the ends' own rows at 0 and 1.

    Raises:
        ValueError: a value is none of these.
    """
    if not isinstance(ends, tuple):
        return _between(ends, shares, [])
    return tuple(_between(value, shares, [part for part in ends if _is_float(part)]) for value in ends)


def _between(ends: Any, shares: Tensor, others: list[Tensor]) -> Any:
    if ends is None or ends == []:
        return ends
    if isinstance(ends, list) and len(ends) == 2 and all(_is_float(end) for end in ends):
        return _rows_between(ends[0], ends[1], shares)
    if not isinstance(ends, Tensor):
        raise ValueError(_unknown(type(ends).__name__))
    if len(ends) != 2 and ends.ndim == 2 and ends.shape[-1] in (3, 4):
        return ends  # the positions of the tokens
    if ends.ndim > 1 and len(ends) == 2:
        first, last = ends[:1], ends[1:]
        if _is_binary(ends) and (not ends.is_floating_point() or _is_mask(ends, others)):
            return _at(shares, first, torch.maximum(first, last), last)
        if ends.is_floating_point() or torch.equal(first, last):
            return _line(first, last, shares)
    raise ValueError(_unknown(f"{tuple(ends.shape)} {ends.dtype}"))


def _unknown(shown: str) -> str:
    return (
        f"encode_prompt returns {shown} for two prompts, and it is not known what belongs between them: expected a"
        " tensor or a list with a row for each prompt."
    )


def _line(first: Tensor, last: Tensor, shares: Tensor) -> Tensor:
    share = shares.to(first.device).reshape(-1, *[1] * (first.ndim - 1))
    line = (1 - share) * first.double() + share * last.double()
    # Equal integers, such as positions, stay equal.
    inside = line.to(first.dtype) if first.is_floating_point() else first
    return _at(shares, first, inside, last)


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _is_mask(value: Tensor, others: list[Tensor]) -> bool:
    # Chroma's is of the type of its embeddings.
    return any(value.shape == other.shape[:2] for other in others if other.ndim == 3)


def _is_binary(value: Tensor) -> bool:
    return bool(((value == 0) | (value == 1)).all())


def _at(shares: Tensor, first: Tensor, inside: Tensor, last: Tensor) -> Tensor:
    share = shares.to(first.device).reshape(-1, *[1] * (first.ndim - 1))
    return torch.where(share == 0, first, torch.where(share == 1, last, inside))


def _rows_between(first: Tensor, last: Tensor, shares: Tensor) -> list[Tensor]:
    """Embeddings of different lengths. Between the ends, the missing tokens of the shorter one are zeros."""
    both = torch.nn.utils.rnn.pad_sequence([first, last], batch_first=True)
    line = _line(both[:1], both[1:], shares)
    return [first if share == 0 else last if share == 1 else row for share, row in zip(shares.tolist(), line)]
