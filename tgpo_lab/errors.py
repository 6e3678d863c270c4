"""The exception for bad input, and the one for a run that cannot go on."""


class InputError(Exception):
    """What a user gave cannot work. The message names what was given, what was expected and what to do.

    The command line prints it as one sentence and exits with status 2. Not a ValueError: parsers
    catch those and wrap them into reports of their own.
    """


class RunError(RuntimeError):
    """A run cannot go on, for no fault of the input. The message names the reason, what is kept and what to do.

    The command line prints it as one sentence and exits with status 1.
    """
