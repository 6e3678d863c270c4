"""Short runs of one and of several processes, and what it means that they are the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tgpo_lab.runs import latest_checkpoint
from tgpo_lab.training import train

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
# Clipping would hide a gradient that is too large by a factor, and so does AdamW; its moments do not.
COMMON = {"steps": 2, "prompts_per_step": 3, "evaluate_every": 1, "evaluation_prompts": 5, "gradient_terms_every": 1,
          "checkpoint_every": 1, "max_gradient_norm": 1e6, "measured_positions": 40}  # fmt: skip


def quiet(config, **options):
    return train(config, show_progress=False, **options)


def rows(folder: Path) -> list[dict]:
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if "seconds" not in k} for line in lines]


def tensors(folder: Path, file: str) -> dict[str, torch.Tensor]:
    return load_file(latest_checkpoint(folder) / file)


def assert_same_run(found: Path, wanted: Path) -> None:
    """Metrics, weights and moments agree to rounding, and something was learned."""
    assert len(rows(found)) == len(rows(wanted))
    for one, other in zip(rows(found), rows(wanted), strict=True):
        assert list(one) == list(other)
        for name, value in other.items():
            # What the engine is measured by is rounding itself, of which sharded weights have another.
            rounding = 1e-5 if name.startswith("engine_") else 1e-6
            assert one[name] == pytest.approx(value, rel=3e-5, abs=rounding), name
    for file in ("model.safetensors", "optimizer.safetensors"):
        one, other = tensors(found, file), tensors(wanted, file)
        assert one.keys() == other.keys()
        for name, tensor in other.items():
            assert one[name].shape == tensor.shape and one[name].dtype == tensor.dtype
            torch.testing.assert_close(one[name], tensor, rtol=1e-3, atol=1e-4 * float(tensor.abs().max()), msg=name)
    start = load_file(sorted((wanted / "checkpoints").iterdir())[0] / "model.safetensors")
    assert max(float((tensors(wanted, "model.safetensors")[n] - start[n]).abs().max()) for n in start) > 1e-5
