"""Commands with a configuration: any of its keys may be given as `--key value`, and --help lists them."""

import json
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

import typer
from typer.core import TyperCommand


class ConfigCommand(TyperCommand):
    """A command whose help ends with the keys of its configuration, the class of its name in `ced.config.CONFIGS`."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Show the usual help, then the keys."""
        super().format_help(ctx, formatter)
        keys = list(keys_of(str(self.name)))
        width = max(len(name) for name, *_ in keys) + 2
        typer.echo(" Keys of CONFIG. Each can be given as --key value, with hyphens or underscores; --key.inner value")
        typer.echo(" sets a key of a mapping.\n")
        for name, description, allowed in keys:
            typer.echo(f"   {name:<{width}}{description} [{allowed}]")
        typer.echo()


def keys_of(command: str) -> Iterator[tuple[str, str, str]]:
    """Yield each key of a command's configuration: its name, its description, and the values allowed and default."""
    from ced.config import CONFIGS

    for name, field in CONFIGS[command].model_fields.items():
        if name == "command":  # written to experiments, not chosen
            continue
        choices = " | ".join(get_args(field.annotation)) + "; " if get_origin(field.annotation) is Literal else ""
        default = "required" if field.is_required() else f"default {_plain(field.default)}"
        yield name, field.description or "", f"{choices}{default}"


def _plain(value: object) -> str:
    from pydantic_core import to_jsonable_python

    return json.dumps(to_jsonable_python(value, exclude_none=True), ensure_ascii=False).strip('"')
