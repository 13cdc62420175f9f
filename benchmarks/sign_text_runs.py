"""The measurements of `sign_text` and `sign_editing`: text-to-image teachers, their projectors, and how long both take."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler
from PIL import Image

import diffusers_ext as dx
from diffusers_ext.core.autoencoders import decode_latents
from diffusers_ext.core.images import as_tensor
from diffusers_ext.core.pipeline import call_pipeline
from diffusers_ext.core.storage import digest
from diffusers_ext.sign.conditions import Texts, start_means
from diffusers_ext.sign.source import PromptSource
from diffusers_ext.sign.teacher import untrained_projector
from diffusers_ext.sign.training import SIGNRows
from diffusers_ext.testbed import fashion_scenes
from diffusers_ext.testbed.base_training import reconstruct
from diffusers_ext.testbed.embedded import card_dir
from diffusers_ext.testbed.flow_models import flow_solver
from diffusers_ext.testbed.runs import held_out_prompts, run_scenes
from diffusers_ext.training.rows import rows_of_step

from .flow_runs import call_options, flow_reads, included, model_folder
from .framework.bench import Bench
from .framework.cells import content
from .framework.samples import CARDS, graded
from .framework.timing import peak_memory, take_turns
from .sign_candidates import objective_of

DPM, DDIM, EULER = "DPM++ 2M", "DDIM", "Euler"
SIZE: dict[str, Any] = {"height": 32, "width": 64}
LATENT = (4, 8, 16)


@dataclass(frozen=True)
class Base:
    """A teacher and its included projector.

    Attributes:
        name: of the teacher's card.
        folder, sign: of the teacher and of the projector.
        solvers: of the teacher, the best first.
        reads: what all images depend on.
    """

    name: str
    folder: Path
    sign: Path
    solvers: tuple[str, ...]
    reads: tuple[Path, ...]


def unet_base(bench: Bench) -> Base:
    """The UNet and its projector; in quick runs one that is not trained.

    Raises:
        ValueError: the projector has not been trained.
    """
    folder = card_dir("fashion-scenes")
    parts = (*(folder / part for part in ("unet", "vae", "text_encoder")), *CARDS.values())
    return Base("fashion-scenes", folder, _sign_of(bench, "fashion-scenes", folder), (DPM, DDIM), parts)


def flow_base(bench: Bench) -> Base:
    """The flow, with the same errors; in quick runs one with random weights."""
    folder = model_folder(bench, "gaussian")
    sign = _sign_of(bench, "fashion-flow", folder)
    return Base("fashion-flow", folder, sign, (DPM, EULER), flow_reads(folder))


def _sign_of(bench: Bench, name: str, folder: Path) -> Path:
    if not bench.quick:
        how = f"training/train_sign.py --pretrained_model_name_or_path model_cards/{name} --guidance_scale 2"
        return included(f"sign-{name}", f"{how}, see docs/methods/sign.md")
    place = bench.cache_dir / f"untrained-sign-{name}"
    if not (place / "model_index.json").is_file():
        sign = as_projector(load_teacher(folder))
        source = PromptSource.of(dx.GaussianStats.from_pretrained(folder / "gaussian"))
        sign.register_modules(source=source)
        sign.save_pretrained(place)
    return place


def as_projector(teacher: Any, sigma: float = 1.5) -> Any:
    """The projector of a teacher before its training, without a source."""
    sign = untrained_projector(teacher, sigma, **call_options(teacher))
    if sign.flow is not None:
        sign.register_to_config(sample_size=list(LATENT[1:]))
    return sign


@lru_cache(maxsize=2)
def load_teacher(folder: Path, solver: str = DPM) -> Any:
    """A teacher with a solver, from the highest noise level on, which matters with few steps."""
    pipe: Any = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    if call_options(pipe):
        pipe.scheduler = pipe.scheduler if solver == EULER else flow_solver()
    else:
        kind: Any = {DPM: DPMSolverMultistepScheduler, DDIM: DDIMScheduler}[solver]
        pipe.scheduler = kind.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    return pipe


@lru_cache(maxsize=2)
def load_sign(folder: Path, base: Path) -> Any:
    """A projector, or the LoRA of one on its teacher."""
    whole = (folder / "model_index.json").is_file()
    if whole:
        pipe: Any = dx.SIGNPipeline.from_pretrained(folder, dtype=torch.float32)
    else:
        pipe = dx.load_sign_lora(DiffusionPipeline.from_pretrained(base, dtype=torch.float32), folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sampled(folder: Path, solver: str, steps: int, guidance: float, seed: int, count: int) -> dict[str, Any]:
    """Images of the teacher for held-out prompts, graded."""
    pipe, prompts = load_teacher(folder, solver), held_out_prompts(count, seed)
    options = {**call_options(pipe), "num_inference_steps": steps, "guidance_scale": guidance}
    return graded(run_scenes(pipe, prompts, seed=seed, **options).images, prompts)


def projected(folder: Path, base: Path, steps: int, seed: int, count: int) -> dict[str, Any]:
    """Images of a projector for the same prompts and noise."""
    pipe, prompts = load_sign(folder, base), held_out_prompts(count, seed)
    return graded(run_scenes(pipe, prompts, seed=seed, num_inference_steps=steps).images, prompts)


@torch.no_grad()
def source_alone(folder: Path, base: Path, called: bool, seed: int, count: int) -> dict[str, Any]:
    """Images of a projector's source: decoded without noise, or after one call of the teacher at the held level."""
    sign, prompts = load_sign(folder, base), held_out_prompts(count, seed)
    pipe = as_projector(load_teacher(base), sign.sigma)
    pipe.register_modules(source=sign.source)
    pipe.set_progress_bar_config(disable=True)
    if called:
        return graded(run_scenes(pipe, prompts, seed=seed, num_inference_steps=1).images, prompts)
    seeds = [1_000_000 * seed + number for number in range(count)]  # as in `run_scenes`
    noise = torch.stack([torch.randn(*LATENT, generator=torch.Generator().manual_seed(n)) for n in seeds])
    latents = pipe.projector.start(noise, 0.0, start_means(pipe, pipe._conditions(prompts, count)))
    stock = load_teacher(base)
    pictures = torch.cat([decode_latents(stock, part) for part in latents.split(64)])
    return graded((pictures / 2 + 0.5).clamp(0, 1).movedim(1, -1).numpy(), prompts)


@torch.no_grad()
def real(base: Path, data_dir: Path, seed: int, count: int) -> dict[str, Any]:
    """Real test scenes of the same prompts, through the autoencoder."""
    drawn, prompts = fashion_scenes.scene_arrays(data_dir, "test", count, seed)
    return graded(reconstruct(load_teacher(base).vae, as_tensor(drawn)).movedim(1, -1).numpy(), prompts)


def seconds(
    base: Path, sign: Path, steps: tuple[int, ...], teacher: tuple[tuple[int, float], ...], rounds: int
) -> dict[str, Any]:
    """Seconds of a call for eight images, prompts and autoencoder included, in turns, on one thread.

    Args:
        base, sign: folders.
        steps: of the projector.
        teacher: steps and guidance scale of its calls.
        rounds: of the turns.
    """
    torch.set_num_threads(1)
    prompts = held_out_prompts(8, seed=0)
    own, pipe = load_sign(sign, base), load_teacher(base)
    common: dict[str, Any] = {**SIZE, "output_type": "np"}
    work = {
        f"SIGN, {n} step{'s' * (n > 1)}": partial(
            call_pipeline, own, prompts, num_inference_steps=n, **common
        )
        for n in steps
    }
    for n, guidance in teacher:
        options = {**common, **call_options(pipe), "num_inference_steps": n, "guidance_scale": guidance}
        work[f"teacher, {n} steps, guidance {guidance:g}"] = partial(call_pipeline, pipe, prompts, **options)
    return take_turns(work, rounds, 1, torch.device("cpu"), "seconds of a call")


# --- trainings ---


def teacher_images(
    bench: Bench, base: Base, count: int, steps: int, guidance: float, batch_size: int = 64
) -> str:
    """Images that the teacher makes of training prompts, as an image folder: its place for `Training`."""
    made_of = digest([content(base.folder), count, steps, guidance])
    name = f"teacher-images-{base.name}-{made_of}"
    folder = bench.cache_dir / "trained" / name
    if not (folder / "metadata.jsonl").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        pipe, prompts = load_teacher(base.folder), fashion_scenes.training_prompts(count, seed=3)
        options = {**call_options(pipe), "num_inference_steps": steps, "guidance_scale": guidance}
        images = run_scenes(pipe, prompts, seed=3, batch_size=batch_size, **options).images
        lines = []
        for number, (image, prompt) in enumerate(zip(images, prompts)):
            Image.fromarray((255 * image).round().astype(np.uint8)).save(folder / f"{number}.png")
            lines.append(json.dumps({"file_name": f"{number}.png", "text": prompt}))
        # Last, as the sign that all are there.
        (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return "{cache}/" + name


def step_seconds(
    base: Path,
    guidance: float,
    options: tuple[tuple[str, tuple[tuple[str, Any], ...]], ...],
    batch_size: int,
    rounds: int,
) -> dict[str, np.ndarray]:
    """CPU seconds of a training step by name, and of one guided call of the teacher for one image, "image"; (rounds,).

    Args:
        base: folder of the teacher.
        guidance: of the real score.
        options: of `train_sign.py`, by name.
        batch_size, rounds: of the steps.
    """
    torch.set_num_threads(1)
    teacher, prompts = load_teacher(base), held_out_prompts(batch_size, seed=0)
    given = inputs_of(teacher, prompts)
    work: dict[str, Any] = {
        name: partial(step, objective_of(teacher, dict(own), guidance), given) for name, own in options
    }
    call = {**SIZE, **call_options(teacher), "num_inference_steps": 2, "guidance_scale": 2.0}
    work["image"] = partial(call_pipeline, teacher, prompts, output_type="latent", **call)
    times = take_turns(work, rounds, 1, torch.device("cpu"), "seconds of a step", time.process_time)
    times["image"] /= 2 * batch_size
    return times


def inputs_of(teacher: Any, prompts: list[str]) -> dict[str, torch.Tensor]:
    """A batch of random latents for the objective, with these prompts and the empty one."""
    pipe, draw = as_projector(teacher), torch.Generator().manual_seed(0)
    texts = Texts(teacher, pipe, torch.device("cpu"), call_options(teacher).get("max_sequence_length"))
    texts.size = SIZE["height"], SIZE["width"]
    data = torch.randn(len(prompts), *LATENT, generator=draw)
    rows = SIGNRows(data, LATENT, None, None)(rows_of_step(0, 0, 0, len(prompts)))
    return {**rows, **texts.batch(prompts, guided=True)}


def step(objective: Any, given: dict[str, torch.Tensor]) -> None:
    """One forward and backward pass."""
    objective(**given).backward()


def memory(base: Path, options: tuple[tuple[str, Any], ...], batch_size: int) -> dict[str, Any]:
    """MB (10⁶ bytes) of the tensors after a training step, and by how much it raised the peak of the process.

    Args:
        base: folder of the teacher.
        options: of `train_sign.py`.
        batch_size: of the step.
    """
    teacher, device = load_teacher(base), torch.device("cpu")
    given, before = inputs_of(teacher, held_out_prompts(batch_size, seed=0)), peak_memory(device)
    objective = objective_of(teacher, dict(options), 2.0)
    trained = [p for p in objective.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    step(objective, given)
    optimizer.step()
    # A LoRA's copies of the network share its tensors.
    networks = {p.data_ptr(): p for p in objective.parameters()}.values()
    states = [v for state in optimizer.state.values() for v in state.values() if v.ndim]
    tensors = {
        "trained": trained,
        "parameters": networks,
        "gradients": [p.grad for p in trained if p.grad is not None],
        "optimizer": states,
    }
    found = {name: sum(t.numel() * t.element_size() for t in of) / 1e6 for name, of in tensors.items()}
    return {**found, "peak": (peak_memory(device) - before) * 2**30 / 1e6}
