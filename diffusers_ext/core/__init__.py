"""What every method needs of diffusers; knows no method."""

from .methods import register

__getattr__, __dir__ = register(__name__, __file__)
