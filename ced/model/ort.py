"""ONNX Runtime with its telemetry switched off: the only module of ced that imports it."""

import os
from importlib import import_module
from types import ModuleType

from ced.telemetry import SWITCHES

os.environ.update(SWITCHES)

from onnxruntime import GraphOptimizationLevel, InferenceSession, SessionOptions

__all__ = ["GraphOptimizationLevel", "InferenceSession", "SessionOptions", "quantization"]


def quantization() -> ModuleType:
    """Import and return `onnxruntime.quantization`, which loads the package onnx."""
    return import_module("onnxruntime.quantization")
