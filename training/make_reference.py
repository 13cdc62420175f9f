"""Writes feature statistics of real images next to the grader, for the Fréchet distances.

    python training/make_reference.py --train_data_dir DIR --grader model_cards/fashion-grader

The documentation reports distances to `*-test`. The distance between `*-train` and `*-test` is the lowest to
expect.
"""

import argparse
from pathlib import Path

import numpy as np

from diffusers_ext.metrics.frechet import FeatureStats, frechet_distance
from diffusers_ext.testbed import fashion_scenes
from diffusers_ext.testbed.grader import GarmentClassifier, garment_features, grade, scene_features
from diffusers_ext.training.arguments import positive_int


def main() -> None:
    """Parses the arguments, writes four files, and prints the distances and the grader's accuracy."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train_data_dir", default=None, help="folder with Fashion-MNIST's idx files")
    parser.add_argument("--grader", required=True, help="folder of the trained grader")
    parser.add_argument("--num_scenes", type=positive_int, default=8000)
    args = parser.parse_args()
    grader = GarmentClassifier.from_pretrained(args.grader).float().eval()
    for split in ("train", "test"):
        scenes, prompts = fashion_scenes.scene_arrays(args.train_data_dir, split, args.num_scenes, seed=1)
        garments, items = fashion_scenes.load_garments(args.train_data_dir, split)
        stats = {"scenes": scene_features(grader, scenes), "garments": garment_features(grader, garments)}
        for kind, features in stats.items():
            FeatureStats.of(features).save(Path(args.grader) / f"{kind}-{split}.safetensors")
        right = grade(grader, scenes, prompts)
        print(f"{split}: real scenes graded right {np.mean(right['aligned']):.4f}")
        singles = np.repeat(garments[..., None], 3, -1)
        white = [f"a white {fashion_scenes.ITEMS[i]}" for i in items]
        padded = np.pad(singles, ((0, 0), (0, 0), (16, 16), (0, 0)))
        print(f"{split}: items {np.mean(grade(grader, padded, white)['item']):.4f} of {len(items)}")
    for kind in ("scenes", "garments"):
        a, b = (FeatureStats.load(Path(args.grader) / f"{kind}-{s}.safetensors") for s in ("train", "test"))
        print(f"{kind}: train against test {frechet_distance(a, b):.4f}")


if __name__ == "__main__":
    main()
