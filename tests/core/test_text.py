from pathlib import Path

import pytest

from diffusers_ext.core.commands import read_prompts
from diffusers_ext.core.text import read_text


def test_a_prompt_is_a_line_whatever_is_in_it(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    text = "a cat\r\n\r\nbad\u2028line\rform\x0cfeed\n  é\x85ü  \n"
    for encoding in ("utf-8", "utf-8-sig"):
        path.write_bytes(text.encode(encoding))
        assert read_prompts(path) == ["a cat", "bad\u2028line", "form\x0cfeed", "é\x85ü"]


@pytest.mark.parametrize(
    ("data", "place"),
    [
        (b"a\ncaf\xe9\n", r"byte 0xe9 at position 5 \(line 2\)"),
        (b"\xef\xbb\xbfa\ncaf\xe9\n", r"byte 0xe9 at position 8 \(line 2\)"),
        ("a".encode("utf-16"), r"byte 0xff at position 0 \(line 1\)"),
    ],
)
def test_other_encodings_are_named_with_their_place(data: bytes, place: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"prompts.txt is not UTF-8: {place}. Save it as UTF-8"):
        read_text(path)
