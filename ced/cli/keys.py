"""Commands with a configuration: any of its keys may be given as `--key value`, and --help lists them."""

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

import typer
from typer.core import TyperCommand

if TYPE_CHECKING:
    from ced.config import Section


class ConfigCommand(TyperCommand):
    """A command whose help ends with the keys of its configuration, the class of its name in `ced.config.CONFIGS`."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Show the usual help, then the keys."""
        super().format_help(ctx, formatter)
        keys = [
            ("  " * name.count(".") + name.rpartition(".")[2], description, allowed)
            for name, description, allowed in keys_of(str(self.name))
        ]
        width = max(len(name) for name, *_ in keys) + 2
        typer.echo(" Keys of CONFIG. Each can be given as --key value, with hyphens or underscores; --key.inner value")
        typer.echo(" sets a key of a mapping, which is indented here.\n")
        for name, description, allowed in keys:
            typer.echo(f"   {name:<{width}}{description} [{allowed}]")
        typer.echo()


def keys_of(command: str) -> Iterator[tuple[str, str, str]]:
    """Yield each key of a command's configuration: its name, its description, and the values allowed and default.

    Keys of a mapping follow their mapping, as `key.inner`, or `key[].inner` where the mappings are items of a list.
    """
    from ced.config import CONFIGS

    for key in _keys_in(CONFIGS[command], None):
        if key[0] != "command":  # written to experiments, not chosen
            yield key


def _keys_in(kind: "type[Section]", defaults: "Section | None") -> Iterator[tuple[str, str, str]]:
    """Yield the keys of a mapping, whose values are those of `defaults` where it is left out."""
    from ced.config import Section, section_in

    for name, field in kind.model_fields.items():
        default = field.default if defaults is None else getattr(defaults, name)
        inner = section_in(field.annotation)
        choices = " | ".join(get_args(field.annotation)) + "; " if get_origin(field.annotation) is Literal else ""
        if isinstance(default, Section):
            value = "mapping"
        else:
            value = "required" if field.is_required() else f"default {_plain(default)}"
        yield name, field.description or "", f"{choices}{value}"
        if inner is not None:
            place = f"{name}[]" if get_origin(field.annotation) is list else name
            for key, description, allowed in _keys_in(inner, default if isinstance(default, Section) else None):
                yield f"{place}.{key}", description, allowed


def _plain(value: object) -> str:
    from pydantic_core import to_jsonable_python

    return json.dumps(to_jsonable_python(value, exclude_none=True), ensure_ascii=False).strip('"')
