"""All training scripts on tiny models and twelve pictures, run inside the test's process."""

import json
import runpy
import shutil
import string
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file, save_file

import diffusers_ext as dx
from diffusers_ext.asdm.networks import network_config
from diffusers_ext.testbed.fashion_scenes import SAMPLE_DIR
from diffusers_ext.training.checkpoints import list_checkpoints
from tests import families, tiny
from tests.asdm.transformers import deep
from tests.training.launching import ROOT, write_pictures

TRAINED = ("train_smooth_lora", "train_asdm", "train_sign", "train_npnet", "train_base")
# Those that train on captioned images.
CAPTIONED = TRAINED[:3]
# Those that start from a pipeline.
FROM_PIPELINE = TRAINED[:4]
ALL = (*TRAINED, "collect_noise_pairs")
# Scripts that also train transformers, with the model that they train here.
ON_FLOWS = ("train_smooth_lora sd3", "train_asdm sd3")

WIDTHS = ["--block_out_channels", "8", "8", "16"]
WARM = ["--lr_warmup_steps", "0"]


def prepare(folder: Path) -> Path:
    """Models, pictures, prompts, a plan and pairs of noises for `arguments`."""
    pipe = tiny.build("sd")
    pipe.save_pretrained(folder / "sd")
    dx.PruningPlan(dict(pipe.unet.config), (("mid.attention",),)).save(folder / "plan.json")
    flow = stable_diffusion_3(depth=3)
    flow.save_pretrained(folder / "sd3")
    cuts = ("block:transformer_blocks.1",)
    dx.PruningPlan(network_config(flow.transformer), (cuts,)).save(folder / "plan-sd3.json")
    half = tiny.build("sd", dtype=torch.float16)
    half.save_pretrained(folder / "half")
    half.save_pretrained(folder / "variant", variant="fp16")
    write_pictures(folder / "pictures")
    (folder / "prompts.txt").write_text("\n".join(f"a {letter * 3}" for letter in string.ascii_lowercase))
    run("collect_noise_pairs", arguments("collect_noise_pairs", folder, folder / "pairs"))
    return folder


def stable_diffusion_3(depth: int = 1) -> Any:
    """The tiny Stable Diffusion 3 with a third text encoder that has no layers, without which a saved one does not load."""
    pipe, tokenizer = deep("sd3", depth), tiny.tokenizer()
    sizes = dict.fromkeys(("d_model", "d_kv", "d_ff"), pipe.transformer.config.joint_attention_dim)
    config = transformers.T5Config(vocab_size=len(tokenizer), num_layers=0, num_heads=1, **sizes)
    pipe.register_modules(text_encoder_3=transformers.T5EncoderModel(config).eval(), tokenizer_3=tokenizer)
    return pipe


def flux() -> Any:
    """The tiny Flux.1 dev with a tokenizer that can be loaded from files."""
    pipe, tokenizer = families.build("flux"), tiny.tokenizer()
    sizes = dict.fromkeys(("d_model", "d_kv", "d_ff"), pipe.transformer.config.joint_attention_dim)
    config = transformers.T5Config(vocab_size=len(tokenizer), num_layers=1, num_heads=1, **sizes)
    pipe.register_modules(text_encoder_2=transformers.T5EncoderModel(config).eval(), tokenizer_2=tokenizer)
    return pipe


def path_of(script: str) -> str:
    """The file of a script."""
    return str(ROOT / "training" / f"{script.split()[0]}.py")


def arguments(
    script: str, base: Path, output: Path, pictures: Path | None = None, model: str = "sd"
) -> list[str]:
    """The arguments of a short run of a script, one of `ALL` or `ON_FLOWS`; its number of steps is not among them."""
    name, (script, _, flow) = script, script.partition(" ")
    model = flow or model
    shared = ["--output_dir", str(output), "--train_batch_size", "2"]
    if script == "train_base":
        return [*shared, "--model", "ddpm", "--train_data_dir", str(SAMPLE_DIR), *WIDTHS, *WARM]
    shared += ["--pretrained_model_name_or_path", str(base / model)]
    if script == "collect_noise_pairs":
        size = ["--height", "8", "--width", "8", "--num_inference_steps", "4"]
        return [*shared, "--prompts", str(base / "prompts.txt"), "--num_pairs", "26", *size]
    shared += ["--num_inference_steps", "2", *WARM]
    if script == "train_npnet":
        few = ["--width", "32", "--depth", "1", "--num_validation_images", "2"]
        return [*shared, "--train_data_dir", str(base / "pairs"), *few]
    shared += ["--train_data_dir", str(pictures or base / "pictures"), "--resolution", "8"]
    own = {
        "train_smooth_lora": ["--rank", "2", "--validation_prompts", "a aaa"],
        "train_asdm": ["--plan", str(base / "plan.json"), "--validation_prompts", "a aaa"],
        "train_asdm sd3": [
            *("--plan", str(base / "plan-sd3.json"), "--validation_prompts", "a aaa"),
            *("--interval_steps", "2"),
        ],
        "train_sign": [
            *("--num_pairs", "16", "--reg_weight", "0.5", "--flow_weight", "1", "--guidance_scale", "2"),
            *("--source_components", "2", "--source_rank", "2", "--renoised_share", "0.25"),
        ],
    }
    return [*shared, *own[name if name in own else script]]


def steps(script: str, count: int) -> list[str]:
    """The argument for the number of steps."""
    return ["--steps_per_stage" if script.startswith("train_asdm") else "--max_train_steps", str(count)]


def checkpoints_of(script: str, output: Path) -> list[Path]:
    """The checkpoints of a run, those of its first stage if it has stages."""
    return list_checkpoints(output / "stage-1" if script.startswith("train_asdm") else output)


def parse(script: str, argv: list[str]) -> Any:
    """What the script's `parse_args` makes of arguments."""
    return _module(script, argv)["parse_args"]()


def run(script: str, argv: list[str]) -> None:
    """Runs the script's `main`."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    _module(script, argv)["main"]()


def _module(script: str, argv: list[str]) -> dict[str, Any]:
    path = path_of(script)
    sys.argv = [path, *argv]
    return runpy.run_path(path)


class Scripts:
    """Short runs of the scripts, with further arguments or changed models.

    Args:
        folder: from `prepare`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def collect(self, output: Path, *extra: str, model: str = "sd") -> None:
        """Collects noise pairs."""
        script = "collect_noise_pairs"
        run(script, [*arguments(script, self.folder, output, model=model), *extra])

    def train(self, script: str, output: Path, *extra: str, model: str = "sd") -> dict[str, Any]:
        """Trains for two steps and returns `training.json`."""
        run(script, [*arguments(script, self.folder, output, model=model), *steps(script, 2), *extra])
        return json.loads((output / "model" / "training.json").read_text())

    def changed(self, name: str, change: Callable[[Path], None]) -> str:
        """A copy of the model with a change of its files; returns the name of its folder."""
        if not (self.folder / name).exists():
            shutil.copytree(self.folder / "sd", self.folder / name)
            change(self.folder / name)
        return name


def scenes(output: Path, vae: Path, *extra: str) -> None:
    """Trains the testbed's text-to-image model for two steps."""
    widths = ["--block_out_channels", "32", "32", "32"]
    few = ["--num_scenes", "8", "--num_validation_images", "2", *steps("train_base", 2)]
    argv = [*arguments("train_base", vae, output), "--model", "scenes", "--vae", str(vae)]
    run("train_base", [*argv, *widths, *few, *extra])


def edit_json(path: str, **values: Any) -> Callable[[Path], None]:
    """A change of a config file of a model."""

    def change(folder: Path) -> None:
        content = json.loads((folder / path).read_text())
        (folder / path).write_text(json.dumps({**content, **values}))

    return change


def scale_weights(path: str) -> Callable[[Path], None]:
    """A change of all weights of a part of a model."""

    def change(folder: Path) -> None:
        (file,) = (folder / path).glob("*.safetensors")
        weights = {name: value * 1.01 for name, value in load_file(file).items()}
        save_file(weights, file, {"format": "pt"})

    return change


def dtypes_of(model: torch.nn.Module) -> tuple[set[torch.dtype], set[torch.dtype]]:
    """The data types of the trained and of the frozen parameters."""
    parameters = list(model.parameters())
    trained = {p.dtype for p in parameters if p.requires_grad}
    return trained, {p.dtype for p in parameters if not p.requires_grad}
