"""What a training script's batches are made of."""

import argparse
import pickle
from pathlib import Path
from typing import Any

import datasets
import diffusers
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from diffusers_ext.core.records import pipeline_record
from diffusers_ext.testbed import fashion_scenes
from diffusers_ext.training.captioned import CaptionedBatches, check_captioned_training, time_ids
from diffusers_ext.training.data import (
    Captions,
    TrainingImages,
    add_augmentation_arguments,
    add_data_arguments,
    load_dataset,
)
from diffusers_ext.training.encodings import Shards, encode_once
from diffusers_ext.training.levels import add_flow_arguments
from diffusers_ext.training.recipes import dataset_record
from diffusers_ext.training.rows import rows_of_step
from diffusers_ext.training.transformers import flow_of_class
from tests import families, tiny


def data_arguments(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cache_dir")
    add_data_arguments(parser)
    add_augmentation_arguments(parser)
    add_flow_arguments(parser)
    return parser.parse_args(list(argv))


def batches_of(folder: Path, model: str = "sd", data: Any = None, *argv: str) -> CaptionedBatches:
    pipe = families.build(model)
    args = data_arguments(*argv)
    args.output_dir, args.train_batch_size = str(folder), 3
    if data is None:
        data = fashion_scenes.make_dataset(fashion_scenes.SAMPLE_DIR, "test", 12, seed=0)
    made_of = {"model": pipeline_record(pipe), "data": dataset_record(args, data)}
    return CaptionedBatches(args, Accelerator(cpu=True), pipe, data, made_of, 0.25)


@pytest.mark.parametrize("model", ["sd", "sdxl", "sd3", "zimage"])
def test_cached_encodings_are_those_of_every_step(model: str, tmp_path: Path) -> None:
    few = [] if model.startswith("sd") and model != "sd3" else ["--max_sequence_length", "32"]
    plain, cached = (batches_of(tmp_path, model, None, *few, *extra) for extra in ([], ["--cache_latents"]))
    assert "images" in plain.read(rows_of_step(0, 0, 0, 2))
    drawn = set()
    for step in range(4):
        rows = [rows_of_step(0, step, 0, 6) for _ in range(2)]
        expected, found = (b.encode(b.read(r)) for b, r in zip((plain, cached), rows))
        drawn |= set(plain.read(rows_of_step(0, step, 0, 6))["captions"])
        assert expected.keys() == found.keys()
        # Encoded with other rows: rounding of float32.
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-5)
    assert "" in drawn
    assert len(drawn) > 4


def test_encodings_are_mapped_not_pickled_and_made_again_only_if_missing(tmp_path: Path) -> None:
    made: list[int] = []

    def encode(rows: Any) -> dict[str, torch.Tensor]:
        made.extend(rows)
        return {"x": torch.tensor(rows)[:, None].float()}

    def shards(recipe: str = "mine") -> Shards:
        return encode_once(Accelerator(cpu=True), tmp_path, {"of": recipe}, 600, encode, 50)

    index = [599, 0, 256, 255, 599]
    assert shards()[index]["x"][:, 0].tolist() == index
    assert made == list(range(600))
    (tmp_path / "shard-000001.safetensors").unlink()  # as a killed run leaves it
    again = shards()
    assert made[600:] == list(range(256, 512))
    assert again[index]["x"][:, 0].tolist() == index
    assert len(pickle.dumps(again)) < 500
    assert pickle.loads(pickle.dumps(again))[[300]]["x"].item() == 300
    with pytest.raises(ValueError, match=r"made with other settings .of: 'mine' there, 'other' now"):
        shards("other")
    (tmp_path / "shard-000001.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"shard-000001\.safetensors is missing or corrupted"):
        shards()[index]


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
        whole = captions.draw(rows_of_step(7, step, 0, 4), index)
        parts = [captions.draw(rows_of_step(7, step, r, 2), index[2 * r : 2 * r + 2]) for r in (0, 1)]
        assert whole == parts[0] + parts[1]
        assert whole == captions.draw(rows_of_step(7, step, 0, 4), index)
        drawn += whole
    assert {text: drawn.count(text) > 9 for text in drawn} == dict.fromkeys(
        ["a", "b", "c", "only", "", "d"], True
    )
    assert [captions.numbered(i) for i in range(8)] == ["a", "only", "", "b", "only", "d", "c", "only"]


def test_single_captions_leave_the_random_numbers_of_a_step_as_they_are() -> None:
    captions = Captions(data_arguments(), {"text": ["a", ["b"], ""]})
    rows = rows_of_step(0, 0, 0, 3)
    assert captions.draw(rows, [2, 1, 0]) == ["", "b", "a"]
    assert torch.equal(rows.uniform(), rows_of_step(0, 0, 0, 3).uniform())


def test_crops_and_flips_are_drawn_equally_by_one_process_and_by_two() -> None:
    draw = np.random.default_rng(0)
    pictures = [Image.fromarray(draw.integers(0, 256, (16, 48, 3), dtype=np.uint8)) for _ in range(4)]
    data = datasets.Dataset.from_dict({"image": pictures}, datasets.Features({"image": datasets.Image()}))
    images = TrainingImages(data_arguments("--resolution", "8", "--no-center_crop", "--random_flip"), data)
    whole, corners = images.read([0, 1, 2, 3], rows_of_step(3, 5, 0, 4))
    parts = [images.read([2 * r, 2 * r + 1], rows_of_step(3, 5, r, 2)) for r in (0, 1)]
    assert torch.equal(corners, torch.cat([part[1] for part in parts]))
    assert torch.equal(whole, torch.cat([part[0] for part in parts]))
    assert corners[:, 0].tolist() == [0] * 4  # as high as the crop
    assert corners[:, 1].unique().numel() > 1
    assert 0 <= corners.min() <= corners.max() <= 16
    centre, nothing = images.read([0, 1, 2, 3])
    assert not torch.equal(whole, centre)
    assert not nothing.any()


def test_a_crop_is_where_sdxl_is_told_it_is() -> None:
    # Columns of 24 grey values; after resizing to 8 × 24 a crop shows 8 of them.
    columns = np.repeat(np.arange(24, dtype=np.uint8) * 10, 2)[None, :, None].repeat(16, 0).repeat(3, 2)
    data = datasets.Dataset.from_dict(
        {"image": [Image.fromarray(columns)]}, datasets.Features({"image": datasets.Image()})
    )
    images = TrainingImages(data_arguments("--resolution", "8", "--no-center_crop"), data)
    seen = set()
    for step in range(8):
        pixels, corners = images.read([0], rows_of_step(0, step, 0, 1))
        assert abs(float(pixels[0, 0, 4, 0]) / 10 - corners[0, 1]) < 1
        seen.add(int(corners[0, 1]))
    assert len(seen) > 3
    corner = torch.tensor([[0, 5], [3, 0]])
    found = time_ids(8, 8, corner)
    assert found.tolist() == [[8, 8, 0, 5, 8, 8], [8, 8, 3, 0, 8, 8]]


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
    if flow_of_class(type(pipe)) is not None:  # see test_transformers.py
        return
    with pytest.raises(ValueError, match="expected Stable Diffusion or SDXL"):
        CaptionedBatches(data_arguments(), Accelerator(cpu=True), pipe, [], {})


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
