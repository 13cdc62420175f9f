"""`NPNetModel`: a network that maps random noise to noise that matches the prompt better.

Zhou et al., *Golden Noise for Diffusion Models: A Learning Framework*, arXiv:2411.09502.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import Tensor

from .compact import CompactNPNet
from .released import ReleasedNPNet, latent_size, read_original


@dataclass
class NPNetOutput(BaseOutput):
    """The output of `NPNetModel`.

    Args:
        sample: golden noise, (B, C, H, W).
    """

    sample: Tensor


class NPNetModel(ModelMixin, ConfigMixin):
    """Noise (B, C, H, W) and prompt embeddings (B, tokens, text_dim) → golden noise (B, C, H, W).

    The default is a small network of our own (`CompactNPNet`). It takes any H and W and any prompt length up
    to `max_tokens`, and is the identity before training. `legacy=True` is the released architecture, for the
    released weights only; see `from_original`.

    Args:
        latent_channels: C; 4 with `legacy`.
        text_dim: width of the prompt embeddings: 768 for SD 1.5, 2048 for SDXL, 4096 for SD3 and Flux.
        max_tokens: the longest prompt; with `legacy` the only supported length.
        width: features per patch, a multiple of 32; unused with `legacy`.
        depth: number of blocks; unused with `legacy`.
        legacy: use the released architecture.
        sample_size: with `legacy`, S of the only supported latent size S × S; otherwise unused.
        svd_attention: with `legacy`, whether the singular values go through attention. The released inference
            code does this, although its SDXL weights were trained without it.
        prompt_options: arguments of the pipeline's call that the embeddings of training depend on, such as
            `{"clip_skip": 2}`. Golden noise refuses calls with other values. None accepts all.
        pooled_dim: width of the pooled vectors of the prompts, which the network takes as one more token: 2048 for
            SD3, 768 for Flux.1, 1280 for SDXL. None for a network that takes none, as with `legacy`.

    Raises:
        ValueError: invalid sizes.
    """

    _supports_gradient_checkpointing = True
    # A few million parameters, some of them outside of any layer.
    _no_split_modules = ["CompactNPNet", "ReleasedNPNet"]  # noqa: RUF012
    # Its branch of singular values computes in the dtype of its weights, next to a decomposition in float32.
    _skip_layerwise_casting_patterns = ["norm", "unet_svd"]  # noqa: RUF012

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 4,
        text_dim: int = 2048,
        max_tokens: int = 77,
        width: int = 128,
        depth: int = 4,
        legacy: bool = False,
        sample_size: int = 128,
        svd_attention: bool = True,
        prompt_options: dict[str, Any] | None = None,
        pooled_dim: int | None = None,
    ) -> None:
        super().__init__()
        pooled_size = 1 if pooled_dim is None else pooled_dim
        if min(latent_channels, text_dim, max_tokens, width, depth, sample_size, pooled_size) < 1:
            raise ValueError(
                "latent_channels, text_dim, max_tokens, width, depth, sample_size and pooled_dim must be 1 or more."
            )
        if legacy and pooled_dim is not None:
            raise ValueError(
                f"The released architecture takes no pooled vectors, got pooled_dim={pooled_dim}: use legacy=False."
            )
        if legacy:
            if latent_channels != 4 or sample_size % 4:
                raise ValueError(
                    f"legacy=True lays four channels out as one square for eight heads: {latent_channels} channels"
                    f" of {sample_size} × {sample_size} do not allow it. Use legacy=False."
                )
            self.released = ReleasedNPNet(latent_channels, text_dim, max_tokens, sample_size, svd_attention)
        else:
            if width % 32:
                raise ValueError(f"width must be a multiple of 32, the size of a head, got {width}.")
            self.compact = CompactNPNet(latent_channels, text_dim, max_tokens, width, depth, pooled_dim)

    def forward(
        self,
        noise: Tensor,
        prompt_embeds: Tensor,
        encoder_attention_mask: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        return_dict: bool = True,
    ) -> NPNetOutput | tuple[Tensor]:
        """Computes golden noise.

        Args:
            noise: (B, C, H, W), unit-variance noise as passed in `latents=`, before the scheduler's
                `init_noise_sigma`.
            prompt_embeds: (B, tokens, text_dim), the positive prompts' embeddings, one row for each noise.
            encoder_attention_mask: (B, tokens) bool, False at padding, which then has no effect, wherever it is.
                None for embeddings without padding. Unused with `legacy`: the released weights were trained
                with the padding to `max_tokens`, as the text encoder embeds it.
            pooled_prompt_embeds: (B, pooled_dim) for a network with `pooled_dim`; None for all others.
            return_dict: return an `NPNetOutput` instead of a tuple.

        Returns:
            An `NPNetOutput`, or a tuple with its `sample`: golden noise with the shape, dtype and device of
            `noise`.

        Raises:
            ValueError: a shape that the network does not support; the message names both shapes.
        """
        self._check(noise, prompt_embeds, encoder_attention_mask)
        self._check_pooled(noise, pooled_prompt_embeds)
        # Offloading moves the inputs itself; otherwise the network may be on another device.
        device = next(self.parameters()).device
        x, text, mask = noise.to(device), prompt_embeds.to(device), encoder_attention_mask
        # Attention with a mask rounds differently, also if nothing is masked.
        mask = None if mask is None or mask.all() else mask.to(device)
        pooled = None if pooled_prompt_embeds is None else pooled_prompt_embeds.to(device, self.dtype)
        if self.config.legacy:  # type: ignore[union-attr]
            golden = self.released(x, text)
        else:
            # The sum is in float32, because half precision would round a small residual away.
            golden = x.float() + self.compact(x.to(self.dtype), text.to(self.dtype), mask, pooled).float()
        golden = golden.to(noise)
        return NPNetOutput(sample=golden) if return_dict else (golden,)

    def _check(self, noise: Tensor, prompt_embeds: Tensor, mask: Tensor | None) -> None:
        config: Any = self.config
        if noise.ndim != 4 or noise.shape[1] != config.latent_channels:
            raise ValueError(
                f"NPNet was made for noise (B, {config.latent_channels}, H, W), got {tuple(noise.shape)}."
            )
        size = (config.sample_size, config.sample_size)
        if config.legacy and noise.shape[2:] != size:
            raise ValueError(
                f"The released NPNet works at {size[0]} × {size[1]} latents only, got"
                f" {noise.shape[2]} × {noise.shape[3]}. Generate at that size, or train a compact network"
                " (training/train_npnet.py), which takes any size."
            )
        if prompt_embeds.ndim != 3 or len(prompt_embeds) != len(noise):
            raise ValueError(
                f"Expected prompt embeddings ({len(noise)}, tokens, {config.text_dim}), one row for each of the"
                f" {len(noise)} noises, got {tuple(prompt_embeds.shape)}."
            )
        tokens, width = prompt_embeds.shape[1:]
        if width != config.text_dim:
            raise ValueError(
                f"NPNet was made for prompt embeddings of width {config.text_dim}, got {width}: it was"
                " trained for another text encoder."
            )
        if tokens > config.max_tokens or (config.legacy and tokens != config.max_tokens):
            least = "" if config.legacy else "at most "
            raise ValueError(
                f"NPNet was made for {least}{config.max_tokens} tokens, got {tokens}: shorten the prompt"
                " (max_sequence_length), or train with a larger max_tokens."
            )
        if mask is not None and not (
            mask.dtype == torch.bool and mask.shape == prompt_embeds.shape[:2] and mask.any(1).all()
        ):
            raise ValueError(
                f"Expected an encoder_attention_mask ({len(noise)}, {tokens}) bool with True in every row, got"
                f" {tuple(mask.shape)} {mask.dtype}. A prompt without any token cannot be used."
            )

    def _check_pooled(self, noise: Tensor, pooled: Tensor | None) -> None:
        width = self.config.pooled_dim  # type: ignore[union-attr]
        if width is None and pooled is not None:
            raise ValueError(
                f"NPNet was made without pooled vectors, got {tuple(pooled.shape)}: leave pooled_prompt_embeds out."
            )
        if width is not None and (pooled is None or pooled.shape != (len(noise), width)):
            found = "none" if pooled is None else tuple(pooled.shape)
            raise ValueError(
                f"NPNet was made for pooled_prompt_embeds ({len(noise)}, {width}), one row for each noise, got {found}:"
                " it was trained for a pipeline with another text encoder."
            )

    @classmethod
    def from_original(
        cls, path: str | os.PathLike[str], *, svd_attention: bool = True, sample_size: int = 128
    ) -> NPNetModel:
        """Loads released weights: the official `.pth` file or its flat safetensors port.

        The network is in evaluation mode. The official script leaves it in training mode, where Swin drops
        paths at random, so its golden noise is not reproducible.

        Args:
            path: the file.
            svd_attention: see the class. True matches the official inference code, False the training of the
                SDXL weights.
            sample_size: latent height and width that the weights are for.

        Raises:
            ValueError: an unknown layout, missing or unknown keys, or weights of other sizes.
            OSError: no such file.
        """
        weights, sizes = read_original(path, svd_attention)
        made_for = latent_size(weights)
        if made_for not in (None, sample_size):
            raise ValueError(
                f"{path} holds weights for latents of {made_for} × {made_for}, not {sample_size} ×"
                f" {sample_size}: pass sample_size={made_for}."
            )
        model = cls(
            latent_channels=sizes["latent_channels"],
            text_dim=sizes["text_dim"],
            max_tokens=sizes["max_tokens"],
            legacy=True,
            sample_size=sample_size,
            svd_attention=svd_attention,
        )
        wanted = {key: value.shape for key, value in model.released.state_dict().items()}
        wrong = [
            f"{key} {tuple(weights[key].shape)} instead of {tuple(shape)}"
            for key, shape in wanted.items()
            if key in weights and weights[key].shape != shape
        ]
        missing, unknown = sorted(wanted.keys() - weights.keys()), sorted(weights.keys() - wanted.keys())
        if wrong or missing or unknown:
            faults = [("missing", missing), ("not expected", unknown), ("of another shape", wrong)]
            text = "; ".join(f"{what}: {', '.join(keys)}" for what, keys in faults if keys)
            raise ValueError(f"{path} does not hold a complete NPNet. Keys {text}.")
        model.released.load_state_dict(weights)
        return model.eval()
