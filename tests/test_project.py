"""Files for contributors and continuous integration: make targets, versions, hooks and issue templates."""

import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def read_yaml(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


def test_make_help_lists_every_target() -> None:
    targets = re.findall(r"^([a-z-]+):.*## ", MAKEFILE, re.M)
    (phony,) = re.findall(r"^\.PHONY: (.+)$", MAKEFILE, re.M)
    assert sorted(phony.split()) == sorted(targets)
    done = subprocess.run(
        ["make", "--no-print-directory", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert [line.split()[1] for line in done.stdout.splitlines()] == targets


def test_make_targets_named_in_documents_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.M))
    named = set()
    for path in ("README.md", "CONTRIBUTING.md", "docs/published-program.md", ".github/workflows/ci.yml", ".ci/run"):
        text = (ROOT / path).read_text(encoding="utf-8")
        named |= set(re.findall(r"(?:^|`|run: |exec )make ([a-z-]+)", text, re.M))
    assert {"demo", "test", "docs", "dist", "lock"} <= named
    assert named <= targets


def test_the_workflow_tests_the_versions_that_the_package_claims() -> None:
    classifiers = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["classifiers"]
    claimed = [found[1] for each in classifiers if (found := re.search(r":: Python :: (3\.\d+)$", each))]
    jobs = read_yaml(".github/workflows/ci.yml")["jobs"]
    assert jobs["test"]["strategy"]["matrix"]["python"] == claimed
    assert "make test PYTHON=python" in [step.get("run") for step in jobs["test"]["steps"]]


def test_pre_commit_hooks_run_programs_of_the_environment() -> None:
    (repository,) = read_yaml(".pre-commit-config.yaml")["repos"]
    assert repository["repo"] == "local"
    for hook in repository["hooks"]:
        assert hook["language"] == "system"
        assert hook["entry"].startswith(".venv/bin/")


def test_issue_templates_have_required_fields() -> None:
    forms = {path.stem: read_yaml(str(path)) for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")}
    assert set(forms) == {"config", "bug", "model", "question"}
    for name in ("bug", "model", "question"):
        assert forms[name]["name"]
        fields = [field for field in forms[name]["body"] if field["type"] != "markdown"]
        assert any(field.get("validations", {}).get("required") for field in fields)
        assert all(field["attributes"]["label"] for field in fields)
