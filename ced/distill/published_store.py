"""The meta.pt of a published view store, read without executing any of it.

The file is a zip archive with a pickle of module objects. Only their plain attributes are needed, so every class that
the pickle names is replaced by a placeholder that collects attributes and does nothing. Reading stops at a name that is
not in the lists below, and at anything that could take far more memory or time than the size of the file suggests.
"""

import io
import pickle
import pickletools
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from typing import Any, ClassVar

from ced.distill.views import SHIFT_PROBABILITY, ViewRecipe
from ced.errors import StoreError

_MAX_BYTES = 1 << 20  # of the pickle; published ones have 2.5 kB
_MAX_FILE_BYTES = 16 << 20  # published ones have 4 kB
_MAX_PATH = 4096  # characters
# Opcodes that torch.save does not write here: they allocate as much as a number says, or add any object to a set.
_REFUSED_OPCODES = {"BYTEARRAY8", "ADDITEMS", "FROZENSET", "INST", "OBJ"}

# Classes of which only the attributes are kept.
_PLACEHOLDERS = {
    ("torch.nn.modules.container", "Sequential"),
    ("torch_audiomentations.augmentations.shift", "Shift"),
    ("utils", "KwargsSequential"),
    ("utils", "Config"),
    ("augment", "TimeMasking"),
    ("augment", "FrequencyMasking"),
    ("torch.distributions.bernoulli", "Bernoulli"),
    *(("torch", f"{kind}Storage") for kind in ("Float", "Double", "Half", "BFloat16")),
    *(("torch", f"{kind}Storage") for kind in ("Bool", "Byte", "Char", "Short", "Int", "Long")),
}


def _nothing(*args: object) -> None:
    """Replace a tensor, its shape or a set, which are not needed."""


def _ordered_dict(items: object = ()) -> dict[str, Any]:
    pairs = items if isinstance(items, list | tuple) else ()
    _check_keys(pair[0] for pair in pairs)
    return dict(pairs)


def _check_keys(keys: Iterable[object]) -> None:
    """Refuse keys of a dict that are not names: computing the hash of nested tuples can take very long.

    Raises:
        StoreError: one is neither text nor an integer.
    """
    if not all(isinstance(key, str | int) for key in keys):
        raise StoreError("it has a dict whose keys are not names")


def _path_maker(kind: type[PurePath]) -> Callable[..., PurePath]:
    def make(*parts: object) -> PurePath:
        """Make a path from text; paths made from other paths could grow without bounds."""
        if not all(isinstance(part, str) for part in parts) or sum(map(len, map(str, parts))) > _MAX_PATH:
            raise StoreError(f"it holds a path that is not text of at most {_MAX_PATH} characters")
        return kind(*map(str, parts))

    return make


# Callables without side effects.
_CALLABLES: Mapping[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _ordered_dict,
    ("__builtin__", "set"): _nothing,
    ("builtins", "set"): _nothing,
    ("torch._utils", "_rebuild_tensor_v2"): _nothing,
    ("torch", "Size"): _nothing,
    **{
        (module, f"{prefix}{system}Path"): _path_maker(PureWindowsPath if system == "Windows" else PurePosixPath)
        for module in ("pathlib", "pathlib._local")  # the second since Python 3.13
        for prefix in ("", "Pure")
        for system in ("", "Posix", "Windows")
    },
}

# The settings with which a transform makes the same views as `views.draw` and `views.mask`.
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
    """The settings of a published store, from its meta.pt."""

    recipe: ViewRecipe
    topk: int
    chunk_length: float  # seconds
    teachers: tuple[str, ...]
    config: Mapping[str, Any]  # the whole configuration of the run


class _Placeholder:
    """An object whose class is not imported: it has attributes and does nothing."""


# The unpickler in Python: that in C allocates its memo by the highest index in the file.
_Unpickler: Any = pickle._Unpickler


class _AllowListUnpickler(_Unpickler):  # type: ignore[misc]
    """Unpickles listed globals only; imports no class and calls no function that a file names."""

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(_Unpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        """Return the replacement of a global of the pickle.

        Raises:
            StoreError: it is not in the lists.
        """
        if (module, name) in _PLACEHOLDERS:
            return type(name, (_Placeholder,), {})  # a new class each time, so that a file cannot change later ones
        if (module, name) in _CALLABLES:
            return _CALLABLES[module, name]
        shown = f"{module}.{name}"[:100]
        raise StoreError(f"it names {shown}, which is not one of the globals of a published meta.pt")

    def persistent_load(self, pid: Any) -> None:
        """Skip the data of a tensor."""

    def _set_item(self) -> None:
        _check_keys(self.stack[-2:-1])
        self.load_setitem()

    def _set_items(self) -> None:
        _check_keys(self.stack[::2])  # everything pushed since the mark
        self.load_setitems()

    def _build(self) -> None:
        if not isinstance(self.stack[-2], _Placeholder):
            raise StoreError("it sets attributes of a value that is not an object")
        self.load_build()

    dispatch[pickle.SETITEM[0]] = _set_item
    dispatch[pickle.SETITEMS[0]] = _set_items
    dispatch[pickle.BUILD[0]] = _build


def read_meta_pt(path: Path) -> PublishedMeta:
    """Read the meta.pt of a published store.

    Raises:
        StoreError: the file cannot be read, names a global that is not allowed, or describes augmentations whose views
            this package cannot reproduce.
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
            raise StoreError(f"its views have a transform {name}; can be reproduced: {', '.join(_REPLAYED)}")
        model = config["model"]
        teachers = tuple(map(_text, model if isinstance(model, list | tuple) else [model]))
        topk, chunk_length = _number(config["topk"], "topk"), _number(config["chunk_length"], "chunk_length")
        return PublishedMeta(recipe, int(topk), float(chunk_length), teachers, config)
    except StoreError as error:
        raise StoreError(f"{path}: {error}") from error
    except KeyError as error:
        raise StoreError(f"{path} lacks {str(error)[:100]}") from error
    except Exception as error:  # a damaged pickle fails in many ways
        reason = " ".join(str(error).split())[:200]
        raise StoreError(f"{path} is not a published meta.pt: {type(error).__name__}: {reason}") from error


def _text(value: object) -> str:
    """Return a name or path of a configuration; nested lists could be very long as text."""
    if not isinstance(value, str | PurePath):
        raise StoreError(f"its model is a {type(value).__name__}, not a name")
    return str(value)


def _number(value: object, name: str) -> int | float:
    if not isinstance(value, int | float):
        raise StoreError(f"its {name} is a {type(value).__name__}, not a number")
    return value


def _unpickle(path: Path) -> dict[str, Any]:
    if path.stat().st_size > _MAX_FILE_BYTES:
        raise StoreError(f"it has more than {_MAX_FILE_BYTES >> 20} MB")
    with zipfile.ZipFile(path) as archive:
        entries = [entry for entry in archive.infolist() if entry.filename.endswith("/data.pkl")]
        if len(entries) != 1 or entries[0].file_size > _MAX_BYTES:
            raise StoreError("it should hold one data.pkl of at most 1 MB")
        content = archive.read(entries[0])
    _check_opcodes(content)
    meta = _AllowListUnpickler(io.BytesIO(content)).load()
    if not isinstance(meta, dict):
        raise StoreError(f"it should hold a dict, not a {type(meta).__name__}")
    return meta


def _check_opcodes(content: bytes) -> None:
    """Refuse a pickle whose reading could take far more memory or time than its size suggests.

    Raises:
        StoreError: it has an opcode that torch.save does not write here.
    """
    for opcode, _, _ in pickletools.genops(content):
        if opcode.name in _REFUSED_OPCODES:
            raise StoreError(f"it uses the pickle opcode {opcode.name}, which a published meta.pt does not")


def _steps(transforms: object) -> dict[str, dict[str, Any]]:
    """Return the attributes of each transform of a sequence, by the name of its class.

    Raises:
        StoreError: two transforms have one class.
    """
    if transforms is None:
        return {}
    steps: dict[str, dict[str, Any]] = {}
    for transform in vars(transforms)["_modules"].values():
        name = type(transform).__name__
        if name in steps:
            raise StoreError(f"its views have {name} twice; one of each can be reproduced")
        steps[name] = vars(transform)
    return steps


def _take(steps: dict[str, dict[str, Any]], name: str) -> dict[str, Any] | None:
    """Remove a transform from `steps` and return its attributes; None if it is not there.

    Raises:
        StoreError: its views cannot be reproduced.
    """
    if name not in steps:
        return None
    attributes = steps.pop(name)
    for key, value in _REPLAYED[name].items():
        if attributes[key] != value:
            found = attributes[key]
            found = repr(found)[:100] if isinstance(found, str | int | float) else f"a {type(found).__name__}"
            raise StoreError(f"its {name} has {key.strip('_')} {found}; only {value!r} can be reproduced")
    return attributes


def _shift(steps: dict[str, dict[str, Any]]) -> tuple[float, float] | None:
    attributes = _take(steps, "Shift")
    if attributes is None:
        return None
    return float(_number(attributes["min_shift"], "min_shift")), float(_number(attributes["max_shift"], "max_shift"))


def _mask_width(steps: dict[str, dict[str, Any]], name: str) -> int | None:
    attributes = _take(steps, name)
    return None if attributes is None else int(_number(attributes["mask_param"], "mask_param"))
