"""The image and text states that enter and leave the blocks of a transformer."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.hooks._helpers import TransformerBlockRegistry
from torch import Tensor, nn

States = tuple[Tensor, Tensor | None]
# (b, tokens) bool of the image, which is all tokens in a single stream, and of the text: False at the padding of captions.
# None where all tokens count.
Masks = tuple[Tensor | None, Tensor | None]

# What the mask of a single stream of image and text is called in Z-Image and in Lumina 2.
_MASKS = ("attn_mask", "attention_mask")

# Blocks with two outputs that diffusers' registry does not know: (position of the image states, of the text states).
_UNREGISTERED = {"AuraFlowJointTransformerBlock": (1, 0)}


@dataclass(frozen=True)
class Ports:
    """Where the states of a class of blocks are.

    In single-stream blocks that join image and text, the image states are those of all tokens.

    Attributes:
        names: the arguments of `forward`. The first one is the image states.
        image, text: positions in the output; None if the output is the image states alone.
    """

    names: tuple[str, ...]
    image: int | None = None
    text: int | None = None

    def entering(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> States:
        """The states in the arguments of a call."""
        given = {**dict(zip(self.names, args)), **kwargs}
        return given[self.names[0]], None if self.text is None else given["encoder_hidden_states"]

    def masks(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Masks:
        """The masks in the arguments of a call."""
        given = {**dict(zip(self.names, args)), **kwargs}
        if self.text is not None:
            return None, given.get("encoder_hidden_states_mask")
        # Others have biases by these names.
        found = (given.get(name) for name in _MASKS)
        return next((v for v in found if isinstance(v, Tensor) and v.dtype == torch.bool), None), None

    def leaving(self, output: Any) -> States:
        """The states in the output of a call. The last block of Stable Diffusion 3 has no text states."""
        if self.image is None or self.text is None:
            return output, None
        return output[self.image], output[self.text]

    def output(self, states: States) -> Any:
        """The output of a call that leaves these states."""
        if self.image is None:
            return states[0]
        return states if self.image == 0 else states[::-1]


@functools.cache
def _ports(kind: type) -> Ports:
    names = tuple(inspect.signature(kind.forward).parameters)[1:]
    # FSDP2 gives every module that it shards a class of its own, a subclass.
    return next((Ports(names, *found) for cls in kind.__mro__ if (found := _places(cls))), Ports(names))


def _places(kind: type) -> tuple[int | None, int | None] | None:
    """The positions of the image and of the text states in the output; None for an unknown class."""
    try:
        known = TransformerBlockRegistry.get(kind)
    except ValueError:
        return _UNREGISTERED.get(kind.__name__)
    text = known.return_encoder_hidden_states_index
    return (None, None) if text is None else (known.return_hidden_states_index, text)


def ports_of(block: nn.Module) -> Ports:
    """Where the states of a transformer block are."""
    return _ports(type(block))


@contextmanager
def skipped_blocks(network: nn.Module, paths: Sequence[str]) -> Iterator[None]:
    """Leaves out these blocks of a transformer within the `with` block: their states pass by unchanged."""
    blocks: list[Any] = [network.get_submodule(path) for path in paths]
    before = [vars(block).get("forward") for block in blocks]
    for block in blocks:
        block.forward = _Bypass(ports_of(block))
    try:
        yield
    finally:
        for block, forward in zip(blocks, before):
            del block.forward
            if forward is not None:  # of a hook of diffusers
                block.forward = forward


@dataclass(frozen=True)
class _Bypass:
    ports: Ports

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.ports.output(self.ports.entering(args, kwargs))


@dataclass(frozen=True)
class BlockCall:
    """One call of a block."""

    ports: Ports
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any

    @property
    def entering(self) -> States:
        """The states in its arguments."""
        return self.ports.entering(self.args, self.kwargs)

    @property
    def leaving(self) -> States:
        """The states in its output."""
        return self.ports.leaving(self.output)

    @property
    def masks(self) -> Masks:
        """The tokens that count in both."""
        return self.ports.masks(self.args, self.kwargs)


@contextmanager
def recorded_blocks(network: nn.Module, paths: Iterable[str]) -> Iterator[dict[str, BlockCall]]:
    """Records the calls of these blocks within the `with` block.

    Yields:
        {path: its last call}.
    """
    found: dict[str, BlockCall] = {}
    handles = []
    for path in paths:

        def keep(
            block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, path: str = path
        ) -> None:
            found[path] = BlockCall(ports_of(block), args, kwargs, output)

        handles.append(network.get_submodule(path).register_forward_hook(keep, with_kwargs=True))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def mean_of_tokens(values: Tensor, mask: Tensor | None) -> Tensor:
    """The mean over the tokens of every row that count.

    The padding of a row is as long as the longest other caption asks for, and would be compared as well.

    Args:
        values: (b, tokens, ...).
        mask: (b, tokens), see `Masks`.

    Returns:
        (b, ...).
    """
    if mask is None:
        return values.mean(1)
    weights = mask.to(values).reshape(*mask.shape, *[1] * (values.ndim - 2))
    return (values * weights).sum(1) / weights.sum(1)
