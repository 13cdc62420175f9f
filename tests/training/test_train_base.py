"""The training script end to end, as a user launches it, on the embedded sample of Fashion-MNIST."""

import importlib.util
import json
import subprocess
import sys
from argparse import Namespace

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from diffusers_ext.testbed import base_models
from diffusers_ext.testbed.base_training import scene_latents
from diffusers_ext.testbed.fashion_scenes import SAMPLE_DIR
from diffusers_ext.training.checkpoints import list_checkpoints
from tests.training.launching import ACCELERATE, PLAIN, ROOT, TWO_PROCESSES, kill_after, launch

# One worker runs them all: they share the trained models.
pytestmark = [pytest.mark.slow]

SCRIPT = str(ROOT / "training" / "train_base.py")
TINY = ["--train_data_dir", str(SAMPLE_DIR), "--max_train_steps", "12", "--train_batch_size", "4"]
TINY += ["--num_scenes", "40", "--num_validation_images", "9", "--use_ema"]
CHANNELS = {"vae": ["8", "8", "8"], "scenes": ["32", "32", "32"], "ddpm": ["8", "8", "16"]}


def command(model, output_dir, *extra):
    channels = ["--block_out_channels", *CHANNELS[model]] if model in CHANNELS else []
    return [SCRIPT, "--model", model, "--output_dir", str(output_dir), *TINY, *channels, *extra]


def train(model, output_dir, *extra, launcher=PLAIN):
    launch(command(model, output_dir, *extra), launcher)
    return output_dir


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def ddpm(runs):
    return train("ddpm", runs / "ddpm")


@pytest.fixture(scope="module")
def scenes(runs):
    vae = train("vae", runs / "vae", launcher=ACCELERATE)
    return train("scenes", runs / "scenes", "--vae", str(vae / "model"), launcher=ACCELERATE)


@pytest.fixture(scope="module")
def flow(runs, scenes):
    parts = ["--vae", str(runs / "vae" / "model"), "--text_encoder", str(scenes / "model" / "text_encoder")]
    return train("flow", runs / "flow", *parts, "--optimizer", "muon")


PLAIN_DIFFUSERS = """
import sys
sys.modules["diffusers_ext"] = None  # importing it fails
import numpy as np
from diffusers import DiffusionPipeline
scenes, flow, ddpm = map(DiffusionPipeline.from_pretrained, sys.argv[1:])
for pipe in (scenes, flow):
    images = pipe("a red bag", height=32, width=64, num_inference_steps=2, output_type="np").images
    assert images.shape == (1, 32, 64, 3) and np.isfinite(images).all(), images.shape
images = ddpm(batch_size=2, num_inference_steps=2, output_type="np").images
assert images.shape == (2, 32, 32, 1) and np.isfinite(images).all(), images.shape
"""


def test_plain_diffusers_loads_and_runs_the_trained_pipelines(scenes, flow, ddpm, tmp_path):
    folders = [str(folder / "model") for folder in (scenes, flow, ddpm)]
    done = subprocess.run(
        [sys.executable, "-c", PLAIN_DIFFUSERS, *folders], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_run_leaves_its_card_its_record_and_pictures(scenes):
    card = (scenes / "model" / "README.md").read_text()
    assert "# Fashion Scenes" in card
    assert "--max_train_steps 12" in card
    assert str(SAMPLE_DIR) not in card
    record = json.loads((scenes / "model" / "training.json").read_text())
    assert record["steps"] == 12
    assert record["images"] == 12 * 4
    assert (scenes / "validation-12.png").is_file()


def test_a_killed_run_resumes_to_the_same_weights(ddpm, tmp_path):
    argv = command("ddpm", tmp_path, "--checkpointing_steps", "1")
    kill_after(argv, lambda: list_checkpoints(tmp_path), 1)
    at = list_checkpoints(tmp_path)[-1].name
    train("ddpm", tmp_path, "--resume_from_checkpoint", "latest")
    for file in ("checkpoint-12/trained.safetensors", "model/unet/diffusion_pytorch_model.safetensors"):
        expected, resumed = load_file(ddpm / file), load_file(tmp_path / file)
        for name, weight in expected.items():
            assert torch.equal(weight, resumed[name]), f"{name} differs, killed after {at}"
    assert not list(tmp_path.glob("partial-*"))


def test_two_processes_train_what_one_trains(ddpm, tmp_path):
    train("ddpm", tmp_path, "--train_batch_size", "2", launcher=TWO_PROCESSES)
    x = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    initial, one, two = (_prediction(folder, x) for folder in (None, ddpm, tmp_path))
    # The gradients are summed in another order (float32 rounding), and Adam divides by their size: a weight
    # without influence, say a bias before a normalisation, has nothing but rounding to follow, up to the
    # learning rate a step. So what the network computes is compared, and to what training changed in it.
    assert (one - two).abs().max() < 0.01 * (one - initial).abs().max()
    record = json.loads((tmp_path / "model" / "training.json").read_text())
    assert record["images"] == 12 * 4
    assert record["hardware"].startswith("2 process")


@torch.no_grad()
def _prediction(run, x):
    torch.manual_seed(0)
    unet = base_models.build_pixel_unet((8, 8, 16)).eval()
    if run is not None:
        weights = load_file(run / "checkpoint-12" / "trained.safetensors")
        unet.load_state_dict({k.removeprefix("unet."): v for k, v in weights.items()})
    return unet(x, 500).sample


@pytest.fixture
def main(monkeypatch):
    """The script's main in this process, for what fails before any training."""
    spec = importlib.util.spec_from_file_location("train_base", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")

    def run(*argv):
        monkeypatch.setattr(sys, "argv", [SCRIPT, *map(str, argv)])
        module.main()

    return run


def test_a_missing_data_file_is_named(main, tmp_path):
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz does not exist"):
        main("--model", "ddpm", "--output_dir", tmp_path, "--train_data_dir", tmp_path)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("flow",), "--model flow needs --vae"),
        (("ddpm", "--text_encoder", "."), "--text_encoder is for --model flow"),
        (("flow", "--vae", ".", "--snr_gamma", "5"), "--snr_gamma are not for --model flow"),
    ],
)
def test_what_does_not_belong_to_a_model_is_refused(main, tmp_path, capsys, argv, said):
    with pytest.raises(SystemExit):
        main("--model", *argv, "--output_dir", tmp_path)
    assert said in capsys.readouterr().err


def test_scenes_need_an_autoencoder(main, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main("--model", "scenes", "--output_dir", tmp_path)
    assert "--model scenes needs --vae" in capsys.readouterr().err


def test_a_wrong_checkpoint_name_is_named(main, tmp_path):
    with pytest.raises(ValueError, match="--resume_from_checkpoint checkpoint-7: not a complete checkpoint"):
        main(*command("ddpm", tmp_path, "--resume_from_checkpoint", "checkpoint-7")[1:])


def test_a_diverging_run_stops_and_leaves_no_model(main, tmp_path):
    warmup = ["--lr_warmup_steps", "0", "--learning_rate", "1e30"]
    with pytest.raises(ValueError, match="The loss is nan at step 12: lower --learning_rate"):
        main(*command("ddpm", tmp_path, *warmup)[1:])
    assert not list_checkpoints(tmp_path)
    assert not (tmp_path / "model").exists()


def test_other_scenes_or_another_autoencoder_do_not_reuse_old_latents(tmp_path):
    accelerator = Accelerator(cpu=True)
    vae = base_models.build_vae((8, 8, 8)).eval()

    def encode(seed):
        args = Namespace(output_dir=tmp_path, train_data_dir=SAMPLE_DIR, num_scenes=8, seed=seed)
        return scene_latents(accelerator, args, vae)[0][range(8)]["latents"]

    first, (shard,) = encode(0), (tmp_path / "encodings" / "latents").glob("*.safetensors")
    written = shard.stat().st_mtime_ns
    assert torch.equal(encode(0), first)
    assert shard.stat().st_mtime_ns == written
    with pytest.raises(ValueError, match=r"made with other settings \(data: .*delete it"):
        encode(1)
    vae.quant_conv.weight.data *= 2
    with pytest.raises(ValueError, match=r"made with other settings \(vae\.weights: .*delete it"):
        encode(0)
