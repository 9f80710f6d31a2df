"""ONNX Runtime with its telemetry switched off, and its devices: the only module of ced that imports it."""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType

from ced.environment import SWITCHES
from ced.errors import CheckpointError, ConfigError

os.environ.update(SWITCHES)

import onnxruntime
from onnxruntime import ExecutionMode, GraphOptimizationLevel, InferenceSession, SessionOptions

__all__ = [
    "AUTO",
    "CPU",
    "PROVIDERS",
    "Device",
    "ExecutionMode",
    "GraphOptimizationLevel",
    "InferenceSession",
    "SessionOptions",
    "available",
    "find_device",
    "open_session",
    "quantization",
    "session_options",
]

AUTO = "auto"
# Names of devices, and the execution provider of each; `auto` takes the first that is available.
PROVIDERS: Mapping[str, str] = {
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "migraphx": "MIGraphXExecutionProvider",
    "directml": "DmlExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "webgpu": "WebGpuExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    "qnn": "QNNExecutionProvider",
    "cann": "CANNExecutionProvider",
    "cpu": "CPUExecutionProvider",
}
_NUMBERED = ("cuda", "tensorrt", "migraphx", "directml", "cann")  # that a machine may have several of
_OPTIONS: Mapping[str, Mapping[str, str]] = {
    # TensorFloat-32 would change scores by up to 1e-3; exhaustive search would be repeated for each shape of a batch.
    "cuda": {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"},
}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Device:
    """Where sessions run.

    Attributes:
        name: a name of `PROVIDERS`.
        number: of several such devices, from 0; None: the first.
        required: refuse to run elsewhere.
    """

    name: str
    number: int | None = None
    required: bool = True

    @property
    def is_cpu(self) -> bool:
        """Whether it is the CPU."""
        return self.name == "cpu"

    def __str__(self) -> str:
        return self.name if self.number is None else f"{self.name}:{self.number}"


CPU = Device("cpu")


def available() -> list[str]:
    """Return the names of the devices whose providers the installed ONNX Runtime has."""
    installed = onnxruntime.get_available_providers()
    return [name for name, provider in PROVIDERS.items() if provider in installed]


def find_device(text: str | None) -> Device:
    """Return the device that an option names.

    Args:
        text: a name of `PROVIDERS`, with the number of one of several devices behind a colon, as "cuda:1"; "auto": the
            first accelerator that is available, else the CPU; None: the CPU.

    Raises:
        ConfigError: there is no such device, or the installed ONNX Runtime cannot use it.
    """
    if text is None:
        return CPU
    here = available()
    if text == AUTO:
        return Device(here[0], required=False) if here and here[0] != "cpu" else CPU
    name, colon, number = text.lower().partition(":")
    if name not in PROVIDERS or (colon and not (name in _NUMBERED and number.isascii() and number.isdigit())):
        raise ConfigError(f"device is {text!r}; available here: {', '.join([AUTO, *here])}")
    if name not in here:
        raise ConfigError(
            f"device is {text!r}, which this ONNX Runtime ({onnxruntime.__version__}) cannot use; available here:"
            f" {', '.join([AUTO, *here])}; other devices need another build of it, as onnxruntime-gpu for cuda"
        )
    return Device(name, int(number) if colon else None)


def session_options(threads: int) -> SessionOptions:
    """Return options for sessions with a number of threads that log nothing: errors come as exceptions."""
    options = SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    return options


def open_session(path: Path, threads: int, device: Device = CPU) -> InferenceSession:
    """Open a graph.

    Raises:
        CheckpointError: the file is missing, damaged or not an ONNX graph.
        ConfigError: the device is required and cannot be used, as without its driver.
    """
    if not path.is_file():
        raise CheckpointError(f"no graph at {path}")
    if device.is_cpu:
        return _opened(path, session_options(threads), [PROVIDERS["cpu"]])
    options = session_options(threads)
    if device.name == "directml":  # as its documentation asks
        options.enable_mem_pattern = False
        options.execution_mode = ExecutionMode.ORT_SEQUENTIAL
    settings = dict(_OPTIONS.get(device.name, {}))
    if device.number is not None:
        settings["device_id"] = str(device.number)
    wanted = PROVIDERS[device.name]
    try:
        session = _opened(path, options, [(wanted, settings), PROVIDERS["cpu"]])
        usable, reason = wanted in session.get_providers(), "its driver or libraries are missing"
        session.disable_fallback()  # to the CPU, in the middle of the work
    except CheckpointError as error:
        _opened(path, session_options(threads), [PROVIDERS["cpu"]])  # unless the graph itself is at fault
        usable, reason = False, error.message
    if usable:
        return session
    if device.required:
        raise ConfigError(f"device is {str(device)!r}, but ONNX Runtime cannot use it: {reason}")
    logger.info("device %s cannot be used, the CPU is: %s", device, reason)
    return _opened(path, session_options(threads), [PROVIDERS["cpu"]])


def _opened(
    path: Path, options: SessionOptions, providers: "list[str | tuple[str, dict[str, str]]]"
) -> InferenceSession:
    try:
        return InferenceSession(path, options, providers=providers)
    except Exception as error:  # a damaged file may make ONNX Runtime fail in any way
        raise CheckpointError(f"graph {path} is damaged or not ONNX ({' '.join(str(error).split())})") from error


def quantization() -> ModuleType:
    """Import and return `onnxruntime.quantization`, which loads the package onnx."""
    return import_module("onnxruntime.quantization")
