"""diffusers-ext: published methods as drop-in plug-ins for any `DiffusionPipeline`.

Names are resolved on first use, so that the command line answers without importing torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    "ASDMUNet2DConditionModel": "diffusers_ext.asdm.unet",
    "PruningPlan": "diffusers_ext.asdm.plan",
    "analyse_pruning": "diffusers_ext.asdm.search",
    "plan_pruning": "diffusers_ext.asdm.search",
    "preset_plan": "diffusers_ext.asdm.plan",
    "prune_unet": "diffusers_ext.asdm.prune",
    "record_probes": "diffusers_ext.asdm.sensitivity",
    "MixtureSource": "diffusers_ext.sign.source",
    "GaussianStats": "diffusers_ext.teleport.gaussian",
    "NPNetModel": "diffusers_ext.golden_noise.npnet",
    "SIGNPipeline": "diffusers_ext.sign.pipelines",
    "StepwiseVariationLoss": "diffusers_ext.smooth_lora.variation",
    "TeleportScheduler": "diffusers_ext.teleport.scheduler",
    "apply_golden_noise": "diffusers_ext.golden_noise.inject",
    "apply_gri_attention": "diffusers_ext.asdm.gri_attention",
    "apply_teleport": "diffusers_ext.teleport.inject",
    "calibrate_skip": "diffusers_ext.teleport.calibrate",
    "compute_istd": "diffusers_ext.evaluation.istd",
    "fit_prompt_map": "diffusers_ext.teleport.prompt_map",
    "golden_latents": "diffusers_ext.golden_noise.inject",
    "ddim_invert": "diffusers_ext.smooth_lora.inversion",
    "edit": "diffusers_ext.smooth_lora.editing",
    "encode_pictures": "diffusers_ext.data.latents",
    "interpolate": "diffusers_ext.smooth_lora.interpolation",
    "load_smooth_lora": "diffusers_ext.smooth_lora.adapter",
    "null_text_invert": "diffusers_ext.smooth_lora.null_text",
    "prompt_means": "diffusers_ext.teleport.prompt_mean",
    "reconstruct": "diffusers_ext.smooth_lora.null_text",
    "redenoise": "diffusers_ext.golden_noise.redenoise",
    "remove_golden_noise": "diffusers_ext.golden_noise.inject",
    "remove_gri_attention": "diffusers_ext.asdm.gri_attention",
    "remove_teleport": "diffusers_ext.teleport.inject",
    "unload_smooth_lora": "diffusers_ext.smooth_lora.adapter",
    # Not in a module of its own name: importing that would put the module in place of the function.
    "summary": "diffusers_ext.overview",
    # diffusers looks the base classes up in the package that a component's model_index.json entry names.
    "ModelMixin": "diffusers",
    "SchedulerMixin": "diffusers",
}

if TYPE_CHECKING:
    from diffusers import ModelMixin, SchedulerMixin

    from .asdm.gri_attention import apply_gri_attention, remove_gri_attention
    from .asdm.plan import PruningPlan, preset_plan
    from .asdm.prune import prune_unet
    from .asdm.search import analyse_pruning, plan_pruning
    from .asdm.sensitivity import record_probes
    from .asdm.unet import ASDMUNet2DConditionModel
    from .data.latents import encode_pictures
    from .evaluation.istd import compute_istd
    from .golden_noise.inject import apply_golden_noise, golden_latents, remove_golden_noise
    from .golden_noise.npnet import NPNetModel
    from .golden_noise.redenoise import redenoise
    from .overview import summary
    from .sign.pipelines import SIGNPipeline
    from .sign.source import MixtureSource
    from .smooth_lora.adapter import load_smooth_lora, unload_smooth_lora
    from .smooth_lora.editing import edit
    from .smooth_lora.interpolation import interpolate
    from .smooth_lora.inversion import ddim_invert
    from .smooth_lora.null_text import null_text_invert, reconstruct
    from .smooth_lora.variation import StepwiseVariationLoss
    from .teleport.calibrate import calibrate_skip
    from .teleport.gaussian import GaussianStats
    from .teleport.inject import apply_teleport, remove_teleport
    from .teleport.prompt_map import fit_prompt_map
    from .teleport.prompt_mean import prompt_means
    from .teleport.scheduler import TeleportScheduler

__all__ = [
    "ASDMUNet2DConditionModel",
    "GaussianStats",
    "MixtureSource",
    "ModelMixin",
    "NPNetModel",
    "PruningPlan",
    "SIGNPipeline",
    "SchedulerMixin",
    "StepwiseVariationLoss",
    "TeleportScheduler",
    "analyse_pruning",
    "apply_golden_noise",
    "apply_gri_attention",
    "apply_teleport",
    "calibrate_skip",
    "compute_istd",
    "ddim_invert",
    "edit",
    "encode_pictures",
    "fit_prompt_map",
    "golden_latents",
    "interpolate",
    "load_smooth_lora",
    "null_text_invert",
    "plan_pruning",
    "preset_plan",
    "prompt_means",
    "prune_unet",
    "reconstruct",
    "record_probes",
    "redenoise",
    "remove_golden_noise",
    "remove_gri_attention",
    "remove_teleport",
    "summary",
    "unload_smooth_lora",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
