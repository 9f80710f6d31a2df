"""A decoder that crashes its process: whatever opens a certain file is ended as a bad memory access would end it."""

from pathlib import Path

POISONED = "poisoned.wav"
_SITE = """
import os, signal, sys

def crash(event, arguments):
    if event == "open" and str(arguments[0]).endswith("poisoned.wav"):
        os.kill(os.getpid(), signal.SIGSEGV)

sys.addaudithook(crash)
"""


def crashing_site(folder: Path) -> Path:
    """Return a folder that makes processes crash so, if it is on their PYTHONPATH."""
    site = folder / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(_SITE)
    return site
