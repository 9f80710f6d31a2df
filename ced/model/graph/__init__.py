"""The network as an ONNX graph, made from weights without torch. Here: what a graph is called from outside.

Importing this brings neither the package onnx nor a runtime; the modules beside it do.
"""

import hashlib
from functools import cache
from pathlib import Path
from typing import Literal

import ced

GraphInput = Literal["wave", "feats"]
Precision = Literal["float32", "int8"]
PRECISIONS: tuple[Precision, ...] = ("float32", "int8")

LABELS_FILE = "class_labels_indices.csv"  # beside a graph of features: the class table, written as AudioSet's is
PROB, EMBEDDING, COLUMNS = "prob", "embedding", "columns"  # outputs
# Keys of the metadata:
CLASSES = "classes"  # the class table as JSON
OUTPUT = "output"  # what `prob` holds
PROBABILITIES = "probabilities"
PRECISION = "precision"
RATE = "sample_rate"  # of the input, in Hz
FRAME_HOP = "hop"  # samples from one frame to the next
PIECE = "piece"  # frames of one forward pass; longer waves are cut
LONGEST = "longest"  # samples of the longest wave; only there where longer waves fail
HEAD = "head"  # only there where the network has no output layer
NO_HEAD = "none"

_MODEL = Path(__file__).parents[1]
_SOURCES = (
    *sorted(Path(__file__).parent.glob("*.py")),
    _MODEL / "config.py",
    _MODEL / "weights.py",
    _MODEL / "runtime.py",
    _MODEL.parent / "sound" / "features.py",
    _MODEL.parent / "sound" / "labels.py",
    _MODEL.parent / "sound" / "audioset_classes.tsv",
)


@cache
def code_digest() -> str:
    """Return a digest of the version and of the code that decides what a graph computes, 16 hex digits.

    Graphs in the cache are named by it, so that changed code never meets a graph of its predecessor.
    """
    digest = hashlib.sha256(ced.__version__.encode())
    for path in _SOURCES:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
