"""The cards of the embedded models and custom pipelines: what the Hub reads of them, and that their code runs."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from PIL import Image

from tests.hub_server import Hub, connected, hub_server

pytestmark = pytest.mark.filterwarnings("ignore")

ROOT = Path(__file__).parents[1]
OWNER = "diffusers-ext"
MODELS = sorted(path.parent for path in ROOT.glob("model_cards/*/README.md"))
PIPELINES = sorted(path.parent for path in ROOT.glob("pipelines/*/README.md"))
TASKS = {
    "text-to-image",
    "unconditional-image-generation",
    "image-classification",
}  # of those that the Hub has
# A value with its 95% interval, as the pages write it.
FIGURE = re.compile(r"[+-]?[\d.]+ \[-?[\d.]+, -?[\d.]+\]")
# For SDXL there are no embedded models, so their code cannot run here.
RUNNABLE = [*MODELS, *(path for path in PIPELINES if not path.name.endswith("sdxl"))]


def code_of(folder: Path) -> str:
    found = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    return found[1]


@pytest.mark.parametrize("folder", [*MODELS, *PIPELINES], ids=lambda folder: folder.name)
def test_the_header_is_what_the_hub_expects(folder: Path) -> None:
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "apache-2.0"
    assert card.data.library_name == "diffusers"
    assert card.data.pipeline_tag in TASKS
    assert not TASKS & set(card.data.tags), "the task is not repeated as a tag"
    block = REGEX_YAML_BLOCK.search((folder / "README.md").read_text(encoding="utf-8"))
    assert block is not None
    # Nothing is lost or changed by huggingface_hub, so every key is one that it knows, with a valid content.
    known = {
        "license",
        "library_name",
        "pipeline_tag",
        "base_model",
        "base_model_relation",
        "datasets",
        "tags",
    }
    assert set(yaml.safe_load(block[2])) <= {*known, "model-index"}
    assert yaml.safe_load(card.data.to_yaml()) == yaml.safe_load(block[2])


@pytest.mark.parametrize("folder", MODELS, ids=lambda folder: folder.name)
def test_the_header_of_a_model_has_its_origin_and_figures(folder: Path) -> None:
    card, name = ModelCard.load(folder / "README.md"), folder.name
    assert card.data.datasets == ["zalando-datasets/fashion_mnist"]
    bases = [path.name for path in MODELS if name.endswith(f"-{path.name}")]
    assert card.data.base_model == (f"{OWNER}/{bases[0]}" if bases else None)
    assert card.data.model_name == name
    assert card.data.eval_results
    for result in card.data.eval_results:
        assert result.task_type == card.data.pipeline_tag
        assert FIGURE.fullmatch(result.metric_value), result.metric_value
        assert result.metric_value in card.content.split("---\n", 2)[2], (
            "the text of the card has another figure"
        )


@pytest.mark.parametrize("folder", MODELS, ids=lambda folder: folder.name)
def test_a_model_has_a_picture(folder: Path) -> None:
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert re.search(r"!\[[^\]]+\]\(picture\.png\)", text)
    with Image.open(folder / "picture.png") as picture:
        picture.load()
        assert min(picture.size) >= 64


@pytest.mark.parametrize("folder", RUNNABLE, ids=lambda folder: folder.name)
def test_the_code_names_repositories_and_no_folders(folder: Path) -> None:
    code = code_of(folder)
    assert re.search(rf'"{OWNER}/[\w-]+"', code)
    for name in re.findall(rf'"{OWNER}/([\w-]+)"', code):
        assert (ROOT / "model_cards" / name).is_dir(), name
    assert not re.search(r'"(model_cards|pipelines|path)/', code)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A Hub with all models."""
    with hub_server(tmp_path_factory.mktemp("hub") / "server") as found:
        with connected(found):
            for folder in MODELS:
                HfApi().create_repo(f"{OWNER}/{folder.name}")
                HfApi().upload_folder(repo_id=f"{OWNER}/{folder.name}", folder_path=folder)
        yield found


@pytest.mark.slow
@pytest.mark.parametrize("folder", RUNNABLE, ids=lambda folder: folder.name)
def test_the_code_runs(folder: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where no folder has the name of a repository
    with connected(hub):
        exec(code_of(folder), {})
