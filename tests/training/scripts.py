"""All training scripts on tiny models and twelve pictures, run inside the test's process."""

import runpy
import string
import sys
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState, GradientState

import diffusers_ext as dx
from diffusers_ext.testbed.fashion_scenes import SAMPLE_DIR
from tests import tiny
from tests.asdm.networks import SMALL, network
from tests.training.launching import ROOT, write_pictures

TRAINED = ("train_smooth_lora", "train_asdm", "train_sign", "train_npnet", "train_base")
# Those that train on captioned images.
CAPTIONED = TRAINED[:3]
ALL = (*TRAINED, "collect_noise_pairs")


def prepare(folder: Path) -> Path:
    """Models, pictures, prompts, a plan and pairs of noises for `arguments`."""
    tiny.build("sd").save_pretrained(folder / "sd")
    pipe = tiny.build("sd")
    pipe.unet = network(SMALL, seed=3, cross_attention_dim=16, sample_size=8)
    pipe.save_pretrained(folder / "teacher")
    dx.PruningPlan(dict(pipe.unet.config), (("layer.0",),)).save(folder / "plan.json")
    write_pictures(folder / "pictures")
    (folder / "prompts.txt").write_text("\n".join(f"a {letter * 3}" for letter in string.ascii_lowercase))
    run("collect_noise_pairs", arguments("collect_noise_pairs", folder, folder / "pairs"))
    return folder


def arguments(script: str, base: Path, output: Path, pictures: Path | None = None) -> list[str]:
    """The arguments of a short run of a script; its number of steps is not among them."""
    shared = ["--output_dir", str(output), "--train_batch_size", "2"]
    if script == "train_base":
        return [*shared, "--model", "ddpm", "--train_data_dir", str(SAMPLE_DIR), *WIDTHS, *WARM]
    model = base / ("teacher" if script == "train_asdm" else "sd")
    shared += ["--pretrained_model_name_or_path", str(model)]
    if script == "collect_noise_pairs":
        size = ["--height", "8", "--width", "8", "--num_inference_steps", "4"]
        return [*shared, "--prompts", str(base / "prompts.txt"), "--num_pairs", "26", *size]
    if script == "train_npnet":
        few = ["--width", "32", "--depth", "1", "--num_inference_steps", "2", "--num_validation_images", "2"]
        return [*shared, "--train_data_dir", str(base / "pairs"), *few, *WARM]
    shared += ["--train_data_dir", str(pictures or base / "pictures"), "--resolution", "8", *WARM]
    own = {
        "train_smooth_lora": ["--rank", "2"],
        "train_asdm": ["--plan", str(base / "plan.json")],
        "train_sign": [
            *("--num_pairs", "16", "--num_inference_steps", "2", "--source_rank", "2"),
            *("--source_components", "2", "--guidance_scale", "2"),
        ],
    }
    return [*shared, *own[script]]


WIDTHS = ["--block_out_channels", "8", "8", "16"]
WARM = ["--lr_warmup_steps", "0"]


def steps(script: str, count: int) -> list[str]:
    """The argument for the number of steps."""
    return ["--steps_per_stage" if script == "train_asdm" else "--max_train_steps", str(count)]


def parse(script: str, argv: list[str]) -> Any:
    """What the script's `parse_args` makes of arguments."""
    return _module(script, argv)["parse_args"]()


def run(script: str, argv: list[str]) -> None:
    """Runs the script's `main`."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    _module(script, argv)["main"]()


def _module(script: str, argv: list[str]) -> dict[str, Any]:
    path = str(ROOT / "training" / f"{script}.py")
    sys.argv = [path, *argv]
    return runpy.run_path(path)
