"""Draw docs/page.png: the page of `ced app -m esc10` with four recordings that its model was not trained on.

`python scripts/draw_page.py ESC10` needs Chromium and the extras serve and dev.
"""

import argparse
import os
import re
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

PICTURE = Path(__file__).parents[1] / "docs" / "page.png"
HELD_OUT = "5"  # the fold
CLASSES = ("Rooster", "Dog bark", "Baby cry", "Rain")  # one recording each, concatenated


def sequence(data: Path) -> NDArray[np.float32]:
    """Return the first held-out recording of each class, in a row, (t,)."""
    meta = read_table(data / "meta.tsv", required=("filename", "fold", "name"))
    rows = list(zip(meta.column("filename"), meta.column("fold"), meta.column("name"), strict=True))
    first = {name: filename for filename, fold, name in reversed(rows) if fold == HELD_OUT}
    return np.concatenate([load(data / "audio" / first[name]) for name in CLASSES])


def main() -> None:
    """Start the server, upload the sound, and take the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="ESC-10, a folder with meta.tsv and audio/")
    data = parser.parse_args().data
    command = [sys.executable, "-m", "ced", "app", "-m", "esc10", "--no-browser"]
    with (
        TemporaryDirectory() as folder,
        subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}) as app,
        sync_playwright() as driver,
    ):
        sound = Path(folder) / "farm.wav"
        soundfile.write(sound, sequence(data), SAMPLE_RATE)
        assert app.stderr is not None
        address = re.search(r"http://\S+?(?=[,\s])", app.stderr.readline())
        assert address is not None
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 914}, color_scheme="light")
        page.goto(address[0])
        page.set_input_files("#files", sound)
        page.locator("#queue .done").wait_for()
        page.locator("#events tbody tr").nth(2).click()
        page.locator("h1").click()  # takes the focus away
        page.evaluate("document.getElementById('audio').currentTime = 6.4")
        page.wait_for_timeout(1000)  # until everything is drawn
        page.screenshot(path=PICTURE)
        browser.close()
        app.terminate()


if __name__ == "__main__":
    main()
