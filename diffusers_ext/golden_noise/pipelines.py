"""Stable Diffusion and SDXL pipelines with golden noise built in.

The folders `pipelines/golden_noise_*` import these classes, for use with `custom_pipeline=`:

    npnet = NPNetModel.from_pretrained("path/or/repo")
    pipe = DiffusionPipeline.from_pretrained(
        base, custom_pipeline=dx.pipeline_path("golden_noise_sd"), npnet=npnet, trust_remote_code=True
    )
    pipe("a red bag").images[0]

`npnet` is an optional component, which is saved and loaded with the pipeline. Without it, the results are
bit-identical to those of the base class.

What `save_pretrained` and `push_to_hub` write holds `pipeline.py`, which imports the class from here:
`DiffusionPipeline.from_pretrained(..., trust_remote_code=True)` loads it, and so does
`GoldenNoiseStableDiffusionPipeline.from_pretrained`.
"""

import functools
from typing import Any, ClassVar

from diffusers import (
    AutoencoderKL,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from transformers import (
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from ..core.classes import CustomPipelineMixin, adds_argument, named_arguments
from .apply import GoldenNoise
from .npnet import NPNetModel

_DOC = """golden_strength (`float`, defaults to 1.0): 0 starts from the random noise, 1 from golden
        noise; other values interpolate or extrapolate linearly. `latents` are used as given."""


class GoldenNoiseMixin(CustomPipelineMixin):
    """Replaces the noise with golden noise after a pipeline's own `prepare_latents`."""

    npnet: NPNetModel | None
    _golden: GoldenNoise | None = None

    def _remember(self, encoded: Any) -> Any:
        return encoded if self._golden is None else self._golden.reader.read({}, encoded)

    def _replace(self, given: dict[str, Any], prepared: Any) -> Any:
        return prepared if self._golden is None else self._golden.replace(given, prepared)

    def _call_golden(self, call: Any, strength: float, kwargs: dict[str, Any]) -> Any:
        # Only within a call: encode_prompt and prepare_latents called directly work as in the base class.
        self._golden = None if self.npnet is None else GoldenNoise(self, self.npnet, strength)
        try:
            return call(**kwargs)
        finally:
            self._golden = None


class GoldenNoiseStableDiffusionPipeline(GoldenNoiseMixin, StableDiffusionPipeline):
    """`StableDiffusionPipeline` with an optional `npnet` that predicts golden noise."""

    model_cpu_offload_seq = "text_encoder->image_encoder->npnet->unet->vae"
    _optional_components: ClassVar[list[str]] = [*StableDiffusionPipeline._optional_components, "npnet"]

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: KarrasDiffusionSchedulers,
        safety_checker: StableDiffusionSafetyChecker,
        feature_extractor: CLIPImageProcessor,
        image_encoder: CLIPVisionModelWithProjection = None,  # type: ignore[assignment]
        npnet: NPNetModel = None,  # type: ignore[assignment]
        requires_safety_checker: bool = True,
    ):
        super().__init__(
            vae,
            text_encoder,
            tokenizer,
            unet,
            scheduler,
            safety_checker,
            feature_extractor,
            image_encoder,
            requires_safety_checker,
        )
        self.register_modules(npnet=npnet)

    @functools.wraps(StableDiffusionPipeline.encode_prompt)
    def encode_prompt(self, *args: Any, **kwargs: Any) -> Any:
        return self._remember(super().encode_prompt(*args, **kwargs))

    @functools.wraps(StableDiffusionPipeline.prepare_latents)
    def prepare_latents(self, *args: Any, **kwargs: Any) -> Any:
        given = named_arguments(StableDiffusionPipeline, args, kwargs, "prepare_latents")
        return self._replace(given, super().prepare_latents(*args, **kwargs))

    @adds_argument(StableDiffusionPipeline, "golden_strength", 1.0, _DOC)
    def __call__(self, *args: Any, golden_strength: float = 1.0, **kwargs: Any) -> Any:
        named = named_arguments(StableDiffusionPipeline, args, kwargs)
        return self._call_golden(super().__call__, golden_strength, named)


class GoldenNoiseStableDiffusionXLPipeline(GoldenNoiseMixin, StableDiffusionXLPipeline):
    """`StableDiffusionXLPipeline` with an optional `npnet` that predicts golden noise."""

    model_cpu_offload_seq = "text_encoder->text_encoder_2->image_encoder->npnet->unet->vae"
    _optional_components: ClassVar[list[str]] = [*StableDiffusionXLPipeline._optional_components, "npnet"]

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        text_encoder_2: CLIPTextModelWithProjection,
        tokenizer: CLIPTokenizer,
        tokenizer_2: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: KarrasDiffusionSchedulers,
        image_encoder: CLIPVisionModelWithProjection = None,  # type: ignore[assignment]
        feature_extractor: CLIPImageProcessor = None,  # type: ignore[assignment]
        npnet: NPNetModel = None,  # type: ignore[assignment]
        force_zeros_for_empty_prompt: bool = True,
        add_watermarker: bool | None = None,
    ):
        super().__init__(
            vae,
            text_encoder,
            text_encoder_2,
            tokenizer,
            tokenizer_2,
            unet,
            scheduler,
            image_encoder,
            feature_extractor,
            force_zeros_for_empty_prompt,
            add_watermarker,
        )
        self.register_modules(npnet=npnet)

    @functools.wraps(StableDiffusionXLPipeline.encode_prompt)
    def encode_prompt(self, *args: Any, **kwargs: Any) -> Any:
        return self._remember(super().encode_prompt(*args, **kwargs))

    @functools.wraps(StableDiffusionXLPipeline.prepare_latents)
    def prepare_latents(self, *args: Any, **kwargs: Any) -> Any:
        given = named_arguments(StableDiffusionXLPipeline, args, kwargs, "prepare_latents")
        return self._replace(given, super().prepare_latents(*args, **kwargs))

    @adds_argument(StableDiffusionXLPipeline, "golden_strength", 1.0, _DOC)
    def __call__(self, *args: Any, golden_strength: float = 1.0, **kwargs: Any) -> Any:
        named = named_arguments(StableDiffusionXLPipeline, args, kwargs)
        return self._call_golden(super().__call__, golden_strength, named)
