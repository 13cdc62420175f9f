"""Tiny random pipelines, built in memory in well under a second each; nothing is downloaded.

`build(name)` gives a pipeline, `inputs(name)` keyword arguments for its call, `LATENT_SHAPES[name]` the shape
of one latent before any packing, `gaussian(shape)` random statistics, `npnet(name)` a random noise network. Weights depend on `seed` alone.
"""

from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor

from diffusers_ext import GaussianStats, NPNetModel

NAMES = ("sd", "sdxl", "sd3", "flux", "ddpm")

LATENT_SHAPES = {
    "sd": (4, 8, 8),
    "sdxl": (4, 8, 8),
    "sd3": (4, 8, 8),
    "flux": (4, 8, 8),
    "ddpm": (3, 8, 8),
}

_TEXT_WIDTH = 16
_ALPHABET = "abcdefghijklmnopqrstuvwxyz"
# Stable Diffusion's own noise schedule, so that noise levels are those of the real thing.
_SD_NOISE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}


def tokenizer() -> Any:
    """A CLIP tokenizer that spells: one token for every lower-case letter."""
    words = ["<|startoftext|>", "<|endoftext|>", *_ALPHABET, *(letter + "</w>" for letter in _ALPHABET)]
    vocabulary = {word: index for index, word in enumerate(words)}
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


def text_encoder(projected: bool = False) -> Any:
    """A one-layer CLIP text encoder of width 16 for `tokenizer()`."""
    config = transformers.CLIPTextConfig(
        vocab_size=2 + 2 * len(_ALPHABET),
        hidden_size=_TEXT_WIDTH,
        intermediate_size=16,
        projection_dim=_TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    kind = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    return kind(config).eval()


def vae(latent_channels: int = 4, **config: Any) -> Any:
    """An autoencoder that keeps the resolution: an 8×8 picture has 8×8 latents."""
    return diffusers.AutoencoderKL(
        block_out_channels=[8],
        down_block_types=["DownEncoderBlock2D"],
        up_block_types=["UpDecoderBlock2D"],
        in_channels=3,
        out_channels=3,
        latent_channels=latent_channels,
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=8,
        **config,
    ).eval()


def unet(**config: Any) -> Any:
    """A two-level conditional UNet for 4×8×8 latents."""
    return diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=8,
        in_channels=4,
        out_channels=4,
        norm_num_groups=4,
        **{
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "cross_attention_dim": _TEXT_WIDTH,
            "attention_head_dim": 4,
            **config,
        },
    ).eval()


def _sd() -> Any:
    return diffusers.StableDiffusionPipeline(
        vae=vae(),
        text_encoder=text_encoder(),
        tokenizer=tokenizer(),
        unet=unet(),
        scheduler=diffusers.EulerDiscreteScheduler(**_SD_NOISE),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl() -> Any:
    return diffusers.StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=text_encoder(),
        text_encoder_2=text_encoder(projected=True),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        unet=unet(
            cross_attention_dim=2 * _TEXT_WIDTH,
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + _TEXT_WIDTH,
            transformer_layers_per_block=1,
        ),
        scheduler=diffusers.EulerDiscreteScheduler(**_SD_NOISE),
        add_watermarker=False,
    )


def _sd3() -> Any:
    return diffusers.StableDiffusion3Pipeline(
        transformer=diffusers.SD3Transformer2DModel(
            sample_size=8,
            patch_size=1,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=32,
            caption_projection_dim=32,
            pooled_projection_dim=2 * _TEXT_WIDTH,
        ).eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=text_encoder(projected=True),
        tokenizer=tokenizer(),
        text_encoder_2=text_encoder(projected=True),
        tokenizer_2=tokenizer(),
        text_encoder_3=None,
        tokenizer_3=None,
    )


def _flux() -> Any:
    return diffusers.FluxPipeline(
        transformer=diffusers.FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            axes_dims_rope=(4, 4, 8),
        ).eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae(shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
    )


def _ddpm() -> Any:
    return diffusers.DDPMPipeline(
        unet=diffusers.UNet2DModel(
            block_out_channels=(8, 16),
            layers_per_block=1,
            sample_size=8,
            in_channels=3,
            out_channels=3,
            norm_num_groups=4,
            attention_head_dim=4,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        ).eval(),
        scheduler=diffusers.DDPMScheduler(clip_sample=False),
    )


_BUILDERS = {"sd": _sd, "sdxl": _sdxl, "sd3": _sd3, "flux": _flux, "ddpm": _ddpm}


def build(name: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """The tiny pipeline `name` (one of `NAMES`) with weights drawn from `seed`, its progress bar off."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pipe = _BUILDERS[name]()
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(dtype) if dtype != torch.float32 else pipe


def inputs(name: str, batch: int = 1, steps: int = 8, guided: bool = True) -> dict[str, Any]:
    """Keyword arguments for the call of `build(name)`: `batch` different pictures, 8×8, as tensors.

    `output_type` is "pt"; no generator is given (see `generators`).
    """
    common: dict[str, Any] = {"num_inference_steps": steps, "output_type": "pt"}
    if name == "ddpm":
        return {"batch_size": batch, **common}
    common |= {"height": 8, "width": 8}
    if name == "flux":
        return {**common, **flux_prompt(batch, guided)}
    prompts = [f"a {letter * 3}" for letter in _ALPHABET[:batch]]
    return {**common, "prompt": prompts, "guidance_scale": 5.0 if guided else 1.0}


def flux_prompt(batch: int, guided: bool) -> dict[str, Any]:
    """Prompt embeddings in place of Flux's text encoders, with true guidance if `guided`."""

    def draw(*shape: int) -> Tensor:
        # One seed a row, so that row i is the same in every batch; no global generator, since threads share it.
        return torch.stack(
            [torch.randn(*shape, generator=generator) for generator in generators(batch, seed=100)]
        )

    given = {"prompt_embeds": draw(4, 32), "pooled_prompt_embeds": draw(32)}
    if guided:
        zeros = {f"negative_{key}": torch.zeros_like(value) for key, value in given.items()}
        given |= {**zeros, "true_cfg_scale": 3.0}
    return given


def generators(batch: int, seed: int = 7) -> list[torch.Generator]:
    """One generator an image, so that a batch can be compared with the same images one by one."""
    return [torch.Generator().manual_seed(seed + i) for i in range(batch)]


def images(pipe: Any, name: str, batch: int = 1, **changes: Any) -> Tensor:
    """(batch, 3, 8, 8) float32 pictures, one generator an image; `changes` go to `inputs` or to the call."""
    own = {key: changes.pop(key) for key in ("steps", "guided") if key in changes}
    call = {**inputs(name, batch, **own), "generator": generators(batch), **changes}
    call |= {key: value.to(pipe.dtype) for key, value in call.items() if isinstance(value, Tensor)}
    with torch.no_grad():
        return pipe(**call).images.float()


def gaussian(
    shape: tuple[int, ...], top: float = 4.0, rank: int | None = None, **fields: Any
) -> GaussianStats:
    """Random statistics with D eigenvalues from `top` down to 0.02, all but `rank` (D − 1) of them pooled."""
    draw = torch.Generator().manual_seed(11)
    size = torch.Size(shape).numel()
    rank = size - 1 if rank is None else rank
    basis, _ = torch.linalg.qr(torch.randn(size, size, generator=draw, dtype=torch.float64))
    spectrum = torch.logspace(torch.tensor(top).log10().item(), -1.7, size, dtype=torch.float64)
    given: dict[str, Any] = {
        "mean": 0.5 * torch.randn(shape, generator=draw),
        "eigenvectors": basis[:, :rank].float().contiguous(),
        "eigenvalues": spectrum[:rank].float(),
        "residual": float(spectrum[rank:].mean()),
        "num_samples": 1000,
        "class_means": None,
        "class_names": None,
        "calibration": {},
    }
    return GaussianStats(**{**given, **fields})


# Width of the prompt embeddings that each pipeline's denoiser is shown, and the most tokens they have.
PROMPTS = {"sd": (_TEXT_WIDTH, 77), "sdxl": (2 * _TEXT_WIDTH, 77), "sd3": (32, 333), "flux": (32, 4)}


def npnet(name: str, seed: int = 0, trained: bool = True) -> NPNetModel:
    """A small network for `build(name)`; with `trained` its last layer is random, so that it changes the noise."""
    text_dim, max_tokens = PROMPTS[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        channels = LATENT_SHAPES[name][0]
        model = NPNetModel(channels, text_dim, max_tokens, width=32, depth=1)
        if trained:
            torch.nn.init.normal_(model.compact.out.weight, std=0.3)
    return model.eval()


def lora_matrices(denoiser: Any, rank: int = 2, seed: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
    """Random (down, up) of a LoRA for every attention projection, by its layer's name."""
    draw = torch.Generator().manual_seed(seed)
    found = {}
    for name, layer in denoiser.named_modules():
        if isinstance(layer, torch.nn.Linear) and name.endswith((".to_q", ".to_k", ".to_v", ".to_out.0")):
            down = torch.randn(rank, layer.in_features, generator=draw)
            found[name] = down, 0.3 * torch.randn(layer.out_features, rank, generator=draw)
    return found


def lora(name: str) -> dict[str, Tensor]:
    """A random LoRA for `build(name)`'s denoiser, under diffusers' names."""
    pipe = build(name)
    prefix = "unet" if hasattr(pipe, "unet") else "transformer"
    found = {}
    for layer, (down, up) in lora_matrices(getattr(pipe, prefix)).items():
        # Weak enough for half precision.
        found |= {f"{prefix}.{layer}.lora_A.weight": 0.3 * down, f"{prefix}.{layer}.lora_B.weight": up}
    return found
