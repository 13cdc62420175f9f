"""Wrong input to the public functions, and what is said about it: one line of code a case.

The code runs with `dx`, `torch`, `np` and the names that `Names` makes. The table of the documentation shows it as it is.
"""

import re
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, LCMScheduler

import diffusers_ext as dx
from diffusers_ext.asdm.networks import network_config
from diffusers_ext.sign.teacher import untrained_projector
from tests import families, tiny

SECTIONS: dict[str, list[str]] = {
    "Every method": [
        'dx.apply_teleport("a pipeline", stats)',
        'dx.apply_golden_noise("a pipeline", npnet)',
        "dx.apply_smooth_lora(ddpm, folder)",
        "dx.apply_gri_attention(ddpm)",
        "dx.apply_teleport(pipe, stats, skip=0.3); dx.apply_teleport(pipe, stats, skip=0.3)",
        "dx.apply_golden_noise(pipe, npnet); dx.apply_golden_noise(pipe, npnet)",
        "dx.apply_gri_attention(pipe); dx.apply_gri_attention(pipe)",
        'dx.pipeline_path("teleport-sd")',
    ],
    "Recipes": [
        "dx.Recipe.from_pipe(pipe)",
        "dx.Recipe.from_pretrained(folder)",
        "recipe.apply(ddpm)",
        "recipe.apply(pipe); recipe.apply(pipe)",
        'dx.Recipe({"my method": recipe.methods["teleport"]}, recipe.base)',
        'dx.tune(ddpm, ["a"], scorer)',
        'dx.tune(pipe, "a", scorer)',
        'dx.tune(pipe, ["a"], scorer, budget=8)',
        'dx.tune(pipe, ["a"], scorer, steps=())',
        'dx.tune(recipe.apply(pipe), ["a"], scorer)',
    ],
    "Teleportation": [
        "dx.apply_teleport(pipe)",
        'dx.apply_teleport(pipe, "stats.safetensors")',
        "dx.apply_teleport(pipe, stats, skip=1.5)",
        "dx.apply_teleport(pipe, stats, skip=-0.1)",
        'dx.apply_teleport(pipe, stats, skip="most")',
        "dx.apply_teleport(pipe, stats, sigma=-1.0)",
        'dx.apply_teleport(pipe, stats, mean_from="images")',
        "dx.apply_teleport(pipe, stats)",
        "dx.apply_teleport(ddpm, stats, skip=0.3)(num_inference_steps=4)",
        "dx.apply_teleport(lcm, stats)",
        "dx.TeleportScheduler(not_a_flow, stats, skip=0.3).set_timesteps(4)",
        "dx.apply_teleport(img2img, stats)",
        "dx.apply_teleport(unknown, stats)",
        "dx.TeleportScheduler(pipe.unet, stats)",
        "dx.TeleportScheduler(lcm_scheduler, stats)",
        "dx.GaussianStats.fit([])",
        "dx.GaussianStats.fit([torch.randn(1, 4, 8, 8)])",
        "dx.GaussianStats.fit([torch.randn(4, 4, 8, 8), torch.randn(4, 4, 6, 6)])",
        "dx.GaussianStats.fit([torch.full((4, 4, 8, 8), float('nan'))])",
        "dx.GaussianStats(torch.zeros(4, 8, 8), torch.zeros(256, 300), torch.ones(300), 1.0, 10)",
        "dx.GaussianStats(torch.zeros(4, 8, 8), torch.zeros(256, 2), -torch.ones(2), 1.0, 10)",
        "dx.GaussianStats.from_score(pipe, calls=10)",
        "dx.GaussianStats.from_score(pipe, prompts=[])",
        "dx.GaussianStats.from_score(ddpm, guidance_scale=2.0)",
        "dx.GaussianStats.from_score(img2img)",
        "dx.calibrate_skip(pipe, stats, prompts=[])",
        'dx.calibrate_skip(pipe, stats, prompts=["a"], num_images=0)',
        'dx.calibrate_skip(pipe, stats, prompts=["a"], tolerance=-1.0)',
        'dx.calibrate_skip(pipe, stats, prompts=["a"], num_inference_steps=1)',
        'dx.apply_teleport(pipe, stats, skip=0.3)("a", num_inference_steps=4, height=16, width=16)',
        "dx.GaussianStats.from_pretrained(folder)",
        "dx.prompt_means(pipe, stats, [])",
        'dx.prompt_means(pipe, stats, ["a"], num_calls=0)',
        "dx.fit_prompt_map(pipe, stats)",
        "dx.fit_prompt_map(ddpm, stats)",
        "list(dx.pipeline_samples(pipe, 0))",
        "list(dx.pipeline_samples(pipe, 2, prompts=[]))",
        'list(dx.pipeline_samples(ddpm, 2, prompts=["a red bag"]))',
        'list(dx.encoded_images(pipe, folder + "/nothing"))',
        "list(dx.encoded_images(pipe, folder))",
        "list(dx.encoded_images(pipe, np.full((2, 8, 8, 3), 300.0)))",
        "list(dx.encoded_images(ddpm.unet, np.zeros((2, 8, 8, 3))))",
    ],
    "Images": [
        "dx.encode_images(pipe, [])",
        'dx.encode_images(pipe, "cat.png")',
        "dx.encode_images(pipe, torch.zeros(8, 8, 3))",
        "dx.encode_images(pipe, torch.full((1, 3, 8, 8), 2.0))",
        "dx.encode_images(pipe, torch.full((1, 3, 8, 8), float('nan')))",
        "dx.encode_images(pipe, np.zeros((1, 8, 8, 5), np.float32))",
        "dx.encode_images(pipe.vae, [image, image.resize((16, 16))])",
    ],
    "Golden noise": [
        'dx.apply_golden_noise(pipe, "npnet")',
        "dx.apply_golden_noise(pipe, npnet, strength=float('nan'))",
        "dx.apply_golden_noise(ddpm, npnet)",
        "dx.apply_golden_noise(img2img, npnet)",
        "dx.apply_golden_noise(video, npnet)",
        "dx.apply_golden_noise(pipe, dx.NPNetModel(latent_channels=16, text_dim=16))",
        'dx.apply_golden_noise(pipe, dx.NPNetModel(text_dim=64))("a", num_inference_steps=2)',
        "dx.NPNetModel(width=0)",
        "dx.NPNetModel(text_dim=0)",
        "npnet(torch.randn(1, 3, 8, 8), torch.randn(1, 77, 16))",
        "npnet(torch.randn(1, 4, 8, 8), torch.randn(1, 77, 15))",
        "npnet(torch.randn(2, 4, 8, 8), torch.randn(1, 77, 16))",
        "npnet(torch.randn(4, 8, 8), torch.randn(1, 77, 16))",
        "npnet(torch.randn(1, 4, 8, 8), torch.randn(1, 77, 16), None, torch.randn(1, 16))",
        "dx.NPNetModel(pooled_dim=16)(latents, torch.randn(1, 77, 2048))",
        "dx.NPNetModel(legacy=True, pooled_dim=16)",
        'dx.redenoise(pipe, latents, prompt="a", guidance_scale=0.5)',
        'dx.redenoise(pipe, latents, prompt="a", num_inference_steps=0)',
        'dx.redenoise(pipe, latents, prompt="a", num_rounds=0)',
        'dx.redenoise(pipe, latents, prompt="a", jump=0.0)',
        'dx.redenoise(pipe, latents, prompt="a", jump=0.99)',
        'dx.redenoise(pipe, latents, prompt="a", jump=0.1, legacy_inversion=True)',
        'dx.redenoise(pipe, latents, prompt="a", gap="text")',
        'dx.redenoise(pipe, latents, prompt="a", gap="guidance")',
        'dx.redenoise(schnell, latents, prompt="a", gap="guidance")',
        'dx.redenoise(klein, latents, prompt="a", gap="cfg")',
        'dx.redenoise(schnell, latents, prompt="a")',
        'dx.redenoise(lcm, latents, prompt="a")',
        'dx.redenoise(pipe, torch.randn(2, 4, 8, 8), prompt="a")',
    ],
    "Smooth-LoRA, interpolation, inversion, editing": [
        "dx.apply_smooth_lora(pipe, folder)",
        'dx.apply_smooth_lora(pipe, folder + "/missing")',
        'dx.apply_smooth_lora(pipe, empty_file("pytorch_lora_weights.safetensors"))',
        'dx.interpolate(pipe, "a", latents=torch.randn(3, 4, 8, 8))',
        'dx.interpolate(pipe, "a", latents=latents, generator=[torch.Generator()] * 2)',
        'dx.interpolate(pipe, "a", generator=[torch.Generator()])',
        'dx.interpolate(pipe, "a", generator=[torch.Generator()] * 2, num_frames=1)',
        'dx.interpolate(pipe, "a", generator=[torch.Generator()] * 2, num_images_per_prompt=2)',
        'dx.interpolate(pipe, "a", generator=[torch.Generator()] * 2, output_type="latent")',
        'dx.interpolate(pipe, ["a", "b", "c"], generator=[torch.Generator()] * 2)',
        'dx.interpolate(img2img, "a", generator=[torch.Generator()] * 2)',
        "dx.ddim_invert(pipe, torch.randn(1, 3, 8, 8))",
        "dx.ddim_invert(pipe, latents, num_inference_steps=0)",
        'dx.ddim_invert(lcm, latents, "a")',
        'dx.ddim_invert(pipe, latents, "a", generator=torch.Generator())',
        "dx.ddim_invert(pipe, image)",
        'dx.edit(pipe, "a", "b", latents=latents, strength=1.5)',
        'dx.edit(pipe, "a", ["b", "c", "d"], latents=latents)',
        'dx.edit(ddpm, "a", "b", latents=torch.randn(1, 3, 8, 8))',
        'dx.null_text_invert(flux, latents, "a")',
        'dx.null_text_invert(pipe, latents, "a", guidance_scale=1.0)',
        'dx.null_text_invert(pipe, latents, "a", num_inner_steps=-1)',
        "dx.compute_istd(pipe, [])",
        'dx.compute_istd(pipe, ["a"], num_frames=2)',
        'dx.compute_istd(pipe, ["a"], ddof=2)',
        'dx.StepwiseVariationLoss(estimator="exact")',
        'dx.StepwiseVariationLoss(prediction_type="noise")',
        "dx.StepwiseVariationLoss(rate=0.0)",
    ],
    "SIGN": [
        "dx.SIGNPipeline.from_pipe(pipe)",
        "dx.SIGNPipeline(pipe.unet, pipe.scheduler)",
        "dx.MixtureSource.fit(torch.randn(8, 3, 8, 8), rank=0)",
        "dx.MixtureSource.fit(torch.randn(8, 3, 8, 8), rank=4, num_components=0)",
        "dx.MixtureSource.fit(torch.randn(8, 3, 8, 8), rank=4, num_components=9)",
        "dx.MixtureSource.fit(torch.randn(8, 192), rank=4)",
        "projector(batch_size=0)",
        "projector(num_inference_steps=0)",
        "projector(batch_size=2, generator=[torch.Generator()])",
        'projector(output_type="png")',
        "projector(latents=torch.randn(1, 4, 8, 8))",
        "projector.project(torch.zeros(1, 4, 8, 8))",
        'projector(prompt="a red bag")',
        "projector.stock_pipeline",
        "dx.SIGNPipeline(None, pipe.scheduler, timestep=500)",
        "dx.SIGNPipeline(None, flow_projector.scheduler, transformer=flow_projector.transformer, timestep=600)",
        'dx.SIGNPipeline(**flow_projector.components, teacher="StableDiffusion3Pipeline", timestep=1000)',
        'flow_projector("a red bag", height=8)',
        'flow_projector.encode_prompt("a red bag", do_classifier_free_guidance=True)',
        "dx.apply_teleport(flow_projector, stats)",
        'dx.ddim_invert(flow_projector, torch.randn(1, 4, 8, 8), "a red bag")',
        "dx.SIGNPipeline(ddpm.unet, ddpm.scheduler, source=dx.PromptSource((3, 8, 8), 1, 4, 1, 0.1), timestep=440)",
        "dx.PromptSource((3, 8, 8), 1, 4, 1, 0.1).means(torch.zeros(2, 5))",
        "dx.load_sign_lora(pipe, folder)",
    ],
    "A-SDM": [
        'dx.preset_plan("tiny", pipe.unet)',
        'dx.preset_plan("base", flux.transformer)',
        'dx.preset_plan("base", pipe.unet)',
        "dx.plan_pruning(pipe.unet, [], 0.3)",
        "dx.plan_pruning(pipe.unet, inputs, 1.5)",
        'dx.plan_pruning(pipe.unet, inputs, 0.3, by="seconds")',
        "dx.plan_pruning(pipe.unet, inputs, 0.3, num_stages=0)",
        "dx.prune_network(pipe.unet, plan, num_stages=5)",
        "dx.prune_network(sdxl.unet, plan)",
        'dx.PruningPlan(dict(pipe.unet.config), (("down_blocks.9",),))',
        "dx.PruningPlan.load(folder)",
        "dx.apply_gri_attention(pipe, window=0)",
        'dx.apply_gri_attention(pipe, ["mid_block.attentions.7"])',
        'dx.apply_gri_attention(flux, "single_transformer_blocks")',
        "dx.apply_gri_attention(sana)",
        "dx.record_calibration_inputs(pipe, [])",
        'dx.record_calibration_inputs(pipe, ["a"], num_timesteps=30)',
        "dx.record_calibration_inputs(flux, [])",
        "dx.profile_network(pipe.unet, [])",
        'dx.profile_network(pipe.unet, inputs, criterion="similarity")',
        'dx.profile_network(sd3.transformer, sd3_inputs, criterion="cka")',
        "dx.profile_network(sd3.transformer, [])",
        "dx.profile_network(sd3.transformer, sd3_inputs, height=64, width=64)",
        "dx.plan_pruning(sd3.transformer, sd3_inputs, 0.3)",
        "dx.record_calibration_inputs(chroma, ['a'])",
        "dx.record_calibration_inputs(ddpm, ['a'])",
        "dx.record_calibration_inputs(video22, ['a'])",
        'dx.PruningPlan(dict(sd3.transformer.config), (("block:transformer_blocks.0",),))',
        'dx.PruningPlan(config_of(sd3.transformer), (("block:layers.0",),))',
        'dx.PruningPlan(config_of(sd3.transformer), (("block:transformer_blocks.9",),))',
        'dx.PruningPlan(config_of(sd3.transformer), (("block:transformer_blocks.0",),))',
        "dx.prune_network(sd3.transformer, plan)",
        "dx.search_plans(folder, folder, 1.6)",
        "dx.search_plans(folder, folder, 0.6, batch_sizes=[])",
        "dx.search_plans(folder, folder, 0.6, batch_sizes=[8, 0])",
        "dx.search_plans(folder, folder, 0.6, num_candidates=3)",
        "dx.search_plans(folder, folder, 0.6)",
        'dx.search_plans(folder, folder, 0.6, train_data_dir=folder, lr_scheduler="cosine")',
        "dx.search_plans(folder, folder, 0.6, train_data_dir=folder, learning_rate=-1.0)",
        "dx.search_plans(folder, folder, 0.6, train_data_dir=folder, rank=4)",
        "dx.Halving(steps=0)",
        "dx.Halving(eta=1)",
    ],
}


class Names(dict[str, Any]):
    """The names that a case uses, made when they are asked for."""

    def __init__(self, folder: Path) -> None:
        super().__init__(dx=dx, torch=torch, np=np, folder=str(folder))

    def __missing__(self, name: str) -> Any:
        if name not in _MADE:
            raise KeyError(name)
        self[name] = _MADE[name](self)
        return self[name]


def _projector(names: Names) -> Any:
    pipe = dx.SIGNPipeline(tiny.build("ddpm").unet, DDIMScheduler(), timestep=500)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _unknown(names: Names) -> Any:
    pipe = tiny.build("sd")
    pipe.register_modules(unet=torch.nn.Linear(1, 1))
    return pipe


def _klein(names: Names) -> Any:
    pipe = families.build("flux2-klein")
    pipe.register_to_config(is_distilled=True)
    return pipe


def _empty_file(names: Names) -> Callable[[str], str]:
    def write(name: str) -> str:
        (Path(names["folder"]) / name).touch()
        return names["folder"]

    return write


_MADE: dict[str, Callable[[Names], Any]] = {
    "pipe": lambda names: tiny.build("sd"),
    "sdxl": lambda names: tiny.build("sdxl"),
    "flux": lambda names: tiny.build("flux"),
    "ddpm": lambda names: tiny.build("ddpm"),
    "schnell": lambda names: families.build("flux-schnell"),
    "klein": _klein,
    "lcm": lambda names: families.build("lcm"),
    "sana": lambda names: families.build("sana"),
    "sd3": lambda names: families.build("sd3"),
    "sd3_inputs": lambda names: dx.record_calibration_inputs(
        names["sd3"], ["a"], num_timesteps=1, height=8, width=8
    ),
    "config_of": lambda names: network_config,
    "chroma": lambda names: families.build("chroma"),
    "video22": lambda names: families.build("wan22"),
    "img2img": lambda names: families.build("sdxl-img2img"),
    "video": lambda names: families.build("wan"),
    "unknown": _unknown,
    "projector": _projector,
    "flow_projector": lambda names: untrained_projector(tiny.build("sd3"), max_sequence_length=4),
    "lcm_scheduler": lambda names: LCMScheduler(),
    "not_a_flow": lambda names: DPMSolverMultistepScheduler(use_flow_sigmas=True, use_karras_sigmas=True),
    "stats": lambda names: tiny.gaussian((4, 8, 8)),
    "npnet": lambda names: tiny.npnet("sd"),
    "recipe": lambda names: dx.Recipe.from_pipe(
        dx.apply_teleport(tiny.build("sd"), names["stats"], skip=0.3)
    ),
    "scorer": lambda names: lambda images, prompts: np.zeros(len(images)),
    "latents": lambda names: torch.zeros(1, 4, 8, 8),
    "image": lambda names: __import__("PIL.Image").Image.new("RGB", (8, 8)),
    "inputs": lambda names: dx.record_calibration_inputs(names["pipe"], ["a"], num_timesteps=1),
    "plan": lambda names: dx.PruningPlan(dict(names["pipe"].unet.config), (("mid.attention",),)),
    "empty_file": _empty_file,
}


def message_of(code: str) -> str:
    """The type and the text of the error that the code raises, on one line and without the path of its folder.

    Raises:
        AssertionError: it raises none.
    """
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            exec(code, {}, Names(Path(folder)))
        except Exception as error:
            return one_line(error, folder)
    raise AssertionError(f"{code} raises no error.")


def one_line(error: BaseException, folder: str) -> str:
    """`Type: text` of an error, with FOLDER for the path of the folder."""
    return re.sub(r"\s+", " ", f"{type(error).__name__}: {error}").replace(folder, "FOLDER")
