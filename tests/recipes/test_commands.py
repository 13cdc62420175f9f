"""`diffusers-ext generate`, `interpolate`, `invert`, `edit` and `project`: what they write is what the functions return."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

import diffusers_ext as dx
from diffusers_ext.core.extras import find_path
from diffusers_ext.testbed.embedded import card_dir
from tests import tiny
from tests.test_cli import run

pytestmark = pytest.mark.filterwarnings("ignore")

SIZE = ("--height", 8, "--width", 8, "--steps", 3)
CALL: dict[str, Any] = {"height": 8, "width": 8, "num_inference_steps": 3}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pipeline, statistics, a network and a LoRA for it, and an image."""
    folder = tmp_path_factory.mktemp("files")
    pipe = tiny.build("sd")
    pipe.save_pretrained(folder / "sd")
    tiny.build("ddpm").save_pretrained(folder / "ddpm")
    tiny.gaussian(tiny.LATENT_SHAPES["sd"], rank=6).save_pretrained(folder / "stats")
    tiny.npnet("sd").save_pretrained(folder / "npnet")
    save_file(tiny.lora("sd"), folder / "lora.safetensors")
    Image.fromarray((tiny.images(pipe, "sd")[0].movedim(0, -1) * 255).byte().numpy()).save(
        folder / "image.png"
    )
    return folder


def methods(files: Path) -> tuple[Any, ...]:
    noise = ("--golden-noise", files / "npnet", "--golden-strength", 0.8)
    lora = ("--smooth-lora", files / "lora.safetensors", "--lora-scale", 0.5)
    return ("--teleport", files / "stats", "--skip", 0.4, *noise, *lora)


def put_on(pipe: Any, files: Path) -> Any:
    dx.apply_teleport(pipe, dx.GaussianStats.from_pretrained(files / "stats"), skip=0.4)
    dx.apply_golden_noise(pipe, tiny.npnet("sd"), strength=0.8)
    dx.apply_smooth_lora(pipe, files / "lora.safetensors")
    pipe.set_adapters("smooth", 0.5)
    return pipe


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def expected(pipe: Any, prompts: list[str], seeds: list[int], **call: Any) -> list[np.ndarray]:
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return [np.asarray(image) for image in pipe(prompts, generator=generators, **{**CALL, **call}).images]


def test_generate_with_methods_and_the_same_seeds_without(files: Path, tmp_path: Path) -> None:
    options = (*SIZE, "--guidance", 3, "--seed", 5, "--num-images", 2, "--output-dir", tmp_path / "out")
    saving = ("--save-recipe", tmp_path / "fast")
    text = run("generate", files / "sd", "a aaa", *options, *methods(files), "--compare", *saving)
    assert "2 images in" in text
    assert "with teleportation, golden noise, Smooth-LoRA" in text
    plain = expected(tiny.build("sd"), ["a aaa"] * 2, [5, 6], guidance_scale=3.0)
    ours = expected(put_on(tiny.build("sd"), files), ["a aaa"] * 2, [5, 6], guidance_scale=3.0)
    for number in range(2):
        assert np.array_equal(pixels(tmp_path / f"out/{number:04d}.png"), ours[number])
        assert np.array_equal(pixels(tmp_path / f"out/{number:04d}-plain.png"), plain[number])
        assert not np.array_equal(ours[number], plain[number])
    both = np.concatenate([np.concatenate(pair, 1) for pair in zip(plain, ours)])
    assert np.array_equal(pixels(tmp_path / "out/comparison.png"), both)
    # The metadata, beside the images and in them.
    lines = [json.loads(line) for line in (tmp_path / "out/metadata.jsonl").read_text().splitlines()]
    assert [line["file_name"] for line in lines] == [
        "0000.png",
        "0001.png",
        "0000-plain.png",
        "0001-plain.png",
    ]
    assert [line["seed"] for line in lines] == [5, 6, 5, 6]
    assert lines[0]["options"] == {"num_inference_steps": 3, "height": 8, "width": 8, "guidance_scale": 3.0}
    assert list(lines[0]["methods"]) == ["teleportation", "golden noise", "Smooth-LoRA"]
    assert lines[0]["methods"]["teleportation"] == "skip=0.4, mean_from='stats', from stats"
    assert lines[2]["methods"] == {}
    assert str(tmp_path) not in json.dumps(lines)
    chunks: Any = Image.open(tmp_path / "out/0001.png")
    assert chunks.text["prompt"] == "a aaa"
    assert chunks.text["seed"] == "6"
    assert json.loads(chunks.text["methods"]) == lines[1]["methods"]
    # The saved recipe gives the same images, with its own steps and guidance.
    again = ("--seed", 5, "--num-images", 2, "--batch-size", 2, "--output-dir", tmp_path / "again")
    run("generate", files / "sd", "a aaa", "--recipe", tmp_path / "fast", *again)
    assert np.array_equal(pixels(tmp_path / "again/0001.png"), ours[1])


def test_generate_from_a_file_of_prompts_with_another_scheduler(files: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a aaa\na b\n")
    options = ("--prompts", tmp_path / "prompts.txt", "--scheduler", "DDIM", "--output-dir", tmp_path)
    run("generate", files / "sd", *options, *SIZE)
    pipe: Any = DiffusionPipeline.from_pretrained(files / "sd", safety_checker=None)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    for number, image in enumerate(expected(pipe, ["a aaa", "a b"], [0, 1])):
        assert np.array_equal(pixels(tmp_path / f"{number:04d}.png"), image)
    lines = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    assert [(line["prompt"], line["scheduler"]) for line in lines] == [
        ("a aaa", "DDIMScheduler"),
        ("a b", "DDIMScheduler"),
    ]


def test_generate_without_prompts(files: Path, tmp_path: Path) -> None:
    run("generate", files / "ddpm", "--steps", 2, "--output-dir", tmp_path)
    pipe = tiny.build("ddpm")
    generator = [torch.Generator().manual_seed(0)]
    image = pipe(batch_size=1, generator=generator, num_inference_steps=2).images[0]
    assert np.array_equal(pixels(tmp_path / "0000.png"), np.asarray(image))


def test_errors_of_generate(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Built, which takes a tenth of the time of loading.
    monkeypatch.setattr(
        "diffusers_ext.recipes.commands.load_pipeline", lambda model, *_: tiny.build(Path(model).name)
    )
    (tmp_path / "prompts.txt").write_text("a aaa\n")

    def error(*args: Any) -> str:
        text = run("generate", *args, "--output-dir", tmp_path / "out", code=1)
        assert not (tmp_path / "out").exists()
        return text

    sd = files / "sd"
    assert "Give a prompt, such as diffusers-ext generate" in error()
    assert "got 3 arguments: put a prompt of several words into quotes" in error(sd, "a", "red")
    assert "Expected [MODEL] with --prompts" in error(sd, "a", "--prompts", tmp_path / "prompts.txt")
    assert "StableDiffusionPipeline needs a prompt" in error(sd)
    assert "DDPMPipeline takes no prompts" in error(files / "ddpm", "a aaa")
    assert "--guidance: DDPMPipeline has no guidance scale" in error(files / "ddpm", "--guidance", 2)
    assert "DDPMPipeline takes no height" in error(files / "ddpm", "--height", 8)
    assert "--scheduler nothing: Diffusers has no nothingScheduler" in error(
        sd, "a", "--scheduler", "nothing"
    )
    assert "need a --recipe or a method" in error(sd, "a", "--compare")
    assert "--skip goes with --teleport" in error(sd, "a", "--skip", 0.3)
    assert "--golden-strength goes with" in error(sd, "a", "--golden-strength", 0.3)
    assert "--lora-scale goes with" in error(sd, "a", "--lora-scale", 0.3)
    wrong = ("--teleport", files / "stats", "--skip", "most")
    assert "--skip must be a number in [0, 1) or \"auto\", got 'most'" in error(sd, "a", *wrong)
    both = ("--recipe", "fast", "--golden-noise", files / "npnet")
    assert "Give either --recipe or options of methods" in error(sd, "a", *both)
    assert "is this a recipe?" in error(sd, "a", "--recipe", files)


def test_names_of_embedded_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_path("fashion-scenes/gaussian") == str(card_dir("fashion-scenes") / "gaussian")
    for name in ("someone/model", "./fashion-scenes", "/fashion-scenes", "..", "nothing"):
        assert find_path(name) == name
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fashion-scenes").mkdir()
    assert find_path("fashion-scenes") == "fashion-scenes"  # what is there comes first


def test_the_embedded_model_from_a_prompt_to_its_edit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    steps = ("--steps", 2, "--guidance", 2)
    ours = ("--teleport", "fashion-scenes/gaussian", "--skip", 0.5, "--golden-noise", "npnet-fashion-scenes")
    run("generate", "a red bag", *steps, *ours, "--compare")
    assert sorted(path.name for path in Path("images").iterdir()) == [
        "0000-plain.png",
        "0000.png",
        "comparison.png",
        "metadata.jsonl",
    ]
    assert pixels(Path("images/comparison.png")).shape == (32, 128, 3)
    assert '"from fashion-scenes/gaussian"' not in Path("images/metadata.jsonl").read_text()
    assert "from fashion-scenes/gaussian" in Path("images/metadata.jsonl").read_text()
    run(
        "edit",
        "images/0000.png",
        "--prompt",
        "a red bag",
        "--to",
        "a blue bag",
        "--steps",
        6,
        "--guidance",
        2,
    )
    red, blue = pixels(Path("images/0000.png")).mean((0, 1)), pixels(Path("edit/edited.png")).mean((0, 1))
    assert red[0] > red[2]
    assert blue[2] - blue[0] > red[2] - red[0]


def test_interpolate(files: Path, tmp_path: Path) -> None:
    options = ("--to", "a bbb", "--num-frames", 3, *SIZE, "--output-dir", tmp_path)
    run("interpolate", files / "sd", "a aaa", *options, "--smooth-lora", files / "lora.safetensors")
    pipe = dx.apply_smooth_lora(tiny.build("sd"), files / "lora.safetensors")
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    frames = dx.interpolate(
        pipe, ["a aaa", "a bbb"], generator=generators, num_frames=3, progress=False, **CALL
    )
    for number in range(3):
        assert np.array_equal(pixels(tmp_path / f"{number:04d}.png"), (frames[number] * 255).round())
    animation: Any = Image.open(tmp_path / "animation.gif")
    assert animation.n_frames == 3
    chunks: Any = Image.open(tmp_path / "0002.png")
    assert chunks.text["to"] == "a bbb"


def test_invert_and_edit(files: Path, tmp_path: Path) -> None:
    image = (files / "image.png", "--prompt", "a aaa", "--steps", 3, "--output-dir", tmp_path)
    text = run("invert", files / "sd", *image)
    pipe = tiny.build("sd")
    latents = dx.encode_images(pipe, Image.open(files / "image.png"))
    noise = dx.ddim_invert(pipe, latents, "a aaa", num_inference_steps=3)
    assert torch.equal(load_file(tmp_path / "noise.safetensors")["noise"], noise)
    call: dict[str, Any] = {"latents": noise, "num_inference_steps": 3, "output_type": "np"}
    again = dx.edit(pipe, "a aaa", "a aaa", strength=0.0, guidance_scale=1.0, **call).images[0]
    assert np.array_equal(pixels(tmp_path / "reconstruction.png"), (again * 255).round())
    error = np.square(again - pixels(files / "image.png") / 255).mean()
    assert f"differs by {error:.3g} (mean square" in text
    run("edit", files / "sd", *image, "--to", "a bbb", "--strength", 0.5, "--guidance", 2)
    edited = dx.edit(pipe, "a aaa", "a bbb", strength=0.5, guidance_scale=2.0, **call).images[0]
    assert np.array_equal(pixels(tmp_path / "edited.png"), (edited * 255).round())


def test_project(tmp_path: Path) -> None:
    sign: Any = dx.SIGNPipeline.from_pretrained(card_dir("sign-fashion-ddpm"))
    clean = sign(generator=torch.Generator().manual_seed(3)).images[0]
    clean.save(tmp_path / "image.png")
    run("project", tmp_path / "image.png", "--strength", 0.2, "--seed", 1, "--output-dir", tmp_path)
    image = sign.project(clean, strength=0.2, generator=torch.Generator().manual_seed(1)).images[0]
    assert np.array_equal(pixels(tmp_path / "projected.png"), np.asarray(image))
    mask = Image.new("L", clean.size)
    mask.paste(255, (0, 0, 16, 16))
    mask.save(tmp_path / "mask.png")
    run("project", tmp_path / "image.png", "--mask", tmp_path / "mask.png", "--output-dir", tmp_path)
    filled = sign.edit(clean, mask, generator=torch.Generator().manual_seed(0)).images[0]
    assert np.array_equal(pixels(tmp_path / "projected.png"), np.asarray(filled))
    assert np.array_equal(pixels(tmp_path / "projected.png")[20:], np.asarray(clean)[20:])


def test_errors_of_the_other_commands(files: Path, tmp_path: Path) -> None:
    assert "DDPMPipeline takes no prompts" in run("interpolate", files / "ddpm", "a aaa", code=1)
    assert "Expected IMAGE, or MODEL and IMAGE, got 3 arguments" in run("invert", "a", "b", "c", code=1)
    assert "No such file" in run("edit", files / "sd", tmp_path / "none.png", "--to", "a bbb", code=1)
    assert "is a time-conditional diffusion model, not a projector" in run(
        "project", files / "ddpm", files / "image.png", code=1
    )
