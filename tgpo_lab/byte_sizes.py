"""Numbers of bytes as they are read."""

from __future__ import annotations


def readable_bytes(count: int) -> str:
    """A number of bytes in GB (10⁹ bytes), one below 0.1 GB in MB (10⁶ bytes): one decimal, ``8.2 GB``."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
