"""`dx.support` says what the contract finds, and the pages show it."""

import pytest

import diffusers_ext as dx
from tests import families
from tests.contract import matrix, test_families

# The column of the contract that each line of `dx.support` has to agree with.
COLUMNS: dict[str, str] = {}


@pytest.mark.parametrize("name", families.NAMES)
def test_support_is_what_the_contract_finds(name: str) -> None:
    refusals = matrix.supported(name).refusals
    for label, column in COLUMNS.items():
        state, _ = test_families._known(column, name)
        assert (refusals[label] is None) == (state != test_families.REFUSED), (label, refusals[label])


@pytest.mark.parametrize("name", families.NAMES)
def test_a_refusal_names_the_pipeline_or_its_part(name: str) -> None:
    pipe = families.build(name)
    kinds = {type(pipe), *(type(part) for part in vars(pipe).values())}
    for label, reason in matrix.supported(name).refusals.items():
        assert reason is None or any(kind.__name__ in reason for kind in kinds), label


@pytest.mark.parametrize("page", matrix.PAGES)
def test_the_pages_show_this_matrix(page: str) -> None:
    text = (matrix.ROOT / page).read_text(encoding="utf-8")
    assert matrix.replaced(text, matrix.PAGES[page]()) == text, "python -m tests.contract.matrix --write"


def test_the_report_can_be_read() -> None:
    report = dx.support(families.build("ddpm"))
    assert report.pipeline == "DDPMPipeline"
    assert len(str(report).splitlines()) == 1 + len(report.refusals)
