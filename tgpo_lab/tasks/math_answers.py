"""Whether two mathematical answers are equal, decided by Math-Verify in a process of its own.

A response is text from a model and may hold anything: ``9^{9^{9^9}}`` keeps a computer algebra system busy for ever.
So the comparing runs in a child process with a limit on memory, gets a fixed time for each answer, and is killed and
started anew when that is over; the response then counts as wrong. Only LaTeX is parsed, by a grammar. Math-Verify's
parser of plain expressions is left out: it hands text to Python's ``eval``.

    python -m tgpo_lab.tasks.math_answers      # the child: JSON lines in, JSON lines out
"""

from __future__ import annotations

import atexit
import importlib.util
import json
import queue
import subprocess
import sys
import threading

from ..errors import InputError

SECONDS_PER_ANSWER = 5.0
"""A comparison that takes longer counts as wrong."""
SECONDS_TO_START = 120.0
"""For importing the library; not part of any answer's time."""
MEMORY = 2 * 2**30
"""Bytes that the child may have, where the system can limit them."""
LONGEST_READ = 4000
"""Characters, counted from the end of a response, in which its answer is looked for."""


class MathChecker:
    """Compares answers, one at a time, in a child process."""

    def __init__(self, seconds_per_answer: float = SECONDS_PER_ANSWER):
        self._seconds = seconds_per_answer
        self._child: subprocess.Popen | None = None
        self._replies: queue.Queue[str] = queue.Queue()

    def equal(self, response: str, answer: str) -> bool:
        """Whether the last LaTeX expression of a response (a ``\\boxed{}`` first) equals the answer.

        Raises:
            InputError: the child cannot be started.
        """
        if self._child is None or self._child.poll() is not None:
            self._start()
        try:
            self._child.stdin.write(json.dumps([response[-LONGEST_READ:], answer]) + "\n")
            self._child.stdin.flush()
            return json.loads(self._replies.get(timeout=self._seconds))
        except (queue.Empty, OSError, ValueError):  # too slow, out of memory, or dead: the answer was not verified
            self.close()
            return False

    def close(self) -> None:
        """End the child."""
        if self._child is not None:
            self._child.kill()
            self._child.wait()
            for stream in (self._child.stdin, self._child.stdout):
                stream.close()
            self._child = None

    def _start(self) -> None:
        self.close()
        child = subprocess.Popen(
            [sys.executable, "-m", "tgpo_lab.tasks.math_answers"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._child, self._replies = child, queue.Queue()
        threading.Thread(target=_pass_on, args=(child, self._replies), daemon=True).start()
        try:
            ready = self._replies.get(timeout=SECONDS_TO_START)
        except queue.Empty:
            ready = ""
        if ready != "ready\n":
            self.close()
            raise InputError(
                "The process that compares mathematical answers could not be started. "
                "See what this says: python -m tgpo_lab.tasks.math_answers"
            )


_checker = MathChecker()
atexit.register(_checker.close)


def math_verify(response: str, answer: str) -> float:
    """1.0 if Math-Verify finds the response's last LaTeX expression (a ``\\boxed{}`` first) equal to the answer."""
    return float(_checker.equal(response, answer))


def require_math_verify() -> None:
    """Refuse to go on without the library.

    Raises:
        InputError: it is not installed.
    """
    if importlib.util.find_spec("math_verify") is None:
        raise InputError("The reward math_verify needs the package math-verify: pip install 'tgpo-lab[math]'.")


def _pass_on(child: subprocess.Popen, replies: queue.Queue[str]) -> None:
    try:
        for line in child.stdout:
            replies.put(line)
    except ValueError:
        pass  # closed while it was read
    replies.put("")  # the child has ended: whoever waits need not wait on


def _serve() -> None:
    from math_verify import LatexExtractionConfig, parse, verify

    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    except (ImportError, ValueError, OSError):
        pass  # not on every system; the time limit holds all the same
    latex = [LatexExtractionConfig()]

    def read(text: str) -> list:
        # No time limits of its own: the parent's is one for everything, and is kept by ending this process.
        return parse(text, extraction_config=latex, parsing_timeout=None)

    print("ready", flush=True)
    for line in sys.stdin:
        response, answer = json.loads(line)
        expected = read(answer) or read(f"${answer}$")
        right = bool(expected) and verify(expected, read(response), timeout_seconds=None)
        print(json.dumps(bool(right)), flush=True)


if __name__ == "__main__":
    _serve()
