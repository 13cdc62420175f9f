"""Times that do not depend on the machine, for tests of the search for plans."""

from dataclasses import replace
from typing import Any

from diffusers_ext.asdm import candidates
from diffusers_ext.asdm.cost import Cost, CostTable, cost_table, count_macs
from diffusers_ext.asdm.unet import unet_config


def by_macs(table: CostTable, measure: str = "macs") -> CostTable:
    """The table with milliseconds in proportion to another cost."""

    def timed(cost: Cost) -> Cost:
        return replace(cost, milliseconds=cost.of(measure) / 1e6)

    parts, gri = ({path: timed(cost) for path, cost in of.items()} for of in (table.parts, table.gri))
    return replace(table, total=timed(table.total), parts=parts, gri=gri)


def fake_times(monkeypatch: Any) -> None:
    """Lets `find_candidates` take MACs for times."""

    def macs(unet: Any, inputs: Any) -> int:
        height, width = inputs["sample"].shape[2:]
        return count_macs(unet_config(unet), height, width, inputs["encoder_hidden_states"].shape[1])[""]

    monkeypatch.setattr(
        candidates,
        "cost_table",
        lambda unet, height, width, tokens, repeats, batch: by_macs(cost_table(unet, height, width, tokens)),
    )
    monkeypatch.setattr(
        candidates,
        "time_ratio",
        lambda unet, other, inputs, repeats: macs(unet, inputs) / macs(other, inputs),
    )
