"""Images in and out, against PIL and diffusers' own image processors and autoencoders."""

import io
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor

import diffusers_ext as dx
from diffusers_ext.core.autoencoders import decode_latents, encode_pixels
from diffusers_ext.core.images import as_tensor, encode_images, prepare_image, save_grid
from tests import tiny


def images(count: int = 2, size: int = 8) -> np.ndarray:
    return np.random.default_rng(0).random((count, size, size, 3)).astype(np.float32)


# --- reading ---


def test_every_form_of_a_batch_is_the_same() -> None:
    bytes_ = (images() * 255).round().astype(np.uint8)
    expected = VaeImageProcessor().preprocess([Image.fromarray(b) for b in bytes_]) / 2 + 0.5
    pil = [Image.fromarray(b) for b in bytes_]
    for given in (bytes_, bytes_ / np.float32(255), pil, expected):
        # diffusers scales to [−1, 1] and back is one float32 rounding away.
        assert torch.allclose(as_tensor(given), expected, atol=1e-6)
    assert torch.equal(as_tensor(pil[0]), as_tensor(pil)[:1])
    assert as_tensor(pil, "L").shape == (2, 1, 8, 8)
    assert torch.equal(as_tensor(bytes_[..., 0])[:, 0], as_tensor(bytes_)[:, 0])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.zeros((8, 8)), r"shape \(8, 8\) of float64"),
        (np.full((1, 8, 8, 3), 1.5), r"in \[0, 1\] or uint8.*values from 1.5 to 1.5"),
        (np.full((1, 8, 8, 3), np.nan), "without NaN"),
        (torch.zeros(3, 8, 8), r"shape \(3, 8, 8\) of torch.float32"),
        ([], "one or more images of one size, got none"),
        (
            [Image.new("RGB", (8, 8)), Image.new("RGB", (4, 8))],
            "one or more images of one size, got 4 × 8, 8 × 8",
        ),
        ([1], "sequence of int"),
    ],
)
def test_what_is_not_a_batch_is_named(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        as_tensor(given)


def test_preparing_turns_converts_and_crops() -> None:
    image = Image.new("P", (20, 10))
    image.putpalette([0, 0, 0, 255, 0, 0] + [0] * 750)
    image.paste(1, (10, 0, 20, 10))
    exif = image.getexif()
    exif[0x0112] = 3  # upside down
    image.info["exif"] = exif.tobytes()
    found = np.asarray(prepare_image(image, "RGB", 10))
    # The centre half of the width: black left of the middle, red right of it, turned round.
    assert found.shape == (10, 10, 3)
    assert found[5, 0].tolist() == [255, 0, 0]
    assert found[5, 9].tolist() == [0, 0, 0]
    assert prepare_image(image, "L").size == (20, 10)


def test_a_grid_has_every_image_at_its_place(tmp_path: Any) -> None:
    shades = torch.linspace(0, 1, 7)[:, None, None, None].expand(7, 3, 4, 4)
    save_grid(shades, 3, tmp_path / "grid.png", scale=1)
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert grid.shape == (8, 12, 3)  # two whole rows; the seventh does not fill one
    assert grid[::4, ::4, 0].tolist() == [[0, 42, 85], [128, 170, 212]]


# --- latents ---


def own_latents(vae: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        return vae.encode(x).latent_dist.mode()


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux"])
def test_encoding_is_what_the_pipelines_own_image_to_image_does(name: str) -> None:
    pipe, values = tiny.build(name), images()
    found = dx.encode_images(pipe, values)
    config = pipe.vae.config
    raw = own_latents(pipe.vae, as_tensor(values) * 2 - 1)
    assert torch.allclose(found, (raw - (config.shift_factor or 0)) * config.scaling_factor, atol=1e-6)
    back = decode_latents(pipe.vae, found)
    with torch.no_grad():
        assert torch.allclose(back, pipe.vae.decode(raw).sample, atol=1e-5)


def test_per_channel_statistics_of_latents_count() -> None:
    """Training scripts of diffusers use (x − mean) · scale / std where a config has them."""
    mean, std = [0.1, -0.2, 0.3, 0.0], [0.5, 2.0, 1.0, 0.7]
    vae = tiny.vae(latents_mean=mean, latents_std=std, scaling_factor=0.5)
    x = as_tensor(images()) * 2 - 1
    raw = own_latents(vae, x)
    columns = [torch.tensor(v)[:, None, None] for v in (mean, std)]
    expected = (raw - columns[0]) * 0.5 / columns[1]
    assert torch.allclose(encode_pixels(vae, x), expected, atol=1e-6)
    assert torch.allclose(encode_images(vae, images()), expected, atol=1e-6)
    with torch.no_grad():
        assert torch.allclose(decode_latents(vae, expected), vae.decode(raw).sample, atol=1e-5)


def test_a_half_precision_autoencoder_that_overflows_is_run_in_float32() -> None:
    vae = tiny.vae(force_upcast=True)
    with torch.no_grad():
        # Overflows float16 (65504) inside and cancels before the end.
        vae.encoder.conv_in.weight.mul_(3e5)
    expected = encode_images(vae, images())
    half = vae.half()
    assert torch.isfinite(encode_images(half, images())).all()
    assert half.dtype == torch.float16
    with torch.no_grad():
        plain = half.encode((as_tensor(images()) * 2 - 1).half()).latent_dist.mode()
    assert not torch.isfinite(plain).all()
    # float16 weights: 11 bits.
    assert torch.allclose(encode_images(half, images()).float(), expected, rtol=5e-2, atol=5e-3)
    assert torch.isfinite(decode_latents(half, torch.zeros(1, 4, 8, 8).half())).all()


def test_an_autoencoder_without_a_posterior() -> None:
    vae = diffusers.AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
        attention_head_dim=4,
        scaling_factor=0.4,
    ).eval()
    x = as_tensor(images()) * 2 - 1
    with torch.no_grad():
        expected = vae.encode(x).latent * 0.4
    assert torch.allclose(encode_pixels(vae, x), expected, atol=1e-6)


def test_pixels_stay_pixels() -> None:
    pipe = tiny.build("ddpm")
    assert torch.equal(dx.encode_images(pipe, images()), as_tensor(images()) * 2 - 1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.zeros((1, 8, 8, 1), np.float32), r"images of 3 channels, got \(1, 1, 8, 8\)"),
        (np.zeros((1, 7, 8, 3), np.float32), "multiples of 2 high and wide, got 7 × 8"),
    ],
)
def test_images_that_do_not_fit_the_autoencoder(given: np.ndarray, message: str) -> None:
    vae = diffusers.AutoencoderKL(
        block_out_channels=[4, 4],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        norm_num_groups=4,
    )
    with pytest.raises(ValueError, match=message):
        encode_images(vae, given)
    with pytest.raises(ValueError, match="DiffusionPipeline or an autoencoder with encode, got str"):
        encode_images("vae", given)


GREY16 = np.linspace(0, 65535, 12).astype(np.uint16).reshape(3, 4)


def stored(image: Image.Image, file_format: str) -> Image.Image:
    file = io.BytesIO()
    image.save(file, file_format)
    return Image.open(file)


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_are_scaled_and_not_clipped(file_format: str) -> None:
    image = stored(Image.fromarray(GREY16), file_format)
    expected = (GREY16 / 65535 * 255).round().astype(np.uint8)
    assert np.array_equal(np.asarray(prepare_image(image, "L")), expected)
    assert np.array_equal(np.asarray(prepare_image(image, "RGB"))[..., 2], expected)
    assert torch.equal(as_tensor(image, "L")[0, 0] * 255, torch.from_numpy(expected).float())


def test_floats_are_scaled_from_0_to_1_and_other_ranges_are_refused() -> None:
    values = (GREY16 / 65535).astype(np.float32)
    found = prepare_image(stored(Image.fromarray(values), "TIFF"), "L")
    assert np.array_equal(np.asarray(found), (values * 255).round().astype(np.uint8))
    wrong = [values * 255, values - 0.1, np.full_like(values, np.nan), GREY16.astype(np.int32)]
    for array in wrong:
        with pytest.raises(ValueError, match=r"image with values from .* whose range is not known: save it"):
            prepare_image(stored(Image.fromarray(array), "TIFF"), "RGB")


def transparent(mode: str) -> Image.Image:
    """Black and transparent on the left, black and opaque on the right."""
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 0, 255))
    if mode == "I;16":
        grey = Image.fromarray(np.array([[1000, 0]], np.uint16))
        file = io.BytesIO()
        grey.save(file, "PNG", transparency=1000)
        return Image.open(file)
    if mode == "P":
        palette = Image.new("P", (2, 1))
        palette.putpalette([0, 0, 0, 0, 0, 0])
        palette.putpixel((1, 0), 1)
        palette.info["transparency"] = 0
        return palette
    if mode == "PA":  # older versions of Pillow convert without the transparency
        image = Image.new("PA", (2, 1))
        image.putpalette([0, 0, 0])
        image.putpixel((1, 0), (0, 255))
        return image
    return image.convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P", "I;16"])
@pytest.mark.parametrize("target", ["L", "RGB"])
def test_transparent_images_are_put_on_white(mode: str, target: str) -> None:
    found = np.asarray(prepare_image(transparent(mode), target)).reshape(2, -1)
    assert found[0].tolist() == [255] * found.shape[1]
    assert found[1].tolist() == [0] * found.shape[1]


def test_transparency_is_kept_for_models_that_have_it() -> None:
    assert np.asarray(prepare_image(transparent("RGBA"), "RGBA"))[0, :, 3].tolist() == [0, 255]
