"""The locks: each dependency of pyproject.toml at one version, with hashes."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LOCKS = {
    "serve": ("serve", "media"),
    "dev": ("train", "hf", "media", "mqtt", "ray", "app", "dev", "docs"),
}  # the extras that each covers
PIN = re.compile(r"^([\w.-]+)==(\S+)(?: ; .*?)? \\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", re.M)
APART = {"torch"}  # its CPU and CUDA builds have one version but other files


def pins(name: str) -> dict[str, str]:
    """Return the versions in a lock, and check that it has only pins with hashes."""
    text = (ROOT / "locks" / f"{name}.txt").read_text(encoding="utf-8")
    rest = re.sub(r"^ *#.*\n", "", PIN.sub("", text), flags=re.M)
    assert rest == "", rest[:200]
    return {canonicalize_name(package): version for package, version, _ in PIN.findall(text)}


def required(extras: tuple[str, ...]) -> list[Requirement]:
    """Return the dependencies of the core and of extras, with those of extras that these name."""
    wanted, found = ["", *extras], []
    for extra in wanted:
        for line in PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"]:
            requirement = Requirement(line)
            if requirement.name == PROJECT["name"]:
                wanted.extend(requirement.extras)
            else:
                found.append(requirement)
    return found


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_has_all_dependencies(name: str) -> None:
    locked = pins(name)
    for requirement in required(LOCKS[name]):
        package = canonicalize_name(requirement.name)
        if package not in APART:
            assert package in locked, f"{package} is missing in locks/{name}.txt; run make lock"
            assert requirement.specifier.contains(locked[package]), f"{requirement}, but {locked[package]} is locked"
    assert not APART & locked.keys()
    assert not [package for package in locked if package.startswith(("nvidia-", "cuda-", "triton"))]


@pytest.mark.parametrize("name", [*LOCKS, "build"])
def test_versions_are_those_of_the_constraints(name: str) -> None:
    pairs = (line.split("==") for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()[1:])
    wanted: dict[str, str] = {canonicalize_name(package): version for package, version in pairs}
    locked = pins(name)
    both = locked.keys() & wanted.keys()
    assert both
    assert {package: locked[package] for package in both} == {package: wanted[package] for package in both}


def test_the_locks_agree() -> None:
    serve, dev = pins("serve"), pins("dev")
    both = serve.keys() & dev.keys()
    assert {package: serve[package] for package in both} == {package: dev[package] for package in both}


def test_the_lock_has_the_dependencies_of_the_tested_torch() -> None:
    from importlib.metadata import requires, version

    tool = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["uv"]
    (told,) = tool["dependency-metadata"]
    assert f"torch=={told['version']}" in (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert version("torch").split("+")[0] == told["version"]
    found = [Requirement(line) for line in requires("torch") or []]
    plain = {canonicalize_name(each.name) for each in found if each.marker is None}
    assert plain == set(told["requires-dist"])
    assert plain <= pins("dev").keys()
