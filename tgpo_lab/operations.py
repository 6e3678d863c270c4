"""How many floating-point operations a training step needs, and how fast this machine makes them.

Counted are matrix products and attention, two operations for each multiply-add. With p prompts of P
tokens and B = p·G rows of T response tokens, M weights in a model's layers (its embeddings and its
output layer of H·V left out) and W = Σ over layers of heads × head width:

    forward(rows, new, before) = 2·rows·new·M + 4·rows·W·Σ_{i=1…new} (before + i)
    sample  =  forward(p, P, 0) + forward(B, T − 1, P) + 2·B·T·H·V
    teacher =  reading + 2·B·T·H·V         with the teacher's M, W and H
    update  = 3·[reading + 2·B·T·H·V]      once forward, twice as much backward
    reading =  forward(B, P + T − 1, 0), or forward(p, P, 0) + forward(B, T − 1, P)

Sampling reads a prompt once for all its samples. So do teacher and update where they can
(:mod:`tgpo_lab.models.shared_prompts`), and otherwise once for each of its rows; the last token of a
response is never read. Grouped key-value heads make the layers' products smaller, not
attention, whose W is of the queries. Normalisation, softmax, drawing, the optimiser and every access
to memory count as free: operations divided by the rate are a floor that no program reaches.

An update's model-FLOP utilisation is these operations / (its seconds × the measured rate), so 1 over
how many times its floor it takes. Gradient checkpointing computes the layers' forward pass again,
which these operations do not count and the hardware's utilisation does:

    recomputation = reading

The rate is the best one measured, on a large square product or on one of the models' own. Small
products are slower on any machine, so a second floor takes each product at the rate of its own shape.
Where the loop has another library than torch.mm make float32 products
(:mod:`tgpo_lab.models.onednn_linear`), both are measured and the faster one counts; a third floor takes
the best rate of torch.mm alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from .loop.clock import Clock
from .models.onednn_linear import mkl_is_slow, product_by_onednn, suits_onednn
from .models.policy import head_width

PHASES = ("sample", "teacher", "update")
"""Phases of a step that operations are counted for."""
SQUARE, SQUARE_ON_GPU = 2048, 8192
"""Side of the large square product whose rate is measured."""
LONGEST_TIMED, LONGEST_TIMED_ON_GPU = 4096, 8192
"""Longest side of the products that are timed: beyond it the rate stays the same."""
CALLS_ON_GPU = 10
"""Products between two waits for a GPU, so that the wait is no part of the rate."""


@dataclass(frozen=True)
class Product:
    """``count`` matrix products (rows, inner) × (inner, columns)."""

    rows: int
    inner: int
    columns: int
    count: int = 1

    @property
    def operations(self) -> int:
        """Two for each multiply-add."""
        return 2 * self.rows * self.inner * self.columns * self.count

    def backward(self) -> list[Product]:
        """The two products of its backward pass: gradients of the input and of the weight."""
        return [
            Product(self.rows, self.columns, self.inner, self.count),
            Product(self.inner, self.rows, self.columns, self.count),
        ]


@dataclass(frozen=True)
class Work:
    """What a phase has to compute."""

    products: list[Product]
    attention: int
    """Operations of attention; a batch of small products, taken at the best rate."""

    @property
    def operations(self) -> int:
        """Of all together."""
        return sum(product.operations for product in self.products) + self.attention


def work_of_step(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    prompts: int,
    group_size: int,
    prompt: int,
    response: int,
    *,
    sharing: Collection[str] = (),
) -> dict[str, Work]:
    """Work of one step by phase, for dense decoder models whose layers are made of ``torch.nn.Linear``.

    Args:
        student: the model that samples and learns.
        teacher: the model that reads what was sampled.
        prompts: prompts of a batch.
        group_size: samples for each prompt.
        prompt: tokens of a prompt (P).
        response: tokens of a response (T).
        sharing: which of ``teacher`` and ``update`` read a prompt once for all its samples.

    Returns:
        Work of each of :data:`PHASES`, and under ``recomputation`` what the update does once more under gradient
        checkpointing.
    """
    rows = prompts * group_size

    def reading(model: PreTrainedModel, shared: bool) -> Work:
        if not shared:
            length = prompt + response - 1
            return Work(_forward(model, rows * length, 1), _attention(model, rows, length, 0))
        return Work(
            _forward(model, prompts * prompt + rows * (response - 1), 1),
            _attention(model, prompts, prompt, 0) + _attention(model, rows, response - 1, prompt),
        )

    of_teacher, of_update = reading(teacher, "teacher" in sharing), reading(student, "update" in sharing)
    forward = of_update.products + _output(student, rows * response, 1)
    return {
        "sample": Work(
            _forward(student, prompts * prompt, 1)
            + _forward(student, rows, response - 1)
            + _output(student, rows, response),
            _attention(student, prompts, prompt, 0) + _attention(student, rows, response - 1, prompt),
        ),
        "teacher": Work(of_teacher.products + _output(teacher, rows * response, 1), of_teacher.attention),
        "update": Work(forward + [back for product in forward for back in product.backward()], 3 * of_update.attention),
        "recomputation": of_update,
    }


def _forward(model: PreTrainedModel, rows: int, count: int) -> list[Product]:
    layers = [module for module in model.base_model.modules() if isinstance(module, torch.nn.Linear)]
    return [Product(rows, layer.in_features, layer.out_features, count) for layer in layers]


def _output(model: PreTrainedModel, rows: int, count: int) -> list[Product]:
    vocabulary, hidden = model.get_output_embeddings().weight.shape
    return [Product(rows, hidden, vocabulary, count)]


def _attention(model: PreTrainedModel, rows: int, new: int, before: int) -> int:
    config = model.config
    width = config.num_hidden_layers * config.num_attention_heads * head_width(config)
    return 4 * rows * width * (new * before + new * (new + 1) // 2)


class MatrixRates:
    """Measured operations per second of matrix products, each shape measured once."""

    def __init__(self, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32):
        """Measure on a device.

        Args:
            device: where.
            dtype: of both factors and of the result.
        """
        self._device, self._dtype = torch.device(device), dtype
        on_gpu = self._device.type == "cuda"
        self._longest, self._calls = (LONGEST_TIMED_ON_GPU, CALLS_ON_GPU) if on_gpu else (LONGEST_TIMED, 1)
        self._onednn = self._device.type == "cpu" and dtype == torch.float32 and mkl_is_slow()
        self._known: dict[tuple[int, int, int], float] = {}
        self._of_mm: list[float] = []
        side = SQUARE_ON_GPU if on_gpu else SQUARE
        self.square = self.rate(Product(side, side, side))

    @property
    def best(self) -> float:
        """The highest rate measured so far."""
        return max(self._known.values())

    @property
    def best_of_mm(self) -> float:
        """The highest rate of torch.mm measured so far."""
        return max(self._of_mm)

    def rate(self, product: Product) -> float:
        """Operations per second: the best of several runs, of the fastest way that the loop knows."""
        shape = tuple(min(side, self._longest) for side in (product.rows, product.inner, product.columns))
        if shape not in self._known:
            rows, inner, columns = shape
            options = {"device": self._device, "dtype": self._dtype}
            left, right = (torch.randn(size, **options) for size in ((rows, inner), (columns, inner)))
            result = torch.empty(rows, columns, **options)  # for torch.mm: fresh memory would be timed as well
            operations = 2 * rows * inner * columns
            rates = [self._measured(lambda: torch.mm(left, right.t(), out=result), operations)]
            self._of_mm.append(rates[0])
            if self._onednn and suits_onednn(*shape):
                rates.append(self._measured(lambda: product_by_onednn(left, right), operations))
            self._known[shape] = max(rates)
        return self._known[shape]

    def _measured(self, call: Callable[[], object], operations: int) -> float:
        times: list[float] = []
        while len(times) < 4 or sum(times) * self._calls < 0.05:
            times.append(seconds_of(call, self._device, self._calls))
        return operations / min(times)

    def floor(self, work: Work) -> float:
        """Seconds that the work takes at the best rate."""
        return work.operations / self.best

    def floor_of_mm(self, work: Work) -> float:
        """Seconds that the work takes at the best rate of torch.mm."""
        return work.operations / self.best_of_mm

    def floor_of_own_shapes(self, work: Work) -> float:
        """Seconds that the work takes with each product at the rate of its own shape."""
        return sum(p.operations / self.rate(p) for p in work.products) + work.attention / self.best


def seconds_of(call: Callable[[], object], device: torch.device, calls: int = 1) -> float:
    """Seconds that one call takes, the device's work included; the mean of ``calls`` that follow one another."""
    clock = Clock(device)
    clock.start()
    for _ in range(calls):
        call()
    return clock.lap() / calls
