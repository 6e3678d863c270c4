"""What a run may not ask for when its teacher is behind a server."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from .errors import InputError
from .methods import method_name

if TYPE_CHECKING:
    from .config import TrainConfig


def require_server_suffices(config: TrainConfig) -> None:
    """Refuse an address that is none, and a method for which a server's answers are not enough.

    Raises:
        InputError: names the address or the method.
    """
    try:
        address = urlsplit(config.teacher_server)
        usable = address.scheme in ("http", "https") and bool(address.hostname) and address.port != 0
    except ValueError:  # such as a port that is no number
        usable = False
    if not usable:
        raise InputError(
            f"teacher_server must be an address such as http://host:8000/v1, but is {config.teacher_server!r}."
        )
    if address.username or address.password or address.query:
        raise InputError(
            "teacher_server must be an address alone, because it is written down with the run: give a key in the "
            "environment, as TEACHER_SERVER_KEY."
        )
    for name in ("teacher_device", "teacher_offload", "teacher_cache"):
        if getattr(config, name):
            raise InputError(f"{name} is for a teacher in this process, but teacher_server is given. Leave one out.")
    method = config.method
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
