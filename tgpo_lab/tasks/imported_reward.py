"""A reward of the user's own: any Python function by its import path."""

from __future__ import annotations

import importlib
import inspect
import math
import sys
from collections.abc import Callable
from pathlib import Path

from ..errors import InputError


class ImportedReward:
    """``package.module:function``, called with the response's text and the right answer.

    It returns a finite number: 1.0 for a right response and 0.0 for a wrong one, or anything between or beyond.
    Accuracy is the mean of what it returns, and pass@k counts what is above 0 as right.

    It has no time limit. While it hangs the run waits, and SIGTERM or a first Ctrl-C, which ask for a stop after the
    step, is not answered: press Ctrl-C twice or send SIGKILL, then go on from the last checkpoint with ``--resume``. A
    function that may hang needs a limit of its own, best in a child process that it can kill, as ``math_verify`` has.
    """

    def __init__(self, path: str):
        """Import the function; the working directory is searched as well.

        Raises:
            InputError: no such module or function, or one that cannot be called with two arguments.
        """
        self.path = path
        self._function = _import(path)

    def __call__(self, response: str, answer: str) -> float:
        """The reward of one response.

        Raises:
            InputError: the function raised, or returned no finite number; the response is named.
        """
        said = f"for the response {_tail(response)!r} and the answer {answer!r}"
        try:
            value = self._function(response, answer)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # SystemExit too: the run would end without a word
            raise InputError(
                f"The reward {self.path} raised {_named(error)} {said}. Correct the function; a run "
                "goes on from its last checkpoint with --resume."
            ) from error
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number) or isinstance(value, str):
            raise InputError(f"The reward {self.path} returned {value!r} {said}; expected a finite number.")
        return number


def _import(path: str) -> Callable[[str, str], object]:
    module_name, _, name = path.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), name]):
        raise InputError(f"The reward {path!r} is no import path. Write package.module:function.")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)  # an installed program does not look there by itself
    try:
        function = getattr(importlib.import_module(module_name), name, None)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever the user's module raises, SystemExit too
        raise InputError(
            f"The reward {path!r} could not be imported ({_named(error)}). Its module must be "
            "installed or stand in the working directory."
        ) from error
    if not callable(function):
        raise InputError(f"The reward {path!r}: {module_name} has no function {name!r}.")
    try:
        inspect.signature(function).bind("response", "answer")
    except TypeError as error:
        raise InputError(
            f"The reward {path!r} must take the response and the right answer, but {name}("
            f"response, answer) is not possible: {error}."
        ) from error
    except ValueError:
        pass  # written in C: it has no signature to look at
    return function


def _named(error: BaseException) -> str:
    """Its kind and what it says, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _tail(text: str) -> str:
    return text if len(text) <= 200 else "…" + text[-200:]
