"""Kills every training script at random moments, resumes it, and compares the result with an uninterrupted run.

python -m tests.training.kills              # prints the table
python -m tests.training.kills --write      # also puts it into docs/training.md
python -m tests.training.kills --only NAME  # one row

A run is killed with SIGKILL, with its workers and all its processes, at a moment that is uniform over the duration of an
uninterrupted run, and started again, until it ends. Then the next run begins, until there were enough kills. The
weights, or the pairs, have to be the same bits.
"""

import argparse
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm

from diffusers_ext.core.storage import read_tensors, tensors_digest
from tests.training.launching import PLAIN, ROOT, TWO_PROCESSES, environment, kill_all
from tests.training.scripts import CAPTIONED, TRAINED, arguments, prepare, steps

PAGE = ROOT / "docs" / "training.md"
_BETWEEN = re.compile(r"(<!-- kills -->\n).*?(<!-- /kills -->)", re.DOTALL)
KILLS = 20
# Enough for several checkpoints, of which some are being written at the moment of a kill.
RUN = {**dict.fromkeys(TRAINED, 40), "train_asdm": 20}


@dataclass(frozen=True)
class Row:
    """A row of the table: a script with further arguments and a launcher."""

    script: str
    extra: tuple[str, ...] = ()
    launcher: tuple[str, ...] = tuple(PLAIN)
    note: str = ""
    environment: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        return f"{self.script}, {self.note}" if self.note else self.script


WORKERS = ("--dataloader_num_workers", "2")
TWO = tuple(TWO_PROCESSES)
FSDP = (("ACCELERATE_USE_FSDP", "true"), ("FSDP_VERSION", "2"))
PLAIN_LORA = ("--estimator", "finite_difference")
ROWS = [
    *(Row(script) for script in (*TRAINED, "collect_noise_pairs")),
    *(Row(script, WORKERS, note="2 workers") for script in CAPTIONED),
    Row("train_base", ("--optimizer", "drop_muon"), note="Drop-Muon"),
    Row("train_base", launcher=TWO, note="2 processes"),
    Row("train_base", launcher=TWO, note="FSDP2", environment=FSDP),
    Row("train_smooth_lora", PLAIN_LORA, TWO, "FSDP2", FSDP),
]


def command(row: Row, base: Path, output: Path) -> list[str]:
    """What starts or resumes a run that writes to `output`."""
    argv = [*row.launcher, str(ROOT / "training" / f"{row.script}.py"), *arguments(row.script, base, output)]
    if row.script == "collect_noise_pairs":
        return [*argv, *row.extra]
    count = steps(row.script, RUN[row.script])
    return [
        *argv,
        *count,
        *("--use_ema", "--checkpointing_steps", "4", "--resume_from_checkpoint", "latest"),
        *row.extra,
    ]


def fingerprint(folder: Path) -> str:
    """A digest of all weights or pairs in a folder of results."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*.safetensors")):
        if any(part.startswith("checkpoint") for part in path.relative_to(folder).parts):
            continue
        # Not of the file: safetensors writes its metadata in any order.
        tensors, metadata = read_tensors(path)
        described = [str(path.relative_to(folder)), sorted(metadata.items()), tensors_digest(tensors)]
        found.update(json.dumps(described).encode())
    return found.hexdigest()


def run(row: Row, argv: list[str], log: Path, seconds: float | None = None) -> bool:
    """Runs a command; False if it was killed after `seconds`, because it had not ended."""
    own = {**environment(), **dict(row.environment)}
    with open(log, "ab") as out:
        process = subprocess.Popen(argv, env=own, stdout=out, stderr=out)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = kill_all(process)
            if code == -signal.SIGKILL:
                return False
    if code:
        raise RuntimeError(f"{' '.join(argv)} ended with {code}:\n{log.read_text()[-3000:]}")
    return True


def measure(row: Row, base: Path, folder: Path, seed: int, tick: Callable[[], object]) -> dict[str, int]:
    """Kills, runs, and how many of the runs ended with the bytes of the uninterrupted one."""
    draw, log = random.Random(seed), folder / "log.txt"
    start = time.monotonic()
    run(row, command(row, base, folder / "whole"), log)
    longest = time.monotonic() - start
    expected = fingerprint(folder / "whole")
    found = {"kills": 0, "with a checkpoint": 0, "runs": 0, "equal": 0}
    while found["kills"] < KILLS:
        output = folder / str(found["runs"])
        ended = False
        while not ended:
            left = found["kills"] < KILLS
            ended = run(row, command(row, base, output), log, draw.uniform(0, longest) if left else None)
            if not ended:
                found["kills"] += 1
                found["with a checkpoint"] += any(output.rglob("checkpoint-*"))
                tick()
        found["runs"] += 1
        found["equal"] += fingerprint(output) == expected
    return found


def table(results: dict[str, dict[str, int]]) -> str:
    """The results in Markdown."""
    lines = ["| Run | Kills | of them after the first checkpoint | Runs | Equal to the uninterrupted run |"]
    lines += ["| --- | --- | --- | --- | --- |"]
    for name, found in results.items():
        after = "" if "collect" in name else found["with a checkpoint"]
        lines.append(f"| `{name}` | {found['kills']} | {after} | {found['runs']} | {found['equal']} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="put the table into the documentation")
    parser.add_argument("--only", choices=[row.name for row in ROWS], nargs="*", help="these rows only")
    parser.add_argument("--results", default=ROOT / "benchmarks" / "results" / "kills.json", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    results = json.loads(args.results.read_text()) if args.results.is_file() else {}
    chosen = [row for row in ROWS if args.only is None or row.name in args.only]
    with tempfile.TemporaryDirectory() as folder, tqdm(total=KILLS * len(chosen), desc="kills") as bar:
        os.environ["ACCELERATE_USE_CPU"] = "true"
        base = prepare(Path(folder) / "base")
        for number, row in enumerate(chosen):
            bar.set_postfix_str(row.name)
            own = Path(folder) / str(number)
            own.mkdir()
            results[row.name] = measure(row, base, own, args.seed + number, bar.update)
            args.results.write_text(json.dumps(results, indent=1) + "\n")
    results = {row.name: results[row.name] for row in ROWS if row.name in results}
    args.results.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))
    if args.write:
        text = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(_BETWEEN.sub(lambda m: m[1] + table(results) + m[2], text), encoding="utf-8")
    if any(found["equal"] != found["runs"] for found in results.values()):
        sys.exit("Some runs ended with other bytes.")


if __name__ == "__main__":
    main()
