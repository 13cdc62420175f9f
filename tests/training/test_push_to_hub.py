"""`--push_to_hub` of every training script, with the small Hub: the code of the card that it uploads runs."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, ModelCard, hf_hub_download
from typer.testing import CliRunner

import diffusers_ext as dx
from diffusers_ext import cli
from tests import tiny
from tests.hub_server import USER, Hub, connected, hub_server
from tests.training.scripts import arguments, run, steps

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

BASE, PAIRS = f"{USER}/sd", f"{USER}/pairs"
# Script, further arguments, the task of its card.
RUNS = {
    "smooth-lora": ("train_smooth_lora", [], "text-to-image"),
    "asdm": ("train_asdm", [], "text-to-image"),
    "sign": ("train_sign", [], "text-to-image"),
    "sign-lora": ("train_sign", ["--rank", "2"], "text-to-image"),
    "npnet": ("train_npnet", [], "text-to-image"),
    "ddpm": ("train_base", [], "unconditional-image-generation"),
}


@pytest.fixture(scope="module")
def hub(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A Hub with the base model and a data set of noise pairs."""
    with hub_server(tmp_path_factory.mktemp("hub") / "server") as found:
        with connected(found):
            for repo, kind, folder in ((BASE, "model", "sd"), (PAIRS, "dataset", "pairs")):
                HfApi().create_repo(repo, repo_type=kind)
                HfApi().upload_folder(repo_id=repo, repo_type=kind, folder_path=base / folder)
        yield found


@pytest.mark.parametrize("name", list(RUNS))
def test_the_card_of_what_was_pushed_runs(name: str, hub: Hub, base: Path, tmp_path: Path) -> None:
    script, extra, task = RUNS[name]
    argv = [*arguments(script, base, tmp_path / "run"), *steps(script, 2), *extra]
    if script != "train_base":
        argv += ["--pretrained_model_name_or_path", BASE]
    if script == "train_npnet":
        place = argv.index("--train_data_dir")
        argv[place : place + 2] = ["--dataset_name", PAIRS]
    with connected(hub, name):
        run(script, [*argv, "--push_to_hub", "--hub_model_id", name])
        shutil.rmtree(tmp_path / "run")  # what follows comes from the Hub
        repo = f"{USER}/{name}"
        card = ModelCard.load(repo)
        record = json.loads(Path(hf_hub_download(repo, "training.json")).read_text())
        scope = execute(card.text)
    data = card.data
    assert (data.pipeline_tag, data.license, data.library_name) == (task, "apache-2.0", "diffusers")
    assert data.base_model == (None if script == "train_base" else BASE)
    assert data.datasets == ([PAIRS] if script == "train_npnet" else None)
    assert data.model_name == name
    assert repo in card.text
    # A Smooth-LoRA is validated by a number alone.
    drawn = script != "train_smooth_lora"
    assert ("![Images of the last validation](validation.png)" in card.text) == drawn
    figures = {result.metric_name: result.metric_value for result in data.eval_results or []}
    assert any(figure.endswith("loss") for figure in figures)
    for figure, value in figures.items():
        assert value == pytest.approx(record[figure], rel=1e-3), figure  # four digits
    assert made_with(scope)


def execute(text: str) -> dict[str, Any]:
    """The names after the first Python block of a card."""
    found = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert found is not None
    scope: dict[str, Any] = {}
    exec(found[1], scope)
    return scope


def made_with(scope: dict[str, Any]) -> bool:
    """Whether the code of a card has made images, or a pipeline that makes some."""
    if "images" in scope:
        return len(scope["images"]) > 0
    pipe = scope["pipe"]
    pipe.set_progress_bar_config(disable=True)
    return len(pipe("a aaa", num_inference_steps=2, height=8, width=8).images) == 1


def test_fit_gaussian_pushes_statistics_of_a_model_of_the_hub(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a aaa\na bbb\n")
    argv = ["fit-gaussian", BASE, "--from-samples", "6", "--prompts", tmp_path / "prompts.txt", "--rank", "3"]
    argv += ["--num-inference-steps", "2", "--output", tmp_path / "stats", "--push-to-hub", f"{USER}/stats"]
    with connected(hub, "cli"):
        result = CliRunner().invoke(cli.app, [str(arg) for arg in argv])
        assert result.exit_code == 0, result.output
        loaded = dx.GaussianStats.from_pretrained(f"{USER}/stats")
    written = dx.GaussianStats.from_pretrained(tmp_path / "stats")
    assert torch.equal(loaded.eigenvectors, written.eigenvectors)
    assert loaded.class_names == ("a aaa", "a bbb")


def test_a_pruning_plan_comes_back_as_it_was(hub: Hub, tmp_path: Path) -> None:
    pipe = tiny.build("sd")
    plan = dx.PruningPlan(dict(pipe.unet.config), (("mid.attention",),))
    plan.save(tmp_path / "plan.json")
    with connected(hub, "plan"):
        HfApi().create_repo(f"{USER}/plan")
        HfApi().upload_folder(repo_id=f"{USER}/plan", folder_path=tmp_path)
        again = dx.PruningPlan.load(hf_hub_download(f"{USER}/plan", "plan.json"))
    assert again == plan
