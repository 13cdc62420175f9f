"""Recipes: several methods as one thing that is saved, shared, applied and removed, and the search for a good one.

It knows no method: each gives its part through the registry (`core.methods.PartModule`).
"""

from ..core.methods import register

__getattr__, __dir__ = register(__name__, __file__, commands="commands:add_commands")
