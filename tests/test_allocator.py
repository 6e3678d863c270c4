"""Asking the C library to keep freed memory: in a process of its own, for it cannot be undone."""

import os
import platform
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def printed_by(code: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_says_whether_it_was_done():
    found = printed_by("from tgpo_lab.loop.allocator import keep_freed_memory as keep; print(keep(), keep())")
    assert found in ("True True\n", "False False\n")  # a second request does no harm
    if platform.libc_ver()[0] == "glibc":
        assert found == "True True\n"
