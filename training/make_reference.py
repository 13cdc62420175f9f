"""Writes features of real images next to a grader, to which generated images are compared.

    python training/make_reference.py --train_data_dir DIR --grader model_cards/fashion-grader
    python training/make_reference.py --train_data_dir DIR --grader model_cards/fashion-judge

`*-test` are held-out combinations and garments that this grader was not trained on; the documentation reports
distances to them. `*-train` are training combinations and garments that it was trained on. Of each there are the
statistics, and of `*-test` also rows of features, of other draws of the same garments.
"""

import argparse
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from diffusers_ext.metrics.frechet import FeatureStats, frechet_distance
from diffusers_ext.testbed import fashion_scenes
from diffusers_ext.testbed.grader import garment_features, grade, read_grader, scene_features
from diffusers_ext.training.arguments import positive_int


def main() -> None:
    """Parses the arguments, writes six files, and prints the distances and the grader's accuracy."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train_data_dir", default=None, help="folder with Fashion-MNIST's idx files")
    parser.add_argument("--grader", required=True, type=Path, help="folder of a trained grader")
    parser.add_argument("--num_scenes", type=positive_int, default=8000)
    parser.add_argument("--num_rows", type=positive_int, default=4000, help="rows of features to keep")
    args = parser.parse_args()
    grader, n = read_grader(args.grader), args.num_scenes
    kept = {}
    for split in ("train", "test"):
        source = grader.trained_on if split == "train" else grader.unseen
        garments, items = fashion_scenes.load_garments(args.train_data_dir, source)
        scenes, prompts = fashion_scenes.compose(split, garments, items, n, seed=1)
        stats = {"scenes": scene_features(grader, scenes), "garments": garment_features(grader, garments)}
        kept[split] = garments, items, stats
        for kind, features in stats.items():
            FeatureStats.of(features).save(args.grader / f"{kind}-{split}.safetensors")
        right = grade(grader, scenes, prompts)
        print(f"{split}: real scenes graded right {np.mean(right['aligned']):.4f}")
        print(f"{split}: colours graded right {np.mean(right['color']):.4f}")
        singles = np.repeat(garments[..., None], 3, -1)
        white = [f"a white {fashion_scenes.ITEMS[i]}" for i in items]
        padded = np.pad(singles, ((0, 0), (0, 0), (16, 16), (0, 0)))
        print(f"{split}: items {np.mean(grade(grader, padded, white)['item']):.4f} of {len(items)}")
    garments, items, stats = kept["test"]
    more, _ = fashion_scenes.compose("test", garments, items, args.num_rows, seed=2)
    chosen = np.random.default_rng(2).permutation(len(garments))[: args.num_rows]
    rows = {"scenes": scene_features(grader, more), "garments": stats["garments"][chosen]}
    for kind, features in rows.items():
        save_file({"features": features.astype(np.float16)}, args.grader / f"{kind}-test-rows.safetensors")
        a, b = (FeatureStats.load(args.grader / f"{kind}-{s}.safetensors") for s in ("train", "test"))
        print(f"{kind}: train against test {frechet_distance(a, b):.4f}")


if __name__ == "__main__":
    main()
