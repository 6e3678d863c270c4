"""Liger's kernels in a model's layers. They are run in Triton's interpreter, which needs no GPU."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tgpo_lab.doctor.diagnose import diagnose
from tgpo_lab.errors import InputError
from tgpo_lab.models import fused_kernels
from tgpo_lab.training import train

has_liger = importlib.util.find_spec("liger_kernel") is not None
needs_liger = pytest.mark.skipif(not has_liger, reason="needs the extra liger")


def test_without_liger_the_extra_is_named(monkeypatch, tiny_config, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    config = tiny_config(tmp_path, fused_kernels=True)
    with pytest.raises(InputError, match=r"pip install 'tgpo-lab\[liger\]'"):
        train(config, show_progress=False)
    assert not (tmp_path / "run").exists()
    findings = diagnose(config, device="cpu").findings
    assert [f.level for f in findings] == ["refused"] and "tgpo-lab[liger]" in findings[0].text


def test_without_a_gpu_they_are_refused(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    fused_kernels.require_fused_kernels(torch.device("cuda:1"))
    with pytest.raises(InputError, match="fused_kernels needs a GPU, but the student is on cpu"):
        fused_kernels.require_fused_kernels(torch.device("cpu"))


@needs_liger
@pytest.mark.parametrize("role", ["student", "teacher"])  # Llama, Qwen3
def test_fused_layers_compute_the_same_and_no_other_model_gets_them(random_pair, role):
    run = subprocess.run(
        [sys.executable, Path(__file__).with_name("run_fused_layers.py"), getattr(random_pair, role)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.splitlines()[-1] == "the same"
