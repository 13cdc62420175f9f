"""The testbed's flow-matching transformer, a small Stable Diffusion 3, and its training loss."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
)

from ..training.levels import noised
from .base_models import clip_config

# Of the two CLIP encoders. Stable Diffusion 3 places their tokens and pooled vectors side by side.
WIDTHS = (96, 32)
# Stable Diffusion 3 appends the tokens of T5, whose number its pipeline takes as `max_sequence_length`, at least 2 with our
# tokenizer. Ours are zeros.
T5_TOKENS = (2, 256)


def build_clip(
    tokenizer: CLIPTokenizer, width: int, start: CLIPTextModel | None = None
) -> CLIPTextModelWithProjection:
    """A three-layer CLIP text encoder for `build_tokenizer`.

    The pipeline uses the output of the last but one layer as tokens and that of the last as pooled vector.

    Args:
        tokenizer: defines the vocabulary.
        width: of the hidden states and of the pooled vector.
        start: an encoder of the same width and at most as many layers, whose weights are copied.

    Raises:
        ValueError: `start` has another width.
    """
    model = CLIPTextModelWithProjection(clip_config(tokenizer, width, 3))
    if start is not None:
        if start.config.hidden_size != width:
            raise ValueError(
                f"The text encoder to start from has width {start.config.hidden_size}, and {width} is needed: use that of a"
                " Fashion Scenes model of the default size."
            )
        # transformers 5 has no inner module in the model without projection.
        inner: Any = getattr(start, "text_model", start)
        own: Any = getattr(model, "text_model", model)
        state = {**own.state_dict(), **inner.state_dict()}
        own.load_state_dict(state)
    return model


def build_t5(tokenizer: CLIPTokenizer) -> T5EncoderModel:
    """A T5 encoder without layers, whose output is 0: `StableDiffusion3Pipeline` does not load without one."""
    width = sum(WIDTHS)
    model = T5EncoderModel(
        T5Config(vocab_size=len(tokenizer), d_model=width, d_kv=width, d_ff=width, num_layers=0, num_heads=1)
    )
    nn.init.zeros_(model.shared.weight)
    return model


def build_transformer(width: int = 192, num_layers: int = 4) -> SD3Transformer2DModel:
    """A small Stable Diffusion 3 transformer for latents of 4 × 8 × 16, all of whose blocks are the identity at first."""
    model = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=num_layers,
        attention_head_dim=32,
        num_attention_heads=width // 32,
        caption_projection_dim=width,
        joint_attention_dim=sum(WIDTHS),
        pooled_projection_dim=sum(WIDTHS),
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )
    blocks: Any = model.transformer_blocks
    layers = [layer for block in blocks for layer in (block.norm1.linear, block.norm1_context.linear)]
    for layer in (*layers, model.norm_out.linear, model.proj_out):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return model


class WeightedLastToken:
    """Stable Diffusion 3's joint attention, in which the last text token stands for several equal ones.

    n equal keys have the weight of one whose logit is larger by log n. So T5's zero tokens are one in training, which
    saves most of its time, and the transformer knows both ends of `T5_TOKENS`.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        log_counts: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Image tokens (b, n, d), text tokens (b, m, d) and log n of the last text token (b,) → both, attended."""
        count = hidden_states.shape[1]

        def heads(states: Tensor, norm: Any = None) -> Tensor:
            split = states.unflatten(2, (attn.heads, -1)).transpose(1, 2)
            return split if norm is None else norm(split)

        query = heads(attn.to_q(hidden_states), attn.norm_q)
        key = heads(attn.to_k(hidden_states), attn.norm_k)
        value = heads(attn.to_v(hidden_states))
        query = torch.cat([query, heads(attn.add_q_proj(encoder_hidden_states), attn.norm_added_q)], dim=2)
        key = torch.cat([key, heads(attn.add_k_proj(encoder_hidden_states), attn.norm_added_k)], dim=2)
        value = torch.cat([value, heads(attn.add_v_proj(encoder_hidden_states))], dim=2)
        bias = None
        if log_counts is not None:
            bias = torch.zeros(len(query), 1, 1, key.shape[2], dtype=query.dtype, device=query.device)
            bias[..., -1] = log_counts.to(bias)[:, None, None]
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        image, text = found.transpose(1, 2).flatten(2).tensor_split([count], dim=1)
        image = attn.to_out[1](attn.to_out[0](image))
        return image, None if attn.context_pre_only else attn.to_add_out(text)


class VelocityObjective(nn.Module):
    """The flow-matching loss: the squared error of the velocity ε − x₀ at x_σ = (1 − σ) x₀ + σ ε.

    Lipman et al., arXiv:2210.02747; Esser et al., arXiv:2403.03206, without weights.

    Args:
        transformer: predicts the velocity. Its attention processors are replaced.
        text_encoder, text_encoder_2: trained jointly.
    """

    def __init__(
        self,
        transformer: SD3Transformer2DModel,
        text_encoder: CLIPTextModelWithProjection,
        text_encoder_2: CLIPTextModelWithProjection,
    ) -> None:
        super().__init__()
        transformer.set_attn_processor(WeightedLastToken())  # type: ignore[arg-type]
        self.transformer, self.text_encoder, self.text_encoder_2 = transformer, text_encoder, text_encoder_2

    def forward(self, x: Tensor, noise: Tensor, sigmas: Tensor, input_ids: Tensor, counts: Tensor) -> Tensor:
        """The loss of one batch.

        Args:
            x, noise: (b, c, h, w) clean latents and standard normal noise.
            sigmas: (b,) noise levels in [0, 1].
            input_ids: (b, tokens).
            counts: (b,) numbers of T5's zero tokens.
        """
        tokens, pooled = self.encode(input_ids)
        tokens = F.pad(tokens, (0, 0, 0, 1))
        predicted = self.transformer(
            noised(x, noise, sigmas),
            encoder_hidden_states=tokens,
            pooled_projections=pooled,
            timestep=1000 * sigmas,
            joint_attention_kwargs={"log_counts": counts.log()},
        ).sample
        return F.mse_loss(predicted, noise - x)

    def encode(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (b, tokens, d) and pooled vectors (b, d), as `StableDiffusion3Pipeline` computes them."""
        found = [e(input_ids, output_hidden_states=True) for e in (self.text_encoder, self.text_encoder_2)]
        tokens = torch.cat([f.hidden_states[-2] for f in found], dim=-1)
        return tokens, torch.cat([f.text_embeds for f in found], dim=-1)


def flow_pipeline(
    objective: VelocityObjective, tokenizer: CLIPTokenizer, vae: AutoencoderKL
) -> StableDiffusion3Pipeline:
    """The stock pipeline of the objective's networks. It shares them, with their own attention processors only when loaded."""
    # Stable Diffusion 3 subtracts it.
    vae.register_to_config(shift_factor=0.0)
    return StableDiffusion3Pipeline(
        transformer=objective.transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=objective.text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=objective.text_encoder_2,
        tokenizer_2=tokenizer,
        text_encoder_3=build_t5(tokenizer),
        tokenizer_3=tokenizer,  # type: ignore[arg-type]
    )


def flow_solver(shift: float = 1.0) -> DPMSolverMultistepScheduler:
    """DPM-Solver++ 2M on the levels of a flow, shifted to shift · σ / (1 + (shift − 1) σ)."""
    return DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )


def draw_sigmas(normal: Tensor, uniform: Tensor, choice: Tensor) -> Tensor:
    """Noise levels (n,), half of them logit-normal and half uniform.

    The logit-normal ones are as of Stable Diffusion 3; the uniform ones keep the ends of the path in training.

    Args:
        normal: (n,) standard normal.
        uniform, choice: (n,) uniform in [0, 1).
    """
    return torch.where(choice < 0.5, normal.sigmoid(), uniform)


def draw_counts(uniform: Tensor) -> Tensor:
    """Numbers of zero tokens (n,) between the two of `T5_TOKENS`, of which each is half of them."""
    few, many = T5_TOKENS
    return torch.where(uniform < 0.5, float(few), float(many))
