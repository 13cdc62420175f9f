"""A-SDM: block pruning of a UNet, with GRI attention, CLME-CondConv and progressive incubation.

Zhu et al., *A-SDM*, arXiv:2312.15516, rebuilt from the paper's description: its code and the exact form of
its attention are not public. `plan_pruning` and `prune_network` prune a UNet, and `search_plans`
chooses among plans; `apply_gri_attention` and `remove_gri_attention` add and remove the attention.
"""

from ..core.methods import register

__getattr__, __dir__ = register(
    __name__,
    __file__,
    title="A-SDM",
    describe="apply:describe",
    commands="commands:add_commands",
    checks={
        "A-SDM": "networks:check_pipeline",
        "GRI attention": "apply:check_gri_attention",
    },
    recipe="recipe",
)
