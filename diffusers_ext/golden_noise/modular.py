"""Golden noise as Modular Diffusers blocks, for SDXL.

    pipe = golden_noise_blocks().init_pipeline("stabilityai/stable-diffusion-xl-base-1.0")
    pipe.load_components()
    pipe.update_components(npnet=NPNetModel.from_pretrained("path/or/repo"))
    pipe(prompt="a red bag", output="images")[0]

Method: Zhou et al., *Golden Noise for Diffusion Models*, arXiv:2411.09502.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLAutoBlocks
from diffusers.modular_pipelines import (
    ComponentSpec,
    InputParam,
    ModularPipelineBlocks,
    OutputParam,
    PipelineState,
    SequentialPipelineBlocks,
)
from diffusers.modular_pipelines.stable_diffusion_xl.before_denoise import StableDiffusionXLPrepareLatentsStep
from torch import Tensor

from ..core.prompts import PromptEmbeds
from .apply import check_npnet, check_prompt_options, mix
from .npnet import NPNetModel

_MODEL_NAME = "stable-diffusion-xl"


class GivenLatentsStep(ModularPipelineBlocks):
    """Records for `GoldenNoiseStep` whether the caller has passed latents.

    It goes right before `prepare_latents`, which overwrites its input, so that the two cases look the same
    afterwards.

    Inputs:
        latents: (B, 4, H, W) or None.

    Outputs:
        latents_given: bool.
    """

    model_name = _MODEL_NAME

    @property
    def description(self) -> str:
        return "Records whether the caller has passed `latents`, which golden noise does not change."

    @property
    def inputs(self) -> list[InputParam]:
        return [InputParam("latents", type_hint=Tensor, description="Unit-variance noise to start from.")]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam("latents_given", bool, "Whether `latents` were passed by the caller.")]

    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        block_state: Any = self.get_block_state(state)
        block_state.latents_given = block_state.latents is not None
        self.set_block_state(state, block_state)
        return components, state


class GoldenNoiseStep(ModularPipelineBlocks):
    """Replaces the random noise with golden noise, in float32. Goes right after `prepare_latents`.

    On its own it cannot distinguish latents passed by the caller from random ones (see `GivenLatentsStep`)
    and replaces both, unless the call passes `latents_given=True` or `golden_strength=0.0`.
    `golden_noise_blocks` adds both steps.

    Components:
        npnet: an `NPNetModel` for the pipeline's latents and prompt embeddings.
        scheduler: its `init_noise_sigma` is the scale of the latents.

    Inputs:
        golden_strength: 0 for exactly the random noise, 1 for golden noise; other values interpolate or
            extrapolate linearly.
        latents_given: whether the latents were passed by the caller. They are then not changed.
        latents: (B, 4, H, W), the output of `prepare_latents`; any floating dtype, which is kept.
        prompt_embeds: (B, tokens, dim), one row for each image: the output of the `input` block.
        pooled_prompt_embeds: (B, pooled dim), one row for each image, for a network with `pooled_dim`.
        clip_skip: as the text encoder block was given it.

    Outputs:
        latents: of the same shape, dtype and device.

    Raises (when called):
        ValueError: the pipeline has no `npnet`, it is not an `NPNetModel`, its sizes do not match the
            pipeline, it was trained with another `clip_skip`, or its output is not finite. Nothing is checked if
            golden noise is off.
    """

    model_name = _MODEL_NAME

    @property
    def description(self) -> str:
        return (
            "Golden noise step (arXiv:2411.09502) that maps the random noise to noise that matches the prompt"
            " better. It goes right after prepare_latents of a text-to-image workflow."
        )

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [
            ComponentSpec("npnet", NPNetModel, description="The network that predicts golden noise."),
            ComponentSpec("scheduler", EulerDiscreteScheduler),
        ]

    @property
    def inputs(self) -> list[InputParam]:
        return [
            InputParam(
                "golden_strength",
                type_hint=float,
                default=1.0,
                description="0 starts from the random noise, 1 from the golden noise; other values"
                " interpolate or extrapolate linearly.",
            ),
            InputParam(
                "latents_given",
                type_hint=bool,
                default=False,
                description="Whether the latents were passed by the caller. They are then not changed.",
            ),
            InputParam(
                "latents",
                type_hint=Tensor,
                required=True,
                description="The scaled noise. Can be generated in prepare_latents step.",
            ),
            InputParam(
                "prompt_embeds",
                type_hint=Tensor,
                required=True,
                description="Text embeddings, one row for each image. Can be generated in input step.",
            ),
            InputParam(
                "pooled_prompt_embeds",
                type_hint=Tensor,
                description="Pooled text embeddings, one row for each image. Can be generated in input step.",
            ),
            InputParam("clip_skip", description="Layers of CLIP that the text encoder step skips."),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam("latents", Tensor, "The latents to start from: scaled golden noise.")]

    @torch.no_grad()
    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        block_state: Any = self.get_block_state(state)
        if block_state.golden_strength == 0 or block_state.latents_given:
            return components, state
        if components.npnet is None:
            raise ValueError(
                "Golden noise needs the component npnet, which this pipeline does not have yet. Call"
                ' pipe.update_components(npnet=NPNetModel.from_pretrained("path")), or pass'
                " golden_strength=0.0 to turn golden noise off."
            )
        check_npnet(components.npnet)
        check_prompt_options(components.npnet, {"clip_skip": block_state.clip_skip})
        scale = float(components.scheduler.init_noise_sigma)
        noise = block_state.latents.float() / scale
        # The input step has repeated the embeddings for num_images_per_prompt, in the latents' order.
        embeds = PromptEmbeds(block_state.prompt_embeds, pooled=block_state.pooled_prompt_embeds)
        golden = mix(components.npnet, noise, embeds, block_state.golden_strength)
        block_state.latents = (golden * scale).to(block_state.latents)
        self.set_block_state(state, block_state)
        return components, state


def golden_noise_blocks(workflow: str = "text2image") -> SequentialPipelineBlocks:
    """SDXL's blocks with golden noise.

    Args:
        workflow: a workflow of `StableDiffusionXLAutoBlocks` that ends in "text2image", such as
            "controlnet_text2image".

    Returns:
        Blocks with `GivenLatentsStep` as "given_latents" before `prepare_latents` and `GoldenNoiseStep` as
        "golden_noise" after it. `init_pipeline()` makes a pipeline of them. Saved pipelines need it too
        (`golden_noise_blocks().init_pipeline(path)`), because diffusers does not save the list of blocks.

    Raises:
        ValueError: an unknown workflow, or one that starts from an image.
    """
    blocks: dict[str, ModularPipelineBlocks] = {}
    found = False
    for name, block in StableDiffusionXLAutoBlocks().get_workflow(workflow).sub_blocks.items():
        if isinstance(block, StableDiffusionXLPrepareLatentsStep):
            found = True
            blocks |= {"given_latents": GivenLatentsStep(), name: block, "golden_noise": GoldenNoiseStep()}
        else:
            blocks[name] = block
    if not found:
        raise ValueError(
            f"The workflow {workflow!r} does not start from pure noise: golden noise is for those that end in"
            " text2image."
        )
    return SequentialPipelineBlocks.from_blocks_dict(blocks)
