# %% [markdown]
# # 12 · To a real pair on a GPU
#
# **Goal.** Take what runs here on two cores to a pair of Hugging Face models on a GPU: what changes in the configuration
# and what does not, what to check before the first step, how much memory it takes, and what to look at in the logs.
#
# **Minutes.** 1 to run on two cores, 30 to work through.
#
# **Prerequisites.** [08](08_tgpo.ipynb) and [09](09_is_the_teacher_right.ipynb). Nothing is downloaded: small stand-ins
# with random weights have the shapes and the quirks of real models.

# %%
import shutil
from dataclasses import fields
from pathlib import Path

import matplotlib.pyplot as plt
import seaborn as sns
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging

from tgpo_lab import InputError, TrainConfig, load_pair, measure_pair, train
from tgpo_lab.exercises import check
from tgpo_lab.metrics import METRICS, metrics_frame, read_rows
from tgpo_lab.pairs import load_tokenizer, pair_paths
from tgpo_lab.prompts import load_prompts

logging.disable_progress_bar()
sns.set_theme(style="ticks", palette="colorblind")
work = Path("../runs/notebooks/12")
shutil.rmtree(work, ignore_errors=True)

# %% [markdown]
# ## What changes and what does not
#
# A run is a `TrainConfig` and nothing else. Here is the one that the other notebooks use beside the paper's setting, where
# they differ.
#
# **Predict.** By what factor do the response tokens of one step differ, if all responses have their full length?

# %%
tiny = TrainConfig.preset("tiny", "tgpo")
paper = TrainConfig.preset("paper", "tgpo")
print(f"{'':26}{'tiny':>12}   paper")
for field in fields(TrainConfig):
    ours, theirs = getattr(tiny, field.name), getattr(paper, field.name)
    if ours != theirs and field.name != "method":
        print(f"{field.name:26}{ours!s:>12}   {theirs}")
print(f"{'weight of guidance':26}{'':>12}   {paper.method.weight}   (tiny: {tiny.method.weight})")
tokens = [c.prompts_per_step * c.group_size * c.max_new_tokens for c in (tiny, paper)]
print(f"response tokens in a step, at most: {tokens[0]:,} and {tokens[1]:,}, a factor of {tokens[1] // tokens[0]}")

# %% [markdown]
# The loop, the losses and the measurements are the same code. What differs is size, and three settings that follow from
# it: bfloat16 for the teacher and for the products, activations computed twice instead of stored
# (`gradient_checkpointing`), and a learning rate that suits billions of weights. On the command line:
#
# ```
# tgpo-lab train --preset paper --method tgpo --student FOLDER_OR_HUB_NAME --teacher FOLDER_OR_HUB_NAME \
#     --dataset FILE.jsonl --prompt-column question --answer-column answer --output runs/mine
# ```

# %% [markdown]
# ## Stand-ins for real models
#
# Two models with random weights and the tokenizer of our pairs. They copy two quirks of real families: the weight
# matrices have more rows than the tokenizer has tokens, and not equally many in student and teacher.

# %%
student_path, teacher_path, prompts_path = pair_paths("far")
tokenizer = load_tokenizer(student_path)
shape = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
    max_position_embeddings=256, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    bos_token_id=None, tie_word_embeddings=True,
)  # fmt: skip


def save_stand_in(folder: str, model) -> Path:
    """Write a model and the tokenizer as a Hugging Face folder."""
    model.save_pretrained(work / folder)
    tokenizer.save_pretrained(work / folder)
    return work / folder


torch.manual_seed(0)
student = save_stand_in("student", LlamaForCausalLM(LlamaConfig(vocab_size=2112, **shape)))
teacher = save_stand_in("teacher", Qwen3ForCausalLM(Qwen3Config(vocab_size=2176, head_dim=16, **shape)))

pair = load_pair(student, teacher)
for name, model in (("student", pair.student), ("teacher", pair.teacher)):
    print(f"{name}: {type(model).__name__}, {model.get_output_embeddings().weight.shape[0]} vocabulary rows")
print(f"tokens that both know, and that all losses are about: {pair.vocabulary_size}")

# %% [markdown]
# ## Check before the first step
#
# A real run costs hours before it shows that something was wrong from the start. Four checks take seconds. They are taken
# apart here; `tgpo-lab doctor` takes the options of `tgpo-lab train` and makes these and more, with what to change.
#
# **1. One tokenizer.** Guidance names tokens by their ids. If the ids mean different text in the two models, every
# number below is nonsense, and nothing crashes. So it is refused:

# %%
other = work / "other-tokenizer"
shutil.copytree(teacher, other)
text = (other / "tokenizer.json").read_text()
(other / "tokenizer.json").write_text(text.replace('"<think>"', '"<reason>"'))
try:
    load_pair(student, other)
except InputError as error:
    print(str(error).replace(str(work), "…"))

# %% [markdown]
# Equal ids are not enough: text must be *cut* the same way. This folder holds the same tokenizer file beside a model of type
# `qwen2`, and for that type transformers puts its own rules of cutting in place of the file's:

# %%
replaced = save_stand_in("qwen2", Qwen2ForCausalLM(Qwen2Config(vocab_size=2112, **shape)))
try:
    load_pair(replaced, teacher)
except InputError as error:
    print(str(error).replace(str(work), "…"))

# %% [markdown]
# **2. The end of a response.** A base model and its chat version often end with different tokens. If the student never
# writes the token that the loop waits for, all responses run into the token limit: the classic explosion of length.
# Compare what the loop waits for with what the two models were configured to write.

# %%
print("the loop waits for", pair.tokenizer.convert_ids_to_tokens(pair.end_tokens))
for name, model in (("student", pair.student), ("teacher", pair.teacher)):
    configured = model.generation_config.eos_token_id
    print(f"{name} is configured to end with", pair.tokenizer.convert_ids_to_tokens([configured]))

# %% [markdown]
# **3. A model as its own teacher.** Student and teacher the same: then reverse KL is 0 and the two agree everywhere. If
# they do not, the two forward passes are not the same computation: another precision, another mask, a shift by one.
#
# **Predict.** For the same folder twice, what are KL, rejected tokens and agreement?

# %%
prompts = load_prompts(prompts_path)["test"]
own = measure_pair(load_pair(student, student), prompts, count=16, max_new_tokens=20)
print(f"KL(student‖teacher) {own.reverse_kl:.4f} nats, rejected {own.rejected:.3f}, agreement {own.agreement:.3f}")

# %% [markdown]
# **4. The card.** How far apart are they, and is the teacher right where the student goes? The same function as for the
# tiny pairs; for a real pair 64 prompts are enough to see which situation one is in. We measure *far*, because random
# stand-ins have nothing to say:

# %%
card = measure_pair(load_pair("far"), prompts, count=64)
print(f"student {card.student_accuracy_sampled:.2f}, teacher {card.teacher_accuracy:.2f}")
print(f"rejected {card.rejected:.2f}, agreement {card.agreement:.2f}, KL(student‖teacher) {card.reverse_kl:.1f} nats")
print(f"teacher's reliability on the student's prefixes {card.reliability:.2f}")

# %% [markdown]
# Read it like this. High agreement and few rejected tokens: reverse KL will do. Many rejected tokens and a reliable
# teacher: this is what guidance is for. Many rejected tokens and an unreliable teacher: guidance teaches the teacher's
# confusion ([09](09_is_the_teacher_right.ipynb)); use a trust horizon, or another teacher.

# %% [markdown]
# ## Memory
#
# What takes memory on a GPU, in bytes for each parameter: the student's weights in float32 (4), their gradient (4) and
# AdamW's two moments (8); the teacher's weights in bfloat16 (2). And then the logits. One tensor (B, T, V) in float32
# takes 4·B·T·V bytes.
#
# **Predict.** For 8 responses of 4,096 tokens and a vocabulary of 151,936, are the logits larger or smaller than the
# weights of a student with 1.5 billion parameters?

# %%
GIB = 2**30
student_parameters, teacher_parameters = 1.5e9, 4e9
rows, length, vocabulary = 8, 4096, 151_936
parts = {
    "student, weights": 4 * student_parameters,
    "student, gradient": 4 * student_parameters,
    "student, AdamW": 8 * student_parameters,
    "teacher, weights": 2 * teacher_parameters,
    "one tensor of logits": 4 * rows * length * vocabulary,
    "logits, as the loop makes them": 2**29,
}
figure, axes = plt.subplots(figsize=(7, 2.8))
axes.barh(list(parts), [size / GIB for size in parts.values()], color=["C0", "C0", "C0", "C1", "C3", "C2"])
axes.invert_yaxis()
axes.set(xlabel="memory (GiB)", ylabel="what for")
plt.show()
for name, size in parts.items():
    print(f"{name:32}{size / GIB:6.1f} GiB")

# %% [markdown]
# One such tensor is three times as large as the student's weights, and a loss that is written down naively holds several
# of them: student and teacher, logits and log-probabilities, and their gradients. The library never makes one. It projects hidden
# states to the vocabulary a few positions at a time, half a GiB of logits on a GPU, takes the numbers it needs
# (log-probabilities of single tokens, the teacher's best token), and lets the logits go
# (`policy.project_to_vocabulary`, `student_pass.py`). The result is the same but for rounding: 20 positions at once, and
# 3 at a time.

# %%
torch.manual_seed(1)
hidden, weight = torch.randn(20, 32, dtype=torch.float64), torch.randn(2048, 32, dtype=torch.float64)
targets = torch.randint(2048, (20,))
at_once = (hidden @ weight.T).log_softmax(-1)[torch.arange(20), targets]
in_parts = torch.cat(
    [
        (h @ weight.T).log_softmax(-1)[torch.arange(len(t)), t]
        for h, t in zip(hidden.split(3), targets.split(3), strict=True)
    ]
)
print("equal to rounding:", torch.allclose(at_once, in_parts, rtol=1e-12))

# %% [markdown]
# ### Exercise 12.1 · Will it fit?
#
# *Difficulty 1 of 5 · 5 minutes.* Write a function that returns the GiB for weights, gradient and AdamW of the student
# (float32), the teacher's weights (bfloat16), and one tensor of float32 logits for `positions` response positions.
#
# <details><summary>Hint 1</summary>16 bytes for each of the student's parameters, 2 for each of the teacher's.</details>
# <details><summary>Hint 2</summary>A GiB is 2³⁰ bytes, and a float32 takes 4.</details>


# %%
def gibibytes(student_parameters: float, teacher_parameters: float, positions: int, vocabulary: int) -> float:
    """Memory in GiB."""
    ### BEGIN SOLUTION
    return (16 * student_parameters + 2 * teacher_parameters + 4 * positions * vocabulary) / 2**30
    ### END SOLUTION


# %%
check("12.1", gibibytes)

# %% [markdown]
# ## The first steps, and the logs
#
# Three steps of TGPO with the stand-ins: nothing can be learned from random weights, but everything that a real run does
# happens once. A run is a folder.

# %%
config = TrainConfig.preset(
    "tiny", "tgpo", student=str(student), teacher=str(teacher), dataset=str(prompts_path), steps=3, prompts_per_step=4,
    max_new_tokens=24, evaluate_every=0, checkpoint_every=3, output=str(work / "run"),
)  # fmt: skip
train(config, show_progress=False)
for path in sorted((work / "run").rglob("*")):
    if path.is_file():
        print(path.relative_to(work / "run"))

# %% [markdown]
# `config.json` holds everything that decides the numbers, with versions. `metrics.jsonl` has one line a step and is
# written while the run goes on. A checkpoint is a Hugging Face folder: `from_pretrained` loads the student.
#
# What to look at in the first twenty steps of a real run:

# %%
for name in ("truncated", "entropy", "agreement", "rejected", "gradient_norm", "weight"):
    print(f"{name}: {METRICS[name].definition}\n    healthy: {METRICS[name].healthy}")

# %% tags=["nbval-ignore-output"]
steps = metrics_frame(read_rows(work / "run" / "metrics.jsonl"))
print(
    steps[["step", "reward", "length", "truncated", "agreement", "rejected"]].dropna().round(2).to_string(index=False)
)

# %% [markdown]
# No reward and nearly every response cut: random weights do not end. If a real pair starts like this, stop and go through
# the checks again. But look at the agreement, near 1, and at the rejected tokens, none. **Predict.** How can two models with
# random weights agree?

# %%
ids = torch.tensor(pair.encode(prompts["prompt"][:32]))  # (32, 9)
with torch.no_grad():
    for name, model in (("student", pair.student), ("teacher", pair.teacher)):
        best = model(ids).logits.argmax(-1)  # (32, 9)
        print(f"{name}: most probable next token is the one just read, at {(best == ids).float().mean():.2f} of places")

# %% [markdown]
# Input and output embeddings are the same matrix here, so a network that has learned nothing repeats what it reads, and two
# such networks repeat the same. One number never tells you that a pair is healthy. Reward, lengths and agreement together
# do.

# %% [markdown]
# ## Recap
#
# | question | in the library |
# |---|---|
# | what would the paper run? | `TrainConfig.preset("paper", method)` |
# | do the two fit together? | `load_pair(student, teacher)` refuses what cannot work |
# | all checks before training | `tgpo-lab doctor`, from Python `tgpo_lab.diagnose` |
# | how far apart, and is the teacher right there? | `measure_pair`, or `tgpo-lab pairs measure STUDENT TEACHER` |
# | what happened? | `metrics.jsonl`, `load_run`, [docs/metrics.md](../docs/metrics.md) |
#
# - A run is a configuration; the loop is the same for 0.1 million weights and for billions.
# - Check tokenizers, end tokens, a model as its own teacher, and the card, before the first step.
# - Logits are the largest tensors, so they are made a few positions at a time.
