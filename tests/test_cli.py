"""The command line, the optional extras and the examples."""

import builtins
import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import typer
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

import diffusers_ext as dx
from diffusers_ext import cli
from diffusers_ext.core.extras import MissingExtraError, require
from tests import tiny

pytestmark = pytest.mark.filterwarnings("ignore")

ROOT = Path(__file__).parents[1]
ASIDE = """
import sys
from diffusers_ext.cli import app
try:
    app(["--help"])
except SystemExit as stop:
    assert not stop.code
heavy = {"torch", "diffusers", "transformers", "numpy", "datasets", "PIL", "matplotlib"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""


def run(*args: Any, code: int = 0) -> str:
    """Everything that the command prints, without line breaks."""
    result = CliRunner().invoke(cli.app, [str(arg) for arg in args], env={"COLUMNS": "200"})
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sd")
    tiny.build("sd").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ddpm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ddpm")
    tiny.build("ddpm").save_pretrained(folder)
    return folder


def test_help_imports_nothing_heavy() -> None:
    done = subprocess.run([sys.executable, "-c", ASIDE], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for command in ("fit-gaussian", "demo", "version"):
        assert command in done.stdout


def test_version() -> None:
    assert run("version") == run("--version") == dx.__version__
    done = subprocess.run(
        [sys.executable, "-m", "diffusers_ext", "--version"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.stdout.strip() == dx.__version__, done.stderr


def _commands(group: Any, path: tuple[str, ...] = ()) -> Any:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _commands(command, (*path, name))
        else:
            yield (*path, name), command


def test_every_command_and_option_has_help() -> None:
    found = dict(_commands(typer.main.get_command(cli.app)))
    expected = {
        ("fit-gaussian",),
        ("generate",),
        ("interpolate",),
        ("invert",),
        ("edit",),
        ("project",),
        ("istd",),
        ("convert", "npnet"),
        ("asdm", "plan"),
        ("asdm", "search"),
        ("demo",),
        ("version",),
    }
    assert expected <= set(found)
    for path, command in found.items():
        assert command.help, path
        options = [p for p in command.params if p.param_type_name == "option" and p.name != "help"]
        silent = [option.name for option in options if not option.help]
        assert not silent, (path, silent)


def test_errors_that_are_not_the_users_are_one_line_too(
    sd: Path, ddpm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompts.txt").write_text("a aaa\n")
    prompts = ("--prompts", tmp_path / "prompts.txt")
    text = run("istd", ddpm, *prompts, code=1)
    assert text.endswith("Error: DDPMPipeline takes no prompts: this command needs a text-to-image pipeline.")
    assert "needs a text-to-image pipeline" in run("asdm", "plan", ddpm, "--target", 0.9, *prompts, code=1)
    if not torch.cuda.is_available():
        text = run("istd", sd, *prompts, "--device", "cuda", code=1)
        assert text == "Error: --device cuda: PyTorch finds no CUDA device. Use --device cpu."

    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("something\nunforeseen")

    monkeypatch.setattr("diffusers_ext.metrics.istd.compute_istd", broken)
    text = run("istd", sd, *prompts, code=1)
    assert text.endswith(
        "Error: RuntimeError: something unforeseen (DIFFUSERS_EXT_DEBUG=1 shows the traceback)"
    )
    monkeypatch.setenv("DIFFUSERS_EXT_DEBUG", "1")
    with pytest.raises(RuntimeError, match="unforeseen"):
        run("istd", sd, *prompts, code=1)


def test_fit_from_samples(sd: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a aaa\n\n  a bbb  \n")
    text = run(
        "fit-gaussian",
        sd,
        *("--from-samples", 6, "--prompts", tmp_path / "prompts.txt", "--rank", 3, "--batch-size", 3),
        *("--num-inference-steps", 2, "--guidance-scale", 2, "--output", tmp_path / "stats"),
    )
    stats = dx.GaussianStats.from_pretrained(tmp_path / "stats")
    assert stats.class_names == ("a aaa", "a bbb")
    assert (stats.rank, stats.num_samples) == (3, 6)
    for part in ("4 × 8 × 8", "explained variance", "top eigenvalues", "2 (covariance within each)"):
        assert part in text
    assert f"{float(stats.eigenvalues[0]):.4g}" in text


def test_fit_to_pictures(ddpm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pictures").mkdir()
    for number in range(4):
        Image.effect_noise((16, 12), 50 + number).save(tmp_path / "pictures" / f"{number}.png")
    uploads: list[str] = []
    monkeypatch.setattr(
        dx.GaussianStats, "push_to_hub", lambda self, repo: uploads.append(repo) or "https://hub/commit"
    )
    text = run(
        "fit-gaussian",
        ddpm,
        *("--dataset", tmp_path / "pictures", "--resolution", 8, "--rank", 2, "--device", "cpu"),
        *("--output", tmp_path / "stats", "--push-to-hub", "someone/stats"),
    )
    assert dx.GaussianStats.from_pretrained(tmp_path / "stats").shape == (3, 8, 8)
    assert uploads == ["someone/stats"]
    assert "https://hub/commit" in text


def test_data_set_of_the_hub(ddpm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    table = datasets.Dataset.from_dict(
        {"img": [Image.effect_noise((8, 8), 50 + n) for n in range(6)], "kind": list("ababab")},
        features=datasets.Features({"img": datasets.Image(), "kind": datasets.Value("string")}),
    )
    asked: list[Any] = []
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: asked.append((name, split)) or table)
    options = ("--dataset", "some/pictures", "--split", "test", "--image-column", "img", "--rank", 1)
    run("fit-gaussian", ddpm, *options, "--label-column", "kind", "--output", tmp_path)
    assert asked == [("some/pictures", "test")]
    assert dx.GaussianStats.from_pretrained(tmp_path).class_names == ("a", "b")


def test_errors_are_one_line(sd: Path, tmp_path: Path) -> None:
    def error(*args: Any) -> str:
        text = run("fit-gaussian", *args, code=1)
        assert text.startswith("Error: ")
        assert "Traceback" not in text
        return text

    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    assert "Give either --dataset, --from-samples N or --from-score." in error(sd)
    assert "Give either" in error(sd, "--dataset", tmp_path, "--from-samples", 4)
    assert "--prompts goes with --from-samples" in error(sd, "--dataset", tmp_path, "--prompts", empty)
    assert "empty.txt holds no prompts" in error(sd, "--from-samples", 4, "--prompts", empty)
    assert "No such file" in error(sd, "--from-samples", 4, "--prompts", tmp_path / "none")
    assert "rank=256 needs more than 4 samples" in error(sd, "--from-samples", 4)
    assert "--dtype must be one of" in error(sd, "--from-samples", 4, "--rank", 1, "--dtype", "int8")
    assert "holds no images" in error(sd, "--dataset", tmp_path, "--rank", 1)
    assert "is not a folder of images" in error(sd, "--dataset", empty, "--rank", 1)
    error(tmp_path / "nowhere", "--from-samples", 4, "--rank", 1)


def test_demo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module: Any = ModuleType("diffusers_ext.testbed.demo")
    calls: list[Any] = []
    module.run = lambda output_dir, num_images, seed: calls.append((output_dir, num_images, seed))
    monkeypatch.setitem(sys.modules, "diffusers_ext.testbed.demo", module)
    run("demo", "--output-dir", tmp_path, "--num-images", 9, "--seed", 3)
    assert calls == [(tmp_path, 9, 3)]


# --- extras ---


def test_missing_extra(monkeypatch: pytest.MonkeyPatch, ddpm: Path, tmp_path: Path) -> None:
    assert require("json", "train").loads("1") == 1
    with pytest.raises(MissingExtraError, match=r"'nosuch', which is not installed: pip install"):
        require("nosuch.part", "train")
    (tmp_path / "halfway.py").write_text("import nosuch_inside")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="No module named 'nosuch_inside'"):
        require("halfway", "train")

    def missing(package: str, extra: str) -> Any:
        return require("nosuch", extra)

    monkeypatch.setattr("diffusers_ext.teleport.commands.require", missing)
    text = run("fit-gaussian", ddpm, "--dataset", "some/pictures", "--rank", 1, code=1)
    assert 'pip install "diffusers-ext[train]" installs it.' in text


# --- examples ---


@pytest.mark.slow
@pytest.mark.parametrize("name", ["teleport_any_pipeline", "teleport_new_prompts", "fit_from_pictures"])
def test_examples(name: str, sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers_ext.testbed import embedded

    monkeypatch.setattr(embedded, "card_dir", lambda name: sd)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(builtins, "print", lambda *args, **kwargs: None)
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    assert list(tmp_path.glob("*.png"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size", "summary"),
    [
        ("golden_noise", (3 * 64, 2 * 32), "golden noise: compact NPNet"),
        ("smooth_lora", (9 * 64, 32), "Smooth-LoRA: adapter 'smooth' of rank 8"),
        ("sign", (8 * 32, 4 * 32), "SIGN: projector at timestep"),
    ],
)
def test_the_examples_with_embedded_weights(
    name: str, size: tuple[int, int], summary: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    printed: list[str] = []
    monkeypatch.setattr(builtins, "print", lambda *args, **kwargs: printed.append(str(args[0])))
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    assert Image.open(tmp_path / f"{name}.png").size == size
    assert summary in printed[0]


@pytest.mark.slow
def test_the_example_of_pruning(monkeypatch: pytest.MonkeyPatch) -> None:
    printed: list[str] = []
    monkeypatch.setattr(builtins, "print", lambda *args, **kwargs: printed.append(str(args[0])))
    runpy.run_path(str(ROOT / "examples" / "prune_unet.py"), run_name="__main__")
    assert printed[0].startswith("stage 1: ")
    assert " of 4,770,276 parameters are left" in printed[-1]


def test_istd_with_and_without_a_lora(sd: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a aaa\na bbb\n")
    save_file(tiny.lora("sd"), tmp_path / "lora.safetensors")
    size = ("--height", 8, "--width", 8, "--num-inference-steps", 2)
    command = ("istd", sd, "--prompts", tmp_path / "prompts.txt", *size)
    plain = run(*command, "--cache-dir", tmp_path / "cache")
    assert "2 paths of 11 images" in plain
    pipe = tiny.build("sd")
    found = dx.compute_istd(
        pipe, ["a aaa", "a bbb"], height=8, width=8, num_inference_steps=2, guidance_scale=7.5, progress=False
    )
    assert f"{found.istd:.4g}" in plain
    assert len(list((tmp_path / "cache").iterdir())) == 2
    assert run(*command, "--smooth-lora", tmp_path / "lora.safetensors") != plain
    assert "Error" in run("istd", sd, "--prompts", tmp_path / "none.txt", code=1)
