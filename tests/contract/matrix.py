"""The table of methods and pipeline families in the README and the documentation, made from the contract.

python -m tests.contract.matrix          # prints it
python -m tests.contract.matrix --write  # puts it into README.md and docs/support.md
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "docs/support.md")
TITLES = {
    "sd": "Stable Diffusion",
    "sdxl": "SDXL",
    "sd3": "Stable Diffusion 3",
    "flux": "Flux",
    "ddpm": "DDPM",
}
_BETWEEN = re.compile(r"(<!-- support-matrix -->\n).*?(<!-- /support-matrix -->)", re.DOTALL)


def matrix() -> str:
    """A Markdown table: "yes" where the contract holds a method to a family, "no" where the method refuses it."""
    # Here, as the tests import this module.
    from tests.contract.test_contract import METHODS, PRODUCTS

    columns = {method.title: method for method in (METHODS | PRODUCTS).values()}
    lines = ["", *columns], ["---"] * (len(columns) + 1)
    rows = [
        [title, *("yes" if name in method.pipelines else "no" for method in columns.values())]
        for name, title in TITLES.items()
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in [*lines, *rows]) + "\n"


def replaced(page: str) -> str:
    """A page with the present table between its markers."""
    text, count = _BETWEEN.subn(lambda match: match[1] + matrix() + match[2], page)
    if count != 1:
        raise ValueError(f"Expected one pair of support-matrix markers, found {count}.")
    return text


if __name__ == "__main__":
    if "--write" in sys.argv:
        for name in PAGES:
            (ROOT / name).write_text(replaced((ROOT / name).read_text(encoding="utf-8")), encoding="utf-8")
    print(matrix())
