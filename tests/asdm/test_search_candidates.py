"""Candidate plans at a target of time: the plain search's first, all different, none too slow."""

import time
from typing import Any

import pytest
import torch
from torch import nn

import diffusers_ext as dx
from diffusers_ext.asdm.candidates import Candidate, choose_candidates, find_candidates
from diffusers_ext.asdm.cost import CostTable, cost_table, time_ratio
from diffusers_ext.asdm.networks import fingerprint
from diffusers_ext.asdm.prune import cut_network
from diffusers_ext.asdm.search import PruningProfile
from diffusers_ext.asdm.sensitivity import guidance_change, predict
from diffusers_ext.asdm.shape import UNetShape
from tests.asdm.networks import network
from tests.asdm.times import by_macs, fake_times

pytestmark = pytest.mark.filterwarnings("ignore")


ALL_ATTENTIONS = ("attention.down.0", "attention.down.1", "attention.up.0", "attention.up.1", "mid.attention")


def inputs() -> list[dict[str, Any]]:
    """As of a run with guidance: both halves have the same latents."""
    draw = torch.manual_seed(0)
    latents = torch.randn(2, 4, 16, 8, generator=draw).repeat(2, 1, 1, 1)
    prompts = torch.randn(4, 5, 12, generator=draw)
    return [
        {"sample": latents, "timestep": torch.tensor(t), "encoder_hidden_states": prompts} for t in (100, 700)
    ]


@pytest.fixture(scope="module")
def unet() -> Any:
    return network(layers_per_block=1)


@pytest.fixture(scope="module")
def profile(unet: Any) -> PruningProfile:
    measured = dx.profile_network(unet, inputs(), repeats=0)
    return PruningProfile(measured.config, by_macs(measured.costs), measured.sensitivity)


def times_of(profile: PruningProfile, tables: dict[int, CostTable], slower: float = 1.0) -> Any:
    def measure(cuts: tuple[str, ...]) -> dict[int, float]:
        after = UNetShape(profile.config).cut(*cuts)
        return {
            b: slower * t.of_shape(after).of("milliseconds") / t.total.of("milliseconds")
            for b, t in tables.items()
        }

    return measure


def candidates_of(
    profile: PruningProfile, tables: dict[int, CostTable], slower: float = 1.0, **options: Any
) -> list[Candidate]:
    """Plans for a target of 70%, by the losses of the profile."""
    times = times_of(profile, tables, slower)
    return choose_candidates(profile.config, {"output": profile.sensitivity}, tables, 0.7, times, **options)


def test_the_plain_searchs_plan_is_first(profile: PruningProfile) -> None:
    tables = {8: profile.costs}
    found = candidates_of(profile, tables, num_candidates=6)
    assert found[0].plan == profile.plan(0.7, "milliseconds")
    assert found[0].source == "output change"
    assert len(found) == len({fingerprint(c.plan.shape().config()) for c in found}) == 6
    assert all(c.times[8] <= 0.7 for c in found)
    assert all(
        c.plan.predictions[-1].cost.of("milliseconds") <= 0.7 * profile.costs.total.of("milliseconds")
        for c in found
    )
    assert any(not any(cut.startswith("gri") for cut in c.plan.cuts) for c in found)


@pytest.mark.slow
def test_windows_that_cover_the_image_are_no_cut(unet: Any, profile: PruningProfile) -> None:
    # 16 × 8 latents and windows of 8: at the second resolution, of 8 × 4, GRI attention is full attention.
    shape = UNetShape(profile.config)
    assert set(profile.costs.gri) == set(shape.attentions(0))
    assert profile.costs.of_shape(shape.cut("gri.1")) == profile.costs.total
    found = find_candidates(unet, inputs(), 0.99, num_candidates=4, repeats=1)
    assert not any("gri.1" in candidate.plan.cuts for candidate in found)


def test_a_plan_that_is_measured_as_too_slow_is_replaced(profile: PruningProfile) -> None:
    tables = {8: profile.costs}
    slow = candidates_of(profile, tables, 1.2, num_candidates=3)
    assert all(c.times[8] <= 0.7 for c in slow)
    # Exactly the plan for what the measurement allows.
    assert slow[0].plan == profile.plan(0.7 / 1.2, "milliseconds")


def test_the_target_holds_for_every_batch_size(unet: Any, profile: PruningProfile) -> None:
    # For one row, parameters take the time.
    one = by_macs(profile.costs, "parameters")
    tables = {8: profile.costs, 1: one}
    found = candidates_of(profile, tables, num_candidates=4)
    assert all(max(c.times.values()) <= 0.7 for c in found)
    assert any("time of 1 row" in c.source or "time of 8 rows" in c.source for c in found)


def test_a_seed_gives_the_same_candidates(profile: PruningProfile) -> None:
    tables = {8: profile.costs}

    def of(seed: int) -> list[Any]:
        return [c.plan.cuts for c in candidates_of(profile, tables, num_candidates=5, seed=seed)]

    assert of(0) == of(0)
    assert of(0) != of(1)
    assert of(0)[0] == of(1)[0]


def test_what_is_refused(unet: Any, profile: PruningProfile) -> None:
    tables = {8: profile.costs, 1: profile.costs}
    with pytest.raises(
        ValueError, match=r"No plan leaves 70.0% of the time for 8 and 1 rows: set a larger target"
    ):
        candidates_of(profile, tables, 50.0, num_candidates=2)
    with pytest.raises(ValueError, match=r"between 0 and 1, got 1\.5"):
        find_candidates(unet, inputs(), 1.5)


@pytest.mark.slow
@pytest.mark.parametrize("guided", [True, False])
def test_candidates_of_a_unet(unet: Any, monkeypatch: Any, guided: bool) -> None:
    fake_times(monkeypatch)
    given = inputs()
    if not guided:
        given = [{**item, "sample": torch.randn(4, 4, 16, 8)} for item in given]
    found = find_candidates(unet, given, 0.7, batch_sizes=(2, 1), num_candidates=4, repeats=1)
    assert [c.times.keys() for c in found] == [{2, 1}] * 4
    assert all(max(c.times.values()) <= 0.7 for c in found)
    assert guided == any(c.source.startswith("guidance change") for c in found)
    for candidate in found:
        candidate.plan.check(unet)


def test_guidance_change(unet: Any) -> None:
    given = inputs()
    reference = predict(unet, given)
    # Rounding of float32: the sums of the convolutions may have another order.
    assert guidance_change(unet, given, reference) < 1e-12

    class Weaker(nn.Module):
        """The prompt has three quarters of its effect; without prompt everything is twice as large."""

        def forward(self, sample: Any, timestep: Any, **kwargs: Any) -> Any:
            base, whole = unet(sample, timestep, **kwargs)[0].chunk(2)
            return (torch.cat([2 * base, 2 * base + 0.75 * (whole - base)]),)

    assert guidance_change(Weaker(), given, reference) == pytest.approx(0.25**2, rel=1e-4)  # float32
    # Without the attentions in its way, no prompt acts: δ = 0.
    assert guidance_change(cut_network(unet, *ALL_ATTENTIONS), given, reference) == pytest.approx(1, abs=1e-5)
    with pytest.raises(ValueError, match="got 3 rows: use guidance"):
        guidance_change(
            unet,
            [
                {
                    **given[0],
                    "sample": given[0]["sample"][:3],
                    "encoder_hidden_states": given[0]["encoder_hidden_states"][:3],
                }
            ],
            [reference[0][:3]],
        )
    same = [
        {**item, "encoder_hidden_states": item["encoder_hidden_states"][:1].expand(4, -1, -1)}
        for item in given
    ]
    with pytest.raises(ValueError, match="The prompts do not change the output"):
        guidance_change(unet, same, [r[:2].repeat(2, 1, 1, 1) for r in reference])


def test_time_ratio() -> None:
    class Sleeps(nn.Module):
        def __init__(self, seconds: float) -> None:
            super().__init__()
            self.seconds, self.weight = seconds, nn.Parameter(torch.zeros(1))

        def forward(self) -> None:
            time.sleep(self.seconds)

    # A sleep may last longer on a busy machine, so the bounds are wide.
    assert 2 < time_ratio(Sleeps(0.04), Sleeps(0.01), {}, repeats=3) < 8
    with pytest.raises(ValueError, match="repeats must be a whole number of 1 or more, got 0"):
        time_ratio(Sleeps(0), Sleeps(0), {}, repeats=0)


def test_the_table_of_costs_is_the_real_one(unet: Any) -> None:
    """`by_macs` changes milliseconds only."""
    table = cost_table(unet, 16, 8, 5)
    assert by_macs(table).total.macs == table.total.macs
    assert by_macs(table).total.milliseconds == table.total.macs / 1e6
