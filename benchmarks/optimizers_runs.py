"""The runs of `optimizers`: one task, one optimizer, one learning rate, one seed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler
from diffusers.training_utils import EMAModel, cast_training_params
from diffusers.utils.logging import disable_progress_bar
from torch import Tensor, nn

import diffusers_ext as dx
from diffusers_ext.core.prompts import encode_prompts
from diffusers_ext.core.schedules import levels_at, noising_scheduler
from diffusers_ext.smooth_lora.training import SmoothLoraObjective
from diffusers_ext.smooth_lora.variation import StepwiseVariationLoss, double_differentiable
from diffusers_ext.testbed import base_models, fashion_scenes
from diffusers_ext.testbed.embedded import card_dir
from diffusers_ext.testbed.runs import run_garments
from diffusers_ext.training.lora import add_lora
from diffusers_ext.training.optimizers import (
    Muon,
    dropped_in_step,
    frozen,
    hidden_matrices,
    layers_of,
    make_optimizer,
)

from .framework.samples import graded
from .framework.timing import take_turns
from .pixel_pipeline import PixelPipeline

WARMUP, EMA_DECAY, VALIDATION_ROWS, SNR_GAMMA = 10, 0.95, 64, 5.0
SCENES, RANK, VARIATION_WEIGHT = 2000, 8, 1.0
# Name: (--optimizer, what is dropped, whether Muon only trains weights that are 2-D as they are).
ARMS: dict[str, tuple[str, str, bool]] = {
    "AdamW": ("adamw", "nothing", False),
    "Muon": ("muon", "nothing", False),
    "Drop-Muon": ("muon", "suffix", False),
    "Drop-Muon, subset": ("muon", "subset", False),
    "AdamW, suffix": ("adamw", "suffix", False),
    "Muon, 2-D only": ("muon", "nothing", True),
}


@dataclass(frozen=True)
class Run:
    """One training run; `sampled` are the steps after which images are made."""

    task: str
    arm: str
    rate: float
    seed: int
    steps: int
    batch: int
    sampled: tuple[int, ...] = ()

    def evaluated(self) -> list[int]:
        """The steps after which the validation loss is measured."""
        return sorted({max(1, round(self.steps * k / 8)) for k in range(1, 9)})


@dataclass
class Task:
    """A model to train: its objective, the tensors of a batch of rows, and a validation loss."""

    objective: nn.Module
    batch: Callable[[Tensor, torch.Generator], dict[str, Tensor]]
    rows: int
    validate: Callable[[], dict[str, float]]
    network: nn.Module
    pipe: Any = field(default=None)


@lru_cache(maxsize=1)
def _garments(data_dir: Path) -> Tensor:
    return torch.from_numpy(fashion_scenes.load_garments(data_dir, "train")[0])


@lru_cache(maxsize=1)
def _held_out_garments(data_dir: Path) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    images = torch.from_numpy(fashion_scenes.load_garments(data_dir, "test")[0])
    chosen = images[torch.randperm(len(images), generator=draw)[:VALIDATION_ROWS], None] / 127.5 - 1
    return chosen, torch.randn(chosen.shape, generator=draw), _timesteps()


def _timesteps() -> Tensor:
    return torch.linspace(0, 999, VALIDATION_ROWS).round().long()


def pixel_task(data_dir: Path, seed: int) -> Task:
    """The pixel model of model_cards/fashion-ddpm from scratch, trained as by training/train_base.py."""
    images = _garments(data_dir)
    torch.manual_seed(seed)
    unet = base_models.build_pixel_unet()
    scheduler = DDPMScheduler(clip_sample=False)
    objective = base_models.NoiseObjective(unet, scheduler, snr_gamma=SNR_GAMMA)

    def batch(index: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        return {
            "x": images[index, None] / 127.5 - 1,
            "noise": torch.randn(len(index), 1, 32, 32, generator=generator),
            "timesteps": torch.randint(1000, (len(index),), generator=generator),
        }

    @torch.no_grad()
    def validate() -> dict[str, float]:
        return {"loss": float(objective(*_held_out_garments(data_dir)))}

    return Task(objective, batch, len(images), validate, unet)


def _base() -> Any:
    disable_progress_bar()
    return DiffusionPipeline.from_pretrained(card_dir("fashion-scenes"), dtype=torch.float32)


@lru_cache(maxsize=1)
@torch.no_grad()
def _scenes(data_dir: Path) -> dict[str, Any]:
    pipe = _base()
    found: dict[str, Any] = {}
    for split, number in (("train", SCENES), ("test", VALIDATION_ROWS)):
        real, prompts = fashion_scenes.scene_arrays(data_dir, split, number)  # type: ignore[arg-type]
        parts = [
            dx.encode_images(pipe, part / np.float32(255)) for part in np.array_split(real, 1 + number // 256)
        ]
        embeds = encode_prompts(pipe, prompts, guidance=False)["prompt_embeds"].float()
        found[split] = torch.cat(parts).float(), embeds
    return found


def lora_task(data_dir: Path, seed: int) -> Task:
    """A Smooth-LoRA on model_cards/fashion-scenes, trained as by training/train_smooth_lora.py."""
    latents, embeds = _scenes(data_dir)["train"]
    pipe = _base()
    scheduler: Any = noising_scheduler(pipe.scheduler)
    torch.manual_seed(seed)
    add_lora(pipe.unet, RANK)
    cast_training_params(pipe.unet)
    variation = StepwiseVariationLoss(scheduler.config.prediction_type)
    objective = SmoothLoraObjective(pipe.unet, scheduler, variation, VARIATION_WEIGHT, SNR_GAMMA)

    def batch(index: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        shape = (len(index), *latents.shape[1:])
        return {
            "latents": latents[index],
            "noise": torch.randn(shape, generator=generator),
            "timesteps": torch.randint(1000, (len(index),), generator=generator),
            "direction": torch.randn(shape, generator=generator),
            "prompt_embeds": embeds[index],
        }

    def validate() -> dict[str, float]:
        clean, context = _scenes(data_dir)["test"]
        draw, timesteps = torch.Generator().manual_seed(1), _timesteps()
        noise, direction = (torch.randn(clean.shape, generator=draw) for _ in range(2))
        alpha, sigma = levels_at(scheduler, timesteps, clean)

        def denoise(sample: Tensor) -> Tensor:
            return pipe.unet(sample, timesteps, encoder_hidden_states=context).sample

        with double_differentiable(pipe.unet):
            found = variation(denoise, clean, noise, alpha, sigma, timesteps / 1000, direction)
        loss = objective._denoising_loss(found.output.detach(), clean, noise, timesteps)
        # Around the mean of these rows, as the running mean is another one in every run.
        spread = float(found.values.var(correction=0))
        return {"loss": float(loss) + VARIATION_WEIGHT * spread, "denoising": float(loss), "spread": spread}

    return Task(objective, batch, len(latents), validate, pipe.unet, pipe)


TASKS: dict[str, Callable[[Path, int], Task]] = {"pixel": pixel_task, "lora": lora_task}


def optimizer_of(arm: str, task: Task, rate: float) -> torch.optim.Optimizer:
    """The optimizer of an arm, made as the training scripts make theirs."""
    name, _, flat = ARMS[arm]
    if flat:
        named = {n: p for n, p in task.objective.named_parameters() if p.requires_grad}
        return Muon(
            named.items(), [n for n in hidden_matrices(task.objective) if named[n].ndim == 2], lr=rate
        )
    args: Any = SimpleNamespace(
        optimizer=name,
        use_8bit_adam=False,
        drop_muon_sharp=False,
        adam_beta1=0.9,
        adam_beta2=0.999,
        adam_epsilon=1e-8,
        adam_weight_decay=1e-2,
    )
    return make_optimizer(args, task.objective, rate)


def dropped_parameters(
    arm: str, layers: Sequence[Sequence[nn.Parameter]], seed: int, step: int
) -> list[nn.Parameter]:
    """What an arm does not update in a step; a subset has as many layers as the suffix of the same step."""
    dropping = ARMS[arm][1]
    if dropping == "nothing":
        return []
    suffix = dropped_in_step([layers], seed, step)
    if dropping == "suffix":
        return suffix
    number = next(k for k in range(len(layers)) if sum(map(len, layers[:k])) == len(suffix))
    draw = torch.Generator().manual_seed(seed * 1_000_003 + step)
    chosen = torch.randperm(len(layers), generator=draw)[:number].tolist()
    return [p for k in chosen for p in layers[k]]


def one_step(task: Task, optimizer: Any, batch: dict[str, Tensor], dropped: list[nn.Parameter]) -> None:
    """One step as in diffusers_ext/training/loop.py."""
    with frozen(dropped):
        task.objective(**batch).backward()
    nn.utils.clip_grad_norm_([p for p in task.objective.parameters() if p.grad is not None], 1.0)
    optimizer.step()
    optimizer.zero_grad()


def train(run: Run, data_dir: Path, images: int, inference_steps: int) -> dict[str, Any]:
    """Trains, and returns the validation losses of the averaged weights.

    With the steps `run.sampled`, of a pixel model also the graded images of the averaged weights after them, named
    "STEP NAME".
    """
    task = TASKS[run.task](data_dir, run.seed)
    layers = layers_of(task.objective)
    optimizer = optimizer_of(run.arm, task, run.rate)
    trained = [p for p in task.objective.parameters() if p.requires_grad]
    ema = EMAModel(trained, decay=EMA_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARMUP))
    found: dict[str, Any] = {"steps": [], "seconds": 0.0}
    task.objective.train()
    for step in range(run.steps):
        start = time.process_time()
        draw = torch.Generator().manual_seed(run.seed * 1_000_003 + step)
        batch = task.batch(torch.randint(task.rows, (run.batch,), generator=draw), draw)
        one_step(task, optimizer, batch, dropped_parameters(run.arm, layers, run.seed, step))
        schedule.step()
        ema.step(trained)
        found["seconds"] += time.process_time() - start
        if step + 1 in run.evaluated():
            ema.store(trained)
            ema.copy_to(trained)
            task.objective.eval()
            found["steps"].append(step + 1)
            for name, value in task.validate().items():
                found.setdefault(name, []).append(value)
            if step + 1 in run.sampled:
                kept = sample(task.network, images, inference_steps)
                found |= {f"{step + 1} {name}": value for name, value in kept.items()}
            task.objective.train()
            ema.restore(trained)
    return found


def sample(unet: nn.Module, images: int, steps: int) -> dict[str, Any]:
    """Images of a pixel model, graded."""
    scheduler: Any = DPMSolverMultistepScheduler.from_config(DDPMScheduler(clip_sample=False).config)
    pipe = PixelPipeline(unet, scheduler)  # type: ignore[arg-type]
    pipe.set_progress_bar_config(disable=True)
    return graded(run_garments(pipe, images, seed=0, batch_size=50, num_inference_steps=steps).images)


def seconds_per_step(
    task_name: str, arms: Sequence[str], batch: int, rounds: int, data_dir: Path
) -> dict[str, Any]:
    """Mean CPU seconds of a step of every arm, measured in turns."""
    torch.set_num_threads(1)
    work: dict[str, Callable[[], None]] = {}
    for arm in arms:
        task = TASKS[task_name](data_dir, 0)
        call = partial(
            _timed_step, task, layers_of(task.objective), optimizer_of(arm, task, 1e-4), arm, batch
        )
        work[arm] = partial(call, iter(range(rounds + 2)))
    found = take_turns(work, rounds, 2, torch.device("cpu"), f"{task_name}, steps", time.process_time)
    return {name: float(np.mean(values)) for name, values in found.items()}


def _timed_step(task: Task, layers: Any, optimizer: Any, arm: str, batch: int, rounds: Iterator[int]) -> None:
    number = next(rounds)
    draw = torch.Generator().manual_seed(number)
    rows = task.batch(torch.randint(task.rows, (batch,), generator=draw), draw)
    # Every layer is the first that is updated equally often.
    first = ARMS[arm][1] == "suffix"
    dropped = [p for layer in layers[: number % len(layers)] for p in layer] if first else []
    if ARMS[arm][1] == "subset":
        dropped = dropped_parameters(arm, layers, 0, number)
    one_step(task, optimizer, rows, dropped)
