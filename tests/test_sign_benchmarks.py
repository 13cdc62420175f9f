"""What the pages of SIGN compute besides images: equal times, grades of edits, and what is shown of a method."""

import argparse
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import sign_candidates, sign_editing, sign_editing_runs, sign_text
from benchmarks.framework.samples import JUDGES, Samples
from benchmarks.framework.statistics import Statistics
from benchmarks.sign_runs import corrupt
from diffusers_ext.sign.arguments import add_sign_arguments, parse, scores_of, weights_of
from diffusers_ext.testbed.fashion_scenes import SAMPLE_DIR, load_garments, parse_caption, render
from diffusers_ext.training.arguments import add_training_arguments

TRAINED = {**sign_candidates.CANDIDATES, **sign_text.CONTROLS}


def arguments(options: dict[str, Any]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_sign_arguments(parser)
    add_training_arguments(parser)
    given = [part for key, value in options.items() for part in (f"--{key}", str(value))]
    return parse(parser, ["--output_dir", "", *given])


@pytest.mark.parametrize("name", list(TRAINED))
def test_every_training_is_one_of_the_script_and_of_its_own(name: str) -> None:
    made = {}
    for other, options in TRAINED.items():
        args = arguments(options)
        made[other] = weights_of(args), scores_of(args, 1.0), args.learning_rate, args.rank
    default = {sign_candidates.DEFAULT, sign_text.OURS}
    same = {other for other, value in made.items() if value == made[name]}
    # The two pages have the default, consistency and regression by names of their own.
    assert same == {name} | (default if name in default else set())


def test_time_of_the_images_of_the_teacher_is_taken_off() -> None:
    names = (sign_candidates.DEFAULT, sign_candidates.REGRESSION, "consistency: flow, rec")
    times = {name: np.array([0.5, 2.0, 9.0]) for name in names} | {"pair": np.array([0.02, 0.01, 0.5])}
    s = sign_candidates.Settings(names, seconds=100, pairs=1000)
    found = {name: sign_candidates.steps_of(name, times, s) for name in names}
    # 100 s, and 1000 pairs of 0.02 s less, at 2 s a step.
    assert found == dict(zip(names, (50, 40, 50)))
    text = sign_text.Settings(seconds=100, drawn=100, draw_steps=5)
    seconds = {name: np.array([2.0]) for name in sign_text.CONTROLS} | {"image": np.array([0.04])}
    steps = {name: sign_text.steps_of(name, seconds, text) for name in sign_text.CONTROLS}
    assert set(steps.values()) == {50, 40}
    assert {name for name, count in steps.items() if count == 40} == {sign_text.SFT, "regression: reg"}


def test_intervals_are_over_training_seeds() -> None:
    found = sign_candidates.over_seeds(np.array([1.0, 2.0, 3.0]))
    # 4.303 is the quantile of Student's t with two degrees of freedom, of which the approximation is 4% larger.
    assert (found.value, found.high) == pytest.approx((2, 2 + 4.303 / 3**0.5), rel=0.03)
    assert np.isnan(sign_candidates.over_seeds(np.array([1.0])).value)


@pytest.mark.parametrize("kind", sign_editing_runs.KINDS)
def test_edits_are_graded_word_by_word(kind: str) -> None:
    real, prompts, targets = sign_editing_runs.to_edit(SAMPLE_DIR, kind, 60)
    assert all(len(parse_caption(text)) == 2 for text in prompts)
    assert all(a != b for a, b in zip(prompts, targets))
    images = real.astype(np.float32) / 255
    for load in JUDGES.values():
        new, kept = sign_editing_runs.words(load(), images, targets, kind)
        # Nothing was edited yet: the new word is wrong but for errors of the grader, the others are right.
        assert new.mean() < 0.1
        if kind != sign_editing_runs.REMOVED:
            assert kept.mean() > 0.8
            assert sign_editing_runs.words(load(), images, prompts, kind)[0].mean() > 0.85
    if kind == sign_editing_runs.REMOVED:
        garments, items = load_garments(SAMPLE_DIR, "test")
        alone = np.stack(list(render([parse_caption(text) for text in targets], garments, items, 0))) / 255
        assert all(part.mean() > 0.85 for part in sign_editing_runs.words(load(), alone, targets, kind))


def test_what_is_shown_of_a_method_is_its_best_strength() -> None:
    how = [("SIGN", 1, 0.3), ("SIGN", 1, 0.5), ("SDEdit", 10, 0.5), ("SDEdit", 1, 0.5), ("SDEdit", 1, 2.0)]
    scores = dict(zip(how, (0.1, 0.4, 0.2, 0.3, 0.1)))
    found = {h: Samples({"score": np.array([scores[h]])}, np.zeros(1)) for h in how}
    chosen = sign_editing.best(found, lambda one: one.rows["score"].mean())
    assert chosen == [("SIGN", 1, 0.5), ("SDEdit", 10, 0.5), ("SDEdit", 1, 0.5)]


def test_variance_is_within_a_prompt_and_relative_to_real_images() -> None:
    prompts, near = np.repeat(["a", "b", "c"], 2), np.array([[0.0], [1.0], [50.0], [53.0], [9.0], [9.5]])
    ours, scenes = (Samples({"features grader": scale * near, "prompts": prompts}, near) for scale in (2, 1))
    found = sign_text.variance(Statistics("scenes", 50), sign_text.Shown(ours, 1), scenes)
    assert (found.value, found.low, found.high) == pytest.approx((4, 4, 4))
    alone = Samples({"features grader": near, "prompts": np.arange(6).astype(str)}, near)
    assert np.isnan(sign_text.variance(Statistics("scenes", 50), sign_text.Shown(alone, 1), alone).value)


def test_corruptions_of_scenes() -> None:
    data = torch.zeros(2, 3, 32, 64)
    masked = (corrupt(data, "mask") == -1)[0, 0]
    assert masked.sum(0).nonzero()[:, 0].tolist() == [*range(12, 20), *range(44, 52)]
    hit = corrupt(data, "salt and pepper")
    assert torch.equal(hit[:, 0], hit[:, 2])
    assert 0.05 < float((hit != 0).float().mean()) < 0.15
