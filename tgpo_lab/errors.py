"""The one exception for bad input."""


class InputError(Exception):
    """What a user gave cannot work. The message names what was given, what was expected and what to do.

    The command line prints it as one sentence and exits with status 2. Not a ValueError: parsers
    catch those and wrap them into reports of their own.
    """
