"""Analytical Gaussian teleportation: the first sampling steps are replaced by the closed form of a Gaussian.

Wang and Vastola, *The Unreasonable Effectiveness of Gaussian Score Approximation for Diffusion Models and its
Applications*, TMLR 2024, arXiv:2412.09726. On and off: `apply_teleport`, `remove_teleport`.
"""

from ..core.methods import register

__getattr__, __dir__ = register(
    __name__,
    __file__,
    title="teleport",
    describe="apply:describe",
    commands="commands:add_commands",
)
