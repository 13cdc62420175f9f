"""Code that all methods share. It does not depend on any method."""

from .methods import register

__getattr__, __dir__ = register(__name__, __file__)
