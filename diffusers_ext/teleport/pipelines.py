"""Stable Diffusion, SDXL and DDPM pipelines with teleportation built in.

The folders `pipelines/teleport_*` import these classes, for use with `custom_pipeline=`:

    pipe = DiffusionPipeline.from_pretrained(
        base, custom_pipeline=dx.pipeline_path("teleport_sd"), trust_remote_code=True
    )
    pipe.load_teleport("path/or/repo")
    pipe("a red bag").images[0]

Without statistics, their results are bit-identical to those of their base classes.

What `save_pretrained` and `push_to_hub` write holds `pipeline.py`, which imports the class from here:
`DiffusionPipeline.from_pretrained(..., trust_remote_code=True)` loads it, and so does
`TeleportStableDiffusionPipeline.from_pretrained`.
"""

import copy
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import (
    DDPMPipeline,
    DDPMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DModel,
)
from torch import Tensor

from ..core.classes import CustomPipelineMixin, adds_argument, named_arguments
from ..core.families import guidance_of
from ..core.hooks import parameters_of
from .apply import apply_teleport, remove_teleport, teleport_is_on
from .calibrate import calibrate_skip
from .gaussian import GaussianStats
from .prompts import prompt_means
from .scheduler import TeleportScheduler
from .sources import check_rank, pipeline_samples

_REMEMBERED = 256
_CALIBRATION_IMAGES = 8
# Call arguments other than the prompt that change the prompt's mean.
_CONDITIONS = (
    "height",
    "width",
    "clip_skip",
    "cross_attention_kwargs",
    "original_size",
    "crops_coords_top_left",
    "target_size",
)
# Conditions other than text, for which statistics have no means.
_BEYOND_TEXT = ("prompt_embeds", "ip_adapter_image", "ip_adapter_image_embeds")


class TeleportMixin(CustomPipelineMixin):
    """`load_teleport`, `fit_teleport` and `unload_teleport` for a pipeline class."""

    scheduler: Any
    unet: Any

    def load_teleport(
        self,
        stats: GaussianStats | str | os.PathLike[str],
        skip: float | str = "auto",
        sigma: float | None = None,
        mean_from: str = "stats",
        **hub_kwargs: Any,
    ) -> Any:
        """Makes the pipeline skip its first steps.

        Args:
            stats: the statistics, or the folder or Hub repository that contains them.
            skip, sigma, mean_from: see `TeleportScheduler`.
            hub_kwargs: for `GaussianStats.from_pretrained`, such as `subfolder` and `revision`.

        Returns:
            The pipeline itself.

        Raises:
            ValueError: teleportation is on already, the statistics are invalid, or an argument is invalid for
                `TeleportScheduler`.
            OSError: the statistics are missing.
        """
        self._refuse_twice()
        if not isinstance(stats, GaussianStats):
            stats = GaussianStats.from_pretrained(stats, **hub_kwargs)
        self.__dict__.pop("_teleport_means", None)
        return apply_teleport(self, stats, skip, sigma=sigma, mean_from=mean_from)

    def fit_teleport(
        self,
        num_samples: int = 256,
        rank: int = 32,
        *,
        prompts: Sequence[str] | None = None,
        batch_size: int = 8,
        num_inference_steps: int = 25,
        guidance_scale: float | None = None,
        skip: float | str = "auto",
        sigma: float | None = None,
        mean_from: str = "stats",
        seed: int = 0,
        progress: bool = True,
        **call_kwargs: Any,
    ) -> GaussianStats:
        """Fits statistics to the pipeline's own samples and loads them.

        Args:
            num_samples, prompts, batch_size, seed, progress, call_kwargs: see `pipeline_samples`. With
                prompts, each prompt gets its own mean, and the covariance is the within-prompt one.
            rank: number of eigenpairs, at most `num_samples` minus the number of prompts (or minus 1).
            num_inference_steps: steps of each sample, and the step count that `skip="auto"` is calibrated
                for.
            guidance_scale: guidance scale of the calibration runs for `skip="auto"`; None for the pipeline's
                default. The samples themselves are generated without guidance, because the transport adds it
                for each call.
            skip, sigma, mean_from: see `TeleportScheduler`. `skip="auto"` calls `calibrate_skip`, which
                generates up to `num_inference_steps` further batches of 8 images.

        Returns:
            The loaded statistics, for `save_pretrained` or `push_to_hub`.

        Raises:
            ValueError: teleportation is on already, or arguments that sampling, fitting or calibration
                rejects.
        """
        self._refuse_twice()
        check_rank(rank, num_samples, prompts)
        options: dict[str, Any] = {"progress": progress, "seed": seed, **call_kwargs}
        options["num_inference_steps"] = num_inference_steps
        parameters, plain = parameters_of(self), guidance_of(self).call(1.0)
        batches = pipeline_samples(
            self, num_samples, batch_size=batch_size, prompts=prompts, **plain, **options
        )
        stats = GaussianStats.fit(batches, rank)
        if sigma is None and skip == "auto":
            texts = list(prompts or [""]) * _CALIBRATION_IMAGES
            if guidance_scale is not None:
                options["guidance_scale"] = guidance_scale
            stats = calibrate_skip(
                self,
                stats,
                prompts=texts[:_CALIBRATION_IMAGES] if "prompt" in parameters else None,
                num_images=_CALIBRATION_IMAGES,
                mean_from=mean_from,
                **options,
            )
        self.load_teleport(stats, skip, sigma, mean_from)
        return stats

    def unload_teleport(self) -> Any:
        """Restores the original scheduler, so that the pipeline works as its base class again. Returns it."""
        self.__dict__.pop("_teleport_means", None)
        return remove_teleport(self)

    def _refuse_twice(self) -> None:
        if isinstance(self.scheduler, TeleportScheduler):
            raise ValueError("Teleportation is on this pipeline already: call unload_teleport() first.")


# --- prompts ---


_DOC = """teleport_prompt_mean (`bool`, defaults to `True`): with within-prompt statistics, start
        every image from the mean of its prompt: the fitted mean or, for a new prompt, that of
        `prompt_means`, which costs one model call per prompt."""


class PromptTeleportMixin(TeleportMixin):
    """Sets the mean of each image's prompt before a run and clears it afterwards.

    Statistics with a prompt map do not need this: `apply_teleport` reads the prompts itself. With other
    statistics that have an `unconditional` part, the transport also follows the `guidance_scale` of the call.
    Means of new prompts are cached on the pipeline until the statistics are loaded or unloaded again. Reload
    them after a change that affects the prompts, such as a LoRA. With `teleport_prompt_mean=False` or
    `mean_from="first_call"`, the scheduler is not changed.
    """

    @contextmanager
    def _prompt_mean(self, wanted: bool, call: dict[str, Any]) -> Iterator[None]:
        scheduler = self.scheduler
        # Compare the exact type, because prompt_means uses a subclass as its probe.
        on = type(scheduler) is TeleportScheduler and scheduler.mean_from == "stats"
        within = on and (scheduler.stats.class_means is not None or scheduler.stats.unconditional is not None)
        if on and scheduler.stats.prompt_map is not None:
            within = False  # apply_teleport reads the prompts; a loaded pipeline does not have its hook yet
            if not teleport_is_on(self):
                apply_teleport(self)
        if not (wanted and within):
            yield
            return
        beyond = [name for name in _BEYOND_TEXT if call.get(name) is not None]
        if beyond:
            raise ValueError(
                f"The statistics have one mean for each prompt, and {beyond[0]} is not a prompt text. Pass "
                "teleport_prompt_mean=False, after pipe.scheduler.set_mean(mean) if you have a mean for it."
            )
        if call.get("prompt") is None:
            yield  # the base class raises the error
            return
        means = self._means_of(scheduler.stats, call)
        means = means.repeat_interleave(call.get("num_images_per_prompt") or 1, dim=0)
        scheduler.set_mean(means, self._guidance(scheduler.stats, call))
        try:
            yield
        finally:
            scheduler.set_mean(None)

    def _guidance(self, stats: GaussianStats, call: dict[str, Any]) -> float:
        """The guidance scale of the transport; 1, the conditional flow, if it cannot follow the call's scale.

        It cannot follow a negative prompt, because `unconditional` has the statistics of the empty prompt.
        """
        defaults = {name: parameter.default for name, parameter in parameters_of(self).items()}
        guidance = guidance_of(self)
        weight = guidance.weight({**defaults, **call})
        other = any(call.get(name) for name in ("negative_prompt", "negative_prompt_2"))
        if stats.unconditional is None or weight == 1 or other:
            return 1.0
        altered = guidance.altered(call)
        if altered is not None:
            raise ValueError(
                f"The transport follows the guided flow u + w(c − u), and this call does not. {altered} Or pass"
                " teleport_prompt_mean=False."
            )
        return weight

    def _means_of(self, stats: GaussianStats, call: dict[str, Any]) -> Tensor:
        """(prompts, *stats.shape): fitted, cached or probed means of the call's prompts."""
        prompts = [call["prompt"]] if isinstance(call["prompt"], str) else list(call["prompt"])
        second = call.get("prompt_2")
        seconds = list(second) if isinstance(second, list | tuple) else [second] * len(prompts)
        if len(seconds) != len(prompts):
            raise ValueError(f"There are {len(prompts)} prompts and {len(seconds)} in prompt_2.")
        given = {name: call[name] for name in _CONDITIONS if call.get(name) is not None}
        known = set(stats.class_names or ())
        memory: dict[Any, Tensor] = self.__dict__.setdefault("_teleport_means", {})
        found: dict[Any, Tensor] = {}
        missing: dict[str | None, list[str]] = {}
        for pair in dict.fromkeys(zip(prompts, seconds)):
            prompt, other = pair
            key = (pair, repr(given))
            if other is None and prompt in known:
                found[pair] = stats.class_mean(prompt)[0]
            elif key in memory:
                found[pair] = memory[key]
            else:
                missing.setdefault(other, []).append(prompt)
        for other, texts in missing.items():
            extra = given if other is None else {**given, "prompt_2": other}
            for prompt, mean in zip(texts, self._probe(stats, texts, extra)):
                found[prompt, other] = memory[(prompt, other), repr(given)] = mean
        while len(memory) > _REMEMBERED:
            del memory[next(iter(memory))]
        return torch.stack([found[pair] for pair in zip(prompts, seconds)])

    def _probe(self, stats: GaussianStats, prompts: list[str], conditions: dict[str, Any]) -> Tensor:
        if "prompt_2" in conditions:
            # prompt_2 is a list here, because a single text means a batch of one.
            rows = [
                prompt_means(self, stats, p, **{**conditions, "prompt_2": [conditions["prompt_2"]]})
                for p in prompts
            ]
            return torch.cat(rows)
        return prompt_means(self, stats, prompts, **conditions)


class TeleportStableDiffusionPipeline(PromptTeleportMixin, StableDiffusionPipeline):
    """`StableDiffusionPipeline` that can replace its first steps with the closed form of a Gaussian."""

    @adds_argument(StableDiffusionPipeline, "teleport_prompt_mean", True, _DOC)
    def __call__(self, *args: Any, teleport_prompt_mean: bool = True, **kwargs: Any) -> Any:
        with self._prompt_mean(teleport_prompt_mean, named_arguments(StableDiffusionPipeline, args, kwargs)):
            return super().__call__(*args, **kwargs)


class TeleportStableDiffusionXLPipeline(PromptTeleportMixin, StableDiffusionXLPipeline):
    """`StableDiffusionXLPipeline` that can replace its first steps with the closed form of a Gaussian."""

    @adds_argument(StableDiffusionXLPipeline, "teleport_prompt_mean", True, _DOC)
    def __call__(self, *args: Any, teleport_prompt_mean: bool = True, **kwargs: Any) -> Any:
        with self._prompt_mean(
            teleport_prompt_mean, named_arguments(StableDiffusionXLPipeline, args, kwargs)
        ):
            return super().__call__(*args, **kwargs)


class TeleportDDPMPipeline(TeleportMixin, DDPMPipeline):
    """`DDPMPipeline` that can replace its first steps with the closed form of a Gaussian."""

    def __init__(self, unet: UNet2DModel, scheduler: DDPMScheduler):
        DDPMPipeline.__init__(self, unet, scheduler)
        if isinstance(scheduler, TeleportScheduler):
            # After loading, or in from_pipe: the denoiser needs its hook, and the hook needs a scheduler that
            # no other pipeline advances.
            self.scheduler = copy.deepcopy(scheduler.inner)
            apply_teleport(
                self, scheduler.stats, scheduler.skip, sigma=scheduler.sigma, mean_from=scheduler.mean_from
            )
