"""Small files that try to exhaust whoever reads them: claims of gigabytes, endless loops, samples without end.

`CASES` has one function a case, each of which makes the bytes of a file; `write` puts them all into a folder. Each of
them must be refused, or read as far as it goes, in a few hundred megabytes and a few seconds.
"""

import struct
import zlib
from collections.abc import Callable
from pathlib import Path

CASES: dict[str, Callable[[], bytes]] = {}
_HUGE = 0x7FFFFFE0
_BELOW = 63 << 20  # a claim below the limit of what FFmpeg may allocate at once


def case(name: str) -> Callable[[Callable[[], bytes]], Callable[[], bytes]]:
    """Add a function to `CASES`, under the name of its file."""

    def add(make: Callable[[], bytes]) -> Callable[[], bytes]:
        CASES[name] = make
        return make

    return add


def write(folder: Path) -> list[Path]:
    """Write all cases into a folder, and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, make in CASES.items():
        (folder / name).write_bytes(make())
    return [folder / name for name in CASES]


# RIFF and other formats of chunks


def riff(kind: bytes, *chunks: bytes) -> bytes:
    body = kind + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def chunk(name: bytes, body: bytes, size: int | None = None) -> bytes:
    return name + struct.pack("<I", len(body) if size is None else size) + body


def fmt(rate: int = 16_000, channels: int = 1, kind: int = 1, frame: int | None = None, bits: int = 16) -> bytes:
    frame = channels * 2 if frame is None else frame
    speed = min(rate * frame, 2**32 - 1)
    return chunk(b"fmt ", struct.pack("<HHIIHH", kind, channels, rate, speed, frame % 65_536, bits))


@case("list.wav")
def wav_with_a_list_of_2_gb() -> bytes:
    return riff(b"WAVE", chunk(b"LIST", b"INFO" + chunk(b"ISFT", bytes(25), _HUGE), _HUGE))


@case("list_below_the_limit.wav")
def wav_with_a_list_below_the_limit() -> bytes:
    return riff(b"WAVE", chunk(b"LIST", b"INFO" + chunk(b"ISFT", bytes(25), _BELOW), _BELOW + 12))


@case("list_behind_samples.wav")
def wav_of_a_codec_for_ffmpeg_with_a_list_of_2_gb() -> bytes:
    """libsndfile has no such codec, so FFmpeg reads the file."""
    tags = chunk(b"LIST", b"INFO" + chunk(b"ISFT", b"", _BELOW), _BELOW + 12)
    return riff(b"WAVE", fmt(kind=0x2000), chunk(b"data", bytes(64)), tags)


@case("list.avi")
def avi_with_a_list_of_2_gb() -> bytes:
    return riff(b"AVI ", chunk(b"LIST", b"INFO" + chunk(b"ISFT", b"", _HUGE), _HUGE))


@case("list_below_the_limit.avi")
def avi_with_a_list_below_the_limit() -> bytes:
    return riff(b"AVI ", chunk(b"LIST", b"INFO" + chunk(b"ISFT", b"", _BELOW), _BELOW + 12))


def avi(handler: bytes, width: int, height: int, frames: list[bytes], index: bytes = b"") -> bytes:
    """Return a film of one stream, without sound."""
    head = chunk(b"avih", struct.pack("<14I", 40_000, 0, 0, 0x10, len(frames), 0, 1, 0, width, height, 0, 0, 0, 0))
    kind = b"vids" + handler + struct.pack("<IHHIIIIIIIIHHHH", 0, 0, 0, 0, 1, 25, 0, len(frames), 0, 0, 0, 0, 0, 0, 0)
    form = struct.pack("<IiiHH4sIiiII", 40, width, height, 1, 24, handler, 0, 0, 0, 0, 0)
    stream = chunk(b"LIST", b"strl" + chunk(b"strh", kind) + chunk(b"strf", form) + index)
    movie = chunk(b"LIST", b"movi" + b"".join(chunk(b"00dc", frame + b"\0" * (len(frame) % 2)) for frame in frames))
    return riff(b"AVI ", chunk(b"LIST", b"hdrl" + head + stream), movie)


def png(side: int) -> bytes:
    """Return a black picture."""
    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(1 + side)) for _ in range(side)) + packer.flush()
    parts = ((b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)), (b"IDAT", rows), (b"IEND", b""))
    framed = (
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


@case("picture.avi")
def film_of_one_large_picture() -> bytes:
    return avi(b"MPNG", 7_000, 7_000, [png(7_000)])


@case("pictures.avi")
def film_of_large_pictures() -> bytes:
    picture = png(4_000)
    return avi(b"MPNG", 4_000, 4_000, [picture] * 50)


@case("picture.png")
def picture_of_a_gigabyte() -> bytes:
    return png(16_000)


@case("index.avi")
def avi_with_an_index_of_billions() -> bytes:
    index = chunk(b"indx", struct.pack("<HBBI4sIII", 4, 0, 0, 0x7FFFFFFF, b"00dc", 0, 0, 0) + bytes(64))
    return avi(b"MJPG", 16, 16, [bytes(16)], index)


@case("channels.wav")
def wav_with_65535_channels() -> bytes:
    return riff(b"WAVE", fmt(channels=65_535), chunk(b"data", bytes(131_070)))


@case("speed.wav")
def wav_at_4_ghz() -> bytes:
    return riff(b"WAVE", fmt(rate=2**32 - 1), chunk(b"data", bytes(64)))


@case("blocks.wav")
def wav_of_adpcm_blocks_of_64_kb() -> bytes:
    body = struct.pack("<HHIIHHHH", 17, 2, 768_000, 768_000, 65_535, 4, 2, 65_535)
    return riff(b"WAVE", chunk(b"fmt ", body), chunk(b"data", bytes(65_535 * 4)))


@case("cues.wav")
def wav_with_billions_of_cues() -> bytes:
    cues = chunk(b"cue ", struct.pack("<I", 0xFFFFFFFF) + bytes(24))
    return riff(b"WAVE", fmt(), cues, chunk(b"data", bytes(3_200)))


@case("joined.wav")
def thousands_of_joined_wav_files() -> bytes:
    return riff(b"WAVE", fmt(), chunk(b"data", bytes(2))) * 20_000


@case("chunks.wav")
def wav_of_empty_chunks() -> bytes:
    return riff(b"WAVE", chunk(b"JUNK", b"") * 1_000_000, fmt(), chunk(b"data", bytes(3_200)))


@case("slow.aiff")
def aiff_at_1_hz() -> bytes:
    """38 kB that are five hours."""
    common = struct.pack(">4sIHIHHQ", b"COMM", 18, 1, 19_000, 16, 16_383, 1 << 63)
    sound = struct.pack(">4sIII", b"SSND", 8 + 38_000, 0, 0) + bytes(38_000)
    return b"FORM" + struct.pack(">I", 4 + len(common + sound)) + b"AIFF" + common + sound


@case("marks.aiff")
def aiff_with_marks_and_comments_of_2_gb() -> bytes:
    common = struct.pack(">4sIHIHHQ", b"COMM", 18, 1, 1_600, 16, 16_397, 16_000 << 50)
    marks = struct.pack(">4sIH", b"MARK", 2, 0xFFFF) + struct.pack(">4sI", b"ANNO", _HUGE)
    return b"FORM" + struct.pack(">I", 4 + len(common + marks)) + b"AIFF" + common + marks


@case("sizes.caf")
def caf_with_chunks_of_exabytes() -> bytes:
    form = struct.pack(">4sqd4sIIIII", b"desc", 32, 16_000.0, b"lpcm", 0, 2, 1, 1, 16)
    table = struct.pack(">4sqqqii", b"pakt", 1 << 40, 1 << 40, 1 << 40, 0, 0)
    return b"caff\0\1\0\0" + form + table + struct.pack(">4sqI", b"data", 1 << 62, 0) + bytes(64)


@case("sizes.w64")
def w64_with_chunks_of_exabytes() -> bytes:
    tail = bytes.fromhex("f3acd3118cd100c04f8edb8a")
    riff_id = b"riff" + bytes.fromhex("2e91cf11a5d628db04c10000")
    form = b"fmt " + tail + struct.pack("<QHHIIHH", 40, 1, 1, 16_000, 32_000, 2, 16)
    return riff_id + struct.pack("<Q", 1 << 62) + b"wave" + tail + form + b"junk" + tail + struct.pack("<Q", 1 << 62)


# MP4


def box(name: bytes, body: bytes, size: int | None = None) -> bytes:
    return struct.pack(">I", 8 + len(body) if size is None else size) + name + body


def full(name: bytes, body: bytes) -> bytes:
    return box(name, bytes(4) + body)


_TYPE = box(b"ftyp", b"isom\0\0\2\0isom")


@case("keys.mp4")
def mp4_with_keys_of_2_gb() -> bytes:
    return _TYPE + box(
        b"moov", box(b"meta", bytes(8) + box(b"keys", bytes(4) + struct.pack(">I", 0x0FFFFFF0) + bytes(8)))
    )


@case("keys_below_the_limit.mp4")
def mp4_with_keys_below_the_limit() -> bytes:
    keys = full(b"keys", struct.pack(">I", _BELOW // 8) + bytes(8))
    handler = full(b"hdlr", bytes(4) + b"mdta" + bytes(12))
    return _TYPE + box(b"moov", box(b"meta", bytes(4) + handler + keys))


def mp4(count: int, size: int, *more: bytes, tracks: int = 1, extends: bytes = b"") -> bytes:
    """Return a file of 16-bit samples at 16 kHz, with a table of `count` samples of `size` bytes each."""
    entry = box(b"sowt", bytes(6) + struct.pack(">HHHIHHHHI", 1, 0, 0, 0, 1, 16, 0, 0, 16_000 << 16))
    table = box(
        b"stbl",
        full(b"stsd", struct.pack(">I", 1) + entry)
        + full(b"stts", struct.pack(">III", 1, count, 1))
        + full(b"stsc", struct.pack(">IIII", 1, 1, count, 1))
        + full(b"stsz", struct.pack(">II", size, count))
        + full(b"stco", struct.pack(">II", 1, 40))
        + b"".join(more),
    )
    media = (
        full(b"mdhd", struct.pack(">IIIIHH", 0, 0, 16_000, min(count, 2**31), 0, 0))
        + full(b"hdlr", bytes(4) + b"soun" + bytes(13))
        + box(b"minf", full(b"smhd", bytes(4)) + table)
    )
    header = full(b"tkhd", struct.pack(">IIIII", 0, 0, 1, 0, count & 0x7FFFFFFF) + bytes(60))
    track = box(b"trak", header + box(b"mdia", media))
    film = full(b"mvhd", struct.pack(">IIII", 0, 0, 16_000, count & 0x7FFFFFFF) + bytes(80))
    return _TYPE + box(b"mdat", bytes(8_000)) + box(b"moov", film + track * tracks + extends)


@case("samples.mp4")
def mp4_with_billions_of_samples() -> bytes:
    return mp4(0x7FFFFFF0, 2)


@case("samples_below_the_limit.mp4")
def mp4_with_millions_of_samples() -> bytes:
    """Their index is as large as may be."""
    return mp4(2_700_000, 100)


@case("tracks.mp4")
def mp4_with_thousands_of_tracks() -> bytes:
    return mp4(100, 2, tracks=5_000)


@case("edits.mp4")
def mp4_with_tables_of_billions() -> bytes:
    return mp4(100, 2, full(b"ctts", struct.pack(">I", 0x1FFFFFFF)), full(b"stss", struct.pack(">I", 0x3FFFFFFF)))


@case("nested.mp4")
def mp4_nested_deeply() -> bytes:
    data = b""
    for _ in range(20_000):
        data = box(b"moov", data)
    return _TYPE + data


@case("boxes.mp4")
def mp4_of_empty_boxes() -> bytes:
    return _TYPE + box(b"free", b"") * 1_000_000


@case("fragments.mp4")
def mp4_fragments_of_billions() -> bytes:
    run = full(b"trun", struct.pack(">I", 0x7FFFFFFF) + bytes(400))
    piece = box(b"moof", box(b"traf", full(b"tfhd", struct.pack(">I", 1)) + run))
    extends = box(b"mvex", full(b"trex", struct.pack(">IIIII", 1, 1, 1, 2, 0)))
    return mp4(1, 2, extends=extends) + piece * 100


# Matroska


def element(identity: str, body: bytes, size: int | None = None) -> bytes:
    size = len(body) if size is None else size
    return bytes.fromhex(identity) + (size | 1 << 56).to_bytes(8) + body


_EBML = element("1a45dfa3", element("4282", b"matroska"))


@case("private.mkv")
def mkv_with_codec_data_of_2_gb() -> bytes:
    track = element("d7", b"\1") + element("83", b"\2") + element("86", b"A_VORBIS") + element("63a2", bytes(64), _HUGE)
    return _EBML + element("18538067", element("1654ae6b", element("ae", track, 1 << 32), 1 << 33), 1 << 34)


@case("titles.mkv")
def mkv_with_titles_below_the_limit() -> bytes:
    titles = element("7ba9", bytes(64), _BELOW) * 20
    return _EBML + element("18538067", element("1549a966", titles, 1 << 33), 1 << 34)


@case("tracks.mkv")
def mkv_with_thousands_of_tracks() -> bytes:
    def track(number: int) -> bytes:
        return element("ae", element("d7", number.to_bytes(2)) + element("83", b"\2") + element("86", b"A_PCM/INT/LIT"))

    return _EBML + element("18538067", element("1654ae6b", b"".join(map(track, range(1, 20_000)))))


@case("nested.mkv")
def mkv_nested_deeply() -> bytes:
    """Tags within tags, which may be nested."""
    data = b""
    for _ in range(2_000):
        data = element("67c8", data)
    return _EBML + element("18538067", element("1254c367", element("7373", data)))


# FLAC


def _crc(data: bytes, polynomial: int, bits: int) -> int:
    value = 0
    for byte in data:
        value ^= byte << bits - 8
        for _ in range(8):
            value = (value << 1 ^ polynomial if value >> bits - 1 else value << 1) & (1 << bits) - 1
    return value


def flac_header(rate: int, channels: int, frames: int) -> bytes:
    packed = rate << 44 | channels - 1 << 41 | 15 << 36 | frames
    body = struct.pack(">HH", 65_535, 65_535) + bytes(6) + packed.to_bytes(8) + bytes(16)
    return b"fLaC" + b"\x80" + len(body).to_bytes(3) + body


def flac(rate_code: int, rate: bytes, channels: int, blocks: int, size: int = 65_535) -> bytes:
    """Return blocks of `size` frames of silence, of 60 bytes at most."""
    parts = []
    for number in range(blocks):
        coded = chr(number).encode("utf-8", "surrogatepass")
        head = bytes((0xFF, 0xF8, 0x70 | rate_code, channels - 1 << 4 | 8)) + coded + (size - 1).to_bytes(2) + rate
        head += bytes((_crc(head, 0x07, 8),))
        frame = head + bytes(3) * channels
        parts.append(frame + _crc(frame, 0x8005, 16).to_bytes(2))
    return b"".join(parts)


@case("silence.flac")
def flac_of_ten_minutes_of_8_channels_at_655_khz() -> bytes:
    """3 billion samples in 250 kB."""
    return flac_header(655_350, 8, 65_535 * 5_900) + flac(14, b"\xff\xff", 8, 5_900)


@case("comments.flac")
def flac_with_billions_of_comments() -> bytes:
    body = struct.pack("<I", 0) + struct.pack("<I", 0xFFFFFFFF) + bytes(64)
    start = flac_header(16_000, 1, 65_535)
    return start[:4] + b"\x00" + start[5:] + b"\x84" + len(body).to_bytes(3) + body + flac(0, b"", 1, 1)


@case("picture.flac")
def flac_with_a_picture_of_2_gb() -> bytes:
    body = struct.pack(">II", 3, _HUGE) + bytes(64)
    start = flac_header(16_000, 1, 65_535)
    return start[:4] + b"\x00" + start[5:] + b"\x86" + len(body).to_bytes(3) + body + flac(0, b"", 1, 1)


@case("joined.flac")
def thousands_of_joined_flac_files() -> bytes:
    return (flac_header(16_000, 1, 1_600) + flac(0, b"", 1, 1, 1_600)) * 5_000


# OGG

_PAGE_CRC = [_crc(bytes((byte,)), 0x04C11DB7, 32) for byte in range(256)]


def page(body: bytes, number: int, flags: int = 0, granule: int = 0, serial: int = 1) -> bytes:
    """Return one page with one packet, or an empty one."""
    laces = bytes([255] * (len(body) // 255) + [len(body) % 255]) if body else b""
    head = struct.pack("<4sBBqIIIB", b"OggS", 0, flags, granule, serial, number, 0, len(laces)) + laces
    value = 0
    for byte in head + body:
        value = (value << 8 & 0xFFFFFFFF) ^ _PAGE_CRC[value >> 24 ^ byte]
    return head[:22] + struct.pack("<I", value) + head[26:] + body


def opus_start(channels: int) -> bytes:
    head = b"OpusHead" + struct.pack("<BBHIhB", 1, channels, 0, 48_000, 0, 255 if channels > 2 else 0)
    if channels > 2:
        head += bytes((channels, 0)) + bytes(range(channels))
    tags = b"OpusTags" + struct.pack("<II", 0, 0)
    return page(head, 0, 2) + page(tags, 1)


@case("channels.opus")
def opus_of_255_channels() -> bytes:
    """A minute of 255 streams of nothing."""
    packet = b"\xf8\x00" * 254 + b"\xf8"
    pages = (page(packet, 2 + number, granule=960 * (number + 1)) for number in range(300))
    return opus_start(255) + b"".join(pages)


@case("long.opus")
def opus_of_packets_of_one_byte() -> bytes:
    """Each of them is 120 ms of silence; ten minutes in 16 kB."""
    pages = []
    for number in range(20):
        laces = bytes([2]) * 255
        body = b"\xfb\x06" * 255
        head = struct.pack("<4sBBqIIIB", b"OggS", 0, 0, 5_760 * 255 * (number + 1), 1, number + 2, 0, 255) + laces
        value = 0
        for byte in head + body:
            value = (value << 8 & 0xFFFFFFFF) ^ _PAGE_CRC[value >> 24 ^ byte]
        pages.append(head[:22] + struct.pack("<I", value) + head[26:] + body)
    return opus_start(2) + b"".join(pages)


@case("empty_pages.ogg")
def ogg_of_empty_pages() -> bytes:
    return opus_start(1) + page(b"", 2) * 300_000


@case("chained.ogg")
def thousands_of_chained_streams() -> bytes:
    return b"".join(opus_start(1) + page(b"\xf8", 2, 4, 960) for _ in range(5_000))


@case("comments.ogg")
def ogg_with_comments_of_2_gb() -> bytes:
    head = b"OpusHead" + struct.pack("<BBHIhB", 1, 1, 0, 48_000, 0, 0)
    return page(head, 0, 2) + page(b"OpusTags" + struct.pack("<II", _HUGE, 0xFFFFFFFF), 1) + page(b"\xf8", 2, 4, 960)


# MP3 and others


@case("tag.mp3")
def mp3_with_a_tag_of_256_mb() -> bytes:
    return b"ID3\4\0\0\x7f\x7f\x7f\x7f" + b"APIC\x7f\x7f\x7f\x7f\0\0" + b"\xff\xfb\x90\x64" * 100


@case("tags.mp3")
def mp3_of_empty_tags() -> bytes:
    return b"ID3\4\0\0\0\0\0\0" * 500_000


@case("tags.flv")
def flv_of_empty_tags() -> bytes:
    return b"FLV\1\4\0\0\0\x09\0\0\0\0" + (b"\x08" + bytes(14)) * 500_000


@case("syncs.mp3")
def mp3_of_headers_only() -> bytes:
    return b"\xff\xfb\x90\x64" * 500_000


@case("ones.mp3")
def bytes_of_ones() -> bytes:
    return b"\xff" * 4_000_000


@case("garbage.mp3")
def mp3_with_megabytes_between_frames() -> bytes:
    frames = (b"\xff\xfb\x90\x64" + bytes(413)) * 40
    return frames + bytes(8_000_000) + frames


@case("xing.mp3")
def thousands_of_joined_mp3_files() -> bytes:
    first = bytearray(b"\xff\xfb\x90\x64" + bytes(413))
    first[36:52] = b"Xing" + struct.pack(">III", 3, 4, 5 * 417)
    return (bytes(first) + (b"\xff\xfb\x90\x64" + bytes(413)) * 4) * 3_000


@case("frames.tta")
def tta_of_billions_of_samples() -> bytes:
    head = b"TTA1" + struct.pack("<HHHII", 1, 64, 16, 768_000, 0xFFFFFFF0)
    return head + struct.pack("<I", zlib.crc32(head)) + bytes(64)


@case("frames.ape")
def ape_of_billions_of_frames() -> bytes:
    head = struct.pack("<4sHHIIIIIII", b"MAC ", 3_990, 0, 52, 24, _HUGE & ~3, 44, 0, 0, 0) + bytes(16)
    return head + struct.pack("<HHIIIHHI", 2_000, 0, 73_728, 1, 0x0FFFFFFF, 16, 2, 44_100) + bytes(64)


@case("header.wma")
def asf_with_objects_of_exabytes() -> bytes:
    start = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")
    content = bytes.fromhex("3326b2758e66cf11a6d900aa0062ce6c")
    return start + struct.pack("<QIBB", 1 << 40, 0xFFFFFFFF, 1, 2) + content + struct.pack("<Q", 1 << 39) + b"\xff" * 64


@case("tables.ts")
def ts_with_thousands_of_streams() -> bytes:
    """A program table for each packet identifier, each with its own stream."""

    def section(pid: int, body: bytes) -> bytes:
        body += _crc32(body)
        return struct.pack(">BHB", 0x47, 0x4000 | pid, 0x10) + (b"\0" + body).ljust(184, b"\xff")

    programs = [(number, 0x20 + number) for number in range(1, 40)]
    listed = b"".join(struct.pack(">HH", number, 0xE000 | pid) for number, pid in programs)
    packets = [section(0, struct.pack(">BHHBBB", 0, 0xB000 | 9 + len(listed), 1, 0xC1, 0, 0) + listed)]
    for version in range(32):
        for number, pid in programs:
            kinds = b"".join(
                struct.pack(">BHH", 3, 0xE000 | 0x100 + (version * 1_170 + number * 30 + at) % 7_000, 0xF000)
                for at in range(30)
            )
            head = struct.pack(
                ">BHHBBBHH", 2, 0xB000 | 13 + len(kinds), number, 0xC1 | version << 1, 0, 0, 0xE100, 0xF000
            )
            packets.append(section(pid, head + kinds))
    return b"".join(packets) * 4


def _crc32(data: bytes) -> bytes:
    value = 0xFFFFFFFF
    for byte in data:
        value = (value << 8 & 0xFFFFFFFF) ^ _PAGE_CRC[value >> 24 ^ byte]
    return struct.pack(">I", value)


@case("list.m3u8")
def playlist_to_other_files() -> bytes:
    return b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n" + b"#EXTINF:9,\nfile:///dev/zero\n" * 10_000


@case("list.ffconcat")
def list_of_other_files() -> bytes:
    return b"ffconcat version 1.0\n" + b"file /dev/zero\n" * 10_000


@case("lines.srt")
def subtitles_of_one_long_line() -> bytes:
    return b"1\n00:00:01,000 --> 00:00:02,000\n" + b"x" * 8_000_000
