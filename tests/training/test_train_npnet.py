"""Collecting noise pairs and training NPNet end to end, as a user launches them, on a tiny random pipeline."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import diffusers_ext as dx
from diffusers_ext.core.prompts import prompt_embeddings
from diffusers_ext.core.storage import ShardStore
from diffusers_ext.golden_noise.pairs import NoisePairs, PairSettings, collect_pairs
from diffusers_ext.golden_noise.training import (
    equal_norm,
    relative_error,
    rescaled,
    split_by_prompt,
    variants,
)
from diffusers_ext.training.checkpoints import list_checkpoints
from tests import families, tiny
from tests.training.launching import ACCELERATE, ROOT, TWO_PROCESSES, kill_after, launch

# One worker runs them all: they share the pairs and the trained network.
pytestmark = [pytest.mark.slow]

COLLECT, TRAIN = (str(ROOT / "training" / f"{name}.py") for name in ("collect_noise_pairs", "train_npnet"))
PROMPTS = [f"a {letter * 3}" for letter in "abcdefghijklmnopqrstuvwxyz"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny.build("sd").save_pretrained(folder / "model")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    (folder / "mine.py").write_text("def brightness(images, prompts):\n    return images.mean((1, 2, 3))\n")
    return folder


def collect(base: Path, output: Path, *extra: str) -> list[str]:
    return [
        COLLECT,
        *("--pretrained_model_name_or_path", str(base / "model"), "--prompts", str(base / "prompts.txt")),
        *("--output_dir", str(output), "--num_pairs", "52", "--train_batch_size", "4"),
        *("--num_inference_steps", "10", "--guidance_scale", "30", "--height", "8", "--width", "8", *extra),
    ]


@pytest.fixture(scope="module")
def pairs(base: Path) -> Path:
    assert "52 pairs kept of 52 tried" in launch(collect(base, base / "pairs"), ACCELERATE)
    return base / "pairs"


def train(base: Path, output: Path, *extra: str) -> list[str]:
    return [
        TRAIN,
        *("--pretrained_model_name_or_path", str(base / "model"), "--train_data_dir", str(base / "pairs")),
        *(
            "--output_dir",
            str(output),
            "--width",
            "32",
            "--depth",
            "1",
            "--use_ema",
            "--max_train_steps",
            "12",
        ),
        *("--train_batch_size", "4", "--learning_rate", "3e-3", "--lr_warmup_steps", "2"),
        *("--num_inference_steps", "2", "--num_validation_images", "4", *extra),
    ]


@pytest.fixture(scope="module")
def trained(base: Path, pairs: Path) -> Path:
    launch(train(base, base / "npnet", "--scorer", f"{base / 'mine.py'}:brightness"))
    return base / "npnet"


def shards(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {path.name: load_file(path) for path in sorted(folder.glob("*.safetensors"))}


def assert_same_pairs(one: Path, two: Path) -> None:
    a, b = shards(one), shards(two)
    assert a.keys() == b.keys()
    for name, tensors in a.items():
        assert all(torch.equal(value, b[name][key]) for key, value in tensors.items()), name


def test_a_killed_collector_loses_and_doubles_no_pair(base: Path, pairs: Path, tmp_path: Path) -> None:
    argv = collect(base, tmp_path, "--num_pairs", "52")
    for count in (0, 3):
        kill_after(argv, lambda n=count: len(list(tmp_path.glob("*.safetensors"))) > n, 0.3)
        assert 0 < len(list(tmp_path.glob("*.safetensors"))) < 13
    assert "52 pairs kept of 52 tried" in launch(argv)
    assert_same_pairs(pairs, tmp_path)
    assert NoisePairs.load(tmp_path).index.tolist() == list(range(52))


def test_two_processes_collect_what_one_collects(base: Path, pairs: Path, tmp_path: Path) -> None:
    assert "52 pairs kept of 52 tried" in launch(collect(base, tmp_path), TWO_PROCESSES)
    assert_same_pairs(pairs, tmp_path)


def test_training_leaves_a_network_that_has_learnt(trained: Path, base: Path) -> None:
    npnet: Any = dx.NPNetModel.from_pretrained(trained / "model", torch_dtype=torch.float32)
    pipe = tiny.build("sd")
    _, held_out = split_by_prompt(NoisePairs.load(base / "pairs"), 0.1)
    assert relative_error(npnet, pipe, held_out) < 1
    plain = tiny.images(pipe, "sd", 2)
    dx.apply_golden_noise(pipe, npnet)
    assert not torch.equal(tiny.images(pipe, "sd", 2), plain)
    record = json.loads((trained / "model" / "training.json").read_text())
    assert record["relative error"] == pytest.approx(
        relative_error(npnet, tiny.build("sd"), held_out), rel=0.05
    )
    assert record["pairs"] + record["held-out pairs"] == 52
    card = (trained / "model" / "README.md").read_text()
    for name in ("plain", "npnet", "re-denoised", "random", "shuffled", "rescaled"):
        assert f"| score, {name} |" in card
    assert str(base) not in card
    assert "--width 32" in card
    assert (trained / "validation-12.png").is_file()


def test_a_killed_training_resumes_to_the_same_weights(base: Path, trained: Path, tmp_path: Path) -> None:
    kill_after(
        train(base, tmp_path, "--checkpointing_steps", "1"), lambda: bool(list_checkpoints(tmp_path)), 0.5
    )
    launch(train(base, tmp_path, "--resume_from_checkpoint", "latest"))
    file = "model/diffusion_pytorch_model.safetensors"
    expected, resumed = load_file(trained / file), load_file(tmp_path / file)
    assert all(torch.equal(weight, resumed[name]) for name, weight in expected.items())


def test_two_processes_train_what_one_trains(base: Path, trained: Path, tmp_path: Path) -> None:
    launch(train(base, tmp_path, "--train_batch_size", "2"), TWO_PROCESSES)
    networks: list[Any] = [dx.NPNetModel.from_pretrained(f / "model").eval() for f in (trained, tmp_path)]
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).half()
    text = prompt_embeddings(tiny.build("sd"), PROMPTS[:2]).embeds
    with torch.no_grad():
        one, two = (network.float()(noise.float(), text).sample for network in networks)
    # Gradients summed in another order (float32 rounding), which Adam enlarges where they are tiny; weights are
    # stored with 11 bits. So what the networks do is compared, with what training changed.
    assert (one - two).abs().max() < 0.02 * (one - noise).abs().max()


def test_the_split_is_by_prompt_and_always_the_same(pairs: Path) -> None:
    whole = NoisePairs.load(pairs)
    training, held_out = split_by_prompt(whole, 0.3)
    assert not set(training.prompts) & set(held_out.prompts)
    assert len(training) + len(held_out) == len(whole)
    assert split_by_prompt(whole.subset(torch.arange(52).flip(0)), 0.3)[1].prompts == held_out.prompts[::-1]
    with pytest.raises(ValueError, match="cannot be split with 0% held out"):
        split_by_prompt(whole, 0.0)


def test_the_controls_are_what_they_are_called(pairs: Path) -> None:
    few = NoisePairs.load(pairs).subset(torch.arange(4))
    npnet, pipe = tiny.npnet("sd"), tiny.build("sd")
    starts = variants(npnet, pipe, few)
    plain, made = starts["plain"], starts["npnet"]
    assert torch.equal(starts["re-denoised"], few.golden.float())
    norms = [(starts[name] - plain).flatten(1).norm(dim=1) for name in ("npnet", "random")]
    assert torch.allclose(*norms, rtol=1e-4)
    embeds = prompt_embeddings(pipe, few.prompts).embeds
    assert torch.equal(starts["shuffled"][0], npnet(plain, embeds.roll(1, 0)).sample[0])
    assert not torch.equal(starts["shuffled"], made)
    for axis in (torch.mean, torch.std):
        found, wanted = (axis(x.flatten(1), dim=1) for x in (starts["rescaled"], made))
        assert torch.allclose(found, wanted, atol=1e-5)
    assert torch.allclose(rescaled(plain, plain), plain, atol=1e-5)
    assert not torch.equal(*(equal_norm(made, torch.Generator().manual_seed(seed)) for seed in (0, 1)))


@pytest.fixture
def main(monkeypatch: Any) -> Any:
    """The training script's main in this process, for what fails before any training."""
    spec: Any = importlib.util.spec_from_file_location("train_npnet", TRAIN)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")

    def run(argv: list[str], pipe: Any = None) -> None:
        monkeypatch.setattr(sys, "argv", argv)
        if pipe is not None:
            monkeypatch.setattr("diffusers_ext.training.models.load_pipeline", lambda args, **options: pipe)
        module.main()

    return run


@pytest.mark.parametrize("name", ["qwen", "sana", "zimage"])
def test_training_reads_prompts_as_the_pairs_were_made(
    main: Any, base: Path, name: str, tmp_path: Path
) -> None:
    """Prompts of several lengths, padded to the longest of a batch or to the longest possible."""
    pipe, prompts = families.build(name), [f"a {'b' * n}" for n in range(16)]
    call = {key: value for key, value in families.FAMILIES[name].call.items() if key != "output_type"}
    settings = PairSettings(num_inference_steps=10, guidance_scale=8.0)
    collect_pairs(pipe, prompts, 32, tmp_path / "pairs", settings, progress=False, **call)
    main(train(base, tmp_path / "npnet", "--train_data_dir", str(tmp_path / "pairs")), pipe)
    npnet: Any = dx.NPNetModel.from_pretrained(tmp_path / "npnet" / "model", torch_dtype=torch.float32)
    assert npnet.config.max_tokens == call["max_sequence_length"]
    recorded = npnet.config.prompt_options
    assert "max_sequence_length" in recorded
    assert all(call[key] == value for key, value in recorded.items() if key in call)
    plain = families.images(pipe, name, 2)
    dx.apply_golden_noise(pipe, npnet)
    assert not torch.equal(families.images(pipe, name, 2), plain)
    with pytest.raises(ValueError, match=r"max_sequence_length=\d+ there, 12 here"):
        families.images(pipe, name, 2, max_sequence_length=12)


def test_the_collector_passes_arguments_on(base: Path, tmp_path: Path) -> None:
    """Complex prompts need arguments of the call, and training reads them from the recipe."""
    launch(collect(base, tmp_path, "--num_pairs", "4", "--call_arguments", '{"guidance_rescale": 0.5}'))
    recorded = ShardStore.recipe_of(tmp_path)["call"]
    assert recorded == {"guidance_rescale": 0.5, "height": 8, "width": 8}


def test_wrong_arguments_are_named(main: Any, base: Path, pairs: Path, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        main(train(base, tmp_path, "--dataset_name", "user/pairs"))
    assert "either --train_data_dir or --dataset_name" in capsys.readouterr().err
    with pytest.raises(ValueError, match="No noise pairs"):
        main(train(base, tmp_path, "--train_data_dir", str(tmp_path)))
    tiny.build("sd", seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="holds pairs of another model"):
        main(train(base, tmp_path, "--pretrained_model_name_or_path", str(tmp_path / "other")))
