"""Golden noise and re-denoising on every family of `tests/families.py`, beyond the shared contract."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import diffusers_ext as dx
from diffusers_ext.core.pipeline import given_latents, initial_grid
from diffusers_ext.golden_noise.pairs import NoisePairs, PairSettings, collect_pairs
from diffusers_ext.golden_noise.training import relative_error, sample, variants
from tests import families
from tests.contract.probe import noise_network

VIDEOS = ("wan", "wan22", "ltx", "cogvideox")
_OTHERS = ("sdxl-img2img", "dit", "ldm", "ddpm", "modular-sdxl", "modular-flux")
IMAGES = tuple(name for name in families.NAMES if name not in (*VIDEOS, *_OTHERS))
WEIGHT = 4.0
STEPS = 5


def call_of(name: str, prompts: list[str] | None = None, first: int = 0) -> dict[str, Any]:
    """A call without guidance arguments, for two images or one for each prompt."""
    batch = 2 if prompts is None else len(prompts)
    guided = name == "sd-ip-adapter"  # the shape of its image embeddings is that of a guided call
    call = families.inputs(name, batch, steps=STEPS, guided=guided, first=first)
    scales = ("guidance_scale", "true_cfg_scale", "output_type", "num_inference_steps")
    call = {key: value for key, value in call.items() if key not in scales}
    return call if prompts is None else {**call, "prompt": prompts}


def noise_of(name: str, pipe: Any) -> Tensor:
    """Noise in the layout of `latents=`."""
    return given_latents(pipe, initial_grid(pipe, {**call_of(name), "generator": families.generators(2)}))


# --- the network ---


@pytest.mark.parametrize("name", IMAGES)
def test_noise_does_not_depend_on_the_other_prompts(name: str) -> None:
    pipe, npnet, prompts = families.build(name), noise_network(name), ["a", "a bcdefghijkl"]

    def golden(rows: list[str], first: int) -> Tensor:
        drawn = families.generators(len(rows), first=first)
        call = call_of(name, rows, first)
        return dx.golden_latents(pipe, npnet, **call, generator=drawn)

    batch = golden(prompts, 0)
    singles = torch.cat([golden([prompt], i) for i, prompt in enumerate(prompts)])
    # Another number of rows may take another matrix kernel: float32 rounding of values up to 5.
    assert torch.allclose(batch, singles, atol=2e-5)
    assert not torch.allclose(batch[:1], golden([prompts[1]], 0), atol=1e-3)


@pytest.mark.parametrize("name", IMAGES)
def test_given_latents_are_made_golden(name: str) -> None:
    pipe, npnet, call = families.build(name), noise_network(name), call_of(name)
    drawn = dx.golden_latents(pipe, npnet, **call, generator=families.generators(2))
    noise = noise_of(name, pipe)
    golden = dx.golden_latents(pipe, npnet, **call, latents=noise)
    # Multiplied by the scale of the scheduler and divided again.
    assert torch.allclose(golden, drawn, atol=1e-5)
    assert not torch.allclose(golden, noise, atol=1e-2)
    assert torch.allclose(dx.golden_latents(pipe, npnet, **call, latents=noise, strength=0), noise, atol=1e-5)
    # A pipeline with golden noise uses them as they are.
    plain = families.images(pipe, name, 2, latents=noise)
    dx.apply_golden_noise(pipe, npnet)
    assert torch.equal(families.images(pipe, name, 2, latents=noise), plain)


# After a call, hooks of transformers in the text encoder of Z-Image cannot be pickled.
@pytest.mark.parametrize(
    ("name", "copied"),
    [("zimage", copy.deepcopy), ("flux", lambda pipe: pickle.loads(pickle.dumps(pipe)))],
)
def test_a_copy_reads_its_own_prompts(name: str, copied: Callable[[Any], Any]) -> None:
    pipe = dx.apply_golden_noise(families.build(name), noise_network(name))
    expected = families.images(pipe, name, 2)
    twin = copied(pipe)
    other = families.images(pipe, name, 2, prompt=["b", "bb"])
    assert torch.equal(families.images(twin, name, 2), expected)
    dx.remove_golden_noise(pipe)
    assert torch.equal(families.images(twin, name, 2, prompt=["b", "bb"]), other)
    dx.remove_golden_noise(twin)
    assert torch.equal(families.images(twin, name, 2), families.images(pipe, name, 2))


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux", "flux2", "qwen", "sana", "kandinsky5"])
def test_a_network_for_other_channels_is_refused_before_the_call(name: str) -> None:
    network = dx.NPNetModel(latent_channels=5, text_dim=32, width=32, depth=1)
    with pytest.raises(ValueError, match=r"latents of 5 channels, and those of \w+ have (4|16)"):
        dx.apply_golden_noise(families.build(name), network)


@pytest.mark.parametrize("name", VIDEOS)
def test_videos_are_refused_before_the_call(name: str) -> None:
    with pytest.raises(ValueError, match=r"Pipeline makes videos\. .* Use a text-to-image pipeline"):
        dx.apply_golden_noise(families.build(name), dx.NPNetModel(4, 32, 512, width=32, depth=1))


# --- from pairs to images ---


@pytest.mark.parametrize(
    "name", ["flux", "flux2", "qwen", "zimage", "sana", "kandinsky5", "pixart", "auraflow"]
)
def test_pairs_training_and_sampling(name: str, tmp_path: Any) -> None:
    pipe, npnet = families.build(name), noise_network(name)
    options = call_of(name)
    prompts = options.pop("prompt")
    settings = PairSettings(num_inference_steps=STEPS, guidance_scale=WEIGHT, sampling_steps=2, margin=-9.0)
    seen: list[Any] = []

    def score(images: Any, texts: Any) -> Any:
        seen.append(images)
        return images.mean((1, 2, 3))

    collect_pairs(pipe, prompts, 2, tmp_path, settings, batch_size=2, progress=False, scorer=score, **options)
    pairs = NoisePairs.load(tmp_path)
    drawn = {**options, "prompt": prompts}
    noise = given_latents(pipe, pairs.noise.float())
    golden = dx.redenoise(pipe, noise, num_inference_steps=STEPS, guidance_scale=WEIGHT, **drawn)
    # Stored with 11 bits; values up to 4.
    assert torch.allclose(given_latents(pipe, pairs.golden.float()), golden, atol=4e-3)
    assert not torch.equal(pairs.golden, pairs.noise)
    starts = variants(npnet, pipe, pairs, **options)
    expected = dx.golden_latents(pipe, npnet, **drawn, latents=noise)
    assert torch.allclose(given_latents(pipe, starts["npnet"]), expected, atol=1e-4)
    assert relative_error(npnet, pipe, pairs, 1, **options) == pytest.approx(
        relative_error(npnet, pipe, pairs, 2, **options), rel=1e-4
    )
    sampling = {"num_inference_steps": 2, **options}
    images = sample(
        pipe, prompts, pairs.noise.float(), guidance_scale=settings.sampling_guidance_scale, **sampling
    )
    assert torch.allclose(torch.from_numpy(images), torch.from_numpy(seen[0]).float(), atol=1e-3)
    # Scales that are ignored give the same images, bit by bit.
    weak = sample(pipe, prompts, pairs.noise.float(), guidance_scale=1.0, **sampling)
    assert not torch.allclose(torch.from_numpy(weak), torch.from_numpy(images), atol=1e-4)
