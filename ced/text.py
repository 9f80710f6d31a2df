"""Untrusted text (names, labels, messages) made safe for terminals, tables and JSON; text files of any encoding."""

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

# Control characters (C0, DEL, C1), line and paragraph separators, lone surrogates (bytes of a file name that are not
# UTF-8), and format characters: bidirectional marks and overrides, invisible operators, tags. The zero-width joiners
# (U+200C, U+200D) are kept: Persian, Indic scripts and emoji need them.
_UNSAFE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\U000e0000-\U000e007f\ud800-\udfff]"
)
_BREAKS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")  # line breaks, tabs and controls
_MARKS = ((b"\xef\xbb\xbf", "utf-8-sig"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"))  # byte-order marks
_LOOKED_AT = 512  # bytes that tell the encoding of a text without a mark


def printable(text: str, keep: str = "") -> str:
    r"""Return text that stays one line on a terminal and cannot move the cursor, change colours or reverse direction.

    Unsafe characters become escapes, such as `\x1b`, `\n` or `\u202e`.

    Args:
        text: any text.
        keep: characters not to escape, such as the tabs of a table.
    """
    if text.isprintable():
        return text
    return _UNSAFE.sub(lambda found: found[0] if found[0] in keep else _escaped(found[0]), text)


def cell(text: str) -> str:
    r"""Return text that needs no quoting in a cell of a table: tabs, line breaks and controls become escapes."""
    return _BREAKS.sub(lambda found: _escaped(found[0]), text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def json_line(values: Any) -> str:
    r"""Return a value as one line of JSON that is safe to print: unsafe characters become `\uXXXX`.

    Raises:
        ValueError: a number is not finite.
    """
    text = json.dumps(values, ensure_ascii=False, allow_nan=False)
    return text if text.isprintable() else _UNSAFE.sub(lambda found: json.dumps(found[0])[1:-1], text)


def csv_lines(rows: Iterable[Sequence[object]], delimiter: str = ",") -> Iterator[str]:
    r"""Yield rows as lines of CSV (RFC 4180) without line terminators; fields with line breaks or quotes are quoted.

    The csv module quotes line breaks only if its own line terminator contains them, so that is `\r\n` here.
    """
    line = io.StringIO()
    writer = csv.writer(line, delimiter=delimiter, lineterminator="\r\n")
    for row in rows:
        writer.writerow(row)
        yield line.getvalue()[:-2]
        line.seek(0)
        line.truncate()


def decoded(data: bytes, *, strict: bool = False) -> str:
    """Decode a text file: UTF-8, or UTF-16 by its byte-order mark or, without one, by its many zero bytes.

    Args:
        data: the whole file.
        strict: refuse bytes that are not UTF-8, which otherwise become lone surrogates, as in file names.

    Raises:
        UnicodeDecodeError: it starts like UTF-16, but is not; or, with `strict`, it is not UTF-8.
    """
    return data.decode(_encoding(data), "strict" if strict else "surrogateescape")


def open_text(path: Path) -> TextIO:
    """Open a text file for reading, decoded as by `decoded`; line ends are kept.

    Raises:
        OSError: it cannot be read.
        UnicodeDecodeError: as for `decoded`, when reading reaches the place.
    """
    with path.open("rb") as file:
        encoding = _encoding(file.read(_LOOKED_AT))
    return path.open(encoding=encoding, errors="surrogateescape", newline="")


def _encoding(begin: bytes) -> str:
    """Return the encoding of a text by its first bytes: its mark or, in UTF-16 without one, its many zero bytes."""
    for mark, encoding in _MARKS:
        if begin.startswith(mark):
            return encoding
    begin = begin[:_LOOKED_AT]
    first, second = begin[::2].count(0), begin[1::2].count(0)  # of UTF-16, ASCII characters have one of both zero
    if 4 * max(first, second) >= len(begin) > 3 and 4 * min(first, second) <= max(first, second):
        return "utf-16-le" if second > first else "utf-16-be"
    return "utf-8"


def some(names: Sequence[str], most: int = 5) -> str:
    """Return the first names of a list, each as `quoted`, and the number of the others."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(quoted, names[:most])) + rest


def quoted(name: str) -> str:
    """Return a name for messages and lists: in quotes if it has spaces, commas or quotes, or is empty."""
    return name if name and not set(name) & set(" ,;'\"") else repr(name)
