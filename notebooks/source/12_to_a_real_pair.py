# %% [markdown]
# # 12 · To a real pair on a GPU
#
# **Goal.** Take what runs here on two cores to a pair of Hugging Face models on a GPU: choose a pair, put prompts before it,
# set a reward, check it all before the first step, know how much memory it takes, and what to look at in the logs.
#
# **Minutes.** 1 to run on two cores, 65 to work through.
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
from tokenizers import AddedToken
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
)
from transformers.utils import logging

from tgpo_lab import InputError, TrainConfig, diagnose, evaluate, load_pair, measure_pair, train
from tgpo_lab.doctor.memory_estimate import estimate_memory
from tgpo_lab.doctor.model_shape import shape_of
from tgpo_lab.exercises import check
from tgpo_lab.metrics import METRICS, metrics_frame, read_rows
from tgpo_lab.models.pairs import load_tokenizer, pair_paths
from tgpo_lab.runs import load_run
from tgpo_lab.tasks.prompt_format import PromptFormat
from tgpo_lab.tasks.prompts import load_prompts
from tgpo_lab.tasks.rewards import reward_function

logging.disable_progress_bar()
sns.set_theme(style="ticks", palette="colorblind")
work = Path("../runs/notebooks/12")
shutil.rmtree(work, ignore_errors=True)

# %% [markdown]
# ## What changes and what does not
#
# A run is a `TrainConfig` and nothing else. Here is the preset from which the other notebooks start (they shorten it), beside one
# for a card of 24 GB and the paper's setting, where they differ.
#
# **Predict.** By what factor do the response tokens of one step differ between the first and the last, if all responses have their
# full length?

# %%
presets = {name: TrainConfig.preset(name, "tgpo") for name in ("tiny", "gpu-24gb", "paper")}
print(f"{'':24}" + "".join(f"{name:24}" for name in presets))
for field in fields(TrainConfig):
    values = [getattr(config, field.name) for config in presets.values()]
    if any(value != values[0] for value in values) and field.name not in ("method", "prompt_template"):
        print(f"{field.name:24}" + "".join(f"{value!s:24}" for value in values))
for name, config in presets.items():
    print(f"weight of guidance, {name}: {config.method.weight}")
print("prompt_template of gpu-24gb:", repr(presets["gpu-24gb"].prompt_template))
tokens = [c.prompts_per_step * c.group_size * c.max_new_tokens for c in presets.values()]
print(f"response tokens in a step, at most: {tokens[0]:,} and {tokens[-1]:,}, a factor of {tokens[-1] // tokens[0]}")

# %% [markdown]
# The loop, the losses and the measurements are the same code. What differs is size, and what follows from it: bfloat16 for the
# teacher and for matrix products (the student's weights stay float32), activations computed twice instead of stored
# (`gradient_checkpointing`), and a learning rate that suits billions of weights. The weight of guidance is ten times the paper's
# in `tiny`: in a few dozen steps a small one starts too slowly ([10](10_a_fair_comparison.ipynb)). (`mini_batches 2`: two updates from
# each batch, so the clip of [05](05_on_policy_distillation.ipynb) has something to do.)
#
# `lora_rank 32` (LoRA, low-rank adapters): the student's own weights are frozen, and two small matrices beside each large one are
# trained, the **adapters**. Only they have a gradient and the optimiser's moments, so the frozen weights can be bfloat16. It needs
# `pip install -e '.[lora]'`. A checkpoint then holds the adapters alone, which load on top of the base model; with `--lora-merged` it
# is a whole model.
#
# `paper` is for eight cards of 80 GB and takes vLLM (`pip install -e '.[vllm]'`). Its student was published for 4,096 positions, fewer
# than its responses have; `student_positions` and `student_rope_theta` give it more.
#
# Two commands, for a mathematics data set of the Hugging Face hub and a card of 24 GB. The first examines, the second trains, three
# steps to begin with. Both take the same options, and the GPU is found by itself:
#
# ```
# tgpo-lab doctor --preset gpu-24gb
# tgpo-lab train --preset gpu-24gb --method tgpo --steps 3 --output runs/first
# ```
#
# Any of the preset's values can be given otherwise, for instance with models and prompts of your own:
#
# ```
# tgpo-lab train --preset gpu-24gb --method tgpo --output runs/mine \
#   --student models/mine --teacher models/large \
#   --dataset prompts.jsonl --prompt-column question --answer-column answer --reward last_number
# ```
#
# The rest of this notebook goes through what these options say: which models, which prompts, what makes a response right, what makes
# it fit. What can go wrong with each, and how would you see it?

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
# ## From a question to tokens
#
# In the tiny world a prompt is a bare sum. A real model has been trained on prompts of some form, and answers in another form
# if it is asked otherwise. Two options decide what it reads: `prompt_template` is text around the question, `chat_template`
# puts it into a user's turn, with the template that comes with the student's tokenizer. Our tokenizer has none; we give it
# the usual one of the Qwen family.

# %%
chatting = load_tokenizer(student_path)
chatting.chat_template = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
question = "What is 17+18+13?"
asking = "{prompt}\nPut your final answer within \\boxed{}."
for shape_of_prompt in (
    PromptFormat(),
    PromptFormat(prompt_template=asking),
    PromptFormat(prompt_template=asking, chat_template=True),
    PromptFormat(prompt_template=asking, chat_template=True, system_prompt="You add numbers."),
):
    print(repr(shape_of_prompt.text(chatting, question)))

# %% [markdown]
# Base models go with the plain forms, chat models with the template. Student and teacher read the *same tokens*, those of the
# student's template, so a teacher that knows another template is asked something strange: the doctor compares the two. A template
# may have options: Qwen3's thinks first unless it is told not to, `--chat-template-options enable_thinking=false`. Where a data set
# has its prompts as chat messages, the user's one turn is what stands here as the question.
#
# **Prompts of unequal length.** A batch is a rectangle, and a response has to follow its prompt without a gap. So prompts are
# padded on the *left* for sampling. Three things must then be right: the mask hides the padding, positions are counted from the
# first real token, and the padding's own logits are never used. By hand, with the student of *far*:
#
# **Predict.** If the short prompt is padded, and mask and positions are both forgotten, by how much does the next token's
# log-probability change, at most?

# %%
far = load_pair("far")
short, long = far.encode(["7+8=", "17+18+13="])
padding = len(long) - len(short)
padded = torch.tensor([[far.pad_token] * padding + short, long])  # (2, P)
visible = torch.tensor([[0] * padding + [1] * len(short), [1] * len(long)])
positions = torch.tensor([[0] * padding + list(range(len(short))), list(range(len(long)))])
print(padded.tolist(), visible.tolist(), positions.tolist(), sep="\n")
with torch.no_grad():
    alone = far.student(torch.tensor([short])).logits[0, -1].log_softmax(-1)  # (V,)
    masked = far.student(padded, attention_mask=visible, position_ids=positions).logits[0, -1].log_softmax(-1)
    unmasked = far.student(padded).logits[0, -1].log_softmax(-1)
print(f"against the prompt alone: with mask and positions equal {torch.allclose(alone, masked, atol=1e-4)}, "
      f"without: off by up to {(alone - unmasked).abs().max():.0f} nats")  # fmt: skip

# %% [markdown]
# The library does this in `sampling.cached_sampling.sample_responses`, and leaves padding out altogether where it computes losses.

# %% [markdown]
# ### Exercise 12.1 · Prompts of unequal length
#
# *Difficulty 2 of 5 · 8 minutes.* Write a function that takes prompts as lists of token ids and the id of the padding token, and
# returns the padded tokens, the attention mask and the positions, int64 (B, P) each. P is the length of the longest prompt. A prompt
# may hold the padding token itself, as many do whose padding is their end token. Positions of the padding are 0.
#
# <details><summary>Hint 1</summary>The mask comes from the lengths, not from the ids.</details>
# <details><summary>Hint 2</summary><code>cumsum(-1)</code> of the mask counts the first real token as 1.</details>


# %%
def pad_left(prompts: list[list[int]], pad_token: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, attention mask and positions of a batch: (B, P) three times, int64."""
    ### BEGIN SOLUTION
    longest = max(len(prompt) for prompt in prompts)
    tokens = torch.tensor([[pad_token] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return tokens, mask, (mask.cumsum(-1) - 1).clamp(min=0)
    ### END SOLUTION


# %%
check("12.1", pad_left)

# %% [markdown]
# ## From a response to a reward
#
# The student must be told what form an answer has, by the prompt or by what it has learned, and the reward must look for that form.
# `marked_answer`, which the tiny world uses, wants `#` and an integer at the end. A real model will hardly ever write that.
#
# Two others: `exact_match` wants the whole response to be the answer, `last_number` takes the last number in it.
#
# **Predict.** Four ways to say 72. Which of them does each reward accept?

# %%
said = ["so it is \\boxed{72}.", "The answer is 72.", "72", "… = 72 #72"]
print(f"{'':24}" + "".join(f"{name:>15}" for name in ("marked_answer", "exact_match", "last_number")))
for text in said:
    values = [reward_function(name)(text, "72") for name in ("marked_answer", "exact_match", "last_number")]
    print(f"{text:24}" + "".join(f"{value:15.0f}" for value in values))

# %% [markdown]
# `last_number` takes the last number of any text; it suits data sets with numbers for answers, such as gsm8k. `math_verify`
# compares the last LaTeX expression, a `\boxed{…}` first, as mathematics (½ equals 0.5); it needs the extra
# `pip install -e '.[math]'`. A reward of your own is `--reward package.module:function`, a function of the response and the
# right answer that returns a number. Rewards compare text; none evaluates it. A response that was cut at the token limit gets 0 from
# all of them.

# %% [markdown]
# ### Exercise 12.2 · A reward for boxed answers
#
# *Difficulty 3 of 5 · 10 minutes.* Write such a function for responses that end in `\boxed{…}`: 1.0 if the text in the *last* box is
# the answer, spaces around it allowed, and 0.0 otherwise. A box may hold braces of its own, as in `\boxed{\frac{1}{2}}`; one that is
# never closed is no answer.
#
# <details><summary>Hint 1</summary><code>response.rpartition("\\boxed{")</code> gives what stands before the last box, the mark, and
# what comes after it.</details>
# <details><summary>Hint 2</summary>Go through the rest and count: one more for each <code>{</code>, one less for each <code>}</code>.
# The box ends where the count is below 0.</details>


# %%
def boxed_answer(response: str, answer: str) -> float:
    """1.0 if the last \\boxed{…} of the response holds the answer, else 0.0."""
    ### BEGIN SOLUTION
    _, mark, rest = response.rpartition("\\boxed{")
    depth = 0
    for place, character in enumerate(rest):
        depth += (character == "{") - (character == "}")
        if depth < 0:
            return float(bool(mark) and rest[:place].strip() == answer)
    return 0.0
    ### END SOLUTION


# %%
check("12.2", boxed_answer)

# %% [markdown]
# A reward that looks for the wrong form is 0 for ever, and nothing else tells you. So look at one before training: the prompt as
# the model reads it, what the *teacher* answers, and the reward.

# %%
look = far.prompt_format.text(far.tokenizer, load_prompts(prompts_path)["test"]["prompt"][0])
answered = {name: evaluate(far, far.teacher, count=32, reward=name) for name in ("marked_answer", "exact_match")}
print(repr(look), "→", answered["marked_answer"].rollouts.texts(far.tokenizer)[0])
for name, result in answered.items():
    print(f"the teacher's accuracy by {name}: {result.accuracy:.2f}")

# %% [markdown]
# The same responses: all right by one reward, none by the other. If your *teacher* is wrong nearly always, look at the prompt,
# the reward and the token limit before anything else.
#
# ## Check before the first step
#
# A real run costs hours before it shows that something was wrong from the start. Four checks take seconds. They are taken
# apart here; `tgpo-lab doctor` makes these and more, with what to change.
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
# **Would the paper's pair pass?** Its student is Qwen2.5-Math-7B and its teacher Qwen3-30B-A3B: two families, but nearly one
# tokenizer. What is known: the teacher's has the student's 151,665 tokens at the same ids and four added ones behind them,
# `<think>` and `</think>` among them. Tokens that only one side has are *cut* from both distributions and not refused, as long as they are
# added ones and stand at the end. So by its vocabulary the pair passes. Whether both cut all texts alike the check tries on nine
# probe texts, and that was not run here, since nothing can be downloaded. Here is the same situation in small: a teacher
# with two added tokens.

# %%
more_tokens = load_tokenizer(teacher)
more_tokens.add_tokens([AddedToken(t, special=False, normalized=False) for t in ("<reason>", "</reason>")])
save_stand_in("added", Qwen3ForCausalLM(Qwen3Config(vocab_size=2176, head_dim=16, **shape)))
more_tokens.save_pretrained(work / "added")
cut = load_pair(student, work / "added")
print(f"the teacher's tokenizer has {len(more_tokens)} tokens, shared and kept are {cut.vocabulary_size}")

# %% [markdown]
# A cut token has a price. A teacher that would *open* with it, as a reasoning model opens with `<think>`, cannot: the next best takes
# its place, and the teacher is not itself. The doctor looks for that (*opening*) and warns. The remedy is a chat template without
# thinking, or another teacher. For any other pair do not guess from its name: let the doctor look.
#
# **2. The end of a response.** A base model and its chat version often end with different tokens. If the student never
# writes the token that the loop waits for, all responses run into the token limit: the classic explosion of length.
# Compare what the loop waits for with what the two models were configured to write.

# %%
print("the loop waits for", pair.tokenizer.convert_ids_to_tokens(pair.end_tokens))
for name, model in (("student", pair.student), ("teacher", pair.teacher)):
    configured = model.generation_config.eos_token_id
    print(f"{name} is configured to end with", pair.tokenizer.convert_ids_to_tokens([configured]))

# %% [markdown]
# These two end alike. Now a teacher that ends otherwise, with the tokenizer's second special token:

# %%
ends_otherwise = work / "ends-otherwise"
shutil.copytree(teacher, ends_otherwise)
model = Qwen3ForCausalLM.from_pretrained(ends_otherwise)
second = next(i for i in pair.tokenizer.all_special_ids if i != pair.tokenizer.eos_token_id)
model.generation_config.eos_token_id = second
model.save_pretrained(ends_otherwise)
print("the loop waits for", pair.tokenizer.convert_ids_to_tokens(load_pair(student, ends_otherwise).end_tokens))

# %% [markdown]
# Any of them ends a response: a student that learns to stop as its teacher does is heard. Were only its own end counted, it
# would talk on to the limit.
#
# **3. A model as its own teacher.** Student and teacher the same: then reverse KL is 0 and the two agree everywhere. If
# they do not, the two forward passes are not the same computation: another precision, another mask. (Not every error shows here:
# a shift by one in *both* passes would cancel. So the doctor also compares the log-probabilities at the time of sampling, which come
# from another path, with those of the update: *sampling noise* below.)
#
# **Predict.** For the same folder twice, what are KL, rejected tokens and agreement?

# %%
prompts = load_prompts(prompts_path)["test"]
own = measure_pair(load_pair(student, student), prompts, count=16, max_new_tokens=20)
print(f"KL(student‖teacher) {own.reverse_kl:.4f} nats, rejected {own.rejected:.3f}, agreement {own.agreement:.3f}")

# %% [markdown]
# **4. The card.** How far apart are they, and is the teacher right where the student goes? The same function as for the
# tiny pairs; take 64 prompts or more (a share then has a standard error of six hundredths at worst). We measure *near* and *far*, as
# a scale, because random stand-ins have nothing to say:

# %%
for name, measured in (("near", load_pair("near")), ("far", far)):
    card = measure_pair(measured, prompts, count=64)
    print(f"{name}: student {card.student_accuracy_sampled:.2f}, teacher {card.teacher_accuracy:.2f}")
    print(
        f"   rejected {card.rejected:.2f}, agreement {card.agreement:.2f}, KL(student‖teacher) {card.reverse_kl:.1f} nats"
    )
    print(
        f"   opening {card.opening_logprob:.1f} nats, teacher's reliability on the student's prefixes {card.reliability:.2f}"
    )

# %% [markdown]
# Read it like this.
#
# - **High agreement, few rejected tokens,** as on *near*: reverse KL will do.
# - **Many rejected tokens, a reliable teacher,** as on *far*: look at the opening, the probability p of the teacher's first token
#   under the student. One in 1/p responses has it. If that is a few steps' worth of responses, sampling finds it; if it is a hundred
#   steps' worth or more, this is what guidance is for; between, try both. (In the map of [10](10_a_fair_comparison.ipynb), with 64
#   responses a step, reverse KL was level or ahead at −5 nats, two steps' worth, and behind in area at −9, a hundred and more, or
#   about sixteen if `<think>` may stand anywhere, as in [07](07_grpo.ipynb). The doctor warns from −6 on, unless the
#   method is TGPO already.)
# - **Many rejected tokens, an unreliable teacher:** guidance teaches the teacher's confusion
#   ([09](09_is_the_teacher_right.ipynb)); use a trust horizon, or another teacher.
#
# And where the teacher can write responses cheaply, run `sft` beside it: on *far* it was as good and sooner
# ([10](10_a_fair_comparison.ipynb)).
#
# **All of it at once.** `tgpo_lab.diagnose`, on the command line `tgpo-lab doctor`, with the stand-in teacher that has two added
# tokens. Each line is ok, a warning with what to change, or a refusal; the exit status is 0, 1 or 2.

# %% tags=["nbval-ignore-output"]
examined = TrainConfig.preset(
    "tiny", "tgpo", student=str(student), teacher=str(work / "added"), dataset=str(prompts_path), max_new_tokens=24,
    output=str(work / "run"),
)  # fmt: skip
found = diagnose(examined, prompts=8)
for finding in found.findings:
    print(f"{finding.level.upper()} · {finding.subject}: {finding.text}".replace(str(work), "…"))
    if finding.change:
        print(f"    → {finding.change}")

# %% [markdown]
# No line says REFUSED, so it can start (exit status 1). The doctor warns of what random weights are bound to show: answers that never end, so that the limit cuts them.
# On a real pair that asks for a larger limit; one about right answers would be a reason to stop; one about an opening that is hard to
# find, which other methods than TGPO get, chooses the method;
# added tokens are for you to know.

# %% [markdown]
# ## Memory
#
# What takes memory on a GPU if all weights are trained, in bytes for each parameter: the student's weights in float32 (4), their
# gradient (4) and AdamW's two moments (8); the teacher's weights in bfloat16 (2). And then the logits. One tensor (B, T, V) in float32
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
# (`models.policy.project_to_vocabulary`, `loop.student_pass.StudentPass`). The result is the same but for rounding: 20 positions at once, and
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
# **By the presets.** `estimate_memory` adds up all parts of a run, from the shapes of the models alone. Besides weights and
# optimizer there is what only one phase needs at a time, and the largest counts: *sampling* (keys and values, one set for every
# token of every response that is being written), *update* (what is stored for the way back through the layers) or *teacher pass*.
# Then a second copy of float32 weights in bfloat16, CUDA's own *context*, and a margin for *fragments*. Here with the published
# shapes, nothing is loaded, in GB (10⁹ bytes), as the makers of cards count:
#
# **Predict.** What is the largest part of the paper's setting: weights, optimizer, or sampling?

# %%
shapes = {
    "Qwen2.5-Math-1.5B": Qwen2Config(
        vocab_size=151936, hidden_size=1536, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2,
        intermediate_size=8960, tie_word_embeddings=True),
    "Qwen2.5-Math-7B": Qwen2Config(
        vocab_size=152064, hidden_size=3584, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4,
        intermediate_size=18944, tie_word_embeddings=False),
    "Qwen3-4B": Qwen3Config(
        vocab_size=151936, hidden_size=2560, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8,
        head_dim=128, intermediate_size=9728, tie_word_embeddings=True),
    "Qwen3-30B-A3B": Qwen3MoeConfig(
        vocab_size=151936, hidden_size=2048, num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4,
        head_dim=128, intermediate_size=6144, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8,
        tie_word_embeddings=False),
}  # fmt: skip
for preset, student_name, teacher_name in (
    ("gpu-24gb", "Qwen2.5-Math-1.5B", "Qwen3-4B"),
    ("paper", "Qwen2.5-Math-7B", "Qwen3-30B-A3B"),
):
    planned = TrainConfig.preset(preset, "tgpo")
    if preset == "paper":  # on one card, by this loop alone, everything at once: what it would need without help
        planned = planned.with_changes(engine="own", vllm_sleep=False, sampling_rows=0, teacher_offload=False)
    needed = estimate_memory(planned, shape_of(shapes[student_name]), shape_of(shapes[teacher_name]))
    rows = planned.sampling_rows or planned.prompts_per_step * planned.group_size
    print(f"{preset}: {needed.total / 1e9:.0f} GB, {rows} responses of up to {planned.max_new_tokens} tokens at once")
    print("   ", ", ".join(f"{name} {size / 1e9:.1f}" for name, size in needed.parts.items()))

# %% [markdown]
# The paper's setting does not fit on one card. The library can divide a step over several ([README](../README.md)), which is
# tested with processes on CPUs and has not been run on several GPUs. Its sampling alone, 1,024 responses of 8,192 tokens
# at once, takes about ten cards of 80 GB. So the preset lets vLLM sample, which takes turns with the update, and keeps the teacher in the
# machine's own memory: 68 GB on each of eight cards (`tgpo-lab doctor --preset paper --processes 8 --sharded`). `gpu-24gb` and `gpu-80gb` are what fits by this sum, with adapters (`lora_rank`) in place of a trained
# copy of all weights. **None of the three has been run on its cards yet.** So this course has no number for seconds a step or for the cost of a run, and
# no result of a real pair. Take `--steps 3` first and multiply what you see; `tgpo-lab bench` gives tokens a second by phase.

# %% [markdown]
# ### Exercise 12.3 · What still fits?
#
# *Difficulty 2 of 5 · 8 minutes.* A card has `card` bytes. On it are a student of which all weights are trained with AdamW (float32),
# a teacher (bfloat16), and *one* float32 tensor of logits, for as many response positions as there is room for. Return that number
# of positions, a whole number; 0 if the weights alone do not fit.
#
# <details><summary>Hint 1</summary>16 bytes for each of the student's parameters, 2 for each of the teacher's.</details>
# <details><summary>Hint 2</summary>A position takes V numbers of 4 bytes. Part of a position does not help:
# <code>//</code>.</details>


# %%
def positions_that_fit(card: int, student_parameters: int, teacher_parameters: int, vocabulary: int) -> int:
    """Largest number of response positions whose logits fit on the card."""
    ### BEGIN SOLUTION
    room = card - 16 * student_parameters - 2 * teacher_parameters
    return max(room, 0) // (4 * vocabulary)
    ### END SOLUTION


# %%
check("12.3", positions_that_fit)

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
    if path.is_file() and path.name != ".lock":
        print(path.relative_to(work / "run"))

# %% [markdown]
# `config.json` holds everything that decides the numbers, with versions. `metrics.jsonl` has one line a step and is
# written while the run goes on. A checkpoint is a Hugging Face folder: `from_pretrained` loads the student.
#
# What to look at in the first twenty steps of a real run. (*Measured positions*: exact divergences are taken at a random part of the
# tokens, `measured_positions` of them.)

# %%
watched = ["reward", "length", "truncated", "agreement", "rejected", "gradient_norm"]
for name in watched:
    print(f"{name}: {METRICS[name].definition}\n    healthy: {METRICS[name].healthy}")

# %% tags=["nbval-ignore-output"]
steps = metrics_frame(read_rows(work / "run" / "metrics.jsonl"))
print(steps[["step", *watched]].dropna().round(2).to_string(index=False))

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
# ## Afterwards
#
# A run that has ended, or was stopped with Ctrl-C, goes on from its last checkpoint, to more steps if you like; and its student is
# measured on the held-out prompts with the run's own settings:
#
# ```
# tgpo-lab train --resume runs/first --steps 300
# tgpo-lab evaluate --run runs/first
# ```
#
# From Python the run comes back whole, its metrics as a table and its student as a model:

# %%
run = load_run(work / "run")
print(run.completed, type(run.student).__name__, run.metrics["step"].tolist())

# %% [markdown]
# ## Recap
#
# | question | in the library |
# |---|---|
# | what would the paper run? | `TrainConfig.preset("paper", method)` |
# | do the two fit together? | `load_pair(student, teacher)` refuses what cannot work |
# | all checks before training | `tgpo-lab doctor`, from Python `tgpo_lab.diagnose` |
# | how far apart, and is the teacher right there? | `measure_pair`, or `tgpo-lab pairs measure STUDENT TEACHER` |
# | what happened? | `metrics.jsonl`, `runs.load_run`, [docs/metrics.md](../docs/metrics.md) |
# | what does the model read, what is right? | `PromptFormat`; `tasks.rewards.REWARDS` |
# | will it fit? | `doctor.memory_estimate.estimate_memory`, part of the doctor |
#
# - A run is a configuration; the loop is the same for 0.1 million weights and for billions.
# - Look at one prompt, one answer of the teacher and its reward before you train.
# - Check tokenizers, end tokens, a model as its own teacher, and the card, before the first step.
# - Logits are the largest tensors of a loss, so they are made a few positions at a time. In the paper's setting,
#   written all at once, sampling takes most of the memory; with `gpu-24gb` the teacher's weights do, then the update.
#
# **The end.** You can implement TGPO ([08](08_tgpo.ipynb), forty lines), say when it fails ([09](09_is_the_teacher_right.ipynb)) and when it is not
# needed ([10](10_a_fair_comparison.ipynb)), and start it on a real pair. What was measured on small ones stands in
# [docs/findings.md](../docs/findings.md). Open: everything on real models. You have what it takes.
