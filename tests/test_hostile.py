"""Files that try to exhaust their reader are read, or refused, in bounded memory and time."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import hostile

pytestmark = pytest.mark.slow

MOST_MEMORY, MOST_SECONDS = 400, 10  # MB and seconds of a processor, a case
# Reads each file that is named on its command line as a server would, and prints what it took, a line of JSON each.
PROGRAM = """
import json, os, resource, sys, time
from ced.errors import AudioError
from ced.sound.audio import open_sound

def reset():
    try:
        with open("/proc/self/clear_refs", "w") as file:  # Linux only; elsewhere the peak is that of all so far
            file.write("5")
    except OSError:
        pass

def peak():
    try:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) / 1000 for line in file if line.startswith("VmHWM"))
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)

for path in sys.argv[1:]:
    reset()
    begin, seconds, reason = time.process_time(), 0.0, ""
    try:
        with open_sound(path, budget=3_600 * 48_000 * 2) as sound:
            for block in sound.blocks():
                seconds += len(block) / 16_000
    except AudioError as error:
        reason = error.reason
    case = {"name": os.path.basename(path), "took": time.process_time() - begin, "peak": peak(), "seconds": seconds}
    print(json.dumps(case | {"reason": reason}))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="memory is measured in POSIX's ways")
def test_files_that_try_to_exhaust_their_reader(tmp_path: Path) -> None:
    paths = hostile.write(tmp_path)
    command = [sys.executable, "-c", PROGRAM, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    found = {line["name"]: line for line in map(json.loads, done.stdout.splitlines())}
    assert set(found) == set(hostile.CASES)
    for name, case in found.items():
        assert case["peak"] < MOST_MEMORY, name
        assert case["took"] < MOST_SECONDS, name
        assert case["reason"] or case["seconds"], name
        assert case["reason"].isprintable(), name
    refused = {name for name, case in found.items() if case["reason"]}
    assert {"list.wav", "list.avi", "slow.aiff", "speed.wav", "channels.wav", "silence.flac", "list.m3u8"} <= refused
    assert not {"cues.wav", "comments.flac", "garbage.mp3", "long.opus"} & refused


def test_the_smallest_cases_are_small() -> None:
    assert len(hostile.CASES["list.avi"]()) < 64
    assert max(len(make()) for make in hostile.CASES.values()) < 10_000_000
