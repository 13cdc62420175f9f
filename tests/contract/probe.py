"""What teleportation, golden noise, Smooth-LoRA and core do on every family of `tests/families.py` today.

Every method is put on every family and the call is recorded: what the networks of the denoising loop are shown and
what the scheduler is given. The functions of core that methods are built from are compared with a recorded call of
the pipeline itself. A cell of the table is one of

- "works": the first input is what the method's formula gives, the call without the method is bit-equal before and
  after, and a batch is its images one by one wherever that is so without the method;
- "refused": `apply`, or the call, raises a ValueError of this package;
- "crashes": another exception, or a ValueError that this package did not raise;
- "wrong": no exception, and not what the formula gives.

`python -m tests.contract.probe PATH` writes the whole table; `test_families.py` has the cells that do not work.
"""

import dataclasses
import functools
import inspect
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple
from unittest import mock

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import diffusers_ext as dx
from diffusers_ext import GaussianStats, NPNetModel
from diffusers_ext.core import features
from diffusers_ext.core.autoencoders import decode_latents, vae_of
from diffusers_ext.core.images import encode_images
from diffusers_ext.core.pipeline import initial_noise, model_output
from diffusers_ext.core.prompts import PromptEmbeds, embeddings_of, encode_prompts, recorded_encodings
from diffusers_ext.teleport.prompt_map import PromptMap
from diffusers_ext.teleport.sources import pipeline_samples
from tests import families, tiny

STEPS = 5
SKIP = 0.4
SKIPPED = 2  # of five steps
BATCH = 2

# Without any method, a batch of these is not its images one by one: they do not mask the padding of shorter prompts.
PADS = ("kandinsky5",)


# --- one recorded call ---


class Run(NamedTuple):
    """What happened in one call.

    Attributes:
        images: (B, ...), its result.
        shown: for every call of a network of the denoising loop, its latents, (B, *latents).
        times: the first timestep of every such call.
        networks: index of the network of every such call.
        steps: (model output, sample) of every step of the scheduler, each (B, *latents).
        first: the first sample as the scheduler was given it.
        embeds: what `encode_prompt` first returned first; None if it was not called.
        end: (B, *latents), the result of the scheduler's last step.
        sigmas, timesteps: the schedule after the call.
    """

    images: Tensor
    shown: list[Tensor]
    times: list[float]
    networks: list[int]
    steps: list[tuple[Tensor, Tensor]]
    first: Tensor
    embeds: Any
    end: Tensor
    sigmas: Any
    timesteps: Tensor

    @property
    def each_step(self) -> int:
        """Calls of networks in each step of the scheduler: two where guidance has a call of its own."""
        return len(self.shown) // len(self.steps)


def one_latent_an_image(name: str, value: Any, batch: int) -> Tensor:
    """Latents in the layout of the denoising loop → (batch, *latents); guidance may have repeated them."""
    rows = _one_latent_a_row(name, value).unflatten(0, (-1, batch))
    # The transport of equal rows may differ by rounding.
    assert all(torch.allclose(rows[0], other, atol=1e-5) for other in rows[1:])
    return rows[0]


def _one_latent_a_row(name: str, value: Any) -> Tensor:
    family = families.FAMILIES[name]
    shape = family.latents
    x = torch.stack([row.squeeze(1) for row in value]) if isinstance(value, list) else value
    x = x.detach().clone()
    if family.layout == "plain":
        assert x.shape[1:] == shape
        return x
    if family.layout == "1x1":
        assert x.shape[1:] == (torch.Size(shape[1:]).numel(), shape[0])
        return x.movedim(-1, 1).reshape(len(x), *shape)
    channels, height, width = shape
    assert x.shape[1:] == (height * width // 4, 4 * channels)
    patches = x.reshape(len(x), height // 2, width // 2, channels, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(len(x), *shape)


def record(pipe: Any, name: str, batch: int = BATCH, per_prompt: int = 1, **changes: Any) -> Run:
    """Runs `families.images`, with `per_prompt` images for each of `batch` prompts, and records it."""
    shown, times, networks, steps, samples, embeds, ends = [], [], [], [], [], [], []
    rows = batch * per_prompt
    if per_prompt > 1:
        argument = str(families.FAMILIES[name].per_prompt)
        changes |= {argument: per_prompt, "generator": families.generators(rows)}

    def watch(index: int, network: nn.Module) -> Any:
        def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            given = {**dict(zip(_parameters(module), args)), **kwargs}
            latents = next(given[key] for key in ("sample", "hidden_states", "x") if key in given)
            time = next(given[key] for key in ("timestep", "t") if key in given)
            shown.append(one_latent_an_image(name, latents, rows).float())
            times.append(float(torch.as_tensor(time).flatten()[0]))
            networks.append(index)

        return network.register_forward_pre_hook(before, with_kwargs=True)

    scheduler = getattr(pipe.scheduler, "inner", pipe.scheduler)
    step, encode, own = scheduler.step, getattr(pipe, "encode_prompt", None), vars(pipe).get("encode_prompt")

    @functools.wraps(step)
    def watched_step(output: Tensor, time: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        steps.append(tuple(one_latent_an_image(name, value, rows) for value in (output, sample)))
        samples.append(sample.clone())
        result = step(output, time, sample, *args, **kwargs)
        after = result[0] if isinstance(result, tuple) else result.prev_sample
        ends.append(one_latent_an_image(name, after, rows))
        return result

    def watched_encode(*args: Any, **kwargs: Any) -> Any:
        encoded = encode(*args, **kwargs)
        embeds.append(encoded[0] if isinstance(encoded, tuple) else encoded)
        return encoded

    handles = [watch(i, network) for i, network in enumerate(families.denoisers(pipe, name))]
    scheduler.step = watched_step
    if encode is not None:
        vars(pipe)["encode_prompt"] = functools.wraps(encode)(watched_encode)
    try:
        images = families.images(pipe, name, batch, steps=STEPS, **changes)
    finally:
        del scheduler.step
        vars(pipe).pop("encode_prompt", None)
        if own is not None:
            vars(pipe)["encode_prompt"] = own
        for handle in handles:
            handle.remove()
    first, sigmas = next(iter(embeds), None), getattr(scheduler, "sigmas", None)
    return Run(
        images, shown, times, networks, steps, samples[0], first, ends[-1], sigmas, scheduler.timesteps
    )


def _parameters(module: nn.Module) -> Any:
    code = inspect.unwrap(type(module).forward).__code__
    return code.co_varnames[1 : code.co_argcount]


@functools.cache
def plain(name: str, guided: bool = True) -> Run:
    """The call without any method."""
    return record(families.build(name), name, guided=guided)


@functools.cache
def feature(name: str, text: str) -> Tensor:
    """(E,), the mean of a prompt's embeddings, encoded alone; of Stable Diffusion 3 those of CLIP and those of T5."""
    call = {**families.inputs(name, guided=False), "prompt": [text]}
    pipe = families.build(name)
    found = embeddings_of(pipe, recorded_encodings(pipe, call)[0])[0]
    if name != "sd3":
        return found.mean()[0]
    return torch.cat([found.embeds[0, :77].mean(0), found.embeds[0, 77:].mean(0)])


def doubled(pipe: Any, name: str) -> tuple[Run, Run]:
    """Two images for each of two prompts, and the same images as four prompts."""
    call = families.inputs(name, BATCH)
    lists = {
        key: [v for v in value for _ in (0, 1)] for key, value in call.items() if isinstance(value, list)
    }
    lists = {key: value for key, value in lists.items() if key in ("prompt", "negative_prompt")}
    lists["generator"] = families.generators(2 * BATCH)
    return record(pipe, name, per_prompt=2), record(pipe, name, 2 * BATCH, **lists)


@functools.cache
def prompts_can_be_doubled(name: str) -> bool:
    """Whether `doubled` gives the same images twice, without any method."""
    if families.FAMILIES[name].per_prompt is None or families.FAMILIES[name].rows:
        return False
    together, apart = doubled(families.build(name), name)
    return not differ("", together.images, apart.images)


@functools.cache
def runs_in_half(name: str) -> bool:
    """Whether the pipeline runs in bfloat16 on this machine, without any method."""
    try:
        pipe = families.build(name, dtype=torch.bfloat16)
        return bool(families.images(pipe, name, BATCH, steps=STEPS).isfinite().all())
    except Exception:
        return False


# --- noise levels, from the schedule alone ---


def level(name: str, scheduler: Any, run: Run, i: int) -> tuple[float, float]:
    """(a, s) of the states at step i of the schedule of `run`."""
    if families.FAMILIES[name].kind == "flow":
        return 1 - float(run.sigmas[i]), float(run.sigmas[i])
    if "Euler" in type(scheduler).__name__:
        return 1.0, float(run.sigmas[i])
    cumulative = float(scheduler.alphas_cumprod[int(run.timesteps[i])])
    return cumulative**0.5, (1 - cumulative) ** 0.5


def input_scale(name: str, scheduler: Any, run: Run, i: int) -> float:
    """The factor between the states of the scheduler and what the network is shown."""
    a, s = level(name, scheduler, run, i)
    return (a * a + s * s) ** -0.5 if "EulerDiscrete" in type(scheduler).__name__ and a == 1 else 1.0


def clean(name: str, scheduler: Any, run: Run) -> Tensor:
    """The clean samples that the first guided model output implies."""
    output, x = run.steps[0]
    a, s = level(name, scheduler, run, 0)
    if families.FAMILIES[name].kind == "flow":
        return x - s * output
    kind = scheduler.config.prediction_type
    assert kind == "epsilon" or a < 1
    return (x - s * output) / a if kind == "epsilon" else a * x - s * output


# --- the methods, each with its formula ---

Faults = list[str]


class Method(NamedTuple):
    """One column of the table.

    Attributes:
        apply, remove: on and off, given the pipeline and the family's name.
        faults: what is wrong with a run, given the name, a fresh pipeline without the method, the recorded call and
            whether it was guided.
    """

    apply: Callable[[Any, str], Any]
    remove: Callable[[Any], Any]
    faults: Callable[[str, Any, Run, bool], Faults]


def differ(what: str, found: Tensor, expected: Tensor, tolerance: float = 1e-4) -> Faults:
    """A fault if the largest difference exceeds `tolerance`, relative to the largest value above 1."""
    error = float((found.float() - expected.float()).abs().max())
    # Written so that NaN is a fault.
    return (
        [] if error <= tolerance * max(1.0, float(expected.abs().max())) else [f"{what}: off by {error:.2g}"]
    )


def in_grid(name: str, x: Tensor) -> Tensor:
    """(B, *latents) → (B, C, H, W), or (B, C, T, H, W) for videos."""
    x = x.movedim(families.FAMILIES[name].channels + 1, 1)
    return x.squeeze(2) if families.FAMILIES[name].output != "frames" and x.ndim == 5 else x


def out_of_grid(name: str, x: Tensor) -> Tensor:
    """The inverse of `in_grid`."""
    x = x.unsqueeze(2) if x.ndim <= len(families.latent_shape(name)) else x
    return x.movedim(1, families.FAMILIES[name].channels + 1)


@functools.cache
def statistics(name: str) -> GaussianStats:
    """Random statistics of the family's latents."""
    return tiny.gaussian(in_grid(name, torch.zeros(1, *families.latent_shape(name))).shape[1:], rank=6)


def _apply_teleport(mean_from: str) -> Callable[[Any, str], Any]:
    return lambda pipe, name: dx.apply_teleport(pipe, statistics(name), skip=SKIP, mean_from=mean_from)


def _after_skipping(
    name: str, pipe: Any, run: Run, guided: bool, first: int = 0, mean: Tensor | None = None
) -> Faults:
    """Faults of the first network call after the transport, which is call number `first`."""
    before, scheduler = plain(name, guided), pipe.scheduler
    start = before.shown[0] / input_scale(name, scheduler, before, 0)
    levels = [level(name, scheduler, before, i) for i in (0, SKIPPED)]
    moved = statistics(name).transport(in_grid(name, start), levels[0], levels[1], mean=mean)
    expected = out_of_grid(name, moved) * input_scale(name, scheduler, before, SKIPPED)
    faults = differ("the input after the transport", run.shown[first], expected)
    time = before.times[SKIPPED * before.each_step]
    if abs(run.times[first] - time) > 1e-4 * abs(time):
        faults.append(f"the network is shown the time {run.times[first]:g} instead of {time:g}")
    network = before.networks[SKIPPED * before.each_step]
    if run.networks[first] != network:
        faults.append(f"network {run.networks[first]} is called instead of {network}")
    return faults


def _teleport_faults(name: str, pipe: Any, run: Run, guided: bool, mean: Tensor | None = None) -> Faults:
    count = STEPS - SKIPPED
    faults = [] if len(run.steps) == count else [f"{len(run.steps)} steps instead of {count}"]
    faults += _after_skipping(name, pipe, run, guided, mean=mean)
    shown = run.shown[: run.each_step]
    if any(not torch.equal(other, shown[0]) for other in shown[1:]):
        faults.append("the calls of the first step are shown different latents")
    start = run.steps[0][1] * input_scale(name, pipe.scheduler, plain(name), SKIPPED)
    return faults + differ("the sample of the first step", start, run.shown[0])


def _first_call_faults(name: str, pipe: Any, run: Run, guided: bool) -> Faults:
    before, scheduler = plain(name, guided), pipe.scheduler
    faults = []
    for i in range(before.each_step):
        faults += differ(f"the input of call {i}", run.shown[i], before.shown[i])
        if run.times[i] != before.times[i]:
            faults.append(f"call {i} is shown the time {run.times[i]:g} instead of {before.times[i]:g}")
    x, start = before.steps[0][1], level(name, scheduler, before, 0)
    implied = clean(name, scheduler, before)
    mean = statistics(name).implied_mean(in_grid(name, x), in_grid(name, implied), start)
    # The first call makes no step of the wrapped scheduler.
    calls = before.each_step * (STEPS - SKIPPED + 1)
    if len(run.shown) != calls:
        faults.append(f"{len(run.shown)} network calls instead of {calls}")
    return faults + _after_skipping(name, pipe, run, guided, before.each_step, mean)


@functools.cache
def mean_map(name: str) -> PromptMap:
    """A random map from the family's prompt embeddings to means of its latents."""
    draw = torch.Generator().manual_seed(5)
    # Without embeddings, the method is refused.
    features = 4 if plain(name).embeds is None else feature(name, "a").numel()
    sizes = features, statistics(name).mean.numel()
    components, _ = torch.linalg.qr(torch.randn(sizes[0], 4, generator=draw))
    weights = 3 * torch.randn(4, sizes[1], generator=draw)
    return PromptMap(torch.zeros(sizes[0]), components, weights, torch.zeros(sizes[1]), 0.5)


def _apply_prompt_map(pipe: Any, name: str) -> Any:
    stats = dataclasses.replace(statistics(name), prompt_map=mean_map(name))
    return dx.apply_teleport(pipe, stats, skip=SKIP)


def _prompt_map_faults(name: str, pipe: Any, run: Run, guided: bool) -> Faults:
    family, call = families.FAMILIES[name], families.inputs(name, BATCH, guided=guided)

    def means(texts: list[str]) -> Tensor:
        features = torch.stack([feature(name, text) for text in texts])
        return mean_map(name)(features).reshape(-1, *statistics(name).shape)

    def guided_mean(negative: str) -> Tensor:
        weight = call[str(family.guidance)] + 1 - family.free_at
        away = means([negative])
        return away + weight * (mean - away)

    mean = means(call["prompt"])
    classifier_free = guided and family.free_at is not None
    if classifier_free and "negative_prompt" in call:
        return _teleport_faults(name, pipe, run, guided, guided_mean(call["negative_prompt"][0]))
    # Statistics of all prompts would be the mean of the empty one; there are none.
    faults = _teleport_faults(name, pipe, run, guided, mean)
    if classifier_free and "negative_prompt" in inspect.signature(pipe.__call__).parameters:
        asked = record(_apply_prompt_map(pipe, name), name, negative_prompt=["z"] * BATCH)
        dx.remove_teleport(pipe)
        found = _teleport_faults(name, pipe, asked, guided, guided_mean("z"))
        faults += [f"with a negative prompt: {fault}" for fault in found]
    return faults


@functools.cache
def noise_network(name: str) -> NPNetModel:
    """A random network for the family's latents and prompt embeddings, which changes the noise."""
    family, embeds = families.FAMILIES[name], plain(name).embeds
    rows = embeds[0] if isinstance(embeds, list) else embeds
    with torch.random.fork_rng():
        torch.manual_seed(0)
        channels = family.latents[family.channels]
        pooled = None if rows is None else prompt_of(name, 0, True).pooled
        model = NPNetModel(
            channels,
            32 if rows is None else rows.shape[-1],
            512,
            width=32,
            depth=1,
            pooled_dim=None if pooled is None else pooled.shape[1],
        )
        nn.init.normal_(model.compact.out.weight, std=0.3)
    return model.eval()


@functools.cache
def prompt_of(name: str, number: int, guided: bool) -> PromptEmbeds:
    """The embeddings of one prompt that is alone in its batch."""
    pipe, found = families.build(name), []
    encode = pipe.encode_prompt

    @functools.wraps(encode)
    def watched(*args: Any, **kwargs: Any) -> Any:
        found.append(encode(*args, **kwargs))
        return found[-1]

    vars(pipe)["encode_prompt"] = watched
    # Image-to-image leaves out most of the steps.
    families.images(pipe, name, 1, steps=4, first=number, guided=guided)
    return embeddings_of(pipe, found[0])[0].rows(torch.tensor([0]))


def golden_of(name: str, noise: Tensor, number: int, guided: bool) -> Tensor:
    """What `noise_network` makes of noise (1, C, H, W) and the prompt with this number, without masked padding."""
    prompt = prompt_of(name, number, guided)
    tokens = prompt.embeds if prompt.mask is None else prompt.embeds[:, prompt.mask[0]]
    return noise_network(name)(noise, tokens, None, prompt.pooled).sample


def _apply_golden_noise(pipe: Any, name: str) -> Any:
    return dx.apply_golden_noise(pipe, noise_network(name))


def _golden_faults(name: str, pipe: Any, run: Run, guided: bool) -> Faults:
    before, scheduler = plain(name, guided), pipe.scheduler
    scale = input_scale(name, scheduler, before, 0)
    if scale != 1:
        scale *= float(scheduler.init_noise_sigma)
    axis = families.FAMILIES[name].channels + 1
    noise = before.shown[0].movedim(axis, 1) / scale
    # Images have no axis of frames for the network.
    rows = noise.squeeze(2) if noise.ndim == 5 else noise
    with torch.no_grad():
        golden = [golden_of(name, rows[i : i + 1], i, guided) for i in range(BATCH)]
    expected = torch.cat(golden).reshape(noise.shape).movedim(1, axis)
    return differ("the first input", run.shown[0], expected * scale)


_LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "to_query", "to_key", "to_value", "to_qkv_mlp_proj", "qkv")


def lora(denoiser: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Random (down, up) of rank 2 for every attention projection, by the layer's name."""
    draw = torch.Generator().manual_seed(0)
    found = {}
    for name, layer in denoiser.named_modules():
        if isinstance(layer, nn.Linear) and name.endswith(tuple(f".{end}" for end in _LAYERS)):
            down = torch.randn(2, layer.in_features, generator=draw)
            found[name] = 0.3 * down, 0.3 * torch.randn(layer.out_features, 2, generator=draw)
    assert found
    return found


def _apply_smooth_lora(pipe: Any, name: str) -> Any:
    part = families.FAMILIES[name].denoisers[0]
    weights = {}
    for layer, (down, up) in lora(getattr(pipe, part)).items():
        weights |= {f"{part}.{layer}.lora_A.weight": down, f"{part}.{layer}.lora_B.weight": up}
    with tempfile.TemporaryDirectory() as folder:
        save_file(weights, f"{folder}/lora.safetensors")
        return dx.apply_smooth_lora(pipe, folder)


def _lora_faults(name: str, pipe: Any, run: Run, guided: bool) -> Faults:
    for denoiser in families.denoisers(pipe, name):
        for layer, (down, up) in lora(denoiser).items():
            denoiser.get_submodule(layer).weight.data.add_(up @ down)
    merged = record(pipe, name, guided=guided)
    first = differ("the first output with merged weights", run.steps[0][0], merged.steps[0][0])
    # Rounding grows from step to step.
    return first + differ("the images with merged weights", run.images, merged.images, 1e-2)


METHODS = {
    "teleport": Method(_apply_teleport("stats"), dx.remove_teleport, _teleport_faults),
    "teleport-first-call": Method(_apply_teleport("first_call"), dx.remove_teleport, _first_call_faults),
    "teleport-prompt-map": Method(_apply_prompt_map, dx.remove_teleport, _prompt_map_faults),
    "golden-noise": Method(_apply_golden_noise, dx.remove_golden_noise, _golden_faults),
    "smooth-lora": Method(_apply_smooth_lora, dx.remove_smooth_lora, _lora_faults),
}


# --- the probe ---


class Outcome(NamedTuple):
    """State of a cell ("works", "refused", "refused in the call", "crashes", "wrong") and the reason."""

    state: str
    reason: str = ""


def _raised_here(trace: TracebackType | None) -> bool:
    last = traceback.extract_tb(trace)[-1]
    return Path(last.filename).is_relative_to(Path(dx.__file__).parent) and "raise" in (last.line or "")


def _failure(error: Exception, where: str) -> Outcome:
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    if isinstance(error, ValueError) and _raised_here(error.__traceback__):
        return Outcome(f"refused{where}", text)
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if Path(f.filename).is_relative_to(Path(dx.__file__).parent)]
    frame = (ours or frames)[-1]
    return Outcome("crashes", f"{text} ({Path(frame.filename).name}:{frame.name}{where})")


def probe(method: str, name: str) -> Outcome:
    """What `method` does on the family `name`."""
    # All prompt embeddings but Stable Diffusion 1's are too long to be used unaveraged. Here too.
    with mock.patch.object(features, "LARGEST_FLAT", 0):
        return _probe(method, name)


def _probe(method: str, name: str) -> Outcome:
    row, pipe, before = METHODS[method], families.build(name), plain(name)

    def restored(when: str) -> Faults:
        same = torch.equal(families.images(pipe, name, BATCH, steps=STEPS), before.images)
        return [] if same else [f"{when}: the images are not those without the method"]

    try:
        row.apply(pipe, name)
    except Exception as error:
        failed, faults = _failure(error, ""), restored("after the refusal")
        return Outcome("wrong", "; ".join(faults)) if faults else failed
    try:
        faults = _faults_of_calls(method, name, pipe)
    except Exception as error:
        failed = _failure(error, " in the call")
        row.remove(pipe)
        faults = restored("after the failed call and removal")
        return Outcome("wrong", "; ".join(faults)) if faults else failed
    row.remove(pipe)
    faults += restored("after removal")
    return Outcome("wrong", "; ".join(faults)) if faults else Outcome("works")


def _faults_of_calls(method: str, name: str, pipe: Any) -> Faults:
    """Faults of a pipeline with the method on, in calls of several kinds."""
    row, run = METHODS[method], record(pipe, name)
    faults = ["no effect"] if torch.equal(run.images, plain(name).images) else []
    faults += row.faults(name, families.build(name), run, True)
    if families.FAMILIES[name].unguided:
        free = record(pipe, name, guided=False)
        faults += [f"unguided: {f}" for f in row.faults(name, families.build(name), free, False)]
    singles = [record(pipe, name, 1, first=i) for i in range(BATCH)]
    together = torch.cat([one.shown[0] for one in singles]), torch.cat([one.images for one in singles])
    faults += differ(
        "the first input of a batch against its images one by one", run.shown[0], together[0], 1e-5
    )
    if name not in PADS:
        faults += differ("a batch against its images one by one", run.images, together[1], 1e-3)
    if prompts_can_be_doubled(name):
        two, four = doubled(pipe, name)
        faults += differ("two images a prompt", two.shown[0], four.shown[0], 1e-5)
    # A LoRA in half precision is diffusers' business.
    if method != "smooth-lora" and runs_in_half(name):
        half = families.build(name, dtype=torch.bfloat16)
        row.apply(half, name)
        found = record(half, name)
        faults += differ("bfloat16: the first input", found.shown[0], run.shown[0], 0.05)
    return faults


def markdown(columns: Iterable[str], probed: Callable[[str, str], Outcome]) -> str:
    """A table of every cell, and below it the reasons of the cells that do not work."""
    cells = {(column, name): probed(column, name) for name in families.NAMES for column in columns}
    lines = ["| family | " + " | ".join(columns) + " |", "|" + " --- |" * (len(list(columns)) + 1)]
    lines += [
        f"| {name} | " + " | ".join(cells[column, name].state for column in columns) + " |"
        for name in families.NAMES
    ]
    lines.append("")
    for (method, name), (state, reason) in cells.items():
        if state != "works":
            lines.append(f"- **{name}, {method}** {state}: {reason[:360]}")
    return "\n".join(lines) + "\n"


# --- what methods are built from: the functions of core ---


def _call(name: str, batch: int = BATCH, **changes: Any) -> dict[str, Any]:
    """The call of `families.images`, for functions that add `output_type` themselves."""
    call = {**families.inputs(name, batch, steps=STEPS), "generator": families.generators(batch), **changes}
    return {key: value for key, value in call.items() if key != "output_type"}


def _noise(name: str, pipe: Any, x: Tensor) -> Tensor:
    """States at the start of the call → the noise of unit variance."""
    scale = input_scale(name, pipe.scheduler, plain(name), 0)
    return x if scale == 1 else x / float(pipe.scheduler.init_noise_sigma)


def _encode_prompts(name: str, pipe: Any) -> Faults:
    """Encoded prompts give the images of the prompts, with the default arguments of `encode_prompt`."""
    family, texts = families.FAMILIES[name], ["a aaa", "a bbbb"]
    encoded = encode_prompts(pipe, texts)
    defaults = inspect.signature(pipe.encode_prompt).parameters
    options: dict[str, Any] = {
        key: defaults[key].default for key in ("max_sequence_length", "system_prompt") if key in defaults
    }
    # With true guidance a call needs a negative prompt, and the encoded one is the empty one.
    options["guided"] = family.guidance != "true_cfg_scale"
    given = families.images(pipe, name, BATCH, prompt=None, **encoded, **options)
    wanted = families.images(pipe, name, BATCH, prompt=texts, **options)
    return differ("the images of encoded prompts", given, wanted)


def _grid(name: str, x: Tensor) -> Tensor:
    """(B, *latents) → (B, C, H, W), or (B, C, T, H, W) of a video."""
    x = x.movedim(families.FAMILIES[name].channels + 1, 1)
    return x.squeeze(2) if x.ndim == 5 and x.shape[2] == 1 else x


def _one(name: str, x: Tensor) -> Tensor:
    """Latents in the layout of `latents=` → (B, *latents)."""
    return x if families.FAMILIES[name].given == "unpacked" else one_latent_an_image(name, x, BATCH)


def _initial_noise(name: str, pipe: Any) -> Faults:
    """The noise is what the call starts from, and the call starts from it when it is passed as `latents=`."""
    found = initial_noise(pipe, _call(name))
    noise = _noise(name, pipe, plain(name).steps[0][1])
    faults = (
        [] if families.FAMILIES[name].starts_from_noise else ["the image is part of what is called noise"]
    )
    faults += differ("the noise", _one(name, found), noise)
    again = record(pipe, name, latents=found)
    return faults + differ("the first input with latents=noise", again.shown[0], plain(name).shown[0])


def _model_output(name: str, pipe: Any) -> Faults:
    """The guided output for the call's own noise is what the scheduler was given in its first step."""
    run, unpacked = plain(name), families.FAMILIES[name].given == "unpacked"
    latents = _noise(name, pipe, run.steps[0][1] if unpacked else run.first)
    found = model_output(pipe, latents, _call(name))
    return differ("the model's output", _one(name, found), run.steps[0][0])


def _pipeline_samples(name: str, pipe: Any) -> Faults:
    """The samples are the states after the last step, in the scale of the denoiser."""
    call = _call(name)
    options = {key: value for key, value in call.items() if key not in ("prompt", "generator", "batch_size")}
    prompts = call.get("prompt")
    batch = next(iter(pipeline_samples(pipe, BATCH, batch_size=BATCH, prompts=prompts, seed=7, **options)))
    found: Any = batch[0] if prompts else batch
    wanted = _grid(name, plain(name).end)
    if found.shape != wanted.shape:
        return [f"the samples have shape {tuple(found.shape)} instead of {tuple(wanted.shape)}"]
    # Pipelines that work on pixels clip them.
    return differ("the samples", found, wanted.clamp(-1, 1) if name == "ddpm" else wanted)


def _encode_images(name: str, pipe: Any) -> Faults:
    """Encoded images have the shape of the pipeline's latents, and the scale that it undoes before it decodes."""
    end, images = _grid(name, plain(name).end), plain(name).images
    latents = encode_images(pipe, torch.rand(BATCH, 3, *images.shape[-2:]))
    expected = end[:, :, :1] if end.ndim == 5 else end
    if latents.shape != expected.shape:
        return [f"the latents have shape {tuple(latents.shape)} instead of {tuple(expected.shape)}"]
    if vae_of(pipe) is None:
        return []
    decoded = (decode_latents(pipe, end) / 2 + 0.5).clamp(0, 1)
    return differ("decoded latents", decoded.movedim(1, 2) if end.ndim == 5 else decoded, images)


HELPERS: dict[str, Callable[[str, Any], Faults]] = {
    "encode_prompts": _encode_prompts,
    "initial_noise": _initial_noise,
    "model_output": _model_output,
    "pipeline_samples": _pipeline_samples,
    "encode_images": _encode_images,
}


def probe_helper(helper: str, name: str) -> Outcome:
    """What a function of core does with the family `name`."""
    pipe = families.build(name)
    plain(name)
    try:
        faults = HELPERS[helper](name, pipe)
    except Exception as error:
        return _failure(error, "")
    if not torch.equal(families.images(pipe, name, BATCH, steps=STEPS), plain(name).images):
        faults.append("the pipeline is not as it was")
    return Outcome("wrong", "; ".join(faults)) if faults else Outcome("works")


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    tables = markdown(METHODS, probe) + "\n" + markdown(HELPERS, probe_helper)
    Path(sys.argv[1]).write_text(tables, encoding="utf-8")
