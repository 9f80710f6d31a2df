"""The layers of the package: allowed imports, the cost of an import, and the length of the root scripts."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "ced").rglob("*.py"))
OTHERS = ("tests", "benchmarks", "scripts")
SCRIPTS = ["inference.py", "run.py", "save_logits.py", "export_onnx.py", "scripts/wavlist_to_hdf5.py"]

# Libraries that send usage data by default.
REPORTING = ("onnxruntime", "huggingface_hub", "transformers", "ray")

# A module imports from its own layer and from those listed here.
FLOORS: dict[str, set[str]] = {
    "base": set(),
    "sound": {"base"},
    "model": {"base", "sound"},
    "distill": {"base", "sound", "model"},
    "tag": {"base", "sound", "model"},
    "serve": {"base", "sound", "model", "tag"},
    "integrations": {"base", "sound", "model", "tag"},
    "demo": {"base", "sound", "model", "distill", "tag"},
    "cli": {"base", "sound", "model", "distill", "tag", "serve", "integrations", "demo"},
}


def floor_of(module: str) -> str:
    """Return the layer of a module by its dotted name; single files beside the folders are the base."""
    part = [*module.split("."), ""][1]
    if part == "__main__":
        return "cli"
    return part if part in FLOORS else "base"


def imports(path: Path) -> Iterator[str]:
    """Yield the dotted name of each module of ced that a file imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            # `from ced import x` may name a module.
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] == "ced")


def libraries(path: Path) -> dict[str, list[int]]:
    """Return the top-level packages that a file imports anywhere, with the lines of these imports."""
    found: dict[str, list[int]] = {}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        else:
            continue
        for name in names:
            found.setdefault(name.split(".")[0], []).append(node.lineno)
    return found


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_imports_from_its_own_and_lower_layers(path: Path) -> None:
    if path == ROOT / "ced" / "__init__.py":  # names the public functions of all floors, imported on first use
        return
    own = floor_of(name_of(path))
    for name in imports(path):
        assert floor_of(name) in FLOORS[own] | {own}, f"{name_of(path)} ({own}) imports {name} ({floor_of(name)})"


def test_every_folder_is_a_layer() -> None:
    folders = {path.name for path in (ROOT / "ced").iterdir() if (path / "__init__.py").exists()}
    assert folders == FLOORS.keys() - {"base"}


def test_only_one_module_imports_onnxruntime() -> None:
    for path in (*MODULES, *(path for folder in OTHERS for path in (ROOT / folder).rglob("*.py"))):
        if "onnxruntime" in libraries(path):
            assert name_of(path) == "ced.model.ort"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_telemetry_is_switched_off_before_libraries_that_have_it_are_imported(path: Path) -> None:
    found = libraries(path)
    imported = [line for library in REPORTING for line in found.get(library, [])]
    if imported:
        lines = path.read_text(encoding="utf-8").splitlines()
        assert any(line.startswith("os.environ.update(SWITCHES)") for line in lines[: min(imported)])


def run_python(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("ced", ["torch", "onnxruntime", "soundfile", "numpy"]),
        ("ced.sound.audio", ["torch"]),
        ("ced.sound.labels", ["torch"]),
        ("ced.tag.options", ["torch", "numpy", "onnxruntime"]),
        ("ced.tag.tagger", ["torch", "onnx", "pydantic", "rich.progress", "pyarrow"]),
        ("ced.model.runtime", ["torch", "onnx", "huggingface_hub", "safetensors", "pydantic"]),
        ("ced.model.zoo", ["torch", "onnx", "onnxruntime"]),
        ("ced.tag.writers", ["torch"]),
        ("ced.config", ["torch"]),
        ("ced.tag.live", ["torch", "onnx", "pyarrow", "pydantic", "sounddevice", "av"]),
        ("ced.sound.live_sources", ["torch", "sounddevice", "av"]),
        ("ced.serve.app", ["torch", "onnx", "pyarrow"]),
        ("ced.cli", ["torch", "numpy", "pydantic", "rich.progress", "fastapi", "uvicorn"]),
    ],
)
def test_an_import_brings_no_more_than_it_needs(module: str, absent: list[str]) -> None:
    loaded = run_python(f"import {module}, sys; print(*sys.modules)").split()
    assert not set(absent) & set(loaded)


def test_an_import_configures_no_logging() -> None:
    program = "import logging, ced.cli; print(logging.getLogger().handlers, logging.getLogger('ced').handlers)"
    assert run_python(program) == "[] []"


def test_public_names_are_complete() -> None:
    import ced

    assert set(ced.__all__) <= set(dir(ced))
    everyday = {"Tagger", "TagOptions", "Record", "load_model", "list_models", "__version__"}
    errors = {name for name, value in vars(ced.errors).items() if isinstance(value, type) and name.endswith("Error")}
    assert set(ced.__all__) == everyday | errors
    assert all(issubclass(getattr(ced, name), ced.CedError) for name in errors)


def test_a_core_install_has_all_public_names() -> None:
    program = """if True:
        import sys
        class NoTorch:
            def find_spec(self, name, *_):
                if name.partition(".")[0] == "torch":
                    raise ModuleNotFoundError("No module named 'torch'", name="torch")
        sys.meta_path.insert(0, NoTorch())
        from ced import *
        import ced
        assert all(getattr(ced, name) is globals()[name] for name in ced.__all__)
        try:
            load_model("ced_tiny")
        except MissingPackageError as error:
            print(error.package, error.command)
    """
    assert run_python(program) == "torch pip install 'ced-audio[train]'"


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    import ced

    with pytest.raises(AttributeError, match="no attribute 'load_modle'"):
        ced.load_modle  # noqa: B018


@pytest.mark.parametrize("script", SCRIPTS)
def test_root_scripts_only_call_the_command_line(script: str) -> None:
    lines = (ROOT / script).read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 6
    assert "from ced.cli import main" in lines


def test_only_the_command_line_prints_and_exits() -> None:
    for path in MODULES:
        if floor_of(name_of(path)) == "cli":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in {"print", "exit", "quit", "sys.exit", "os._exit"}, f"{path}:{node.lineno}"
