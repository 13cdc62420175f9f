"""The testbed's small base models, as stock diffusers and transformers modules, and their training losses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ..core.autoencoders import encode_pixels
from ..core.predictions import denoising_loss
from .fashion_scenes import COLORS, ITEMS

MAX_TOKENS = 16
_SPECIAL = ("<|startoftext|>", "<|endoftext|>")


def build_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer with all letters and with merges for the words of Fashion Scenes."""
    # The order matters: an earlier merge wins wherever its pair occurs ("re" of "red" would break "green").
    words = [w for name in (*ITEMS, *COLORS, "left", "of") for w in name.replace("-", " ").split()]
    merges: list[tuple[str, str]] = []
    for word in sorted(set(words), key=lambda w: (w == "red", w)):
        symbols = [*word[:-1], word[-1] + "</w>"]
        prefix = symbols[0]
        for symbol in symbols[1:]:
            if (prefix, symbol) not in merges:
                merges.append((prefix, symbol))
            prefix += symbol
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)] + list("0123456789-,.!?'")
    symbols = [s for letter in letters for s in (letter, letter + "</w>")] + ["".join(m) for m in merges]
    vocab = {token: i for i, token in enumerate([*dict.fromkeys(symbols), *_SPECIAL])}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)  # type: ignore[arg-type]


def build_text_encoder(tokenizer: CLIPTokenizer, width: int = 96) -> CLIPTextModel:
    """A two-layer CLIP text encoder for `build_tokenizer`."""
    return CLIPTextModel(clip_config(tokenizer, width, 2))


def clip_config(tokenizer: CLIPTokenizer, width: int, num_layers: int) -> CLIPTextConfig:
    """Of a small CLIP text encoder for `build_tokenizer`."""
    special: dict[str, Any] = {
        name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        **special,
    )


def build_vae(channels: Sequence[int] = (24, 48, 64)) -> AutoencoderKL:
    """An autoencoder with fourfold downsampling, four latent channels and no attention in the mid block."""
    # diffusers annotates these as tuples of length one.
    blocks: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * len(channels),
        "up_block_types": ("UpDecoderBlock2D",) * len(channels),
        "block_out_channels": tuple(channels),
    }
    return AutoencoderKL(
        **blocks,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    )


def build_unet(
    channels: Sequence[int] = (64, 96, 128), layers_per_block: int = 1, width: int = 96
) -> UNet2DConditionModel:
    """A small version of Stable Diffusion's UNet: three levels, attention on the first two, a mid block."""
    return UNet2DConditionModel(
        sample_size=(8, 16),
        in_channels=4,
        out_channels=4,
        block_out_channels=tuple(channels),
        layers_per_block=layers_per_block,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=width,
        attention_head_dim=4,
    )


def build_pixel_unet(channels: Sequence[int] = (32, 64, 64)) -> UNet2DModel:
    """An unconditional UNet for 32 × 32 grey images with attention at 8 × 8."""
    return UNet2DModel(
        sample_size=32,
        in_channels=1,
        out_channels=1,
        block_out_channels=tuple(channels),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        attention_head_dim=16,
        norm_num_groups=8,
    )


def stable_diffusion_scheduler() -> DDIMScheduler:
    """Stable Diffusion 1.x's noise schedule."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


@torch.no_grad()
def standardise_latents(vae: AutoencoderKL, pictures: Tensor, batch_size: int = 256) -> None:
    """Gives each latent channel mean 0 and variance 1, by an affine map folded into the 1 × 1 latent layers.

    `StableDiffusionPipeline` supports only a scaling factor, so a shift cannot be stored anywhere else.

    Args:
        vae: changed in place; reconstructions stay the same.
        pictures: (n, 3, h, w) images in [−1, 1].

    Raises:
        ValueError: the autoencoder has no 1 × 1 latent layers.
    """
    latents = torch.cat([encode_pixels(vae, p) for p in pictures.split(batch_size)])
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    into: Any = vae.quant_conv
    back: Any = vae.post_quant_conv
    n = len(mean)
    if into is None or back is None:
        raise ValueError(
            "This AutoencoderKL has no 1 × 1 latent layers: build it with use_quant_conv=True and"
            " use_post_quant_conv=True, the default."
        )
    back.bias.add_(back.weight[:, :, 0, 0] @ mean)
    back.weight.mul_(std[None, :, None, None])
    into.weight[:n].div_(std[:, None, None, None])
    into.bias[:n].sub_(mean).div_(std)
    into.bias[n:].sub_(2 * std.log())


class VaeObjective(nn.Module):
    """Reconstruction and KL loss of an autoencoder.

    Besides L1 and squared error, the loss has an L1 term on 4 × 4 means. In these means the colour, which
    covers a whole garment, dominates over texture. Without this term the eight colours are not kept apart.
    """

    def __init__(self, vae: AutoencoderKL, kl_weight: float = 1e-4, color_weight: float = 2.0) -> None:
        super().__init__()
        self.vae, self.kl_weight, self.color_weight = vae, kl_weight, color_weight

    def forward(self, pictures: Tensor, noise: Tensor) -> Tensor:
        """Images (b, 3, h, w) in [−1, 1] and standard normal noise (b, 4, h/4, w/4) → the loss."""
        posterior: Any = self.vae.encode(pictures).latent_dist  # type: ignore[union-attr]
        decoded: Any = self.vae.decode(posterior.mean + posterior.std * noise).sample  # type: ignore[union-attr]
        low = F.l1_loss(F.avg_pool2d(decoded, 4), F.avg_pool2d(pictures, 4))
        loss = F.l1_loss(decoded, pictures) + F.mse_loss(decoded, pictures) + self.color_weight * low
        return loss + self.kl_weight * posterior.kl().mean() / posterior.mean[0].numel()


class NoiseObjective(nn.Module):
    """The noise-prediction loss of a diffusion model, with optional min-SNR weights (Hang et al. 2023).

    Args:
        unet: predicts the noise.
        scheduler: defines the noise schedule.
        text_encoder: trained jointly; turns token ids into the UNet's context. None for an unconditional
            model.
        snr_gamma: the cap of min-SNR weighting; None for equal weights.
    """

    def __init__(
        self,
        unet: nn.Module,
        scheduler: DDPMScheduler | DDIMScheduler,
        text_encoder: CLIPTextModel | None = None,
        snr_gamma: float | None = None,
    ) -> None:
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder
        self.scheduler, self.snr_gamma = scheduler, snr_gamma

    def forward(self, x: Tensor, noise: Tensor, timesteps: Tensor, input_ids: Tensor | None = None) -> Tensor:
        """Clean samples and noise (b, c, h, w), timesteps (b,), token ids (b, tokens) → the loss."""
        noisy = self.scheduler.add_noise(x, noise, timesteps)  # type: ignore[arg-type]
        if self.text_encoder is None:
            predicted = self.unet(noisy, timesteps).sample
        else:
            context = self.text_encoder(input_ids).last_hidden_state
            predicted = self.unet(noisy, timesteps, encoder_hidden_states=context).sample
        return denoising_loss(self.scheduler, predicted, x, noise, timesteps, self.snr_gamma)


def tokenize(tokenizer: CLIPTokenizer, prompts: Sequence[str]) -> Tensor:
    """Token ids (n, `MAX_TOKENS`), padded as `StableDiffusionPipeline` pads them."""
    return tokenizer(
        list(prompts), padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
    ).input_ids


def count_parameters(*modules: nn.Module) -> int:
    """The total number of parameters of the modules."""
    return sum(p.numel() for module in modules for p in module.parameters())
