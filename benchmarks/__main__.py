"""Makes a page of figures again, or lists the benchmarks.

    python -m benchmarks
    python -m benchmarks golden_noise --train_data_dir DIR
    python -m benchmarks golden_noise --quick

What was measured is kept in --cache_dir, and an interrupted benchmark goes on where it stopped. --quick does the same with
a handful of images and steps into a temporary folder.
"""

import argparse
import importlib
import tempfile
from pathlib import Path
from typing import Any

from diffusers_ext.testbed.fashion_scenes import SAMPLE_DIR

from . import NAMES
from .framework.bench import Bench

ROOT = Path(__file__).parents[1]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("name", nargs="?", choices=NAMES, metavar="NAME", help="benchmark; without it they are listed")
    add("--quick", action="store_true", help="a handful of images and steps, into a temporary folder")
    add("--workers", type=int, default=2, help="processes of one thread each; what is timed runs alone")
    add("--output_dir", type=Path, default=None, help="default: benchmarks/results")
    add("--cache_dir", type=Path, default=None, help="default: runs/benchmarks")
    add(
        "--train_data_dir",
        type=Path,
        default=SAMPLE_DIR,
        help="Fashion-MNIST's idx files; default: the embedded sample",
    )
    args = parser.parse_args(argv)
    if args.workers < 1:
        parser.error(f"--workers must be at least 1, got {args.workers}")
    return args


def main(argv: list[str] | None = None) -> None:
    """Lists the benchmarks, or runs one."""
    args = parse_args(argv)
    if args.name is None:
        for name in NAMES:
            print(f"{name:20} {(module(name).__doc__ or '').splitlines()[0]}")
        return
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary) if args.quick else None
        bench = Bench(
            output_dir=args.output_dir or place or ROOT / "benchmarks" / "results",
            cache_dir=args.cache_dir or place or ROOT / "runs" / "benchmarks",
            data_dir=args.train_data_dir.resolve(),
            workers=0 if args.quick else args.workers,
            quick=args.quick,
        )
        module(args.name).main(bench)


def module(name: str) -> Any:
    """The module of a benchmark."""
    return importlib.import_module(f"benchmarks.{name}")


if __name__ == "__main__":
    main()
