"""What every training script refuses at the start, follows and names: one test a kind, over all scripts it concerns."""

import json
import math
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from diffusers_ext.core.storage import ShardStore
from diffusers_ext.golden_noise.pairs import NoisePairs
from diffusers_ext.golden_noise.training import split_by_prompt
from diffusers_ext.testbed.fashion_scenes import SAMPLE_DIR, load_garments
from diffusers_ext.training import arguments as shared
from diffusers_ext.training import loop, optimizers
from tests.training.launching import environment, write_pictures
from tests.training.scripts import ALL, CAPTIONED, ON_FLOWS, TRAINED, arguments, parse, run, steps

# One worker runs them all: they share the models and the pairs.
pytestmark = [pytest.mark.slow]


# --- arguments ---

SHARED = [
    *("--checkpointing_steps 0", "--max_train_steps 0", "--max_train_steps -3", "--num_train_epochs 0"),
    *(
        "--lr_scheduler piecewise_constant",
        "--lr_warmup_steps -1",
        "--learning_rate 0",
        "--learning_rate nan",
    ),
    *("--train_batch_size 0", "--gradient_accumulation_steps 0", "--max_grad_norm -1", "--ema_decay 1"),
    *("--adam_beta1 1", "--adam_beta2 -0.1", "--adam_epsilon 0", "--adam_weight_decay -1", "--seed -1"),
    *("--validation_steps -1", "--checkpoints_total_limit -1", "--mixed_precision fp8", "--report_to wandb"),
    *("--report_to nonsense", "--dataloader_num_workers -1"),
]
DATA = ["--max_train_samples 0", "--max_train_samples -1", "--resolution 0"]
OWN = {
    "train_smooth_lora": [
        *(*DATA, "--snr_gamma 0", "--rank 0", "--variation_weight -1"),
        *("--weighting_scheme uniform", "--max_sequence_length 0"),
    ],
    "train_asdm": [*DATA, "--snr_gamma 0", "--steps_per_stage 0", "--proportion_empty_prompts 2"],
    "train_sign": [
        *(*DATA, "--train_batch_size 3", "--sigma 0", "--fake_updates 0", "--num_pairs 0", "--rank 0"),
        *("--recipe gan", "--matching l2", "--source noise", "--fake_learning_rate 0", "--renoised_share 2"),
    ],
    "train_npnet": ["--held_out_share 1", "--depth 0", "--num_validation_images 0"],
    "train_base": ["--snr_gamma 0", "--num_scenes 0", "--block_out_channels 8 0 8"],
}
COLLECT = ["--num_pairs 0", "--train_batch_size 0", "--height -8", "--margin nan", "--num_rounds 0"]
COLLECT += ["--num_inference_steps 0", "--jump nan", "--gap text"]
BAD = [(script, text) for script in TRAINED for text in [*SHARED, *OWN[script]]]
BAD += [("collect_noise_pairs", text) for text in COLLECT]


@pytest.mark.parametrize(("script", "text"), BAD)
def test_arguments_out_of_range_are_refused_at_the_start(
    script: str, text: str, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setattr(shared, "get_available_trackers", lambda: [])
    name, *values = text.split()
    argv = arguments(script, Path("base"), Path("run"))
    if name == "--steps_per_stage" or (script, name) != ("train_asdm", "--max_train_steps"):
        argv += [name, *values]
    else:
        argv += steps(script, int(values[0]))
    with pytest.raises(SystemExit) as caught:
        parse(script, argv)
    assert caught.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"argument {argv[-1 - len(values)]}: " in said
    assert any(value in said for value in values)
    assert any(word in said for word in ("expected", "invalid choice", "not installed"))


@pytest.mark.parametrize("script", TRAINED)
def test_optimizer_arguments_have_the_meaning_of_diffusers(
    script: str, base: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    class Stop(Exception):
        pass

    class Optimizer(torch.optim.AdamW):
        def __init__(self, parameters: Any, **options: Any) -> None:
            given.update(options)
            raise Stop

    given: dict[str, Any] = {}
    monkeypatch.setattr(optimizers, "AdamW", Optimizer)
    argv = [
        *arguments(script, base, tmp_path),
        *("--adam_beta1", "0.8", "--adam_beta2", "0.95", "--adam_epsilon", "1e-6"),
        *("--learning_rate", "1e-3", "--scale_lr", "--gradient_accumulation_steps", "3", "--allow_tf32"),
    ]
    with pytest.raises(Stop):
        run(script, argv)
    expected = {"betas": (0.8, 0.95), "eps": 1e-6, "lr": pytest.approx(6e-3), "weight_decay": 1e-2}
    assert given == expected
    assert torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize("script", [name for name in TRAINED if name != "train_asdm"])
def test_epochs_are_passes_over_the_data(script: str, base: Path, tmp_path: Path, monkeypatch: Any) -> None:
    class Stop(Exception):
        pass

    def scheduler(*args: Any, num_training_steps: int, **options: Any) -> None:
        found.append(num_training_steps)
        raise Stop

    found: list[int] = []
    monkeypatch.setattr(loop, "get_scheduler", scheduler)
    argv = arguments(script, base, tmp_path)
    for extra in (["--num_train_epochs", "3"], ["--num_train_epochs", "3", "--max_train_steps", "7"], []):
        with pytest.raises(Stop):
            run(script, [*argv, "--gradient_accumulation_steps", "2", *extra])
    rows = 12
    if script == "train_npnet":
        rows = len(split_by_prompt(NoisePairs.load(base / "pairs"), 0.1)[0])
    if script == "train_base":
        rows = len(load_garments(SAMPLE_DIR, "train")[0])
    assert found == [3 * math.ceil(rows / 4), 7, 1000]


@pytest.mark.parametrize("script", [name for name in ALL if name != "train_base"])
def test_downloads_go_to_the_cache_folder(script: str, base: Path, tmp_path: Path, monkeypatch: Any) -> None:
    class Stop(Exception):
        pass

    def load(*args: Any, **options: Any) -> None:
        found.append(options["cache_dir"])
        raise Stop

    found: list[str] = []
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", load)
    with pytest.raises(Stop):
        run(script, [*arguments(script, base, tmp_path / "run"), "--cache_dir", str(tmp_path)])
    assert found == [str(tmp_path)]


# --- what `accelerate launch` decides ---


@pytest.mark.parametrize("script", TRAINED)
def test_what_launch_decides_is_followed_and_recorded(
    script: str, base: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    taken = []
    step = torch.optim.AdamW.step

    def count(self: Any, *args: Any, **options: Any) -> Any:
        taken.append(1)
        return step(self, *args, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", count)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "3")
    argv = [*arguments(script, base, tmp_path), *steps(script, 2)]
    with pytest.raises(ValueError, match=r"asks for 3 .* --gradient_accumulation_steps is 2"):
        run(script, [*argv, "--gradient_accumulation_steps", "2"])
    run(script, argv)
    assert len(taken) == 2
    record = json.loads((tmp_path / "model" / "training.json").read_text())
    assert record["mixed_precision"] == "bf16"
    assert record["gradient_accumulation_steps"] == 3
    assert record["images"] == 2 * 3 * 2


@pytest.mark.parametrize("script", TRAINED)
def test_precision_that_the_machine_lacks_is_refused(
    script: str, base: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    argv = arguments(script, base, tmp_path)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(ValueError, match="fp16 needs a GPU"):
        run(script, argv)


def test_pairs_are_collected_in_the_precision_that_launch_decides(
    base: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    run("collect_noise_pairs", [*arguments("collect_noise_pairs", base, tmp_path), "--num_pairs", "2"])
    assert ShardStore.recipe_of(tmp_path)["dtype"] == "torch.bfloat16"


# --- two runs in one folder ---

HOLD = """
import sys, time
from diffusers_ext.training.start import lock_folder
for folder in sys.argv[1:]:
    lock_folder(folder)
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture(scope="module")
def held(tmp_path_factory: Any) -> Any:
    """One folder a script, which another process has locked, and a function that kills that process."""
    folders = {script: tmp_path_factory.mktemp("held") / script for script in ALL}
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, *map(str, folders.values())], env=environment(), stdout=subprocess.PIPE
    )
    assert other.stdout is not None
    assert other.stdout.readline() == b"held\n"
    yield folders, other
    other.kill()
    other.wait()


@pytest.mark.parametrize("script", ALL)
def test_a_second_run_in_one_folder_stops(script: str, base: Path, held: Any) -> None:
    folders, _ = held
    with pytest.raises(ValueError, match=r"Another run is writing to .*: wait until it has ended, or choose"):
        run(script, arguments(script, base, folders[script]))


def test_a_second_run_does_not_write_to_shared_pairs(base: Path, held: Any, tmp_path: Path) -> None:
    folders, _ = held
    shared_pairs = str(folders["collect_noise_pairs"])
    argv = [*arguments("train_sign", base, tmp_path / "first"), *steps("train_sign", 1), "--pairs_dir"]
    with pytest.raises(ValueError, match=r"Another run is writing to .*, or choose another --pairs_dir"):
        run("train_sign", [*argv, shared_pairs])
    # Finished pairs are shared: the lock is free while the first run trains.
    run("train_sign", [*argv, str(tmp_path / "pairs")])
    subprocess.run(
        [sys.executable, "-c", HOLD.replace("600", "0"), str(tmp_path / "pairs")],
        env=environment(),
        check=True,
    )


def test_a_killed_run_leaves_no_lock(base: Path, held: Any) -> None:
    folders, other = held
    other.send_signal(signal.SIGKILL)
    other.wait()
    argv = arguments("collect_noise_pairs", base, folders["collect_noise_pairs"])
    run("collect_noise_pairs", argv)
    run("collect_noise_pairs", argv)  # the same process may lock twice


# --- captions ---


def folder_of(tmp_path: Path, captions: list[Any]) -> Path:
    """Twelve pictures of which the first have these captions; `...` for a line without one."""
    write_pictures(tmp_path / "own")
    lines = (tmp_path / "own" / "metadata.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    for row, caption in zip(rows, captions):
        row["text"] = caption
    rows = [{k: v for k, v in row.items() if v is not ...} for row in rows]
    (tmp_path / "own" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "own"


REFUSED = {
    "null": (["fine", None], r"own/1\.png \(row 1 of the data set\) has the caption None"),
    "missing": (["fine", "fine", ...], r"own/2\.png \(row 2 of the data set\) has the caption None"),
    "number": ([*range(12)], r"own/0\.png \(row 0 of the data set\) has the caption 0"),
    "empty list": ([["fine"]] * 11 + [[]], r"own/11\.png \(row 11 of the data set\) has the caption \[\]"),
    "mixed": (
        ["fine", 1],
        r"The image folder .*own cannot be loaded: .*changed from string to number in row 1",
    ),
}


@pytest.mark.parametrize("script", CAPTIONED)
@pytest.mark.parametrize("case", REFUSED)
def test_captions_that_are_no_texts_are_refused_by_file_and_row(
    script: str, case: str, base: Path, tmp_path: Path
) -> None:
    captions, message = REFUSED[case]
    argv = arguments(script, base, tmp_path / "run", folder_of(tmp_path, captions))
    with pytest.raises(ValueError, match=message):
        run(script, argv)


@pytest.mark.parametrize("script", [*CAPTIONED, *ON_FLOWS])
def test_one_of_several_captions_is_drawn_and_a_stopped_run_resumes_to_the_same_weights(
    script: str, base: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    class Stop(BaseException):
        pass

    several = folder_of(tmp_path, [["a aaa", "", "a bbb"]] * 12)

    def argv(output: str) -> list[str]:
        few = arguments(script, base, tmp_path / output, several)
        few += ["--random_flip", "--no-center_crop", "--checkpointing_steps", "2"]
        return [*few, *steps(script, 4), "--resume_from_checkpoint", "latest"]

    run(script, argv("whole"))
    with monkeypatch.context() as patch:
        patch.setattr(loop._Clock, "tick", stop_at(3, Stop))
        with pytest.raises(Stop):
            run(script, argv("resumed"))
    run(script, argv("resumed"))
    whole, resumed = (weights(tmp_path / name / "model") for name in ("whole", "resumed"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def stop_at(step: int, error: type[BaseException]) -> Any:
    tick = loop._Clock.tick

    def stopping(self: Any, images: int) -> None:
        tick(self, images)
        if self.step == step:
            raise error

    return stopping


def weights(folder: Path) -> dict[str, torch.Tensor]:
    parts = [folder / part / "diffusion_pytorch_model.safetensors" for part in ("unet", "transformer")]
    trained = next((path for path in parts if path.exists()), folder / "pytorch_lora_weights.safetensors")
    return load_file(trained)


# --- pictures ---


def _truncate(folder: Path) -> None:
    path = folder / "7.png"
    path.write_bytes(path.read_bytes()[:200])


def _float(folder: Path) -> None:
    (folder / "7.png").unlink()
    Image.fromarray(np.full((10, 12), 300, np.float32)).save(folder / "7.tif")
    path = folder / "metadata.jsonl"
    path.write_text(path.read_text().replace("7.png", "7.tif"))


def _unlisted(folder: Path) -> None:
    Image.new("RGB", (12, 10)).save(folder / "more.png")


def _unlocated(folder: Path) -> None:
    (folder / "7.png").unlink()


def _encoded(folder: Path) -> None:
    path = folder / "metadata.jsonl"
    path.write_bytes(path.read_text().replace("a ccc", "é").encode("latin-1"))


def _splits(folder: Path) -> None:
    (folder / "test").mkdir()
    (folder / "7.png").rename(folder / "test" / "7.png")
    path = folder / "metadata.jsonl"
    path.write_text(path.read_text().replace("7.png", "test/7.png"))


PICTURES = {
    "truncated": (_truncate, r"own/7\.png \(row 7 of the data set\) cannot be read as an image: "),
    "float": (
        _float,
        r"own/7\.tif \(row 7 .* float image with values from 300 to 300, whose range is not known",
    ),
    "unlisted": (_unlisted, r"own/more\.png has no line in the metadata"),
    "without a file": (_unlocated, r"own/7\.png of the metadata does not exist"),
    "Latin-1": (_encoded, r"own/metadata\.jsonl is not UTF-8: byte 0xe9 at position 112 \(line 3\)"),
    "test folder": (
        _splits,
        r"not clear which images of .*own are for training: test/7\.png \(another split\)",
    ),
}


@pytest.mark.parametrize("script", CAPTIONED)
@pytest.mark.parametrize("case", PICTURES)
def test_pictures_that_cannot_be_trained_on_are_named(
    script: str, case: str, base: Path, tmp_path: Path
) -> None:
    spoil, message = PICTURES[case]
    folder = folder_of(tmp_path, [])
    spoil(folder)
    cache = ["--cache_latents"] if script != "train_sign" else []
    with pytest.raises(ValueError, match=message):
        run(script, [*arguments(script, base, tmp_path / "run", folder), *steps(script, 1), *cache])
