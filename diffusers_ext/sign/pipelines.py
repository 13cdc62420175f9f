"""Generation, projection and editing with a SIGN projector.

    sign = diffusers_ext.SIGNPipeline.from_pretrained("path/or/repo")
    sign(batch_size=8, num_inference_steps=1).images
    sign.project(images, strength=0.2).images
    sign.edit(image, mask).images

The folder `pipelines/sign` imports the class for `custom_pipeline=`.

What `save_pretrained` and `push_to_hub` write holds `pipeline.py`, which imports the class from here:
`DiffusionPipeline.from_pretrained(..., trust_remote_code=True)` loads it, and so does
`SIGNPipeline.from_pretrained`.
`SIGNPipeline.stock_pipeline` of a flow's projector is saved under the class of its teacher, without this package.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from ..core.autoencoders import decode_latents, downsampling_of
from ..core.checks import check_counts
from ..core.classes import CustomPipelineMixin
from ..training.transformers import FLOWS, Flow
from .conditions import FLOW_CONDITIONS, conditions_for, encode_texts, sdxl_of, start_means, takes_sizes
from .flows import TEXTS, FlowProjector, stock_pipeline
from .inputs import check_output_type, check_strength, edit_mask, encode_data, latent_size, step_levels
from .projector import Projector, check_teacher
from .source import MixtureSource, PromptSource

Generators = torch.Generator | list[torch.Generator] | None


class SIGNPipeline(CustomPipelineMixin, DiffusionPipeline):
    """A one- or few-step generator that is also a projector onto the data (Zaman et al., arXiv:2509.21470).

    Args:
        unet: a stock `UNet2DModel` or `UNet2DConditionModel`, distilled with training/train_sign.py; None for a flow.
        scheduler: the scheduler of the teacher. Its ᾱ and prediction type define how the output of the
            network is read. For a flow see `projector_scheduler`.
        vae: the autoencoder, if the teacher works on latents.
        text_encoder, tokenizer: the text encoder, if the teacher has prompts.
        source: maps noise to the inputs that samples start from. With None, they start from noise of standard
            deviation `sigma`.
        timestep: the constant time input of the network; of a flow, 1000 times its σ*.
        transformer: of a flow, instead of `unet`.
        text_encoder_2, text_encoder_3, tokenizer_2, tokenizer_3: as in the teacher; of SDXL, those that end with 2.
        teacher: of a flow, the class of its pipeline, one of `training.transformers.FLOWS`.
        held: of a flow, whether the network is always called at `timestep`. Otherwise it is time-conditional: every step
            calls it at its own noise level.
        guidance: of a flow with embedded guidance, the scale that its transformer is given.
        max_sequence_length: of a flow, as in a call of its pipeline. None is the default of the pipeline.
        sample_size: of a flow, height and width of the latents of its training, the default size of its images.

    Raises:
        ValueError: there is no timestep, as in the folder of a diffusion model, or network or schedule are
            not supported, see `check_teacher`. Both or none of `unet` and `transformer`, or a transformer without a
            known `teacher`.
    """

    # What `core` asks of a pipeline: latents are (n, C, H, W) for every network, and the scheduler only has the levels.
    grid_latents, steps_scheduler = True, False
    model_cpu_offload_seq = "text_encoder->text_encoder_2->text_encoder_3->unet->transformer->vae"
    _optional_components = ["unet", "vae", "source", "transformer", *TEXTS]  # noqa: RUF012

    def __init__(
        self,
        unet: UNet2DModel | UNet2DConditionModel | None,
        scheduler: SchedulerMixin,
        vae: ModelMixin | None = None,
        text_encoder: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        source: MixtureSource | PromptSource | None = None,
        timestep: int | float | None = None,
        transformer: ModelMixin | None = None,
        text_encoder_2: PreTrainedModel | None = None,
        text_encoder_3: PreTrainedModel | None = None,
        tokenizer_2: PreTrainedTokenizerBase | None = None,
        tokenizer_3: PreTrainedTokenizerBase | None = None,
        teacher: str | None = None,
        held: bool = True,
        guidance: float | None = None,
        max_sequence_length: int | None = None,
        sample_size: Sequence[int] | None = None,
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
            transformer=transformer,
            text_encoder_2=text_encoder_2,
            text_encoder_3=text_encoder_3,
            tokenizer_2=tokenizer_2,
            tokenizer_3=tokenizer_3,
        )
        if (unet is None) == (transformer is None):
            found = "none" if unet is None else "both"
            raise ValueError(f"A projector has a unet or, of a flow, a transformer, got {found}.")
        if transformer is not None and teacher not in FLOWS:
            raise ValueError(
                f"The class of a flow's pipeline must be one of {', '.join(FLOWS)}, got teacher={teacher!r}."
            )
        self.register_to_config(timestep=timestep)
        if transformer is not None:
            size = None if sample_size is None else list(sample_size)
            self.register_to_config(teacher=teacher, held=held, guidance=guidance, sample_size=size)
            self.register_to_config(max_sequence_length=max_sequence_length)
        self.vae_scale_factor = downsampling_of(self)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        if isinstance(source, PromptSource) and text_encoder is None:
            raise ValueError(
                "A PromptSource has the means of prompts, and this projector has no text encoder: use a MixtureSource."
            )
        if transformer is None:
            check_teacher(unet, scheduler)
        else:
            _ = self.projector  # refuses a timestep outside of the schedule

    @property
    def projector(self) -> Projector:
        """The projector f with the current network, scheduler and source."""
        if self.flow is None:
            return Projector(self.unet, self.scheduler, self.config["timestep"], self.source)
        given = {name: self.config[name] for name in ("timestep", "held", "guidance")}
        return FlowProjector(self.transformer, self.flow, source=self.source, **given)

    @property
    def flow(self) -> Flow | None:
        """How the transformer of a flow is called; None for a UNet."""
        return None if self.transformer is None else FLOWS[self.config["teacher"]]

    @property
    def time_conditional(self) -> bool:
        """Whether every step calls the network at its own noise level."""
        return self.flow is not None and not self.config["held"]

    @property
    def network(self) -> Any:
        """The `unet` or the `transformer`."""
        return self.unet if self.flow is None else self.transformer

    @property
    def stock_pipeline(self) -> Any:
        """The teacher's pipeline with the parts of this one, which needs nothing of this package.

        `stock(prompt, sigmas=[σ*], latents=(1 − σ*)·z)` is f(z), without guidance, with σ* = timestep/1000 and
        `latents` in the layout of the pipeline. With the teacher's own scheduler, ask for `flows.unshifted(σ*, shift)`.
        A time-conditional projector takes several decreasing `sigmas`. `stock.save_pretrained` saves this pipeline.

        Raises:
            ValueError: the projector has a UNet.
        """
        if self.flow is None:
            raise ValueError(
                "The projector has a UNet, of which no pipeline of diffusers makes a projector: only flows have one."
            )
        return stock_pipeline(self)

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
        height: int | None = None,
        width: int | None = None,
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
                worse images. The levels of a time-conditional flow are evenly spaced in σ. A level is σ/(1 − σ) for
                the σ of a flow.
            generator: one generator, or one per image.
            latents: (n, C, H, W) unit-variance noise to start from.
            output_type: `pil`, `np`, `pt` or `latent`.
            return_dict: return an `ImagePipelineOutput` instead of a tuple.
            height, width: size of the images in pixels. A UNet has only that of its training. For a flow the default is
                `sample_size` or, with a source, that of the source.

        Returns:
            An `ImagePipelineOutput`, or a tuple with the images.

        Raises:
            ValueError: the number of steps is below 1, the levels do not decrease, a prompt is missing or not
                supported, the latents have the wrong shape, or the size is missing or not supported.
        """
        check_counts(batch_size=batch_size)
        check_output_type(output_type)
        levels = step_levels(self, num_inference_steps, sigmas)
        count = batch_size * (1 if prompt is None or isinstance(prompt, str) else len(prompt))
        conditions = self._conditions(prompt, count)
        noise = self.prepare_latents(count, height, width, generator, latents)
        start = self.projector.start(noise, levels[0], start_means(self, conditions))
        x = self._project(start, levels[0], conditions)
        for sigma in levels[1:]:
            x = self._project(x + sigma * self._noise(noise.shape, generator), sigma, conditions)
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
        check_strength(strength)
        check_counts(num_projections=num_projections)
        check_output_type(output_type)
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
        check_strength(strength)
        check_counts(num_inference_steps=num_inference_steps)
        check_output_type(output_type)
        known = self._encode(image)
        conditions = self._conditions(prompt, len(known))
        mask = edit_mask(self, mask_image, known)
        x = known
        if strength == 1 and mask_image is not None:
            x = mask * self._mean(conditions, known) + (1 - mask) * known
        for k in range(num_inference_steps):
            sigma = strength * self.sigma * (1 - k / num_inference_steps)
            x = self._project(x + sigma * self._noise(x.shape, generator), sigma, conditions)
            x = mask * x + (1 - mask) * known
        return self._output(x, output_type, return_dict)

    def encode_prompt(
        self,
        prompt: str | Sequence[str],
        device: torch.device | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = False,
    ) -> tuple[Tensor | None, ...]:
        """Encodes prompts as the teacher does.

        Args:
            prompt: one or more texts.
            device: device of the encoder of Stable Diffusion; default: the execution device of the pipeline.
            num_images_per_prompt: rows per prompt.
            do_classifier_free_guidance: encode the empty prompt too, with the encoder of Stable Diffusion.

        Returns:
            Of a UNet (n, tokens, width) for the prompts, and the same for the empty prompt or None; of SDXL (n, pooled
            width) and None besides. Of a flow the embeddings, the mask (n, tokens) bool of what is no padding or None,
            and the pooled vectors or None.

        Raises:
            ValueError: the empty prompt is asked for with another encoder. Projectors are called without guidance.
        """
        texts = [prompt] if isinstance(prompt, str) else list(prompt)
        if self.flow is None and not takes_sizes(self.unet):
            empty = [""] * len(texts) if do_classifier_free_guidance else None
            return (
                self._clip(texts, device, num_images_per_prompt),
                None if empty is None else self._clip(empty, device, num_images_per_prompt),
            )
        if do_classifier_free_guidance:
            raise ValueError(
                "A projector is called without guidance, so do_classifier_free_guidance must be False: encode the empty"
                " prompt as one of the prompts."
            )
        if self.flow is None:
            found = encode_texts(sdxl_of(self), texts)
            values = (found["encoder_hidden_states"], None, found["text_embeds"], None)
        else:
            found = encode_texts(self.stock_pipeline, texts, self.config["max_sequence_length"])
            values = tuple(found.get(name) for name in FLOW_CONDITIONS)
        return tuple(None if v is None else v.repeat_interleave(num_images_per_prompt, 0) for v in values)

    def prepare_latents(
        self,
        batch_size: int,
        height: int | None = None,
        width: int | None = None,
        generator: Generators = None,
        latents: Tensor | None = None,
    ) -> Tensor:
        """The unit-variance noise (n, C, H, W) that a call starts from: `latents`, or drawn with the generators.

        Raises:
            ValueError: see `__call__`.
        """
        shape = (batch_size, self._channels(), *latent_size(self, height, width))
        if latents is None:
            return self._noise(shape, generator)
        if tuple(latents.shape) != shape:
            raise ValueError(f"Expected latents {shape}, got {tuple(latents.shape)}.")
        return latents.to(self._execution_device, self.network.dtype)

    # --- shared by __call__, project and edit ---

    def _project(self, x: Tensor, sigma: float, conditions: dict[str, Tensor]) -> Tensor:
        """f(x) for x with noise of the level `sigma`."""
        return (
            self.projector(x, sigma, **conditions)
            if self.time_conditional
            else self.projector(x, **conditions)
        )

    def _channels(self) -> int:
        return self.unet.config.in_channels if self.flow is None else self.flow.channels(self.transformer)

    def _noise(self, shape: Sequence[int], generator: Generators) -> Tensor:
        if isinstance(generator, list | tuple) and len(generator) != shape[0]:
            raise ValueError(
                f"Give one generator, or one for each of the {shape[0]} images, got {len(generator)}."
            )
        return randn_tensor(
            tuple(shape), generator=generator, device=self._execution_device, dtype=self.network.dtype
        )

    def _conditions(self, prompt: str | Sequence[str] | None, count: int) -> dict[str, Tensor]:
        """The prompt arguments for `count` images; the images of one prompt are consecutive."""
        height, width = (0, 0) if self.flow else (n * self.vae_scale_factor for n in latent_size(self))
        return conditions_for(self, prompt, count, height, width)

    def _clip(self, texts: list[str], device: torch.device | None, repeats: int) -> Tensor:
        """The last hidden state of the text encoder of Stable Diffusion, `repeats` rows for each text."""
        tokens = self.tokenizer(
            texts,
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        where = device or self._execution_device
        masks = getattr(self.text_encoder.config, "use_attention_mask", False)
        mask = tokens.attention_mask.to(where) if masks else None
        embeds = self.text_encoder(tokens.input_ids.to(where), attention_mask=mask)[0]
        return embeds.repeat_interleave(repeats, 0)

    def _mean(self, conditions: dict[str, Tensor], like: Tensor) -> Tensor:
        """What is known of an image of these prompts before any of it is seen."""
        if self.source is None:
            return torch.zeros_like(like)
        mean = start_means(self, conditions)
        return self.source.mean.to(like).expand_as(like) if mean is None else mean.to(like)

    def _encode(self, image: Any) -> Tensor:
        """(n, C, H, W) in the space and the data type of the network, from images of any accepted type."""
        x = encode_data(self, image)
        return x.to(self._execution_device, self.network.dtype)

    def _output(self, x: Tensor, output_type: str, return_dict: bool) -> Any:
        if output_type != "latent" and self.vae is not None:
            x = decode_latents(self.stock_pipeline if self.flow else self, x)
        images: Any = x
        if output_type != "latent":
            images = self.image_processor.postprocess(x, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)


def describe(pipe: Any) -> str | None:
    """The line of `dx.summary` about a projector, or None for another pipeline."""
    if not isinstance(pipe, SIGNPipeline):
        return None
    kind = "time-conditional projector from" if pipe.time_conditional else "projector at"
    return f"{kind} timestep {pipe.config['timestep']:g}, σ={pipe.sigma:.3g}"
