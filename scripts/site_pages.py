"""Generated pages of the site: one for each command, the API reference, and the documents outside docs/.

A hook of MkDocs (mkdocs.yml). Commands are taken from the app and classes from the package, so their pages cannot be
out of date. Links between files of the repository become links between pages; a link to a file that the site does not
have, such as a module, becomes its text.
"""

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from typer.main import get_command

import ced
from ced.cli import app
from ced.cli.keys import ConfigCommand, keys_of

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = {  # outside docs/: where the site has them
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "resources/README.md": "recordings.md",
    "examples/README.md": "examples.md",
    "ced/model/boxed/esc10.md": "esc10.md",
}
COMMANDS = vars(get_command(app))["commands"]
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]*)(#[\w-]+)?\)")


def on_config(config: MkDocsConfig) -> None:
    """Put the pages of commands and the examples into the navigation."""
    pages = [{f"ced {name}": f"commands/{name}.md"} for name in COMMANDS]
    for entry in config.nav or []:
        if "Commands" in entry:
            entry["Commands"] = pages


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the generated pages."""
    made = {page: (ROOT / path).read_text(encoding="utf-8") for path, page in DOCUMENTS.items()}
    made |= {f"commands/{name}.md": command_page(name) for name in COMMANDS}
    made["api.md"] = api_page()
    for page, text in made.items():
        files.append(File.generated(config, page, content=text))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Resolve links between files of the repository to pages of the site."""
    here = page.file.src_uri
    of = {site: path for path, site in DOCUMENTS.items()}
    folder = posixpath.dirname(of.get(here, f"docs/{here}"))

    def resolved(found: re.Match[str]) -> str:
        image, text, target, anchor = found.groups()
        if not target or "://" in target or target.startswith("mailto:"):
            return found[0]
        path = posixpath.normpath(posixpath.join(folder, target))
        site = DOCUMENTS.get(path, path.removeprefix("docs/") if path.startswith("docs/") else "")
        if not site:
            return text
        return f"{image}[{text}]({posixpath.relpath(site, posixpath.dirname(here) or '.')}{anchor or ''})"

    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.M | re.S)  # code blocks are not changed
    parts[::2] = [_LINK.sub(resolved, part) for part in parts[::2]]
    return "".join(parts).replace('<img src="docs/', '<img src="')


def command_page(name: str) -> str:
    """Return the page of a command: usage, what it does, its options by group, and the keys of its configuration."""
    command = COMMANDS[name]
    context = typer.Context(command, info_name=f"ced {name}")
    usage = " ".join([f"ced {name}", *command.collect_usage_pieces(context)])
    lines = [f"# ced {name}", "", "```", usage, "```", "", command.help or "", ""]
    groups: dict[str, list[tuple[str, str]]] = {}
    for parameter in command.params:
        if (record := parameter.get_help_record(context)) is not None:  # None: hidden
            kind = "Arguments" if parameter.param_type_name == "argument" else "Options"
            groups.setdefault(getattr(parameter, "rich_help_panel", None) or kind, []).append(record)
    for title, rows in groups.items():
        lines += [f"## {title}", "", *table(rows), ""]
    if isinstance(command, ConfigCommand):
        rows = [(key, f"{about} [{allowed}]") for key, about, allowed in keys_of(name)]
        lines += ["## Keys of the configuration", ""]
        lines += [
            "Each can be in the file or follow as `--key value`; `--key.inner value` sets a key of a mapping.",
            "",
        ]
        lines += [*table(rows), ""]
    return "\n".join(lines)


def table(rows: list[tuple[str, str]]) -> Iterator[str]:
    """Yield a table of names and meanings."""
    yield "| name | meaning |"
    yield "|---|---|"
    for name, meaning in rows:
        text = " ".join(meaning.split()).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
        yield f"| `{name}` | {text.replace('_', chr(92) + '_')} |"


def api_page() -> str:
    """Return the page of the API: everything in `ced.__all__`, errors at the end."""
    lines = [
        "# API reference",
        "",
        "What `import ced` gives. [From Python](python.md) shows it in use; everything else in the package may change.",
        "",
    ]
    found: dict[str, Any] = {name: getattr(ced, name) for name in ced.__all__ if not name.startswith("__")}
    errors = [name for name, each in found.items() if isinstance(each, type) and issubclass(each, Exception)]
    for title, names in (("Tagging and models", [n for n in found if n not in errors]), ("Errors", errors)):
        lines += [f"## {title}", ""]
        for name in names:
            lines += [f"::: {found[name].__module__}.{found[name].__qualname__}", "    options:"]
            lines += [f"      heading: ced.{name}", "      heading_level: 3", ""]
    return "\n".join(lines)
