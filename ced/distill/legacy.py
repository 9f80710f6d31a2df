"""The meta.pt of a published view store, read without executing any of it.

The file is a zip around a pickle of module objects. Of those only plain attributes matter, so every class the pickle
names becomes an inert placeholder that collects them; a name that is not on the list below stops the reading.
"""

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from ced.distill.views import SHIFT_PROBABILITY, ViewRecipe
from ced.errors import StoreError

_MAX_BYTES = 1 << 20  # of the pickle; published ones have 2.5 kB

# Classes of which only the attributes are kept.
_PLACEHOLDERS = {
    ("torch.nn.modules.container", "Sequential"),
    ("torch_audiomentations.augmentations.shift", "Shift"),
    ("utils", "KwargsSequential"),
    ("utils", "Config"),
    ("augment", "TimeMasking"),
    ("augment", "FrequencyMasking"),
    ("torch.distributions.bernoulli", "Bernoulli"),
    ("torch", "FloatStorage"),
}


def _nothing(*args: object) -> None:
    """Stand for a tensor or its shape; no tensor of the file is needed."""


# Harmless callables.
_CALLABLES: Mapping[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("__builtin__", "set"): set,
    ("builtins", "set"): set,
    ("torch._utils", "_rebuild_tensor_v2"): _nothing,
    ("torch", "Size"): _nothing,
    **{
        (module, f"{prefix}{system}Path"): {"Windows": PureWindowsPath}.get(system, PurePosixPath)
        for module in ("pathlib", "pathlib._local")  # the second since Python 3.13
        for prefix in ("", "Pure")
        for system in ("", "Posix", "Windows")
    },
}

# What a transform must have for its views to be the ones of `views.draw` and `views.mask`.
_REPLAYED: Mapping[str, Mapping[str, object]] = {
    "Shift": {
        "_p": SHIFT_PROBABILITY,
        "mode": "per_example",
        "p_mode": "per_example",
        "shift_unit": "fraction",
        "rollover": True,
    },
    "TimeMasking": {"axis": 2, "iid_masks": False, "p": 1.0},
    "FrequencyMasking": {"axis": 1, "iid_masks": False, "p": 1.0},
}


@dataclass(frozen=True)
class PublishedMeta:
    """What a published meta.pt says about its store."""

    recipe: ViewRecipe
    topk: int
    chunk_length: float  # seconds
    teachers: tuple[str, ...]
    config: Mapping[str, Any]  # the configuration of the run, as it was written


class _Placeholder:
    """An object whose class is not here: it has attributes and does nothing."""


class _AllowListUnpickler(pickle.Unpickler):
    """Unpickle listed globals only; no class of the file is imported, no function of it called."""

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for a global of the pickle; an unknown one is refused."""
        if (module, name) in _PLACEHOLDERS:
            return type(name, (_Placeholder,), {})  # a fresh one each time: nothing a file does to it can last
        if (module, name) in _CALLABLES:
            return _CALLABLES[module, name]
        raise StoreError(f"it names {module}.{name}, which is not one of the globals of a published meta.pt")

    def persistent_load(self, pid: Any) -> None:
        """Leave the tensors' data in the file."""


def read_meta_pt(path: Path) -> PublishedMeta:
    """Read the meta.pt of a published store.

    Raises:
        StoreError: the file cannot be read, names a global that is not allowed, or describes augmentations whose views
            this package would not replay as they were.
    """
    try:
        meta = _unpickle(path)
        wave_transforms = _steps(meta["wavtransforms"])
        spectrum_transforms = _steps(meta["spectransforms"])
        config = dict(vars(meta["config"]))
        recipe = ViewRecipe(
            shift=_shift(wave_transforms),
            time_mask=_mask_width(spectrum_transforms, "TimeMasking"),
            freq_mask=_mask_width(spectrum_transforms, "FrequencyMasking"),
        )
        for name in (*wave_transforms, *spectrum_transforms):
            raise StoreError(f"its views have a transform {name}; replayed are {', '.join(_REPLAYED)}")
        model = config["model"]
        teachers = tuple(map(str, model)) if isinstance(model, list | tuple) else (str(model),)
        return PublishedMeta(recipe, int(config["topk"]), float(config["chunk_length"]), teachers, config)
    except StoreError as error:
        raise StoreError(f"{path}: {error}") from error
    except KeyError as error:
        raise StoreError(f"{path} lacks {error}") from error
    except Exception as error:  # a damaged pickle fails in many ways
        raise StoreError(f"{path} is not a published meta.pt: {type(error).__name__}: {error}") from error


def _unpickle(path: Path) -> dict[str, Any]:
    with zipfile.ZipFile(path) as archive:
        entries = [entry for entry in archive.infolist() if entry.filename.endswith("/data.pkl")]
        if len(entries) != 1 or entries[0].file_size > _MAX_BYTES:
            raise StoreError("it should hold one data.pkl of at most 1 MB")
        meta = _AllowListUnpickler(io.BytesIO(archive.read(entries[0]))).load()
    if not isinstance(meta, dict):
        raise StoreError(f"it should hold a dict, not a {type(meta).__name__}")
    return meta


def _steps(transforms: object) -> dict[str, dict[str, Any]]:
    """Return the attributes of each transform of a sequence, by the name of its class."""
    if transforms is None:
        return {}
    steps: dict[str, dict[str, Any]] = {}
    for transform in vars(transforms)["_modules"].values():
        name = type(transform).__name__
        if name in steps:
            raise StoreError(f"its views have {name} twice; replayed is one of each")
        steps[name] = vars(transform)
    return steps


def _take(steps: dict[str, dict[str, Any]], name: str) -> dict[str, Any] | None:
    """Take a transform out of `steps` and make sure that its views can be replayed."""
    if name not in steps:
        return None
    attributes = steps.pop(name)
    for key, value in _REPLAYED[name].items():
        if attributes[key] != value:
            raise StoreError(f"its {name} has {key.strip('_')} {attributes[key]!r}; replayed is only {value!r}")
    return attributes


def _shift(steps: dict[str, dict[str, Any]]) -> tuple[float, float] | None:
    attributes = _take(steps, "Shift")
    return None if attributes is None else (float(attributes["min_shift"]), float(attributes["max_shift"]))


def _mask_width(steps: dict[str, dict[str, Any]], name: str) -> int | None:
    attributes = _take(steps, name)
    return None if attributes is None else int(attributes["mask_param"])
