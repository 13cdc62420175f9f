"""Golden noise: a small network (NPNet) maps random noise to noise that matches the prompt better.

Zhou et al., *Golden Noise for Diffusion Models: A Learning Framework*, arXiv:2411.09502. Entry points:
`apply_golden_noise`, `remove_golden_noise`.
"""

from ..core.methods import register

__getattr__, __dir__ = register(
    __name__,
    __file__,
    title="golden noise",
    describe="apply:describe",
    commands="commands:add_commands",
    checks={
        "golden noise": "apply:check_pipeline",
    },
    recipe="recipe",
    options="commands:apply_options",
)
