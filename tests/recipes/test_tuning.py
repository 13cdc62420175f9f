"""`tune`: its front is that of a closed form, on images that did not choose it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import diffusers_ext as dx
from diffusers_ext.core.halving import halve, rung_sizes
from diffusers_ext.metrics.estimate import Estimate
from diffusers_ext.recipes import tuning
from diffusers_ext.recipes.front import Front, Point, layers
from tests import tiny
from tests.contract.test_contract import METHODS, traces

pytestmark = pytest.mark.filterwarnings("ignore")

PROMPTS = [f"a {letter * 3}" for letter in "abcdefgh"]
SIZE = {"height": 8, "width": 8, "progress": False}


def teleported(pipe: Any) -> Any:
    return METHODS["teleport"].apply(pipe, "sd")


class ClosedForm:
    """In place of the pipeline's images: seconds and scores of a call are functions of its steps and methods."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, noise: float = 0.0) -> None:
        self.now, self.noise, self.seen = 0.0, noise, list[tuple[str, range]]()
        monkeypatch.setattr(tuning._Measurement, "_generate", self.generate)
        monkeypatch.setattr(tuning.time, "perf_counter", lambda: self.now)

    def generate(self, run: Any, rows: range) -> np.ndarray:
        steps, fast = run.recipe.call["num_inference_steps"], bool(run.methods.methods)
        self.now += len(rows) * steps * (0.6 if fast else 1.0)
        self.seen.append((f"{steps}{'t' if fast else ''}", rows))
        # Teleportation takes 0.6 of the time and has the score of twice as many steps, up to 8.
        score = 1 - 1 / (min(2 * steps, 8) if fast else steps)
        rng = np.random.default_rng([steps, fast, rows.start])
        images = np.full((len(rows), 1, 1, 3), score) + self.noise * rng.normal(size=(len(rows), 1, 1, 1))
        return images.astype(np.float32)


def value(images: np.ndarray, prompts: Any) -> np.ndarray:
    return images.mean((1, 2, 3))


def test_the_front_of_a_closed_form(monkeypatch: pytest.MonkeyPatch) -> None:
    form = ClosedForm(monkeypatch)
    pipe = tiny.build("sd")
    before = traces(pipe)
    front = dx.tune(
        pipe,
        PROMPTS,
        value,
        budget=240,
        steps=(2, 4, 8, 16),
        methods=[None, teleported],
        rungs=1,
        **SIZE,
    )
    assert traces(pipe) == before
    # Of 8 candidates 4 are left: the front is 2t, 4t and plain 16; plain 8 is slower than 4t and not better.
    found = [(str(point.recipe.call["num_inference_steps"]), len(point.recipe.methods)) for point in front]
    assert found == [("2", 1), ("4", 1), ("16", 0)]
    assert [point.seconds for point in front] == pytest.approx([1.2, 2.4, 16])
    assert [point.score.value for point in front] == pytest.approx([0.75, 0.875, 1 - 1 / 16])
    assert len(front.others) == 1
    # The last images are not those that chose: a budget of 240 in 2 rungs is 15 images for 8 and 30 for 4.
    images: dict[str, set[int]] = {}
    for name, rows in form.seen[1:]:
        images.setdefault(name, set()).update(rows)
    assert images["8t"] == set(range(15)) or images["8t"] == set(range(45))
    assert images["16"] == images["2t"] == images["4t"] == set(range(45))
    assert all("30 images of 8 prompts" in str(point.recipe.figures["score"]) for point in front)


def test_noise_makes_intervals_and_few_candidates_one_rung(monkeypatch: pytest.MonkeyPatch) -> None:
    ClosedForm(monkeypatch, noise=0.1)
    (point,) = dx.tune(tiny.build("sd"), PROMPTS, value, budget=400, steps=(4,), **SIZE)
    assert point.score.low < 0.75 < point.score.high
    # 2 · 2.36 · .1/√400 = .024 with 7 degrees of freedom, of which the standard error has a quarter of itself as its own.
    assert 0.008 < point.score.high - point.score.low < 0.05
    front = dx.tune(
        tiny.build("sd"),
        ["a aaa"],
        lambda images, prompts: np.ones(len(images)),
        budget=40,
        steps=(2, 4),
        **SIZE,
    )
    assert [p.score.high for p in front] == pytest.approx([1.0])
    assert front[0].score.low < 1  # Wilson's interval, since all scores are 0 or 1


def test_the_best_plain_candidate_stays_as_the_control(monkeypatch: pytest.MonkeyPatch) -> None:
    ClosedForm(monkeypatch)
    # 8 steps with teleportation are as good as plain 8 and faster, and so on: no plain candidate is on the front.
    front = dx.tune(
        tiny.build("sd"), PROMPTS, value, budget=200, steps=(1, 2, 3, 4), methods=[None, teleported], **SIZE
    )
    points = [*front, *front.others]
    assert len(points) == 2
    assert [len(p.recipe.methods) for p in front] == [1]
    assert [p.recipe.call["num_inference_steps"] for p in front.others] == [4]


def test_a_result_is_a_recipe_that_runs(tmp_path: Path) -> None:
    seen: list[np.ndarray] = []

    def scorer(images: np.ndarray, prompts: Any) -> np.ndarray:
        seen.append(images)
        return images.mean((1, 2, 3))

    pipe = tiny.build("sd")
    plain = tiny.images(pipe, "sd")
    recipe = dx.Recipe.from_pipe(teleported(tiny.build("sd")))
    recipe.save_pretrained(tmp_path)
    front = dx.tune(
        pipe,
        PROMPTS[:2],
        scorer,
        budget=4,
        steps=(3,),
        guidance=(2.0,),
        methods=[tmp_path],
        batch_size=2,
        **SIZE,
    )
    (point,) = front
    assert point.recipe.call == {"num_inference_steps": 3, "height": 8, "width": 8, "guidance_scale": 2.0}
    assert torch.equal(tiny.images(pipe, "sd"), plain)
    with point.recipe.on(pipe):
        generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
        images = pipe(PROMPTS[:2], **point.recipe.call, generator=generators, output_type="np").images
    assert np.array_equal(images, seen[0])
    assert "| teleportation, 3 steps, guidance 2 |" in str(front)
    point.recipe.save_pretrained(tmp_path / "best")
    assert dx.Recipe.from_pretrained(tmp_path / "best").call == point.recipe.call


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def tune(pipe: Any = None, prompts: Any = PROMPTS, **options: Any) -> None:
        dx.tune(pipe or tiny.build("sd"), prompts, value, **{**SIZE, **options})

    with pytest.raises(ValueError, match="DDPMPipeline takes no prompts"):
        tune(tiny.build("ddpm"))
    with pytest.raises(ValueError, match="one or more texts in a list"):
        tune(prompts="a aaa")
    with pytest.raises(ValueError, match="tune sets generator itself"):
        tune(generator=None)
    with pytest.raises(ValueError, match=r"needs a plain pipeline, and this .* has teleport"):
        tune(teleported(tiny.build("sd")))
    with pytest.raises(ValueError, match=r"budget of 20 images is too small for 6 candidates.*of 36 or more"):
        tune(budget=20)
    with pytest.raises(ValueError, match="eta must be 2 or more"):
        tune(eta=1)
    with pytest.raises(ValueError, match="nothing to choose from"):
        tune(steps=())
    with pytest.raises(ValueError, match="No method that a recipe can have"):
        tune(methods=[lambda pipe: pipe])
    ClosedForm(monkeypatch, noise=float("nan"))
    with pytest.raises(ValueError, match="one finite number per image"):
        tune()


def test_a_function_that_fails_leaves_the_pipeline_plain() -> None:
    def fails(pipe: Any) -> None:
        teleported(pipe)
        raise RuntimeError("half way")

    pipe = tiny.build("sd")
    with pytest.raises(RuntimeError, match="half way"):
        dx.tune(pipe, PROMPTS, value, methods=[fails], **SIZE)
    assert not dx.summary(pipe).methods


def test_layers_of_points() -> None:
    points = [(1.0, 0.5), (2.0, 0.9), (2.0, 0.8), (3.0, 0.9), (1.0, 0.5), (4.0, 0.95)]
    assert layers(points) == [[0, 1, 4, 5], [2, 3]]


def test_halving() -> None:
    assert rung_sizes(9, 3, 2) == [9, 4, 2]
    with pytest.raises(ValueError, match="need 4 candidates or more, got 3"):
        rung_sizes(3, 3, 2)
    kept = list(halve([3, 1, 2, 4], [4, 2, 1], lambda running, rung: sorted(running), control=4))
    assert kept == [(1, 2, 4), (1, 4), ()]


def test_the_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    recipe = dx.Recipe.from_pipe(teleported(tiny.build("sd")), {"num_inference_steps": 4})
    points = [
        Point(recipe, s, Estimate(v, v - 0.1, v + 0.1)) for s, v in ((1.0, 0.5), (2.0, 0.9), (3.0, 0.8))
    ]
    Front.of(points).plot(tmp_path / "front.png")
    assert (tmp_path / "front.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_the_embedded_model_needs_fewer_steps_with_teleportation() -> None:
    from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler

    from diffusers_ext.golden_noise.scorers import load_scorer
    from diffusers_ext.testbed.embedded import card_dir
    from diffusers_ext.testbed.runs import held_out_prompts

    pipe: Any = DiffusionPipeline.from_pretrained(card_dir("fashion-scenes"))
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    stats = dx.GaussianStats.from_pretrained(card_dir("fashion-scenes") / "gaussian")
    front = dx.tune(
        pipe,
        held_out_prompts(32, 0),
        load_scorer("fashion-grader"),
        budget=240,
        steps=(2, 4, 8),
        methods=[None, lambda pipe: dx.apply_teleport(pipe, stats, skip=0.34)],
        rungs=1,
        guidance=(2.0,),
        height=32,
        width=64,
        progress=False,
    )
    assert [p.seconds for p in front] == sorted(p.seconds for p in front)
    assert [p.score.value for p in front] == sorted(p.score.value for p in front)
    assert max(p.score.value for p in front) > 0.85  # the benchmarks have 0.93 for DPM++ in 6 to 10 steps
