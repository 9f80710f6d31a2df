import csv
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import pyarrow.parquet
import pytest

from ced.errors import AudioError, ConfigError, MissingPackageError
from ced.sound.tables import read_table
from ced.tag.options import FormatName
from ced.tag.records import Record, Tag, Tags
from ced.tag.writers import FORMATS, EmbeddingRow, formats, write_embeddings, write_records

TIMELINE = (
    Tags(0.0, 10.0, (Tag("Speech", 0, "/m/09x0r", 0.98765), Tag("Dog", 74, "/m/0bt9lr", 0.01))),
    Tags(10.0, 12.34, (Tag("Dog", 74, "/m/0bt9lr", 0.5), Tag("Speech", 0, "/m/09x0r", 0.00004))),
)
DOG = Record("sounds/dog.wav", "ced_mini", 12.34, TIMELINE)
QUIET = Record("quiet.wav", "ced_mini", 3.0, ())
ODD = Record('a, "b"\tc\nd.wav', "mine", 1.0, (Tags(0.25, 0.5, (Tag("Bark, loud", 0, None, 0.75),)),))


def lines(name: str, *records: Record) -> list[str]:
    make = FORMATS[name].text
    assert make is not None
    written = list(make(iter(records)))
    if name == "csv":  # a field may have line breaks
        return [line.removesuffix("\n") for line in written]
    return "".join(written).split("\n")[:-1]


def test_text_has_the_form_of_the_published_program() -> None:
    expected = [
        "===== sounds/dog.wav =====",
        "[0.0s]-[10.0s] Topk-1 Speech 0.9877",
        "[0.0s]-[10.0s] Topk-2 Dog 0.0100",
        "",
        "[10.0s]-[12.3s] Topk-1 Dog 0.5000",
        "[10.0s]-[12.3s] Topk-2 Speech 0.0000",
    ]
    assert lines("text", DOG, QUIET) == [*expected, "", "===== quiet.wav =====", ""]


class Interrupted:
    """A timeline of which one window comes before Ctrl-C."""

    file, model, channel = "long.wav", "mine", "left"
    kind: Literal["windows"] = "windows"
    rate, began = 16_000, None
    seconds, complete, expected_seconds = 10.0, False, 3600.0

    def __iter__(self) -> Iterator[Tags]:
        yield TIMELINE[0]
        raise KeyboardInterrupt


@pytest.mark.parametrize("name", ["text", "jsonl", "csv", "spreadsheet", "audacity", "raven"])
def test_windows_are_written_at_once_and_kept_when_interrupted(name: str) -> None:
    make = FORMATS[name].text
    assert make is not None
    written = []
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012
        for piece in make([Interrupted()]):
            written.append(piece)
    whole = "".join(written)
    assert "Speech" in whole
    assert whole.endswith("\n")
    if name == "jsonl":
        record = Record.from_json(json.loads(whole))
        assert record == Record("long.wav", "mine", 10.0, TIMELINE[:1], "windows", "left", False, 3600.0, 16_000)


def test_jsonl_is_a_versioned_record_a_line() -> None:
    first, second = lines("jsonl", ODD, QUIET)
    tag = '{"label": "Bark, loud", "index": 0, "mid": null, "prob": 0.75}'
    assert first == (
        '{"format": 1, "file": "a, \\"b\\"\\tc\\nd.wav", "model": "mine", "kind": "windows", "channel": "mean",'
        f' "rate": null, "pieces": [{{"start": 0.25, "end": 0.5, "tags": [{tag}]}}],'
        ' "seconds": 1.0, "complete": true, "expected_seconds": null}'
    )
    assert json.loads(first) == json.loads(json.dumps(ODD.to_json()))
    assert Record.from_json(json.loads(second)) == QUIET
    assert Record.from_json(json.loads(first)) == ODD


def test_csv_columns_and_quotes() -> None:
    assert lines("csv", DOG, QUIET, ODD) == [
        "file,start,end,label,mid,prob",
        "sounds/dog.wav,0.000000,10.000000,Speech,/m/09x0r,0.987650",
        "sounds/dog.wav,0.000000,10.000000,Dog,/m/0bt9lr,0.010000",
        "sounds/dog.wav,10.000000,12.340000,Dog,/m/0bt9lr,0.500000",
        "sounds/dog.wav,10.000000,12.340000,Speech,/m/09x0r,0.000040",
        '"a, ""b""\tc\nd.wav",0.250000,0.500000,"Bark, loud",,0.750000',
    ]
    assert lines("csv") == ["file,start,end,label,mid,prob"]


def test_audacity_labels() -> None:
    assert lines("audacity", DOG) == [
        "0.000000\t10.000000\tSpeech 0.99",
        "0.000000\t10.000000\tDog 0.01",
        "10.000000\t12.340000\tDog 0.50",
        "10.000000\t12.340000\tSpeech 0.00",
    ]


def test_raven_selections_of_several_sounds_lie_end_to_end() -> None:
    header, *rows = lines("raven", DOG, QUIET, ODD)
    assert header == (
        "Selection\tView\tChannel\tBegin Time (s)\tEnd Time (s)\tLow Freq (Hz)\tHigh Freq (Hz)"
        "\tBegin Path\tFile Offset (s)\tLabel\tScore"
    )
    view, here, dog = "Spectrogram 1\t1", os.getcwd(), os.path.abspath("sounds/dog.wav")
    assert rows[0] == f"1\t{view}\t0.000000\t10.000000\t0.0\t8000.0\t{dog}\t0.000000\tSpeech\t0.987650"
    assert rows[2] == f"3\t{view}\t10.000000\t12.340000\t0.0\t8000.0\t{dog}\t10.000000\tDog\t0.500000"
    odd = f'{here}/a, "b"\\tc\\nd.wav'
    assert rows[4:] == [f"5\t{view}\t15.590000\t15.840000\t0.0\t8000.0\t{odd}\t0.250000\tBark, loud\t0.750000"]


@pytest.mark.parametrize(
    ("rate", "highest"), [(None, "8000.0"), (8000, "4000.0"), (16000, "8000.0"), (192000, "8000.0")]
)
def test_raven_selections_stay_below_half_the_rate(rate: int | None, highest: str) -> None:
    _, row, *_ = lines("raven", replace(DOG, rate=rate))
    assert row.split("\t")[6] == highest


@pytest.mark.parametrize("file", ["<stdin>", "https://example.org/a b.wav"])
def test_raven_has_names_without_a_path_unchanged(file: str) -> None:
    _, row, *_ = lines("raven", replace(DOG, file=file))
    assert row.split("\t")[7] == file


def test_parquet_has_the_columns_of_csv(tmp_path: Path) -> None:
    path = tmp_path / "tags.parquet"
    write_records(FORMATS["parquet"], [DOG, QUIET, ODD], path)
    table = pyarrow.parquet.read_table(path)
    assert table.schema.names == ["file", "start", "end", "label", "mid", "prob"]
    assert [str(kind) for kind in table.schema.types] == ["string", "double", "double", "string", "string", "float"]
    assert table.schema.metadata[b"ced.format"] == b"1"
    assert table.num_rows == 5
    assert table.slice(2, 1).to_pylist() == [
        {"file": "sounds/dog.wav", "start": 10.0, "end": 12.34, "label": "Dog", "mid": "/m/0bt9lr", "prob": 0.5}
    ]
    assert table["mid"][4].as_py() is None


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_is_complete_or_missing(tmp_path: Path, name: str) -> None:
    def broken() -> Iterator[Record]:
        yield DOG
        raise AudioError("empty")

    path = tmp_path / "tags"
    with pytest.raises(AudioError):
        write_records(FORMATS[name], broken(), path)
    assert list(tmp_path.iterdir()) == []
    write_records(FORMATS[name], [DOG], path)
    if (make := FORMATS[name].text) is not None:
        assert path.read_bytes() == "".join(make([DOG])).encode()


@pytest.mark.parametrize("name", FORMATS)
def test_names_that_are_not_valid_text_are_written_with_escapes(tmp_path: Path, name: str) -> None:
    record = Record(os.fsdecode(b"caf\xe9.wav"), "mine", 1.0, DOG.pieces)
    path = tmp_path / "tags"
    write_records(FORMATS[name], [record], path)
    if name == "parquet":
        assert pyarrow.parquet.read_table(path)["file"][0].as_py() == r"caf\udce9.wav"
    else:
        assert (r"caf\udce9.wav" in path.read_text(encoding="utf-8")) == (name != "audacity")
    if name == "jsonl":
        assert Record.from_json(json.loads(path.read_text(encoding="utf-8"))) == record
    if name == "csv":
        with path.open(encoding="utf-8", newline="") as file:
            assert next(csv.DictReader(file))["file"] == r"caf\udce9.wav"


@pytest.mark.parametrize("name", ["csv", "parquet"])
def test_many_rows_need_little_memory(tmp_path: Path, name: str) -> None:
    program = f"""
import resource, sys
from pathlib import Path
from ced.tag.records import *
from ced.tag.writers import FORMATS, write_records
tags = tuple(Tag(f"label {{i}}", i, None, 0.5) for i in range(100))
def records(count):
    for i in range(count):
        yield Record(f"file {{i}}.wav", "m", 10.0, (Tags(0.0, 10.0, tags),))
out = Path(sys.argv[1])
write_records(FORMATS["{name}"], records(1_000), out)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
write_records(FORMATS["{name}"], records(4_000), out)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", program, tmp_path / "out"], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 25_000  # KB; 400,000 rows of six columns are far more


def test_help_names_the_formats_that_there_are() -> None:
    assert tuple(FORMATS) == get_args(FormatName)


def test_unsupported_formats_are_refused_before_the_work() -> None:
    assert formats(["text", "parquet"]) == [FORMATS["text"], FORMATS["parquet"]]
    assert formats(["JSONL", "Csv"]) == [FORMATS["jsonl"], FORMATS["csv"]]
    with pytest.raises(ConfigError, match=r"format xml; allowed: text, jsonl, csv, spreadsheet, audacity, raven, parq"):
        formats(["csv", "xml"])
    with pytest.raises(ConfigError, match="audacity has no column for a file's name"):
        formats(["audacity"], shared=True)
    with pytest.raises(ConfigError, match="parquet is not text"):
        formats(["parquet"], printed=True)


def test_a_missing_package_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "meta_path", [])
    monkeypatch.delitem(sys.modules, "pyarrow")
    with pytest.raises(MissingPackageError, match=r"parquet .* pyarrow: pip install 'ced-audio\[parquet\]'"):
        formats(["parquet"])


def test_importing_brings_no_optional_package() -> None:
    program = "import sys, ced.tag.writers; print({'pyarrow', 'torch', 'pydantic', 'onnxruntime'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


HOSTILE = "\x1b]0;pwned\x07\x9b2J\u202egpj.exe\u2066 a\r\nb\tc \u2028 d"


def hostile() -> Record:
    tag = Tag(f"label {HOSTILE}", 0, None, 0.75)
    return Record(f"name {HOSTILE}", "mine", 1.0, (Tags(0.0, 1.0, (tag,)), Tags(1.0, 2.0, (tag,))))


def test_csv_round_trip_of_any_names() -> None:
    text = "".join(f"{line}\n" for line in lines("csv", hostile()))
    rows = list(csv.reader(io.StringIO(text, newline="")))
    assert [(row[0], row[3]) for row in rows[1:]] == [(f"name {HOSTILE}", f"label {HOSTILE}")] * 2
    assert {len(row) for row in rows} == {6}


def test_a_lone_carriage_return_does_not_end_a_row() -> None:
    record = Record("a\rb.wav", "mine", 1.0, DOG.pieces)
    text = "".join(f"{line}\n" for line in lines("csv", record))
    assert [row[0] for row in csv.reader(io.StringIO(text, newline=""))] == ["file", *["a\rb.wav"] * 4]


@pytest.mark.parametrize("name", ["text", "jsonl", "audacity", "raven"])
def test_lines_have_no_control_characters(name: str) -> None:
    found = lines(name, hostile())
    kept = "\x1b\x07\x9b\r\n\u2028" + ("\u202e\u2066\t" if name in ("text", "jsonl") else "")
    assert not set("".join(found)) & set(kept)
    assert r"\u001b" in found[0] if name == "jsonl" else r"\x1b" in "".join(found)
    if name == "jsonl":
        assert Record.from_json(json.loads(found[0])) == hostile()
    if name in ("audacity", "raven"):
        assert {line.count("\t") for line in found} == {2 if name == "audacity" else 10}


@pytest.mark.parametrize("begin", ["=", "+", "-", "@", "\t", "\r"])
def test_spreadsheets_have_no_formulas(begin: str) -> None:
    formula = begin + 'HYPERLINK("http://x","y").wav'
    record = Record(formula, "mine", 1.0, (Tags(0.0, 1.0, (Tag(formula, 0, formula, 0.5),)),))
    text = "".join(f"{line}\n" for line in lines("spreadsheet", record))
    assert text[0] == "\ufeff"
    header, row = csv.reader(io.StringIO(text[1:], newline=""))
    assert header == ["file", "start", "end", "label", "mid", "prob"]
    assert row == [f"'{formula}", "0.000000", "1.000000", f"'{formula}", f"'{formula}", "0.500000"]
    assert formula in next(csv.DictReader(io.StringIO("\n".join(lines("csv", record)), newline="")))["file"]


def test_with_a_clock_tables_have_the_time_of_each_tag(tmp_path: Path) -> None:
    timed = replace(DOG, began=datetime(2024, 5, 1, 5, 30, tzinfo=UTC))
    local = replace(QUIET, began=datetime(2024, 5, 1, 23, 59, 59, 500_000), pieces=DOG.pieces[1:])
    times = [
        ("2024-05-01T05:30:00.000+00:00", "2024-05-01T05:30:10.000+00:00"),
        ("2024-05-01T05:30:00.000+00:00", "2024-05-01T05:30:10.000+00:00"),
        ("2024-05-01T05:30:10.000+00:00", "2024-05-01T05:30:12.340+00:00"),
        ("2024-05-01T05:30:10.000+00:00", "2024-05-01T05:30:12.340+00:00"),
        *[("2024-05-02T00:00:09.500", "2024-05-02T00:00:11.840")] * 2,
        ("", ""),
    ]
    for name in ("csv", "spreadsheet", "parquet"):
        (chosen,) = formats([name], clock=True)
        path = tmp_path / name
        write_records(chosen, [timed, local, ODD], path)
        if name == "parquet":
            rows = pyarrow.parquet.read_table(path).to_pylist()
        else:
            rows = list(csv.DictReader(io.StringIO(path.read_text("utf-8-sig"), newline="")))
        assert list(rows[0])[6:] == ["start_time", "end_time"]
        assert [(row["start_time"] or "", row["end_time"] or "") for row in rows] == times
    values = json.loads(lines("jsonl", timed)[0])
    assert values["began"] == "2024-05-01T05:30:00+00:00"
    assert (values["pieces"][1]["start_time"], values["pieces"][1]["end_time"]) == times[2]
    assert Record.from_json(values) == timed


def test_with_channels_tables_and_headings_have_the_channel_of_each_tag(tmp_path: Path) -> None:
    left, right = replace(DOG, channel=1), replace(DOG, channel=2)
    for name in ("csv", "spreadsheet", "parquet"):
        (chosen,) = formats([name], channel=True)
        path = tmp_path / name
        write_records(chosen, [left, right], path)
        if name == "parquet":
            rows = pyarrow.parquet.read_table(path).to_pylist()
        else:
            rows = list(csv.DictReader(io.StringIO(path.read_text("utf-8-sig"), newline="")))
        assert list(rows[0])[6:] == ["channel"]
        assert [row["channel"] for row in rows] == ["1"] * 4 + ["2"] * 4
        (both,) = formats([name], channel=True, clock=True)
        write_records(both, [left], path)
        if name == "csv":
            assert path.read_text().splitlines()[0].endswith(",prob,channel,start_time,end_time")
    (chosen,) = formats(["text"], channel=True)
    write_records(chosen, [left, right], tmp_path / "text")
    headings = [line for line in (tmp_path / "text").read_text().splitlines() if line.startswith("=")]
    assert headings == ["===== sounds/dog.wav, channel 1 =====", "===== sounds/dog.wav, channel 2 ====="]


ROWS = [
    EmbeddingRow("a.wav", 0.0, 10.0, np.array([1, 2, 3], np.float32)),
    EmbeddingRow("a.wav", 10.0, 12.5, np.array([4, 5, 6], np.float32)),
]


def test_embeddings_are_an_array_with_a_table_of_its_rows(tmp_path: Path) -> None:
    assert write_embeddings(tmp_path / "new" / "e.npy", iter(ROWS)) == 2
    found = np.load(tmp_path / "new" / "e.npy")
    assert found.dtype == np.float32
    assert found.tolist() == [[1, 2, 3], [4, 5, 6]]
    table = read_table(tmp_path / "new" / "e.npy.tsv")
    assert table.columns == {
        "file": ["a.wav", "a.wav"],
        "start": ["0.000", "10.000"],
        "end": ["10.000", "12.500"],
        "channel": ["mean", "mean"],
    }


def test_parquet_of_embeddings_has_one_row_a_vector(tmp_path: Path) -> None:
    assert write_embeddings(tmp_path / "e.parquet", iter(ROWS * 1000)) == 2000
    found = pyarrow.parquet.read_table(tmp_path / "e.parquet")
    assert found.schema.metadata[b"ced_embeddings"] == b"1"
    assert found.num_rows == 2000
    assert found.to_pylist()[-1] == {
        "file": "a.wav",
        "start": 10.0,
        "end": 12.5,
        "channel": "mean",
        "vector": [4.0, 5.0, 6.0],
    }


def test_embeddings_with_another_suffix_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\.npy or \.parquet; got .*e\.csv"):
        write_embeddings(tmp_path / "e.csv", ROWS)
