"""Tools for one pipeline object of any class: method hooks, temporary settings, values read from a call."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .families import noise_scale

# --- the methods of one object ---


def parameters_of(owner: Any, name: str = "__call__") -> dict[str, inspect.Parameter]:
    """The parameters of a method by name: first the positional ones in their order, then the keyword-only ones.

    `*args` and `**kwargs` of an override stand for the parameters of the method that it overrides, so the names
    of the base classes follow its own.

    Raises:
        AttributeError: there is no such method.
    """
    own = [vars(owner)[name]] if name in vars(owner) else []
    classes = [vars(cls)[name] for cls in type(owner).__mro__ if name in vars(cls)]
    bound = [method.__get__(owner, type(owner)) for method in classes]
    positional: dict[str, inspect.Parameter] = {}
    keyword: dict[str, inspect.Parameter] = {}
    for method in [*own, *bound] or [getattr(owner, name)]:
        parameters = inspect.signature(method).parameters.values()
        passes_on = [p for p in parameters if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        for p in parameters:
            if p not in passes_on and p.name not in positional | keyword:
                (keyword if p.kind is p.KEYWORD_ONLY else positional)[p.name] = p
        if not passes_on:
            break
    return positional | keyword


class InstanceMethod:
    """A callable in the `__dict__` of one object that takes the place of one of the object's methods.

    It looks the replaced method up through its owner in every call. A copy of the owner (`copy.deepcopy`,
    pickle) therefore calls its own method. A closure would still call that of the original object. A shallow copy
    (`copy.copy`) shares this object, and so the method of the original.

    Args:
        owner: the object. The new instance is put into its `__dict__`.
        name: name of the method.

    Raises:
        AttributeError: the object has no such method.
    """

    def __init__(self, owner: Any, name: str) -> None:
        self.__name__, self.__doc__ = name, getattr(owner, name).__doc__
        self.owner, self.name = owner, name
        self.own = vars(owner).get(name)  # a method of this object only, for example one set by the user
        vars(owner)[name] = self

    @property
    def original(self) -> Any:
        """The replaced method."""
        if self.own is not None:
            return self.own
        found = inspect.getattr_static(type(self.owner), self.name, None)
        if found is None:  # the owner delegates to another object
            return self.owner.__getattr__(self.name)
        return found.__get__(self.owner, type(self.owner))

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.original(*args, **kwargs)

    def restore(self) -> None:
        """Gives the owner its own method back, unless another method has taken this one's place since."""
        if vars(self.owner).get(self.name) is self:
            del vars(self.owner)[self.name]
            if self.own is not None:
                vars(self.owner)[self.name] = self.own


# --- hooks; several plug-ins may add and remove them in any order ---

Hook = Callable[[dict[str, Any], Any], Any]


class _HookedMethod(InstanceMethod):
    """A method that is followed by hooks."""

    def __init__(self, owner: Any, name: str) -> None:
        super().__init__(owner, name)
        self.hooks: list[Hook] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Before the call, which may change the lists.
        given = {**dict(zip(parameters_of(self.owner, self.name), args)), **kwargs}
        given = {key: _own_list(value) for key, value in given.items()}
        result = self.original(*args, **kwargs)
        for hook in tuple(self.hooks):
            result = hook(given, result)
        return result


class HookHandle:
    """Removes one hook. When the last hook is removed, the pipeline has its own method back."""

    def __init__(self, method: _HookedMethod, hook: Hook) -> None:
        self._method, self._hook = method, hook

    def remove(self) -> None:
        """Removes the hook."""
        self._method.hooks.remove(self._hook)
        if not self._method.hooks:
            self._method.restore()


def add_hook(pipe: Any, name: str, hook: Hook) -> HookHandle:
    """Calls `hook(arguments, result)` after each `pipe.<name>(...)`, on this pipeline object only.

    A deep copy of the pipeline, or one that was pickled, has the hook too. For a copy that is independent of
    the original, the hook must be a function of a module, or an object or a bound method of an object that
    refers to the pipeline; closures are shared with the copy and cannot be pickled.

    Args:
        pipe: any object with that method.
        name: name of the method.
        hook: takes the arguments of the call by name and its result, and returns the result to use instead.
            Hooks run in the order in which they were added.

    Raises:
        AttributeError: the pipeline has no such method.
    """
    method = vars(pipe).get(name)
    if not isinstance(method, _HookedMethod):
        method = _HookedMethod(pipe, name)
    method.hooks.append(hook)
    return HookHandle(method, hook)


# --- calls ---


def call_pipeline(pipe: Any, *args: Any, **kwargs: Any) -> Any:
    """`pipe(*args, **kwargs)` with copies of the given lists. The package calls pipelines with this function.

    Some pipelines change their lists in place. For example, Z-Image replaces prompts with its chat template.
    """
    return pipe(*map(_own_list, args), **{name: _own_list(value) for name, value in kwargs.items()})


def _own_list(value: Any) -> Any:
    return list(value) if isinstance(value, list) else value


# --- temporary settings ---


@contextmanager
def quiet(pipe: Any) -> Iterator[None]:
    """Turns off the pipeline's progress bar within the block."""
    before = getattr(pipe, "_progress_bar_config", None)
    pipe.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**(before or {}))


@contextmanager
def scheduler_of(pipe: Any, scheduler: Any) -> Iterator[None]:
    """Replaces the pipeline's scheduler with `scheduler` within the block."""
    original, pipe.scheduler = pipe.scheduler, scheduler
    try:
        yield
    finally:
        pipe.scheduler = original


# --- the pipeline's parts ---


def denoiser_of(pipe: Any) -> Any:
    """The pipeline's `unet` or `transformer`; None if it has neither."""
    parts = (getattr(pipe, name, None) for name in ("unet", "transformer"))
    return next((part for part in parts if isinstance(part, nn.Module)), None)


# --- an additional argument for the call of a pipeline class ---


def adds_argument(
    base: type, name: str, default: Any, doc: str
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Gives a `__call__` the signature and docstring of `base`'s, plus the keyword argument `name`.

    diffusers and this package inspect the signature of `pipe.__call__` to find out what a pipeline supports.

    Args:
        base: the pipeline class that is extended.
        name, default: name and default value of the new argument.
        doc: its line in the docstring.
    """
    original: Any = base.__call__

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        wrapper = functools.wraps(original)(function)
        signature = inspect.signature(original)
        extra = inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=type(default)
        )
        *named, rest = signature.parameters.values()
        # Without **kwargs, the last parameter is an ordinary one that the new one follows.
        ordered = [*named, extra, rest] if rest.kind is rest.VAR_KEYWORD else [*named, rest, extra]
        wrapper.__dict__["__signature__"] = signature.replace(parameters=ordered)
        wrapper.__doc__ = f"{original.__doc__}\n\n        {doc}\n"
        return wrapper

    return decorate


def named_arguments(
    base: type, args: tuple[Any, ...], kwargs: dict[str, Any], method: str = "__call__"
) -> dict[str, Any]:
    """The arguments of a call of a method of `base` by name. They are not checked: `base` raises the errors."""
    names = list(inspect.signature(getattr(base, method)).parameters)[1:]
    return {**dict(zip(names, args)), **kwargs}


# --- components of a pipeline class ---


class FromPipeMixin:
    """Before a pipeline class: `from_pipe` takes over components of subclasses too, such as pruned UNets.

    diffusers looks for the exact class of a component among the annotations of `__init__`.

    Raises:
        ValueError: `DiffusionPipeline.from_pipe(..., custom_pipeline=...)` for a class with optional components,
            of which diffusers passes the names instead of the objects.
    """

    def register_modules(self, **modules: Any) -> None:
        """Same as in the base class."""
        entries = {name: module for name, module in modules.items() if isinstance(module, tuple | list)}
        named = [name for name, (library, _) in entries.items() if library is not None]
        if named:
            raise ValueError(
                f"Expected components, got their names for {', '.join(named)}: DiffusionPipeline.from_pipe does"
                f" not pass optional components on. Use {type(self).__name__}.from_pipe(pipe) instead."
            )
        super().register_modules(**{**modules, **dict.fromkeys(entries)})  # type: ignore[misc]

    @classmethod
    def _get_signature_types(cls) -> dict[str, tuple[Any, ...]]:
        types = super()._get_signature_types()  # type: ignore[misc]
        return {name: _AndSubclasses(kinds) for name, kinds in types.items()}


class _AndSubclasses(tuple[Any, ...]):
    def __contains__(self, kind: Any) -> bool:
        return any(isinstance(own, type) and issubclass(kind, own) for own in self)


# --- values read from one call ---


class _Stop(Exception):
    """Ends a call of the pipeline when the wanted value has been read."""


def initial_noise(pipe: Any, call: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """The unit-variance noise that `pipe(**call)` would start from, and the arguments of `prepare_latents`.

    Raises:
        RuntimeError: the pipeline does not call `prepare_latents`.
    """
    found: list[tuple[Tensor, dict[str, Any]]] = []

    def stop(given: dict[str, Any], prepared: Any) -> Any:
        latents = prepared[0] if isinstance(prepared, tuple) else prepared
        found.append((latents / noise_scale(pipe), given))
        raise _Stop

    handle = add_hook(pipe, "prepare_latents", stop)
    try:
        call_pipeline(pipe, **call, output_type="latent")
    except _Stop:
        return found[0]
    finally:
        handle.remove()
    raise RuntimeError(f"{type(pipe).__name__} did not call prepare_latents.")


def model_output(pipe: Any, latents: Tensor, call: dict[str, Any]) -> Tensor:
    """The denoiser's guided output for `latents` at the first timestep of a call, float32.

    Raises:
        RuntimeError: the pipeline does not call its scheduler's `step`.
    """
    found: list[Tensor] = []

    def read(given: dict[str, Any], result: Any) -> Any:
        found.append(given["model_output"].float())
        raise _Stop

    handle = add_hook(pipe.scheduler, "step", read)
    try:
        with quiet(pipe):
            call_pipeline(pipe, **call, latents=latents, output_type="latent")
    except _Stop:
        return found[0]
    finally:
        handle.remove()
    raise RuntimeError(f"{type(pipe).__name__} did not call its scheduler's step.")


# --- prompts ---

# Call arguments for the values that encode_prompt returns, by the number of values.
_ENCODED = {
    2: ("prompt_embeds", "negative_prompt_embeds"),
    3: ("prompt_embeds", "pooled_prompt_embeds"),
    4: (
        "prompt_embeds",
        "negative_prompt_embeds",
        "pooled_prompt_embeds",
        "negative_pooled_prompt_embeds",
    ),
}


@torch.no_grad()
def encode_prompts(pipe: Any, prompts: Sequence[str], guidance: bool = True) -> dict[str, Tensor]:
    """Encodes prompts to keyword arguments of the pipeline's call, with one row per prompt.

    Args:
        pipe: SD, SDXL, SD3, Flux or a pipeline whose `encode_prompt` returns the same values.
        prompts: texts.
        guidance: also encode the empty negative prompt, which calls with guidance need.

    Raises:
        ValueError: the pipeline has no `encode_prompt`, or it returns other values.
    """
    encoded = _encode(pipe, prompts, guidance)
    names = (_ENCODED.get(len(encoded)) or ()) if isinstance(encoded, tuple) else ()
    found: dict[str, Tensor] = {name: value for name, value in zip(names, encoded) if value is not None}
    # Others return as many values, among them masks.
    axes = {name: 2 if "pooled" in name else 3 for name in names}
    embeds = all(_is_float(value) and value.ndim == axes[name] for name, value in found.items())
    # Kandinsky 5 has a pooled embedding too, by another name.
    unknown = {name for name in found if "pooled" in name} - parameters_of(pipe).keys()
    if not embeds or unknown or "prompt_embeds" not in found:
        raise ValueError(
            f"{type(pipe).__name__}.encode_prompt returns other values than that of SD, SDXL, SD3 or Flux, so its"
            " prompts cannot be encoded here."
        )
    return found


@torch.no_grad()
def prompt_embeddings(pipe: Any, prompts: Sequence[str]) -> Tensor:
    """Prompt embeddings (n, tokens, width) without guidance: the first value that `encode_prompt` returns.

    Raises:
        ValueError: the pipeline has no `encode_prompt`, or its first value is not one tensor.
    """
    return embeddings_of(pipe, _encode(pipe, prompts, guidance=False))[0]


def embeddings_of(pipe: Any, encoded: Any) -> list[Tensor]:
    """The embeddings among the values of `encode_prompt`: those of the prompt and, if there are any, of the negative.

    Args:
        pipe: the pipeline.
        encoded: what its `encode_prompt` returned.

    Raises:
        ValueError: the first value is not one tensor of embeddings.
    """
    values = encoded if isinstance(encoded, tuple) else (encoded,)
    first = values[0]
    if not _is_float(first):
        raise ValueError(
            f"{type(pipe).__name__}.encode_prompt returns a {type(first).__name__} and not one tensor of embeddings,"
            " which is not supported."
        )
    # Between the two there may be masks and ids, which have other shapes.
    shapes = [(value.ndim, value.shape[-1]) if _is_float(value) else None for value in values]
    return [value for value, shape in zip(values, shapes) if shape == shapes[0]]


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _encode(pipe: Any, prompts: Sequence[str], guidance: bool) -> Any:
    if not hasattr(pipe, "encode_prompt"):
        raise ValueError(f"{type(pipe).__name__} has no encode_prompt, so its prompts cannot be encoded.")
    given: dict[str, Any] = {"prompt_2": None, "prompt_3": None, "device": pipe._execution_device}
    given |= {"num_images_per_prompt": 1, "do_classifier_free_guidance": guidance}
    names = parameters_of(pipe, "encode_prompt")
    options = {name: value for name, value in given.items() if name in names}
    return pipe.encode_prompt(prompt=list(prompts), **options)


def prompt_per_row(prompt: str | Sequence[str], latents: Tensor) -> list[str]:
    """One prompt for each row of `latents`.

    Raises:
        ValueError: the number of prompts is neither 1 nor the number of rows.
    """
    prompts = [prompt] * len(latents) if isinstance(prompt, str) else list(prompt)
    if len(prompts) != len(latents):
        raise ValueError(f"{len(latents)} latents need 1 or {len(latents)} prompts, got {len(prompts)}.")
    return prompts
