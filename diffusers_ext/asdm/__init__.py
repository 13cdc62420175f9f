"""A-SDM: block pruning of a UNet, with GRI attention, CLME-CondConv and progressive incubation.

Zhu et al., *A-SDM*, arXiv:2312.15516, rebuilt here: its code and its attention's exact form are not public. On and
off: `apply_gri_attention`, `remove_gri_attention`; pruning: `plan_pruning`, `prune_unet`.
"""

from ..core.methods import register

__getattr__, __dir__ = register(
    __name__,
    __file__,
    title="A-SDM",
    describe="apply:describe",
    commands="commands:add_commands",
)
