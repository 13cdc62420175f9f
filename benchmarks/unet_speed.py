"""What pruned and patched UNets cost at Stable Diffusion 1.5's and SDXL's shape: MACs, latency, memory; random weights.

A-SDM as rebuilt here, part by part, beside BK-SDM, ToMe and DeepCache (pip install "diffusers-ext[bench]"). Nothing is
said of quality. The variants take turns in every round, so that a change of the machine's speed meets them all; each
one's peak memory is that of a process of its own. They share the original's weights, which are not trained: some 7 GB in
float32 for Stable Diffusion's shape and 13 for SDXL's. A GPU measures both shapes, compiled too; a CPU the first, eager.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from diffusers_ext.asdm.cost import example_inputs
from diffusers_ext.core.extras import MissingExtraError
from diffusers_ext.metrics.comparison import Estimate, markdown_table

from .framework.bench import Bench
from .framework.cells import Cell
from .framework.plots import plt
from .framework.statistics import paired_ratio
from .framework.timing import device_name, peak_memory, take_turns, wait
from .unet_speed_attention import attention_table, layers_of
from .unet_speed_runs import (
    ORIGINAL,
    SHAPES,
    TIMESTEPS,
    TOME_RATIO,
    VARIANTS,
    Runner,
    count,
    make,
    materialise,
    on_meta,
    shape_config,
)

WRITES = ("unet_speed.md", "unet_speed.png")
EAGER, COMPILED = "eager", "compiled"


@dataclass(frozen=True)
class Settings:
    """How large the benchmark is, and where it runs.

    Attributes:
        shapes: keys of `SHAPES`.
        device, dtype: of the UNets.
        repetitions: rounds, after `warmup` that do not count.
        compile: whether every UNet is measured compiled too.
        sample_size: side of the latents; None: 64, for SDXL 128.
        width: channels of the first resolution, a multiple of 64.
        variants: of `VARIANTS`.
    """

    shapes: tuple[str, ...]
    device: str
    dtype: str
    repetitions: int
    compile: bool = False
    sample_size: int | None = None
    width: int = 320
    warmup: int = 1
    batch_size: int = 1
    variants: tuple[str, ...] = tuple(VARIANTS)

    def config(self, shape: str) -> dict[str, Any]:
        """Of the original UNet."""
        return shape_config(shape, self.sample_size, self.width)

    @property
    def place(self) -> tuple[torch.device, torch.dtype]:
        """Device and data type."""
        return torch.device(self.device), getattr(torch, self.dtype)


CPU = Settings(("sd15",), "cpu", "float32", 7)
GPU = Settings(tuple(SHAPES), "cuda", "float16", 30, compile=True)
QUICK = Settings(
    ("sd15",),
    "cpu",
    "float32",
    2,
    sample_size=16,
    width=64,
    variants=(ORIGINAL, "BK-SDM Small", "pruned + GRI + CondConv, folded"),
)


@dataclass
class Found:
    """What was measured at one shape.

    Attributes:
        costs: parameters and multiply-accumulates by variant.
        peaks: GiB by variant.
        seconds: of a UNet call (rounds,), by mode and variant.
        notes: what is left out and why.
    """

    costs: dict[str, tuple[int, float]] = field(default_factory=dict)
    peaks: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def ratio(self, name: str, mode: str) -> Estimate:
        """A variant's latency as a share of the original's in the same mode and round."""
        return paired_ratio(self.seconds[mode][name], self.seconds[mode][ORIGINAL])


def count_all(s: Settings, shape: str) -> Found:
    """Parameters and multiply-accumulates of every variant that there is at this shape."""
    found = Found()
    for name in s.variants:
        try:
            found.costs[name] = count(VARIANTS[name], s.config(shape))
        except (ValueError, MissingExtraError) as error:
            found.notes.append(f"{name} is left out. {error}")
    return found


@torch.no_grad()
def peak(name: str, shape: str, s: Settings) -> dict[str, Any]:
    """GiB that this process takes for a variant's UNet, weights included, at the peak of its call."""
    (device, dtype), variant = s.place, VARIANTS[name]
    unet = make(variant, on_meta(s.config(shape), dtype))
    inputs = example_inputs(unet.config, s.batch_size, device=device, dtype=dtype)
    before = 0.0 if device.type == "cuda" else peak_memory(device)
    for parameter in unet.to_empty(device=device).parameters():
        parameter.fill_(0.001)  # Memory counts once it is written to.
    Runner(variant, unet, inputs)()
    wait(device)
    return {"GiB": peak_memory(device) - before}


@torch.no_grad()
def latency(shape: str, s: Settings) -> dict[str, Any]:
    """Seconds of all variants by "mode/variant", (rounds,), and notes on what could not be compiled."""
    if s.compile:
        # All variants run the same code; past its limit the compiler would silently leave them as they are.
        torch._dynamo.config.recompile_limit = 16 * len(VARIANTS)
        torch._dynamo.config.fail_on_recompile_limit_hit = True
    torch.manual_seed(0)
    (device, dtype), found = s.place, count_all(s, shape)
    notes = len(found.notes)
    original = materialise(on_meta(s.config(shape), dtype), device)
    inputs = example_inputs(original.config, s.batch_size, device=device, dtype=dtype)
    work: dict[tuple[str, str], Any] = {}
    for name in found.costs:
        variant = VARIANTS[name]
        work[EAGER, name] = Runner(variant, make(variant, original), inputs)
    for name in tqdm(list(found.costs) if s.compile else [], desc="compiling", dynamic_ncols=True):
        # Not compiled at first: ToMe sets its generator up.
        work[EAGER, name]()
        _compile(work, name, found)
    seconds = take_turns(
        {f"{mode}/{name}": run for (mode, name), run in work.items()},
        s.repetitions,
        s.warmup,
        device,
        f"{s.repetitions} rounds after {s.warmup}",
    )
    gc.collect()
    torch._dynamo.reset()
    made = {key: seconds[key] / VARIANTS[key.split("/")[1]].calls for key in seconds}
    return {**made, "notes": np.array(found.notes[notes:], dtype=str)}


def attention(s: Settings) -> dict[str, Any]:
    """The table of single attention layers, and what it was measured on."""
    device, dtype = s.place
    layers = []
    for shape in s.shapes:
        layers += layers_of(shape, s.config(shape)["sample_size"], s.width)
    with torch.no_grad():
        table = attention_table(layers, s.batch_size, s.repetitions, s.warmup, device, dtype)
    return {"table": np.array(table), "device": np.array(device_name(device))}


def _compile(work: dict[tuple[str, str], Any], name: str, found: Found) -> None:
    run = work[EAGER, name].compiled()
    try:
        for _ in range(3):
            run()
        # What is compiled anew at every call would be timed with its compiler.
        with torch.compiler.set_stance("fail_on_recompile"):
            run()
    except Exception as error:  # Whatever a compiler throws: the others are still worth a row.
        found.notes.append(
            f"{name} could not be compiled: {type(error).__name__}: {str(error).splitlines()[0]}"
        )
    else:
        work[COMPILED, name] = run


def table(found: Found) -> str:
    """A row for each variant."""
    modes = list(found.seconds)
    header = ["UNet", "parameters, 10⁶", "÷ original", "MACs, 10⁹", "÷ original", "peak GiB", "÷ original"]
    for mode in modes:
        header += [f"{mode}, ms", "÷ original"]
    rows = []
    base = (*found.costs[ORIGINAL], found.peaks[ORIGINAL])
    for name, (parameters, macs) in found.costs.items():
        cells = [name]
        figures = (parameters, macs, found.peaks[name])
        for figure, whole, scale, digits in zip(figures, base, (1e6, 1e9, 1), (1, 1, 2)):
            # Memory that did not grow: this process had needed more before.
            cells += [f"{figure / scale:.{digits}f}", f"{figure / whole:.2f}" if whole else "–"]
        for mode in modes:
            cells += _latency(found, name, mode)
        rows.append(cells)
    return markdown_table(header, rows)


def _latency(found: Found, name: str, mode: str) -> list[str]:
    if name not in found.seconds[mode]:
        return ["failed", ""]
    low, middle, high = 1000 * np.percentile(found.seconds[mode][name], [25, 50, 75])
    ratio = found.ratio(name, mode).format() if ORIGINAL in found.seconds[mode] else ""
    return [f"{middle:.1f} [{low:.1f}, {high:.1f}]", ratio]


def about(args: Settings, device: str) -> str:
    """How to read the tables, and on what they were measured."""
    gpu = args.device == "cuda"
    memory = (
        "the most that PyTorch had allocated, weights included, in a process of its own"
        if gpu
        else "a process's highest resident memory, weights included, less what it held before the UNet"
    )
    compiled = (
        "; compiled by torch.compile's default, DeepCache module by module, and weighed against the compiled original"
        if args.compile
        else ""
    )
    return (
        f"{device}; {args.dtype}; PyTorch {torch.__version__}; random weights, so"
        " that nothing is said of images.\n\n"
        f"Milliseconds are of one UNet call: median and quartiles of {args.repetitions} rounds, in each of which all"
        f" variants take their turn in one process{compiled}. A ratio of times is the median of the rounds' own, with a 95%"
        " bootstrap interval over rounds. MACs are of one image; peak memory is"
        f" {memory}, of an eager call.\n\n"
        "“pruned” is the plan “incubation” without its GRI attention, A-SDM as rebuilt here; + GRI: GRI attention at the finest"
        " resolution that has attention; + CondConv: CLME-CondConv layers that mix a kernel for every image, as they do"
        " while trained; folded: made plain convolutions, which only a constant routing allows. ToMe merges"
        f" {TOME_RATIO:g} of the tokens for self-attention at that same resolution (tomesd). DeepCache (the package) is"
        f" the mean over a cycle of {len(TIMESTEPS)} calls, of which the first is computed in full; of the others, with its"
        " shallowest branch, only conv_in, the time embedding, the last up block's last layer and conv_out."
        " BK-SDM's and A-SDM's UNets need training, ToMe and DeepCache don't, and both change the prediction."
    )


def draw(everything: dict[str, Found], path: Path) -> None:
    """Latency of every variant as a share of the original's, with its interval, beside the share of MACs."""
    figure, axes = plt.subplots(
        1, len(everything), figsize=(7.2 * len(everything), 5.2), squeeze=False, layout="constrained"
    )
    for axis, (shape, found) in zip(axes[0], everything.items()):
        names = list(found.costs)
        modes = [mode for mode in found.seconds if ORIGINAL in found.seconds[mode]]
        height = 0.8 / max(len(modes), 1)
        for k, (mode, colour) in enumerate(zip(modes, ("#4c78a8", "#f2a541"))):
            shown = [i for i, name in enumerate(names) if name in found.seconds[mode]]
            ratios = [found.ratio(names[i], mode) for i in shown]
            places = np.array(shown) + (k - (len(modes) - 1) / 2) * height
            values = np.array([[r.value, r.value - r.low, r.high - r.value] for r in ratios]).T
            axis.barh(places, values[0], 0.9 * height, color=colour, label=f"latency, {mode}")
            axis.errorbar(values[0], places, xerr=np.maximum(values[1:], 0), fmt="none", ecolor="#333", lw=1)
        whole = found.costs[ORIGINAL][1]
        shares = [found.costs[name][1] / whole for name in names]
        axis.scatter(shares, range(len(names)), marker="D", s=26, color="black", zorder=3, label="MACs")
        axis.axvline(1, color="#888", lw=0.8, ls="--")
        labels = [f"{name}  ({found.costs[name][0] / 1e6:.0f} M)" for name in names]
        axis.set_yticks(range(len(names)), labels)
        axis.invert_yaxis()
        axis.set_xlim(left=0)
        axis.set_xlabel("share of the original's, one UNet call")
        axis.set_title(f"{SHAPES[shape]}'s shape")
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(bench: Bench) -> None:
    """Measures and writes the page and the picture."""
    s = bench.pick(GPU if torch.cuda.is_available() else CPU, QUICK)
    everything = {shape: count_all(s, shape) for shape in s.shapes}
    peaks = {
        (shape, name): Cell(peak, (name, shape, s), alone=True)
        for shape, found in everything.items()
        for name in found.costs
    }
    timed = {shape: Cell(latency, (shape, s), alone=True) for shape in s.shapes}
    layers = Cell(attention, (s,), alone=True)
    measured = bench.run([*peaks.values(), *timed.values(), layers])
    parts = []
    for shape, found in everything.items():
        found.peaks = {name: float(measured[peaks[shape, name]]["GiB"]) for name in found.costs}
        times = dict(measured[timed[shape]])
        found.notes += [str(note) for note in times.pop("notes")]
        for key, seconds in times.items():
            mode, name = key.split("/")
            found.seconds.setdefault(mode, {})[name] = seconds
        side = s.config(shape)["sample_size"]
        title = (
            f"{SHAPES[shape]}'s shape, latents {s.batch_size} × 4 × {side} × {side}, prompts of 77 tokens:"
        )
        parts += [title, table(found), *found.notes]
    on = measured[layers]
    parts += [about(s, str(on["device"])), "Single self-attention layers, eager:", str(on["table"])]
    bench.write("unet_speed.md", *parts)
    draw(everything, bench.path("unet_speed.png"))
