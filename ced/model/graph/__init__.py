"""The network as an ONNX graph, made from weights without torch. This module: the names of its outputs and metadata.

It imports neither the package onnx nor a runtime; the modules beside it do.
"""

import hashlib
from functools import cache
from pathlib import Path
from typing import Literal

import ced

GraphInput = Literal["wave", "feats"]
Precision = Literal["float32", "int8"]
PRECISIONS: tuple[Precision, ...] = ("float32", "int8")

LABELS_FILE = "class_labels_indices.csv"  # beside a graph of features: its class table, in the format of AudioSet's
PROB, EMBEDDING, COLUMNS = "prob", "embedding", "columns"  # outputs
# Keys of the metadata:
CLASSES = "classes"  # the class table as JSON
OUTPUT = "output"  # the kind of scores in `prob`
PROBABILITIES = "probabilities"
PRECISION = "precision"
RATE = "sample_rate"  # of the input, in Hz
FRAME_HOP = "hop"  # samples from one frame to the next
PIECE = "piece"  # frames of one forward pass; longer waves are cut into pieces
LONGEST = "longest"  # samples of the longest wave; only present where longer waves fail
HEAD = "head"  # only present where the network has no output layer
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
    """Return a digest of the version and of the code that determines a graph, 16 hex digits.

    It is part of the names of cached graphs, so that changed code never uses an old graph.
    """
    digest = hashlib.sha256(ced.__version__.encode())
    for path in _SOURCES:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
