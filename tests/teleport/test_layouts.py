"""Packed latents, videos, lists and per-token times: what the pipeline knows and its scheduler does not."""

import diffusers
import pytest
import torch

import diffusers_ext as dx
from diffusers_ext.teleport.apply import hook_count
from diffusers_ext.teleport.scheduler import _same_time
from tests import families, tiny
from tests.contract.probe import in_grid, plain, record, statistics

# Statistics of another size with the same number of tokens, and a size that is not a multiple of the patch.
PACKED = {
    "flux": ((4, 4, 16), (11, 7), (4, 10, 6)),
    "qwen": ((4, 4, 16), (23, 15), (4, 10, 6)),
    "chroma": ((4, 4, 16), (11, 7), (4, 10, 6)),
    "flux2": ((16, 2, 8), (11, 7), (16, 5, 3)),
    "ltx": ((4, 2, 4, 16), None, None),
}


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("mean_from", ["stats", "first_call"])
def test_a_number_of_tokens_is_not_a_size(name: str, mean_from: str) -> None:
    pipe = families.build(name)
    dx.apply_teleport(pipe, tiny.gaussian(PACKED[name][0], rank=6), 0.6, mean_from=mean_from)
    with pytest.raises(ValueError, match="statistics were fitted on"):
        families.images(pipe, name)


@pytest.mark.parametrize("name", [name for name in PACKED if PACKED[name][1]])
@pytest.mark.parametrize("mean_from", ["stats", "first_call"])
def test_odd_sizes(name: str, mean_from: str) -> None:
    _, size, shape = PACKED[name]
    pipe = families.build(name)
    dx.apply_teleport(pipe, tiny.gaussian(shape, rank=6), 0.6, mean_from=mean_from)
    images = families.images(pipe, name, height=size[0], width=size[1])
    assert images.isfinite().all()
    # The next call is of another size.
    with pytest.raises(ValueError, match="statistics were fitted on"):
        families.images(pipe, name)


@pytest.mark.parametrize("name", ["flux", "flux2", "ltx"])
def test_statistics_of_packed_latents_are_refused(name: str) -> None:
    pipe = families.build(name)
    scheduler = pipe.scheduler
    packed = tiny.gaussian((16, 16), rank=6)
    with pytest.raises(ValueError, match=r"packed latents \(16, 16\).*Fit them again"):
        dx.apply_teleport(pipe, packed, 0.4)
    assert pipe.scheduler is scheduler
    assert hook_count(pipe) == 0


@pytest.mark.parametrize("name", ["flux", "flux2", "kandinsky5", "wan", "ltx", "cogvideox"])
def test_a_bare_scheduler_does_not_know_the_layout(name: str) -> None:
    pipe = families.build(name)
    stats = statistics(name)
    pipe.scheduler = dx.TeleportScheduler(pipe.scheduler, stats, 0.4, mean_from="first_call")
    with pytest.raises(ValueError, match=r"dx\.apply_teleport\(pipe\) if"):
        families.images(pipe, name, steps=5)
    wanted = families.images(
        dx.apply_teleport(families.build(name), stats, 0.4, mean_from="first_call"), name, steps=5
    )
    assert torch.equal(families.images(dx.apply_teleport(pipe), name, steps=5), wanted)


def test_pipelines_without_a_record_are_refused() -> None:
    pipe = tiny.build("sd3")

    class Other(torch.nn.Module):
        config = None

    pipe.transformer = Other()
    with pytest.raises(ValueError, match=r"StableDiffusion3Pipeline has a Other.*FAMILIES\["):
        dx.apply_teleport(pipe, tiny.gaussian((4, 8, 8), rank=6), 0.4)


def test_times_of_the_denoiser() -> None:
    for time in (750.0, 0.75, torch.tensor([750]), torch.full((2, 9), 0.75), torch.tensor(750.0).bfloat16()):
        assert _same_time(time, 750.0)
    # Tokens that are given as conditions have the time 0.
    for time in (None, 700.0, 0.25, torch.tensor([[750.0, 0.0]])):
        assert not _same_time(time, 750.0)


def test_wan_with_a_time_for_each_token() -> None:
    pipe = families.build("wan")
    pipe.register_to_config(expand_timesteps=True)
    before = families.images(pipe, "wan", steps=5)
    stats = statistics("wan")
    dx.apply_teleport(pipe, stats, 0.4)
    run = record(pipe, "wan", 1)
    # The noise is that of the usual call.
    start = in_grid("wan", plain("wan").shown[0][:1])
    levels = [(1 - float(s), float(s)) for s in run.sigmas[[0, 2]]]
    torch.testing.assert_close(run.shown[0], stats.transport(start, *levels), atol=1e-4, rtol=1e-4)
    assert torch.equal(families.images(dx.remove_teleport(pipe), "wan", steps=5), before)


@pytest.mark.parametrize("name", ["pixart", "zimage", "flux", "wan22", "kandinsky5", "cogvideox", "sd-pag"])
def test_calibration_on_every_kind_of_family(name: str) -> None:
    pipe, stats = families.build(name), statistics(name)
    call = families.inputs(name, 2)
    prompts = call.pop("prompt")
    call = {key: value for key, value in call.items() if key not in ("output_type", "num_inference_steps")}
    samples = stats.sample(2, generator=torch.Generator().manual_seed(0))
    found = dx.calibrate_skip(
        pipe,
        stats,
        prompts=prompts,
        samples=samples,
        num_inference_steps=2,
        refinement=1,
        progress=False,
        **call,
    ).calibration
    family = families.FAMILIES[name]
    guided = family.guided[str(family.guidance)]
    assert found["guidance_scale"] == guided + 1 - float(family.free_at or 0)
    # One call of the reference for each of its 50 steps, at least.
    assert found["calls"] >= 50
    assert set(found["sigma"]) == {"2"}
    assert torch.equal(families.images(pipe, name, 2, steps=5), plain(name).images)


def test_what_cannot_be_calibrated_is_refused() -> None:
    with pytest.raises(ValueError, match="DiTPipeline takes neither a prompt nor a batch_size"):
        dx.calibrate_skip(families.build("dit"), statistics("dit"), progress=False)
    with pytest.raises(ValueError, match="StableDiffusionPipeline takes no batch_size: give prompts"):
        dx.calibrate_skip(families.build("sd"), statistics("sd"), progress=False)
    with pytest.raises(ValueError, match=r"QwenImagePipeline does not follow.*true_cfg_scale=1"):
        dx.calibrate_skip(
            families.build("qwen"),
            statistics("qwen"),
            prompts=["a"],
            negative_prompt="b",
            true_cfg_scale=3.0,
            progress=False,
        )


@pytest.mark.parametrize("name", ["flux", "flux2", "qwen", "zimage", "ltx", "kandinsky5", "auraflow"])
def test_means_from_a_call_without_guidance(name: str) -> None:
    pipe, stats = families.build(name), statistics(name)
    call = {**families.inputs(name, 2, guided=False), "num_inference_steps": 5}
    prompts = call.pop("prompt")
    call = {key: value for key, value in call.items() if key not in ("output_type", "guidance_scale")}
    found = dx.prompt_means(pipe, stats, prompts, seed=7, **call)
    assert found.shape == (2, *stats.shape)
    # Of one image, from the plain call: D = x − σv, and the mean for which the Gaussian denoises x to D.
    run = record(families.build(name), name, 2, guided=False)
    output, x = (in_grid(name, value)[:1] for value in run.steps[0])
    sigma = float(run.sigmas[0])
    wanted = stats.implied_mean(x, x - sigma * output, (1 - sigma, sigma))
    if name != "flux2":  # its unguided record has another embedded scale than the default
        torch.testing.assert_close(found[:1], wanted, atol=1e-3, rtol=1e-3)
    assert isinstance(pipe.scheduler, diffusers.FlowMatchEulerDiscreteScheduler)
