"""Latents in the scale of the denoiser, against the calls of the pipelines of every family."""

from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_dc import EncoderOutput
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import Tensor, nn

import diffusers_ext as dx
from diffusers_ext.core.autoencoders import (
    AUTOENCODERS,
    channels_of,
    decode_latents,
    downsampling_of,
    encode_pixels,
    side_of,
    vae_of,
)
from diffusers_ext.core.pipeline import final_latents
from tests import families, tiny

pytestmark = pytest.mark.filterwarnings("ignore")

LATENT = [n for n in families.NAMES if n != "ddpm" and not families.FAMILIES[n].modular]


def call_of(name: str, batch: int = 2) -> dict[str, Any]:
    call = {**families.inputs(name, batch), "generator": families.generators(batch)}
    del call["output_type"]
    return call


def remember(vae: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the encoder the exact inverse of the decoder, for what was decoded last."""
    encode, decode, last = vae.encode, vae.decode, []

    def decoder(z: Tensor, *args: Any, **kwargs: Any) -> Any:
        last[:] = [z.clone()]
        return decode(z, *args, **kwargs)

    def encoder(pixels: Tensor) -> Any:
        if not last:  # the image that image-to-image starts from
            return encode(pixels)
        if isinstance(vae, diffusers.AutoencoderDC):
            return EncoderOutput(latent=last[0])
        sharp = torch.cat([last[0], torch.full_like(last[0], -30.0)], 1)  # mean and logarithm of the variance
        return AutoencoderKLOutput(latent_dist=DiagonalGaussianDistribution(sharp))

    monkeypatch.setattr(vae, "decode", decoder)
    monkeypatch.setattr(vae, "encode", encoder)


@pytest.mark.parametrize("name", LATENT)
def test_encoded_images_of_a_pipeline_are_its_samples(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = families.build(name)
    with torch.no_grad():
        samples = final_latents(pipe, call_of(name))
    remember(vae_of(pipe), monkeypatch)
    images = families.images(pipe, name, 2)
    frame = images[:, 0] if images.ndim == 5 else images  # the encoder does not look at it
    found = dx.encode_images(pipe, frame)
    assert found.shape == samples.shape
    # Float32, with scales from 0.2 to 2.
    assert torch.allclose(found, samples, atol=1e-5)
    (drawn,) = dx.encoded_images(pipe, 2 * frame - 1 - 1e-6, progress=False)
    assert torch.allclose(drawn, samples, atol=1e-5)


# --- what a pipeline reads of its autoencoder ---


def test_a_pipeline_that_ignores_the_shift_of_its_autoencoder() -> None:
    parts = {**tiny.build("sd").components, "vae": tiny.vae(shift_factor=50.0)}
    pipe = diffusers.StableDiffusionPipeline(**parts, requires_safety_checker=False)
    call = call_of("sd")
    with torch.no_grad():
        latents = final_latents(pipe, call)
    images = families.images(pipe, "sd", 2)
    shown = (decode_latents(pipe, latents) / 2 + 0.5).clamp(0, 1)
    assert torch.allclose(shown, images, atol=1e-5)
    # By itself, the autoencoder has a shift.
    assert not torch.allclose((decode_latents(pipe.vae, latents) / 2 + 0.5).clamp(0, 1), images, atol=0.02)
    x = torch.rand(2, 3, 8, 8) * 2 - 1
    scale = pipe.vae.config.scaling_factor
    assert torch.allclose(encode_pixels(pipe, x), encode_pixels(pipe.vae, x) + 50 * scale, atol=1e-4)


def test_a_subclass_that_wraps_the_call_reads_the_same() -> None:
    class Wrapped(diffusers.FluxPipeline):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return super().__call__(*args, **kwargs)

    parts = families.build("flux").components
    x = torch.rand(2, 3, 8, 8) * 2 - 1
    vae = parts["vae"]
    assert torch.equal(encode_pixels(Wrapped(**parts), x), encode_pixels(vae, x))
    assert vae.config.shift_factor


def test_a_decoder_that_takes_a_time() -> None:
    pipe = families.build("ltx")
    torch.manual_seed(0)
    vae: Any = diffusers.AutoencoderKLLTXVideo.from_config(pipe.vae.config, timestep_conditioning=True)
    pipe.vae = vae.eval()
    with torch.no_grad():
        latents = final_latents(pipe, call_of("ltx"))
    frames = families.images(pipe, "ltx", 2)
    shown = (decode_latents(pipe, latents) / 2 + 0.5).clamp(0, 1).movedim(1, 2)
    assert torch.allclose(shown, frames, atol=1e-5)


# --- devices and dtypes ---


@pytest.mark.parametrize("name", ["sd", "flux2", "qwen"])
def test_an_autoencoder_in_float32_beside_half_networks(name: str) -> None:
    pipe = families.build(name)
    side = 16 if name == "qwen" else 8
    images = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    expected = dx.encode_images(pipe, images)
    pipe.to(torch.bfloat16)
    pipe.vae.to(torch.float32)
    found = dx.encode_images(pipe, images)
    assert found.dtype == torch.bfloat16
    # One rounding to the 8 bits of bfloat16: the encoder itself ran in float32. Flux.2's statistics were rounded too.
    assert torch.allclose(found.float(), expected, rtol=2**-6, atol=2**-6)
    assert decode_latents(pipe, found).dtype == torch.float32


# --- sizes and channels ---


def tiny_autoencoders() -> list[Any]:
    wide: Any = {
        "encoder_block_out_channels": (8, 8, 8),
        "decoder_block_out_channels": (8, 8, 8),
        "num_encoder_blocks": (1, 1, 1),
        "num_decoder_blocks": (1, 1, 1),
    }
    asymmetric: Any = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "down_block_out_channels": (8, 8),
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "up_block_out_channels": (8, 8),
        "norm_num_groups": 4,
    }
    quantised: Any = {
        "block_out_channels": (8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 4,
    }
    # As Wan 2.2's model of 5B parameters: patches of 2 × 2 pixels with 12 channels.
    patches: Any = {"patch_size": 2, "in_channels": 12, "out_channels": 12, "scale_factor_spatial": 16}
    return [
        diffusers.AutoencoderTiny(**wide),
        diffusers.AsymmetricAutoencoderKL(**asymmetric),
        diffusers.VQModel(**quantised),
        diffusers.AutoencoderKLWan.from_config(families.build("wan").vae.config, **patches),
        *(vae_of(families.build(name)) for name in ("hunyuan-dit", "flux2", "qwen", "sana", "wan")),
        *(vae_of(families.build(name)) for name in ("ltx", "cogvideox")),
    ]


def test_every_known_autoencoder_says_its_size_and_channels() -> None:
    seen = set()
    for vae in tiny_autoencoders():
        seen.add(type(vae).__name__)
        factor = downsampling_of(vae)
        x = torch.rand(1, channels_of(vae), 4 * factor, 2 * factor) * 2 - 1
        latents = encode_pixels(vae, x)
        assert latents.shape[-2:] == (4, 2), type(vae).__name__
        decoded = decode_latents(vae, latents)
        assert (decoded[:, :, 0] if decoded.ndim == 5 else decoded).shape == x.shape
        with pytest.raises(ValueError, match=f"multiples of {factor} high and wide, got"):
            dx.encode_images(vae, torch.rand(1, channels_of(vae), 4 * factor, 2 * factor + 1))
    assert seen == AUTOENCODERS.keys()


def test_images_that_cannot_be_packed_are_refused() -> None:
    assert {name: side_of(families.build(name)) for name in ("sd", "flux", "flux2", "qwen", "ddpm")} == {
        "sd": 1,
        "flux": 2,
        "flux2": 2,
        "qwen": 4,
        "ddpm": 1,
    }
    with pytest.raises(ValueError, match="multiples of 2 high and wide, got 8 × 7"):
        dx.encode_images(families.build("flux"), torch.rand(1, 3, 8, 7))
    with pytest.raises(ValueError, match=r"Expected images \(n, channels, h, w\), got \(1, 3, 5, 8, 8\)"):
        encode_pixels(families.build("wan").vae, torch.zeros(1, 3, 5, 8, 8))


# --- what is not known ---


class Unknown(nn.Module):
    """Something that encodes."""

    def encode(self, x: Tensor) -> Tensor:
        return x

    decode = encode


class Known(diffusers.AutoencoderKL):
    """Someone's own class."""


class Movq(diffusers.DiffusionPipeline):
    """As Kandinsky 2.2, whose autoencoder has a name of its own."""

    def __init__(self, unet: Any, scheduler: Any, movq: Any) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, movq=movq)


def test_what_is_not_known_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r'of Unknown are not known.*AUTOENCODERS\["ClassName"\]'):
        dx.encode_images(Unknown(), torch.rand(1, 3, 8, 8))
    pipe = tiny.build("sd")
    with pytest.raises(ValueError, match="has an autoencoder by the name of movq"):
        dx.encode_images(Movq(pipe.unet, pipe.scheduler, pipe.vae), torch.rand(1, 4, 8, 8))
    pipe.vae = None
    with pytest.raises(ValueError, match="StableDiffusionPipeline has no vae"):
        dx.encode_images(pipe, torch.rand(1, 4, 8, 8))
    with pytest.raises(ValueError, match="got FluxModularPipeline: use its vae"):
        dx.encode_images(families.build("modular-flux"), torch.rand(1, 3, 8, 8))
    config = {**tiny.vae().config}
    assert vae_of(Known.from_config(config)) is not None
