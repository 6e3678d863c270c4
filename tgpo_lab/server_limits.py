"""What a run may not ask for when its teacher is behind a server, or is not."""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import urlsplit

from .errors import InputError
from .methods import method_name
from .methods.base import Method


def require_server_suffices(server: str, method: Method, local_options: Mapping[str, object]) -> None:
    """Refuse an address that is none, and a method for which a server's answers are not enough.

    Args:
        server: ``teacher_server`` of a run.
        method: of the run.
        local_options: options for a teacher in this process, by name, none of which may be given.

    Raises:
        InputError: names the address, the option or the method.
    """
    try:
        address = urlsplit(server)
        usable = address.scheme in ("http", "https") and bool(address.hostname) and address.port != 0
    except ValueError:  # such as a port that is no number
        usable = False
    if not usable:
        raise InputError(f"teacher_server must be an address such as http://host:8000/v1, but is {server!r}.")
    if address.username or address.password or address.query:
        raise InputError(
            "teacher_server must be an address alone, because it is written down with the run: give a key in the "
            "environment, as TEACHER_SERVER_KEY."
        )
    for name, given in local_options.items():
        if given:
            raise InputError(f"{name} is for a teacher in this process, but teacher_server is given. Leave one out.")
    for needed, what in (
        (method.needs_distribution, "the teacher's whole distribution at every prefix"),
        (method.samples_teacher_tokens, "a token drawn from the teacher at every prefix"),
        (method.teacher_traces != "none", "responses that the teacher writes"),
    ):
        if needed:
            raise InputError(
                f"{method_name(method)} needs {what}, but a teacher's server gives the log-probabilities of the tokens "
                "that it is sent and its most probable ones, up to its own limit. Leave teacher_server out, or choose "
                "a method that needs no more: grpo, rkl, kdrl, tgpo, tgpo-top-k, a gate of tgpo."
            )


def refuse_idle_teacher_options(method: Method, server_model: str | None, cache: str | None) -> None:
    """Refuse options that change nothing where the teacher is in this process.

    Args:
        method: of the run.
        server_model: ``teacher_server_model`` of the run, and
        cache: its ``teacher_cache``.

    Raises:
        InputError: names the option.
    """
    if server_model is not None:
        raise InputError(
            f"teacher_server_model is {server_model!r}, but there is no teacher_server. Give its address, or leave "
            "teacher_server_model out."
        )
    if cache is not None and method.teacher_traces == "none":
        raise InputError(
            f"teacher_cache keeps responses that the teacher writes, but for {method_name(method)} it writes none. "
            "Leave teacher_cache out, or choose sft, luffy or tgpo-unconditioned."
        )
