"""Golden noise as blocks of Modular Diffusers, for SDXL.

    pipe = golden_noise_blocks().init_pipeline("stabilityai/stable-diffusion-xl-base-1.0")
    pipe.load_components()
    pipe.update_components(npnet=NPNetModel.from_pretrained("path/or/repo"))
    pipe(prompt="a red bag", output="images")[0]

The method is Zhou et al., *Golden Noise for Diffusion Models*, arXiv:2411.09502.
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

from .apply import check_npnet, mix
from .npnet import NPNetModel

_MODEL_NAME = "stable-diffusion-xl"


class GivenLatentsStep(ModularPipelineBlocks):
    """Right before `prepare_latents`: records for `GoldenNoiseStep` whether the caller has passed latents.

    `prepare_latents` writes its result over its input, so afterwards the two cases look alike.

    Inputs:
        latents: (B, 4, H, W) or None.

    Outputs:
        latents_given: bool.
    """

    model_name = _MODEL_NAME

    @property
    def description(self) -> str:
        return "Records whether `latents` were passed, which golden noise leaves as they are."

    @property
    def inputs(self) -> list[InputParam]:
        return [InputParam("latents", type_hint=Tensor, description="Noise of unit variance to start from.")]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam("latents_given", bool, "Whether `latents` were passed by the caller.")]

    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        block_state: Any = self.get_block_state(state)
        block_state.latents_given = block_state.latents is not None
        self.set_block_state(state, block_state)
        return components, state


class GoldenNoiseStep(ModularPipelineBlocks):
    """Right after `prepare_latents`: turns the noise golden, in float32, before the scheduler's scale.

    Alone it cannot tell latents that the caller has passed from random ones (see `GivenLatentsStep`) and makes both
    golden, unless the call says `latents_given=True` or `golden_strength=0.0`. With `golden_noise_blocks` it can.

    Components:
        npnet: an `NPNetModel` for the pipeline's latents and prompt embeddings.
        scheduler: whose `init_noise_sigma` the latents have been multiplied by.

    Inputs:
        golden_strength: 0 for the random noise, bit by bit, 1 for the network's, between and beyond in a
            straight line.
        latents_given: whether the latents are the caller's, which are left as they are.
        latents: (B, 4, H, W), the output of `prepare_latents`; any floating dtype, which is kept.
        prompt_embeds: (B, tokens, dim), a row for each picture: the output of the `input` block.

    Outputs:
        latents: of the same shape, dtype and device.

    Raises (when called):
        ValueError: golden noise is on and the pipeline has no `npnet`, it is no `NPNetModel`, its sizes are not
            the pipeline's, or its weights are broken.
    """

    model_name = _MODEL_NAME

    @property
    def description(self) -> str:
        return (
            "Golden noise step (arXiv:2411.09502) that turns the random noise into noise that suits the prompt. It"
            " goes right after prepare_latents of a text-to-image workflow."
        )

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [
            ComponentSpec("npnet", NPNetModel, description="The network that makes the noise golden."),
            ComponentSpec("scheduler", EulerDiscreteScheduler),
        ]

    @property
    def inputs(self) -> list[InputParam]:
        return [
            InputParam(
                "golden_strength",
                type_hint=float,
                default=1.0,
                description="0 starts from the random noise, 1 from the golden noise, between and beyond in a"
                " straight line.",
            ),
            InputParam(
                "latents_given",
                type_hint=bool,
                default=False,
                description="Whether the latents are the caller's, which are left as they are.",
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
                description="Text embeddings, a row for each picture. Can be generated in input step.",
            ),
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
                "Golden noise needs the component npnet, which this pipeline does not have yet:"
                ' pipe.update_components(npnet=NPNetModel.from_pretrained("path")), or call with'
                " golden_strength=0.0 to go without."
            )
        check_npnet(components.npnet)
        scale = float(components.scheduler.init_noise_sigma)
        noise = block_state.latents.float() / scale
        # The input step has repeated the embeddings for num_images_per_prompt, in the latents' order.
        golden = mix(components.npnet, noise, block_state.prompt_embeds, block_state.golden_strength)
        block_state.latents = (golden * scale).to(block_state.latents)
        self.set_block_state(state, block_state)
        return components, state


def golden_noise_blocks(workflow: str = "text2image") -> SequentialPipelineBlocks:
    """SDXL's blocks with golden noise.

    Args:
        workflow: one of `StableDiffusionXLAutoBlocks` that ends in "text2image", such as
            "controlnet_text2image".

    Returns:
        Blocks with `GivenLatentsStep` as "given_latents" before `prepare_latents` and `GoldenNoiseStep` as
        "golden_noise" after it. `init_pipeline()` makes them a pipeline; saved pipelines need it as well
        (`golden_noise_blocks().init_pipeline(path)`), since diffusers saves no list of blocks.

    Raises:
        ValueError: no such workflow, or one that starts from a picture, whose noise is mixed with it.
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
