"""Memory and time of the loss part of an update: in chunks of positions, and with whole (B, T, V) tensors.

    python benchmarks/loss_memory.py --tokens 512
    python benchmarks/loss_memory.py --tokens 4096 --versions chunks      # where whole logits do not fit

The loss part is what comes after the last layer: the teacher's answers from its hidden states, the student's logits,
the loss, and the gradients of hidden states and of the output layer. So both models have no layers: hidden states are
normalised embeddings, whose cost is the same for all. The plain version keeps float32 logits of all positions, as
textbook code does. Each measurement has a process of its own. Its peak is counted from the moment at which weights and
their gradients are there, so it holds what the loss adds. The results hold one run for each choice of options, and a
new run replaces the one of the same.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator
from bad_input import require_at_least, run_script
from kept_results import RESULTS, keep_results
from loss_runs import earlier_runs, table, with_run
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from tgpo_lab.allocation_errors import is_killed_for_memory, is_out_of_memory
from tgpo_lab.batch import Batch, Positions
from tgpo_lab.benchmark import peak_memory
from tgpo_lab.errors import RunError
from tgpo_lab.loop.allocator import keep_freed_memory, use_large_pages
from tgpo_lab.loop.student_pass import StudentPass, accumulate_gradients
from tgpo_lab.losses import policy_gradient_loss
from tgpo_lab.methods import make_method
from tgpo_lab.models.pairs import Pair
from tgpo_lab.provenance import provenance
from tgpo_lab.rollouts import Rollouts
from tgpo_lab.teacher import ask_teacher

OWN_FILE = RESULTS / "loss_memory.json"
PROMPT = 2
WEIGHT = 2e-3


@dataclass(frozen=True)
class Options:
    """Compare the loss part in chunks with the plain version."""

    vocabulary_size: int = 151_936
    """Of Qwen2.5 and Qwen3."""
    student_width: int = 896
    """Width of the student's hidden states: Qwen2.5-0.5B."""
    teacher_width: int = 1536
    """Width of the teacher's: Qwen2.5-1.5B."""
    rows: int = 8
    """Responses in the micro-batch."""
    tokens: int = 256
    """Tokens of each."""
    repeats: int = 3
    """Times that count; one before them does not."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """As in a training run: bfloat16 for products and for the teacher."""
    versions: tuple[Literal["chunks", "plain"], ...] = ("chunks", "plain")
    """chunks: positions a few at a time, as in the training loop. plain: the logits of all positions at once."""
    losses: tuple[Literal["tgpo", "exact-rkl"], ...] = ("tgpo", "exact-rkl")
    """tgpo: of two tokens at each position. exact-rkl: of the whole distributions."""
    output: Path = OWN_FILE
    """Where the numbers go, beside those of other options. At the default place, the table goes into README.md too."""

    def __post_init__(self) -> None:
        require_at_least(1, self, "student_width", "teacher_width", "tokens", "repeats")
        require_at_least(2, self, "vocabulary_size", "rows")  # the prompt's token has id 1; rewards differ by row


@dataclass(frozen=True)
class Measured:
    """What one process found."""

    seconds: list[float]
    peak_bytes: int
    gradient: list[float]
    """Some entries of the output layer's gradient, to compare the versions."""


# ── The two versions ─────────────────────────────────────────────────────────────────────────────


def in_chunks(loss: str, pair: Pair, rollouts: Rollouts, autocast: Callable) -> None:
    """The package's own code, as the training loop calls it."""
    method = make_method(loss)
    asked = ask_teacher(
        pair.teacher,
        rollouts,
        vocabulary_size=pair.vocabulary_size,
        micro_batch_tokens=10**9,
        keep_distribution=rollouts.mask if method.needs_distribution else None,
        states_only=method.asks_for_logits_alone,
    )
    rows, tokens = rollouts.mask.shape
    rewards = torch.arange(rows, device=rollouts.mask.device).remainder(2).float()
    batch = Batch(rollouts, torch.zeros_like(rewards).bool(), rewards, asked, None, rows, tokens, torch.Generator(),
                  teacher_states_only=method.asks_for_logits_alone)  # fmt: skip
    whole = StudentPass(batch, torch.arange(len(rollouts), device=rewards.device), pair, 1.0, autocast)
    accelerator = Accelerator(cpu=rewards.device.type == "cpu")
    logprobs = torch.zeros(rows, tokens, device=rewards.device)
    look = functools.partial(Positions.write_logprobs, target=logprobs)  # as a step's measurements do
    accumulate_gradients([whole], method.terms(batch, 0), accelerator, autocast, torch.no_grad()(look))


def plain(loss: str, pair: Pair, rollouts: Rollouts, autocast: Callable) -> None:
    """Float32 logits of all positions of both models at once, and PyTorch's own functions."""
    tokens, _ = rollouts.sequences()
    with torch.no_grad():
        teacher_logits = pair.teacher(tokens).logits[:, PROMPT - 1 : -1].float()
    with autocast():
        logits = pair.student(tokens).logits[:, PROMPT - 1 : -1].float()
    count = rollouts.mask.sum()
    if loss == "exact-rkl":
        student, teacher = logits.log_softmax(-1), teacher_logits.log_softmax(-1)
        measured = torch.stack([rollouts.responses, teacher_logits.argmax(-1)], -1)
        teacher.gather(-1, measured)  # log πT of both, for the measurements
        total = (student.exp() * (student - teacher)).sum() / count
    else:
        teacher_tokens = teacher_logits.argmax(-1)
        measured = torch.stack([rollouts.responses, teacher_tokens], -1)
        teacher_logits.log_softmax(-1).gather(-1, measured)  # log πT of both, for the measurements
        logprobs = logits.log_softmax(-1)
        written = logprobs.gather(-1, rollouts.responses.unsqueeze(-1)).squeeze(-1)
        rewards = torch.arange(len(rollouts), device=tokens.device).remainder(2).float()
        advantages = ((rewards - rewards.mean()) / rewards.std()).unsqueeze(-1).expand(written.shape)
        total = policy_gradient_loss(written, written.detach(), advantages, rollouts.mask)
        guidance = logprobs.gather(-1, teacher_tokens.unsqueeze(-1)).squeeze(-1)
        total = total - WEIGHT * guidance.sum() / count
    total.backward()


VERSIONS = {"chunks": in_chunks, "plain": plain}


# ── Measuring, in a process of its own ───────────────────────────────────────────────────────────


def random_pair(options: Options, device: torch.device) -> Pair:
    """Models without layers, and nothing else of a pair that a loss needs."""
    torch.manual_seed(0)
    common = {"vocab_size": options.vocabulary_size, "num_hidden_layers": 0, "num_attention_heads": 1,
              "intermediate_size": 8, "tie_word_embeddings": False}  # fmt: skip
    student = LlamaForCausalLM(LlamaConfig(hidden_size=options.student_width, **common))
    teacher = Qwen3ForCausalLM(Qwen3Config(hidden_size=options.teacher_width, **common)).eval().requires_grad_(False)
    if options.precision == "bfloat16":
        teacher = teacher.bfloat16()
    student.model.requires_grad_(False)  # hidden states are asked for their gradient below
    return Pair("random", student.to(device), teacher.to(device), None, options.vocabulary_size, [], None)


def measure(version: str, loss: str, options: Options) -> Measured:
    """Time and peak of one version."""
    use_large_pages()
    keep_freed_memory()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pair = random_pair(options, device)
    pair.student.model.embed_tokens.register_forward_hook(lambda module, inputs, output: output.requires_grad_())
    generator = torch.Generator().manual_seed(1)
    shape = options.rows, options.tokens
    responses = torch.randint(options.vocabulary_size, shape, generator=generator).to(device)
    mask = torch.ones(shape, dtype=torch.bool, device=device)
    rollouts = Rollouts([[1] * PROMPT] * options.rows, responses, mask, mask.all(-1), 0)

    def autocast():
        return torch.autocast(device.type, torch.bfloat16) if options.precision == "bfloat16" else nullcontext()

    weight = pair.student.lm_head.weight
    weight.grad = torch.zeros_like(weight)
    before, seconds = start_counting(device), []
    for _ in range(options.repeats + 1):
        weight.grad.zero_()
        start = time.perf_counter()
        VERSIONS[version](loss, pair, rollouts, autocast)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    rows, columns = torch.arange(0, len(weight), 997), torch.arange(0, weight.shape[1], 31)
    gradient = weight.grad.cpu()[rows][:, columns].flatten().tolist()
    return Measured(seconds[1:], peak(device) - before, gradient)


def start_counting(device: torch.device) -> int:
    """Bytes in use now; the peak is counted from here."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")  # Linux: sets the peak to what is in use
    return peak(device)


def peak(device: torch.device) -> int:
    """Most bytes in use since counting began."""
    return peak_memory()["peak_gpu_bytes" if device.type == "cuda" else "peak_resident_bytes"]


def print_measured(version: str, loss: str, options: Options) -> None:
    """Measure, and print what was found as a line of JSON: null where memory ran out."""
    try:
        found = asdict(measure(version, loss, options))
    except (RuntimeError, OSError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        found = None
    print(json.dumps(found))


# ── Comparison ───────────────────────────────────────────────────────────────────────────────────


def compare(loss: str, options: Options) -> dict[str, object]:
    """The versions of one loss.

    Raises:
        RunError: a process failed for another reason than memory; with the last lines of its errors.
    """
    entries = {}
    for version in options.versions:
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            json.dump(asdict(options) | {"output": str(options.output)}, file)
            file.flush()
            command = [sys.executable, __file__, version, loss, file.name]
            run = subprocess.run(command, capture_output=True, text=True, check=False)
        if is_killed_for_memory(run.returncode):
            entries[version] = None
            continue
        if run.returncode:
            raise RunError(f"{version}, {loss}: ended with status {run.returncode}:\n{run.stderr[-4000:]}")
        entries[version] = json.loads(run.stdout.splitlines()[-1])
    found = {"loss": loss, "versions": entries}
    if all(entries.get(version) for version in VERSIONS):
        chunks, whole = (torch.tensor(entries[v]["gradient"], dtype=torch.float64) for v in VERSIONS)
        found["gradient_difference"] = float((chunks - whole).norm() / whole.norm())
    for entry in entries.values():
        if entry:
            del entry["gradient"]
    return found


def main(options: Options) -> None:
    """Run the comparisons and write the results."""
    runs = earlier_runs(options.output)  # before anything is measured in vain
    settings = {name: value for name, value in asdict(options).items() if name != "output"}
    settings |= {name: list(getattr(options, name)) for name in ("versions", "losses")}  # as JSON has it
    comparisons = [compare(loss, options) for loss in options.losses]
    runs = with_run(runs, {"comparisons": comparisons, "options": settings, **provenance()})
    keep_results({"runs": runs}, table(runs), options.output, OWN_FILE, "loss table")


if __name__ == "__main__":
    if len(sys.argv) == 4 and sys.argv[1] in VERSIONS:
        stored = json.loads(Path(sys.argv[3]).read_text())
        print_measured(sys.argv[1], sys.argv[2], Options(**stored))
    else:
        run_script(main, Options)
