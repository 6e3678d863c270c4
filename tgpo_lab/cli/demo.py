"""``tgpo-lab demo``: the main job in one command."""

from __future__ import annotations

from pathlib import Path

import tyro

from ..demo import run_demo


def demo_command(arguments: list[str]) -> int:
    """Train reverse KL, GRPO and TGPO from the same start and compare them."""
    return tyro.cli(demo, args=arguments, prog="tgpo-lab demo")


def demo(pair: str = "far", steps: int = 60, output: Path = Path("runs/demo"), seed: int = 0) -> int:
    """Train a student with reverse-KL distillation, GRPO and TGPO, from the same start, with the same prompts and
    as many samples and updates. Prints one table and writes a report with figures and sample rollouts.

    Args:
        pair: A shipped pair: near, mid, far or far-fragile.
        steps: Batches for each method.
        output: Folder for the runs and for report.html. A demo that was stopped goes on there.
        seed: Decides prompts and samples.
    """
    return 0 if run_demo(output=output, steps=steps, seed=seed, pair=pair) else 130
