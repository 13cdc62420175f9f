"""Reading text files that users write."""

from __future__ import annotations

from pathlib import Path


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file, with or without a byte order mark, and with line ends as newlines.

    Raises:
        ValueError: the file has another encoding. The message names the first wrong byte.
        OSError: the file cannot be read.
    """
    data = Path(path).read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # The position counts from the start of the file, also after a byte order mark.
        start = error.start + len(data) - len(error.object)
        line = data.count(b"\n", 0, start) + 1
        raise ValueError(
            f"{path} is not UTF-8: byte 0x{data[start]:02x} at position {start} (line {line}). Save it as UTF-8;"
            f" for a Latin-1 file: iconv -f latin1 -t utf-8 {path}"
        ) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")
