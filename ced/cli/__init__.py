"""The command `ced`: the table of its commands. Root scripts call `main` under the published names."""

from ced.cli import distilling, exporting, listening, serving, tagging
from ced.cli.console import app, main
from ced.cli.keys import ConfigCommand

__all__ = ["app", "main"]

_ANY_KEY = {"allow_extra_args": True, "ignore_unknown_options": True}

app.command()(tagging.tag)
app.command()(tagging.embed)
app.command()(listening.live)
app.command()(tagging.calibrate)
app.command()(serving.serve)
app.command("app")(serving.open_app)
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
