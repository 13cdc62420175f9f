"""The inputs of a distillation (teacher pipeline, data, prompts and pairs) and its validation images."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm

from ..core.autoencoders import channels_of, vae_of
from ..core.images import save_grid
from ..core.pipeline import call_pipeline
from ..core.prompts import encode_prompts
from ..training.arguments import stored_class
from ..training.captioned import other_inputs
from ..training.data import Captions, TrainingImages, load_dataset
from ..training.encodings import Shards
from ..training.models import frozen_dtype, load_frozen
from ..training.recipes import dataset_record
from ..training.start import lock_folder
from ..training.transformers import FLOWS, flow_of_class
from .flows import check_flow_teacher, flow_parts
from .inputs import latent_size
from .pairs import teacher_pairs
from .pipelines import SIGNPipeline
from .projector import SIGMA, check_teacher, nearest_timestep


def load_teacher(args: argparse.Namespace, accelerator: Accelerator) -> tuple[Any, dict[str, Any]]:
    """The pipeline of the projector, and the record of the teacher.

    The network of the teacher, in float32, is the only trainable part.

    Raises:
        ValueError: see `check_trained_class`, before anything is loaded, and `untrained_projector`.
    """
    kind = stored_class(args)
    if kind is not None:  # else a class of another package
        check_trained_class(kind)
    teacher, stored = load_frozen(args, accelerator, trained=("unet",))
    check_trained_class(type(teacher))
    pipe = untrained_projector(teacher, args.sigma)
    pipe.unet.requires_grad_(True)
    pipe.set_progress_bar_config(disable=True)
    return pipe, stored


def check_trained_class(kind: type) -> None:
    """Raises a ValueError for the pipelines of flows: `SIGNObjective` has the noise schedule and the prompts of UNets."""
    if flow_of_class(kind):
        raise ValueError(
            f"SIGN's training is for teachers with a UNet, such as DDPM or Stable Diffusion, got {kind.__name__}, which is"
            " a flow. A projector of a flow can be made (diffusers_ext.sign.teacher.untrained_projector), but not be"
            " trained by this script."
        )


def untrained_projector(
    teacher: Any, sigma: float = SIGMA, held: bool = True, max_sequence_length: int | None = None
) -> Any:
    """A `SIGNPipeline` with the network of a diffusion or flow pipeline, held at the noise level `sigma`.

    Args:
        teacher: see `check_pipeline`.
        sigma: noise level relative to unscaled data; of a flow, σ/(1 − σ). The default is σ = 0.6.
        held: False for a time-conditional projector, of a flow only. See `flow_parts` for whose network it has.
        max_sequence_length: of a flow only, as in a call of the teacher.

    Raises:
        ValueError: see `check_pipeline`, `nearest_timestep` and `flow_sigma`; also for a UNet with an argument of flows.
    """
    check_pipeline(teacher)
    if flow_of_class(type(teacher)):
        return SIGNPipeline(**flow_parts(teacher, sigma, held, max_sequence_length))
    if not held or max_sequence_length is not None:
        raise ValueError(
            f"held=False and max_sequence_length are for flows, got {type(teacher).__name__}: leave them out."
        )
    parts = {name: teacher.components.get(name) for name in ("vae", "text_encoder", "tokenizer")}
    timestep = nearest_timestep(teacher.scheduler, sigma)
    return SIGNPipeline(teacher.unet, teacher.scheduler, **parts, timestep=timestep)


# What a projector takes over, and what Stable Diffusion has besides.
_PARTS = {"unet", "scheduler", "vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"}


def check_pipeline(pipe: Any) -> None:
    """Raises a ValueError unless SIGN can distill the pipeline.

    That is a pipeline of one UNet with at most one text encoder, such as DDPM or Stable Diffusion, see also
    `check_teacher`; or a flow, see `check_flow_teacher`.
    """
    expected = (
        "expected a pipeline with one UNet and at most one text encoder, such as DDPM or Stable Diffusion, or one of"
        f" {', '.join(FLOWS)}"
    )
    if isinstance(pipe, SIGNPipeline):
        raise ValueError(f"This pipeline is a projector already: {expected}.")
    if flow_of_class(type(pipe)):
        check_flow_teacher(pipe)
        return
    there = {name for name, part in getattr(pipe, "components", {}).items() if part is not None}
    extra = sorted(there - _PARTS)
    if extra or "unet" not in there:
        raise ValueError(f"{type(pipe).__name__} has {', '.join(extra) or 'no unet'}: {expected}.")
    inputs = other_inputs(pipe.unet)
    if inputs:
        what = next(iter(inputs.values()))
        raise ValueError(f"The UNet of {type(pipe).__name__} takes {what}: {expected}.")
    if ("text_encoder" in there) != (pipe.unet.config.get("cross_attention_dim") is not None):
        has = "a" if "text_encoder" in there else "no"
        takes = "no" if "text_encoder" in there else "a"
        raise ValueError(
            f"{type(pipe).__name__} has {has} text encoder, and its UNet takes {takes} prompt: {expected}."
        )
    check_teacher(pipe.unet, pipe.scheduler)
    vae_of(pipe)


def load_data(
    args: argparse.Namespace, pipe: Any
) -> tuple[Tensor, TrainingImages, Captions | None, dict[str, Any]]:
    """Loads the training data and, if the teacher has prompts, their captions.

    Returns:
        The data in the space of the network, (n, C, H, W) on the CPU, without augmentation; the images that they were
            encoded from; their captions or None; and the record of the data.
    """
    with_prompts = pipe.text_encoder is not None
    data = load_dataset(args, captions=with_prompts)
    images = TrainingImages(args, data, "L" if channels_of(pipe) == 1 else "RGB")
    encoded = []
    with torch.no_grad():
        for low in tqdm(range(0, len(data), 64), desc="reading images"):
            rows = range(low, min(low + 64, len(data)))
            encoded.append(pipe._encode(images.read(rows)[0] / 255).cpu())
    captions = Captions(args, data) if with_prompts else None
    record = {**dataset_record(args, data), "resolution": args.resolution}
    return torch.cat(encoded), images, captions, record


class Texts:
    """Encodes prompts for the network. Every prompt is encoded once."""

    def __init__(self, pipe: Any, device: torch.device) -> None:
        self.pipe, self.device = pipe, device
        self.known: dict[str, Tensor] = {}

    @torch.no_grad()
    def embeds(self, prompts: list[str]) -> Tensor:
        """The embeddings (n, tokens, width) of n prompts."""
        new = sorted(set(prompts) - self.known.keys())
        if new:
            found = encode_prompts(self.pipe, new, guidance=False)["prompt_embeds"]
            self.known.update(zip(new, found.float().cpu()))
        return torch.stack([self.known[prompt] for prompt in prompts]).to(self.device)

    def conditions(self, prompts: list[str]) -> dict[str, Tensor]:
        """The prompt arguments of the network."""
        return {"encoder_hidden_states": self.embeds(prompts)}

    def batch(self, prompts: list[str], guidance_scale: float) -> dict[str, Tensor]:
        """The prompt arguments of the objective."""
        found = {"prompt_embeds": self.embeds(prompts)}
        if guidance_scale != 1:
            found["negative_prompt_embeds"] = self.embeds([""] * len(prompts))
        return found


def collect_pairs(
    args: argparse.Namespace,
    accelerator: Accelerator,
    pipe: Any,
    texts: Texts,
    captions: Captions | None,
    made_of: Mapping[str, Any],
) -> Shards:
    """`noise` and the images `drawn` that the teacher generates from it.

    Pair i has `captions.numbered(i)`.

    Args:
        args, accelerator, pipe, texts, captions: see `train_sign.py`.
        made_of: records of the teacher, `model`, and of the images and captions, `data`.

    Raises:
        ValueError: the folder contains other pairs, or another run is writing to it.
    """
    source = {"components": args.source_components, "rank": args.source_rank}
    recipe = {
        "model": made_of["model"],
        # The source is fitted to the images, and pairs have their captions.
        "data": made_of["data"] if pipe.source or captions else None,
        "source": {**source, "timestep": pipe.config.timestep} if pipe.source else "white noise",
        "num_inference_steps": args.num_inference_steps,
        "guidance_scale": args.guidance_scale if captions else 1.0,
        "dtype": str(frozen_dtype(accelerator)),
    }

    def conditions_of(rows: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        assert captions is not None
        prompts = [captions.numbered(int(i)) for i in rows]
        return texts.conditions(prompts), texts.conditions([""] * len(prompts))

    size = pipe.unet.config.in_channels, *latent_size(pipe)
    folder = args.pairs_dir or f"{args.output_dir}/pairs"
    # Not for the whole run: finished pairs may be shared.
    lock = lock_folder(folder, "--pairs_dir") if accelerator.is_main_process else None
    try:
        accelerator.wait_for_everyone()
        return teacher_pairs(
            accelerator,
            folder,
            args.num_pairs,
            recipe,
            pipe.projector,
            size,
            args.num_inference_steps,
            conditions_of if captions else None,
            args.guidance_scale,
        )
    finally:
        if lock is not None:
            lock.release()


def save_samples(pipe: Any, data: Tensor, prompts: list[str] | None, path: Path) -> None:
    """Saves a grid of validation images.

    The rows are samples with 1, 2 and 4 steps, the one-step samples projected again, noisy data, and the
    noisy data projected.
    """
    count = len(data)
    texts = None if prompts is None else prompts[:count]
    generators = [torch.Generator().manual_seed(i) for i in range(count)]
    noisy_draw = torch.randn(data.shape, generator=torch.Generator().manual_seed(1)).to(data)
    rows = []
    for steps in (1, 2, 4):
        generators = [torch.Generator().manual_seed(i) for i in range(count)]
        options: dict[str, Any] = {"generator": generators, "num_inference_steps": steps}
        rows.append(call_pipeline(pipe, texts, 1 if texts else count, output_type="latent", **options).images)
    conditions = pipe._conditions(texts, count)
    noisy = data + 0.3 * noisy_draw
    rows += [pipe.projector(rows[0], **conditions), noisy, pipe.projector(noisy, **conditions)]
    shown = pipe._output(torch.cat(rows), "pt", True).images
    save_grid(shown.float().cpu(), count, path)
