"""Golden noise against its controls on the embedded text-to-image model, at the same prompts and seeds."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler
from scipy.fft import dctn, idctn
from torch import Tensor

import diffusers_ext as dx
from diffusers_ext.core.images import as_tensor
from diffusers_ext.core.prompts import prompt_embeddings
from diffusers_ext.golden_noise.apply import predict
from diffusers_ext.golden_noise.training import equal_norm, rescaled, sample
from diffusers_ext.testbed import fashion_scenes
from diffusers_ext.testbed.base_training import reconstruct
from diffusers_ext.testbed.embedded import card_dir
from diffusers_ext.testbed.grader import confidence, load_grader

from .flow_runs import call_options
from .framework.bench import Bench
from .framework.cells import Cell
from .framework.plots import draw
from .framework.samples import CARDS, Samples, graded
from .framework.tables import quality
from .golden_noise_page import (
    BEST_OF,
    LOWEST,
    NAMES,
    ROUNDS,
    STEPS,
    Job,
    Settings,
    jobs_of,
    main_table,
    more_tables,
    panels,
)

WRITES = ("golden_noise.md", "golden_noise.png", "golden_noise_pictures.png")
BASE, NPNET = card_dir("fashion-scenes"), card_dir("npnet-fashion-scenes")
READS = (BASE / "unet", BASE / "vae", BASE / "text_encoder", *CARDS.values())
SIZE: dict[str, Any] = {"height": 32, "width": 64}
# Of training/collect_noise_pairs.py, for the true re-denoised noise: of the UNet and of the flow.
PAIRS: dict[str, Any] = {"num_inference_steps": 20, "guidance_scale": 5.5}
FLOW_PAIRS: dict[str, Any] = {"jump": 0.05, "guidance_scale": 5.5, "num_rounds": 2}
PLACES = 8


def cells_of(job: Job, settings: Settings) -> list[Cell]:
    """A cell for each seed."""
    # Plain and re-denoised noise don't depend on the network.
    reads = READS if job.variant in ("plain", "re-denoised") else (*READS, NPNET)
    return [Cell(images, (job, seed, settings.prompts), reads) for seed in range(settings.seeds)]


def prompts(count: int) -> list[str]:
    """Held-out prompts, all different: pairs that training never showed, and single garments."""
    scenes = [*fashion_scenes.scenes("test"), *fashion_scenes.single_scenes()]
    order = np.random.default_rng(1).permutation(len(scenes))[:count]
    return [fashion_scenes.caption(scenes[i]) for i in order]


@lru_cache(maxsize=1)
def load(base: Path = BASE) -> Any:
    """The pipeline."""
    pipe: Any = DiffusionPipeline.from_pretrained(base, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@lru_cache(maxsize=1)
def load_npnet(folder: Path) -> dx.NPNetModel:
    """The network."""
    npnet: Any = dx.NPNetModel.from_pretrained(folder, torch_dtype=torch.float32)
    return npnet.eval()


@torch.no_grad()
def starts(job: Job, draw: int, texts: list[str], base: Path = BASE, folder: Path = NPNET) -> Tensor:
    """The noise that a job starts from, (n, 4, 8, 16)."""
    pipe = load(base)
    call = {**SIZE, **call_options(pipe)}
    seeds = [10_000_019 * draw + i for i in range(len(texts))]
    noise = torch.stack([torch.randn(4, 8, 16, generator=torch.Generator().manual_seed(s)) for s in seeds])
    if job.variant == "plain":
        return noise
    if job.variant == "re-denoised":
        settings = FLOW_PAIRS if call_options(pipe) else PAIRS
        parts = [
            dx.redenoise(pipe, x, prompt=texts[low : low + 64], **call, **settings)
            for low, x in zip(range(0, len(texts), 64), noise.split(64))
        ]
        return torch.cat(parts)
    npnet, embeds = load_npnet(folder), prompt_embeddings(pipe, texts, **call_options(pipe))
    if job.variant == "shuffled":
        embeds = embeds.rows(torch.arange(len(texts)).roll(1))
    golden = predict(npnet, noise, embeds)
    for _ in range(1, ROUNDS.get(job.variant, 1)):
        golden = predict(npnet, golden, embeds)
    if job.variant in LOWEST:
        golden = noise + low_frequencies(golden - noise, LOWEST[job.variant])
    if job.variant == "random":
        golden = noise + equal_norm(golden - noise, torch.Generator().manual_seed(draw))
    if job.variant == "rescaled":
        golden = rescaled(noise, golden)
    return noise + job.strength * (golden - noise)


def low_frequencies(change: Tensor, count: int) -> Tensor:
    """The `count` lowest frequencies of the height and twice as many of the width of (n, c, h, w), by the cosine transform."""
    waves: Any = dctn(change.numpy(), axes=(2, 3), norm="ortho")
    waves[:, :, count:], waves[:, :, :, 2 * count :] = 0, 0
    return torch.from_numpy(idctn(waves, axes=(2, 3), norm="ortho"))


def images(job: Job, seed: int, num_prompts: int, base: Path = BASE, folder: Path = NPNET) -> dict[str, Any]:
    """One seed's images, graded; those of a flow by its own solver, Euler."""
    pipe = load(base)
    texts = prompts(num_prompts)
    latents = starts(job, BEST_OF * seed + job.candidate, texts, base, folder)
    original, more = pipe.scheduler, call_options(pipe)
    if not more:
        config = original.config
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(config, timestep_spacing=job.spacing)
    options = {"num_inference_steps": job.steps, "guidance_scale": job.guidance, **SIZE, **more}
    pictures = sample(pipe, texts, latents, batch_size=64, **options)
    pipe.scheduler = original
    return graded(pictures, texts, confidence=confidence(load_grader(), pictures, texts))


@torch.no_grad()
def real(data_dir: Path, num_prompts: int, seeds: int) -> dict[str, Any]:
    """Real test garments composed for the same prompts, through the autoencoder."""
    texts = prompts(num_prompts) * seeds
    garments, items = fashion_scenes.load_garments(data_dir, "test")
    scenes = [fashion_scenes.parse_caption(text) for text in texts]
    drawn = np.stack(list(fashion_scenes.render(scenes, garments, items, seed=0)))
    pictures = reconstruct(load().vae, as_tensor(drawn)).movedim(1, -1).numpy()
    return graded(pictures, texts)


def main(bench: Bench) -> None:
    """Makes the images that are missing, and writes the page."""
    settings = bench.pick(Settings(), Settings(3, 2, (1.0, 2.0), (2,), (0.5,)))
    found = bench.samples({job: cells_of(job, settings) for job in jobs_of(settings)})
    write(bench, "golden_noise", "DPM++ 2M", settings, found)


def write(bench: Bench, name: str, solver: str, settings: Settings, found: dict[Job, Samples]) -> None:
    """Writes the page of a model and its pictures."""
    cell = Cell(real, (bench.data_dir, settings.prompts, settings.seeds), READS)
    statistics = bench.statistics("scenes")
    measures = quality(statistics, diversity=True)
    count = settings.prompts * settings.seeds
    bench.write(
        f"{name}.md",
        f"{solver}, {STEPS} steps, {count:,} images a row: {settings.prompts} held-out prompts, {settings.seeds} seeds each,"
        " the same in every row.",
        main_table(found, settings, measures, Samples.of([bench.run([cell])[cell]])),
        "Intervals are over prompts. A row is one evaluation of the denoiser for one image; guided steps take two. *Best of"
        " N* is chosen by the first grader, the most that choosing can give. FD∞ of a perfect model (real train against real test"
        f" images) {statistics.floor('grader'):.2f}.",
        *more_tables(found, settings, measures),
    )
    draw(bench.path(f"{name}.png"), panels=panels(found, settings, statistics), columns=3)
    shown = [("plain", 1.0), ("npnet", 1.0), ("re-denoised", 1.0), ("plain", 2.0), ("npnet", 2.0)]
    strips = {f"{NAMES[v]}, guidance {g:g}": found[Job(v, g)].pictures[:PLACES] for v, g in shown}
    draw(bench.path(f"{name}_pictures.png"), strips, captions=prompts(settings.prompts)[:PLACES])
