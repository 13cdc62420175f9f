"""The measurements of `sign_editing`: real scenes that are edited by their prompts, spoilt scenes, and idempotence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import diffusers_ext as dx
from diffusers_ext.core.autoencoders import decode_latents
from diffusers_ext.core.images import as_tensor
from diffusers_ext.sign.conditions import Texts
from diffusers_ext.sign.figures import figures_of_images
from diffusers_ext.sign.flows import TIMES, flow_sigma
from diffusers_ext.sign.pairs import euler_flow, teacher_flow
from diffusers_ext.sign.projector import nearest_timestep
from diffusers_ext.sign.teacher import untrained_projector
from diffusers_ext.testbed import fashion_scenes
from diffusers_ext.testbed.base_training import reconstruct
from diffusers_ext.testbed.fashion_scenes import COLORS, ITEMS, SIZE, Garment
from diffusers_ext.testbed.grader import grade

from .flow_runs import call_options
from .framework.samples import JUDGES, SHOWN, graded
from .sign_runs import corrupt
from .sign_text_runs import DDIM, EULER, as_projector, load_sign, load_teacher
from .sign_text_runs import SIZE as SCENE

COLOR, ITEM, REMOVED = "colour replaced", "garment replaced", "second garment removed"
KINDS = (COLOR, ITEM, REMOVED)
GUIDANCE = 2.0
# Mean brightness. Scenes of two garments have more in their outer quarters, those of one garment almost none.
EMPTY = 0.03
BEFORE, SIGN, SDEDIT, INVERSION = "before", "SIGN", "SDEdit", "inversion"


def rows_an_image(method: str, steps: int) -> int:
    """Rows of the denoiser: SIGN is without guidance; an inversion too, and the two calls after it share their steps."""
    return {BEFORE: 0, SIGN: 1, SDEDIT: 2, INVERSION: 3}[method] * steps


# --- what is edited, and how it is graded ---


def to_edit(data_dir: Path, kind: str, count: int) -> tuple[np.ndarray, list[str], list[str]]:
    """Real test scenes (n, 32, 64, 3) of two garments, uint8, their prompts, and the prompts that they shall have."""
    draw = np.random.default_rng([61, KINDS.index(kind)])
    pairs = fashion_scenes.scenes("test")
    scenes = [pairs[i] for i in draw.permutation(len(pairs))[:count]]
    targets = []
    for left, right in scenes:
        if kind == COLOR:
            others = [color for color in COLORS if color != left.color]
            targets.append((replace(left, color=others[draw.integers(len(others))]), right))
        elif kind == ITEM:
            others = [item for item in ITEMS if item != left.item]
            targets.append((replace(left, item=others[draw.integers(len(others))]), right))
        else:
            targets.append((left,))
    garments, items = fashion_scenes.load_garments(data_dir, "test")
    images = np.stack(list(fashion_scenes.render(scenes, garments, items, seed=61)))
    return images, [fashion_scenes.caption(s) for s in scenes], [fashion_scenes.caption(s) for s in targets]


def words(judge: Any, images: np.ndarray, targets: Sequence[str], kind: str) -> tuple[np.ndarray, np.ndarray]:
    """(n,) whether the new word, and whether all words that were kept, are right.

    Of a scene whose second garment was removed, it is new that the outer quarters are empty, and the garment that is left
    has to be in the middle.
    """
    scenes = [fashion_scenes.parse_caption(text) for text in targets]
    if kind == REMOVED:
        outer = np.concatenate([images[:, :, : SIZE // 2], images[:, :, -SIZE // 2 :]], 2).max(3)
        return outer.mean((1, 2)) < EMPTY, grade(judge, images, targets)["aligned"]
    left, other = (_alone(judge, images, place, [s[place] for s in scenes]) for place in (0, 1))
    new, own = ("color", "item") if kind == COLOR else ("item", "color")
    return left[new], left[own] & other["aligned"]


def _alone(judge: Any, images: np.ndarray, place: int, garments: Sequence[Garment]) -> dict[str, np.ndarray]:
    """The grades of one of two garments: it is moved to the middle, where a scene of one garment has it."""
    middle = np.zeros_like(images)
    start = (images.shape[2] - SIZE) // 2
    middle[:, :, start : start + SIZE] = images[:, :, place * SIZE : (place + 1) * SIZE]
    return grade(judge, middle, [fashion_scenes.caption((garment,)) for garment in garments])


def edited(
    sign: Path,
    base: Path,
    kind: str,
    method: str,
    steps: int,
    strength: float,
    data_dir: Path,
    count: int,
) -> dict[str, Any]:
    """Scenes edited by one method.

    Args:
        sign, base: folders of the projector and of its teacher.
        kind: one of `KINDS`.
        method: `BEFORE` is the autoencoder alone.
        steps: of the method.
        strength: the noise level as a share of the projector's; of an inversion the share of the steps with the new prompt.
        data_dir, count: of the scenes.

    Returns:
        By judge whether the `new` word and the `kept` words are right, the distance `outside` of the edit, the `prompts`.
    """
    real, prompts, targets = to_edit(data_dir, kind, count)
    images = drawn(sign, base, real, prompts, targets, method, steps, strength)
    found: dict[str, Any] = {"prompts": np.array(prompts)}
    for name, load in JUDGES.items():
        found[f"new {name}"], found[f"kept {name}"] = words(load(), images, targets, kind)
    apart = np.abs(images - real.astype(np.float32) / 255)[:, :, SIZE:].mean((1, 2, 3))
    found["outside"] = np.full(len(real), np.nan) if kind == REMOVED else apart
    return found | {"pictures": images[:SHOWN].astype(np.float16)}


@torch.no_grad()
def drawn(
    sign: Path,
    base: Path,
    shown: np.ndarray,
    prompts: list[str],
    targets: list[str],
    method: str,
    steps: int,
    strength: float,
) -> np.ndarray:
    """(n, 32, 64, 3) float32 in [0, 1]: images with their prompts, edited to others; see `edited`."""
    parts = []
    for low in range(0, len(shown), 64):
        some = slice(low, low + 64)
        pictures, texts = as_tensor(shown[some]), targets[some]
        draws = [torch.Generator().manual_seed(900 + low + i) for i in range(len(pictures))]
        if method == BEFORE:
            found = reconstruct(load_teacher(base).vae, pictures).movedim(1, -1).numpy()
        elif method == SIGN:
            call = {"strength": strength, "num_inference_steps": steps, "generator": draws}
            found = load_sign(sign, base).edit(pictures, None, texts, output_type="np", **call).images
        elif method == SDEDIT:
            level = strength * load_sign(sign, base).sigma
            found = sdedit(base, pictures, texts, level, steps, draws)
        else:
            found = inverted(base, pictures, prompts[some], texts, steps, strength)
        parts.append(found)
    return np.concatenate(parts).astype(np.float32)


def sdedit(
    base: Path, pictures: Tensor, prompts: list[str], level: float, steps: int, draws: list[torch.Generator]
) -> np.ndarray:
    """Noise of the level, then the guided teacher: DPM++ 2M or, of a flow, Euler (Meng et al., arXiv:2108.01073)."""
    teacher = load_teacher(base)
    pipe = untrained_projector(teacher, in_weights=False)
    projector, more = pipe.projector, call_options(teacher)
    texts = Texts(teacher, pipe, torch.device("cpu"), more.get("max_sequence_length"))
    given = texts.conditions(prompts), texts.conditions([""] * len(prompts), negative=True), GUIDANCE
    latents = dx.encode_images(teacher, pictures)
    noise = torch.cat([torch.randn(1, *latents.shape[1:], generator=draw) for draw in draws])
    time: Any = TIMES * flow_sigma(level) if more else nearest_timestep(pipe.scheduler, level)
    alpha, sigma = projector.levels(torch.full((len(latents),), time), latents)
    noisy = alpha * latents + sigma * noise
    if more:
        clean = euler_flow(projector, noisy, steps, *given, timestep=time)
    else:
        clean = teacher_flow(teacher.unet, pipe.scheduler, noisy, steps, *given, timestep=time)
    return (decode_latents(teacher, clean) / 2 + 0.5).clamp(0, 1).movedim(1, -1).numpy()


def inverted(
    base: Path, pictures: Tensor, prompts: list[str], targets: list[str], steps: int, strength: float
) -> np.ndarray:
    """DDIM inversion with the own prompt, then the target's; of a flow by Euler steps."""
    pipe = load_teacher(base, EULER if (base / "transformer").is_dir() else DDIM)
    call = {**call_options(pipe), "num_inference_steps": steps}
    noise = dx.ddim_invert(pipe, dx.encode_images(pipe, pictures), prompts, **call)
    options: dict[str, Any] = {**call, **SCENE, "guidance_scale": GUIDANCE, "output_type": "np"}
    return dx.edit(pipe, prompts, targets, latents=noise, strength=strength, **options).images


# --- spoilt scenes ---


def restored(
    sign: Path,
    base: Path,
    corruption: str,
    method: str,
    steps: int,
    strength: float,
    data_dir: Path,
    count: int,
) -> dict[str, Any]:
    """Test scenes, corrupted and projected with their prompts, graded, with every image's PSNR in dB.

    Arguments are those of `edited`; `corruption` as for `corrupt`. Of `BEFORE`, nothing is done, and SIGN projects in one
    call.
    """
    real, prompts = fashion_scenes.scene_arrays(data_dir, "test", count, seed=62)
    clean = as_tensor(real)
    spoilt = corrupt(2 * clean - 1, corruption) / 2 + 0.5
    if method == BEFORE:
        images = spoilt.movedim(1, -1).numpy()
    elif method == SIGN:
        draws = [torch.Generator().manual_seed(900 + i) for i in range(len(spoilt))]
        call = {"strength": strength, "generator": draws, "output_type": "np"}
        images = load_sign(sign, base).project(spoilt, prompts, **call).images
    else:
        given = spoilt.movedim(1, -1).numpy(), prompts, prompts
        images = drawn(sign, base, *given, method, steps, strength)
    errors = np.square(images - clean.movedim(1, -1).numpy()).mean((1, 2, 3))
    return graded(images, prompts, psnr=-10 * np.log10(errors))


# --- idempotence with prompts ---


@torch.no_grad()
def idempotent(sign: Path, base: Path, trained: bool, data_dir: Path, count: int) -> dict[str, Any]:
    """`projector_figures` with prompts, and what a second projection with another prompt or with none makes of f(z, c).

    Args:
        sign, base: folders.
        trained: False is the teacher's network, held at the same level, from the same source.
        data_dir, count: of the test scenes.
    """
    pipe = load_sign(sign, base)
    if not trained:
        source = pipe.source
        pipe = as_projector(load_teacher(base), pipe.sigma)
        pipe.register_modules(source=source)
        pipe.set_progress_bar_config(disable=True)
    real, prompts = fashion_scenes.scene_arrays(data_dir, "test", count, seed=63)
    draws = [torch.Generator().manual_seed(700 + i) for i in range(count)]
    found: dict[str, Any] = figures_of_images(pipe, real, prompts, draws)
    draws = [torch.Generator().manual_seed(700 + i) for i in range(count)]
    made = pipe(prompts, generator=draws, output_type="pt").images
    others = [*prompts[1:], prompts[0]]
    changed = pipe.project(made, others, output_type="np").images
    kept = pipe.project(made, [""] * count, output_type="pt").images
    for name, load in JUDGES.items():
        found[f"own {name}"] = grade(load(), made.movedim(1, -1).numpy(), prompts)["aligned"].mean()
        found[f"other {name}"] = grade(load(), changed, others)["aligned"].mean()
    return found | {"no prompt": float((kept - made).abs().mean())}
