"""The classes of this package under a second name, by which its pipeline classes find their components.

A saved pipeline has the file `COMPONENT/diffusers_ext.py` beside each component of this package. diffusers runs a file
with the name of a component's package instead of importing the package, and only with trust_remote_code=True. By this
name there is no file, so that the classes of this package need no such permission.
"""

from importlib import import_module
from typing import Any


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(__name__.partition(".")[0]), name)
