"""The inputs of a distillation (teacher pipeline, data, prompts and pairs) and its validation images."""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from torch import Tensor
from tqdm.auto import tqdm

from ..core.autoencoders import channels_of, vae_of
from ..core.families import DENOISERS, check_starts_from_noise, denoiser_of, guidance_of
from ..core.hooks import parameters_of
from ..core.images import save_grid
from ..core.pipeline import call_pipeline
from ..core.prompts import differing_options, prompt_options
from ..core.schedules import prediction_type
from ..core.storage import tensors_digest
from ..training.captioned import other_inputs
from ..training.data import Captions, TrainingImages, load_dataset
from ..training.encodings import Shards
from ..training.models import freeze, frozen_dtype, load_frozen
from ..training.recipes import dataset_record
from ..training.start import lock_folder
from ..training.transformers import FLOWS, flow_of_class
from .conditions import Texts, start_means, takes_sizes
from .flows import check_flow_teacher, flow_parts, hold_in_weights, holds_in_weights
from .inputs import encode_data, latent_size
from .pairs import teacher_pairs
from .pipelines import SIGNPipeline
from .projector import SIGMA, check_teacher, nearest_timestep
from .source import MixtureSource, PromptSource, Source


def load_teacher(args: argparse.Namespace, accelerator: Accelerator) -> tuple[Any, dict[str, Any]]:
    """The teacher's pipeline, frozen, and its record. Its denoiser stays in float32 unless it gets a LoRA.

    Raises:
        ValueError: see `check_pipeline`.
    """
    teacher, stored = load_frozen(args, accelerator, trained=() if args.rank else DENOISERS)
    check_pipeline(teacher)
    return teacher, stored


def load_start(args: argparse.Namespace, accelerator: Accelerator, teacher: Any) -> Any:
    """The denoiser of the pipeline or of the projector `--projector`, frozen as the teacher's, or None.

    Raises:
        ValueError: it takes or predicts something else than the teacher's, or is a projector held at another level.
    """
    if args.projector is None:
        return None
    kind: Any = DiffusionPipeline
    # No stock pipeline has a component of this name.
    if "source" in DiffusionPipeline.load_config(args.projector, cache_dir=args.cache_dir):
        kind = SIGNPipeline
    pipe: Any = kind.from_pretrained(args.projector, dtype=torch.float32, cache_dir=args.cache_dir)
    projector = kind is SIGNPipeline
    if not projector:
        check_pipeline(pipe)
    own, theirs = _signature(pipe), _signature(teacher)
    if projector:
        own["class"], theirs["class"] = (type(denoiser_of(part)).__name__ for part in (pipe, teacher))
    differing = [
        f"{name} {own[name]} there, {theirs[name]} here" for name in own if own[name] != theirs[name]
    ]
    # A timestep is a little off the level that was asked for.
    if projector and not math.isclose(pipe.sigma, args.sigma, rel_tol=0.02):
        differing.append(f"noise level {round(pipe.sigma, 3)} there, {args.sigma} here")
    if differing:
        raise ValueError(
            f"The network of --projector and the teacher's differ in {'; '.join(differing)}: use a network that was pruned"
            " from the teacher, or a projector of the teacher."
        )
    network = denoiser_of(pipe).requires_grad_(False).eval().to(accelerator.device)
    if args.rank:
        freeze(network, accelerator)
    return network


def _signature(pipe: Any) -> dict[str, Any]:
    """What two denoisers need to have in common to be called in the same way."""
    config, scheduler = denoiser_of(pipe).config, pipe.scheduler
    names = ("in_channels", "out_channels", "sample_size", "cross_attention_dim", "joint_attention_dim")
    found = {name: config.get(name) for name in names}
    alphas = getattr(scheduler, "alphas_cumprod", None)
    return {
        "class": type(pipe).__name__,
        **found,
        "prediction type": prediction_type(scheduler),
        "noise schedule": None if alphas is None else tensors_digest({"alphas": alphas}),
    }


def untrained_projector(
    teacher: Any,
    sigma: float = SIGMA,
    held: bool = True,
    max_sequence_length: int | None = None,
    in_weights: bool = True,
) -> Any:
    """A `SIGNPipeline` with the network of a diffusion or flow pipeline, held at the noise level `sigma`.

    Args:
        teacher: see `check_pipeline`.
        sigma: noise level relative to unscaled data; of a flow, σ/(1 − σ). The default is σ = 0.6.
        held: False for a time-conditional projector, of a flow only.
        max_sequence_length: of a flow only, as in a call of the teacher.
        in_weights: hold the time in the weights of a copy of the flow's network, unless its embedder has no bias (Flux.2)
            or it is not held. All other projectors have the network of the teacher.

    Raises:
        ValueError: see `check_pipeline`, `nearest_timestep` and `flow_sigma`; also for a UNet with an argument of flows.
    """
    check_pipeline(teacher)
    if flow_of_class(type(teacher)):
        sign = SIGNPipeline(**flow_parts(teacher, sigma, held, max_sequence_length))
        if in_weights and holds_in_weights(sign):
            sign.register_modules(transformer=copy.deepcopy(sign.transformer))
            hold_in_weights(sign)
        return sign
    if not held or max_sequence_length is not None:
        raise ValueError(
            f"held=False and max_sequence_length are for flows, got {type(teacher).__name__}: leave them out."
        )
    names = ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    parts = {name: teacher.components.get(name) for name in names}
    timestep = nearest_timestep(teacher.scheduler, sigma)
    return SIGNPipeline(teacher.unet, teacher.scheduler, **parts, timestep=timestep)


# What a projector takes over, and what Stable Diffusion has besides.
_PARTS = {"unet", "scheduler", "vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"}


def check_pipeline(pipe: Any) -> None:
    """Raises a ValueError unless SIGN can distill the pipeline.

    That is a pipeline of one UNet without prompts or with those of Stable Diffusion or SDXL, see also `check_teacher`; or
    a flow, see `check_flow_teacher`.
    """
    expected = (
        "expected a pipeline with one UNet, such as DDPM, Stable Diffusion or SDXL, or one of"
        f" {', '.join(FLOWS)}"
    )
    if isinstance(pipe, SIGNPipeline):
        raise ValueError(f"This pipeline is a projector already: {expected}.")
    if flow_of_class(type(pipe)):
        check_flow_teacher(pipe)
        return
    there = {name for name, part in getattr(pipe, "components", {}).items() if part is not None}
    sized = "unet" in there and takes_sizes(pipe.unet)
    second = {"text_encoder_2", "tokenizer_2"}
    extra = sorted(there - _PARTS - (second if sized else set()))
    if extra or "unet" not in there:
        raise ValueError(f"{type(pipe).__name__} has {', '.join(extra) or 'no unet'}: {expected}.")
    missing = sorted({"text_encoder", *second} - there) if sized else []
    if missing:
        raise ValueError(f"{type(pipe).__name__} has no {', '.join(missing)}, as SDXL has: {expected}.")
    inputs = other_inputs(pipe.unet)
    if sized:
        del inputs["addition_embed_type"]
    if inputs:
        what = next(iter(inputs.values()))
        raise ValueError(f"The UNet of {type(pipe).__name__} takes {what}: {expected}.")
    if ("text_encoder" in there) != (pipe.unet.config.get("cross_attention_dim") is not None):
        has = "a" if "text_encoder" in there else "no"
        takes = "no" if "text_encoder" in there else "a"
        raise ValueError(
            f"{type(pipe).__name__} has {has} text encoder, and its UNet takes {takes} prompt: {expected}."
        )
    if hasattr(pipe, "prepare_latents"):
        check_starts_from_noise(pipe)
    check_teacher(pipe.unet, pipe.scheduler)
    vae_of(pipe)


def settle_guidance(args: argparse.Namespace, teacher: Any) -> tuple[float, float | None]:
    """The scale w of u + w(c − u) in the real score, and the scale that a transformer with embedded guidance is told.

    Args:
        args: with `guidance_scale`, or None for 1 and, of embedded guidance, the default of the teacher's call.
        teacher: the teacher's pipeline.

    Raises:
        ValueError: a scale other than 1 for a teacher without prompts or without classifier-free guidance.
    """
    given, plain = args.guidance_scale, type(teacher).__name__
    if getattr(teacher, "text_encoder", None) is None:
        for name in ("guidance_scale", "fake_guidance_scale"):
            if getattr(args, name) not in (None, 1):
                raise ValueError(
                    f"--{name} {getattr(args, name):g} needs a teacher with prompts, and {plain} has none: omit it."
                )
        return 1.0, None
    guidance = guidance_of(teacher)
    if (guidance.embedded or guidance.argument is None) and args.fake_guidance_scale != 1:
        raise ValueError(
            f"--fake_guidance_scale {args.fake_guidance_scale:g} needs classifier-free guidance in training, which {plain}"
            " does not have: omit it."
        )
    if guidance.embedded:
        default = parameters_of(teacher)[guidance.embedded].default
        return 1.0, float(default if given is None else given)
    guidance.call(1.0 if given is None else given)  # refuses
    return 1.0 if given is None else given, None


def make_source(args: argparse.Namespace, teacher: Any, data: Tensor, stats: Any) -> Source | None:
    """The source of a projector: that of `--source`, by default of prompts where there are statistics with a prompt map.

    Args:
        args: with `source`, `source_components`, `source_rank` and `max_sequence_length`.
        teacher: the teacher's pipeline.
        data: (n, C, H, W) in the space of the network.
        stats: the teacher's `GaussianStats`, or None.

    Raises:
        ValueError: a source of prompts without prompts, without statistics or with those of other prompts or latents.
    """
    prompts = getattr(teacher, "text_encoder", None) is not None
    fitted = None if stats is None else stats.prompt_map
    kind = args.source or ("prompts" if prompts and fitted else "mixture")
    if kind == "white":
        return None
    if kind == "mixture":
        return MixtureSource.fit(data, args.source_rank, args.source_components)
    if not prompts:
        raise ValueError(
            f"--source prompts needs a teacher with prompts, and {type(teacher).__name__} has none: use mixture or"
            " white."
        )
    if stats is None:
        raise ValueError(
            "--source prompts needs the statistics of the teacher's latents with a prompt map: give their folder with"
            " --gaussian, or use --source mixture or white."
        )
    source = PromptSource.of(stats)
    if tuple(stats.shape) != tuple(data.shape[1:]):
        raise ValueError(
            f"The statistics are of latents {tuple(stats.shape)}, and the images have {tuple(data.shape[1:])}: fit them"
            " at the --resolution of the training, or use --source mixture or white."
        )
    length = args.max_sequence_length
    options = prompt_options(teacher, {} if length is None else {"max_sequence_length": length})
    differing = differing_options(fitted.options, options) if fitted else None
    if differing:
        raise ValueError(f"The prompt map was fitted to other embeddings of the prompts: {differing}")
    return source


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
            encoded.append(encode_data(pipe, images.read(rows)[0] / 255).float().cpu())
    captions = Captions(args, data) if with_prompts else None
    record = {**dataset_record(args, data), "resolution": args.resolution}
    return torch.cat(encoded), images, captions, record


def collect_pairs(
    args: argparse.Namespace,
    accelerator: Accelerator,
    pipe: Any,
    texts: Texts,
    captions: Captions | None,
    made_of: Mapping[str, Any],
    guidance_scale: float,
) -> Shards:
    """`noise` and the images `drawn` that the teacher generates from it, in shards.

    Pair i has `captions.numbered(i)`.

    Args:
        args, accelerator, pipe, texts, captions: see `train_sign.py`.
        made_of: records of the teacher, `model`, of the images and captions, `data`, and of the `source`.
        guidance_scale: see `settle_guidance`.

    Raises:
        ValueError: the folder contains other pairs, or another run is writing to it.
    """
    recipe = {
        "model": made_of["model"],
        # The source may be fitted to the images, and pairs have their captions.
        "data": made_of["data"] if pipe.source or captions else None,
        "source": {**made_of["source"], "timestep": pipe.config.timestep} if pipe.source else "white noise",
        "num_inference_steps": args.num_inference_steps,
        "guidance_scale": guidance_scale,
        **({} if pipe.flow is None else {"guidance": pipe.config.guidance}),
        "dtype": str(frozen_dtype(accelerator)),
    }

    def conditions_of(rows: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor | None]:
        assert captions is not None
        found = texts.conditions([captions.numbered(int(i)) for i in rows])
        empty = texts.conditions([""] * len(rows), negative=True) if guidance_scale != 1 else {}
        return found, empty, start_means(pipe, found)

    size = pipe._channels(), *latent_size(pipe)
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
            guidance_scale,
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
