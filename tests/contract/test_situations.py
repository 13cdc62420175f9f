"""The methods where the denoiser is cast, offloaded, cached, compiled, shared by threads or passed to `from_pipe`.

In each situation a method has to change the images as it does without the situation, and after it is removed they
have to be bit-equal to those of a pipeline in that situation that never had the method. Copies are in
`test_contract.py`, layerwise casting of NPNet in `tests/golden_noise`.
"""

import copy
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from diffusers.hooks import FirstBlockCacheConfig, apply_group_offloading
from torch import Tensor

import diffusers_ext as dx
from tests import tiny
from tests.contract.test_contract import METHODS, Method

NAMES = ("teleport", "teleport-first-call", "golden-noise", "smooth-lora", "gri-attention")
QUICK = ("sd", "flux")  # the two others take as long again
STEPS = 5  # teleportation skips two

Enter = Callable[[Any], Any]


def cases(*names: str, pipelines: tuple[str, ...] = ("sd", "sdxl", "sd3", "flux")) -> pytest.MarkDecorator:
    """Methods and pipelines as arguments of a test."""
    found = [
        pytest.param(METHODS[m], name, id=f"{m}-{name}", marks=() if name in QUICK else pytest.mark.slow)
        for m in names or NAMES
        for name in pipelines
    ]
    return pytest.mark.parametrize(("method", "name"), found)


def denoiser(pipe: Any) -> Any:
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def images(pipe: Any, name: str, **changes: Any) -> Tensor:
    return tiny.images(pipe, name, steps=STEPS, **changes)


class Situation(NamedTuple):
    """What a user does to a pipeline.

    Attributes:
        enter: does it.
        like: changes the numbers of another pipeline in the same way, without the mechanism.
    """

    enter: Enter
    like: Enter = lambda pipe: None


def casting(storage: torch.dtype) -> Situation:
    def enter(pipe: Any) -> None:
        denoiser(pipe).enable_layerwise_casting(storage_dtype=storage)

    def like(pipe: Any) -> None:
        stored = copy.deepcopy(denoiser(pipe))
        stored.enable_layerwise_casting(storage_dtype=storage)
        with torch.no_grad():
            for weight, rounded in zip(denoiser(pipe).parameters(), stored.parameters()):
                weight.copy_(rounded)

    return Situation(enter, like)


def offloading(**options: Any) -> Situation:
    cpu = torch.device("cpu")
    return Situation(
        lambda pipe: apply_group_offloading(denoiser(pipe), onload_device=cpu, offload_device=cpu, **options)
    )


SITUATIONS = {
    "float8 storage": casting(torch.float8_e4m3fn),
    "bfloat16 storage": casting(torch.bfloat16),
    "group offload of layers": offloading(offload_type="leaf_level"),
    "group offload of blocks": offloading(offload_type="block_level", num_blocks_per_group=1),
    # Sequential offload needs an accelerator: accelerate cannot put CPU weights on the meta device and back.
    "model offload": Situation(lambda pipe: pipe.enable_model_cpu_offload(device="cpu")),
}


def check(method: Method, name: str, situation: Situation, method_first: bool) -> None:
    pipe, plain, twin = (tiny.build(name) for _ in range(3))
    situation.enter(plain)
    without = images(plain, name)
    for one, enter in ((pipe, situation.enter), (twin, situation.like)):
        if method_first:
            method.apply(one, name)
            enter(one)
        else:
            enter(one)
            assert one is twin or torch.equal(images(one, name), without)
            method.apply(one, name)
    changed = images(pipe, name)
    assert torch.equal(changed, images(twin, name))
    assert not torch.equal(changed, without)
    method.remove(pipe)
    assert torch.equal(images(pipe, name), without)


# The two others of each kind take another minute.
OFTEN = ("float8 storage", "group offload of layers")
each_situation = pytest.mark.parametrize(
    "situation",
    [pytest.param(s, id=k, marks=() if k in OFTEN else pytest.mark.slow) for k, s in SITUATIONS.items()],
)


@pytest.mark.parametrize("method_first", [False, True], ids=["before", "after"])
@each_situation
@cases()
def test_the_method_and_its_removal(
    method: Method, name: str, situation: Situation, method_first: bool
) -> None:
    if situation is SITUATIONS["model offload"] and method is METHODS["smooth-lora"] and not method_first:
        pytest.skip("diffusers turns the offload on again after loading a LoRA, on an accelerator only")
    check(method, name, situation, method_first)


# --- a cache of the blocks' outputs ---


@cases(pipelines=("flux",))
def test_first_block_cache(method: Method, name: str) -> None:
    # StableDiffusion3Pipeline opens no cache context, without which diffusers refuses its caches.
    def cached(pipe: Any, threshold: float) -> Any:
        denoiser(pipe).enable_cache(FirstBlockCacheConfig(threshold=threshold))
        return pipe

    def calls(pipe: Any) -> tuple[Tensor, int]:
        count = []
        handle = (
            denoiser(pipe).single_transformer_blocks[0].attn.register_forward_hook(lambda *_: count.append(1))
        )
        with handle:
            return images(pipe, name), len(count)

    on = method.apply(tiny.build(name), name)
    changed, every = calls(on)
    # At threshold 0 every block is still computed.
    assert torch.equal(images(cached(method.apply(tiny.build(name), name), 0.0), name), changed)
    without = images(cached(tiny.build(name), 0.5), name)
    for pipe in (method.apply(cached(tiny.build(name), 0.5), name), cached(on, 0.5)):
        fewer, computed = calls(pipe)
        assert computed < every
        # The cache changes these images by 0.002 and every method by at least 0.004, on average.
        assert (fewer - changed).abs().mean() < (without - fewer).abs().mean()
        method.remove(pipe)
        assert torch.equal(images(pipe, name), without)


# --- a compiled denoiser ---

# Compiling takes seconds. One case is quick enough: the pair for which the denoiser has a hook.
COMPILED = [
    pytest.param(
        *case.values,
        in_place,
        method_first,
        id=f"{case.id}-{'in place' if in_place else 'wrapped'}-{'after' if method_first else 'before'}",
        marks=() if case.id == "teleport-flux" and not (in_place or method_first) else pytest.mark.slow,
    )
    for case in cases().args[1]
    for in_place in (False, True)
    for method_first in (False, True)
]


@pytest.mark.parametrize(("method", "name", "in_place", "method_first"), COMPILED)
def test_torch_compile(method: Method, name: str, in_place: bool, method_first: bool) -> None:
    torch.compiler.reset()
    pipe = tiny.build(name)
    plain, changed = images(pipe, name), images(method.apply(tiny.build(name), name), name)

    def compile_() -> None:
        if in_place:
            denoiser(pipe).compile(backend="eager")
        else:
            part = "unet" if hasattr(pipe, "unet") else "transformer"
            setattr(pipe, part, torch.compile(denoiser(pipe), backend="eager"))

    if method_first:
        method.apply(pipe, name)
    compile_()
    if not method_first:
        assert torch.equal(images(pipe, name), plain)
        method.apply(pipe, name)
    assert torch.equal(images(pipe, name), changed)
    assert "nothing added" not in str(dx.summary(pipe))
    method.remove(pipe)
    assert torch.equal(images(pipe, name), plain)
    method.apply(pipe, name)
    assert torch.equal(images(pipe, name), changed)


# --- another pipeline of the same components ---


@cases()
def test_from_pipe(method: Method, name: str) -> None:
    """A component that a method has changed comes along, a hook of the pipeline does not."""
    pipe = tiny.build(name)
    plain, changed = images(pipe, name), images(method.apply(pipe, name), name)
    other = type(pipe).from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    comes_along = method is not METHODS["golden-noise"]
    assert torch.equal(images(other, name), changed if comes_along else plain)
    assert ("nothing added" in str(dx.summary(other))) != comes_along
    assert torch.equal(images(pipe, name), changed)
    if comes_along:
        with pytest.raises(ValueError, match=method.twice):
            method.apply(other, name)
    else:
        assert torch.equal(images(method.apply(other, name), name), changed)
    method.remove(pipe)
    assert torch.equal(images(pipe, name), plain)
    if method is METHODS["teleport"] and hasattr(pipe, "transformer"):
        # The hook of the shared denoiser belonged to the first pipeline.
        with pytest.raises(ValueError, match=r"dx.apply_teleport\(pipe\)"):
            images(other, name)
        method.rearm(other)
    assert torch.equal(images(other, name), plain if method.on_denoiser else changed)
    method.remove(other)
    assert torch.equal(images(other, name), plain)


# --- two threads ---


class Turns:
    """Lets two threads call a denoiser in a given order, so that their runs are interleaved in the same way each time."""

    def __init__(self, order: str) -> None:
        self.order, self.at = order, 0
        self.changed = threading.Condition()
        self.running = {"A", "B"}

    def take(self, name: str) -> None:
        """Waits until it is this thread's turn, or the other thread has ended."""
        with self.changed:
            mine = self.changed.wait_for(
                lambda: self.order[self.at % len(self.order)] == name or self.running == {name}, timeout=30
            )
            assert mine, "the other thread is stuck"
            self.at += 1
            self.changed.notify_all()

    def end(self, name: str) -> None:
        with self.changed:
            self.running.discard(name)
            self.changed.notify_all()


def in_threads(pipes: dict[str, Any], name: str, order: str) -> dict[str, Any]:
    """The images of two pipelines with one denoiser, or the error that a call raised."""
    turns, me, found = Turns(order), threading.local(), dict[str, Any]()

    def work(key: str) -> None:
        me.name = key
        try:
            found[key] = seeded(pipes[key], name, key)
        except Exception as error:
            found[key] = error
        turns.end(key)

    with denoiser(pipes["A"]).register_forward_pre_hook(lambda *_: turns.take(me.name)):
        threads = [threading.Thread(target=work, args=(key,)) for key in pipes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return found


def seeded(pipe: Any, name: str, key: str) -> Tensor:
    return images(pipe, name, generator=tiny.generators(1, seed=ord(key)))


ORDERS = ["AB", "AAABB", "ABBBBBBBBA"]


@pytest.mark.parametrize("order", ORDERS)
@cases()
def test_two_threads_with_one_denoiser(method: Method, name: str, order: str) -> None:
    first = tiny.build(name)
    # Tokenizers keep their settings for padding between calls, so threads cannot share one in diffusers either.
    own = {key: copy.deepcopy(part) for key, part in first.components.items() if "tokenizer" in key}
    own["scheduler"] = copy.deepcopy(first.scheduler)
    second = type(first)(**{**first.components, **own})
    second.set_progress_bar_config(disable=True)
    pipes = {"A": method.apply(first, name), "B": second}
    if not method.on_denoiser:
        method.apply(second, name)
    alone = {key: seeded(pipe, name, key) for key, pipe in pipes.items()}
    together = in_threads(pipes, name, order)
    for key, expected in alone.items():
        assert isinstance(together[key], Tensor), together[key]
        assert torch.equal(together[key], expected)


# --- the noise network ---


@pytest.mark.parametrize("options", [{"offload_type": "leaf_level"}, {"offload_type": "block_level"}])
def test_group_offload_of_npnet(options: dict[str, Any]) -> None:
    npnet, cpu = tiny.npnet("sd"), torch.device("cpu")
    noise, text = torch.randn(2, 4, 8, 8), torch.randn(2, 77, 16)
    expected = npnet(noise, text).sample
    if options["offload_type"] == "block_level":
        options = {**options, "num_blocks_per_group": 1}
    apply_group_offloading(npnet, onload_device=cpu, offload_device=cpu, **options)
    assert torch.equal(npnet(noise, text).sample, expected)
