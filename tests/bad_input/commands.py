"""Wrong arguments and wrong data of the training scripts, and what is said about them."""

import contextlib
import io
import tempfile
from pathlib import Path

from tests.bad_input.cases import one_line
from tests.training.scripts import arguments, parse, prepare, run, steps
from tests.training.test_kinds import COLLECT, OWN, PICTURES, REFUSED, SHARED, folder_of

# Those that all scripts have are shown for one; `test_kinds.py` tests them in all.
ARGUMENTS = [("train_smooth_lora", text) for text in SHARED if "report_to" not in text]
ARGUMENTS += [(script, text) for script, texts in OWN.items() for text in texts]
ARGUMENTS += [("collect_noise_pairs", text) for text in COLLECT]
ARGUMENTS += [
    ("train_smooth_lora", "--cache_latents --random_flip"),
    ("train_smooth_lora", "--cache_latents --no-center_crop"),
    ("train_sign", "--sid_alpha 1.2"),
    ("train_sign", "--fake_updates 2 --dmd_weight 0"),
    ("train_sign", "--matching sid --dmd_weight 0"),
    ("train_sign", "--gaussian stats --source white"),
    ("train_sign", "--max_train_steps 5 --fake_first_steps 5"),
    ("train_base", "--model judge --block_out_channels 8 8 8"),
]
DATA = [*(f"caption: {case}" for case in REFUSED), *(f"image: {case}" for case in PICTURES)]


def command(script: str, text: str) -> str:
    """The call that the table shows."""
    return f"{script}.py {text}"


def usage_error(script: str, text: str) -> str:
    """The last line that a script writes when it is called with these arguments."""
    written = io.StringIO()
    with contextlib.redirect_stderr(written), contextlib.suppress(SystemExit):
        parse(script, [*arguments(script, Path("base"), Path("run")), *text.split()])
        raise AssertionError(f"{command(script, text)} is accepted.")
    said = written.getvalue().splitlines()[-1].partition(": error: ")[2]
    # Python 3.12 and later write the choices without quotes.
    head, choose, choices = said.partition("(choose from ")
    return head + choose + choices.replace("'", "")


def data_error(case: str, base: Path) -> str:
    """What `train_smooth_lora.py` says about the data of a case of `DATA`; `base` is from `prepare`."""
    kind, _, name = case.partition(": ")
    with tempfile.TemporaryDirectory() as folder:
        captions = REFUSED[name][0] if kind == "caption" else []
        pictures = folder_of(Path(folder), captions)
        if kind == "image":
            PICTURES[name][0](pictures)
        argv = arguments("train_smooth_lora", base, Path(folder) / "run", pictures)
        try:
            run("train_smooth_lora", [*argv, *steps("train_smooth_lora", 1), "--cache_latents"])
        except ValueError as error:
            return one_line(error, folder)
    raise AssertionError(f"{case} is accepted.")


__all__ = ["ARGUMENTS", "DATA", "command", "data_error", "prepare", "usage_error"]
