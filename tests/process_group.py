"""Running a function in several processes that form a group, without starting Python anew."""

from __future__ import annotations

import os
import resource
import signal
import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from accelerate.state import AcceleratorState


class Group:
    """Forked processes, each running ``work(index)`` as torchrun would have started it."""

    def __init__(self, count: int, work: Callable[[int], None], folder: Path, **environment: str):
        self._folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.pids = []
        for index in range(count):
            pid = os.fork()
            if pid == 0:
                self._child(index, work, {
                    "RANK": str(index), "LOCAL_RANK": str(index), "WORLD_SIZE": str(count),
                    "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                    **environment,
                })  # fmt: skip
            self.pids.append(pid)

    def errors(self, index: int) -> str:
        """What a process died of; empty if it did not."""
        file = self._folder / f"errors-{index}"
        return file.read_text() if file.exists() else ""

    def wait(self, seconds: float = 120) -> list[int]:
        """Exit codes, in order; a process that takes longer is killed and fails the test."""
        limit, codes = time.monotonic() + seconds, {}
        while len(codes) < len(self.pids):
            for pid in set(self.pids) - codes.keys():
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    codes[pid] = os.waitstatus_to_exitcode(status)
            if time.monotonic() > limit:
                late = set(self.pids) - codes.keys()
                for pid in late:
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                raise AssertionError(
                    f"{len(late)} processes are still at it; {[self.errors(i) for i in range(len(self.pids))]}"
                )
            time.sleep(0.02)
        return [codes[pid] for pid in self.pids]

    def _child(self, index: int, work: Callable[[int], None], environment: dict[str, str]) -> None:
        code = 1
        try:
            os.environ.update(environment)
            AcceleratorState._reset_state(reset_partial_state=True)  # the parent's is that of one process
            work(index)
            code = 0
        except BaseException:
            for limit in (resource.RLIMIT_AS, resource.RLIMIT_FSIZE):  # a test may have lowered them
                resource.setrlimit(limit, (resource.getrlimit(limit)[1],) * 2)
            (self._folder / f"errors-{index}").write_text(traceback.format_exc())
        finally:
            os._exit(code)
