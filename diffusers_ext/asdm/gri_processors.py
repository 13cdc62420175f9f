"""Processors that put GRI attention into an attention of diffusers: of UNets, Stable Diffusion 3, Flux.1 and Qwen-Image."""

from __future__ import annotations

from collections.abc import Callable
from math import isqrt
from typing import Any, NamedTuple

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_qwenimage import apply_rotary_emb_qwen
from torch import Tensor

from .gri_attention import gri_attention, joint_gri_attention

QKV = tuple[Tensor, Tensor, Tensor]


class GRIGrid(NamedTuple):
    """The settings of one call of a processor, in tokens: image size, side of a window and side of a cell."""

    height: int | None
    width: int | None
    window: int
    pool: int


class GRIAttnProcessor:
    """Self-attention processor without parameters; `apply_gri_attention` adds it to a whole UNet.

    Keys and values are pooled after their projections (and after `norm_k`, if there is one). Averaging
    commutes with affine layers, so pooling before to_k and to_v, with or without a LoRA, would give the same
    result. The processor uses the attention dispatch of diffusers with its own `_attention_backend`, which
    `unet.set_attention_backend` sets.

    Args:
        window: side of a window in tokens.
        pool: side of a pooled cell in tokens.
        height, width: size of the images in tokens. With None, each call passes the size, as
            `apply_gri_attention` does; a processor that is set by hand then assumes square images.

    Raises:
        ValueError: a size is not a whole number of 1 or more, or only one of height and width is given. In a
            call: the tokens do not match the image size, or there is cross-attention, an attention mask or
            context parallelism.
    """

    # diffusers sets these attributes if a processor has them.
    _attention_backend = None
    _parallel_config = None

    def __init__(
        self, window: int = 8, pool: int = 4, height: int | None = None, width: int | None = None
    ) -> None:
        if (height is None) != (width is None):
            raise ValueError(f"Give both height and width or neither, got {height} and {width}.")
        check_sizes(window=window, pool=pool, height=height, width=width)
        self.window, self.pool, self.height, self.width = window, pool, height, width

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        gri_grid: GRIGrid | None = None,
    ) -> Tensor:
        """Same as `AttnProcessor2_0`, for (b, tokens, channels) or (b, channels, height, width).

        Args:
            attn: the attention layer.
            hidden_states: the input.
            encoder_hidden_states, attention_mask: must be None.
            temb: time embedding for a spatial norm.
            gri_grid: overrides the settings of the processor.

        Returns:
            The output, in the shape of the input.
        """
        self._refuse(encoder_hidden_states, attention_mask)
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        if residual.ndim == 4:
            gri_grid = GRIGrid(residual.shape[2], residual.shape[3], self.window, self.pool)
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        height, width, window, pool = self._grid(hidden_states.shape[1], gri_grid)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        # Attention with added keys only, which has no to_k and to_v, is rejected when GRI attention is added.
        query, key, value = _heads(attn, hidden_states)
        out = gri_attention(
            query, key, value, height, width, window, pool, scale=attn.scale, backend=self._attention_backend
        )
        out = _projected(attn, out.flatten(2).to(query.dtype))
        if residual.ndim == 4:
            out = out.transpose(1, 2).reshape(residual.shape)
        if attn.residual_connection:
            out = out + residual
        return out / attn.rescale_output_factor

    def _refuse(self, encoder_hidden_states: Tensor | None, attention_mask: Tensor | None) -> None:
        if encoder_hidden_states is not None:
            raise ValueError(
                "GRI attention is self-attention on an image: it takes no encoder_hidden_states."
            )
        _refuse_mask(attention_mask)
        _refuse_parallel(self._parallel_config)

    def _grid(self, tokens: int, given: GRIGrid | None) -> tuple[int, int, int, int]:
        height, width, window, pool = given or (self.height, self.width, self.window, self.pool)
        if height is None or width is None:
            height = width = isqrt(tokens)
            if height * width != tokens:
                raise ValueError(
                    f"{tokens} tokens are not a square image: give GRIAttnProcessor height and width, or use"
                    " apply_gri_attention, which passes the size of every call."
                )
        if height * width != tokens:
            raise ValueError(f"GRIAttnProcessor expected {height} × {width} tokens, got {tokens}.")
        return height, width, window, pool


def check_sizes(**sizes: int | None) -> None:
    """Raises a ValueError unless all are whole numbers of 1 or more, or None."""
    for name, size in sizes.items():
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise ValueError(f"{name} must be a whole number of 1 or more, got {size!r}.")


def _refuse_parallel(config: Any) -> None:
    if config is not None:
        raise ValueError(
            "GRI attention needs all tokens of an image on one device: disable context parallelism."
        )


# --- joint attention of image and text ---


class JointProcessor:
    """What the processors of joint attention share. Every call needs a grid, which `apply_gri_attention` passes.

    Keys and values are pooled after the norm of the keys and their rotary embedding, so that the logit of a cell is the
    mean of the logits of its tokens.
    """

    _attention_backend = None
    _parallel_config = None

    def _attend(
        self,
        tensors: QKV,
        image_tokens: int | None,
        gri_grid: GRIGrid | None,
        text_mask: Tensor | None = None,
    ) -> Tensor:
        """Attention of (b, text + image, heads, d), the text first.

        Args:
            tensors: queries, keys and values after norms and rotary embedding.
            image_tokens: how many there are; None if image and text are one input, of which the grid says it.
            gri_grid: of this call.
            text_mask: (b, text), True for the tokens that count.

        Returns:
            (b, text + image, heads · d).
        """
        name = type(self).__name__
        _refuse_parallel(self._parallel_config)
        if gri_grid is None or gri_grid.height is None or gri_grid.width is None:
            raise ValueError(f"{name} needs the size of the image in every call: use apply_gri_attention.")
        if image_tokens is not None and gri_grid.height * gri_grid.width != image_tokens:
            raise ValueError(
                f"{name} expected the {gri_grid.height} × {gri_grid.width} tokens of one image, got {image_tokens}."
            )
        query, key, value = tensors
        out = joint_gri_attention(
            query,
            key,
            value,
            gri_grid.height,
            gri_grid.width,
            gri_grid.window,
            gri_grid.pool,
            text_mask=text_mask,
            backend=self._attention_backend,
        )
        return out.flatten(2).to(query.dtype)


class GRIJointAttnProcessor(JointProcessor):
    """GRI attention in place of `JointAttnProcessor2_0`, for Stable Diffusion 3.

    Without `encoder_hidden_states`, in the second attention of Stable Diffusion 3.5's dual blocks, all tokens are of the
    image.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        gri_grid: GRIGrid | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Same as `JointAttnProcessor2_0`, for (b, tokens, channels) of image and text."""
        _refuse_mask(attention_mask)
        image = hidden_states.shape[1]
        tensors = _heads(attn, hidden_states)
        if encoder_hidden_states is not None:
            tensors = _after(_heads(attn, encoder_hidden_states, added=True), tensors)
        out = self._attend(tensors, image, gri_grid)
        if encoder_hidden_states is None:
            return _projected(attn, out)
        text = out[:, :-image]
        text = text if attn.context_pre_only else attn.to_add_out(text)
        return _projected(attn, out[:, -image:]), text


class GRIFluxAttnProcessor(JointProcessor):
    """GRI attention in place of `FluxAttnProcessor`, in blocks with two inputs and with one."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        gri_grid: GRIGrid | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Same as `FluxAttnProcessor`, for (b, tokens, channels) of image and text, or of text and image in one."""
        _refuse_mask(attention_mask)
        image = None if encoder_hidden_states is None else hidden_states.shape[1]
        fused = attn.fused_projections
        tensors = _heads(attn, hidden_states, fused=fused)
        if encoder_hidden_states is not None:
            tensors = _after(_heads(attn, encoder_hidden_states, added=True, fused=fused), tensors)
        if image_rotary_emb is not None:
            angles: Any = image_rotary_emb
            tensors = _rotated(tensors, lambda x: apply_rotary_emb(x, angles, sequence_dim=1))
        out = self._attend(tensors, image, gri_grid)
        if image is None:
            return out
        return _projected(attn, out[:, -image:]), attn.to_add_out(out[:, :-image])


class GRIQwenAttnProcessor(JointProcessor):
    """GRI attention in place of `QwenDoubleStreamAttnProcessor2_0`.

    A mask of the text is honored as there, and then needs a backend that takes attention masks. The pipeline gives none
    to prompts of one length.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        gri_grid: GRIGrid | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Same as `QwenDoubleStreamAttnProcessor2_0`, for (b, tokens, channels) of image and text."""
        _refuse_mask(attention_mask)
        image = hidden_states.shape[1]
        text, tensors = _heads(attn, encoder_hidden_states, added=True), _heads(attn, hidden_states)
        if image_rotary_emb is not None:
            of_image, of_text = image_rotary_emb
            text = _rotated(text, lambda x: apply_rotary_emb_qwen(x, of_text, use_real=False))
            tensors = _rotated(tensors, lambda x: apply_rotary_emb_qwen(x, of_image, use_real=False))
        out = self._attend(_after(text, tensors), image, gri_grid, encoder_hidden_states_mask)
        return _projected(attn, out[:, -image:]), attn.to_add_out(out[:, :-image])


def _refuse_mask(attention_mask: Tensor | None) -> None:
    if attention_mask is not None:
        raise ValueError("GRI attention takes no attention_mask: omit it, or call remove_gri_attention.")


def _heads(attn: Any, x: Tensor, added: bool = False, fused: bool = False) -> QKV:
    """Queries, keys and values (b, tokens, heads, d) of the image or, with `added`, of the text, after their norms."""
    if fused:
        tensors = (attn.to_added_qkv if added else attn.to_qkv)(x).chunk(3, -1)
    else:
        names = ("add_q_proj", "add_k_proj", "add_v_proj") if added else ("to_q", "to_k", "to_v")
        tensors = tuple(getattr(attn, name)(x) for name in names)
    # The width of a head and not their number, which is smaller on each device under tensor parallelism.
    query, key, value = (y.unflatten(-1, (-1, attn.inner_dim // attn.heads)) for y in tensors)
    norms = (attn.norm_added_q, attn.norm_added_k) if added else (attn.norm_q, attn.norm_k)
    query, key = (y if norm is None else norm(y) for y, norm in zip((query, key), norms))
    return query, key, value


def _rotated(tensors: QKV, rotate: Callable[[Tensor], Any]) -> QKV:
    """With rotary embeddings of the queries and keys."""
    query, key, value = tensors
    return rotate(query), rotate(key), value


def _after(first: QKV, second: QKV) -> QKV:
    """The tokens of both, one after the other."""
    query, key, value = (torch.cat(pair, 1) for pair in zip(first, second))
    return query, key, value


def _projected(attn: Any, out: Tensor) -> Tensor:
    for layer in attn.to_out:
        out = layer(out)
    return out
