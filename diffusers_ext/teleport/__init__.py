"""Analytical Gaussian teleportation: the closed form of a Gaussian replaces the first sampling steps.

Wang and Vastola, *The Unreasonable Effectiveness of Gaussian Score Approximation for Diffusion Models and its
Applications*, TMLR 2024, arXiv:2412.09726. Entry points: `apply_teleport`, `remove_teleport`.
"""

from ..core.methods import register

__getattr__, __dir__ = register(
    __name__,
    __file__,
    title="teleport",
    describe="apply:describe",
    commands="commands:add_commands",
    checks={
        "teleportation": "apply:check_pipeline",
        "teleportation with a prompt map": "apply:check_prompt_map",
    },
    recipe="recipe",
    options="commands:apply_options",
)
