"""List the functions of `ced` that a real run of each walk calls: tag a sound, store views, train a student.

`python -m scripts.walks` prints the files of these functions; `--json` prints all functions, in the order of their
first call. Functions that are called during an import do not count.
"""

import json
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import soundfile

import ced

_PACKAGE = Path(ced.__file__).parent
_RATE = 16_000


def called(work: Callable[[], object]) -> list[str]:
    """Run `work` and return the functions of `ced` that it calls in any thread, in the order of the first call.

    A function is named by its file in the package and its name there, as `tag/tagger.py:Tagger.score`.
    """
    found: dict[str, None] = {}

    def note(frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(str(_PACKAGE)):
            return
        name = f"{Path(code.co_filename).relative_to(_PACKAGE).as_posix()}:{code.co_qualname}"
        if name not in found and not _importing(frame):
            found[name] = None

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return list(found)


def files(functions: list[str]) -> list[str]:
    """Return the files of functions, in the order of the first call."""
    return list(dict.fromkeys(name.partition(":")[0] for name in functions))


def _importing(frame: FrameType) -> bool:
    """Return whether a frame is part of the import of a module of `ced`."""
    at: FrameType | None = frame
    while at is not None:
        if at.f_code.co_name == "<module>" and at.f_code.co_filename.startswith(str(_PACKAGE)):
            return True
        at = at.f_back
    return False


@contextmanager
def _sounds() -> Iterator[Path]:
    """Make a folder with four sounds of a second and their table."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rng = np.random.default_rng(0)
        for number in range(4):
            soundfile.write(folder / f"{number}.wav", rng.normal(0, 0.1, _RATE), _RATE)
        rows = [f"{folder / f'{number}.wav'}\n" for number in range(4)]
        (folder / "sounds.tsv").write_text("filename\n" + "".join(rows), encoding="utf-8")
        yield folder


def _command(*words: str) -> None:
    """Run `ced` in this process, with its output left out."""
    from ced.cli import main

    before, sys.argv = sys.argv, ["ced"]
    try:
        with redirect_stdout(StringIO()):
            main(*words)
    except SystemExit as end:
        if end.code:
            raise RuntimeError(f"ced {' '.join(words)} ended with exit code {end.code}") from end
    finally:
        sys.argv = before


def walks() -> dict[str, list[str]]:
    """Run the command of each walk, and return the functions that each calls, in the order of the first call."""
    from ced.model import loading
    from ced.sound.labels import audioset

    found: dict[str, list[str]] = {}
    with _sounds() as folder:
        data = ("--train_data", str(folder / "labels" / "sounds.tsv"), "--outputpath", str(folder / "out"))
        few = ("--epochs", "1", "--batch_size", "2")
        _command("pack", str(folder / "sounds.tsv"), str(folder))
        small = {"depth": 1, "embed_dim": 32, "num_heads": 2}
        teacher = folder / "teacher.safetensors"
        loading.save(teacher, loading.create("ced_tiny", model_args=small, pretrained=False, labels=audioset()))
        model = ("--model", str(teacher))
        found["tag"] = called(lambda: _command("tag", str(folder / "0.wav"), "-m", "esc10"))
        found["store"] = called(lambda: _command("store", *data, *few, *model, "--chunk_length", "1"))
        (store,) = folder.glob("out/*/sounds/chunk_1")
        found["train"] = called(lambda: _command("train", *model, *data, *few, "--logitspath", str(store)))
    return found


if __name__ == "__main__":
    result = walks()
    if "--json" in sys.argv:
        print(json.dumps(result))
    else:
        for walk, functions in result.items():
            entered = files(functions)
            print(f"{walk}: {len(entered)} files\n  " + "\n  ".join(entered))
