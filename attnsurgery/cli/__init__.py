"""The command line, one command a file.

A file here whose name has no leading underscore is a command. It offers `register(app)`, which calls
`app.command("name")(function)`; nothing else lists it, and the function is guarded against errors here. What a command
needs beyond the standard library and typer is imported inside it, so that `--help` and `--version` answer at once.
"""

from attnsurgery.cli._app import build_app, main

__all__ = ["build_app", "main"]
