"""Stable Diffusion and SDXL pipelines with golden noise built in.

The folders `pipelines/golden_noise_*` import these classes, so they are what `custom_pipeline=` gives:

    npnet = NPNetModel.from_pretrained("path/or/repo")
    pipe = DiffusionPipeline.from_pretrained(
        base, custom_pipeline="pipelines/golden_noise_sd", npnet=npnet, trust_remote_code=True
    )
    pipe("a red bag").images[0]

`npnet` is an optional component: it is saved and loaded with the pipeline, and without it the pipeline is its base
class, bit by bit.
"""

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

from ..core.pipeline import adds_argument, named_arguments
from .apply import GoldenNoise
from .npnet import NPNetModel

_DOC = """golden_strength (`float`, defaults to 1.0): 0 starts from the random noise, 1 from the
        network's golden noise, between and beyond in a straight line. `latents` are used as given."""


class GoldenNoiseMixin:
    """Makes the noise golden between a pipeline's own `prepare_latents` and its first step."""

    npnet: NPNetModel | None
    _golden: GoldenNoise | None = None

    def encode_prompt(self, *args: Any, **kwargs: Any) -> Any:
        """As the base class's."""
        encoded = super().encode_prompt(*args, **kwargs)  # type: ignore[misc]
        if self._golden is not None:
            self._golden.remember(encoded)
        return encoded

    def prepare_latents(self, *args: Any, **kwargs: Any) -> Any:
        """As the base class's, but golden in a call of a pipeline that has its network."""
        prepared = super().prepare_latents(*args, **kwargs)  # type: ignore[misc]
        if self._golden is None:
            return prepared
        # The one argument that matters here; both base classes have it last.
        given = {"latents": kwargs.get("latents", args[7] if len(args) > 7 else None)}
        return self._golden.replace(self, given, prepared)

    def _call_golden(self, call: Any, strength: float, kwargs: dict[str, Any]) -> Any:
        # Only within a call: encode_prompt and prepare_latents called by hand do what they always do.
        self._golden = None if self.npnet is None else GoldenNoise(self.npnet, strength)
        try:
            return call(**kwargs)
        finally:
            self._golden = None


class GoldenNoiseStableDiffusionPipeline(GoldenNoiseMixin, StableDiffusionPipeline):
    """`StableDiffusionPipeline` with an optional `npnet` that turns its noise golden."""

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

    @adds_argument(StableDiffusionPipeline, "golden_strength", 1.0, _DOC)
    def __call__(self, *args: Any, golden_strength: float = 1.0, **kwargs: Any) -> Any:
        named = named_arguments(StableDiffusionPipeline, args, kwargs)
        return self._call_golden(super().__call__, golden_strength, named)


class GoldenNoiseStableDiffusionXLPipeline(GoldenNoiseMixin, StableDiffusionXLPipeline):
    """`StableDiffusionXLPipeline` with an optional `npnet` that turns its noise golden."""

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

    @adds_argument(StableDiffusionXLPipeline, "golden_strength", 1.0, _DOC)
    def __call__(self, *args: Any, golden_strength: float = 1.0, **kwargs: Any) -> Any:
        named = named_arguments(StableDiffusionXLPipeline, args, kwargs)
        return self._call_golden(super().__call__, golden_strength, named)
