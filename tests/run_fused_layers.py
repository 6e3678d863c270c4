"""Started by test_fused_kernels.py, with TRITON_INTERPRET=1: logits and gradients with and without the kernels."""

import sys

import numpy as np
import torch
import triton
import triton.language as tl
from liger_kernel.ops import rms_norm
from triton.runtime import interpreter

from tgpo_lab.errors import InputError
from tgpo_lab.models.fused_kernels import fuse_layers
from tgpo_lab.models.pairs import load_model

# Two things that the interpreter lacks: real numbers as arguments, and CUDA's reciprocal square root.
convert = interpreter._implicit_cvt


def with_floats(argument):
    if not isinstance(argument, float):
        return convert(argument)
    return tl.tensor(interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32), tl.float32)


@triton.jit
def reciprocal_root(x):
    return 1.0 / tl.sqrt(x)


interpreter._implicit_cvt = with_floats
rms_norm.rsqrt = reciprocal_root

tokens = torch.tensor([[5, 9, 12, 700, 2], [3, 3, 8, 1, 40]])


def results(model):
    logits = model(tokens, use_cache=False).logits
    logits.log_softmax(-1)[..., 7].sum().backward()
    return logits.detach(), [parameter.grad for parameter in model.parameters()]


def fused(model):
    layer = model.base_model.layers[0]
    return [
        "liger_kernel" in module.forward.__func__.__module__
        for module in (layer.input_layernorm, layer.mlp, layer.post_attention_layernorm, model.base_model.norm)
    ]


plain, changed = (load_model(sys.argv[1], torch.float32, "cpu") for _ in range(2))
fuse_layers(changed, "it")
assert fused(changed) == [True] * 4, fused(changed)
for model in (plain, load_model(sys.argv[1], torch.float32, "cpu")):
    assert fused(model) == [False] * 4, "another model got the kernels, too"
expected, found = results(plain), results(changed)
torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-6)

plain.config.model_type = "one that Liger does not know"
try:
    fuse_layers(plain, "models/odd")
except InputError as error:
    assert "no kernels for models/odd, whose architecture is one that Liger does not know" in str(error)
else:
    raise AssertionError("an unknown architecture was taken")
print("the same")
