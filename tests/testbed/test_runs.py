"""What a run of the testbed's models carries, and the references that it is compared with."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline

from diffusers_ext.metrics.frechet import FeatureStats, frechet_distance
from diffusers_ext.testbed.embedded import card_dir
from diffusers_ext.testbed.grader import garment_features, grade, load_grader, scene_features
from diffusers_ext.testbed.judge import load_judge
from diffusers_ext.testbed.runs import (
    GRADERS,
    REFERENCES,
    Run,
    load_reference,
    load_rows,
    run_garments,
    run_scenes,
)

PROMPTS = ["a red bag", "a blue boot left of a green coat", "a white dress"]


def _load(name):
    pipe = DiffusionPipeline.from_pretrained(card_dir(name), dtype=torch.float32)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_scenes_carry_the_results_of_both_graders():
    run = run_scenes(_load("fashion-scenes"), PROMPTS, num_inference_steps=2, guidance_scale=2.0)
    first, second = grade(load_grader(), run.images, PROMPTS), grade(load_judge(), run.images, PROMPTS)
    assert list(run.grades) == [*first, *(f"judge_{name}" for name in first)]
    for name in first:
        assert np.array_equal(run.grades[name], first[name])
        assert np.array_equal(run.grades[f"judge_{name}"], second[name])
    assert np.array_equal(run.features, scene_features(load_grader(), run.images))
    assert np.array_equal(run.judge_features, scene_features(load_judge(), run.images))
    assert run.calls == 2
    joined = Run.join([run, run], extra_calls=0.5)
    assert joined.calls == 2.5
    assert len(joined.features) == len(joined.judge_features) == len(joined.grades["judge_item"]) == 6


def test_garments_carry_the_features_of_both_graders():
    run = run_garments(_load("fashion-ddpm"), 2, num_inference_steps=2)
    assert np.array_equal(run.features, garment_features(load_grader(), run.images))
    assert np.array_equal(run.judge_features, garment_features(load_judge(), run.images))


@pytest.mark.parametrize("grader", GRADERS)
@pytest.mark.parametrize("kind", ["scenes", "garments"])
def test_rows_are_of_the_distribution_of_the_reference(kind, grader):
    rows, reference = load_rows(f"{kind}-test", grader), load_reference(f"{kind}-test", grader)
    assert rows.shape == (4000, len(reference.mean))
    assert rows.dtype == np.float64
    # The distance of two samples of one distribution is about tr(Σ)/n each, where features with few large values
    # need more rows; other classes of garments, or no colours, are many times farther.
    near = frechet_distance(FeatureStats.of(rows), reference)
    assert near < 5 * np.trace(reference.covariance) / len(rows) + 0.05 * np.trace(reference.covariance)
    assert all(load_reference(name, grader).num_samples == 8000 for name in REFERENCES[:2])


def test_other_names_are_refused():
    with pytest.raises(
        ValueError, match="No grader is called 'judge': expected fashion-grader or fashion-judge"
    ):
        load_reference("scenes-test", "judge")
    with pytest.raises(
        ValueError, match="no rows called 'scenes-train': expected scenes-test or garments-test"
    ):
        load_rows("scenes-train")
