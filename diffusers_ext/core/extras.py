"""Optional dependencies, and functions that a user names on the command line."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any


class MissingExtraError(ModuleNotFoundError):
    """A package of an optional extra is not installed. The message contains the `pip install` command."""


def require(package: str, extra: str) -> ModuleType:
    """Imports the module `package` (dotted names are allowed), which belongs to the optional extra `extra`.

    Raises:
        MissingExtraError: the package is not installed. Import errors inside the package are raised
            unchanged.
    """
    try:
        return import_module(package)
    except ModuleNotFoundError as error:
        top = package.partition(".")[0]
        if error.name not in (package, top):
            raise
        raise MissingExtraError(
            f"This needs the package {top!r}, which is not installed: "
            f'pip install "diffusers-ext[{extra}]" installs it.',
            name=top,
        ) from error


# Short names of the testbed's data, prompts and scorer. The commands on the model cards use them.
SHORT_NAMES = {
    "fashion-grader": "diffusers_ext.testbed.grader:score",
    "fashion-mnist": "diffusers_ext.testbed.fashion_scenes:garments_dataset",
    "fashion-prompts": "diffusers_ext.testbed.fashion_scenes:training_prompts",
    "fashion-scenes": "diffusers_ext.testbed.fashion_scenes:scenes_dataset",
}


# The folder of an embedded model by its name, and whether there is one.
CARD_DIR, HAS_CARD = "diffusers_ext.testbed.embedded:card_dir", "diffusers_ext.testbed.embedded:has_card"


def find_path(name: str) -> str:
    """The path of an embedded model, or of a folder in it, such as "fashion-scenes" or "fashion-scenes/gaussian".

    The name of a local file or folder, and any other name, such as that of a Hub repository, is returned as it is.
    """
    model, _, inner = name.partition("/")
    if not model or model.startswith((".", "~")) or Path(name).exists():
        return name
    if not load_function(HAS_CARD, "embedded model")(model):
        return name
    return str(Path(load_function(CARD_DIR, "embedded model")(model)) / inner)


def load_function(reference: str, what: str) -> Callable[..., Any]:
    """Loads the function that "package.module:function" or "path/to/file.py:function" names.

    Args:
        reference: the name of the function.
        what: what the function is for, for error messages.

    Raises:
        ValueError: the file, the module or the function does not exist.
    """
    where, _, attribute = reference.rpartition(":")
    if where.endswith(".py"):
        if not Path(where).is_file():
            raise ValueError(f"The {what} file {where} does not exist.")
        spec: Any = spec_from_file_location(Path(where).stem, where)
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        try:
            module = import_module(where)
        except ModuleNotFoundError as error:
            raise ValueError(f"The {what} module {where!r} cannot be imported: {error}.") from error
    if not callable(getattr(module, attribute, None)):
        raise ValueError(f"{where} has no function {attribute!r} for the {what}.")
    return getattr(module, attribute)
