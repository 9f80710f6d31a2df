"""The script that measures the structure of the source code."""

from pathlib import Path

import pytest

from scripts.house import imports_upwards, is_typed, longest, measure, read_modules, repeated, twins

COPIED = "\n".join(f"    value = step_{number}(value)" for number in range(7))


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A package of three modules with known faults."""
    files = {
        "ced/__init__.py": "",
        "ced/sound/audio.py": f"from ced.model import vit\n\nclass Window: ...\n\ndef load(value):\n{COPIED}\n",
        "ced/model/vit.py": f'def load(value: int) -> None:\n    """Load."""\n    # Copied\n{COPIED}\nclass _A: ...\n',
        "ced/cli/tagging.py": "def load() -> None: ...\nclass Tag:\n    def at(self, *a: int, b: int) -> int: ...\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_an_empty_package_file_is_not_a_module(checkout: Path) -> None:
    assert [module.name for module in read_modules(checkout)] == ["ced.cli.tagging", "ced.model.vit", "ced.sound.audio"]


def test_lines_are_repeated_whatever_stands_above_them(checkout: Path) -> None:
    assert [(a, b, len(lines)) for a, b, lines in repeated(read_modules(checkout))] == [
        ("ced.model.vit", "ced.sound.audio", 7)
    ]


def test_names_that_two_modules_define_are_found_except_those_of_commands(checkout: Path) -> None:
    assert twins(read_modules(checkout)) == {"load": ["ced.model.vit", "ced.sound.audio"]}


def test_functions_without_types_are_counted(checkout: Path) -> None:
    typed = {module.name: [is_typed(each) for each in module.functions()] for module in read_modules(checkout)}
    assert typed == {"ced.sound.audio": [False], "ced.model.vit": [True], "ced.cli.tagging": [True, True]}


def test_imports_of_a_higher_layer_and_long_functions_are_found(checkout: Path) -> None:
    modules = read_modules(checkout)
    assert imports_upwards(modules) == 1
    assert longest(modules)[0] == (10, "ced.model.vit.load")


def test_a_checkout_without_a_test_of_walks_has_no_number_of_files(checkout: Path) -> None:
    measured = measure(checkout)
    assert measured["modules"] == "3"
    assert measured["functions with complete types"] == "75.0 %"
    assert measured["files that the walk *tag* enters"] == "-"


def test_a_folder_without_the_package_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no package"):
        measure(tmp_path)
