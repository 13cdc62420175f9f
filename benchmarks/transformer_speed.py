"""What GRI attention and caches cost and save at the shapes of SD3.5, Flux.1 and Qwen-Image: MACs and time; random weights.

Nothing is said of quality. Parameters and multiply-accumulates are those of whole transformers, without weights. Time is
measured on parts that fit: the attention of a few heads at every size, and one block of each kind in its real width at
one size. A whole call is put together from both; the page says how. The caches are measured on a narrow transformer with
all its blocks and with as many fewer tokens, so that attention has the same share of its work.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers.hooks import FirstBlockCacheConfig, TaylorSeerCacheConfig
from torch.utils.flop_counter import FlopCounterMode

from diffusers_ext.asdm.apply import apply_gri_attention, remove_gri_attention
from diffusers_ext.asdm.gri_attention import full_macs, gri_macs, joint_gri_attention
from diffusers_ext.metrics.comparison import Estimate, markdown_table

from .framework.bench import Bench
from .framework.cells import Cell
from .framework.statistics import paired_ratio
from .framework.timing import device_name, take_turns, wait
from .gri_error import full_attention
from .transformer_layouts import LAYOUTS, blocks_of, call, smaller

WRITES = ("transformer_speed.md",)
FULL, GRI = "full", "GRI"
WINDOW, POOL = 8, 4
# Blocks of each kind that are left, by layout and name. Presets of A-SDM belong here: the time of a call follows.
DEPTHS: dict[str, dict[str, dict[str, int]]] = {
    name: {"original": layout.kinds} for name, layout in LAYOUTS.items()
}
CACHED = "Flux.1"
CACHES: dict[str, Any] = {
    "none": None,
    "FirstBlockCache, all computed": FirstBlockCacheConfig(threshold=0.0),
    "FirstBlockCache, all skipped": FirstBlockCacheConfig(threshold=1e9),
    "TaylorSeer": TaylorSeerCacheConfig(),
    "TaylorSeer, lite": TaylorSeerCacheConfig(use_lite_mode=True),
}


@dataclass(frozen=True)
class Settings:
    """How large the benchmark is, and where it runs.

    Attributes:
        device, dtype: of everything that is timed.
        sides: of the square images, in tokens; a token is 16 × 16 pixels.
        heads: in the attention that is timed alone.
        block_side: of the image in the blocks that are timed.
        repetitions: rounds, after one that does not count.
        block_repetitions: the same of the blocks.
        steps: of a run with a cache.
        width: heads in the transformer of the caches.
        small: heads of all layouts; None: as published.
    """

    device: str = "cpu"
    dtype: str = "float32"
    sides: tuple[int, ...] = (64, 128)
    heads: int = 2
    block_side: int = 32
    repetitions: int = 4
    block_repetitions: int = 3
    steps: int = 20
    width: int = 2
    small: int | None = None

    @property
    def place(self) -> dict[str, Any]:
        """Device and data type."""
        return {"device": self.device, "dtype": getattr(torch, self.dtype)}


GPU = Settings("cuda", "bfloat16", heads=24, block_side=64, repetitions=20, block_repetitions=10, width=24)
QUICK = Settings(
    sides=(8, 16), heads=1, block_side=8, repetitions=2, block_repetitions=2, steps=6, width=1, small=1
)


def layout_of(name: str, s: Settings) -> Any:
    """The layout, or a narrow one for a small run."""
    return LAYOUTS[name] if s.small is None else smaller(LAYOUTS[name], s.small)


# --- counted ---


@torch.no_grad()
def count(name: str, s: Settings) -> dict[str, Any]:
    """Parameters, and the multiply-accumulates of a call by "side/attention"; all blocks of a kind are alike."""
    layout = layout_of(name, s)
    transformer = layout.build(**layout.shallow)

    def whole(rest: float, parts: Iterable[float]) -> float:
        return rest + sum(number * part for number, part in zip(layout.kinds.values(), parts, strict=True))

    sizes = [sum(p.numel() for p in block.parameters()) for block in blocks_of(transformer)]
    rest = sum(p.numel() for p in transformer.parameters()) - sum(sizes)
    found: dict[str, Any] = {"parameters": whole(rest, sizes)}
    for side in s.sides:
        inputs = layout.inputs(side, side, device="meta")
        for attention in (FULL, GRI):
            if attention == GRI:
                apply_gri_attention(transformer, window=WINDOW, pool=POOL)
            with FlopCounterMode(display=False) as counter:
                # It counts two operations for each.
                meter = _Meter(transformer, list(layout.kinds), partial(_half, counter))
                meter.run("", inputs)
            meter.remove()
            macs = {part.strip("/"): values[0] for part, values in meter.found.items()}
            found[f"{side}/{attention}"] = whole(macs["rest"], [macs[kind] for kind in layout.kinds])
        remove_gri_attention(transformer)
    return found


def _half(counter: FlopCounterMode) -> float:
    return counter.get_total_flops() / 2


def attention_macs(name: str, side: int, s: Settings, kind: str | None = None) -> dict[str, int]:
    """Multiply-accumulates of one joint attention, or of all attentions of a block of a kind, by attention."""
    layout = layout_of(name, s)
    found = {}
    for attention in (FULL, GRI):
        texts = [layout.text, *[0] * (layout.image_attentions[kind] if kind else 0)]
        found[attention] = sum(
            full_macs(side, side, layout.heads * layout.width, text)
            if attention == FULL
            else gri_macs(side, side, layout.heads, layout.width, WINDOW, POOL, text)
            for text in texts
        )
    return found


# --- timed ---


@torch.no_grad()
def attention(name: str, side: int, s: Settings) -> dict[str, np.ndarray]:
    """Seconds of one joint attention with `s.heads` heads, (rounds,), by attention."""
    torch.manual_seed(0)
    layout = layout_of(name, s)
    shape = (1, layout.text + side * side, s.heads, layout.width)
    query, key, value = (torch.randn(*shape, **s.place) for _ in range(3))
    work = {
        FULL: lambda: full_attention(query, key, value),
        GRI: lambda: joint_gri_attention(query, key, value, side, side, WINDOW, POOL),
    }
    return take_turns(work, s.repetitions, 1, torch.device(s.device), f"attention, {name}, {side} × {side}")


@torch.no_grad()
def blocks(name: str, s: Settings) -> dict[str, np.ndarray]:
    """Seconds of a block of each kind, (rounds,), by "attention/kind"; "attention/rest" is what is outside of blocks."""
    torch.manual_seed(0)
    layout, device = layout_of(name, s), torch.device(s.device)
    transformer = layout.build(s.device, **layout.shallow).to(s.place["dtype"])
    inputs = layout.inputs(s.block_side, s.block_side, **s.place)
    clock = _Meter(transformer, list(layout.kinds), partial(_seconds, device))

    def run(attention: str) -> None:
        if attention == GRI:
            apply_gri_attention(transformer, window=WINDOW, pool=POOL)
        clock.run(attention, inputs)
        remove_gri_attention(transformer)

    work = {attention: lambda attention=attention: run(attention) for attention in (FULL, GRI)}
    take_turns(work, s.block_repetitions, 1, device, f"blocks, {name}")
    return {key: np.array(values[1:]) for key, values in clock.found.items()}


class _Meter:
    """Reads time, or something else, at every block of a transformer that has one of each kind.

    Args:
        transformer: which.
        kinds: names of its blocks.
        now: what is read.
    """

    def __init__(self, transformer: Any, kinds: list[str], now: Callable[[], float]) -> None:
        self.transformer, self.now = transformer, now
        self.found: dict[str, list[float]] = {}
        self.of_call: dict[str, float] = {}
        self.started = 0.0
        self.handles: list[Any] = []
        for kind, block in zip(kinds, blocks_of(transformer), strict=True):
            self.handles.append(block.register_forward_pre_hook(lambda *_: self._start()))
            self.handles.append(block.register_forward_hook(lambda *_, kind=kind: self._stop(kind)))

    def run(self, name: str, inputs: dict[str, Any]) -> None:
        """One call; adds what each block has taken to `found["name/kind"]`, and what is left to `found["name/rest"]`."""
        self.of_call = {}
        begun = self.now()
        call(self.transformer, inputs)
        self.of_call["rest"] = self.now() - begun - sum(self.of_call.values())
        for part, taken in self.of_call.items():
            self.found.setdefault(f"{name}/{part}", []).append(taken)

    def remove(self) -> None:
        """Leaves the transformer as it was."""
        for handle in self.handles:
            handle.remove()

    def _start(self) -> None:
        self.started = self.now()

    def _stop(self, kind: str) -> None:
        self.of_call[kind] = self.now() - self.started


def _seconds(device: torch.device) -> float:
    wait(device)
    return time.perf_counter()


@torch.no_grad()
def cached_run(s: Settings) -> dict[str, np.ndarray]:
    """Seconds of every step of a run with each cache, (steps,), and whether its last attention was computed."""
    layout, device = LAYOUTS[CACHED], torch.device(s.device)
    # As many fewer tokens as the width is smaller: at 64 × 64 tokens and 512 of text, attention keeps its share.
    share = s.width / layout.heads
    tokens, text = round(64 * 64 * share), max(1, round(layout.text * share))
    height = max(side for side in range(1, int(tokens**0.5) + 1) if tokens % side == 0)
    changes = layout.shallow if s.small else {}
    torch.manual_seed(0)
    transformer = smaller(layout, s.width).build(s.device, **changes).to(s.place["dtype"])
    inputs = smaller(layout, s.width).inputs(height, tokens // height, text, **s.place)
    computed: list[int] = []
    blocks_of(transformer)[-1].attn.to_q.register_forward_hook(lambda *_: computed.append(1))
    found: dict[str, np.ndarray] = {}
    for name, config in CACHES.items():
        if config is not None:
            transformer.enable_cache(config)
        seconds, calls = [], []
        for step in range(-1, s.steps):
            if step == 0 and config is not None:
                transformer._reset_stateful_cache()
            computed.clear()
            wait(device)
            begun = time.perf_counter()
            # A little further in every step, so that no cache meets its own input again.
            moved = {**inputs, "hidden_states": inputs["hidden_states"] * (1 + 0.01 * step)}
            # A reset forgets the context.
            with transformer.cache_context("run"):
                call(transformer, moved)
            wait(device)
            seconds.append(time.perf_counter() - begun)
            calls.append(len(computed))
        if config is not None:
            transformer.disable_cache()
        # The first call is not of the run.
        found |= {f"{name}/seconds": np.array(seconds[1:]), f"{name}/computed": np.array(calls[1:])}
    return found


# --- tables ---


def whole_call(
    name: str, side: int, depths: dict[str, int], s: Settings, timed: dict[str, Any]
) -> dict[str, np.ndarray]:
    """Seconds of a call at a size, (rounds,), by attention: blocks without attention by their tokens, attention by its MACs.

    Args:
        name: of a layout.
        side: of the image in tokens.
        depths: blocks of each kind.
        s: settings.
        timed: "attention/SIDE" and "blocks": what `attention` and `blocks` found.
    """
    layout = layout_of(name, s)
    longer = (side**2 + layout.text) / (s.block_side**2 + layout.text)
    found = {}
    for kind_of in (FULL, GRI):

        def seconds(at: int, kind: str, kind_of: str = kind_of) -> float:
            per_mac = np.median(timed[f"attention/{at}"][kind_of]) / (
                attention_macs(name, at, s)[kind_of] * s.heads / layout.heads
            )
            return float(per_mac * attention_macs(name, at, s, kind)[kind_of])

        total = longer * timed["blocks"][f"{kind_of}/rest"]
        for kind, number in depths.items():
            linear = timed["blocks"][f"{kind_of}/{kind}"] - seconds(s.block_side, kind)
            total = total + number * (longer * linear + seconds(side, kind))
        found[kind_of] = total
    return found


def counted_table(counted: dict[str, Any], s: Settings) -> str:
    """Parameters, and multiply-accumulates of a call at every size."""
    header = ["transformer", "parameters, 10⁹"]
    header += [f"{cell} at {16 * side}²" for side in s.sides for cell in ("MACs, 10¹²", "GRI ÷ full")]
    rows = []
    for name, found in counted.items():
        cells = [name, f"{found['parameters'] / 1e9:.2f}"]
        for side in s.sides:
            full, gri = (float(found[f"{side}/{attention}"]) for attention in (FULL, GRI))
            cells += [f"{full / 1e12:.2f}", f"{gri / full:.2f}"]
        rows.append(cells)
    return markdown_table(header, rows)


def attention_table(timed: dict[str, dict[str, Any]], s: Settings) -> str:
    """One joint attention at every size, full and GRI in turns."""
    header = ["attention", "image tokens", "text", "MACs, GRI ÷ full", "full, ms", "GRI, ms", "GRI ÷ full"]
    rows = []
    for name, found in timed.items():
        for side in s.sides:
            seconds, macs = found[f"attention/{side}"], attention_macs(name, side, s)
            times = [f"{1000 * float(np.median(seconds[attention])):.0f}" for attention in (FULL, GRI)]
            ratio = paired_ratio(seconds[GRI], seconds[FULL])
            text = str(layout_of(name, s).text)
            share = f"{macs[GRI] / macs[FULL]:.2f}"
            rows.append([name, f"{side} × {side}", text, share, *times, ratio.format()])
    return markdown_table(header, rows)


def block_table(timed: dict[str, dict[str, Any]], s: Settings) -> str:
    """One block of each kind, as measured."""
    header = ["block", "number", "full, s", "GRI, s", "GRI ÷ full"]
    rows = []
    for name, found in timed.items():
        for kind, number in layout_of(name, s).kinds.items():
            seconds = [found["blocks"][f"{attention}/{kind}"] for attention in (FULL, GRI)]
            ratio = paired_ratio(seconds[1], seconds[0])
            times = [f"{float(np.median(x)):.3f}" for x in seconds]
            rows.append([f"{name}, {kind}", str(number), *times, ratio.format()])
    return markdown_table(header, rows)


def call_table(timed: dict[str, dict[str, Any]], s: Settings) -> str:
    """A whole call at every size, put together."""
    header = ["transformer", "image", "full, s", "GRI, s", "GRI ÷ full", "÷ original, full"]
    rows = []
    for name, found in timed.items():
        for side in s.sides:
            original = whole_call(name, side, layout_of(name, s).kinds, s, found)
            for depth, kinds in DEPTHS[name].items():
                made = whole_call(name, side, kinds, s, found)
                label = name if depth == "original" else f"{name}, {depth}"
                times = [f"{float(np.median(made[attention])):.1f}" for attention in (FULL, GRI)]
                ratios: list[Estimate] = [
                    paired_ratio(made[GRI], made[FULL]),
                    paired_ratio(made[FULL], original[FULL]),
                ]
                rows.append([label, f"{16 * side}²", *times, *(ratio.format() for ratio in ratios)])
    return markdown_table(header, rows)


def cache_table(found: dict[str, Any]) -> str:
    """What a step costs with each cache, and a run of all steps."""
    header = ["cache", "steps computed", "computed step ÷ none", "skipped step ÷ none", "run ÷ none"]
    plain = float(np.median(found["none/seconds"]))
    rows = []
    for name in CACHES:
        seconds, computed = found[f"{name}/seconds"], found[f"{name}/computed"] > 0
        cells = [
            f"{float(np.median(seconds[of])) / plain:.2f}" if of.any() else "–"
            for of in (computed, ~computed)
        ]
        number = f"{int(computed.sum())} of {len(computed)}"
        rows.append([name, number, *cells, f"{float(seconds.sum()) / (plain * len(seconds)):.2f}"])
    return markdown_table(header, rows)


def about(s: Settings, device: str) -> str:
    """How to read the tables, and on what they were measured."""
    return (
        f"{device}; {s.dtype}; PyTorch {torch.__version__}; random weights, so that nothing is said of images. GRI attention"
        f" has windows of {WINDOW} × {WINDOW} and cells of {POOL} × {POOL}, in all layers. MACs are of one image without"
        " classifier-free guidance. An image of 1024² pixels has 64 × 64 tokens. A ratio of times is the median of rounds"
        " in which both took their turn, with a 95% bootstrap interval over rounds."
    )


def main(bench: Bench) -> None:
    """Measures and writes the page."""
    s = bench.pick(GPU if torch.cuda.is_available() else Settings(), QUICK)
    names = list(LAYOUTS)
    counts = {name: Cell(count, (name, s)) for name in names}
    sides = sorted({*s.sides, s.block_side})
    parts = {(name, side): Cell(attention, (name, side, s), alone=True) for name in names for side in sides}
    whole = {name: Cell(blocks, (name, s), alone=True) for name in names}
    caches = Cell(cached_run, (s,), alone=True)
    measured = bench.run([*counts.values(), *parts.values(), *whole.values(), caches])
    timed: dict[str, dict[str, Any]] = {
        name: {
            "blocks": measured[whole[name]],
            **{f"attention/{side}": measured[parts[name, side]] for side in sides},
        }
        for name in names
    }
    tokens = f"{s.block_side} × {s.block_side}"
    bench.write(
        "transformer_speed.md",
        "Whole transformers, counted:",
        counted_table({name: measured[cell] for name, cell in counts.items()}, s),
        about(s, device_name(torch.device(s.device))),
        f"The attention of given queries, keys and values, {s.heads} of its heads:",
        attention_table(timed, s),
        f"One block of each kind in its real width, at {tokens} image tokens:",
        block_table(timed, s),
        "One call, put together: the measured blocks without their attention, by the number of tokens, and the measured"
        " attention, by the number of heads. It is an extrapolation, and the memory of this machine would not hold the"
        " weights.",
        call_table(timed, s),
        f"Caches of diffusers over {s.steps} steps, on {CACHED} with {s.width} of its heads, all blocks unless this is a small"
        " run, and as many fewer tokens:",
        cache_table(measured[caches]),
        "FirstBlockCache computes a step if the first block's output has changed by more than a threshold, which random"
        " weights say nothing about: the rows are its two ends, and a run lies between them by the share of steps that it"
        " skips. TaylorSeer has diffusers' defaults (interval 5 after 3 steps): by itself it extrapolates the output of"
        " every attention, in lite mode that of the last layer, and skips the blocks.",
    )
