"""The pipeline classes with teleportation built in, also as custom pipelines and after saving."""

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline

import diffusers_ext as dx
from diffusers_ext.teleport import pipelines
from diffusers_ext.teleport.apply import hook_count
from diffusers_ext.teleport.pipelines import (
    TeleportDDPMPipeline,
    TeleportStableDiffusionPipeline,
    TeleportStableDiffusionXLPipeline,
)
from tests import tiny

pytestmark = pytest.mark.filterwarnings("ignore")

ROOT = Path(__file__).parents[2]
CLASSES: dict[str, Any] = {
    "sd": TeleportStableDiffusionPipeline,
    "sdxl": TeleportStableDiffusionXLPipeline,
    "ddpm": TeleportDDPMPipeline,
}
KNOWN = ("a aaa", "a bbb")
SIZE = {"height": 8, "width": 8, "num_inference_steps": 4, "output_type": "np"}


def build(name: str) -> Any:
    pipe = CLASSES[name].from_pipe(tiny.build(name))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def within_prompt() -> dx.GaussianStats:
    means = torch.stack([torch.full(tiny.LATENT_SHAPES["sd"], value) for value in (-1.0, 1.0)])
    return tiny.gaussian(tiny.LATENT_SHAPES["sd"], class_means=means, class_names=KNOWN)


@pytest.mark.parametrize("name", CLASSES)
def test_nothing_loaded_is_the_parent(name: str) -> None:
    stock, pipe = tiny.build(name), build(name)
    assert torch.equal(tiny.images(pipe, name, 2), tiny.images(stock, name, 2))
    assert issubclass(CLASSES[name], type(stock))
    own, parents = (inspect.signature(c.__init__).parameters for c in (CLASSES[name], type(stock)))
    assert {k: p.annotation for k, p in own.items()} == {k: p.annotation for k, p in parents.items()}
    back = type(stock).from_pipe(pipe)
    back.set_progress_bar_config(disable=True)
    assert torch.equal(tiny.images(back, name), tiny.images(stock, name))


@pytest.mark.parametrize("name", CLASSES)
def test_load_equals_apply_and_unload_undoes_it(name: str, tmp_path: Path) -> None:
    stock, pipe = tiny.build(name), build(name)
    before, scheduler = tiny.images(pipe, name), pipe.scheduler
    stats = tiny.gaussian(tiny.LATENT_SHAPES[name])
    stats.save_pretrained(tmp_path)
    dx.apply_teleport(stock, stats, skip=0.5)
    assert pipe.load_teleport(tmp_path, skip=0.5) is pipe
    assert torch.equal(tiny.images(pipe, name), tiny.images(stock, name))
    assert not torch.equal(tiny.images(pipe, name), before)
    for again in (lambda: pipe.load_teleport(stats, 0.5), lambda: pipe.fit_teleport(8, 2)):
        with pytest.raises(ValueError, match=r"on this pipeline already: call unload_teleport\(\) first"):
            again()
    assert pipe.unload_teleport() is pipe
    assert pipe.scheduler is scheduler
    assert torch.equal(tiny.images(pipe, name), before)
    with pytest.raises(OSError, match="could not be downloaded from the Hub"):
        pipe.load_teleport("nobody/nothing", skip=0.5)


@pytest.mark.parametrize("name", CLASSES)
def test_custom_pipeline_saves_and_loads(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diffusers.utils.dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(tmp_path / "cache"))
    custom: dict[str, Any] = {
        "custom_pipeline": str(ROOT / "pipelines" / f"teleport_{name}"),
        "trust_remote_code": True,
    }
    stock = tiny.build(name)
    stock.save_pretrained(tmp_path / "base")
    pipe: Any = DiffusionPipeline.from_pretrained(tmp_path / "base", **custom)
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe) is CLASSES[name]
    # Not bit by bit: where a file's weights lie in memory decides which kernels run.
    torch.testing.assert_close(tiny.images(pipe, name), tiny.images(stock, name), atol=1e-3, rtol=0)
    pipe.load_teleport(tiny.gaussian(tiny.LATENT_SHAPES[name]), sigma=2.0)
    with_it = tiny.images(pipe, name)
    pipe.save_pretrained(tmp_path / "saved")
    for loaded in (
        DiffusionPipeline.from_pretrained(tmp_path / "saved", **custom),
        CLASSES[name].from_pretrained(tmp_path / "saved"),
    ):
        loaded.set_progress_bar_config(disable=True)
        torch.testing.assert_close(tiny.images(loaded, name), with_it, atol=1e-3, rtol=0)


def test_two_ddpm_pipelines_on_one_denoiser() -> None:
    stock, pipe = tiny.build("ddpm"), build("ddpm")
    stats = tiny.gaussian(tiny.LATENT_SHAPES["ddpm"])
    pipe.load_teleport(stats, skip=0.5)
    alone = tiny.images(pipe, "ddpm")
    second = TeleportDDPMPipeline.from_pipe(pipe)
    second.set_progress_bar_config(disable=True)
    assert second.unet is pipe.unet
    assert second.scheduler is not pipe.scheduler
    assert hook_count(second) == hook_count(pipe) == 1
    assert torch.equal(tiny.images(second, "ddpm"), alone)
    assert torch.equal(tiny.images(pipe, "ddpm"), alone)
    second.unload_teleport()
    pipe.unload_teleport()
    assert torch.equal(tiny.images(second, "ddpm"), tiny.images(stock, "ddpm"))


# --- prompt means ---


def watch_means(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    given: list[Any] = []
    set_mean = pipe.scheduler.set_mean
    monkeypatch.setattr(
        pipe.scheduler, "set_mean", lambda mean, scale=1.0: (given.append(mean), set_mean(mean, scale))
    )
    return given


def watch_probes(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    probes: list[Any] = []
    real = pipelines.prompt_means

    def spy(pipe: Any, stats: Any, prompts: Any, **kwargs: Any) -> Any:
        probes.append((prompts, kwargs))
        return real(pipe, stats, prompts, **kwargs)

    monkeypatch.setattr(pipelines, "prompt_means", spy)
    return probes


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_every_row_gets_its_prompts_mean(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, stats = build(name), within_prompt()
    pipe.load_teleport(stats, skip=0.5)
    means, probes = watch_means(pipe, monkeypatch), watch_probes(monkeypatch)
    prompts = ["a bbb", "a new", "a aaa"]
    pipe(prompts, num_images_per_prompt=2, **SIZE)
    assert [p for p, _ in probes] == [["a new"]]
    assert probes[0][1] == {"height": 8, "width": 8}
    given, cleared = means
    assert cleared is None
    new = dx.prompt_means(pipe, stats, "a new", height=8, width=8)
    rows = torch.cat([stats.class_mean("a bbb"), new, stats.class_mean("a aaa")])
    torch.testing.assert_close(given, rows.repeat_interleave(2, dim=0))
    pipe(prompt="a new", **SIZE)  # remembered
    assert len(probes) == 1
    torch.testing.assert_close(means[2], new)
    pipe("a aaa", **SIZE)
    torch.testing.assert_close(means[4], stats.class_mean("a aaa"))
    pipe.unload_teleport()
    pipe.load_teleport(stats, skip=0.5)
    pipe(["a new", "a new"], **SIZE)  # and forgotten
    assert [p for p, _ in probes] == [["a new"], ["a new"]]


def test_prompt_mean_equals_setting_it_by_hand() -> None:
    pipe, stats = build("sd"), within_prompt()
    pipe.load_teleport(stats, skip=0.5)
    call = {**SIZE, "generator": torch.Generator().manual_seed(0)}
    own = pipe("a aaa", **call).images
    pipe.scheduler.set_mean(stats.class_mean("a aaa"))
    call["generator"].manual_seed(0)
    by_hand = pipe("a aaa", teleport_prompt_mean=False, **call).images
    assert (own == by_hand).all()
    pipe.scheduler.set_mean(None)
    call["generator"].manual_seed(0)
    assert (pipe("a aaa", teleport_prompt_mean=False, **call).images != own).any()


def test_map_follows_the_guidance_of_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = build("sd")
    total = tiny.gaussian(tiny.LATENT_SHAPES["sd"], top=6.0)
    pipe.load_teleport(dataclasses.replace(within_prompt(), unconditional=total), skip=0.5)
    scales: list[float] = []
    set_mean = pipe.scheduler.set_mean

    def record(mean: Any, scale: float = 1.0) -> None:
        scales.append(scale)
        set_mean(mean, scale)

    monkeypatch.setattr(pipe.scheduler, "set_mean", record)
    for options in ({"guidance_scale": 3.0}, {}, {"guidance_scale": 0.0}, {"negative_prompt": "a bbb"}):
        pipe("a aaa", **SIZE, **options)
    assert scales[::2] == [3.0, 7.5, 1.0, 1.0]
    pipe.unet.register_to_config(time_cond_proj_dim=8)
    assert pipe._guidance(pipe.scheduler.stats, {"guidance_scale": 3.0}) == 1.0


def test_statistics_without_class_means_probe_every_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, stats = build("sd"), tiny.gaussian(tiny.LATENT_SHAPES["sd"])
    pipe.load_teleport(dataclasses.replace(stats, unconditional=stats), skip=0.5)
    probes = watch_probes(monkeypatch)
    pipe("a aaa", **SIZE)
    assert [p for p, _ in probes] == [["a aaa"]]


def test_second_prompts_of_sdxl(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = build("sdxl")
    pipe.load_teleport(within_prompt(), skip=0.5)
    probes = watch_probes(monkeypatch)
    pipe(["a aaa", "a bbb"], prompt_2=["a ccc", "a ccc"], **SIZE)
    pipe(["a aaa", "a bbb"], prompt_2=["a ccc", "a ddd"], **SIZE)
    assert [(p, k["prompt_2"]) for p, k in probes] == [
        ("a aaa", ["a ccc"]),
        ("a bbb", ["a ccc"]),
        ("a bbb", ["a ddd"]),
    ]
    pipe("a aaa", prompt_2="a ddd", **SIZE)
    assert len(probes) == 4
    with pytest.raises(ValueError, match="There are 2 prompts and 1 in prompt_2"):
        pipe(["a aaa", "a bbb"], prompt_2=["a ccc"], **SIZE)


def test_prompt_mean_stays_out_of_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, stats = build("sd"), within_prompt()
    probes = watch_probes(monkeypatch)
    embeds = torch.zeros(1, 77, 16)
    pipe.load_teleport(stats, skip=0.5)
    with pytest.raises(ValueError, match=r"prompt_embeds is not a prompt text.*teleport_prompt_mean=False"):
        pipe(prompt_embeds=embeds, negative_prompt_embeds=embeds, **SIZE)
    pipe(prompt_embeds=embeds, negative_prompt_embeds=embeds, teleport_prompt_mean=False, **SIZE)
    with pytest.raises(ValueError, match="Provide either `prompt` or `prompt_embeds`"):
        pipe(**SIZE)
    with pytest.raises(ValueError, match="divisible by 8"):
        pipe("a aaa", height=9, width=8)
    assert pipe.scheduler._mean is None
    pipe.unload_teleport()
    pipe.load_teleport(stats, skip=0.5, mean_from="first_call")
    pipe("a new", **SIZE)
    pipe.unload_teleport()
    pipe.load_teleport(tiny.gaussian(stats.shape), skip=0.5)
    pipe("a new", **SIZE)
    assert probes == []
    signature = inspect.signature(pipe.__call__)
    assert signature.parameters["teleport_prompt_mean"].default is True
    assert "guidance_scale" in signature.parameters


def test_memory_of_prompt_means_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, stats = build("sd"), within_prompt()
    pipe.load_teleport(stats, skip=0.5)
    monkeypatch.setattr(pipelines, "_REMEMBERED", 2)
    monkeypatch.setattr(pipe, "_probe", lambda stats, p, given: torch.zeros(len(p), *stats.shape))
    for letter in "abcd":
        pipe._means_of(stats, {"prompt": f"a {letter}"})
    assert len(pipe._teleport_means) == 2


# --- fitting ---


def test_fit_from_own_samples() -> None:
    pipe = build("sd")
    stats = pipe.fit_teleport(
        8, 3, prompts=KNOWN, num_inference_steps=3, skip=0.5, progress=False, height=8, width=8
    )
    assert stats.class_names == KNOWN
    assert pipe.scheduler.stats is stats
    assert pipe("a aaa", **SIZE).images.shape == (1, 8, 8, 3)
    pipe.unload_teleport()
    with pytest.raises(ValueError, match="rank=7 needs more than 8 samples of 2"):
        pipe.fit_teleport(8, 7, prompts=KNOWN)


@pytest.mark.parametrize("name", ["sd", "ddpm"])
def test_fit_calibrates_for_auto(name: str) -> None:
    pipe = build(name)
    size = {"height": 8, "width": 8, "guidance_scale": 1.0} if name == "sd" else {}
    stats = pipe.fit_teleport(4, 2, num_inference_steps=2, progress=False, **size)
    assert list(stats.calibration["sigma"]) == ["2"]
    assert pipe.scheduler.skip == "auto"
