"""Code from outside: optional dependencies, and functions that a user names on the command line."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any


class MissingExtraError(ModuleNotFoundError):
    """A package of an optional extra is not installed; the message says which `pip install` brings it."""


def require(package: str, extra: str) -> ModuleType:
    """The module `package` (dotted names too), which belongs to the extra `extra` of this distribution.

    Raises:
        MissingExtraError: it is not installed. An import that fails inside the package is passed on as it is.
    """
    try:
        return import_module(package)
    except ModuleNotFoundError as error:
        top = package.partition(".")[0]
        if error.name not in (package, top):
            raise
        raise MissingExtraError(
            f"This needs the package {top!r}, which is not installed: "
            f'pip install "diffusers-ext[{extra}]" brings it.',
            name=top,
        ) from error


# The testbed's own data, prompts and scorer, by the names in the commands of its trained models' cards.
SHORT_NAMES = {
    "fashion-grader": "diffusers_ext.testbed.grader:score",
    "fashion-mnist": "diffusers_ext.testbed.fashion_scenes:garments_dataset",
    "fashion-prompts": "diffusers_ext.testbed.fashion_scenes:training_prompts",
    "fashion-scenes": "diffusers_ext.testbed.fashion_scenes:scenes_dataset",
}


def load_function(reference: str, what: str) -> Callable[..., Any]:
    """The function that "package.module:function" or "path/to/file.py:function" names.

    Args:
        reference: see above.
        what: what error messages call it.

    Raises:
        ValueError: no such file or module, or no such function in it.
    """
    where, _, attribute = reference.rpartition(":")
    if where.endswith(".py"):
        if not Path(where).is_file():
            raise ValueError(f"The {what}'s file {where} does not exist.")
        spec: Any = spec_from_file_location(Path(where).stem, where)
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        try:
            module = import_module(where)
        except ModuleNotFoundError as error:
            raise ValueError(f"The {what}'s module {where!r} cannot be imported: {error}.") from error
    if not callable(getattr(module, attribute, None)):
        raise ValueError(f"{where} has no function {attribute!r} for the {what}.")
    return getattr(module, attribute)
