"""Optional dependencies: `require(package, extra)` imports one or says how to install it."""

from importlib import import_module
from types import ModuleType


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
