"""``ic-jax <command>``, also ``python -m ic_jax <command>``: finds the command's module and hands it the arguments."""

from __future__ import annotations

import difflib
import importlib
import sys

from . import __version__, cli
from .errors import UserError

COMMANDS = {
    "generate": "text from a prompt, streamed",
    "chat": "a conversation in the terminal",
    "search": "which layers can share their selection, without training",
    "distill": "train the indexers that are kept to serve several layers",
    "eval": "quality against the all-full pattern",
    "bench": "speed at depth",
    "plan": "memory and time of a model, before anything loads",
    "info": "devices, versions, and which kernel runs where and why",
}


def usage() -> str:
    lines = [f"  {name:<9} {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: ic-jax [--version] <command> [flags]",
            "",
            *lines,
            "",
            "ic-jax <command> --help shows its flags; without --model a command runs on the embedded demo model.",
        ]
    )


def main(argv=None) -> int:
    """Exit status of the command named by the first argument; 2 when there is none of that name."""
    name, *rest = (sys.argv[1:] if argv is None else list(argv)) or [None]
    if name in COMMANDS:
        return importlib.import_module(f"ic_jax.{name}").main(rest)
    return cli.run(lambda args: _without_command(name), cli.Parser("", ""), [])


def _without_command(name: str | None) -> None:
    if name in ("-h", "--help"):
        print(usage())
    elif name == "--version":
        print(f"ic-jax {__version__}")
    elif name is None:
        print(usage(), file=sys.stderr)
        sys.exit(2)
    else:
        close = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(COMMANDS)}"
        raise UserError(f"no command is called {name!r}; {hint}")


if __name__ == "__main__":
    sys.exit(main())
