"""What is pushed to the Hub is loaded back as it was, and docs/hub.md tells what needs this package."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.contract.hub_matrix import ARTEFACTS, BASE, PAGE, USER, WORKS, attempt, replaced, run, table
from tests.hub_server import Hub, connected, hub_server

pytestmark = pytest.mark.filterwarnings("ignore")

# One of each kind. The slow test has all of them, in processes of their own.
QUICK = (
    *("base", "teleport", "golden-noise-class", "sign-class", "code", "statistics", "npnet", "smooth-lora"),
    *("asdm-stock", "pairs"),
)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory):
    with hub_server(tmp_path_factory.mktemp("hub") / "server") as found:
        with connected(found):
            ARTEFACTS["base"].push(BASE)
        yield found


@pytest.mark.parametrize("name", QUICK)
def test_one_of_each_kind_comes_back_as_it_was_pushed(name: str, hub: Hub) -> None:
    with connected(hub):
        pushed = ARTEFACTS[name].push(f"{USER}/{name}")
        made = attempt(ARTEFACTS[name].with_package, f"{USER}/{name}")
    assert isinstance(made, Tensor), made
    assert torch.equal(made, pushed)


def test_without_a_connection_nothing_reaches_the_hub(hub: Hub) -> None:
    made = attempt(ARTEFACTS["base"].plain, BASE)
    assert isinstance(made, str)
    assert "offline" in made.lower() or "OSError" in made


@pytest.mark.slow
def test_the_page_has_the_outcome(tmp_path: Path) -> None:
    outcome = run(tmp_path)
    refused = {name for name, found in outcome.items() if found["push"] != WORKS}
    assert refused == {"with-lora"}
    assert {name: found["ours"] for name, found in outcome.items() if name not in refused} == dict.fromkeys(
        set(outcome) - refused, WORKS
    )
    # What needs this package is refused by name, and nothing else is.
    without = {name for name in set(outcome) - refused if outcome[name]["plain"] != WORKS}
    classes = {name for name in ARTEFACTS if name.endswith("-class")}
    assert without == {*classes, "teleport", "code", "npnet", "asdm-unet"}
    for name in (*classes, "code"):
        assert "is a class of the package diffusers-ext, which is not installed" in outcome[name]["plain"], (
            name
        )
    for name in ("teleport", "asdm-unet"):  # diffusers' own words, as no code of ours runs
        assert "diffusers_ext" in outcome[name]["plain"], name
    page = PAGE.read_text(encoding="utf-8")
    assert replaced(page, table(outcome)) == page
