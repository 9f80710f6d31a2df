"""The command `ced`; root scripts call it under the published names. Nothing else prints or exits."""

import sys
from typing import Annotated

import typer

import ced
from ced.cli import calibrating, distilling, exporting, listening, serving, tagging
from ced.cli.console import Commands, set_up_logging, set_up_streams, show
from ced.cli.keys import ConfigCommand

app = typer.Typer(
    cls=Commands,
    name="ced",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={
        "help_option_names": ["-h", "--help"],
        # Options may be spelled with underscores, as in the published programs.
        "token_normalize_func": lambda name: name.replace("_", "-"),
    },
)
_ANY_KEY = {"allow_extra_args": True, "ignore_unknown_options": True}


def _show_version(asked: bool) -> None:
    if asked:
        show(f"ced {ced.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version, and exit.")
    ] = False,
) -> None:
    """Tag sounds, and make small models that tag sounds."""


app.command()(tagging.tag)
app.command()(tagging.embed)
app.command()(listening.live)
app.command()(calibrating.calibrate)
app.command()(serving.serve)
app.command("app")(serving.show)
app.command()(exporting.models)
app.command()(exporting.export)
app.command()(distilling.pack)
app.command()(distilling.labels)
app.command(cls=ConfigCommand, context_settings=_ANY_KEY)(distilling.store)
app.command(cls=ConfigCommand, context_settings=_ANY_KEY)(distilling.train)
app.command(cls=ConfigCommand, context_settings=_ANY_KEY)(distilling.finetune)
app.command(cls=ConfigCommand, context_settings=_ANY_KEY)(distilling.pretrain)
app.command()(distilling.evaluate)
app.command()(distilling.demo)


def main(*words: str) -> None:
    """Run the words of the command line, behind those given, and exit."""
    set_up_streams()
    set_up_logging()
    app(args=[*words, *sys.argv[1:]], prog_name="ced")
