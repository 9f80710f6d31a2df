import os
import pickle
import sys
import time
import tracemalloc
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ced.distill.published_store import read_meta_pt
from ced.distill.views import ViewRecipe
from ced.errors import StoreError

_BESIDE = Path(__file__).parents[3] / "shared" / "data" / "published_store"
PUBLISHED = Path(os.environ.get("CED_PUBLISHED_STORE", _BESIDE))
SHIFT: dict[str, Any] = {
    "_p": 0.5,
    "mode": "per_example",
    "p_mode": "per_example",
    "min_shift": -0.5,
    "max_shift": 0.5,
    "shift_unit": "fraction",
    "rollover": True,
}
TIME: dict[str, Any] = {"mask_param": 192, "axis": 2, "iid_masks": False, "p": 1.0}
FREQUENCY: dict[str, Any] = {"mask_param": 24, "axis": 1, "iid_masks": False, "p": 1.0}
CONFIG = {"model": "audiotransformer_base_4740", "topk": 20, "chunk_length": 10, "train_data": "data/mine.tsv"}

Transform = tuple[str, dict[str, Any]]


class MetaWriter:
    """Writes a meta.pt as torch.save does with the modules of the published program."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path, self.monkeypatch = path, monkeypatch

    def kind(self, module_name: str, name: str, base: type = nn.Module) -> Any:
        parts = module_name.split(".")
        for end in range(1, len(parts) + 1):
            if (parent := ".".join(parts[:end])) not in sys.modules:
                self.monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
        module = sys.modules[module_name]
        made = getattr(module, name, None) or type(name, (base,), {"__module__": module_name})
        self.monkeypatch.setattr(module, name, made, raising=False)
        return made

    def transform(self, name: str, attributes: dict[str, Any]) -> nn.Module:
        module = "torch_audiomentations.augmentations.shift" if name == "Shift" else "augment"
        made: nn.Module = self.kind(module, name)()
        made.__dict__.update(attributes)
        return made

    def __call__(
        self,
        wave: list[Transform] | None = None,
        spectrum: list[Transform] | None = None,
        config: dict[str, Any] | None = None,
    ) -> Path:
        wave = [("Shift", SHIFT)] if wave is None else wave
        spectrum = [("TimeMasking", TIME), ("FrequencyMasking", FREQUENCY)] if spectrum is None else spectrum
        settings = self.kind("utils", "Config", object)()
        settings.__dict__.update(CONFIG if config is None else config)
        sequential = self.kind("utils", "KwargsSequential", nn.Sequential)
        meta = {
            "wavtransforms": nn.Sequential(*(self.transform(*one) for one in wave)),
            "spectransforms": sequential(*(self.transform(*one) for one in spectrum)),
            "config": settings,
        }
        torch.save(meta, self.path)
        return self.path


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MetaWriter:
    return MetaWriter(tmp_path / "meta.pt", monkeypatch)


def write_pickle(path: Path, content: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("meta/data.pkl", content)
    return path


@pytest.mark.skipif(not PUBLISHED.exists(), reason="no published store here")
def test_published_meta_is_read() -> None:
    meta = read_meta_pt(PUBLISHED / "meta.pt")
    assert meta.recipe == ViewRecipe(shift=(-0.5, 0.5), time_mask=192, freq_mask=24)
    assert (meta.topk, meta.chunk_length, meta.teachers) == (20, 2.0, ("audiotransformer_base_4740",))
    assert meta.config["train_data"] == "pack/labels/mine.tsv"
    assert meta.config["epochs"] == 2


def test_other_settings_are_read(write: MetaWriter) -> None:
    path = write(
        wave=[("Shift", SHIFT | {"min_shift": -0.25, "max_shift": 0.1})],
        spectrum=[("FrequencyMasking", FREQUENCY | {"mask_param": 7})],
        config=CONFIG | {"model": ["audiotransformer_base_4740", "mine"], "chunk_length": 2.5, "out": Path("logits")},
    )
    meta = read_meta_pt(path)
    assert meta.recipe == ViewRecipe(shift=(-0.25, 0.1), time_mask=None, freq_mask=7)
    assert meta.chunk_length == 2.5
    assert meta.teachers == ("audiotransformer_base_4740", "mine")
    assert str(meta.config["out"]) == "logits"


def test_metadata_written_after_the_transforms_ran_is_read(write: MetaWriter) -> None:
    """Transforms keep their last draws, as tensors of several types."""
    drawn = {
        "should_apply": torch.tensor([True, False]),
        "num_samples_to_shift": torch.tensor([3], dtype=torch.int32),
        "others": [torch.zeros(2, dtype=kind) for kind in (torch.int64, torch.float16, torch.bfloat16, torch.uint8)],
    }
    path = write(wave=[("Shift", SHIFT | {"transform_parameters": drawn, "are_parameters_frozen": False})])
    assert read_meta_pt(path).recipe == ViewRecipe()


def test_no_transforms_are_an_empty_recipe(write: MetaWriter) -> None:
    assert read_meta_pt(write(wave=[], spectrum=[])).recipe == ViewRecipe(None, None, None)


@pytest.mark.parametrize(
    ("transform", "change", "reason"),
    [
        ("Shift", {"_p": 1.0}, "its Shift has p 1.0; only 0.5 can be reproduced"),
        ("Shift", {"rollover": False}, "its Shift has rollover False; only True can be reproduced"),
        ("Shift", {"shift_unit": "samples"}, "its Shift has shift_unit 'samples'; only 'fraction' can be reproduced"),
        ("Shift", {"mode": "per_batch"}, "its Shift has mode 'per_batch'; only 'per_example' can be reproduced"),
        ("TimeMasking", {"iid_masks": True}, "its TimeMasking has iid_masks True; only False can be reproduced"),
        ("TimeMasking", {"axis": 1}, "its TimeMasking has axis 1; only 2 can be reproduced"),
        ("FrequencyMasking", {"p": 0.5}, "its FrequencyMasking has p 0.5; only 1.0 can be reproduced"),
    ],
)
def test_transforms_that_cannot_be_reproduced_are_refused(
    write: MetaWriter, transform: str, change: dict[str, Any], reason: str
) -> None:
    steps = {"Shift": SHIFT, "TimeMasking": TIME, "FrequencyMasking": FREQUENCY}
    steps[transform] = steps[transform] | change
    path = write([("Shift", steps.pop("Shift"))], list(steps.items()))
    with pytest.raises(StoreError) as caught:
        read_meta_pt(path)
    assert str(caught.value) == f"{path}: {reason}"


def test_two_masks_of_a_kind_are_refused(write: MetaWriter) -> None:
    with pytest.raises(StoreError, match="its views have TimeMasking twice"):
        read_meta_pt(write(spectrum=[("TimeMasking", TIME), ("TimeMasking", TIME)]))


def test_a_mask_among_wave_transforms_is_refused(write: MetaWriter) -> None:
    with pytest.raises(StoreError, match="its views have a transform TimeMasking"):
        read_meta_pt(write(wave=[("TimeMasking", TIME)], spectrum=[]))


def test_an_unknown_transform_is_refused(write: MetaWriter) -> None:
    with pytest.raises(StoreError, match=r"it names augment\.Gain, which is not"):
        read_meta_pt(write(wave=[("Gain", {})]))


def test_a_missing_setting_is_named(write: MetaWriter) -> None:
    with pytest.raises(StoreError, match="lacks 'topk'"):
        read_meta_pt(write(config={"model": "m", "chunk_length": 10}))


class Calls:
    """Is pickled as a call of a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.function, self.arguments


@pytest.mark.parametrize(
    ("function", "name"),
    [(os.system, f"{os.system.__module__}.system"), (eval, "builtins.eval"), (getattr, "builtins.getattr")],
)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_malicious_metadata_runs_nothing(
    tmp_path: Path, function: Callable[..., Any], name: str, protocol: int
) -> None:
    trace = tmp_path / "ran"
    arguments = {
        os.system: (f"touch {trace}",),
        eval: (f"open({str(trace)!r}, 'w')",),
        getattr: (trace, "touch"),
    }[function]
    content = pickle.dumps({"wavtransforms": Calls(function, *arguments)}, protocol)
    path = write_pickle(tmp_path / "meta.pt", content)
    with pytest.raises(StoreError) as caught:
        read_meta_pt(path)
    shown = name.replace("builtins", "__builtin__") if protocol < 3 else name
    # The first refused global is a builtin, or the path that getattr is given.
    assert f"it names {shown}, which is not one of the globals" in str(caught.value)
    assert not trace.exists()
    pickle.loads(content)  # the pickle runs its call when it is trusted
    assert trace.exists() or function is getattr


def test_a_file_cannot_change_the_placeholders_of_the_next(tmp_path: Path) -> None:
    # A pickle that sets an attribute of the class `utils.Config` itself.
    content = b"\x80\x02cutils\nConfig\nN}(X\x05\x00\x00\x00topkyK\x01u\x86b."
    with pytest.raises(StoreError, match="it sets attributes of a value that is not an object"):
        read_meta_pt(write_pickle(tmp_path / "meta.pt", content))
    with pytest.raises(StoreError, match="lacks 'wavtransforms'"):
        read_meta_pt(write_pickle(tmp_path / "meta.pt", pickle.dumps({})))


@pytest.mark.parametrize("content", [b"", b"\x80", b"(lp0\n", b"\x80\x02}q\x00.", b"I1\n.", b"\x80\x02K\x01K\x02R."])
def test_damaged_pickles_are_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(StoreError, match=r"meta\.pt"):
        read_meta_pt(write_pickle(tmp_path / "meta.pt", content))


def test_files_that_are_not_metadata_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "meta.pt"
    with pytest.raises(StoreError, match=r"meta\.pt .*FileNotFoundError"):
        read_meta_pt(path)
    path.write_bytes(b"no zip")
    with pytest.raises(StoreError, match=r"meta\.pt is not a published meta\.pt: BadZipFile"):
        read_meta_pt(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("meta/version", "3")
    with pytest.raises(StoreError, match=r"it should hold one data\.pkl"):
        read_meta_pt(path)
    write_pickle(path, b"0" * (1 << 20) + b"0")
    with pytest.raises(StoreError, match=r"it should hold one data\.pkl of at most 1 MB"):
        read_meta_pt(path)


def long_text(text: bytes) -> bytes:
    return b"X" + len(text).to_bytes(4, "little") + text


LARGE = [
    b"\x80\x02}r\xff\xff\xff\x7f.",  # a memo with 2 billion entries: 16 GB
    b"\x80\x02}p2000000000\n.",
    b"\x80\x05\x96" + (12 << 30).to_bytes(8, "little") + b".",  # a bytearray of 12 GB
    b"\x80\x04\x8d" + (12 << 30).to_bytes(8, "little") + b".",  # text of 12 GB
    b"\x80\x02]q\x00" + b"h\x00h\x00\x86q\x000" * 1000 + b".",  # pairs of pairs
    b"\x80\x02K\x01K\x02\x86q\x00" + b"h\x00h\x00\x86q\x000" * 60 + b"}h\x00K\x01s.",  # such a pair as a key
    # Paths made of paths, each ten times as long as the one before.
    b"\x80\x02cpathlib\nPurePosixPath\nq\x00" + long_text(b"a" * 50) + b"q\x01"
    b"h\x00(" + b"h\x01" * 10 + b"tRq\x01" + (b"h\x00(" + b"h\x01" * 10 + b"tRq\x01") * 8 + b".",
]


@pytest.mark.parametrize("number", range(len(LARGE)))
def test_a_small_file_cannot_take_much_memory(tmp_path: Path, number: int) -> None:
    path = write_pickle(tmp_path / "meta.pt", LARGE[number])
    tracemalloc.start()
    began = time.monotonic()
    with pytest.raises(StoreError, match=r"meta\.pt"):
        read_meta_pt(path)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 20_000_000
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("key", ["model", "topk", "chunk_length", "mask_param", "iid_masks"])
def test_nested_lists_are_not_converted_to_text(write: MetaWriter, key: str) -> None:
    """Each list has the one before ten times: as text they would take all memory."""
    nested: list[Any] = ["x"]
    for _ in range(30):
        nested = [nested] * 10
    masks = TIME | {key: nested} if key in TIME else TIME
    path = write(spectrum=[("TimeMasking", masks)], config=CONFIG | ({} if key in TIME else {key: nested}))
    with pytest.raises(StoreError, match=key.partition("_")[0]) as caught:
        read_meta_pt(path)
    assert len(str(caught.value)) < 1000
