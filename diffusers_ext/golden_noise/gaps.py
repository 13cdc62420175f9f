"""The gap of re-denoising: what makes the prediction of the step down differ from that of the step up.

Both steps have a weight w, large on the way down and small on the way up. There are three gaps:

- "guidance": w is the scale that the denoiser is given as an input (Flux.1 dev, Flux.2). One call per step.
- "cfg": w of classifier-free guidance u + w(c − u), as in the paper (arXiv:2411.09502). Two calls per step.
- "embedding": the denoiser is called once, without classifier-free guidance, with the embeddings

      e_w = e_∅ + w(e_c − e_∅)

  of the prompt c and the empty prompt ∅, tokens and pooled vectors alike. This is for models without any guidance,
  and follows the idea of RF-Sampling (arXiv:2603.06165) to use linear combinations of text embeddings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from ..core.checks import check_finite
from ..core.families import Guidance, denoiser_of, guidance_of, uncompiled
from ..core.hooks import parameters_of
from ..core.pipeline import model_output
from ..core.prompts import check_encodes, embeddings_of, encoded_as, pooled_place, recorded_encodings

Gap = Literal["guidance", "embedding", "cfg"]

# Weights of the step down and of the step up. Those of embeddings are ours: the smallest round ones whose mean is the
# prompt itself.
WEIGHTS: dict[Gap, tuple[float, float]] = {
    "guidance": (5.5, 1.0),
    "cfg": (5.5, 1.0),
    "embedding": (1.5, 0.5),
}


def gap_of(pipe: Any, gap: Gap | None = None) -> Gap:
    """The gap that re-denoising uses on this pipeline.

    Args:
        pipe: a pipeline of a known family.
        gap: the one that was asked for. None is "guidance" for a denoiser that is given a scale, "embedding" for one
            without guidance, and "cfg" for all others. Flux.1 schnell is among those without: its pipeline has
            `true_cfg_scale`, which the model was not trained for. Other distilled models cannot be recognised.

    Raises:
        ValueError: an unknown gap, or one that the pipeline cannot have.
    """
    guidance = guidance_of(pipe)
    own: Gap = "cfg" if guidance.argument is not None and not _is_schnell(pipe) else "embedding"
    own = "guidance" if guidance.embedded else own
    if gap is None:
        gap = own
    if gap not in get_args(Gap):
        raise ValueError(f"gap must be one of {', '.join(get_args(Gap))} or None, got {gap!r}.")
    name = type(pipe).__name__
    if gap == "guidance" and not guidance.embedded:
        raise ValueError(
            f'{name} does not give its denoiser a guidance scale, which gap="guidance" changes: use gap="{own}".'
        )
    if gap == "cfg" and guidance.argument is None:
        raise ValueError(f'{name} has no classifier-free guidance, which gap="cfg" changes: use gap="{own}".')
    if gap == "embedding":
        check_encodes(pipe)
    return gap


def _is_schnell(pipe: Any) -> bool:
    part = uncompiled(denoiser_of(pipe))
    return isinstance(part, FluxTransformer2DModel) and not part.config.get("guidance_embeds")


def sampling_weight(pipe: Any, weight: float | None) -> float:
    """The weight of `guided_call` for images; None is 5.5, or 1 for a model without guidance."""
    if weight is not None:
        return weight
    return 1.0 if gap_of(pipe) == "embedding" else 5.5


def guided_call(pipe: Any, call: Mapping[str, Any], weight: float, gap: Gap | None = None) -> dict[str, Any]:
    """`call` with the guidance scale `weight`, by the argument of the pipeline that has an effect.

    Args:
        pipe: the pipeline.
        call: the other arguments.
        weight: the scale that the denoiser is given as an input, where it takes one (Flux.1 dev, Flux.2) and `gap` is
            not "cfg". Otherwise w ≥ 1 of classifier-free guidance u + w(c − u): `true_cfg_scale` with the negative
            prompt of the call or a blank one (Qwen-Image, Flux.1), or `guidance_scale`, which is w − 1 in Z-Image.
            Pipelines without guidance take 1 only.
        gap: "guidance" or "cfg" to choose where a pipeline has both; None for the first that it has.

    Raises:
        ValueError: the pipeline has no guidance and w is not 1, `call` sets its scale or has
            `ip_adapter_image_embeds`, or w is below 1 or not finite.
    """
    check_finite(guidance_scale=weight)
    guidance = guidance_of(pipe)
    if guidance.embedded and gap != "cfg":
        _check_free(pipe, call, guidance.embedded)
        return {**call, guidance.embedded: weight}
    if guidance.argument is None:
        if weight == 1:
            return dict(call)
        raise ValueError(
            f"{type(pipe).__name__} has no guidance scale that has an effect, as models that were distilled to a few"
            f" steps: expected a scale of 1, got {weight:g}."
        )
    _check_free(pipe, call, guidance.argument)
    if call.get("ip_adapter_image_embeds") is not None:
        raise ValueError(
            "ip_adapter_image_embeds are of another shape with guidance than without, and re-denoising makes calls of"
            " both kinds. Give ip_adapter_image instead."
        )
    if weight < 1:
        raise ValueError(
            f"Classifier-free guidance scales must be 1 or more, got {weight:g}: below 1 pipelines turn guidance off."
        )
    return _with_guidance(guidance, call, weight)


def _with_guidance(guidance: Guidance, call: Mapping[str, Any], weight: float) -> dict[str, Any]:
    added: dict[str, Any] = guidance.call(weight)
    if "negative_prompt" in added:
        added["negative_prompt"] = _as_many(added["negative_prompt"], call)
    given = {key: value for key, value in call.items() if value is not None}
    scale = {name: value for name, value in added.items() if name == guidance.argument}
    return {**call, **({} if "negative_prompt_embeds" in given else added), **given, **scale}


def _check_free(pipe: Any, call: Mapping[str, Any], name: str) -> None:
    if name in call:
        raise ValueError(
            f"The scale of {type(pipe).__name__} is set by guidance_scale and inversion_guidance_scale of"
            f" re-denoising, got {name}={call[name]!r} as well. Leave it out."
        )


def _as_many(text: str, call: Mapping[str, Any]) -> str | list[str]:
    """The text for each prompt of the call."""
    prompt = call.get("prompt")
    rows = prompt if prompt is not None else call.get("prompt_embeds")
    return text if isinstance(rows, str) or rows is None else [text] * len(rows)


# --- the two calls ---


@dataclass(frozen=True)
class Side:
    """The call of one step, down or up.

    Attributes:
        call: arguments of the pipeline's call.
        encodings: what `encode_prompt` returns in it; None if the prompts are to be encoded.
    """

    call: Mapping[str, Any]
    encodings: Sequence[Any] | None = None

    def output(self, pipe: Any, latents: Tensor) -> Tensor:
        """`model_output` for latents in the layout of `latents=`."""
        with nullcontext() if self.encodings is None else encoded_as(pipe, self.encodings):
            return model_output(pipe, latents, self.call)


def unguided_call(pipe: Any, call: Mapping[str, Any]) -> dict[str, Any]:
    """`call` without classifier-free guidance; a scale that the denoiser is given stays the pipeline's default."""
    guidance = guidance_of(pipe)
    if guidance.argument is not None:
        _check_free(pipe, call, guidance.argument)
    return {**call, **guidance.call(1.0)}


def sides(pipe: Any, call: Mapping[str, Any], gap: Gap, weights: tuple[float, float]) -> tuple[Side, Side]:
    """The calls of the step down and of the step up.

    Args:
        pipe: the pipeline.
        call: arguments of the call, without guidance and latents.
        gap: from `gap_of`.
        weights: w of the step down and of the step up.

    Raises:
        ValueError: see `guided_call` and `blended`.
    """
    check_finite(guidance_scale=weights[0], inversion_guidance_scale=weights[1])
    if gap != "embedding":
        down, up = (Side(guided_call(pipe, call, weight, gap)) for weight in weights)
        return down, up
    plain = unguided_call(pipe, call)
    # The noise of these calls is not used, so the global generator must not be.
    recorded = {**plain, "generator": torch.Generator()}
    prompts, empties = (recorded_encodings(pipe, each) for each in (recorded, _emptied(recorded)))
    down, up = (
        Side(plain, [blended(pipe, *pair, weight) for pair in zip(prompts, empties, strict=True)])
        for weight in weights
    )
    return down, up


def _emptied(call: Mapping[str, Any]) -> dict[str, Any]:
    """The call with empty prompts."""
    # `prompt_2`, `prompt_embeds`, `prompt_attention_mask`, ...
    others = {name: v for name, v in call.items() if not name.startswith(("prompt_", "pooled_prompt_"))}
    return {**others, "prompt": _as_many("", call)}


# --- linear combinations of embeddings ---


def blended(pipe: Any, encoded: Any, empty: Any, weight: float) -> Any:
    """e_∅ + w(e_c − e_∅) of the token embeddings and the pooled vectors, in float32.

    Exactly the prompt's for w = 1, and the empty prompt's for w = 0 where they have the same tokens. Where padding is
    masked, the tokens and the mask stay the prompt's, and a token beyond the end of the empty prompt is combined with
    the empty prompt's last one.

    Args:
        pipe: the pipeline.
        encoded, empty: what its `encode_prompt` returned for prompts and for as many empty prompts.
        weight: w, any number.

    Returns:
        Like `encoded`; values that are not embeddings of the prompts are those of `encoded`.

    Raises:
        ValueError: see `embeddings_of`, an empty prompt without tokens, or embeddings with different numbers of tokens
            of which nothing tells which are padding.
    """
    values, others = (list(v) if isinstance(v, tuple) else [v] for v in (encoded, empty))
    here, there = (embeddings_of(pipe, each)[0].mask for each in (encoded, empty))
    one, other = values[0], others[0]
    if isinstance(one, list):
        values[0] = [_blend_tokens(pipe, a, b, weight) for a, b in zip(one, other, strict=True)]
    elif not any("mask" in name for name in parameters_of(pipe, "encode_prompt")) and here is None:
        if one.shape != other.shape:
            raise ValueError(
                f"{type(pipe).__name__} encodes these prompts to {one.shape[1]} tokens and the empty one to"
                f" {other.shape[1]}, and does not tell which are padding, so their embeddings cannot be combined. Use"
                ' prompts of about the same length, or gap="cfg".'
            )
        values[0] = _lerp(other, one, weight)
    else:
        values[0] = one.clone()
        # Qwen-Image returns no mask where it would be True everywhere.
        masks = (
            torch.ones_like(v[..., 0], dtype=torch.bool) if m is None else m
            for v, m in ((one, here), (other, there))
        )
        for row, value, blank, keep, kept in zip(values[0], one, other, *masks):
            row[keep] = _blend_tokens(pipe, value[keep], blank[kept], weight)
    place = pooled_place(pipe, encoded)
    if place is not None:
        values[place] = _lerp(others[place], values[place], weight)
    return tuple(values) if isinstance(encoded, tuple) else values[0]


def _blend_tokens(pipe: Any, tokens: Tensor, empty: Tensor, weight: float) -> Tensor:
    """(n, width) and (m, width) → (n, width)."""
    if not len(empty):
        raise ValueError(
            f'{type(pipe).__name__} encodes an empty prompt to no tokens, so gap="embedding" has nothing to combine'
            ' those of the prompt with. Use gap="cfg".'
        )
    places = torch.arange(len(tokens), device=empty.device).clamp(max=len(empty) - 1)
    return _lerp(empty[places], tokens, weight)


def _lerp(start: Tensor, end: Tensor, weight: float) -> Tensor:
    # Half precision would round the difference.
    return torch.lerp(start.float(), end.float(), weight).to(end.dtype)
