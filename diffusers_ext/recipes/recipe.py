"""`Recipe`: the methods on a pipeline as one thing that is saved, loaded, applied and removed.

recipe = dx.Recipe.from_pipe(pipe)
recipe.save_pretrained("fast")
with dx.Recipe.from_pretrained("fast").on(pipe):
    image = pipe("a red bag", **recipe.call).images[0]
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from ..core.methods import ROOMS, Part, PartModule, Room
from ..training.cards import portable
from .base import base_record, check_base
from .cards import recipe_card
from .files import read_recipe, write_recipe


@dataclass(frozen=True, eq=False)
class Recipe:
    """Methods with their options and weights, and the model that they are for.

    Attributes:
        methods: what it has of each method, by the name of the method's package, in the order of the registry, in
            which they are applied. Without methods it is a plain call.
        base: the model that it was made for, from `base_record`. The weights of the model are not part of it.
        call: arguments for the calls of the pipeline that go with it, such as `num_inference_steps`, as values of JSON.
        figures: what was measured with it, by name, for its card.
    """

    methods: Mapping[str, Part]
    base: Mapping[str, Any]
    call: Mapping[str, Any] = field(default_factory=dict)
    figures: Mapping[str, str | float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rooms = rooms_with_parts()
        unknown = sorted(set(self.methods) - set(rooms))
        if unknown:
            raise ValueError(
                f"There is no method called {', '.join(unknown)}. The methods are {', '.join(rooms)}."
            )
        ordered = {key: self.methods[key] for key in rooms if key in self.methods}
        object.__setattr__(self, "methods", ordered)

    def __str__(self) -> str:
        lines = [f"  {title}: {text}" for title, text in self.lines().items()] or ["  no method"]
        call = ", ".join(f"{name}={value!r}" for name, value in self.call.items())
        return "\n".join(
            [f"Recipe for {self.base['pipeline']}", *lines, *([f"  call: {call}"] if call else [])]
        )

    __repr__ = __str__

    def lines(self) -> dict[str, str]:
        """One line about each method, by its title: the options, and where the weights came from."""
        found = {}
        for key, part in self.methods.items():
            source = [f"from {portable(part.source)}"] if part.source else []
            found[_module(key).TITLE] = ", ".join([*_shown(part.options), *source])
        return found

    @classmethod
    def from_pipe(
        cls,
        pipe: Any,
        call: Mapping[str, Any] | None = None,
        figures: Mapping[str, str | float] | None = None,
    ) -> Recipe:
        """What is on a pipeline now. The pipeline is not changed.

        LoRAs that were not added by `apply_smooth_lora`, pruned networks and the scheduler belong to the model.

        Args:
            pipe: a pipeline with one or more methods on it.
            call, figures: see the class.

        Raises:
            ValueError: no method is on it, or it has no unet and no transformer.
        """
        methods = parts_on(pipe)
        if not methods:
            raise ValueError(
                f"No method that a recipe can have is on this {type(pipe).__name__}: apply one first, such as"
                " dx.apply_teleport(pipe, stats)."
            )
        return cls(methods, base_record(pipe), dict(call or {}), dict(figures or {}))

    # --- on and off ---

    def apply(self, pipe: Any) -> Any:
        """Adds all methods to a pipeline, or none of them.

        Returns:
            `pipe` itself.

        Raises:
            ValueError: the pipeline has another denoiser or other latents than the recipe was made for, does not
                support one of the methods, or has one of them already. The message names all of them.
        """
        check_base(pipe, dict(self.base))
        self._check(pipe)
        with ExitStack() as undo:
            for key, part in self.methods.items():
                module = _module(key)
                # Before it is applied, since it may fail half way.
                undo.callback(module.remove, pipe, part)
                module.apply(pipe, part)
            undo.pop_all()
        return pipe

    def remove(self, pipe: Any) -> Any:
        """Removes all methods of the recipe from a pipeline, also those that were not added by the recipe.

        Afterwards the images are those from before, bit for bit.

        Returns:
            `pipe` itself.

        Raises:
            ValueError: a method cannot be removed, such as a LoRA that is fused into the weights. The others are.
        """
        with ExitStack() as undo:  # goes on after an error, last method first
            for key, part in self.methods.items():
                undo.callback(_module(key).remove, pipe, part)
        return pipe

    @contextmanager
    def on(self, pipe: Any) -> Iterator[Any]:
        """`apply` at the start of the block, and `remove` at its end."""
        self.apply(pipe)
        try:
            yield pipe
        finally:
            self.remove(pipe)

    def _check(self, pipe: Any) -> None:
        wrong = []
        for key, part in self.methods.items():
            module = _module(key)
            try:
                module.check(pipe, part)
            except ValueError as error:
                wrong.append(f"{module.TITLE} does not work on it: {error}")
            else:
                if module.is_on(pipe, part):
                    wrong.append(f"{module.TITLE} is on it already: remove it first.")
        if wrong:
            raise ValueError(f"The recipe does not go on this {type(pipe).__name__}. {' '.join(wrong)}")

    # --- files ---

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Writes `recipe.json`, a folder with the weights of every method, and a model card.

        Raises:
            ValueError: `call` or `figures` have values that are none of JSON.
        """
        self._save(Path(save_directory), str(save_directory))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Upload recipe",
        private: bool | None = None,
        token: str | None = None,
    ) -> str:
        """Uploads what `save_pretrained` writes to a repository on the Hub, which is created if needed.

        Returns:
            The address of the commit.
        """
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            self._save(Path(folder), repo_id)
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message))

    def _save(self, folder: Path, name: str) -> None:
        methods = {key: _portable(part) for key, part in self.methods.items()}
        content = {name: dict(getattr(self, name)) for name in ("base", "call", "figures")}
        write_recipe(folder, methods, content, rooms_with_parts())
        recipe_card(portable(name), self.lines(), **content).save(folder / "README.md")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
    ) -> Recipe:
        """Loads a recipe from a local folder, without network access, or from a repository on the Hub.

        Raises:
            OSError: a file is missing, or the repository cannot be reached.
            ValueError: a file is damaged or from another save, or a newer version of this package has written it.
        """
        hub: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir, "token": token}
        hub |= {"local_files_only": local_files_only, "force_download": force_download}
        methods, content = read_recipe(pretrained_model_name_or_path, hub, rooms_with_parts())
        return cls(methods, content["base"], content["call"], content["figures"])


def rooms_with_parts() -> dict[str, Room]:
    """The methods that a recipe can have, by the names of their packages, in the order of the registry."""
    return {room.key: room for room in ROOMS if room.recipe is not None}


def _module(key: str) -> PartModule:
    """What puts the method of that name into recipes."""
    return rooms_with_parts()[key].part_module()


def parts_on(pipe: Any) -> dict[str, Part]:
    """What is on a pipeline now, by the names of the methods' packages."""
    found = {key: room.part_module().read(pipe) for key, room in rooms_with_parts().items()}
    return {key: part for key, part in found.items() if part is not None}


def made_by(apply: Callable[[Any], Any], pipe: Any) -> Recipe:
    """The recipe of what a function adds to a plain pipeline, which is plain again afterwards.

    Raises:
        ValueError: the function adds nothing.
    """
    try:
        apply(pipe)
        return Recipe.from_pipe(pipe)
    finally:
        for key, part in parts_on(pipe).items():
            _module(key).remove(pipe, part)


def _portable(part: Part) -> Part:
    return replace(part, options=_map_sources(part.options), source=portable(part.source))


def _map_sources(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: portable(v) if k == "source" else _map_sources(v) for k, v in value.items()}
    return value


def _shown(options: Mapping[str, Any]) -> list[str]:
    return [f"{name}={_short(value)}" for name, value in options.items() if value is not None]


def _short(value: Any) -> str:
    if not isinstance(value, Mapping):
        return f"{len(value)} layers" if isinstance(value, list) else repr(value)
    if not all(isinstance(inner, Mapping) for inner in value.values()):
        return f"{len(value)} values"
    inner = {name: {k: v for k, v in found.items() if k != "source"} for name, found in value.items()}
    return ", ".join(f"{name} ({', '.join(_shown(found))})" for name, found in inner.items())
