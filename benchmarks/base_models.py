"""The embedded base models: prompt alignment beside its ceilings, and Fréchet distances beside their floors.

    python benchmarks/base_models.py --train_data_dir DIR

DIR holds Fashion-MNIST's four idx files; without it the embedded sample of garments is used for the ceilings.
Writes base_models.md and base_models.png into --output_dir.
"""

import argparse
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler
from tqdm.auto import tqdm

from diffusers_ext.core.images import as_tensor, save_grid
from diffusers_ext.metrics.comparison import frechet_interval, markdown_table, proportion
from diffusers_ext.metrics.frechet import frechet_distance
from diffusers_ext.testbed import fashion_scenes
from diffusers_ext.testbed.base_training import reconstruct
from diffusers_ext.testbed.embedded import card_dir
from diffusers_ext.testbed.grader import grade, load_grader, scene_features
from diffusers_ext.testbed.runs import held_out_prompts, load_reference, run_garments, run_scenes


def main() -> None:
    """Reads the arguments, runs both models and writes the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train_data_dir", default=str(fashion_scenes.SAMPLE_DIR))
    parser.add_argument("--output_dir", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--num_images", type=int, default=1000)
    parser.add_argument("--guidance_scales", type=float, nargs="+", default=[1.0, 1.5, 2.0, 3.0, 5.0])
    parser.add_argument("--num_inference_steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    torch.set_grad_enabled(False)
    text = f"## Fashion Scenes\n\n{scenes(args)}\n\n## Fashion DDPM\n\n{garments(args)}\n"
    (args.output_dir / "base_models.md").write_text(text)
    print(text)


def _load(name: str) -> DiffusionPipeline:
    pipe = DiffusionPipeline.from_pretrained(card_dir(name), dtype=torch.float32)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def scenes(args: argparse.Namespace) -> str:
    """The table of the text-to-image model: two ceilings, then the model by guidance scale."""
    pipe, reference, n = _load("fashion-scenes"), load_reference("scenes-test"), args.num_images
    real, prompts = fashion_scenes.scene_arrays(args.train_data_dir, "test", n, seed=args.seed)
    decoded = reconstruct(pipe.vae, as_tensor(real))  # type: ignore[attr-defined]
    results = {
        "real test scenes": (scene_features(load_grader(), real), grade(load_grader(), real, prompts)),
        "the same through the autoencoder": (
            scene_features(load_grader(), decoded),
            grade(load_grader(), decoded, prompts),
        ),
    }
    for w in tqdm(args.guidance_scales, desc="guidance scales"):
        run = run_scenes(
            pipe,
            held_out_prompts(n, args.seed),
            seed=args.seed,
            num_inference_steps=args.num_inference_steps,
            guidance_scale=w,
        )
        results[f"guidance {w:g}"] = (run.features, run.grades)
        if w == 2:
            save_grid(as_tensor(run.images[:48]), 8, args.output_dir / "base_models.png")
    rows = [
        [
            name,
            *(proportion(grades[k]).format(1, 100) for k in ("aligned", "item", "color")),
            frechet_interval(features, reference).format(2),
        ]
        for name, (features, grades) in results.items()
    ]
    floor = frechet_distance(load_reference("scenes-train"), reference)
    header = ["", "prompt accuracy, %", "items, %", "colours, %", "Fréchet distance"]
    return (
        markdown_table(header, rows) + f"\n\n{n} images a row, held-out prompts, DPM++ 2M,"
        f" {args.num_inference_steps} steps; 95% intervals; floor (8,000 real train against test scenes) {floor:.2f}."
    )


def garments(args: argparse.Namespace) -> str:
    """The table of the pixel model."""
    pipe, reference = _load("fashion-ddpm"), load_reference("garments-test")
    rows = []
    for steps in (10, 20, 50):
        run = run_garments(pipe, args.num_images, seed=args.seed, num_inference_steps=steps)
        rows.append([f"DPM++ 2M, {steps} steps", frechet_interval(run.features, reference).format(3)])
    floor = frechet_distance(load_reference("garments-train"), reference)
    rows.append(["floor: real train against test garments", f"{floor:.3f}"])
    save_grid(as_tensor(run.images[:64]), 16, args.output_dir / "fashion_ddpm.png")
    return (
        markdown_table(["", "Fréchet distance"], rows) + f"\n\n{args.num_images} images a row; 95% intervals."
    )


if __name__ == "__main__":
    main()
