import pytest

from diffusers_ext.core import shipped
from diffusers_ext.testbed.embedded import card_dir, has_card


def test_the_checkout_has_every_model():
    bases = "fashion-scenes", "fashion-flow"
    methods = [f"{method}-{base}" for method in ("npnet", "smooth-lora", "asdm") for base in bases]
    for name in ("fashion-ddpm", "fashion-grader", "fashion-judge", "sign-fashion-ddpm", *bases, *methods):
        assert (card_dir(name) / "README.md").is_file()
        assert has_card(name)


def test_what_is_not_there_is_named_with_what_to_do(tmp_path, monkeypatch):
    assert not has_card("fashion-shoes")
    with pytest.raises(
        FileNotFoundError, match=r"model_cards/fashion-shoes is not installed; there are: .*fashion-ddpm"
    ):
        card_dir("fashion-shoes")
    monkeypatch.setattr(shipped, "_PACKAGE", tmp_path / "diffusers_ext")
    with pytest.raises(FileNotFoundError, match=r"there are: none\. .* pip install -e"):
        card_dir("fashion-ddpm")
