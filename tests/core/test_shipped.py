import os
from pathlib import Path

import pytest

import diffusers_ext as dx
from diffusers_ext.core import shipped


def test_the_path_is_that_of_the_folder_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not os.path.exists("pipelines/teleport_sd")
    path = dx.pipeline_path("teleport_sd")
    assert isinstance(path, str)  # diffusers refuses a Path
    assert Path(path).is_absolute()
    assert (Path(path) / "pipeline.py").is_file()


@pytest.mark.parametrize(
    "name", ["teleport-sd", "someone/teleport_sd", "", ".", "..", "teleport_sd/pipeline.py"]
)
def test_another_name_is_refused_with_the_known_ones(name):
    with pytest.raises(
        ValueError, match=r"no custom pipeline '.*': expected one of asdm_sd, golden_noise_sd, "
    ):
        dx.pipeline_path(name)


def test_the_folders_of_a_wheel_are_inside_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr(shipped, "_PACKAGE", tmp_path / "diffusers_ext")
    with pytest.raises(ValueError, match="expected one of none"):
        dx.pipeline_path("one")
    beside = tmp_path / "pipelines" / "one"
    beside.mkdir(parents=True)
    assert dx.pipeline_path("one") == str(beside)
    inside = tmp_path / "diffusers_ext" / "_share" / "pipelines" / "two"
    inside.mkdir(parents=True)
    assert dx.pipeline_path("two") == str(inside)
    # Beside an installed package there may be another one with the name "pipelines".
    with pytest.raises(ValueError, match="expected one of two"):
        dx.pipeline_path("one")
