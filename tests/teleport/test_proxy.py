"""TeleportScheduler as a stand-in for the scheduler that it wraps: the same in every respect with nothing to skip,
and consistent with itself while it skips steps."""

import copy
import inspect
import pickle
import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from diffusers_ext.core.schedules import SUPPORTED, first_order_scheduler, inverse_scheduler
from diffusers_ext.teleport.scheduler import TeleportScheduler
from tests import tiny

SHAPE = (2, 2, 4)

# Every supported scheduler is made with each of these that its class and diffusers' own checks accept.
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True},
    "lu": {"use_lu_lambdas": True},
    "v": {"prediction_type": "v_prediction"},
    "sample": {"prediction_type": "sample"},
    "trailing": {"timestep_spacing": "trailing"},
    "leading": {"timestep_spacing": "leading", "steps_offset": 1},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "trained": {"trained_betas": [0.001 + 0.00002 * i for i in range(1000)]},
    "zero-snr": {
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
        "prediction_type": "v_prediction",
    },
    "continuous": {"timestep_type": "continuous", "prediction_type": "v_prediction"},
    "flow": {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"},
    "flow-dynamic": {
        "use_flow_sigmas": True,
        "use_dynamic_shifting": True,
        "prediction_type": "flow_prediction",
    },
    "shift": {"shift": 3.0},
    "dynamic": {"use_dynamic_shifting": True},
    "terminal": {"shift": 2.0, "shift_terminal": 0.1},
    "stochastic": {"stochastic_sampling": True},
    "sde": {"algorithm_type": "sde-dpmsolver++"},
    "prk": {"skip_prk_steps": True},
}


def configurations() -> Iterator[tuple[str, str]]:
    for name in SUPPORTED:
        arguments = inspect.signature(getattr(diffusers, name).__init__).parameters
        for label, options in OPTIONS.items():
            refused = name == "DEISMultistepScheduler" and label == "sde"
            if set(options) <= set(arguments) and not refused:
                yield name, label


def plain_and_off(name: str, label: str) -> tuple[Any, Any]:
    def make() -> Any:
        return getattr(diffusers, name)(**OPTIONS[label])

    return make(), TeleportScheduler(make(), tiny.gaussian(SHAPE), 0.0)


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def same(x: Any, y: Any) -> bool:
    """Whether two results are equal bit by bit, NaN included."""
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        equal = torch.equal(torch.nan_to_num(x), torch.nan_to_num(y)) and torch.equal(x.isnan(), y.isnan())
        return x.dtype == y.dtype and x.shape == y.shape and equal
    if isinstance(x, np.ndarray):
        return x.dtype == y.dtype and np.array_equal(x, y, equal_nan=x.dtype.kind == "f")
    if isinstance(x, dict):
        return type(x) is type(y) and list(x) == list(y) and all(same(x[key], y[key]) for key in x)
    if isinstance(x, list | tuple):
        return type(x) is type(y) and len(x) == len(y) and all(map(same, x, y))
    return type(x) is type(y) and bool(x == y or x is y or x != x)


def outcome(call: Callable[[], Any]) -> Any:
    """The result, or the type and the message of the error."""
    try:
        return call()
    except Exception as error:
        return type(error), str(error)


def attributes(scheduler: Any) -> list[str]:
    """All names that read a value, private ones included."""
    special = {name for name in dir(scheduler) if name.startswith("__")}
    methods = {name for name in dir(type(scheduler)) if callable(getattr(type(scheduler), name))}
    return sorted(set(dir(scheduler)) - special - methods - {"_compatibles"})


def check_attributes(plain: Any, off: Any) -> None:
    for name in attributes(plain):
        assert same(outcome(lambda n=name: getattr(plain, n)), outcome(lambda n=name: getattr(off, n))), name
    assert len(plain) == len(off)
    assert same(dict(plain.config), dict(off.config))
    assert vars(plain.config).keys() == vars(off.config).keys()


def _choose_schedule(draw: random.Random, plain: Any) -> dict[str, Any]:
    parameters = inspect.signature(plain.set_timesteps).parameters
    steps = draw.choice([1, 2, 5, 7])
    if plain.__class__.__name__ == "PNDMScheduler":
        steps += 10
    chosen: dict[str, Any] = {"num_inference_steps": steps}
    custom = [n for n in ("timesteps", "sigmas") if n in parameters]
    if custom and draw.random() < 0.4:
        which = draw.choice(custom)
        times = sorted(draw.sample(range(1, 999), 5), reverse=True)
        low = "FlowMatch" in type(plain).__name__ or plain.config.get("use_flow_sigmas")
        top = 1000 if low else 70
        chosen = {which: times if which == "timesteps" else [t / top for t in times]}
        if which == "sigmas" and type(plain) is diffusers.EulerDiscreteScheduler:
            chosen[which] = [*chosen[which], 0.0]
    if plain.config.get("use_dynamic_shifting") and draw.random() < 0.9:
        chosen["mu"] = draw.choice([0.5, 1.1])
    return chosen


class Both:
    """Makes the same call on the plain scheduler and on the wrapped one, and compares."""

    def __init__(self, plain: Any, off: Any, draw: random.Random) -> None:
        self.plain, self.off, self.draw = plain, off, draw
        self.x = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(draw.randrange(100)))

    def __call__(self, call: Callable[[Any], Any]) -> Any:
        torch.manual_seed(7)
        expected = outcome(lambda: call(self.plain))
        torch.manual_seed(7)
        result = outcome(lambda: call(self.off))
        assert same(expected, result), (expected, result)
        return expected

    def timestep(self) -> Any:
        return self.draw.choice(list(self.plain.timesteps))

    def schedule(self) -> None:
        chosen = _choose_schedule(self.draw, self.plain)
        self(lambda s: s.set_timesteps(**chosen))

    def begin(self) -> None:
        index = self.draw.randrange(4)
        self(lambda s: s.set_begin_index(index))

    def run(self) -> None:
        """A few steps of a pipeline's loop, from the start or as for image-to-image."""
        start, generated = self.draw.choice([0, 0, 2]), self.draw.random() < 0.7
        self(lambda s: s.set_begin_index(start * s.order)) if self.draw.random() < 0.5 else None
        x = self.x
        for number, t in enumerate(self.plain.timesteps[start * self.plain.order :][:5]):
            found = self.one_step(number, t, x, generated)
            if isinstance(found, tuple) and isinstance(found[0], type):
                return
            x = found[0] if isinstance(found, tuple) else found.prev_sample

    def one_step(self, number: int, t: Tensor, x: Tensor, generated: bool) -> Any:
        if self.draw.random() < 0.9:
            self(lambda s: s.scale_model_input(x, t))

        def step(scheduler: Any) -> Any:
            named: dict[str, Any] = {"return_dict": False} if number % 2 else {}
            if generated and "generator" in inspect.signature(scheduler.step).parameters:
                named["generator"] = torch.Generator().manual_seed(number)
            return scheduler.step(torch.sin(3 * x + number), t, x, **named)

        return self(step)

    def noise(self) -> None:
        t = self.timestep().repeat(2)
        name = self.draw.choice(["add_noise", "scale_noise"])
        self(lambda s: getattr(s, name)(self.x, self.x.flip(0), t))
        self(lambda s: getattr(s, name)(self.x, t, self.x.flip(0)))

    def look_up(self) -> None:
        t = self.timestep()
        self(lambda s: s.index_for_timestep(t))
        self(lambda s: s.index_for_timestep(t, s.timesteps))
        self(lambda s: s.scale_model_input(self.x, t))
        self(lambda s: s._get_variance(int(t)))
        self(lambda s: s.no_such_attribute)
        self(lambda s: s._no_such_attribute)
        self(lambda s: s.init_noise_sigma)
        self(lambda s: s.get_velocity(self.x, self.x, t.repeat(2).long()))

    def write(self) -> None:
        for name in ("alphas_cumprod", "betas", "timesteps", "sigmas", "num_inference_steps", "_step_index"):
            self(lambda s, n=name: setattr(s, n, getattr(s, n)))
        self(lambda s: setattr(s, "alphas_cumprod", s.alphas_cumprod * 0.999))
        self(lambda s: setattr(s, "timesteps", s.timesteps.clone()))
        self(lambda s: setattr(s, "sigmas", s.sigmas * 1.0))
        self(lambda s: setattr(s, "step_index", 3))
        self(lambda s: setattr(s, "mine", 3))
        self(lambda s: s.mine)
        self(lambda s: delattr(s, "mine"))
        self(lambda s: delattr(s, "mine"))
        self(lambda s: s.sigmas.__setitem__(-1, s.sigmas[-2]))
        self(lambda s: s.register_to_config(mine=1))
        if self.plain.config.get("steps_offset") is not None:
            self(lambda s: setattr(s, "_internal_dict", type(s.config)({**s.config, "steps_offset": 1})))
        self(lambda s: s.set_shift(2.0))

    def copies(self) -> None:
        way = self.draw.choice([copy.copy, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
        before, inner = self.off, self.off.inner
        self.plain, self.off = way(self.plain), way(self.off)
        assert self.off is not before
        assert self.off.inner is not inner

    def convert(self) -> None:
        made = self.draw.choice(SUPPORTED)
        self(lambda s: dict(getattr(diffusers, made).from_config(s.config).config))
        self(lambda s: sorted(c.__name__ for c in s.compatibles))


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("name", "label"), list(configurations()))
def test_off_is_the_wrapped_scheduler_in_every_respect(name: str, label: str, seed: int) -> None:
    draw = random.Random(f"{name} {label} {seed}")
    both = Both(*plain_and_off(name, label), draw)
    check_attributes(both.plain, both.off)
    both.schedule()
    actions = [both.schedule, both.begin, both.run, both.noise, both.look_up, both.write, both.copies]
    for action in draw.choices([*actions, both.convert, both.run], k=14):
        action()
        check_attributes(both.plain, both.off)


# -- while steps are skipped


INDEXED = [
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
]
INDEXED += [
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "EDMEulerScheduler",
    "FlowMatchEulerDiscreteScheduler",
]


def skipping(name: str, mean_from: str, steps: int = 10, **options: Any) -> TeleportScheduler:
    inner = getattr(diffusers, name)(**options)
    teleport = TeleportScheduler(inner, tiny.gaussian(SHAPE), 0.4, mean_from=mean_from)
    teleport.set_timesteps(steps)
    return teleport


def shown(teleport: Any, x: Tensor, t: Any) -> Tensor:
    if hasattr(teleport, "scale_model_input"):
        return teleport.scale_model_input(x, t)
    return teleport.map_model_input(x, t)


@pytest.mark.parametrize("mean_from", ["stats", "first_call"])
@pytest.mark.parametrize("name", INDEXED)
def test_the_reads_are_consistent_while_steps_are_skipped(name: str, mean_from: str) -> None:
    teleport = skipping(name, mean_from)
    inner = teleport.inner
    x = torch.randn(2, *SHAPE)
    assert len(teleport.sigmas) - len(teleport.timesteps) == len(inner.sigmas) - len(inner.timesteps)
    for i, t in enumerate(teleport.timesteps):
        model_input = shown(teleport, x, t)
        if i or teleport.step_index is not None:
            assert teleport.step_index == teleport._step_index == i
            assert teleport.sigmas[teleport.step_index] == inner.sigmas[inner.step_index]
        assert teleport.begin_index == teleport._begin_index
        assert teleport.timesteps[teleport.index_for_timestep(t)] == t
        assert teleport.timesteps[teleport.index_for_timestep(t, teleport.timesteps)] == t
        x = teleport.step(torch.sin(model_input), t, x).prev_sample
        assert teleport.step_index == teleport._step_index == i + 1


@pytest.mark.parametrize("mean_from", ["stats", "first_call"])
@pytest.mark.parametrize("name", INDEXED)
def test_the_grid_may_be_moved_but_not_changed(name: str, mean_from: str) -> None:
    teleport, expected = skipping(name, mean_from), skipping(name, mean_from)
    for attribute in ("timesteps", "sigmas"):
        before, whole = getattr(teleport, attribute).clone(), len(getattr(teleport.inner, attribute))
        setattr(teleport, attribute, getattr(teleport, attribute).clone())
        assert torch.equal(getattr(teleport, attribute), before)
        assert len(getattr(teleport.inner, attribute)) == whole
        with pytest.raises(
            ValueError, match=f"{attribute} was set to other values while 4 steps are skipped"
        ):
            setattr(teleport, attribute, before + 1)
        with pytest.raises(ValueError, match=f"{attribute} was set to other values"):
            setattr(teleport, attribute, before[1:])
        assert torch.equal(getattr(teleport, attribute), before)
    # Cosmos writes the last level in place.
    for scheduler in (teleport, expected):
        scheduler.sigmas[-1] = scheduler.sigmas[-2] / 2
        assert scheduler.inner.sigmas[-1] == scheduler.inner.sigmas[-2] / 2
    x = torch.randn(2, *SHAPE)
    results = []
    for scheduler in (teleport, expected):
        now = x
        for t in scheduler.timesteps:
            now = scheduler.step(torch.sin(shown(scheduler, now, t)), t, now).prev_sample
        results.append(now)
    assert torch.equal(*results)


def test_attributes_reach_the_wrapped_scheduler_while_steps_are_skipped() -> None:
    for name in ("DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler"):
        teleport = skipping(name, "stats", 20)
        teleport.alphas_cumprod = moved = teleport.alphas_cumprod.clone()
        assert teleport.inner.alphas_cumprod is moved
        teleport.num_inference_steps = 21
        assert teleport.inner.num_inference_steps == 21
        with pytest.raises(AttributeError, match=f"^'{name}' object has no attribute 'nothing'$"):
            _ = teleport.nothing
        with pytest.raises(AttributeError, match=f"^'{name}' object has no attribute '_nothing'$"):
            _ = teleport._nothing
    with pytest.raises(ValueError, match="pure noise"):
        skipping("EulerDiscreteScheduler", "stats")._begin_index = 3


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("mean_from", ["stats", "first_call"])
def test_every_step_may_be_made_twice(mean_from: str, guided: bool) -> None:
    """CosmosTextToWorldPipeline calls `step` for the x0-prediction, steps back, and calls it again after guidance."""
    stats = tiny.gaussian(SHAPE)
    x = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    results = []
    for twice in (False, True):
        scheduler = skipping("EDMEulerScheduler", mean_from)
        now = x * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            output = torch.sin(scheduler.scale_model_input(now, t))
            if twice:
                repeats = 2 if guided else 1
                rows = output.repeat(repeats, 1, 1, 1), t, now.repeat(repeats, 1, 1, 1)
                clean = scheduler.step(*rows, return_dict=False)[1][:2]
                scheduler._step_index = (scheduler._step_index or 0) - 1
                now = scheduler.step(clean, t, now, return_dict=False, pred_original_sample=clean)[0]
            else:
                now = scheduler.step(output, t, now).prev_sample
        results.append(now)
    assert stats.shape == x.shape[1:]
    assert torch.allclose(*results, atol=1e-5)


def test_a_saved_config_is_complete(tmp_path: Any) -> None:
    teleport = skipping("EulerDiscreteScheduler", "stats")
    teleport.save_config(tmp_path)
    loaded = TeleportScheduler.from_pretrained(tmp_path)
    loaded.set_timesteps(10)
    assert torch.equal(loaded.timesteps, teleport.timesteps)
    assert torch.equal(loaded.stats.mean, teleport.stats.mean)
    (tmp_path / "file").write_text("")
    with pytest.raises(AssertionError, match="should be a directory"):
        teleport.save_config(tmp_path / "file")


@pytest.mark.parametrize("name", SUPPORTED)
def test_no_attribute_of_the_proxy_hides_one_of_a_scheduler(name: str) -> None:
    wrapped = getattr(diffusers, name)()
    wrapped.set_timesteps(20)
    teleport = TeleportScheduler(wrapped, tiny.gaussian(SHAPE), 0.4)
    assert not set(vars(teleport)) & set(dir(wrapped))
    methods = set(vars(TeleportScheduler)) - {n for n in vars(TeleportScheduler) if n.startswith("__")}
    replaced = {"timesteps", "sigmas", "step_index", "_step_index", "begin_index", "_begin_index"}
    replaced |= {"set_timesteps", "set_begin_index", "index_for_timestep", "scale_model_input", "step"}
    assert methods & set(dir(wrapped)) <= replaced | {"add_noise", "scale_noise"}


@pytest.mark.parametrize("name", SUPPORTED)
def test_the_counterparts_of_a_wrapped_scheduler(name: str) -> None:
    if "EDM" in name:
        return
    plain, off = plain_and_off(name, "default")
    for convert in (first_order_scheduler, inverse_scheduler):
        one, two = convert(plain), convert(off)
        assert type(one) is type(two)
        assert same(dict(one.config), dict(two.config))
