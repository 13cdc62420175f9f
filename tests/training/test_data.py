"""What a training script's batches are made of."""

import argparse
from pathlib import Path
from typing import Any

import datasets
import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_ext.core.images import encode_images, open_images
from diffusers_ext.testbed import fashion_scenes
from diffusers_ext.training.data import (
    Captions,
    TrainingLatents,
    add_augmentation_arguments,
    add_data_arguments,
    check_captioned_training,
    encode_captions,
    image_arrays,
    load_dataset,
)
from diffusers_ext.training.loop import rows_of_step
from tests import families, tiny


def data_arguments(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cache_dir")
    add_data_arguments(parser)
    add_augmentation_arguments(parser)
    return parser.parse_args(list(argv))


@pytest.mark.parametrize("cache_latents", [True, False])
def test_latents_by_number(cache_latents: bool) -> None:
    pipe = tiny.build("sd")
    data: Any = fashion_scenes.make_dataset(fashion_scenes.SAMPLE_DIR, "test", 70, seed=0)
    args = data_arguments(*(["--cache_latents"] if cache_latents else []))
    encoded = TrainingLatents(args, pipe, data)
    index = [66, 2, 2]
    expected = encode_images(pipe, image_arrays(args, open_images(data), index))
    assert torch.allclose(encoded(index)[0], expected, atol=1e-5)


def picture(path: Path, value: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), (value,) * 3).save(path)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["train_a.png", "b.png", "test_c.png", "sub/val-d.png"], None),
        (["train/a.png", "train/sub/b.png", "test/c.png"], ["train/a.png", "train/sub/b.png"]),
        (
            ["my train/a.png", "more/train-2/b.png", "more/test-2/c.png"],
            ["my train/a.png", "more/train-2/b.png"],
        ),
        (["a [1].png", "*.png", ".hidden/c.png"], ["a [1].png", "*.png"]),
    ],
)
def test_every_picture_of_a_folder_is_trained_on(
    files: list[str], expected: list[str] | None, tmp_path: Path
) -> None:
    for name in files:
        picture(tmp_path / "a [b]" / name)
    args = data_arguments("--train_data_dir", str(tmp_path / "a [b]"))
    data = load_dataset(args, captions=False).cast_column("image", datasets.Image(decode=False))
    found = {row["path"] for row in data["image"]}
    assert found == {str(tmp_path / "a [b]" / name) for name in expected or files}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "is not a folder"),
        (["readme.txt"], "holds no images"),
        (["train/a.png", "b.png"], r"b.png \(no split\), train/a.png \(train\)"),
        (["test/a.png"], r"test/a.png \(another split\)"),
    ],
)
def test_folders_without_a_clear_training_split_are_refused(
    files: list[str], message: str, tmp_path: Path
) -> None:
    for name in files:
        picture(tmp_path / "own" / f"{name}.png")
        (tmp_path / "own" / f"{name}.png").rename(tmp_path / "own" / name)
    args = data_arguments("--train_data_dir", str(tmp_path / "own"))
    with pytest.raises(ValueError, match=message):
        load_dataset(args, captions=False)


def test_captions_are_drawn_equally_by_one_process_and_by_two() -> None:
    data = {"text": [["a", "b", "c"], "only", ["", "d"]]}
    captions = Captions(data_arguments(), data)
    drawn: list[str] = []
    for step in range(60):
        index = [0, 1, 2, 0]
        whole = captions.draw(rows_of_step(7, step, 0, 1, 4), index)
        parts = [captions.draw(rows_of_step(7, step, r, 2, 2), index[2 * r : 2 * r + 2]) for r in (0, 1)]
        assert whole == parts[0] + parts[1]
        assert whole == captions.draw(rows_of_step(7, step, 0, 1, 4), index)
        drawn += whole
    assert {text: drawn.count(text) > 9 for text in drawn} == dict.fromkeys(
        ["a", "b", "c", "only", "", "d"], True
    )
    assert [captions.numbered(i) for i in range(8)] == ["a", "only", "", "b", "only", "d", "c", "only"]


def test_single_captions_leave_the_random_numbers_of_a_step_as_they_are() -> None:
    captions = Captions(data_arguments(), {"text": ["a", ["b"], ""]})
    rows = rows_of_step(0, 0, 0, 1, 3)
    assert captions.draw(rows, [2, 1, 0]) == ["", "b", "a"]
    assert torch.equal(rows.uniform(), rows_of_step(0, 0, 0, 1, 3).uniform())


def test_crops_and_flips_are_drawn_equally_by_one_process_and_by_two() -> None:
    draw = np.random.default_rng(0)
    pictures = [Image.fromarray(draw.integers(0, 256, (16, 48, 3), dtype=np.uint8)) for _ in range(4)]
    data = datasets.Dataset.from_dict({"image": pictures}, datasets.Features({"image": datasets.Image()}))
    encoded = TrainingLatents(
        data_arguments("--resolution", "8", "--no-center_crop", "--random_flip"), tiny.build("sd"), data
    )
    latents, corners = encoded([0, 1, 2, 3], rows_of_step(3, 5, 0, 1, 4))
    parts = [encoded([2 * r, 2 * r + 1], rows_of_step(3, 5, r, 2, 2)) for r in (0, 1)]
    assert torch.equal(corners, torch.cat([part[1] for part in parts]))
    assert torch.allclose(latents, torch.cat([part[0] for part in parts]), atol=1e-5)
    assert corners[:, 0].tolist() == [0] * 4  # as high as the crop
    assert corners[:, 1].unique().numel() > 1
    assert 0 <= corners.min() <= corners.max() <= 16
    centre, nothing = encoded([0, 1, 2, 3])
    assert not torch.allclose(latents, centre, atol=1e-2)
    assert not nothing.any()


def test_a_crop_is_where_sdxl_is_told_it_is() -> None:
    # Columns of 24 grey values; after resizing to 8 × 24 a crop shows 8 of them.
    columns = np.repeat(np.arange(24, dtype=np.uint8) * 10, 2)[None, :, None].repeat(16, 0).repeat(3, 2)
    data = datasets.Dataset.from_dict(
        {"image": [Image.fromarray(columns)]}, datasets.Features({"image": datasets.Image()})
    )
    encoded = TrainingLatents(data_arguments("--resolution", "8", "--no-center_crop"), tiny.build("sd"), data)
    seen = set()
    for step in range(8):
        images, corners = encoded._arrays([0], rows_of_step(0, step, 0, 1, 1))
        assert abs(float(images[0, 4, 0, 0]) * 25.5 - corners[0][1]) < 1
        seen.add(corners[0][1])
    assert len(seen) > 3
    corner = torch.tensor([[0, 5], [3, 0]])
    found = encode_captions(tiny.build("sdxl"), ["a", "b"], 8, 8, corner)["time_ids"]
    assert found.tolist() == [[8, 8, 0, 5, 8, 8], [8, 8, 3, 0, 8, 8]]


def test_captions_as_the_unet_takes_them() -> None:
    plain = encode_captions(tiny.build("sd"), ["a aaa", ""], 32, 64)
    assert plain.keys() == {"prompt_embeds"}
    found = encode_captions(tiny.build("sdxl"), ["a aaa", ""], 32, 64)
    assert found.keys() == {"prompt_embeds", "pooled_prompt_embeds", "time_ids"}
    assert found["time_ids"].tolist() == [[32, 64, 0, 0, 32, 64]] * 2
    assert len(found["prompt_embeds"]) == len(found["pooled_prompt_embeds"]) == 2


REFUSED = {
    "sd-controlnet": "has controlnet: expected Stable Diffusion or SDXL",
    "sd-ip-adapter": "takes embeddings of images, as with an IP-Adapter",
    "lcm": "takes a guidance scale as an input, as in LCM",
    "sd3": "StableDiffusion3Pipeline has no unet",
    "ldm": "LDMTextToImagePipeline has no vae, text_encoder",
    "ddpm": "DDPMPipeline has no vae, text_encoder",
}


@pytest.mark.parametrize("name", families.NAMES)
def test_only_unets_whose_inputs_are_known_are_trained_on_captions(name: str) -> None:
    pipe = families.build(name)
    if name in ("sd", "sd2", "sdxl", "sdxl-img2img", "sd-pag"):
        check_captioned_training(pipe)
        return
    with pytest.raises(ValueError, match=REFUSED.get(name, "has no unet|has guider")):
        check_captioned_training(pipe)
    with pytest.raises(ValueError, match="expected Stable Diffusion or SDXL"):
        TrainingLatents(data_arguments(), pipe, [])


def test_inputs_of_other_unets_are_named() -> None:
    inpainting = tiny.build("sd")
    inpainting.unet = diffusers.UNet2DConditionModel.from_config(inpainting.unet.config, in_channels=9)
    with pytest.raises(ValueError, match="has a UNet with 9 channels for latents with 4"):
        check_captioned_training(inpainting)
    classes = tiny.build("sd")
    classes.unet = tiny.unet(num_class_embeds=3)
    with pytest.raises(ValueError, match="The UNet of StableDiffusionPipeline takes class labels"):
        check_captioned_training(classes)
    # Kolors' projection of the embeddings is no further input.
    projected = tiny.build("sd")
    width = projected.unet.config.cross_attention_dim
    projected.unet = tiny.unet(encoder_hid_dim_type="text_proj", encoder_hid_dim=width)
    check_captioned_training(projected)
