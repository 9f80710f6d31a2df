"""Draw docs/app.png: the page of `ced app -m esc10` that has heard four recordings its model did not learn from.

`python scripts/draw_app.py ESC10` needs Chromium and the extras app and dev.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import soundfile
from numpy.typing import NDArray
from playwright.sync_api import sync_playwright

from ced.sound.audio import SAMPLE_RATE, load
from ced.sound.tables import read_table

PICTURE = Path(__file__).parents[1] / "docs" / "app.png"
HELD_OUT = "5"  # the fold
HEARD = ("Rooster", "Dog bark", "Baby cry", "Rain")  # one recording each, one after the other


def sequence(data: Path) -> NDArray[np.float32]:
    """Return the first held-out recording of each class, in a row, (t,)."""
    meta = read_table(data / "meta.tsv", required=("filename", "fold", "name"))
    rows = list(zip(meta.column("filename"), meta.column("fold"), meta.column("name"), strict=True))
    first = {name: filename for filename, fold, name in reversed(rows) if fold == HELD_OUT}
    return np.concatenate([load(data / "audio" / first[name]) for name in HEARD])


def main() -> None:
    """Start the page, hand the sound over, and take the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="ESC-10, a folder with meta.tsv and audio/")
    data = parser.parse_args().data
    command = [sys.executable, "-m", "ced", "app", "-m", "esc10", "--port", "0"]
    with (
        TemporaryDirectory() as folder,
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}) as app,
        sync_playwright() as driver,
    ):
        sound = Path(folder) / "farm.wav"
        soundfile.write(sound, sequence(data), SAMPLE_RATE)
        assert app.stdout is not None
        address = app.stdout.readline().strip()
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1100, "height": 900}, color_scheme="light")
        page.goto(address)
        page.set_input_files("#ced-file input[type=file]", sound)
        page.locator("#ced-table tbody tr").first.wait_for()
        page.wait_for_timeout(1500)  # until the pictures are there
        page.screenshot(path=PICTURE)
        browser.close()
        app.terminate()


if __name__ == "__main__":
    main()
