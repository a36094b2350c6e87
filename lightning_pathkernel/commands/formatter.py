"""Help that fits a screen."""

from __future__ import annotations

from argparse import Action

from jsonargparse import DefaultHelpFormatter

__all__ = ["ShortHelp"]


class ShortHelp(DefaultHelpFormatter):
    """Help that says what an argument is for, and leaves its Python type and default out."""

    def _get_help_string(self, action: Action) -> str:
        return action.help or ""

    def _format_action_invocation(self, action: Action) -> str:
        if "--print_completion" in action.option_strings:
            return "--print_completion=shtab-bash (-zsh, -tcsh, -fish)"
        text: str = super()._format_action_invocation(action)
        return text
