"""The runs of benchmarks/golden_noise.py: which there are, how each starts, and how their outcomes are kept."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import kept
import numpy as np
import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler
from torch import Tensor

import diffusers_ext as dx
from diffusers_ext.core.images import as_tensor
from diffusers_ext.core.prompts import prompt_embeddings
from diffusers_ext.golden_noise.apply import predict
from diffusers_ext.golden_noise.training import equal_norm, rescaled, sample
from diffusers_ext.testbed import fashion_scenes
from diffusers_ext.testbed.base_training import reconstruct
from diffusers_ext.testbed.embedded import card_dir
from diffusers_ext.testbed.grader import confidence, grade, load_grader, scene_features

SIZE: dict[str, Any] = {"height": 32, "width": 64}
GUIDANCES = (1.0, 1.5, 2.0, 3.0)
STEPS = 6
# Of training/collect_noise_pairs.py, for the true re-denoised noise.
PAIRS: dict[str, Any] = {"num_inference_steps": 20, "guidance_scale": 5.5}
BEST_OF = 4
SHOWN = 8


@dataclass(frozen=True)
class Job:
    """Images of all prompts from one seed each: what the noise is and how it is sampled.

    Attributes:
        variant: `plain`, `npnet`, `re-denoised`, `random`, `shuffled` or `rescaled`.
        guidance, steps, spacing: of the sampling; spacing is the scheduler's `timestep_spacing`.
        draw: number of the noise; `BEST_OF` draws belong to one seed of the comparison.
        strength: of the change of the noise.
    """

    variant: str
    guidance: float
    draw: int
    steps: int = STEPS
    spacing: str = "leading"
    strength: float = 1.0

    @property
    def rows(self) -> float:
        """Denoiser rows an image: a guided step evaluates two."""
        extra = 3.0 if self.variant == "re-denoised" else 0.0
        return self.steps * (2 if self.guidance > 1 else 1) + extra


@dataclass
class Outcome:
    """Of n images: which are right, how sure the grader is, features (n, d), and the first few images."""

    aligned: np.ndarray
    confidence: np.ndarray
    features: np.ndarray
    pictures: np.ndarray


def jobs(num_seeds: int) -> list[Job]:
    """All runs, those that most depends on first."""
    found = []
    draws = [BEST_OF * s for s in range(num_seeds)]
    for guidance in GUIDANCES:
        for variant in ("plain", "npnet", "random", "shuffled", "rescaled", "re-denoised"):
            found += [Job(variant, guidance, draw) for draw in draws]
    found += [Job("npnet", 1.0, draw, strength=s) for s in (0.5, 2.0) for draw in draws]
    halves = [(variant, g) for g in GUIDANCES[1:] for variant in ("plain", "npnet")]
    found += [Job(variant, g, draw, steps=STEPS // 2) for variant, g in halves for draw in draws]
    found += [Job(v, 1.0, draw, spacing="trailing") for v in ("plain", "npnet") for draw in draws]
    found += [Job(v, 1.0, draw, steps=20) for v in ("plain", "npnet") for draw in draws]
    found += [Job("plain", 1.25, draw) for draw in draws]
    for guidance in GUIDANCES:
        found += [Job("plain", guidance, draw + k) for draw in draws for k in range(1, BEST_OF)]
    return found


def prompts(count: int) -> list[str]:
    """Held-out prompts, all different: pairs that training never showed, and single garments."""
    scenes = [*fashion_scenes.scenes("test"), *fashion_scenes.single_scenes()]
    order = np.random.default_rng(1).permutation(len(scenes))[:count]
    return [fashion_scenes.caption(scenes[i]) for i in order]


@lru_cache(maxsize=1)
def load() -> tuple[Any, dx.NPNetModel]:
    """The pipeline and its network."""
    pipe: Any = DiffusionPipeline.from_pretrained(card_dir("fashion-scenes"), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    npnet: Any = dx.NPNetModel.from_pretrained(card_dir("npnet-fashion-scenes"), torch_dtype=torch.float32)
    return pipe, npnet.eval()


@torch.no_grad()
def starts(job: Job, texts: list[str]) -> Tensor:
    """The noise that a job starts from, (n, 4, 8, 16)."""
    pipe, npnet = load()
    noise = torch.stack(
        [
            torch.randn(4, 8, 16, generator=torch.Generator().manual_seed(10_000_019 * job.draw + i))
            for i in range(len(texts))
        ]
    )
    if job.variant == "plain":
        return noise
    if job.variant == "re-denoised":
        original = pipe.scheduler
        parts = [
            dx.redenoise(pipe, x, prompt=texts[low : low + 64], **SIZE, **PAIRS)
            for low, x in zip(range(0, len(texts), 64), noise.split(64))
        ]
        assert pipe.scheduler is original
        return torch.cat(parts)
    embeds = prompt_embeddings(pipe, texts)
    if job.variant == "shuffled":
        embeds = embeds.rows(torch.arange(len(texts)).roll(1))
    golden = predict(npnet, noise, embeds)
    if job.variant == "random":
        golden = noise + equal_norm(golden - noise, torch.Generator().manual_seed(job.draw))
    if job.variant == "rescaled":
        golden = rescaled(noise, golden)
    return noise + job.strength * (golden - noise)


def run(job: Job, num_prompts: int, path: Path) -> Path:
    """Makes a job's images, grades them and writes the outcome, unless it is there."""
    if path.is_file():
        return path
    torch.set_num_threads(1)
    pipe, _ = load()
    texts = prompts(num_prompts)
    original = pipe.scheduler
    latents = starts(job, texts)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(original.config, timestep_spacing=job.spacing)
    options = {"num_inference_steps": job.steps, **SIZE}
    pictures = sample(pipe, texts, latents, batch_size=64, guidance_scale=job.guidance, **options)
    pipe.scheduler = original
    grader = load_grader()
    outcome = {
        "aligned": grade(grader, pictures, texts)["aligned"],
        "confidence": confidence(grader, pictures, texts),
        "features": scene_features(grader, pictures).astype(np.float32),
        "pictures": pictures[:SHOWN].astype(np.float16),
    }
    kept.write(path, outcome)
    return path


def job_path(job: Job, num_prompts: int, folder: Path) -> Path:
    """Where a job's outcome is kept: under everything that it depends on but the code."""
    # Plain and re-denoised noise don't depend on the network.
    alone = job.variant in ("plain", "re-denoised")
    folders = [card_dir("fashion-scenes") / "unet", *([] if alone else [card_dir("npnet-fashion-scenes")])]
    weights = kept.digest(file for name in folders for file in sorted(name.glob("*.safetensors")))
    key = f"{job}|{num_prompts}|{PAIRS if job.variant == 're-denoised' else ''}|{weights}"
    return folder / f"{kept.name_of(key, 20)}.npz"


def outcome(parts: Sequence[Path]) -> Outcome:
    """Outcomes of one variant's seeds as one, prompt by prompt: the seeds of a prompt follow each other."""
    loaded = [np.load(path) for path in parts]

    def interleave(name: str) -> np.ndarray:
        stacked = np.stack([part[name] for part in loaded], 1)
        return stacked.reshape(-1, *stacked.shape[2:])

    return Outcome(
        interleave("aligned"),
        interleave("confidence"),
        interleave("features").astype(np.float64),
        loaded[0]["pictures"].astype(np.float32),
    )


@torch.no_grad()
def real(data_dir: str, num_prompts: int, num_seeds: int) -> Outcome:
    """Real test garments composed for the same prompts, through the autoencoder."""
    texts = [text for text in prompts(num_prompts) for _ in range(num_seeds)]
    garments, items = fashion_scenes.load_garments(data_dir, "test")
    scenes = [fashion_scenes.parse_caption(text) for text in texts]
    drawn = np.stack(list(fashion_scenes.render(scenes, garments, items, seed=0)))
    pictures = reconstruct(load()[0].vae, as_tensor(drawn)).movedim(1, -1).numpy()
    grader = load_grader()
    right, sure = grade(grader, pictures, texts)["aligned"], confidence(grader, pictures, texts)
    return Outcome(right, sure, scene_features(grader, pictures), pictures[:SHOWN])


def best_of(candidates: Sequence[Outcome]) -> Outcome:
    """Of each image's candidates the one that the grader is surest of: the most that choosing can give."""
    choice = np.stack([c.confidence for c in candidates]).argmax(0)

    def choose(arrays: list[np.ndarray]) -> np.ndarray:
        return np.stack(arrays)[choice, np.arange(len(choice))]

    return Outcome(
        choose([c.aligned for c in candidates]),
        choose([c.confidence for c in candidates]),
        choose([c.features for c in candidates]),
        candidates[0].pictures,
    )
