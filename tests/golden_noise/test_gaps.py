"""Re-denoising on every family of `tests/families.py`: its gaps and the length of its step, against the formula."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import diffusers_ext as dx
from diffusers_ext.core.pipeline import model_output
from diffusers_ext.core.schedules import first_order_scheduler, grid_levels, prediction_type
from diffusers_ext.core.storage import ShardStore
from diffusers_ext.golden_noise.gaps import Gap, gap_of, sides, unguided_call
from diffusers_ext.golden_noise.pairs import PairSettings, collect_pairs
from diffusers_ext.golden_noise.redenoising import move
from tests import families
from tests.golden_noise.test_families import IMAGES, STEPS, VIDEOS, WEIGHT, call_of, noise_of

# By hand, for the weight w of u + w(c − u), or for an embedded scale.
EMBEDDED = ("flux", "flux2")


def by_hand(name: str, weight: float) -> dict[str, Any]:
    family = families.FAMILIES[name]
    if name in EMBEDDED:
        return {"guidance_scale": weight}
    if family.guidance == "true_cfg_scale":
        return {"true_cfg_scale": weight, "negative_prompt": [" "] * 2} if weight > 1 else {}
    assert family.free_at is not None
    return {"guidance_scale": weight - 1 + family.free_at}


def first_output(name: str, pipe: Any, latents: Tensor, **guidance: Any) -> Tensor:
    """What the pipeline gives to its scheduler in the first step, in the layout of `latents`."""
    outputs, step = [], pipe.scheduler.step

    @functools.wraps(step)
    def watched(output: Tensor, *args: Any, **kwargs: Any) -> Any:
        outputs.append(output)
        return step(output, *args, **kwargs)

    pipe.scheduler.step = watched
    try:
        call = {**call_of(name), "num_inference_steps": STEPS, "output_type": "latent"}
        pipe(**call, **guidance, latents=latents)
    finally:
        del pipe.scheduler.step
    output = outputs[0].float()
    return output.movedim(-1, 1).reshape(latents.shape) if output.shape != latents.shape else output


REDENOISED = [n for n in (*IMAGES, *VIDEOS) if n not in ("lcm", "sd-ip-adapter")]
FLOWS = [n for n in REDENOISED if families.FAMILIES[n].kind == "flow"]
JUMP = 0.15


def own_gap(name: str) -> Gap:
    return "guidance" if name in EMBEDDED else "embedding" if name == "flux-schnell" else "cfg"


def by_formula(name: str, pipe: Any, noise: Tensor, output: Callable[[Tensor, bool], Tensor]) -> Tensor:
    """Re-denoised noise; `output` gives the model's for a sample on the way down (True) or up."""
    pipe.scheduler = scheduler = first_order_scheduler(pipe.scheduler)
    with torch.no_grad():
        down = output(noise, True)
        top, below = grid_levels(scheduler)[:2]
        kind = str(prediction_type(scheduler))
        if kind == "flow_prediction":
            # The schedule starts at σ = 1, or with solvers of other classes a little below.
            assert top[1] == pytest.approx(1, abs=1e-3)
            return noise + JUMP * (output(noise - JUMP * down, False) - down)
        lower = move(down, noise, top, below, kind)
        return move(output(lower, False), lower, below, top, kind)


def length_of(name: str) -> dict[str, Any]:
    """The length of the step, as `by_formula` has it."""
    flow = families.FAMILIES[name].kind == "flow"
    return {"num_inference_steps": STEPS, **({"jump": JUMP} if flow else {})}


@pytest.mark.parametrize("name", REDENOISED)
def test_redenoising_is_the_formula_and_guidance_has_an_effect(name: str) -> None:
    pipe = families.build(name)
    noise, original = noise_of(name, pipe), pipe.scheduler
    gap = "cfg" if name == "flux-schnell" else None
    options = {**call_of(name), **length_of(name), "gap": gap}
    golden, other = (dx.redenoise(pipe, noise, guidance_scale=w, **options) for w in (WEIGHT, 1.0))
    assert pipe.scheduler is original
    # Scales that are ignored give the same noise, bit by bit.
    assert not torch.allclose(golden, other, atol=1e-4)
    expected = by_formula(
        name,
        pipe,
        noise,
        lambda x, down: first_output(name, pipe, x, **by_hand(name, WEIGHT if down else 1.0)),
    )
    # Noise of the top level divided by a small alpha and back.
    assert torch.allclose(golden, expected, atol=1e-3)


@pytest.mark.parametrize("name", ["flux", "flux-schnell"])
def test_classifier_free_guidance_beside_an_embedded_scale(name: str) -> None:
    pipe = families.build(name)
    noise = noise_of(name, pipe)
    golden = dx.redenoise(
        pipe, noise, gap="cfg", guidance_scale=WEIGHT, jump=JUMP, num_inference_steps=STEPS, **call_of(name)
    )
    scale = {True: {"true_cfg_scale": WEIGHT, "negative_prompt": [" "] * 2}, False: {}}
    expected = by_formula(name, pipe, noise, lambda x, down: first_output(name, pipe, x, **scale[down]))
    assert torch.allclose(golden, expected, atol=1e-4)


# --- the gap of embeddings ---


def combined(name: str, encoded: Any, empty: Any, weight: float) -> Any:
    """What `encode_prompt` should return, from what it returns for two prompts and two empty ones, row by row."""
    first, blank = (value[0] if isinstance(value, tuple) else value for value in (encoded, empty))
    rows = []
    for i in range(2):
        own, other = kept(encoded, i), kept(empty, i)
        row = first[i].clone()
        places = own.nonzero()[:, 0].tolist()
        others = other.nonzero()[:, 0].tolist()
        for k, place in enumerate(places):
            start = blank[i][others[min(k, len(others) - 1)]]
            row[place] = start + weight * (first[i][place] - start)
        rows.append(row)
    values = [rows if isinstance(first, list) else torch.stack(rows)]
    values += list(encoded[1:]) if isinstance(encoded, tuple) else []
    pooled = {"sdxl": 2, "sd3": 2, "flux": 1, "flux-schnell": 1, "kandinsky5": 1}.get(name)
    if pooled is not None:
        values[pooled] = empty[pooled] + weight * (encoded[pooled] - empty[pooled])
    return tuple(values) if isinstance(encoded, tuple) else values[0]


def kept(encoded: Any, i: int) -> Tensor:
    """Which tokens of a row are not padding that is masked, (tokens,) bool."""
    first = encoded[0] if isinstance(encoded, tuple) else encoded
    length = first[i].shape[0]
    for value in encoded[1:] if isinstance(encoded, tuple) else ():
        if isinstance(value, Tensor) and value.shape == first.shape[:2] and value.max() <= 1:
            return value[i].bool()
        if isinstance(value, Tensor) and value.shape == (3,) and not value.is_floating_point():
            return torch.arange(length) < value.diff()[i]
    return torch.ones(length, dtype=torch.bool)


# Prompts that CogView4 pads to as many tokens as the empty one.
EMBEDDABLE = [n for n in REDENOISED if n not in ("sd-pag", "sd-controlnet")]


@pytest.mark.parametrize("name", EMBEDDABLE)
def test_the_gap_of_embeddings_is_their_linear_combination(name: str) -> None:
    pipe = families.build(name)
    noise, call = noise_of(name, pipe), call_of(name)
    call.pop("negative_prompt", None)
    options = {**call, **length_of(name), "gap": "embedding", "guidance_scale": 1.7}
    state = torch.get_rng_state()
    golden = dx.redenoise(pipe, noise, inversion_guidance_scale=0.4, **options)
    assert torch.equal(torch.get_rng_state(), state)
    assert "encode_prompt" not in vars(pipe)
    encode = pipe.encode_prompt
    weight = 1.0

    @functools.wraps(encode)
    def encoded(*args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(inspect.signature(encode).parameters, args)), **kwargs}
        blank = {key: None if key.startswith("prompt_") else value for key, value in given.items()}
        return combined(name, encode(**given), encode(**{**blank, "prompt": ["", ""]}), weight)

    off: dict[str, Any] = {} if name == "flux2" else by_hand(name, 1.0)
    off = {} if name == "flux" else off

    def output(x: Tensor, down: bool) -> Tensor:
        nonlocal weight
        weight = 1.7 if down else 0.4
        return first_output(name, pipe, x, **off)

    vars(pipe)["encode_prompt"] = encoded
    expected = by_formula(name, pipe, noise, output)
    # Noise of the top level divided by a small alpha and back.
    assert torch.allclose(golden, expected, atol=1e-3)
    assert not torch.allclose(golden, noise, atol=1e-3)


@pytest.mark.parametrize("name", ["sd3", "flux", "qwen", "zimage"])
def test_a_weight_of_one_is_the_prompt_and_of_zero_the_empty_one(name: str) -> None:
    pipe = families.build(name)
    noise, call = noise_of(name, pipe), {**call_of(name), "num_inference_steps": STEPS}
    down, up = sides(pipe, call, "embedding", (1.0, 0.0))
    call = unguided_call(pipe, call)
    prompt, empty = (
        model_output(pipe, noise, {**call, "prompt": text}) for text in (call["prompt"], ["", ""])
    )
    assert torch.equal(down.output(pipe, noise), prompt)
    # Others keep the number of tokens of the prompt.
    if name in ("sd3", "flux"):
        assert torch.equal(up.output(pipe, noise), empty)


@pytest.mark.parametrize(
    ("name", "own"),
    [
        *((name, own_gap(name)) for name in ("sd", "sdxl", "sd3", "flux", "flux2", "flux-schnell")),
        *((name, own_gap(name)) for name in ("flux2-klein", "qwen", "zimage", "sana", "chroma", "wan")),
    ],
)
def test_the_default_gap_is_the_one_that_the_pipeline_has(name: str, own: Gap) -> None:
    pipe = families.build(name)
    assert gap_of(pipe) == own
    noise, options = noise_of(name, pipe), {**call_of(name), "num_inference_steps": STEPS}
    assert torch.equal(dx.redenoise(pipe, noise, **options), dx.redenoise(pipe, noise, gap=own, **options))


@pytest.mark.parametrize(
    ("name", "gap", "message"),
    [
        ("sd3", "guidance", r'does not give its denoiser a guidance scale, .*: use gap="cfg"'),
        ("flux-schnell", "guidance", r'does not give its denoiser a guidance scale, .*: use gap="embedding"'),
        ("flux2", "cfg", r'has no classifier-free guidance, .*: use gap="guidance"'),
        ("distilled", "cfg", r'has no classifier-free guidance, .*: use gap="embedding"'),
        ("distilled", "guidance", r'does not give its denoiser a guidance scale, .*: use gap="embedding"'),
        ("sd3", "text", "gap must be one of guidance, embedding, cfg or None, got 'text'"),
    ],
)
def test_a_gap_that_a_pipeline_cannot_have_is_refused(
    name: str, gap: Any, message: str, tmp_path: Any
) -> None:
    pipe = distilled() if name == "distilled" else families.build(name)
    with pytest.raises(ValueError, match=message):
        dx.redenoise(pipe, torch.zeros(1, 4, 8, 8), gap=gap, prompt="a")
    with pytest.raises(ValueError, match=message):
        collect_pairs(pipe, ["a"], 1, tmp_path, PairSettings(gap=gap), progress=False)
    assert not list(tmp_path.iterdir())


def test_embeddings_of_other_lengths_without_a_mask_are_refused() -> None:
    pipe = families.build("cogview4")
    call = call_of("cogview4", ["a", "a" * 40])
    with pytest.raises(ValueError, match=r"to 48 tokens and the empty one to 16, .* gap=.cfg."):
        dx.redenoise(pipe, noise_of("cogview4", pipe), gap="embedding", **call)


# --- the length of the step ---


@pytest.mark.parametrize("name", FLOWS)
def test_a_jump_is_in_the_shifted_sigma_whatever_the_number_of_steps(name: str) -> None:
    pipe = families.build(name)
    noise, call = noise_of(name, pipe), call_of(name)
    usual, few, many = (
        dx.redenoise(pipe, noise, **call, **options)
        for options in ({}, {"jump": 0.1, "num_inference_steps": 4}, {"jump": 0.1, "num_inference_steps": 30})
    )
    # Rounding of the first level, 1.
    assert torch.allclose(few, many, atol=1e-5)
    assert torch.allclose(usual, few, atol=1e-5)
    twice = dx.redenoise(pipe, noise, jump=0.2, **call)
    assert not torch.allclose(twice, few, atol=1e-4)


def distilled() -> Any:
    pipe = families.build("flux2-klein")
    pipe.register_to_config(is_distilled=True)
    return pipe


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sdxl-img2img", "starts from an image"),
        ("sd-ip-adapter", r"Give ip_adapter_image instead"),
        ("lcm", "LCMScheduler belongs to a model that is distilled"),
        ("dit", "has no prepare_latents"),
        ("ldm", "has no prepare_latents"),
        ("ddpm", "has no prepare_latents"),
        ("modular-sdxl", "has no prepare_latents"),
        ("modular-flux", "has no prepare_latents"),
    ],
)
def test_redenoising_refuses_other_pipelines(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dx.redenoise(families.build(name), torch.randn(2, 4, 8, 8), **call_of(name))


def test_models_without_guidance_have_the_gap_of_embeddings(tmp_path: Any) -> None:
    pipe, call = distilled(), call_of("flux2-klein")
    noise = noise_of("flux2-klein", pipe)
    golden = dx.redenoise(pipe, noise, **call)
    assert torch.equal(golden, dx.redenoise(pipe, noise, gap="embedding", **call))
    assert not torch.allclose(golden, noise, atol=1e-3)
    prompts = call.pop("prompt")
    settings = PairSettings(sampling_steps=2, margin=-9.0)
    score = lambda images, texts: images.mean((1, 2, 3))  # noqa: E731
    options = {"batch_size": 2, "progress": False, "scorer": score, **call}
    assert collect_pairs(pipe, prompts, 2, tmp_path, settings, **options).kept == 2
    recorded = ShardStore.recipe_of(tmp_path)["settings"]
    assert (recorded["gap"], recorded["jump"], recorded["sampling_guidance_scale"]) == ("embedding", 0.1, 1.0)
    other = PairSettings(sampling_guidance_scale=3.0)
    with pytest.raises(
        ValueError, match=r"no guidance scale that has an effect, .* expected a scale of 1, got 3"
    ):
        collect_pairs(pipe, prompts, 2, tmp_path / "other", other, **options)
    assert not (tmp_path / "other").exists()


def test_scales_that_would_be_ignored_are_refused() -> None:
    qwen, sd = families.build("qwen"), families.build("sd")
    with pytest.raises(ValueError, match=r"got true_cfg_scale=4.0 as well\. Leave it out"):
        dx.redenoise(qwen, noise_of("qwen", qwen), true_cfg_scale=4.0, **call_of("qwen"))
    with pytest.raises(ValueError, match=r"must be 1 or more, got 0: below 1 pipelines turn guidance off"):
        dx.redenoise(sd, noise_of("sd", sd), inversion_guidance_scale=0, **call_of("sd"))


@pytest.mark.parametrize("name", ["qwen", "flux-schnell"])
def test_the_negative_prompt_of_the_call_is_used(name: str) -> None:
    pipe = families.build(name)
    noise = noise_of(name, pipe)
    made = [
        dx.redenoise(pipe, noise, gap="cfg", guidance_scale=WEIGHT, **call_of(name), **negative)
        for negative in ({}, {"negative_prompt": [" ", " "]}, {"negative_prompt": ["bbb", "bbb"]})
    ]
    assert torch.equal(made[0], made[1])
    assert not torch.allclose(made[0], made[2], atol=1e-4)
