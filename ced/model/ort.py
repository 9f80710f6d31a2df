"""ONNX Runtime with its telemetry switched off: the only module of ced that imports it."""

import os
from importlib import import_module
from pathlib import Path
from types import ModuleType

from ced.errors import CheckpointError
from ced.telemetry import SWITCHES

os.environ.update(SWITCHES)

from onnxruntime import GraphOptimizationLevel, InferenceSession, SessionOptions

__all__ = [
    "GraphOptimizationLevel",
    "InferenceSession",
    "SessionOptions",
    "open_session",
    "quantization",
    "session_options",
]


def session_options(threads: int) -> SessionOptions:
    """Return options for sessions with a number of threads that log nothing: errors come as exceptions."""
    options = SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    return options


def open_session(path: Path, threads: int) -> InferenceSession:
    """Open a graph on the CPU.

    Raises:
        CheckpointError: the file is missing, damaged or not an ONNX graph.
    """
    if not path.is_file():
        raise CheckpointError(f"no graph at {path}")
    try:
        return InferenceSession(path, session_options(threads), providers=["CPUExecutionProvider"])
    except Exception as error:  # a damaged file may make ONNX Runtime fail in any way
        raise CheckpointError(f"graph {path} is damaged or not ONNX ({' '.join(str(error).split())})") from error


def quantization() -> ModuleType:
    """Import and return `onnxruntime.quantization`, which loads the package onnx."""
    return import_module("onnxruntime.quantization")
