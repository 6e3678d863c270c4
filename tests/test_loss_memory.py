"""The loss part of an update takes little memory beside that of whole logits, in processes of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
WIDTH, TOKENS, VOCABULARY = 256, 256, 16_384

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the benchmark reads the peak from Linux's /proc")


def test_the_loss_in_chunks_takes_a_fifth_of_the_memory_of_whole_logits_and_gives_its_gradient(tmp_path):
    output = tmp_path / "measured.json"
    run = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "loss_memory.py", "--vocabulary-size", str(VOCABULARY),
         "--student-width", str(WIDTH), "--teacher-width", str(WIDTH), "--tokens", str(TOKENS), "--repeats", "1",
         "--output", output],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    comparisons = json.loads(output.read_text(encoding="utf-8"))["comparisons"]
    assert [comparison["loss"] for comparison in comparisons] == ["tgpo", "exact-rkl"]
    for comparison in comparisons:
        peaks = {version: entry["peak_bytes"] for version, entry in comparison["versions"].items()}
        assert peaks["plain"] > 4 * 8 * TOKENS * VOCABULARY  # at least one tensor of all logits in float32
        # The student's output layer gets its gradient; beside it there are a few tensors of one chunk. Blocks that were
        # freed and find no taker would be seen here: 0.45 once.
        assert peaks["in chunks"] < 0.2 * peaks["plain"], (comparison["loss"], peaks)
        assert comparison["gradient_difference"] < 1e-5
