import numpy as np
import pytest

from diffusers_ext.metrics import prdc as module
from diffusers_ext.metrics.prdc import PRDC, prdc


def _by_loops(x, y, k):
    def distance(a, b):
        return float(np.sqrt(((a - b) ** 2).sum()))

    def radius(points, i):
        return sorted(distance(points[i], q) for j, q in enumerate(points) if j != i)[k - 1]

    own, real = [radius(x, i) for i in range(len(x))], [radius(y, i) for i in range(len(y))]
    inside = np.array([[distance(a, b) <= r for b, r in zip(y, real)] for a in x])
    around = np.array([[distance(a, b) <= r for b in y] for a, r in zip(x, own)])
    return PRDC(inside.any(1).mean(), around.any(0).mean(), inside.sum() / (k * len(x)), inside.any(0).mean())


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("rows", [1024, 7])
def test_by_loops(k, rows, monkeypatch):
    monkeypatch.setattr(module, "_ROWS", rows)
    rng = np.random.default_rng(k)
    x, y = rng.normal(0.5, 0.8, size=(30, 3)), rng.normal(size=(40, 3))
    found, expected = prdc(x, y, k), _by_loops(x, y, k)
    for name in ("precision", "recall", "density", "coverage"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name)), name


def test_lost_modes_lower_recall_and_coverage_only():
    rng = np.random.default_rng(0)
    y = np.concatenate([rng.normal(-10, 1, size=(200, 2)), rng.normal(10, 1, size=(200, 2))])
    found = prdc(rng.normal(10, 1, size=(400, 2)), y)
    assert found.precision > 0.9
    assert found.density == pytest.approx(1, abs=0.25)
    assert found.recall == pytest.approx(0.5, abs=0.05)
    assert found.coverage < 0.55


def test_far_images_have_no_precision():
    y = np.random.default_rng(1).normal(size=(50, 2))
    assert prdc(y + 100, y) == PRDC(0, 0, 0, 0)


@pytest.mark.parametrize(
    ("shape", "k", "match"),
    [((8, 3), 5, "size 3 and 2"), ((8, 2), 8, "got 8 for 8 generated and 9 real"), ((8, 2), 0, "got 0")],
)
def test_errors(shape, k, match):
    with pytest.raises(ValueError, match=match):
        prdc(np.zeros(shape), np.zeros((9, 2)), k)
