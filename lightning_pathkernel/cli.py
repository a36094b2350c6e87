"""The command line: `pathkernel COMMAND ...`, or `python -m lightning_pathkernel COMMAND ...`."""

from __future__ import annotations

import inspect
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, get_type_hints

from lightning_pathkernel.commands import COMMANDS
from lightning_pathkernel.commands.answer import printable

__all__ = ["main"]

_MISSING = (
    "pathkernel: the command line needs jsonargparse, which is not installed: "
    'pip install "lightning-pathkernel[cli]" (the library itself works without it)'
)
_ARGUMENT = re.compile(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", re.MULTILINE)
"""An argument and its text, in a docstring's section."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: What stands behind the program's name; None for the process's own.

    Returns:
        The exit status: 0, 1 for what the command found wanting or could not do, 2 for a wrong call.

    Examples:
        >>> import tempfile
        >>> from lightning_pathkernel.cli import main
        >>> from lightning_pathkernel.testing import tiny_machine
        >>> directory = tiny_machine().save(tempfile.mkdtemp())
        >>> main(["verify", str(directory)])  # doctest: +ELLIPSIS
        /...: whole, ...
        sha256 of manifest.json: ...
        0
    """
    try:
        parser = _parser()
    except ImportError:
        print(_MISSING, file=sys.stderr)
        return 2
    try:
        chosen = parser.parse_args(None if arguments is None else list(arguments))
    except SystemExit as asked:  # --help, or a wrong call, which was told
        return asked.code if isinstance(asked.code, int) else 2
    try:
        status = COMMANDS[chosen.subcommand](**chosen[chosen.subcommand].as_dict())
        sys.stdout.flush()
        return status
    except (ValueError, ImportError) as error:  # an argument's value; a driver for a kind of URL
        print(f"pathkernel {chosen.subcommand}: {printable(str(error))}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read the answer, such as `head`, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left is flushed at exit
        return 1
    except OSError as error:
        print(f"pathkernel {chosen.subcommand}: {printable(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> Any:
    from jsonargparse import ArgumentParser, set_parsing_settings

    from lightning_pathkernel.commands.formatter import ShortHelp

    set_parsing_settings(add_print_completion_argument=True)
    about = "Kernel machines: a trained network as a bias and the contributions of its training examples."
    parser = ArgumentParser(prog="pathkernel", description=about, formatter_class=ShortHelp)
    commands = parser.add_subcommands(required=True, metavar="COMMAND")
    for name, function in COMMANDS.items():
        text, _, described = (inspect.getdoc(function) or "").partition("\n\nArgs:\n")
        own = ArgumentParser(description=text, formatter_class=ShortHelp, usage=_usage(name, function))
        _add_arguments(own, function, dict(_ARGUMENT.findall(described)))
        commands.add_subcommand(name, own, help=text.partition("\n")[0])
    return parser


def _usage(name: str, function: Callable[..., int]) -> str:
    needed = [
        f"--{key.replace('_', '-')} {key.upper()}" if parameter.kind is parameter.KEYWORD_ONLY else key.upper()
        for key, parameter in inspect.signature(function).parameters.items()
        if parameter.default is parameter.empty
    ]
    return f"pathkernel {name} {' '.join(needed)} [options]"


def _add_arguments(parser: Any, function: Callable[..., int], described: dict[str, str]) -> None:
    """What has no default is given by its place, or by its name where it has none; a bool is true where it stands."""
    types = get_type_hints(function)
    for name, parameter in inspect.signature(function).parameters.items():
        text, option = " ".join(described[name].split()), f"--{name.replace('_', '-')}"
        if parameter.default is parameter.empty:
            required = {"required": True} if parameter.kind is parameter.KEYWORD_ONLY else {}
            parser.add_argument(option if required else name, type=types[name], help=text, **required)
        elif types[name] is bool:
            parser.add_argument(option, action="store_true", help=text)
        else:
            short = name.rpartition("_")[2].upper()
            parser.add_argument(option, type=types[name], default=parameter.default, help=text, metavar=short)
