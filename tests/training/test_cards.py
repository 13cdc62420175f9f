import json

from huggingface_hub import ModelCard

from diffusers_ext.training import cards
from diffusers_ext.training.cards import publish

from .test_loop import arguments

RECORD = {
    "steps": 6,
    "images": 24,
    "seconds": 1,
    "hardware": "1 CPU",
    "loss": 0.51234567,
    "parameters": 51985,
}


def save(folder):
    (folder / "weights").write_text("whole")


def test_the_card_tells_how_the_model_came_about_and_no_private_path(tmp_path):
    argv = ["training/train_base.py", "--train_data_dir", "/home/me/garments", "--vae=/home/me/vae"]
    args = arguments(tmp_path, "--seed", "3")
    folder = publish(args, argv, RECORD, save, "# A model\n\nWhat it is.", ["text-to-image"])
    card = ModelCard.load(folder / "README.md")
    assert card.data.to_dict()["license"] == "apache-2.0"
    assert card.data.library_name == "diffusers"
    assert card.data.tags == ["diffusers-ext", "text-to-image"]
    text = card.text
    assert "accelerate launch training/train_base.py --train_data_dir garments --vae=vae" in text
    assert "Seed 3, 6 steps, 24 images in 1 s on\n1 CPU." in text
    assert "| loss | 0.5123 |\n| parameters | 51,985 |" in text
    written = json.loads((folder / "training.json").read_text())
    assert written["output_dir"] == tmp_path.name
    assert written["loss"] == RECORD["loss"]
    assert str(tmp_path) not in text + json.dumps(written)


def test_only_push_to_hub_uploads(tmp_path, monkeypatch):
    calls = []

    class Api:
        def create_repo(self, repo_id, exist_ok):
            calls.append(("create", repo_id))
            return type("Url", (), {"repo_id": f"me/{repo_id}"})

        def upload_folder(self, repo_id, folder_path, commit_message):
            calls.append(("upload", repo_id, folder_path))

    monkeypatch.setattr(cards, "HfApi", Api)
    args = arguments(tmp_path)
    assert cards.create_hub_repo(args) is None
    publish(args, ["x"], RECORD, save, "# A model", [])
    assert not calls
    args = arguments(tmp_path, "--push_to_hub", "--hub_model_id", "mine")
    folder = publish(args, ["x"], RECORD, save, "# A model", [], cards.create_hub_repo(args))
    assert calls == [("create", "mine"), ("upload", "me/mine", folder)]
