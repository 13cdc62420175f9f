"""All training scripts on tiny random models, run in this process with few steps."""

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file

import diffusers_ext as dx
from diffusers_ext.testbed.fashion_scenes import SAMPLE_DIR
from tests import tiny

from .launching import ROOT, write_pictures

# The scripts that start from a pipeline, and the pipelines.
TRAINERS = {"smooth_lora": "sd", "asdm": "sd", "sign": "sd", "npnet": "sd"}


class Scripts:
    """A folder with models, images and pairs, and the scripts that use them.

    Args:
        folder: empty.
        monkeypatch: sets the command line.
    """

    def __init__(self, folder: Path, monkeypatch: Any) -> None:
        self.folder, self.patch = folder, monkeypatch
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
        write_pictures(folder / "pictures")
        (folder / "prompts.txt").write_text("".join(f"a {letter * 3}\n" for letter in "abcdefghijklmnop"))
        for name in ("sd", "ddpm"):
            tiny.build(name).save_pretrained(folder / name)
        dx.PruningPlan(dict(tiny.build("sd").unet.config), (("mid.attention",),)).save(folder / "plan.json")
        tiny.build("sd", dtype=torch.float16).save_pretrained(folder / "half")
        tiny.build("sd", dtype=torch.float16).save_pretrained(folder / "variant", variant="fp16")

    def main(self, script: str, *argv: str) -> None:
        """Runs a script of the folder `training`."""
        path = ROOT / "training" / f"{script}.py"
        spec: Any = importlib.util.spec_from_file_location(script, path)
        module = importlib.util.module_from_spec(spec)
        self.patch.setattr(sys, "argv", [str(path), *argv])
        AcceleratorState._reset_state(reset_partial_state=True)  # the precision of the last run
        spec.loader.exec_module(module)
        module.main()

    def collect(self, output: Path, *extra: str, model: str = "sd") -> None:
        """Collects 16 noise pairs."""
        self.main(
            "collect_noise_pairs",
            *("--pretrained_model_name_or_path", str(self.folder / model), "--output_dir", str(output)),
            *("--prompts", str(self.folder / "prompts.txt"), "--num_pairs", "16", "--height", "8"),
            *("--train_batch_size", "8", "--num_inference_steps", "10", "--width", "8", *extra),
        )

    def train(self, name: str, output: Path, *extra: str, model: str | None = None) -> dict[str, Any]:
        """Trains for two steps and returns `training.json`."""
        model = TRAINERS[name] if model is None else model
        own = {
            "smooth_lora": ("--rank", "2", "--validation_prompts", "a aaa", "--num_inference_steps", "2"),
            "asdm": (
                *("--plan", str(self.folder / "plan.json"), "--steps_per_stage", "2"),
                *("--validation_prompts", "a aaa", "--num_inference_steps", "2"),
            ),
            "sign": (
                *(
                    "--num_pairs",
                    "16",
                    "--num_inference_steps",
                    "2",
                    "--source_rank",
                    "2",
                    "--dmd_weight",
                    "1",
                ),
                *("--source_components", "2", "--pairs_dir", f"{output}-pairs"),
            ),
            "npnet": (
                *("--width", "32", "--depth", "1", "--num_inference_steps", "2"),
                *("--num_validation_images", "2", "--held_out_share", "0.3"),
            ),
        }[name]
        images = () if name == "npnet" else ("--resolution", "8")
        data = self.folder / ("pairs" if name == "npnet" else "pictures")
        steps = () if name == "asdm" else ("--max_train_steps", "2")
        self.main(
            f"train_{name}",
            *("--pretrained_model_name_or_path", str(self.folder / model), "--train_data_dir", str(data)),
            *("--output_dir", str(output), "--train_batch_size", "4", "--lr_warmup_steps", "0", *steps),
            *images,
            *own,
            *extra,
        )
        return json.loads((output / "model" / "training.json").read_text())

    def changed(self, name: str, change: Callable[[Path], None], of: str = "sd") -> str:
        """A copy of a model with a change of its files; returns the name of its folder."""
        if not (self.folder / name).exists():
            shutil.copytree(self.folder / of, self.folder / name)
            change(self.folder / name)
        return name


def scenes(scripts: Scripts, output: Path, vae: Path, *extra: str) -> None:
    """Trains the testbed's text-to-image model for two steps."""
    scripts.main(
        "train_base",
        *("--model", "scenes", "--vae", str(vae), "--block_out_channels", "32", "32", "32"),
        *("--train_data_dir", str(SAMPLE_DIR), "--num_scenes", "8", "--num_validation_images", "2"),
        *("--output_dir", str(output), "--max_train_steps", "2", "--train_batch_size", "2", *extra),
    )


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


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: Any) -> Any:
    """All models, and noise pairs of `sd`."""
    with pytest.MonkeyPatch.context() as patch:
        found = Scripts(tmp_path_factory.mktemp("scripts"), patch)
        found.collect(found.folder / "pairs")
        yield found


def dtypes_of(model: torch.nn.Module) -> tuple[set[torch.dtype], set[torch.dtype]]:
    """The data types of the trained and of the frozen parameters."""
    parameters = list(model.parameters())
    trained = {p.dtype for p in parameters if p.requires_grad}
    return trained, {p.dtype for p in parameters if not p.requires_grad}
