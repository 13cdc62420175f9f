"""Own samples, encoded pictures and prompt means, on tiny real pipelines."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import diffusers_ext as dx
from diffusers_ext.core import schedules
from diffusers_ext.core.families import family_of, from_grid
from diffusers_ext.teleport.sources import check_rank, encoded_images, pipeline_samples
from tests import tiny

pytestmark = pytest.mark.filterwarnings("ignore")

QUIET = {"progress": False}
PROMPTS = ["a aaa", "a bbb"]


def call_inputs(name: str) -> dict[str, Any]:
    given = tiny.inputs(name, steps=3, guided=False)
    del given["output_type"]
    return {key: value for key, value in given.items() if key not in ("prompt", "batch_size")}


def last_states(pipe: Any, run: Callable[[], Any]) -> Tensor:
    """What the scheduler's last step gave: the state in the scale that the denoiser works in."""
    states: list[Tensor] = []
    step = pipe.scheduler.step

    def record(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        states.append(result[0] if isinstance(result, tuple) else result.prev_sample)
        return result

    pipe.scheduler.step = record
    try:
        run()
    finally:
        del pipe.scheduler.step
    return states[-1]


# --- own samples ---


@pytest.mark.parametrize("name", tiny.NAMES)
def test_samples_are_in_the_denoisers_scale(name: str) -> None:
    pipe = tiny.build(name)
    found: list[Any] = []
    if name == "ddpm":
        # Pictures in [0, 1] come back to [-1, 1]; the pipeline itself clips them.
        final = last_states(
            pipe, lambda: found.extend(pipeline_samples(pipe, 2, num_inference_steps=3, **QUIET))
        )
        torch.testing.assert_close(found[0], final.clamp(-1, 1), atol=1e-6, rtol=0)
    else:
        inputs = call_inputs(name)
        final = last_states(pipe, lambda: found.extend(pipeline_samples(pipe, 2, **inputs, **QUIET)))
        torch.testing.assert_close(from_grid(family_of(pipe).layout, found[0]), final)
    assert found[0].dtype == torch.float32
    shape = tiny.LATENT_SHAPES[name]
    assert tuple(found[0].shape) == (2, *shape)
    assert dx.GaussianStats.fit(found, rank=1).shape == shape


def test_samples_do_not_depend_on_the_batch_size() -> None:
    pipe = tiny.build("sd")
    runs = [
        list(pipeline_samples(pipe, 5, batch_size=size, prompts=PROMPTS, **call_inputs("sd"), **QUIET))
        for size in (2, 5)
    ]
    assert [len(names) for _, names in runs[0]] == [2, 2, 1]
    assert [name for _, names in runs[0] for name in names] == [PROMPTS[i % 2] for i in range(5)]
    parts, whole = (torch.cat([x for x, _ in run]) for run in runs)
    torch.testing.assert_close(parts, whole, atol=1e-4, rtol=1e-4)
    assert pipe._progress_bar_config == {"disable": True}  # as tests.tiny had left it


def test_ddim_pipeline_and_half_precision() -> None:
    pipe = diffusers.DDIMPipeline(tiny.build("ddpm").unet, diffusers.DDIMScheduler())
    (batch,) = pipeline_samples(pipe, 2, num_inference_steps=2, **QUIET)
    assert batch.shape == (2, 3, 8, 8)
    assert batch.min() >= -1
    assert batch.min() < 0
    half = tiny.build("sd", dtype=torch.bfloat16)
    (batch,) = pipeline_samples(half, 1, **call_inputs("sd"), **QUIET)
    assert batch.dtype == torch.float32


def test_prompts_give_a_within_prompt_fit() -> None:
    pipe = tiny.build("sd")
    stats = dx.GaussianStats.fit(
        pipeline_samples(pipe, 8, prompts=PROMPTS, guidance_scale=2.0, **without_guidance("sd"), **QUIET), 4
    )
    assert stats.class_names == tuple(PROMPTS)
    assert stats.rank == 4


def without_guidance(name: str) -> dict[str, Any]:
    return {key: value for key, value in call_inputs(name).items() if key != "guidance_scale"}


def test_own_samples_refuse() -> None:
    pipe, ddpm = tiny.build("sd"), tiny.build("ddpm")
    with pytest.raises(ValueError, match="num_samples must be a whole number of 1 or more, got 0"):
        pipeline_samples(pipe, 0)
    with pytest.raises(ValueError, match="prompts must be one or more texts"):
        pipeline_samples(pipe, 4, prompts=[])
    with pytest.raises(ValueError, match="DDPMPipeline takes no prompt"):
        pipeline_samples(ddpm, 4, prompts=PROMPTS)
    with pytest.raises(ValueError, match="either prompts or prompt_embeds"):
        pipeline_samples(pipe, 4, prompts=PROMPTS, prompt_embeds=torch.zeros(1, 77, 16))
    with pytest.raises(ValueError, match="prompt_embeds must hold one row"):
        next(pipeline_samples(pipe, 4, prompt_embeds=torch.zeros(2, 77, 16), **QUIET))

    class Odd(diffusers.DDPMPipeline):
        def __call__(self, number: int = 1) -> None: ...

    with pytest.raises(ValueError, match="Odd takes neither a prompt nor a batch_size"):
        pipeline_samples(Odd(ddpm.unet, ddpm.scheduler), 4)
    dx.apply_teleport(ddpm, tiny.gaussian((3, 8, 8), rank=3), skip=0.5)
    with pytest.raises(ValueError, match="Teleportation is on this pipeline"):
        pipeline_samples(ddpm, 4)
    check_rank(6, 8, PROMPTS)
    with pytest.raises(ValueError, match=r"allow at most 6: generate at least 9"):
        check_rank(7, 8, PROMPTS)


# --- pictures ---


def pictures(count: int = 3, height: int = 8, width: int = 8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def encode(pipe_or_vae: Any, given: Any, **options: Any) -> Tensor:
    return torch.cat(list(encoded_images(pipe_or_vae, given, **options, **QUIET)))


@pytest.fixture(scope="module")
def vae() -> Any:
    torch.manual_seed(0)
    return tiny.vae()


def expected(vae: Any, values: np.ndarray) -> Tensor:
    """The posterior's draws, before any scaling."""
    pixels = torch.from_numpy(values).permute(0, 3, 1, 2).float() / 127.5 - 1
    generators = [torch.Generator().manual_seed(i) for i in range(len(values))]
    with torch.no_grad():
        return vae.encode(pixels).latent_dist.sample(generators)


def test_every_kind_of_pictures_gives_the_same(vae: Any, tmp_path: Path) -> None:
    import datasets

    values = pictures()
    images = [Image.fromarray(value) for value in values]
    for number, image in enumerate(images):
        (tmp_path / "sub").mkdir(exist_ok=True)
        image.save(tmp_path / "sub" / f"{number}.png")
    (tmp_path / "notes.txt").write_text("not a picture")
    reference = expected(vae, values) * vae.config.scaling_factor
    floats = values.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1
    table = datasets.Dataset.from_dict(
        {"image": images}, features=datasets.Features({"image": datasets.Image()})
    )
    kinds = [values, images, tmp_path, str(tmp_path), floats, torch.from_numpy(floats), table]
    for given in kinds:
        torch.testing.assert_close(encode(vae, given, batch_size=2), reference, atol=1e-5, rtol=1e-4)


def test_scale_shift_and_channel_statistics(vae: Any) -> None:
    values = pictures()
    raw = expected(vae, values)
    changed = {"scaling_factor": 0.5, "shift_factor": 0.1}
    shifted = tiny.vae(**changed)
    shifted.load_state_dict(vae.state_dict())
    torch.testing.assert_close(encode(shifted, values), (raw - 0.1) * 0.5, atol=1e-5, rtol=1e-4)
    mean, std = [0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 4.0]
    normalised = tiny.vae(scaling_factor=0.5, latents_mean=mean, latents_std=std)
    normalised.load_state_dict(vae.state_dict())
    by_hand = (raw - torch.tensor(mean).view(1, 4, 1, 1)) * 0.5 / torch.tensor(std).view(1, 4, 1, 1)
    torch.testing.assert_close(encode(normalised, values), by_hand, atol=1e-5, rtol=1e-4)


def test_half_precision_vae_is_upcast_and_put_back(vae: Any) -> None:
    half = tiny.vae(force_upcast=True)
    half.load_state_dict(vae.state_dict())
    half = half.half()
    latents = encode(half, pictures())
    assert half.dtype == torch.float16
    reference = expected(vae, pictures()) * vae.config.scaling_factor
    torch.testing.assert_close(latents, reference, atol=0.02, rtol=0.02)


def test_encoders_without_a_posterior() -> None:
    small = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    assert encode(small, pictures()).shape == (3, 4, 4, 4)


def test_pipelines_with_and_without_a_vae() -> None:
    pipe, values = tiny.build("sd3"), pictures()
    reference = (expected(pipe.vae, values) - 0.1) * pipe.vae.config.scaling_factor
    torch.testing.assert_close(encode(pipe, values), reference, atol=1e-5, rtol=1e-4)
    pixels = encode(tiny.build("ddpm"), values)
    torch.testing.assert_close(pixels, torch.from_numpy(values).permute(0, 3, 1, 2) / 127.5 - 1)


def test_resolution_resizes_and_crops_the_centre(tmp_path: Path) -> None:
    ddpm = tiny.build("ddpm")
    wide = np.zeros((1, 8, 24, 3), np.uint8)
    wide[:, :, 8:16] = 255
    assert encode(ddpm, wide, resolution=8).eq(1).all()
    assert encode(ddpm, wide, resolution=(4, 12)).shape == (1, 3, 4, 12)
    grey = encode(ddpm, wide[..., 0])
    assert torch.equal(grey, encode(ddpm, wide))
    assert torch.equal(encode(ddpm, wide[..., :1]), grey)
    mixed = [Image.new("RGB", (8, 8)), Image.new("RGB", (8, 6))]
    with pytest.raises(ValueError, match=r"image 1 is 6×8, image 0 8×8: pass resolution="):
        encode(ddpm, mixed)
    with pytest.raises(ValueError, match="resolution= resizes images and uint8 arrays only"):
        encode(ddpm, -torch.ones(1, 3, 8, 8), resolution=4)


def test_labels(vae: Any) -> None:
    import datasets

    values = pictures(4)
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "kind": datasets.ClassLabel(names=["cat", "dog"]),
            "text": datasets.Value("string"),
        }
    )
    rows = {"image": [Image.fromarray(v) for v in values], "kind": [0, 1, 0, 1], "text": list("abab")}
    table = datasets.Dataset.from_dict(rows, features=features)

    def names(**options: Any) -> list[str]:
        batches = encoded_images(vae, batch_size=3, **options, **QUIET)
        return [name for _, batch in batches for name in batch]

    assert names(images=table, labels="kind") == ["cat", "dog", "cat", "dog"]
    assert names(images=table, labels="text") == list("abab")
    assert names(images=table, labels=[1, 2, 3, 4]) == list("1234")
    assert names(images=values, labels=list("wxyz")) == list("wxyz")
    stats = dx.GaussianStats.fit(encoded_images(vae, table, labels="kind", **QUIET), rank=2)
    assert stats.class_names == ("cat", "dog")
    with pytest.raises(ValueError, match="has no column 'label'; its columns are image, kind, text"):
        encoded_images(vae, table, labels="label")
    with pytest.raises(ValueError, match="has no column 'img'"):
        encoded_images(vae, table, image_column="img")
    with pytest.raises(ValueError, match="row 0 of the data set is not an image but a int"):
        encode(vae, table, image_column="kind")
    with pytest.raises(ValueError, match="4 images and 1 labels"):
        encoded_images(vae, values, labels=["a"])
    with pytest.raises(ValueError, match=r"only a datasets\.Dataset has columns"):
        encoded_images(vae, values, labels="kind")
    with pytest.raises(ValueError, match=r"Choose one split of the data set, such as dataset\['train'\]"):
        encoded_images(vae, datasets.DatasetDict({"train": table}))
    with pytest.raises(ValueError, match="streamed"):
        encoded_images(vae, table.to_iterable_dataset())
    with pytest.raises(ValueError, match="the data set is empty"):
        encoded_images(vae, table.select([]))


def test_pictures_refuse(vae: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a folder of images"):
        encoded_images(vae, tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no images"):
        encoded_images(vae, tmp_path)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"broken\.png cannot be read as an image"):
        encode(vae, tmp_path)
    Image.new("RGB", (64, 64), "red").save(tmp_path / "cut.jpg")
    (tmp_path / "broken.png").unlink()
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"cut\.jpg cannot be read as an image"):
        encode(vae, tmp_path)
    with pytest.raises(ValueError, match="the list or array is empty"):
        encoded_images(vae, [])
    with pytest.raises(ValueError, match=r"must be in \[-1, 1\]; these values span \[0, 1\]"):
        encoded_images(vae, torch.linspace(0, 1, 192).reshape(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"must be \(N, C, H, W\), float"):
        encoded_images(vae, torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match="An array of images must be uint8"):
        encoded_images(vae, np.zeros((1, 8, 8, 3), int))
    with pytest.raises(ValueError, match="Images must be a folder"):
        encoded_images(vae, 3)
    with pytest.raises(ValueError, match="image 0 has 1 channels, but the model takes 3"):
        encode(vae, -torch.ones(1, 1, 8, 8))
    with pytest.raises(ValueError, match="batch_size must be a whole number of 1 or more, got 0"):
        encoded_images(vae, pictures(), batch_size=0)
    with pytest.raises(ValueError, match="Expected a DiffusionPipeline or an autoencoder"):
        encoded_images("vae", pictures())
    six = diffusers.UNet2DModel.from_config({**tiny.build("ddpm").unet.config, "in_channels": 6})
    with pytest.raises(ValueError, match="The model takes 6 channels"):
        encode(diffusers.DDPMPipeline(six, diffusers.DDPMScheduler()), pictures())
    with pytest.raises(ValueError, match="latents of Other are not known"):
        encoded_images(Other(), pictures())
    with pytest.raises(ValueError, match="multiples of 2 high and wide, got 7 × 8"):
        encode(tiny.build("flux"), pictures(1, 7, 8))  # packed in patches of 2 × 2


class Other(torch.nn.Module):
    def encode(self, x: Tensor) -> Tensor:
        return x


# --- prompt means ---

SHAPE = (4, 8, 8)


def gaussian_denoiser(pipe: Any, stats: dx.GaussianStats, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Makes the UNet the exact denoiser of N(mean of the prompt, Σ); returns the batch sizes of its calls."""
    calls: list[int] = []

    def forward(x: Tensor, t: Tensor, encoder_hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor]:
        calls.append(len(x))
        inner = getattr(pipe.scheduler, "inner", pipe.scheduler)
        scale = inner.scale_model_input(torch.ones(1), t)
        level = schedules.grid_levels(inner)[0]
        x = x / scale
        clean = stats.denoise(x, level, mean_of(stats, encoder_hidden_states))
        return ((x - level[0] * clean) / level[1],)

    monkeypatch.setattr(pipe.unet, "forward", forward)
    return calls


def mean_of(stats: dx.GaussianStats, embeds: Tensor) -> Tensor:
    return stats.mean + embeds.square().mean(dim=(1, 2)).view(-1, 1, 1, 1)


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "EulerDiscreteScheduler", "PNDMScheduler"])
def test_prompt_means_of_an_exact_denoiser(scheduler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, stats = tiny.build("sd"), tiny.gaussian(SHAPE)
    config = {**tiny._SD_NOISE, **({"clip_sample": False} if scheduler == "DDIMScheduler" else {})}
    pipe.scheduler = getattr(diffusers, scheduler)(**config)
    original = pipe.scheduler
    prompts = ["a aaa", "a bbb", "a ccc"]
    with torch.no_grad():
        embeds = pipe.encode_prompt(prompts, "cpu", 1, False)[0]
    calls = gaussian_denoiser(pipe, stats, monkeypatch)
    means = dx.prompt_means(pipe, stats, prompts, num_calls=2, batch_size=2, height=8, width=8)
    torch.testing.assert_close(means, mean_of(stats, embeds), atol=2e-3, rtol=1e-3)
    assert calls == [2, 2, 1, 1]  # no guidance, and the first step alone
    assert pipe.scheduler is original


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3"])
def test_prompt_means_of_real_pipelines(name: str) -> None:
    pipe, stats = tiny.build(name), tiny.gaussian(SHAPE)
    size = {"height": 8, "width": 8}
    both = dx.prompt_means(pipe, stats, PROMPTS, **size)
    assert both.shape == (2, *SHAPE)
    assert both.dtype == torch.float32
    alone = dx.prompt_means(pipe, stats, PROMPTS[1], **size)
    torch.testing.assert_close(alone[0], both[1], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(both[0], both[1], atol=1e-6)
    assert not torch.equal(both, dx.prompt_means(pipe, stats, PROMPTS, seed=1, **size))
    dx.apply_teleport(pipe, stats, skip=0.5)
    on = pipe.scheduler
    assert torch.equal(both, dx.prompt_means(pipe, stats, PROMPTS, **size))
    assert pipe.scheduler is on


def test_prompt_means_refuse() -> None:
    pipe, stats = tiny.build("sd"), tiny.gaussian(SHAPE)
    original = pipe.scheduler
    with pytest.raises(ValueError, match="DDPMPipeline takes no prompt"):
        dx.prompt_means(tiny.build("ddpm"), stats, "a aaa")
    with pytest.raises(ValueError, match="prompts must be one or more texts"):
        dx.prompt_means(pipe, stats, [])
    with pytest.raises(ValueError, match="num_calls must be a whole number of 1 or more, got 0"):
        dx.prompt_means(pipe, stats, "a aaa", num_calls=0)
    with pytest.raises(ValueError, match="the statistics were fitted on"):
        dx.prompt_means(pipe, stats, "a aaa", height=16, width=16)
    assert pipe.scheduler is original
    pipe.scheduler = diffusers.LCMScheduler()
    with pytest.raises(ValueError, match="LCMScheduler belongs to a model that is distilled"):
        dx.prompt_means(pipe, stats, "a aaa")
