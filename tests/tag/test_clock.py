"""When a recording began: by the metadata and the names that recorders write."""

import io
import struct
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import numpy as np
import pytest
import soundfile

from ced.errors import ConfigError
from ced.tag import clock
from ced.tag.options import TagOptions
from ced.tag.records import clock_times
from ced.tag.tagger import Tagger

RATE = 16_000
MORNING = datetime(2024, 5, 1, 5, 30)


def chunk(name: bytes, data: bytes) -> bytes:
    return name + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)


def wav(*before: bytes, after: bytes = b"", seconds: float = 0.1, form: bytes = b"RIFF") -> bytes:
    """Return a WAV file with chunks before and after its samples."""
    samples = np.zeros(round(seconds * RATE), "<i2").tobytes()
    fmt = chunk(b"fmt ", struct.pack("<HHIIHH", 1, 1, RATE, 2 * RATE, 2, 16))
    if form == b"RIFF":
        body = b"".join(before) + fmt + chunk(b"data", samples) + after
        return form + struct.pack("<I", 4 + len(body)) + b"WAVE" + body
    sizes = chunk(b"ds64", struct.pack("<QQQI", 0, len(samples), 0, 0))
    data = b"data" + struct.pack("<I", 0xFFFFFFFF) + samples
    return form + struct.pack("<I", 0xFFFFFFFF) + b"WAVE" + sizes + b"".join(before) + fmt + data + after


def bext(date: bytes = b"2024-05-01", time: bytes = b"05:30:00", samples: int = 0) -> bytes:
    return chunk(b"bext", b"\0" * 320 + date + time + struct.pack("<Q", samples) + b"\1\0" + b"\0" * 254)


def guano(timestamp: str) -> bytes:
    text = f"GUANO|Version: 1.0\nMake: Recorder\nTimestamp: {timestamp}\nNote: a: b\n"
    return chunk(b"guan", text.encode())


def comment(text: str) -> bytes:
    return chunk(b"LIST", b"INFO" + chunk(b"ICMT", text.encode() + b"\0"))


@pytest.mark.parametrize(
    ("name", "time"),
    [
        ("20240501_053000.WAV", MORNING),
        ("20240501_053000T.WAV", MORNING),
        ("SITE1_20240501_053000.wav", MORNING),
        ("SITE1_0+1_20240501_053000_000.wav", MORNING),
        ("20230101_000000/20230101_120000_SITE1_20240501_053000.wav", MORNING),
        ("20240501T053000+1000_REC [-27.38-152.87].flac", MORNING.replace(tzinfo=timezone(timedelta(hours=10)))),
        ("20240501T053000-0330_REC.flac", MORNING.replace(tzinfo=timezone(-timedelta(hours=3, minutes=30)))),
        ("20240501T053000Z.wav", MORNING.replace(tzinfo=UTC)),
        ("20240501 053000.m4a", MORNING),
        ("2024-05-01 05.30.00.m4a", MORNING),
        ("2024_05_01_05_30_00.wav", MORNING),
        ("2024-05-01T05:30:00.250+02:00.wav", datetime(2024, 5, 1, 5, 30, 0, 250_000, timezone(timedelta(hours=2)))),
        ("2024-05-01-birdnet-05:30:00.mp3", MORNING),
        ("2024-05-01-birdnet-RTSP_1-05:30:00.mp3", MORNING),
        ("5678.240501053000.wav", MORNING),
        ("6631D358.WAV", datetime(2024, 5, 1, 5, 30, tzinfo=UTC)),
        ("58123456.WAV", datetime(2016, 10, 27, 17, 7, 34, tzinfo=UTC)),
        ("https://example.org/a/SITE1_20240501_053000.wav?x=20200101_000000", MORNING),
        (r"C:\sounds\20240501_053000.wav", MORNING),
    ],
)
def test_names_of_recorders(name: str, time: datetime) -> None:
    assert clock.from_name(name) == time
    found = clock.from_name(name)
    assert found is not None
    assert found.utcoffset() == time.utcoffset()


@pytest.mark.parametrize(
    "name",
    [
        *("a.wav", "1-100032-A-0.wav", "20240501.wav", "58123456.wav", "12345678.WAV", "deadbeef.wav", "FFFFFFFF.WAV"),
        *("20241301_053000.wav", "20240501_253000.wav", "120240501_053000.wav", "20240501_0530001.wav", "", "<stdin>"),
        *("10000101_000000.wav", "20240230_000000.wav", "20240501_053000/a.wav"),
    ],
)
def test_names_without_a_time(name: str) -> None:
    assert clock.from_name(name) is None


@pytest.mark.parametrize(
    ("chunks", "time"),
    [
        (guano("2024-05-01T05:30:00-06:00"), MORNING.replace(tzinfo=timezone(-timedelta(hours=6)))),
        (guano("2024-05-01 05:30:00.5Z"), MORNING.replace(microsecond=500_000, tzinfo=UTC)),
        (guano("2024-05-01T05:30:00"), MORNING),
        (comment("Recorded at 05:30:00 01/05/2024 (UTC) by AudioMoth 243B1F055C1FFB53"), MORNING.replace(tzinfo=UTC)),
        (
            comment("Recorded at 05:30:00.500 01/05/2024 (UTC-3:30) by AudioMoth 243B1F05"),
            datetime(2024, 5, 1, 5, 30, 0, 500_000, timezone(-timedelta(hours=3, minutes=30))),
        ),
        (bext(), MORNING),
        (bext(b"2024_05_01", b"05-30-00"), MORNING),
        (bext(samples=round((5.5 * 3600 + 0.25) * RATE)), MORNING.replace(microsecond=250_000)),
        (bext(samples=3600 * RATE), MORNING),  # a time code of its own
        (bext(time=b"\0" * 8, samples=round(5.5 * 3600 * RATE)), MORNING),
        (bext() + comment("Recorded at 05:30:01 01/05/2024 (UTC+2) by AudioMoth"), None),
        (guano("2024-05-01T05:30:02Z") + comment("Recorded at 05:30:01 01/05/2024 (UTC) by AudioMoth"), None),
    ],
)
@pytest.mark.parametrize("form", [b"RIFF", b"RF64"])
@pytest.mark.parametrize("behind", [False, True])
def test_metadata_of_recorders(tmp_path: Path, chunks: bytes, time: datetime | None, form: bytes, behind: bool) -> None:
    data = wav(after=chunks, form=form) if behind else wav(chunks, form=form)
    expected = time or clock.beginning(wav(chunks), "")
    path = tmp_path / "a.wav"
    path.write_bytes(data)
    stream = io.BytesIO(data)
    stream.seek(3)
    for source in (data, str(path), path, stream):
        found = clock.beginning(source, "a.wav")
        assert found is not None
        assert found == expected
        assert found.tzinfo == expected.tzinfo if expected else True
    assert stream.tell() == 3


def test_metadata_precede_names_except_for_bext() -> None:
    name = "20240501_053001.WAV"
    assert clock.beginning(wav(guano("2024-05-01T05:30:02Z")), name) == datetime(2024, 5, 1, 5, 30, 2, tzinfo=UTC)
    moth = comment("Recorded at 05:30:03 01/05/2024 (UTC) by AudioMoth")
    assert clock.beginning(wav(moth, guano("unknown")), name) == datetime(2024, 5, 1, 5, 30, 3, tzinfo=UTC)
    assert clock.beginning(wav(bext()), name) == datetime(2024, 5, 1, 5, 30, 1)
    assert clock.beginning(wav(bext()), "a.wav") == MORNING


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"RIFF", b"RIFF\xff\xff\xff\xffWAVE", b"RIFF\xff\xff\xff\xffWAVEguan\xff\xff\xff\xffTimestamp: "),
        *(
            wav(guano("9999-12-31T23:59:59")),
            wav(guano("2024-05-01")),
            wav(guano("\x1b[0m")),
            wav(chunk(b"guan", b"\xff")),
        ),
        *(wav(bext(b"0000-00-00")), wav(bext(b"9999-12-31")), wav(bext(b"\xff" * 10)), wav(chunk(b"bext", b"2024"))),
        *(
            wav(comment("Recorded at 99:99:99 99/99/2024 (UTC)")),
            wav(comment("Recorded at 05:30:00 01/05/2024 (UTC+99)")),
        ),
        b"RIFF\xff\xff\xff\xffWAVE" + chunk(b"junk", b"") * 100_000 + guano("2024-05-01T05:30:00"),
        b"RF64\xff\xff\xff\xffWAVEds64\x02\0\0\0\0\0data\xff\xff\xff\xff",
    ],
)
def test_damaged_metadata_have_no_time(data: bytes) -> None:
    assert clock.beginning(data, "a.wav") is None


def test_no_more_is_read_than_is_needed(tmp_path: Path) -> None:
    """A chunk of 4 GB that is claimed, and a file that is sparse."""
    path = tmp_path / "a.wav"
    with path.open("wb") as file:
        file.write(b"RIFF\xff\xff\xff\xffWAVEguan" + struct.pack("<I", 3_000_000_000))
        file.truncate(3_000_000_100)
    assert clock.beginning(path, "a.wav") is None


@pytest.mark.parametrize(
    "text", ["", "now", "2024-05-01", "05:30", "2024-05-01T25:00:00", "9999-12-31T23:59:59", "Auto"]
)
def test_clock_options_that_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="2024-05-01T05:30:00"):
        TagOptions(clock=text)


@pytest.mark.parametrize(
    ("name", "setting", "time"),
    [("20240501_053000.wav", "auto", MORNING), ("a.wav", "2024-05-01T05:30:00", MORNING), ("a.wav", "auto", None)],
)
def test_records_have_the_clock_time(
    tmp_path: Path, name: str, setting: str, time: datetime | None, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / name
    soundfile.write(path, np.zeros(3 * RATE), RATE)
    record = Tagger("esc10").tag(str(path), window=2.0, hop=2.0, clock=setting)
    assert record.began == time
    times = [clock_times(record.began, piece) for piece in record]
    if time is None:
        assert set(times) == {(None, None)}
        assert "a.wav" in caplog.text
        assert "start_time" not in record.to_rows()[0]
    else:
        assert times[0] == ("2024-05-01T05:30:00.000", "2024-05-01T05:30:02.000")
        assert record.to_rows()[0]["end_time"] == "2024-05-01T05:30:02.000"
