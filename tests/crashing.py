"""Machines with faults: a decoder crashes its process as a bad memory access would end it, or a package is missing."""

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


_LACKING = """
import sys

class Lacking:
    def find_spec(self, name, *_):
        if name == "ced":
            raise ModuleNotFoundError("No module named 'ced'", name="ced")

sys.meta_path.insert(0, Lacking())
"""


def lacking_site(folder: Path) -> Path:
    """Return a folder that makes processes lack this package, if it is on their PYTHONPATH."""
    site = folder / "lacking"
    site.mkdir()
    (site / "sitecustomize.py").write_text(_LACKING)
    return site
