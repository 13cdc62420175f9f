"""What pruned and patched UNets cost at Stable Diffusion 1.5's and SDXL's shape: MACs, latency, memory; random weights.

    python benchmarks/unet_speed.py --shape sd15
    python benchmarks/unet_speed.py --shape sd15 sdxl --compile        # on a GPU

A-SDM as rebuilt here, part by part, beside BK-SDM, ToMe and DeepCache (pip install "diffusers-ext[bench]"). Nothing is
said of quality. The variants take turns in every round, so that a change of the machine's speed meets them all; each
one's peak memory is that of a process of its own. They share the original's weights, which are not trained: some 7 GB in
float32 for Stable Diffusion's shape and 13 for SDXL's. With --compile a CPU takes minutes for every variant's first call.
"""

import argparse
import gc
import json
import resource
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from tqdm.auto import tqdm
from turns import take_turns, wait
from unet_speed_attention import attention_table, layers_of, paired_ratio
from unet_speed_runs import (
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

from diffusers_ext.asdm.cost import example_inputs
from diffusers_ext.core.extras import MissingExtraError
from diffusers_ext.metrics.comparison import Estimate, markdown_table

matplotlib.use("Agg")
EAGER, COMPILED = "eager", "compiled"


def parse_args() -> argparse.Namespace:
    """The arguments."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shape", nargs="+", choices=list(SHAPES), default=["sd15"])
    add("--sample_size", type=int, default=None, help="side of the latents; default: 64, for SDXL 128")
    add("--batch_size", type=int, default=1)
    add("--width", type=int, default=320, help="of the first resolution, a multiple of 64")
    add("--device", default="cuda" if gpu else "cpu")
    add("--dtype", choices=["float32", "float16", "bfloat16"], default=None, help="default: float16 on a GPU")
    add("--repetitions", type=int, default=None, help="rounds; default: 30 on a GPU, 5 on a CPU")
    add("--warmup", type=int, default=1, help="rounds that don't count")
    add("--compile", action="store_true", help="also measure every UNet compiled")
    add("--variant", choices=list(VARIANTS), default=None, help="one alone: prints its peak memory as JSON")
    add("--output_dir", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    args.device = torch.device(args.device)
    on_cpu = args.device.type == "cpu"
    args.dtype = getattr(torch, args.dtype or ("float32" if on_cpu else "float16"))
    args.repetitions = args.repetitions or (5 if on_cpu else 30)
    return args


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


def count_all(config: dict[str, Any]) -> Found:
    """Parameters and multiply-accumulates of every variant that there is at this shape."""
    found = Found()
    for name, variant in VARIANTS.items():
        try:
            found.costs[name] = count(variant, config)
        except (ValueError, MissingExtraError) as error:
            found.notes.append(f"{name} is left out. {error}")
    return found


def peak_memory(args: argparse.Namespace, config: dict[str, Any]) -> float:
    """GiB that this process takes for `args.variant`'s UNet, weights included, at the peak of its call."""
    variant = VARIANTS[args.variant]
    unet = make(variant, on_meta(config, args.dtype))
    inputs = example_inputs(unet.config, args.batch_size, device=args.device, dtype=args.dtype)
    gpu = args.device.type == "cuda"
    before = 0.0 if gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    for parameter in unet.to_empty(device=args.device).parameters():
        parameter.fill_(0.001)  # Memory counts once it is written to.
    Runner(variant, unet, inputs)()
    wait(args.device)
    if gpu:
        return torch.cuda.max_memory_allocated(args.device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20 - before


def peak_of(variant: str, shape: str) -> float:
    """Of a fresh process with these arguments."""
    command = [sys.executable, *sys.argv, "--shape", shape, "--variant", variant]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return float(json.loads(done.stdout))


def measure_latency(args: argparse.Namespace, config: dict[str, Any], found: Found) -> None:
    """Adds the seconds of all variants, and notes what could not be compiled."""
    if args.compile:
        # All variants run the same code; past its limit the compiler would silently leave them as they are.
        torch._dynamo.config.recompile_limit = 16 * len(VARIANTS)
        torch._dynamo.config.fail_on_recompile_limit_hit = True
    torch.manual_seed(0)
    original = materialise(on_meta(config, args.dtype), args.device)
    inputs = example_inputs(original.config, args.batch_size, device=args.device, dtype=args.dtype)
    work: dict[tuple[str, str], Any] = {}
    for name in found.costs:
        variant = VARIANTS[name]
        work[EAGER, name] = Runner(variant, make(variant, original), inputs)
    for name in tqdm(list(found.costs) if args.compile else [], desc="compiling", dynamic_ncols=True):
        # Not compiled at first: ToMe sets its generator up.
        work[EAGER, name]()
        _compile(work, name, found)
    seconds = take_turns(
        {f"{mode}/{name}": run for (mode, name), run in work.items()},
        args.repetitions,
        args.warmup,
        args.device,
        f"{args.repetitions} rounds after {args.warmup}",
    )
    for mode, name in work:
        per_call = seconds[f"{mode}/{name}"] / VARIANTS[name].calls
        found.seconds.setdefault(mode, {})[name] = per_call


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
            cells += [f"{figure / scale:.{digits}f}", f"{figure / whole:.2f}"]
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


def about(args: argparse.Namespace) -> str:
    """How to read the tables, and on what they were measured."""
    gpu = args.device.type == "cuda"
    threads = f"{torch.get_num_threads()} thread" + "s" * (torch.get_num_threads() > 1)
    name = (
        torch.cuda.get_device_name(args.device)
        if gpu
        else f"CPU ({torch.backends.cpu.get_cpu_capability()}), {threads}"
    )
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
        f"{name}; {str(args.dtype).removeprefix('torch.')}; PyTorch {torch.__version__}; random weights, so"
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
    import matplotlib.pyplot as plt

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


@torch.no_grad()
def main() -> None:
    """Measures and writes the page and the image."""
    args = parse_args()
    configs = {shape: shape_config(shape, args.sample_size, args.width) for shape in args.shape}
    if args.variant is not None:
        print(json.dumps(peak_memory(args, configs[args.shape[0]])))
        return
    everything = {shape: count_all(config) for shape, config in configs.items()}
    # Before this process grows: on Linux a child's peak starts at its parent's.
    for shape, found in everything.items():
        for name in tqdm(list(found.costs), desc=f"{SHAPES[shape]}: peak memory", dynamic_ncols=True):
            found.peaks[name] = peak_of(name, shape)
    parts, layers = [], []
    for shape, found in everything.items():
        config = configs[shape]
        measure_latency(args, config, found)
        side = config["sample_size"]
        layers += layers_of(shape, side, args.width)
        title = (
            f"{SHAPES[shape]}'s shape, latents {args.batch_size} × 4 × {side} × {side}, prompts of 77 tokens:"
        )
        parts += [title, table(found), *found.notes]
        gc.collect()
        torch._dynamo.reset()
    parts.append(about(args))
    common = args.batch_size, args.repetitions, args.warmup, args.device, args.dtype
    parts += ["Single self-attention layers, eager:", attention_table(layers, *common)]
    page = "\n\n".join(parts) + "\n"
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / "unet_speed.md").write_text(page)
    draw(everything, args.output_dir / "unet_speed.png")
    print(page)


if __name__ == "__main__":
    main()
