import pytest
from PIL import Image

from diffusers_ext.testbed import demo


@pytest.mark.slow
def test_demo_runs_offline_on_the_embedded_models(tmp_path, capsys):
    path = demo.run(tmp_path / "new", num_images=8, seed=1)
    assert Image.open(path).size[0] > 500
    printed = capsys.readouterr().out
    assert "NFE" in printed
    assert "teleport" in printed
    assert "golden noise" in printed
    assert "Smooth-LoRA" in printed
    assert "SIGN" in printed
    assert "A-SDM" in printed


def test_demo_refuses_too_few_pictures(tmp_path):
    with pytest.raises(ValueError, match="at least 8"):
        demo.run(tmp_path, num_images=2)
