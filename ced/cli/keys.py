"""Commands that take a configuration: any of its keys may follow as `--key value`, and --help lists them."""

import json
from collections.abc import Iterator
from typing import Any, ClassVar, Literal, get_args, get_origin

import typer
from typer.core import TyperCommand


class _ConfigCommand(TyperCommand):
    """A command whose help ends with the keys of its configuration."""

    config: ClassVar[str]  # name of a class in ced.config, which is imported when it is needed

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Show the usual help, then the keys."""
        super().format_help(ctx, formatter)
        typer.echo(_describe(self.config))


class StoreCommand(_ConfigCommand):
    """`ced store`."""

    config = "StoreConfig"


class TrainCommand(_ConfigCommand):
    """`ced train`."""

    config = "TrainConfig"


class FinetuneCommand(_ConfigCommand):
    """`ced finetune`."""

    config = "FinetuneConfig"


class PretrainCommand(_ConfigCommand):
    """`ced pretrain`."""

    config = "PretrainConfig"


def keys_of(config: str) -> Iterator[tuple[str, str, str]]:
    """Yield each key of a class of `ced.config`: its name, what it is, and what is allowed and the default."""
    import ced.config

    for name, field in getattr(ced.config, config).model_fields.items():
        choices = " | ".join(get_args(field.annotation)) + "; " if get_origin(field.annotation) is Literal else ""
        default = "required" if field.is_required() else f"default {_plain(field.default)}"
        yield name, field.description or "", f"{choices}{default}"


def _describe(config: str) -> str:
    """Return a line for each key of a configuration: its name, what it is, and its default."""
    keys = list(keys_of(config))
    width = max(len(name) for name, *_ in keys) + 2
    lines = [" Keys of CONFIG, and of --key value (--key.inner value reaches into a mapping):", ""]
    lines += [f"   --{name:<{width}}{description} [{allowed}]" for name, description, allowed in keys]
    return "\n".join([*lines, ""])


def _plain(value: object) -> str:
    from pydantic_core import to_jsonable_python

    return json.dumps(to_jsonable_python(value, exclude_none=True), ensure_ascii=False).strip('"')
