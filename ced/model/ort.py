"""ONNX Runtime with its telemetry switched off: the only module of ced that imports it."""

import os
from importlib import import_module
from types import ModuleType

# ONNX Runtime reads this once, when it is imported; setting it later, or calling its API, leaves files and look-ups.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

from onnxruntime import GraphOptimizationLevel, InferenceSession, SessionOptions

__all__ = ["GraphOptimizationLevel", "InferenceSession", "SessionOptions", "quantization"]


def quantization() -> ModuleType:
    """Import and return `onnxruntime.quantization`, which loads the package onnx."""
    return import_module("onnxruntime.quantization")
