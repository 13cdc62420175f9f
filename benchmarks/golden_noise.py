"""Golden noise against its controls on the embedded text-to-image model, at the same prompts and seeds.

    python benchmarks/golden_noise.py --workers 2 --output_dir benchmarks/results

Every run is kept in `--cache_dir`, so an interrupted benchmark goes on where it stopped. Writes a Markdown table, a
plot and a sheet of images. Intervals are over prompts: the images of one prompt are resampled together. Fréchet
distances and diversity are on the small grader's features and are not FID.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import kept
from golden_noise_report import write_report
from golden_noise_runs import BEST_OF, Job, Outcome, best_of, job_path, jobs, outcome, prompts, real, run


def main() -> None:
    """Runs what is missing and writes the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output_dir", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--cache_dir", type=Path, default=Path("runs/golden_noise"))
    parser.add_argument("--num_prompts", type=int, default=400)
    parser.add_argument("--num_seeds", type=int, default=5, help="images a prompt and variant")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument(
        "--train_data_dir", default=None, help="Fashion-MNIST's files, for a row of real images"
    )
    parser.add_argument("--variants", nargs="+", default=None, help="run only these, and write no report")
    args = parser.parse_args()
    for folder in (args.output_dir, args.cache_dir):
        folder.mkdir(parents=True, exist_ok=True)
    wanted = [job for job in jobs(args.num_seeds) if not args.variants or job.variant in args.variants]
    paths = {job: job_path(job, args.num_prompts, args.cache_dir) for job in wanted}
    calls = [(job, args.num_prompts, path) for job, path in paths.items()]
    kept.side_by_side(run, calls, args.workers, "runs of all prompts")
    if args.variants:
        return
    draws = [BEST_OF * s for s in range(args.num_seeds)]

    def collect(job: Job) -> Outcome:
        """All seeds of `job`'s variant."""
        return outcome([paths[replace(job, draw=draw)] for draw in draws])

    def collect_best(guidance: float, count: int) -> Outcome:
        """The best of `count` plain images a seed."""
        return best_of([outcome([paths[Job("plain", guidance, d + k)] for d in draws]) for k in range(count)])

    shown = real(args.train_data_dir, args.num_prompts, args.num_seeds) if args.train_data_dir else None
    write_report(args.output_dir, prompts(args.num_prompts), args.num_seeds, collect, collect_best, shown)


if __name__ == "__main__":
    main()
