"""The documentation site, built as by `make docs`, without a warning."""

import html
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

import ced
from ced.cli import app

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
COMMANDS = vars(get_command(app))["commands"]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command: list[str | Path] = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", folder]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def text_of(page: Path) -> str:
    """Return the text of a page, without its tags."""
    return html.unescape(re.sub(r"<[^>]+>", "", page.read_text(encoding="utf-8")))


def test_every_command_has_a_page_with_its_options(site: Path) -> None:
    assert {page.stem for page in (site / "commands").glob("*.html")} == set(COMMANDS)
    for name, command in COMMANDS.items():
        shown = text_of(site / "commands" / f"{name}.html")
        for parameter in command.params:
            if not parameter.hidden and parameter.param_type_name == "option":
                assert parameter.opts[0] in shown, f"{name}: {parameter.opts[0]}"
    assert "optimizer_args" in text_of(site / "commands/train.html")


def test_the_reference_has_every_public_name(site: Path) -> None:
    shown = text_of(site / "api.html")
    for name in ced.__all__:
        assert f"ced.{name}" in shown or name == "__version__", name
    for argument in ("target_length", "thresholds", "precision"):
        assert argument in shown


def test_every_document_has_a_page(site: Path) -> None:
    for page in (ROOT / "docs").glob("*.md"):
        assert (site / f"{page.stem}.html").exists()
    for name in ("index", "changelog", "contributing", "security", "recordings", "examples", "esc10"):
        assert (site / f"{name}.html").exists()


def test_pages_load_nothing_from_other_hosts(site: Path) -> None:
    for page in site.rglob("*.html"):
        markup = page.read_text(encoding="utf-8")
        loaded = re.findall(r"""<(?:script|img|link|iframe)\b[^>]*?(?:src|href)=["']?([^"' >]+)""", markup)
        assert loaded
        assert not [address for address in loaded if re.match(r"(?:https?:)?//", address)], page.name
