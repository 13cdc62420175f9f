import pytest

from diffusers_ext.resources import resource_dir
from diffusers_ext.testbed import embedded


@pytest.mark.parametrize("name", embedded.NAMES)
def test_the_checkout_or_the_wheel_has_every_resource(name):
    assert (resource_dir(name) / "README.md").is_file()


def test_the_wheel_goes_before_the_checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(embedded, "_PACKAGE", tmp_path / "diffusers_ext")
    checkout = tmp_path / "pipelines"
    checkout.mkdir()
    assert resource_dir("pipelines") == checkout
    wheel = tmp_path / "diffusers_ext" / "_share" / "pipelines"
    wheel.mkdir(parents=True)
    assert resource_dir("pipelines") == wheel


def test_errors_name_what_is_missing_and_where(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="'weights': expected 'pipelines' or 'model_cards'"):
        resource_dir("weights")
    monkeypatch.setattr(embedded, "_PACKAGE", tmp_path / "diffusers_ext")
    with pytest.raises(FileNotFoundError, match=r"neither at .*_share.* nor at .*: install the wheel again"):
        resource_dir("pipelines")
