"""Generation, projection and editing with a SIGN projector.

    sign = diffusers_ext.SIGNPipeline.from_pretrained("path/or/repo")
    sign(batch_size=8, num_inference_steps=1).images
    sign.project(images, strength=0.2).images
    sign.edit(image, mask).images

The folder `pipelines/sign` imports the class for `custom_pipeline=`.

What `save_pretrained` and `push_to_hub` write holds the weights but not this code: load it with
`SIGNPipeline.from_pretrained`, or with `custom_pipeline=`. `DiffusionPipeline.from_pretrained` alone does not
find the class.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from diffusers import (
    DiffusionPipeline,
    ImagePipelineOutput,
    ModelMixin,
    SchedulerMixin,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..core.autoencoders import decode_latents, downsampling_of
from ..core.checks import check_counts
from ..core.classes import FromPipeMixin
from ..core.images import as_tensor, encode_images
from ..core.prompts import encode_prompts
from .projector import Projector, check_teacher
from .source import MixtureSource

# The noise level of the second step, as a share of that of the first one.
REFINEMENT = 0.125
Generators = torch.Generator | list[torch.Generator] | None


class SIGNPipeline(FromPipeMixin, DiffusionPipeline):
    """A one- or few-step generator that is also a projector onto the data (Zaman et al., arXiv:2509.21470).

    Args:
        unet: a stock `UNet2DModel` or `UNet2DConditionModel`, distilled with training/train_sign.py.
        scheduler: the scheduler of the teacher. Its ᾱ and prediction type define how the output of the
            network is read.
        vae: the autoencoder, if the teacher works on latents.
        text_encoder, tokenizer: the text encoder, if the teacher has prompts.
        source: maps noise to the inputs that samples start from. With None, they start from noise of standard
            deviation `sigma`.
        timestep: the constant time input of the network.

    Raises:
        ValueError: there is no timestep, as in the folder of a diffusion model, or network or schedule are
            not supported, see `check_teacher`.
    """

    model_cpu_offload_seq = "text_encoder->unet->vae"
    _optional_components = ["vae", "text_encoder", "tokenizer", "source"]  # noqa: RUF012

    def __init__(
        self,
        unet: UNet2DModel | UNet2DConditionModel,
        scheduler: SchedulerMixin,
        vae: ModelMixin | None = None,
        text_encoder: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        source: MixtureSource | None = None,
        timestep: int | None = None,
    ) -> None:
        super().__init__()
        if timestep is None:
            raise ValueError(
                "A projector needs its constant `timestep`, got None. Of a SIGNPipeline, take it over with"
                " SIGNPipeline.from_pipe(pipe) or SIGNPipeline(**pipe.components, **pipe.parameters). A pipeline or"
                " folder without one is a time-conditional diffusion model, not a projector: distill one with"
                " training/train_sign.py."
            )
        self.register_modules(
            unet=unet,
            scheduler=scheduler,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            source=source,
        )
        self.register_to_config(timestep=timestep)
        self.vae_scale_factor = downsampling_of(self)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        check_teacher(unet, scheduler)

    @property
    def projector(self) -> Projector:
        """The projector f with the current network, scheduler and source."""
        return Projector(self.unet, self.scheduler, self.config.timestep, self.source)

    @property
    def sigma(self) -> float:
        """The highest noise level, at which samples start."""
        return self.projector.sigma

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        batch_size: int = 1,
        num_inference_steps: int = 1,
        sigmas: Sequence[float] | None = None,
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Generates images from noise.

        The first step is x = f(z), where z is a sample of the source at the level σ₁. The others are x = f(x
        + σₖε) with decreasing levels σₖ.

        Args:
            prompt: one or more prompts, if the teacher has prompts. Each gives `batch_size` images.
            batch_size: number of images, per prompt if there are prompts.
            num_inference_steps: number of network evaluations.
            sigmas: noise levels, which replace `num_inference_steps`. The first one should be `pipe.sigma`.
                By default the levels are `pipe.sigma`, followed by evenly spaced levels from an eighth of it
                down towards 0. Higher levels after the first discard the result of the first step and give
                worse images.
            generator: one generator, or one per image.
            latents: (n, C, H, W) unit-variance noise to start from.
            output_type: `pil`, `np`, `pt` or `latent`.
            return_dict: return an `ImagePipelineOutput` instead of a tuple.

        Returns:
            An `ImagePipelineOutput`, or a tuple with the images.

        Raises:
            ValueError: the number of steps is below 1, the levels do not decrease, a prompt is missing or not
                supported, or the latents have the wrong shape.
        """
        check_counts(batch_size=batch_size)
        _check_output_type(output_type)
        levels = self._levels(num_inference_steps, sigmas)
        count = batch_size * (1 if prompt is None or isinstance(prompt, str) else len(prompt))
        conditions = self._conditions(prompt, count)
        shape = (count, self.unet.config.in_channels, *self._sample_size())
        if latents is not None and tuple(latents.shape) != shape:
            raise ValueError(f"Expected latents {shape}, got {tuple(latents.shape)}.")
        noise = (
            self._noise(shape, generator)
            if latents is None
            else latents.to(self._execution_device, self.unet.dtype)
        )
        projector = self.projector
        x = projector(projector.start(noise, levels[0]), **conditions)
        for sigma in levels[1:]:
            x = projector(x + sigma * self._noise(shape, generator), **conditions)
        return self._output(x, output_type, return_dict)

    @torch.no_grad()
    def project(
        self,
        image: Any,
        prompt: str | Sequence[str] | None = None,
        strength: float = 0.0,
        num_projections: int = 1,
        generator: Generators = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Projects images onto the data: f(y + strength · σ · ε), then f again without noise.

        Args:
            image: one or more PIL images, an array (n, h, w, C) or a tensor (n, C, h, w) in [0, 1].
            prompt: one prompt for all, or one per image, if the teacher has prompts.
            strength: amount of noise to add first, as a share of `pipe.sigma`, in [0, 1]. Larger values
                change the image more.
            num_projections: number of network evaluations.
            generator, output_type, return_dict: see `__call__`.

        Returns:
            An `ImagePipelineOutput`, or a tuple with the images.

        Raises:
            ValueError: the images have the wrong size, channel count or range, `strength` is outside [0, 1],
                or `num_projections` is below 1.
        """
        _check_strength(strength)
        check_counts(num_projections=num_projections)
        _check_output_type(output_type)
        y = self._encode(image)
        conditions = self._conditions(prompt, len(y))
        x = y + strength * self.sigma * self._noise(y.shape, generator) if strength else y
        for _ in range(num_projections):
            x = self.projector(x, **conditions)
        return self._output(x, output_type, return_dict)

    @torch.no_grad()
    def edit(
        self,
        image: Any,
        mask_image: Any = None,
        prompt: str | Sequence[str] | None = None,
        strength: float = 1.0,
        num_inference_steps: int = 2,
        generator: Generators = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Inpaints a part of images, or turns strokes on them into matching content.

        Args:
            image: see `project`. It may contain strokes or areas of color.
            mask_image: white (1) marks the part to generate, black (0) the part to keep: a PIL image, an
                array (h, w) or a tensor (1 or n, 1, h, w). None generates the whole image.
            prompt: description of the result, if the teacher has prompts.
            strength: highest noise level as a share of `pipe.sigma`, in [0, 1]. At 1, with a mask, the
                content under the mask is discarded. Below 1, it guides the result.
            num_inference_steps: number of network evaluations, at decreasing noise levels.
            generator, output_type, return_dict: see `__call__`.

        Returns:
            An `ImagePipelineOutput`, or a tuple with the images.

        Raises:
            ValueError: see `project`; also if the mask has the wrong size or range, or the number of steps is
                below 1.
        """
        _check_strength(strength)
        check_counts(num_inference_steps=num_inference_steps)
        _check_output_type(output_type)
        known = self._encode(image)
        conditions = self._conditions(prompt, len(known))
        mask = self._mask(mask_image, known)
        x = known
        if strength == 1 and mask_image is not None:
            unknown = 0 if self.source is None else self.source.mean.to(known)
            x = mask * unknown + (1 - mask) * known
        projector = self.projector
        for k in range(num_inference_steps):
            sigma = strength * projector.sigma * (1 - k / num_inference_steps)
            x = projector(x + sigma * self._noise(x.shape, generator), **conditions)
            x = mask * x + (1 - mask) * known
        return self._output(x, output_type, return_dict)

    def encode_prompt(
        self,
        prompt: str | Sequence[str],
        device: torch.device | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Encodes prompts as Stable Diffusion does: the last hidden state of the text encoder.

        Args:
            prompt: one or more texts.
            device: device of the encoder; default: the execution device of the pipeline.
            num_images_per_prompt: rows per prompt.
            do_classifier_free_guidance: encode the empty prompt too.

        Returns:
            (n, tokens, width) for the prompts, and the same for the empty prompt or None.
        """
        texts = [prompt] if isinstance(prompt, str) else list(prompt)

        def encode(given: list[str]) -> Tensor:
            tokens = self.tokenizer(
                given,
                padding="max_length",
                max_length=self.tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            )
            where = device or self._execution_device
            masks = getattr(self.text_encoder.config, "use_attention_mask", False)
            mask = tokens.attention_mask.to(where) if masks else None
            embeds = self.text_encoder(tokens.input_ids.to(where), attention_mask=mask)[0]
            return embeds.repeat_interleave(num_images_per_prompt, 0)

        return encode(texts), encode([""] * len(texts)) if do_classifier_free_guidance else None

    # --- shared by __call__, project and edit ---

    def _levels(self, num_inference_steps: int, sigmas: Sequence[float] | None) -> list[float]:
        if sigmas is None:
            check_counts(num_inference_steps=num_inference_steps)
            highest, rest = self.sigma, num_inference_steps - 1
            return [highest, *(highest * REFINEMENT * (1 - k / rest) for k in range(rest))]
        levels = [float(sigma) for sigma in sigmas]
        falling = all(a > b for a, b in pairwise(levels))
        if not levels or not falling or min(levels) < 0:
            raise ValueError(f"sigmas must be decreasing noise levels of 0 or more, got {levels}.")
        return levels

    def _sample_size(self) -> tuple[int, int]:
        size: Any = self.unet.config.sample_size
        return (size, size) if isinstance(size, int) else tuple(size)

    def _noise(self, shape: Sequence[int], generator: Generators) -> Tensor:
        if isinstance(generator, list | tuple) and len(generator) != shape[0]:
            raise ValueError(
                f"Give one generator, or one for each of the {shape[0]} images, got {len(generator)}."
            )
        return randn_tensor(
            tuple(shape), generator=generator, device=self._execution_device, dtype=self.unet.dtype
        )

    def _conditions(self, prompt: str | Sequence[str] | None, count: int) -> dict[str, Tensor]:
        """The prompt arguments for `count` images; the images of one prompt are consecutive."""
        if self.text_encoder is None:
            if prompt is not None:
                raise ValueError("This projector has no text encoder, so it takes no prompt.")
            return {}
        if prompt is None:
            raise ValueError('This projector needs a prompt: give one, or "" for none.')
        texts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not texts or count % len(texts):
            raise ValueError(f"Give one prompt, or one for each of the {count} images, got {len(texts)}.")
        embeds = encode_prompts(self, texts, guidance=False)["prompt_embeds"]
        embeds = embeds.repeat_interleave(count // len(texts), 0)
        return {"encoder_hidden_states": embeds.to(self.unet.dtype)}

    def _encode(self, image: Any) -> Tensor:
        """(n, C, H, W) in the space of the network, from images of any accepted type."""
        x = encode_images(self, image)
        if tuple(x.shape[2:]) != self._sample_size():
            height, width = (n * self.vae_scale_factor for n in self._sample_size())
            given = tuple(n * self.vae_scale_factor for n in x.shape[2:])
            raise ValueError(
                f"Expected images {width} wide and {height} high, got {given[1]} × {given[0]}: resize or crop"
                " them."
            )
        return x.to(self._execution_device, self.unet.dtype)

    def _mask(self, mask_image: Any, like: Tensor) -> Tensor:
        if mask_image is None:
            return torch.ones_like(like[:, :1])
        if isinstance(mask_image, np.ndarray) and mask_image.ndim == 2:
            mask_image = mask_image[None, ..., None]
        mask = as_tensor(mask_image, "L")
        size = tuple(n * self.vae_scale_factor for n in like.shape[2:])
        if tuple(mask.shape[1:]) != (1, *size) or len(mask) not in (1, len(like)):
            raise ValueError(
                f"Expected a mask {size[1]} wide and {size[0]} high, one for all images or one per image, got"
                f" {tuple(mask.shape)}."
            )
        mask = torch.nn.functional.max_pool2d(mask, self.vae_scale_factor)
        return mask.to(like.device, like.dtype)

    def _output(self, x: Tensor, output_type: str, return_dict: bool) -> Any:
        if output_type != "latent" and self.vae is not None:
            x = decode_latents(self, x)
        images: Any = x
        if output_type != "latent":
            images = self.image_processor.postprocess(x, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)


_OUTPUT_TYPES = ("pil", "np", "pt", "latent")


def _check_output_type(output_type: str) -> None:
    # The image processor of diffusers takes unknown ones for "np".
    if output_type not in _OUTPUT_TYPES:
        raise ValueError(f"output_type must be one of {', '.join(_OUTPUT_TYPES)}, got {output_type!r}.")


def _check_strength(strength: float) -> None:
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must be in [0, 1], got {strength}.")


def describe(pipe: Any) -> str | None:
    """The line of `dx.summary` about a projector, or None for another pipeline."""
    if not isinstance(pipe, SIGNPipeline):
        return None
    return f"projector at timestep {pipe.config.timestep}, σ={pipe.sigma:.3g}"
