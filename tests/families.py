"""Tiny random pipelines of every family that diffusers has: built offline, in memory, each in well under two seconds.

`FAMILIES[name]` has the facts about a family that a test needs. `build(name)` gives the pipeline, `inputs(name)`
keyword arguments for its call and `images(pipe, name)` the result as a tensor. Weights depend on `seed` alone.

The pipelines "sd", "sdxl", "sd3" and "ddpm" are those of `tests/tiny.py`. "flux" is another one than there: it has
embedded guidance and text encoders.
"""

import string
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import diffusers
import tokenizers
import torch
import transformers
from torch import Tensor, nn

from tests import tiny

_WIDTH = 32  # of the embeddings of the T5, Gemma, Qwen, GLM and BERT encoders


@dataclass(frozen=True)
class Family:
    """What a test has to know about one kind of pipeline.

    Attributes:
        make: builds the pipeline from PyTorch's global random numbers.
        latents: shape of one latent before any packing, without the batch. For videos (frames, ...) in the order
            that the pipeline uses.
        kind: "flow" for x = (1 − σ)x₀ + σε, "diffusion" for the other noise schedules.
        layout: what `latents` look like in the denoising loop. "plain" is (B, *latents); "2x2" tokens of 2 × 2 patches,
            (B, H/2 · W/2, 4C), of latents (C, H, W); "1x1" a token for every position, (B, ... · H · W, C).
        given: layout of the call's `latents=`: "loop" as in the denoising loop, "unpacked" for (B, *latents), None if
            the call has no such argument.
        channels: index of the channel axis in `latents`.
        guidance: the argument of the call that sets the guidance scale; None if there is none.
        embedded: whether the denoiser takes a guidance scale as an input.
        free_at: the scale at which classifier-free guidance is off; None where the scale is for `embedded` only.
        guided, unguided: values for the call, with and without guidance.
        prompted: whether the call takes prompts.
        per_prompt: the argument for the number of images for each prompt; None if there is none.
        prompt_lists: whether `encode_prompt` returns a list with one tensor for each prompt.
        output: the attribute of the result that has the images; "" for a result that is itself the tensor.
        denoisers: names of the networks that are called in the denoising loop, in the order of their first calls.
        call: more arguments for every call.
        rows: makes more arguments for the images with these numbers, from (numbers, guided).
        starts_from_noise: False for a pipeline that starts from an image.
        modular: whether the pipeline is a `ModularPipeline`.
    """

    make: Callable[[], Any]
    latents: tuple[int, ...]
    kind: Literal["flow", "diffusion"]
    layout: Literal["plain", "2x2", "1x1"] = "plain"
    given: Literal["loop", "unpacked"] | None = "loop"
    channels: int = 0
    guidance: str | None = "guidance_scale"
    embedded: bool = False
    free_at: float | None = 1.0
    guided: dict[str, Any] = field(default_factory=lambda: {"guidance_scale": 5.0})
    unguided: dict[str, Any] = field(default_factory=lambda: {"guidance_scale": 1.0})
    prompted: bool = True
    per_prompt: str | None = "num_images_per_prompt"
    prompt_lists: bool = False
    output: str = "images"
    denoisers: tuple[str, ...] = ("transformer",)
    call: dict[str, Any] = field(default_factory=dict)
    rows: Callable[[range, bool], dict[str, Any]] | None = None
    starts_from_noise: bool = True
    modular: bool = False


# --- text ---

_SPECIAL = ("<pad>", "</s>", "<unk>", "<s>", "<|im_start|>", "<|im_end|>")
_VOCABULARY = {token: i for i, token in enumerate([*_SPECIAL, *string.printable])}
_IDS = {"vocab_size": len(_VOCABULARY), "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 3}
_CHAT = (
    "{% for message in messages %}{% if message.role == 'user' %}<|im_start|>"
    "{% if message.content is string %}{{ message.content }}{% else %}{{ message.content[0].text }}{% endif %}"
    "<|im_end|>{% endif %}{% endfor %}"
)


class _Spelling(transformers.PreTrainedTokenizerFast):
    """As a processor of a vision-language model, it can be called with `images=None` and `videos=None`."""

    def __call__(self, *args: Any, images: None = None, videos: None = None, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs)


def spelling(template: str = "$A </s>", padding_side: str = "right") -> Any:
    """A tokenizer with a token for every character, wrapped in the special tokens of `template`."""
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(_VOCABULARY, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    model.add_special_tokens(list(_SPECIAL))
    special = [(token, _VOCABULARY[token]) for token in _SPECIAL if token in template]
    model.post_processor = tokenizers.processors.TemplateProcessing(single=template, special_tokens=special)
    model.decoder = tokenizers.decoders.Fuse()
    return _Spelling(
        tokenizer_object=model,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        bos_token="<s>",
        padding_side=padding_side,
        model_max_length=512,
        chat_template=_CHAT,
    )


def clip(width: int, projected: bool = False) -> Any:
    """A CLIP text encoder as `tiny.text_encoder`, of another width."""
    config = tiny.text_encoder().config.to_dict() | {"hidden_size": width, "projection_dim": width}
    kind = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    return kind(transformers.CLIPTextConfig(**config)).eval()


def t5(kind: Any = transformers.T5EncoderModel, config: Any = transformers.T5Config) -> Any:
    """A two-layer T5 or UMT5 encoder."""
    sizes = {"d_model": _WIDTH, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}
    return kind(config(**sizes, vocab_size=len(_VOCABULARY), pad_token_id=0, eos_token_id=1)).eval()


_DECODER = {
    "hidden_size": _WIDTH,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}


def gemma() -> Any:
    """A two-layer Gemma 2 without a head."""
    return transformers.Gemma2Model(transformers.Gemma2Config(**_DECODER, **_IDS, head_dim=16)).eval()


def qwen3(kind: Any, layers: int = 2, width: int = _WIDTH) -> Any:
    """A Qwen 3 of class `kind`."""
    sizes = {**_DECODER, "num_hidden_layers": layers, "hidden_size": width, "intermediate_size": width}
    return kind(transformers.Qwen3Config(**sizes, **_IDS, head_dim=16)).eval()


def glm() -> Any:
    """A two-layer GLM without a head."""
    return transformers.GlmModel(transformers.GlmConfig(**_DECODER, **_IDS, head_dim=16)).eval()


def bert() -> Any:
    """A two-layer BERT."""
    config = transformers.BertConfig(
        vocab_size=len(_VOCABULARY),
        hidden_size=_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=512,
    )
    return transformers.BertModel(config).eval()


def qwen_vl() -> Any:
    """A two-layer Qwen 2.5 VL; its vision part is never called."""
    rope = {"mrope_section": [2, 2, 4], "rope_type": "default", "rope_theta": 1e6}
    config = transformers.Qwen2_5_VLConfig(
        text_config={**_DECODER, **_IDS, "rope_parameters": rope},
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": _WIDTH,
        },
        **{f"{kind}_token_id": 2 for kind in ("image", "video", "vision_start", "vision_end")},
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config).eval()


def mistral3(layers: int, width: int) -> Any:
    """A Mistral 3; its vision part is never called."""
    sizes = {**_DECODER, "num_hidden_layers": layers, "hidden_size": width, "intermediate_size": width}
    config = transformers.Mistral3Config(
        text_config={"model_type": "mistral", **sizes, **_IDS, "head_dim": 8, "sliding_window": None},
        vision_config={
            "model_type": "pixtral",
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 8,
            "patch_size": 4,
        },
        image_token_index=2,
    )
    return transformers.Mistral3ForConditionalGeneration(config).eval()


# --- autoencoders ---


# Of each channel, for the autoencoders that have such statistics.
_MEAN, _STD = [0.3, -0.2, 0.1, 0.5], [1.5, 0.7, 1.2, 2.0]


def vae(levels: int = 1, **config: Any) -> Any:
    """An autoencoder for 4-channel latents that downsamples `levels` − 1 times by two."""
    return diffusers.AutoencoderKL(
        block_out_channels=[8] * levels,
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=8 * 2 ** (levels - 1),
        **config,
    ).eval()


def shifted_vae(levels: int = 1) -> Any:
    """An autoencoder with the shift that flow models have."""
    return vae(levels, shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False)


# --- pipelines with a UNet ---


def _modular(blocks: Any, classic: Any, **more: Any) -> Any:
    pipe = blocks.get_workflow("text2image").init_pipeline()
    wanted = set(pipe.pretrained_component_names)
    given = {name: part for name, part in classic.components.items() if name in wanted and part is not None}
    pipe.update_components(**given, **more)
    return pipe


def _sd2() -> Any:
    parts = tiny.build("sd").components
    return diffusers.StableDiffusionPipeline(
        **{
            **parts,
            "vae": tiny.vae(),
            "text_encoder": tiny.text_encoder(),
            "unet": tiny.unet(use_linear_projection=True, attention_head_dim=(2, 4)),
            "scheduler": diffusers.DDIMScheduler(
                **tiny._SD_NOISE,
                prediction_type="v_prediction",
                clip_sample=False,
                set_alpha_to_one=False,
            ),
        },
        requires_safety_checker=False,
    )


def _pictures(numbers: range, guided: bool) -> dict[str, Any]:
    return {"image": torch.stack([_row(300 + i, 3, 8, 8).sigmoid() for i in numbers])}


def _row(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _img2img() -> Any:
    return diffusers.StableDiffusionXLImg2ImgPipeline(**tiny._sdxl().components, add_watermarker=False)


def _controlnet() -> Any:
    pipe = tiny._sd()
    controlnet = diffusers.ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(8,))
    for part in controlnet.parameters():
        nn.init.normal_(part, std=0.2)
    return diffusers.StableDiffusionControlNetPipeline(
        **pipe.components, controlnet=controlnet.eval(), requires_safety_checker=False
    )


_IMAGE_WIDTH = 16  # of the image embeddings of the IP-Adapter


def _ip_adapter() -> Any:
    pipe = tiny._sd()
    width = pipe.unet.config.cross_attention_dim
    projection = {
        "proj.weight": torch.randn(4 * width, _IMAGE_WIDTH),
        "proj.bias": torch.zeros(4 * width),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }
    layers = {}
    names = [name for name in pipe.unet.attn_processors if "attn2" in name]
    for i, name in enumerate(names):
        layer = pipe.unet.get_submodule(name.removesuffix(".processor"))
        for part in ("k", "v"):
            layers[f"{2 * i + 1}.to_{part}_ip.weight"] = torch.randn(layer.inner_dim, width)
    pipe.unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": layers}])
    return pipe


def _image_embeds(numbers: range, guided: bool) -> dict[str, Any]:
    # One picture for all: the pipeline repeats the embeddings that it is given for every prompt.
    embeds = _row(400, 1, 1, _IMAGE_WIDTH)
    return {"ip_adapter_image_embeds": [torch.cat([0 * embeds, embeds]) if guided else embeds]}


def _pag() -> Any:
    parts = tiny._sd().components
    return diffusers.StableDiffusionPAGPipeline(
        **parts, requires_safety_checker=False, pag_applied_layers=["mid"]
    )


def _lcm() -> Any:
    parts = tiny._sd().components
    return diffusers.LatentConsistencyModelPipeline(
        **{
            **parts,
            "unet": tiny.unet(time_cond_proj_dim=8),
            "scheduler": diffusers.LCMScheduler(beta_schedule="scaled_linear"),
        },
        requires_safety_checker=False,
    )


def _ldm() -> Any:
    return diffusers.LDMTextToImagePipeline(
        vqvae=vae(levels=4),  # the pipeline assumes a factor of 8
        bert=tiny.text_encoder(),
        tokenizer=tiny.tokenizer(),
        unet=tiny.unet(),
        scheduler=diffusers.DDIMScheduler(
            beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False
        ),
    )


def _modular_sdxl() -> Any:
    guider = diffusers.ClassifierFreeGuidance(guidance_scale=5.0)
    return _modular(diffusers.StableDiffusionXLAutoBlocks(), tiny._sdxl(), guider=guider)


# --- pipelines with a transformer, pictures ---


def _flow(**config: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(**config)


_FLUX = {
    "patch_size": 1,
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": _WIDTH,
    "axes_dims_rope": (4, 4, 8),
}


def _flux(embedded: bool = True) -> Any:
    return diffusers.FluxPipeline(
        transformer=diffusers.FluxTransformer2DModel(
            **_FLUX, pooled_projection_dim=_WIDTH, guidance_embeds=embedded
        ).eval(),
        # As of "dev" and "schnell": only the first one's shift depends on the size.
        scheduler=_flow(use_dynamic_shifting=True) if embedded else _flow(shift=1.0),
        vae=shifted_vae(),
        text_encoder=clip(_WIDTH),
        tokenizer=tiny.tokenizer(),
        text_encoder_2=t5(),
        tokenizer_2=spelling(),
    )


def _flux2(klein: bool = False) -> Any:
    width = 16
    given = {
        "transformer": diffusers.Flux2Transformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=3 * width,
            timestep_guidance_channels=16,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=not klein,
        ).eval(),
        "scheduler": _flow(use_dynamic_shifting=True),
        "vae": diffusers.AutoencoderKLFlux2(
            block_out_channels=(8,),
            down_block_types=("DownEncoderBlock2D",),
            up_block_types=("UpDecoderBlock2D",),
            latent_channels=4,
            norm_num_groups=4,
            layers_per_block=1,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ).eval(),
        "tokenizer": spelling("$A"),
    }
    given["vae"].bn.running_mean.normal_()
    given["vae"].bn.running_var.uniform_(0.5, 2.0)
    if klein:
        text = qwen3(transformers.Qwen3ForCausalLM, layers=27, width=width)
        return diffusers.Flux2KleinPipeline(**given, text_encoder=text)
    return diffusers.Flux2Pipeline(**given, text_encoder=mistral3(30, width))


def _qwen() -> Any:
    return diffusers.QwenImagePipeline(
        transformer=diffusers.QwenImageTransformer2DModel(
            patch_size=2,
            in_channels=16,
            out_channels=4,
            num_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=_WIDTH,
            axes_dims_rope=(8, 4, 4),
        ).eval(),
        scheduler=_flow(use_dynamic_shifting=True),
        vae=diffusers.AutoencoderKLQwenImage(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 1],
            num_res_blocks=1,
            temperal_downsample=[False],
            latents_mean=_MEAN,
            latents_std=_STD,
        ).eval(),
        text_encoder=qwen_vl(),
        tokenizer=spelling("$A"),
    )


def _zimage() -> Any:
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=_WIDTH,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    return diffusers.ZImagePipeline(
        transformer=transformer.eval(),
        scheduler=_flow(shift=3.0),
        vae=shifted_vae(),
        text_encoder=qwen3(transformers.Qwen3Model),
        tokenizer=spelling("$A"),
    )


def _sana() -> Any:
    return diffusers.SanaPipeline(
        tokenizer=spelling("<s> $A"),
        text_encoder=gemma(),
        vae=diffusers.AutoencoderDC(
            latent_channels=4,
            attention_head_dim=4,
            encoder_block_types=("ResBlock",) * 3,
            decoder_block_types=("ResBlock",) * 3,
            encoder_block_out_channels=(8,) * 3,
            decoder_block_out_channels=(8,) * 3,
            encoder_qkv_multiscales=((),) * 3,
            decoder_qkv_multiscales=((),) * 3,
            encoder_layers_per_block=(1,) * 3,
            decoder_layers_per_block=(1,) * 3,
        ).eval(),
        transformer=diffusers.SanaTransformer2DModel(
            patch_size=1,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_attention_heads=2,
            attention_head_dim=8,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=_WIDTH,
            sample_size=8,
        ).eval(),
        # The released models' own, a solver for flows.
        scheduler=diffusers.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )


def _pixart() -> Any:
    return diffusers.PixArtSigmaPipeline(
        tokenizer=spelling(),
        text_encoder=t5(),
        vae=tiny.vae(),
        transformer=diffusers.PixArtTransformer2DModel(
            sample_size=8,
            num_layers=1,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=2,
            caption_channels=_WIDTH,
            in_channels=4,
            cross_attention_dim=16,
            out_channels=8,
        ).eval(),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    )


def _hunyuan_dit() -> Any:
    return diffusers.HunyuanDiTPipeline(
        vae=vae(levels=4),  # the pipeline assumes a factor of 8
        text_encoder=bert(),
        tokenizer=spelling("<s> $A </s>"),
        transformer=diffusers.HunyuanDiT2DModel(
            sample_size=8,
            num_layers=2,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=2,
            hidden_size=16,
            in_channels=4,
            cross_attention_dim=_WIDTH,
            cross_attention_dim_t5=_WIDTH,
            pooled_projection_dim=16,
        ).eval(),
        scheduler=diffusers.DDPMScheduler(
            beta_schedule="scaled_linear", prediction_type="v_prediction", clip_sample=False
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        text_encoder_2=t5(),
        tokenizer_2=spelling(),
    )


def _lumina2() -> Any:
    return diffusers.Lumina2Pipeline(
        transformer=diffusers.Lumina2Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            hidden_size=32,
            num_layers=1,
            num_refiner_layers=1,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=16,
            axes_dim_rope=[8, 4, 4],
            axes_lens=[128, 32, 32],
            cap_feat_dim=_WIDTH,
        ).eval(),
        scheduler=_flow(shift=3.0),
        vae=shifted_vae(levels=4),  # the pipeline assumes a factor of 8
        text_encoder=gemma(),
        tokenizer=spelling("<s> $A"),
    )


def _auraflow() -> Any:
    return diffusers.AuraFlowPipeline(
        tokenizer=spelling(),
        text_encoder=t5(transformers.UMT5EncoderModel, transformers.UMT5Config),
        vae=tiny.vae(),
        transformer=diffusers.AuraFlowTransformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            attention_head_dim=8,
            num_attention_heads=4,
            caption_projection_dim=32,
            joint_attention_dim=_WIDTH,
            out_channels=4,
            pos_embed_max_size=64,
        ).eval(),
        scheduler=_flow(shift=1.73),
    )


def _cogview4() -> Any:
    return diffusers.CogView4Pipeline(
        tokenizer=spelling("<s> $A", padding_side="left"),
        text_encoder=glm(),
        vae=vae(levels=2),  # the pipeline wants sizes divisible by 16
        transformer=diffusers.CogView4Transformer2DModel(
            patch_size=2,
            in_channels=4,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            out_channels=4,
            text_embed_dim=_WIDTH,
            time_embed_dim=8,
            condition_dim=4,
        ).eval(),
        scheduler=_flow(
            base_shift=0.25,
            max_shift=0.75,
            base_image_seq_len=256,
            use_dynamic_shifting=True,
            time_shift_type="linear",
        ),
    )


def _chroma() -> Any:
    return diffusers.ChromaPipeline(
        scheduler=_flow(use_dynamic_shifting=True),
        vae=shifted_vae(),
        text_encoder=t5(),
        tokenizer=spelling(),
        transformer=diffusers.ChromaTransformer2DModel(
            **_FLUX, approximator_num_channels=16, approximator_hidden_dim=16, approximator_layers=1
        ).eval(),
    )


def _kandinsky5() -> Any:
    pipe = diffusers.Kandinsky5T2IPipeline(
        transformer=diffusers.Kandinsky5Transformer3DModel(
            in_visual_dim=4,
            in_text_dim=_WIDTH,
            in_text_dim2=16,
            time_dim=16,
            out_visual_dim=4,
            patch_size=(1, 2, 2),
            model_dim=16,
            ff_dim=32,
            num_text_blocks=1,
            num_visual_blocks=1,
            axes_dims=(4, 2, 2),
        ).eval(),
        vae=shifted_vae(levels=4),  # the pipeline assumes a factor of 8
        text_encoder=qwen_vl(),
        tokenizer=spelling("$A"),
        text_encoder_2=tiny.text_encoder(),
        tokenizer_2=tiny.tokenizer(),
        scheduler=_flow(shift=7.0),
    )
    pipe.resolutions = [(64, 64)]  # it takes the nearest one of a list, of a megapixel each
    return pipe


def _dit() -> Any:
    return diffusers.DiTPipeline(
        transformer=diffusers.DiTTransformer2DModel(
            sample_size=8,
            num_layers=1,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=2,
            in_channels=4,
            out_channels=8,
            num_embeds_ada_norm=1000,
        ).eval(),
        vae=tiny.vae(),
        scheduler=diffusers.DDIMScheduler(clip_sample=False),
        id2label={3: "a", 5: "b"},
    )


def _modular_flux() -> Any:
    return _modular(diffusers.FluxAutoBlocks(), _flux())


# --- pipelines with a transformer, videos ---


def _wan(two: bool = False) -> Any:
    def transformer() -> Any:
        return diffusers.WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=_WIDTH,
            freq_dim=16,
            ffn_dim=32,
            num_layers=1,
            rope_max_seq_len=32,
        ).eval()

    return diffusers.WanPipeline(
        tokenizer=spelling(),
        text_encoder=t5(transformers.UMT5EncoderModel, transformers.UMT5Config),
        vae=diffusers.AutoencoderKLWan(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
            latents_mean=_MEAN,
            latents_std=_STD,
        ).eval(),
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        )
        if two
        else _flow(shift=3.0),
        transformer=transformer(),
        transformer_2=transformer() if two else None,
        boundary_ratio=0.875 if two else None,
    )


def _ltx() -> Any:
    pipe = diffusers.LTXPipeline(
        scheduler=_flow(use_dynamic_shifting=True),
        vae=diffusers.AutoencoderKLLTXVideo(
            latent_channels=4,
            block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 8, 8, 8),
            layers_per_block=(1, 1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1, 1),
            spatio_temporal_scaling=(True, True, False, False),
            decoder_spatio_temporal_scaling=(True, True, False, False),
            decoder_inject_noise=(False, False, False, False, False),
            upsample_residual=(False, False, False, False),
            upsample_factor=(1, 1, 1, 1),
            patch_size=1,
            patch_size_t=1,
        ).eval(),
        text_encoder=t5(),
        tokenizer=spelling(),
        transformer=diffusers.LTXVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            cross_attention_dim=16,
            num_layers=1,
            caption_channels=_WIDTH,
        ).eval(),
    )
    pipe.vae.latents_mean.copy_(torch.tensor(_MEAN))
    pipe.vae.latents_std.copy_(torch.tensor(_STD))
    return pipe


def _cogvideox() -> Any:
    return diffusers.CogVideoXPipeline(
        tokenizer=spelling(),
        text_encoder=t5(),
        vae=diffusers.AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * 4,
            up_block_types=("CogVideoXUpBlock3D",) * 4,
            block_out_channels=(8, 8, 8, 8),
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=2,
        ).eval(),
        transformer=diffusers.CogVideoXTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=4,
            time_embed_dim=8,
            text_embed_dim=_WIDTH,
            num_layers=1,
            sample_width=4,
            sample_height=4,
            sample_frames=5,
        ).eval(),
        scheduler=diffusers.CogVideoXDDIMScheduler(prediction_type="v_prediction"),
    )


# --- the table ---

_UNET = {"kind": "diffusion", "denoisers": ("unet",)}
_EIGHT = {"height": 8, "width": 8}
_SHORT = {**_EIGHT, "max_sequence_length": 16}
_BIG = {"height": 64, "width": 64}
_VIDEO = {"height": 32, "width": 32, "num_frames": 5, "max_sequence_length": 16}
_TRUE = {
    "guidance": "true_cfg_scale",
    "guided": {"true_cfg_scale": 3.0, "negative_prompt": "z"},
    "unguided": {},
}
_NO_GUIDANCE = {"guidance": None, "guided": {}, "unguided": {}}

FAMILIES: dict[str, Family] = {
    "sd": Family(tiny._sd, (4, 8, 8), **_UNET, call=_EIGHT),
    "sd2": Family(_sd2, (4, 8, 8), **_UNET, call=_EIGHT),
    "sdxl": Family(tiny._sdxl, (4, 8, 8), **_UNET, call=_EIGHT),
    "sdxl-img2img": Family(
        _img2img, (4, 8, 8), **_UNET, call={"strength": 0.75}, rows=_pictures, starts_from_noise=False
    ),
    "sd-controlnet": Family(_controlnet, (4, 8, 8), **_UNET, call=_EIGHT, rows=_pictures),
    "sd-ip-adapter": Family(_ip_adapter, (4, 8, 8), **_UNET, call=_EIGHT, rows=_image_embeds),
    "sd-pag": Family(_pag, (4, 8, 8), **_UNET, call={**_EIGHT, "pag_scale": 3.0}),
    "lcm": Family(_lcm, (4, 8, 8), **_UNET, embedded=True, free_at=None, call=_EIGHT),
    "sd3": Family(tiny._sd3, (4, 8, 8), "flow", call=_EIGHT),
    "flux": Family(_flux, (4, 8, 8), "flow", "2x2", embedded=True, **_TRUE, call=_SHORT),
    "flux-schnell": Family(lambda: _flux(embedded=False), (4, 8, 8), "flow", "2x2", **_TRUE, call=_SHORT),
    "flux2": Family(
        _flux2,
        (16, 4, 4),
        "flow",
        "1x1",
        given="unpacked",
        embedded=True,
        free_at=None,
        unguided={"guidance_scale": 0.0},
        call=_SHORT,
    ),
    "flux2-klein": Family(
        lambda: _flux2(klein=True), (16, 4, 4), "flow", "1x1", given="unpacked", call=_SHORT
    ),
    "qwen": Family(
        _qwen, (4, 8, 8), "flow", "2x2", **_TRUE, call={"height": 16, "width": 16, "max_sequence_length": 256}
    ),
    "zimage": Family(
        _zimage,
        (4, 8, 8),
        "flow",
        free_at=0.0,
        unguided={"guidance_scale": 0.0},
        prompt_lists=True,
        call=_SHORT,
    ),
    "sana": Family(
        _sana,
        (4, 8, 8),
        "flow",
        call={
            "height": 32,
            "width": 32,
            "max_sequence_length": 16,
            "use_resolution_binning": False,
            "complex_human_instruction": None,
        },
    ),
    "pixart": Family(
        _pixart,
        (4, 8, 8),
        "diffusion",
        call={**_SHORT, "use_resolution_binning": False, "clean_caption": False},
    ),
    "hunyuan-dit": Family(
        _hunyuan_dit, (4, 8, 8), "diffusion", call={**_BIG, "use_resolution_binning": False}
    ),
    "lumina2": Family(
        _lumina2, (4, 8, 8), "flow", call={**_BIG, "max_sequence_length": 32, "system_prompt": "a"}
    ),
    "auraflow": Family(_auraflow, (4, 8, 8), "flow", call=_SHORT),
    "cogview4": Family(_cogview4, (4, 8, 8), "flow", call={"height": 16, "width": 16}),
    "chroma": Family(_chroma, (4, 8, 8), "flow", "2x2", call=_SHORT),
    "kandinsky5": Family(_kandinsky5, (1, 8, 8, 4), "flow", channels=3, output="image", call=_BIG),
    "wan": Family(
        _wan, (4, 2, 4, 4), "flow", output="frames", per_prompt="num_videos_per_prompt", call=_VIDEO
    ),
    "wan22": Family(
        lambda: _wan(two=True),
        (4, 2, 4, 4),
        "flow",
        output="frames",
        per_prompt="num_videos_per_prompt",
        denoisers=("transformer", "transformer_2"),
        call=_VIDEO,
    ),
    "ltx": Family(
        _ltx, (4, 2, 8, 8), "flow", "1x1", output="frames", per_prompt="num_videos_per_prompt", call=_VIDEO
    ),
    "cogvideox": Family(
        _cogvideox,
        (2, 4, 4, 4),
        "diffusion",
        channels=1,
        output="frames",
        per_prompt=None,
        call={"height": 32, "width": 32, "num_frames": 5},
    ),
    "dit": Family(
        _dit,
        (4, 8, 8),
        "diffusion",
        prompted=False,
        per_prompt=None,
        given=None,
        rows=lambda numbers, guided: {"class_labels": [3 + 2 * i for i in numbers]},
    ),
    "ldm": Family(_ldm, (4, 8, 8), **_UNET, per_prompt=None, call=_BIG),
    "ddpm": Family(
        tiny._ddpm,
        (3, 8, 8),
        **_UNET,
        **_NO_GUIDANCE,
        prompted=False,
        per_prompt=None,
        given=None,
        rows=lambda numbers, guided: {"batch_size": len(numbers)},
    ),
    "modular-sdxl": Family(
        _modular_sdxl, (4, 8, 8), **_UNET, **_NO_GUIDANCE, output="", call=_EIGHT, modular=True
    ),
    "modular-flux": Family(
        _modular_flux,
        (4, 8, 8),
        "flow",
        "2x2",
        **_NO_GUIDANCE,
        embedded=True,
        free_at=None,
        output="",
        call=_SHORT,
        modular=True,
    ),
}

NAMES = tuple(FAMILIES)
# Those with a transformer that the package trains, and one of them for each class of transformers.
FLOWS = ("sd3", "flux", "flux-schnell", "flux2", "flux2-klein", "qwen", "zimage", "sana", "lumina2")
TRANSFORMERS = ("sd3", "flux", "flux2", "qwen", "zimage", "sana", "lumina2")


def latent_shape(name: str) -> tuple[int, ...]:
    """The shape of one latent before any packing."""
    return FAMILIES[name].latents


def denoisers(pipe: Any, name: str) -> list[Any]:
    """The networks of `build(name)` that are called in the denoising loop."""
    return [getattr(pipe, part) for part in FAMILIES[name].denoisers]


def build(name: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """The tiny pipeline `name` (one of `NAMES`) with weights drawn from `seed`, its progress bar off."""
    if name in tiny.NAMES and name != "flux":
        return tiny.build(name, seed, dtype)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pipe = FAMILIES[name].make()
        for denoiser in denoisers(pipe, name):
            _fill(denoiser)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(dtype) if dtype != torch.float32 else pipe


def _fill(model: nn.Module) -> None:
    # Untrained, some transformers ignore the prompt or the time: their modulation starts at zero.
    # And attention of weights as small as theirs hears hardly anything of it.
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.1) if not parameter.any() else parameter.data.mul_(2)


def inputs(name: str, batch: int = 1, steps: int = 4, guided: bool = True, first: int = 0) -> dict[str, Any]:
    """Keyword arguments for the call of `build(name)`: `batch` different small pictures or videos, as tensors.

    The prompts differ in length. No generator is given (see `generators`). The images have the numbers `first`,
    `first` + 1, ...: what is given for an image depends on its number alone.
    """
    family, numbers = FAMILIES[name], range(first, first + batch)
    call = {"num_inference_steps": steps, "output_type": "pt", **family.call}
    call |= family.guided if guided else family.unguided
    if family.prompted:
        call["prompt"] = [f"a {string.ascii_lowercase[i] * (3 + 4 * i)}" for i in numbers]
    if "negative_prompt" in call:
        call["negative_prompt"] = [call["negative_prompt"]] * batch
    return call | (family.rows(numbers, guided) if family.rows else {})


def generators(batch: int, seed: int = 7, first: int = 0) -> list[torch.Generator]:
    """One generator an image, those with the numbers `first`, `first` + 1, ..."""
    return tiny.generators(batch, seed + first)


def images(pipe: Any, name: str, batch: int = 1, **changes: Any) -> Tensor:
    """(batch, ...) float32, pictures or videos, one generator an image.

    `changes` go to `inputs` (`steps`, `guided`, `first`) or to the call.
    """
    own = {key: changes.pop(key) for key in ("steps", "guided", "first") if key in changes}
    drawn = generators(batch, first=own.get("first", 0))
    call = {**inputs(name, batch, **own), "generator": drawn, **changes}
    call = {key: _cast(value, pipe.dtype) for key, value in call.items()}
    output = FAMILIES[name].output
    with torch.no_grad():
        made = getattr(pipe(**call), output) if output else pipe(output="images", **call)
    return made.float() if isinstance(made, Tensor) else torch.as_tensor(made).float()


def one_by_one(pipe: Any, name: str, batch: int, **changes: Any) -> Tensor:
    """What `images(pipe, name, batch)` should give, from a call for each image."""
    return torch.cat([images(pipe, name, 1, first=i, **changes) for i in range(batch)])


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.to(dtype)
    return [_cast(part, dtype) for part in value] if isinstance(value, list) else value
