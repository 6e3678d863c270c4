"""A teacher behind an OpenAI-compatible server, asked for its most probable tokens after given prefixes.

One request for each rollout, so many at a time; each has a time limit and is sent again, after a pause that doubles,
when the server stalls, breaks off or is overloaded. An answer that makes no sense ends the run with one sentence.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import anyio
import httpx
import torch
from anyio.from_thread import start_blocking_portal
from torch import Tensor

from ..errors import InputError
from ..rollouts import Rollouts
from ..teacher import TeacherAnswers
from .prompt_logprobs import PrefixAnswer, TeacherServerError, completion_request, read_completion

KEY_VARIABLE = "TEACHER_SERVER_KEY"
"""Environment variable with the server's key, if it wants one. Not an option: options are written down with a run."""
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds before a request is sent again for the first time, and at most."""
WORTH_RETRYING = {408, 425, 429, 500, 502, 503, 504}
USUAL_LIMIT = 20
"""Most tokens that a server gives after a prefix unless it is told otherwise (vLLM's --max-logprobs)."""
SPARE = 4
"""Tokens asked for beyond those needed where the teacher has tokens that are cut: the best may be one of them."""


Request = tuple[str, str, dict | None]
"""Method, address (of the server's interface, or a whole one) and body."""
RowAnswer = tuple[Tensor, Tensor, Tensor]
"""(N,) log-probabilities of the tokens that stand there, (N, K) most probable tokens and their log-probabilities."""


class ServerTeacher:
    """Answers at given prefixes: the log-probability of the tokens that stand there, and the most probable ones."""

    gives_distributions = False

    def __init__(
        self,
        url: str,
        *,
        vocabulary_size: int,
        teacher_rows: int,
        model: str | None = None,
        requests: int = 16,
        timeout: float = 120.0,
        retries: int = 5,
    ):
        """Ask nothing yet.

        Args:
            url: base of the server's interface, usually ending in ``/v1``.
            vocabulary_size: V; tokens from this id on are cut away.
            teacher_rows: rows of the teacher's output layer.
            model: name under which the server has the teacher; left out, the only one that it serves.
            requests: at most so many are under way at once.
            timeout: seconds in which a request must be answered in full.
            retries: how often a request is sent again.
        """
        self.url, self._model, self._vocabulary_size = url.rstrip("/"), model, vocabulary_size
        self._spare = SPARE if teacher_rows > vocabulary_size else 0
        self._requests, self._timeout, self._retries = requests, timeout, retries

    def check(self, longest: int, top_k: int) -> str:
        """Whether the server can answer for this run. Returns the name of its model.

        Args:
            longest: tokens of the longest sequence that it will be asked about.
            top_k: tokens needed after each prefix; 0 and 1 are the same.

        Raises:
            InputError: it cannot be reached, serves another model, reads no sequences of that length, or does not give
                log-probabilities of prompts.
        """
        try:
            return self._check(longest, top_k)
        except TeacherServerError as error:  # what was given may be to blame: the address, the model's name, the key
            raise InputError(str(error)) from error

    def _check(self, longest: int, top_k: int) -> str:
        listed = self._run([("GET", "/models", None)], _as_it_is)[0]
        try:
            models = {entry["id"]: entry for entry in listed["data"]}
        except (KeyError, TypeError) as error:
            raise InputError(f"{self.url}/models lists no models: it is no OpenAI-compatible server. Give its base "
                             "address, which usually ends in /v1.") from error  # fmt: skip
        if self._model is None and len(models) != 1:
            raise InputError(
                f"{self.url} serves {', '.join(sorted(models)) or 'no model'}. Name one as teacher_server_model."
            )
        name = self._model or next(iter(models))
        if name not in models:
            raise InputError(f"{self.url} serves no model {name!r}: it serves {', '.join(sorted(models))}.")
        limit = models[name].get("max_model_len")  # vLLM has it, others may not
        if isinstance(limit, int) and longest + 1 > limit:
            raise InputError(
                f"The longest sequence may have {longest} tokens, and a request adds one, but {self.url} reads at most "
                f"{limit}. Lower max_new_tokens, or start the server with a larger limit (vLLM: --max-model-len)."
            )
        self._model = name
        self._answers([([0, 0], 1)], max(1, top_k))  # to see whether it gives them
        return name

    def ask(
        self,
        rollouts: Rollouts,
        *,
        micro_batch_tokens: int = 0,
        keep_distribution: Tensor | None = None,
        top_k: int = 0,
        sampling_seed: int | None = None,
        rows: Tensor | None = None,
        states_only: bool = False,
    ) -> TeacherAnswers:
        """See :class:`tgpo_lab.teachers.sources.Teacher`. How many tokens it reads at once is the server's affair.

        Raises:
            InputError: it was asked for what a server does not give.
            TeacherServerError: the server failed, or answered with what makes no sense.
        """
        if keep_distribution is not None or sampling_seed is not None:
            what = "tokens drawn from the teacher" if keep_distribution is None else "whole distributions"
            raise InputError(f"A teacher's server gives its most probable tokens, not {what}. Load the teacher here.")
        asked = range(len(rollouts)) if rows is None else rows.tolist()
        responses, mask = rollouts.responses.cpu(), rollouts.mask.cpu()
        sequences = [
            (rollouts.prompts[row] + responses[row][mask[row]].tolist(), len(rollouts.prompts[row])) for row in asked
        ]
        answered = self._answers(sequences, max(1, top_k))
        shape, count = rollouts.mask.shape, max(1, top_k)
        logprobs, top_logprobs = torch.zeros(shape), torch.zeros(*shape, count)
        top_tokens = torch.zeros(*shape, count, dtype=torch.long)
        for row, (own, tokens, values) in zip(asked, answered, strict=True):
            where = row, slice(len(own))
            logprobs[where], top_tokens[where], top_logprobs[where] = own, tokens, values
        answers = TeacherAnswers(
            logprobs=logprobs,
            tokens=top_tokens[..., 0],
            confidence=top_logprobs[..., 0],
            top_tokens=top_tokens if top_k else None,
            top_logprobs=top_logprobs if top_k else None,
        )
        return answers.to(rollouts.mask.device)

    def write(self, prompts: list[list[int]], samples_per_prompt: int, step: int) -> Rollouts:
        """Refused: see :class:`tgpo_lab.teachers.sources.Teacher`.

        Raises:
            InputError: always.
        """
        raise InputError("A teacher's server answers at given prefixes and writes no responses. Load the teacher here.")

    def texts_to_tokens(self, texts: list[str]) -> list[list[int]] | None:
        """How the server cuts texts into tokens, without special ones; None if it does not say (vLLM's /tokenize does).

        Raises:
            TeacherServerError: it cannot be reached.
        """
        root = self.url.removesuffix("/v1")
        bodies = [{"model": self._model, "prompt": text, "add_special_tokens": False} for text in texts]
        try:
            found = self._run([("POST", f"{root}/tokenize", body) for body in bodies], _as_it_is)
            return [answer["tokens"] for answer in found]
        except (_Refused, KeyError, TypeError):
            return None

    def _answers(self, rows: list[tuple[list[int], int]], needed: int) -> list[RowAnswer]:
        """Answers to rows: tokens, and the first position of interest, at least 1, from which on N positions follow."""
        answered: list[RowAnswer | None] = [None] * len(rows)
        count = min(needed + self._spare, max(needed, USUAL_LIMIT))
        while waiting := [row for row, answer in enumerate(answered) if answer is None]:

            def read(number: int, answer: object, waiting: list[int] = waiting, count: int = count) -> None:
                # Each as it comes: as parsed JSON, a batch of long rollouts would fill the memory.
                row = waiting[number]
                checked = [a.within(self._vocabulary_size) for a in read_completion(answer, *rows[row], count)]
                if all(len(answer.top) >= needed for answer in checked):
                    answered[row] = _as_tensors(checked, needed)

            bodies = [completion_request(self._model, rows[row][0], count) for row in waiting]
            self._run([("POST", "/completions", body) for body in bodies], read)
            if None in answered and count >= USUAL_LIMIT:
                raise InputError(
                    f"After some prefix, more than {count - needed} of the teacher's {count} most probable tokens are "
                    "such as the student lacks. Choose a prompt format after which the teacher writes otherwise, or "
                    "another teacher."
                )
            count = max(count, min(2 * count, USUAL_LIMIT))
        return answered

    # ── Requests ─────────────────────────────────────────────────────────────────────────────────

    def _run(self, requests: list[Request], read: Callable[[int, object], object]) -> list:
        """What ``read`` makes of the answers to requests: it gets each one's number and answer, parsed from JSON."""
        # A thread of its own, because a notebook's loop runs in this one. Ctrl-C ends all that is under way.
        with start_blocking_portal() as portal:
            return portal.call(self._send_all, requests, read)

    async def _send_all(self, requests: list[Request], read: Callable[[int, object], object]) -> list:
        answers: list = [None] * len(requests)
        places = anyio.CapacityLimiter(self._requests)
        key = os.environ.get(KEY_VARIABLE)
        # The time limit is that of the whole request, below: a server that sends a byte now and then stalls as well.
        client = httpx.AsyncClient(
            timeout=None,
            headers={"Authorization": f"Bearer {key}"} if key else None,
            limits=httpx.Limits(max_connections=self._requests),
        )

        async def send(number: int) -> None:
            async with places:
                answers[number] = read(number, await self._send(client, *requests[number]))

        try:
            async with client, anyio.create_task_group() as group:
                for number in range(len(requests)):
                    group.start_soon(send, number)
        except ExceptionGroup as failures:  # the first failure has ended the others
            raise failures.exceptions[0] from None
        return answers

    async def _send(self, client: httpx.AsyncClient, method: str, address: str, body: dict | None) -> object:
        address = address if "://" in address else self.url + address
        pause = FIRST_PAUSE
        for attempt in range(self._retries + 1):
            if attempt:
                await anyio.sleep(min(pause, LONGEST_PAUSE))
                pause *= 2
            try:
                with anyio.fail_after(self._timeout):
                    response = await client.request(method, address, json=body)
            except TimeoutError:
                problem = f"did not answer within {self._timeout:g} seconds"
                continue
            except httpx.HTTPError as error:
                problem = f"could not be reached or broke off ({type(error).__name__}: {error})"
                continue
            if response.status_code in WORTH_RETRYING:
                problem = f"answered with status {response.status_code} ({_reason(response)})"
                continue
            if not response.is_success:
                raise _Refused(
                    f"The teacher's server {address} refused with status {response.status_code} ({_reason(response)}). "
                    f"Check its address, the model's name, its limits (vLLM: --max-model-len, --max-logprobs) and its "
                    f"key, in the environment as {KEY_VARIABLE}."
                )
            try:
                return response.json()
            except (ValueError, RecursionError):  # the second of brackets within brackets
                problem = f"answered with something that is not JSON ({_reason(response)})"
        raise TeacherServerError(
            f"The teacher's server {address} {problem}; attempts: {self._retries + 1}. See whether it is up and can be "
            "reached."
        )


def _as_it_is(number: int, answer: object) -> object:
    return answer


def _as_tensors(answers: list[PrefixAnswer], count: int) -> RowAnswer:
    top = [answer.top[:count] for answer in answers]
    return (
        torch.tensor([answer.logprob for answer in answers]),
        torch.tensor([[token for token, _ in tokens] for tokens in top], dtype=torch.long).view(-1, count),
        torch.tensor([[value for _, value in tokens] for tokens in top]).view(-1, count),
    )


class _Refused(TeacherServerError):
    """The server will not answer this request, however often it is sent."""


def _reason(response: httpx.Response) -> str:
    """What the server says about its refusal, in a few words."""
    try:
        found = response.json()
        found = found.get("error", found) if isinstance(found, dict) else found
        text = str(found.get("message", found) if isinstance(found, dict) else found)
    except (ValueError, RecursionError):
        text = response.text
    text = " ".join(text.split())
    return text[:200] + ("…" if len(text) > 200 else "") or "nothing said"
