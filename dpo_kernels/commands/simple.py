"""The parser of the commands with few options: errors are one sentence, and a wrong name gets the nearest right one."""

from __future__ import annotations

import argparse
import difflib
import re
from typing import Any, NoReturn

from dpo_kernels.commands.endings import OptionError

EXPECTED = {"int": "a whole number", "float": "a number", "string_to_bool": "true or false"}


class Parser(argparse.ArgumentParser):
    """An `argparse.ArgumentParser` of a command.

    Args:
        program: as the user called it.
        text: what the command does.
    """

    def __init__(self, program: str, text: str) -> None:
        super().__init__(prog=program, description=text, allow_abbrev=False)

    def parse_args(self, argv: Any = None, namespace: Any = None) -> Any:
        """
        Raises:
            OptionError: an option that does not exist, or a value of another kind.
        """
        argv = [self._spelled(part) for part in argv]
        found, rest = self.parse_known_args(argv, namespace)
        if rest:
            known = [name for name in self._option_string_actions if name.startswith("--")]
            name = rest[0].partition("=")[0]
            near = [other for other in known if other.startswith(name)] or difflib.get_close_matches(name, known, n=1)
            what = "no such option" if name.startswith("-") else "not expected here"
            raise OptionError(f"{rest[0]}: {what}" + (f"; did you mean {near[0]}?" if near else "; see --help"))
        return found

    def _spelled(self, part: str) -> str:
        """An option with - for _ is meant the same."""
        name, equals, value = part.partition("=")
        name = f"--{name[2:].replace('-', '_')}" if name.startswith("--") else name
        return name + equals + value if name in self._option_string_actions else part

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        try:
            return super()._get_value(action, arg_string)
        except argparse.ArgumentError as error:
            expected = EXPECTED.get(getattr(action.type, "__name__", ""), "another kind of value")
            raise OptionError(f"{_name_of(action)} is {arg_string!r}; expected {expected}") from error

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            raise OptionError(f"{_name_of(action)} is {value!r}; expected one of {', '.join(map(str, action.choices))}")

    def error(self, message: str) -> NoReturn:
        short = sentence(message).replace("the following arguments are required: ", "give ")
        raise OptionError(f"{short}; see {self.prog} --help")


def sentence(message: str) -> str:
    """What argparse says, in our words."""
    short = re.sub(r"^argument (--\w+)[^:]*: ", r"\1: ", message)
    return short.replace("expected one argument", "a value has to follow")


def _name_of(action: argparse.Action) -> str:
    return action.option_strings[0] if action.option_strings else str(action.metavar or action.dest)
