"""Image metrics, and statistics for the comparison of methods."""

from ..core.methods import register

__getattr__, __dir__ = register(__name__, __file__)
