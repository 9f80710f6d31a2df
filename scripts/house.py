"""Measure the structure of the source code, for one checkout of the project or two side by side.

`python scripts/house.py [OLD] [NEW]` prints a Markdown table; without a path it measures this checkout. It reads the
files of `ced/` and runs nothing, except for the three walks, which `scripts/walks.py` of a checkout counts.
"""

import argparse
import ast
import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a script finds only its own folder by itself

from tests.test_floors import FLOORS, floor_of, imports  # noqa: E402

SHORT = 60  # lines of a module
SHARED = 6  # lines in a row that count as repeated
LONGEST = 3  # functions that are named
WALKS = ("tag", "store", "train")

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Module:
    """One file of the package."""

    name: str
    path: Path
    text: str
    tree: ast.Module

    @property
    def length(self) -> int:
        """Lines of the file, blank ones and comments included."""
        return len(self.text.splitlines())

    def functions(self) -> list[Function]:
        """Return all functions, methods and nested functions."""
        return [node for node in ast.walk(self.tree) if isinstance(node, Function)]


def read_modules(checkout: Path) -> list[Module]:
    """Return the modules of a checkout; an `__init__.py` of at most one line is none."""
    found = []
    for path in sorted((checkout / "ced").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if path.name == "__init__.py" and len(text.splitlines()) <= 1:
            continue
        name = ".".join(path.relative_to(checkout).with_suffix("").parts)
        found.append(Module(name, path, text, ast.parse(text)))
    if not found:
        raise SystemExit(f"{checkout} has no package ced/")
    return found


def code_lines(module: Module) -> list[str]:
    """Return the lines of code without indentation; blank lines, comments, docstrings and imports are left out."""
    left_out: set[int] = set()
    for node in ast.walk(module.tree):
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if isinstance(node, ast.Expr | ast.Import | ast.ImportFrom) and (is_text or not isinstance(node, ast.Expr)):
            left_out.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines = [line.strip() for number, line in enumerate(module.text.splitlines(), 1) if number not in left_out]
    return [line for line in lines if line and not line.startswith("#")]


def repeated(modules: list[Module]) -> list[tuple[str, str, list[str]]]:
    """Return each pair of places that share `SHARED` or more lines of code in a row, with these lines.

    Two places in one module count as well, unless they overlap.
    """
    lines = {module.name: code_lines(module) for module in modules}
    places: dict[tuple[str, ...], list[tuple[str, int]]] = defaultdict(list)
    for name, code in lines.items():
        for start in range(len(code) - SHARED + 1):
            places[tuple(code[start : start + SHARED])].append((name, start))
    found = []
    for same in places.values():
        for (a, i), (b, j) in combinations(same, 2):
            if i and j and lines[a][i - 1] == lines[b][j - 1]:
                continue  # inside a pair that begins earlier
            length = 0
            while i + length < len(lines[a]) and j + length < len(lines[b]):
                if lines[a][i + length] != lines[b][j + length] or (a == b and i + length >= j):
                    break
                length += 1
            if length >= SHARED:
                found.append((a, b, lines[a][i : i + length]))
    return found


def public_names(module: Module) -> Iterator[str]:
    """Yield the public classes, functions and aliases of types that a module defines at its top level."""
    for node in module.tree.body:
        if isinstance(node, (ast.ClassDef, Function)):
            names = [node.name]
        elif isinstance(node, ast.Assign):
            names = [each.id for each in node.targets if isinstance(each, ast.Name) and not each.id.isupper()]
        else:
            continue
        yield from (name for name in names if not name.startswith("_") and name not in ("app", "logger"))


def twins(modules: list[Module]) -> dict[str, list[str]]:
    """Return the names that more than one module defines, with these modules.

    Functions of `ced.cli` are left out: a command has the name of what it runs.
    """
    found = defaultdict(list)
    for module in modules:
        commands = {each.name for each in module.functions()} if module.name.startswith("ced.cli.") else set()
        for name in set(public_names(module)) - commands:
            found[name].append(module.name)
    return {name: where for name, where in sorted(found.items()) if len(where) > 1}


def is_typed(function: Function) -> bool:
    """Return whether a function has a type for its result and for every argument but self and cls."""
    given = function.args
    arguments = [*given.posonlyargs, *given.args, *given.kwonlyargs, *filter(None, (given.vararg, given.kwarg))]
    return function.returns is not None and all(
        each.annotation is not None for each in arguments if each.arg not in ("self", "cls")
    )


def longest(modules: list[Module]) -> list[tuple[int, str]]:
    """Return lines and name of the longest functions."""
    found = [
        ((each.end_lineno or each.lineno) - each.lineno + 1, f"{module.name}.{each.name}")
        for module in modules
        for each in module.functions()
    ]
    return sorted(found, reverse=True)[:LONGEST]


def imports_upwards(modules: list[Module]) -> int:
    """Count the imports of a module of a floor that `tests/test_floors.py` does not allow."""
    count = 0
    for module in modules:
        own = floor_of(module.name)
        if module.name != "ced.__init__":  # names the public functions of all floors
            count += sum(floor_of(name) not in FLOORS[own] | {own} for name in imports(module.path))
    return count


def walks(checkout: Path) -> list[str]:
    """Return the number of files that each walk enters, "-" for a checkout without `scripts/walks.py`."""
    if not (checkout / "scripts/walks.py").exists():
        return ["-"] * len(WALKS)
    command = [sys.executable, "-m", "scripts.walks", "--json"]
    environment = {**os.environ, "PYTHONPATH": str(checkout.resolve())}
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=True)
    functions = json.loads(done.stdout)
    return [str(len({name.partition(":")[0] for name in functions[walk]})) for walk in WALKS]


def measure(checkout: Path) -> dict[str, str]:
    """Return what is measured, row by row."""
    modules = read_modules(checkout)
    lengths = [module.length for module in modules]
    functions = [each for module in modules for each in module.functions()]
    pairs, double = repeated(modules), twins(modules)
    return {
        "modules": str(len(modules)),
        "median lines of a module": f"{median(lengths):g}",
        f"modules under {SHORT} lines": str(sum(length < SHORT for length in lengths)),
        "lines in all": str(sum(lengths)),
        **{f"files that the walk *{walk}* enters": count for walk, count in zip(WALKS, walks(checkout), strict=True)},
        f"pairs of places that share {SHARED} or more lines": str(len(pairs)),
        "lines in these pairs": str(sum(len(lines) for _, _, lines in pairs)),
        "public names defined in more than one module": f"{len(double)}: {', '.join(double)}" if double else "0",
        "functions with complete types": f"{100 * sum(map(is_typed, functions)) / len(functions):.1f} %",
        "longest functions (lines)": ", ".join(f"`{name}` {lines}" for lines, name in longest(modules)),
        "imports upwards": str(imports_upwards(modules)),
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", type=Path, nargs="*", default=[ROOT], help="folders with a package ced/")
    parser.add_argument("--list", action="store_true", help="list the repeated lines and names as well")
    given = parser.parse_args()
    columns = [measure(checkout) for checkout in given.checkouts]
    print("|", *(f"| {checkout.resolve().name}" for checkout in given.checkouts), "|")
    print(f"|{'---|' * (1 + len(columns))}")
    for row in columns[0]:
        print(f"| {row}", *(f"| {column[row]}" for column in columns), "|")
    if given.list:
        modules = read_modules(given.checkouts[-1])
        for name, where in twins(modules).items():
            print(f"\n{name}: {', '.join(where)}")
        for a, b, lines in repeated(modules):
            print(f"\n{a} and {b}, {len(lines)} lines:", *lines, sep="\n    ")


if __name__ == "__main__":
    main()
