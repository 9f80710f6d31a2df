"""Commands that take a configuration: any of its keys may follow as `--key value`, and --help lists them."""

import json
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


def _describe(config: str) -> str:
    """Return a line for each key of a configuration: its name, what it is, and its default."""
    import ced.config

    fields = getattr(ced.config, config).model_fields
    width = max(map(len, fields)) + 2
    lines = [" Keys of CONFIG, and of --key value (--key.inner value reaches into a mapping):", ""]
    for name, field in fields.items():
        choices = " | ".join(get_args(field.annotation)) + "; " if get_origin(field.annotation) is Literal else ""
        default = "required" if field.is_required() else f"default {_plain(field.default)}"
        lines.append(f"   --{name:<{width}}{field.description or ''} [{choices}{default}]")
    return "\n".join([*lines, ""])


def _plain(value: object) -> str:
    from pydantic_core import to_jsonable_python

    return json.dumps(to_jsonable_python(value, exclude_none=True), ensure_ascii=False).strip('"')
