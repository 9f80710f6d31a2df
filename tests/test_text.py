"""Text from outside: safe for terminals, tables and JSON; text files in any encoding."""

import csv
import io
import json
import unicodedata
from pathlib import Path

import pytest

from ced.text import cell, csv_lines, decoded, json_line, open_text, printable


def test_ordinary_text_is_unchanged() -> None:
    for text in ("a b.wav", "Käfer 虫 🐞", "می‌خواهم", "👩‍🚀", "a\u00a0b", r"C:\new\x.wav", ""):  # with joiners
        assert printable(text) == text


def test_control_characters_become_escapes() -> None:
    assert printable("\x1b[31m\x07\r\n\t\x9b\x7f") == r"\x1b[31m\x07\r\n\t\x9b\x7f"
    assert printable("a\u202eb\u2066c\u200e\u2028") == r"a\u202eb\u2066c\u200e\u2028"
    assert printable("caf\udce9.wav") == r"caf\udce9.wav"
    assert printable("a\tb\x1b", keep="\t") == "a\tb\\x1b"


def test_no_control_or_bidirectional_character_is_missed() -> None:
    for code in range(0x110000):
        character = chr(code)
        controls = unicodedata.category(character) in ("Cc", "Zl", "Zp", "Cs")
        if controls or unicodedata.bidirectional(character) in (
            "LRE",
            "RLE",
            "LRO",
            "RLO",
            "PDF",
            "LRI",
            "RLI",
            "FSI",
            "PDI",
        ):
            assert printable(character).isascii(), f"U+{code:04X}"


def test_cells_have_no_line_breaks() -> None:
    assert cell("a\tb\r\nc\x00\u2028\x1b") == r"a\tb\r\nc\x00\u2028\x1b"
    assert cell("ק\u200f") == "ק\u200f"


def test_json_is_safe_and_reads_the_same() -> None:
    value = {"a\u202e": ["\x1b\x9b\u2028\x7f", "caf\udce9", "Käfer 🐞", 0.5, None]}
    line = json_line(value)
    assert line == '{"a\\u202e": ["\\u001b\\u009b\\u2028\\u007f", "caf\\udce9", "Käfer 🐞", 0.5, null]}'
    assert json.loads(line) == value
    with pytest.raises(ValueError, match="not JSON compliant"):
        json_line(float("nan"))


def test_csv_reads_back() -> None:
    rows = [("a", "b"), ("x\ry", "x\ny"), ('q"', "c,d"), ("", " e ")]
    text = "".join(f"{line}\n" for line in csv_lines(rows))
    assert [tuple(row) for row in csv.reader(io.StringIO(text, newline=""), strict=True)] == rows
    assert list(csv_lines([("a", 1, 0.5)], "\t")) == ["a\t1\t0.5"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_text_files_are_decoded_by_their_first_bytes(tmp_path: Path, encoding: str) -> None:
    data = "Käfer\r\n虫".encode(encoding)
    (tmp_path / "a").write_bytes(data)
    assert decoded(data) == "Käfer\r\n虫"
    with open_text(tmp_path / "a") as file:
        assert file.read() == "Käfer\r\n虫"


def test_bytes_that_are_not_text() -> None:
    assert decoded(b"caf\xe9") == "caf\udce9"
    assert decoded(b"\xff\xfea\x00") == "a"
    for data, strict in ((b"caf\xe9", True), (b"\xff\xfe\x00", False)):
        with pytest.raises(UnicodeDecodeError):
            decoded(data, strict=strict)
