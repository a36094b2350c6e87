"""What `pathkernel` can do: one small module per command."""

from collections.abc import Callable, Mapping

from lightning_pathkernel.commands.explain import explain
from lightning_pathkernel.commands.export import export
from lightning_pathkernel.commands.info import info
from lightning_pathkernel.commands.predict import predict
from lightning_pathkernel.commands.report import report
from lightning_pathkernel.commands.verify import verify

__all__ = ["COMMANDS"]

COMMANDS: Mapping[str, Callable[..., int]] = {
    "info": info, "verify": verify, "export": export, "predict": predict, "explain": explain, "report": report,
}  # fmt: skip
"""Name -> function: its annotated arguments are the command's, its docstring the help, its result the exit status."""
