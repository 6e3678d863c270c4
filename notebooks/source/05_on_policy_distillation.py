# %% [markdown]
# # 05 · On-policy distillation
#
# **Goal.** Write the training loop of reverse-KL distillation from its pieces, run it on the near pair, and know the
# three places where such a loop goes wrong without a word: the detached advantage, the normaliser, and the second
# update from one batch.
#
# **Minutes.** 2 to run on two cores, 65 to work through.
#
# **Prerequisites.** [01](01_policies_and_tokens.ipynb) for tokens and masks,
# [04](04_the_gradient_of_reverse_kl.ipynb) for the gradient that is used here.

# %%
import shutil
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
import torch

from tgpo_lab import TrainConfig, evaluate, load_pair, plots, train
from tgpo_lab.exercises import check
from tgpo_lab.losses import masked_sum, policy_gradient_loss, reverse_kl_per_token, token_logprobs
from tgpo_lab.micro_batches import split_rows
from tgpo_lab.models.policy import project_to_vocabulary, response_hidden_states
from tgpo_lab.randomness import generator_for, rows_of_step
from tgpo_lab.sampling.cached_sampling import sample_responses
from tgpo_lab.tasks.prompts import load_prompts
from tgpo_lab.tasks.rewards import marked_answer, score

sns.set_theme(style="ticks", palette="colorblind")
colors = sns.color_palette("colorblind")

# %% [markdown]
# ## What the near pair is
#
# The student of *near* opens its response as its teacher does about one time in four, with `<think>`, and tries a direct
# answer first otherwise. We measure how often it is right: greedily (the most probable token each time) and sampled.

# %%
pair = load_pair("near")
for temperature, name in ((0.0, "greedy"), (1.0, "sampled")):
    before = evaluate(pair, temperature=temperature, count=128)
    print(f"{name:8} accuracy {before.accuracy:.2f}, {before.length:.0f} tokens a response")

# %% [markdown]
# Nothing has to be learned here about adding numbers: the student answers every one of these prompts rightly if it
# takes its best token each time. What can be learned is the *distribution*. Sampled, one response in five is wrong, and
# that is what we look at in this notebook. It shows that a loop works, on a pair on which it should. It does not show
# that distillation teaches a skill.

# %% [markdown]
# ## Step 1: the student writes
#
# A batch is 8 prompts with 8 responses each, 64 rows. On-policy means that the student which is to be trained writes
# them itself, at temperature 1.

# %%
prompts = load_prompts(pair.prompts)["train"]


def sample_batch(student, step):
    """8 prompts × 8 responses, and the right answer for each row."""
    chosen = prompts[rows_of_step(0, step, 8, len(prompts))]
    rollouts = sample_responses(
        student,
        pair.encode(chosen["prompt"]),
        80,  # tokens at most
        pair.end_tokens,
        pair.pad_token,
        samples_per_prompt=8,
        generator=generator_for(0, "sampling", "student", step),
        vocabulary_size=pair.vocabulary_size,
    )
    return rollouts, [answer for answer in chosen["answer"] for _ in range(8)]


rollouts, answers = sample_batch(pair.student, step=0)
rewards = score(rollouts, answers, marked_answer, pair.tokenizer)
print(f"{len(rollouts)} rows, {int(rollouts.mask.sum())} tokens, {rewards.mean():.2f} of them right")
for row in (3, 9, 26, 36):
    print(f"{rewards[row]:.0f} {rollouts.texts(pair.tokenizer)[row]}")

# %% [markdown]
# A `1` in front means that the answer is right. We will not use it: distillation asks the teacher, not the answer.
#
# ## Step 2: the teacher is asked about every token
#
# One forward pass over tokens that already exist; the teacher writes nothing. The logits that belong to the response
# tokens come out as (N, V): N is the number of response tokens of all rows, padding left out.


# %%
def logits_of(model, rollouts):
    """Logits that predict the response tokens, row after row: (N, V)."""
    return project_to_vocabulary(model, response_hidden_states(model, rollouts), pair.vocabulary_size)


tokens = rollouts.responses[rollouts.mask]  # (N,)
with torch.no_grad():
    student_logprobs = token_logprobs(logits_of(pair.student, rollouts), tokens)  # (N,)
    teacher_logprobs = token_logprobs(logits_of(pair.teacher, rollouts), tokens)
print(tokens.shape, student_logprobs.shape, teacher_logprobs.shape)

# %% [markdown]
# ## Step 3: each token gets its own reward
#
# The advantage of a token is what the teacher says to it:
#
# $$A_t=-\big(\log\pi_\theta(y_t)-\log\pi_T(y_t)\big)$$
#
# **Predict.** Row 9 is a response that first answers directly and works the sum out afterwards. Where is its advantage
# far below zero? Can it be far *above* zero at a token that the student wrote?

# %%
advantages = torch.zeros(rollouts.mask.shape)  # (B, T)
advantages[rollouts.mask] = teacher_logprobs - student_logprobs

row, shown = 9, 14
texts = [pair.tokenizer.decode([token]) for token in rollouts.responses[row, :shown].tolist()]
figure, axes = plt.subplots(figsize=(8, 2.6))
axes.bar(range(shown), advantages[row, :shown], color=colors[1])
axes.axhline(0, color="0.4", linewidth=1)
axes.set(xlabel="token of the response", ylabel="advantage (nats)", xticks=range(shown))
axes.set_xticklabels([text.replace(" ", "␣") for text in texts], rotation=45, ha="right")
plt.show()
print(f"largest advantage in the batch {advantages.max():+.1f}, smallest {advantages.min():+.1f}")

# %% [markdown]
# Two tokens carry nearly all of it: the first, with which the response leaves the teacher's way, and `<think>` in the
# middle of an answer, a place where the teacher would hardly begin. With everything else the teacher goes along. And no
# token of the batch has a large advantage: one that the teacher finds much more probable than the student does is one
# that the student hardly ever writes.
#
# ## Step 4: the loss
#
# [04](04_the_gradient_of_reverse_kl.ipynb) showed what to differentiate: not the difference of the log-probabilities but
# −A·log πθ, with A held fixed. `detach()` holds it fixed.

# %%
student_logprobs = token_logprobs(logits_of(pair.student, rollouts), tokens)  # (N,), with gradient this time
advantage = (teacher_logprobs - student_logprobs).detach()
loss = -(advantage * student_logprobs).mean()
print(f"loss {loss.item():.4f}, mean advantage {advantage.mean().item():.3f} nats")

# %% [markdown]
# The value of this loss means nothing; its gradient does. The number to watch is the mean advantage: with its sign
# turned, it is the sampled estimate of the reverse KL per token.
#
# The library writes the loss with the ratio πθ/π_old, which is 1 as long as the student is the one that sampled. Its
# value differs, its gradient must not:

# %%
parameters = list(pair.student.parameters())


def flat_gradient(loss):
    """Gradient by all parameters as one vector; the graph is used up."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])


by_hand = flat_gradient(loss)
student_logprobs = token_logprobs(logits_of(pair.student, rollouts), tokens)
everywhere = torch.ones_like(advantage, dtype=torch.bool)
library_loss = policy_gradient_loss(
    student_logprobs[None], student_logprobs.detach()[None], advantage[None], everywhere[None]
)  # the library takes (B, T); here that is (1, N)
library = flat_gradient(library_loss)
print(f"by hand  loss {loss.item():+.4f}   norm of the gradient {by_hand.norm():.3f}")
print(f"library  loss {library_loss.item():+.4f}   norm of the gradient {library.norm():.3f}")
print(f"relative difference of the gradients below 1e-4: {bool((by_hand - library).norm() < 1e-4 * by_hand.norm())}")

# %% [markdown]
# With all ratios 1 the library's value is the mean of −A, which happens to be the estimate of the reverse KL.
#
# ### Exercise 05.1 · The loss of a batch with padding
#
# *Difficulty 2 of 5 · 10 minutes.* Write the loss for tensors with padding: log-probabilities of student and teacher,
# both (B, T), and the mask. It is a mean over the response tokens of the whole batch. The check differentiates your loss
# by the student's log-probabilities, and compares the gradient.
#
# <details><summary>Hint 1</summary>The student's log-probabilities occur twice: in the advantage, where no gradient may
# flow, and as the factor that is differentiated.</details>
# <details><summary>Hint 2</summary>Select with the mask before you take the mean: <code>values[mask]</code>.</details>


# %%
def distillation_loss(logprobs: torch.Tensor, teacher_logprobs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Reverse KL as policy gradient: (B, T), (B, T), (B, T) bool → scalar to be minimised."""
    ### BEGIN SOLUTION
    advantage = (teacher_logprobs - logprobs).detach()
    return -(advantage * logprobs)[mask].mean()
    ### END SOLUTION


# %%
check("05.1", distillation_loss)

# %% [markdown]
# ## The loop
#
# Now the four steps and the optimiser in one place. The gradient is scaled down if its norm is above 1, the learning
# rate is 1e-4: of those tried in the library's tuning study the best for reverse KL on this pair.
#
# The same loop takes a second loss: the *exact* reverse KL at every position, a sum over the whole vocabulary, which
# needs no advantage because it can be differentiated directly ([03](03_two_kls.ipynb)).


# %%
def sampled_loss(student_logits, teacher_logits, tokens):
    """Policy gradient: the sampled token alone."""
    logprobs = token_logprobs(student_logits, tokens)
    advantage = (token_logprobs(teacher_logits, tokens) - logprobs).detach()
    return -(advantage * logprobs).mean()


def exact_loss(student_logits, teacher_logits, tokens):
    """The whole vocabulary at every position; which token was written does not matter."""
    return reverse_kl_per_token(student_logits, teacher_logits).mean()


def distil(loss_function, steps):
    """Train a fresh student; a row of measurements for each batch, taken before the update."""
    student = load_pair("near").student
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, weight_decay=0.0)
    rows = []
    for step in range(steps):
        rollouts, answers = sample_batch(student, step)  # 1. the student writes
        tokens = rollouts.responses[rollouts.mask]
        with torch.no_grad():
            teacher_logits = logits_of(pair.teacher, rollouts)  # 2. the teacher is asked
        student_logits = logits_of(student, rollouts)
        loss = loss_function(student_logits, teacher_logits, tokens)  # 3. advantages and loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()  # 4. one step
        difference = (token_logprobs(student_logits, tokens) - token_logprobs(teacher_logits, tokens)).detach()
        rewards = score(rollouts, answers, marked_answer, pair.tokenizer)
        rows.append({"step": step, "reward": rewards.mean().item(), "kl_sampled": difference.mean().item()})
    return pd.DataFrame(rows), student


# %% tags=["nbval-ignore-output"]
STEPS = 14
sampled_run, sampled_student = distil(sampled_loss, STEPS)
exact_run, exact_student = distil(exact_loss, STEPS)

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.8), layout="constrained")
for name, run, line, marker in (
    ("sampled tokens", sampled_run, "-", "o"),
    ("exact, whole vocabulary", exact_run, "--", "s"),
):
    left.plot(run["step"], run["kl_sampled"], line, marker=marker, markersize=4, label=name)
    right.plot(run["step"], run["reward"], line, marker=marker, markersize=4)
left.set(xlabel="step", ylabel="reverse KL (nats per token)", ylim=(0, None))
right.set(xlabel="step", ylabel="share of right responses", ylim=(0, 1.03))
left.legend(frameon=False)
plt.show()

# %% [markdown]
# The divergence from the teacher falls, and the share of right responses rises, though neither loss has ever seen an
# answer. Both curves are uneven: each point is 64 responses to 8 prompts, and other prompts each time. Held-out prompts give a
# steadier number:

# %% tags=["nbval-ignore-output"]
for name, student in (("before", pair.student), ("sampled", sampled_student), ("exact", exact_student)):
    result = evaluate(pair, student, temperature=1.0, count=128)
    opened = (result.rollouts.responses[:, 0] == pair.tokenizer.convert_tokens_to_ids("<think>")).float().mean()
    print(
        f"{name:8} sampled accuracy {result.accuracy:.2f}, {result.length:.0f} tokens, "
        f"begins with <think> in {opened:.2f} of its responses"
    )

# %% [markdown]
# What has changed is how a response begins. The student now nearly always works the sum out at once, as its teacher
# does, and hardly ever tries a direct answer first. The two losses go almost the same way. In expectation over the drawn
# token their gradients are equal at each position ([04](04_the_gradient_of_reverse_kl.ipynb)). More than half of the
# advantage sits in the 64 first tokens of a batch, and that is enough here because this student opens both ways often. Both runs also use the same
# prompts and random numbers.
#
# ## What is the loss divided by?
#
# A batch often does not fit into memory at once. So its rows are split into *micro-batches*, the loss of each is
# differentiated by itself, and the gradients add up (gradient accumulation). That the sum comes out right is not a
# matter of course. Four responses, two short and two long, with a loss at each token:

# %%
lengths = torch.tensor([2, 2, 8, 8])
mask = torch.arange(8) < lengths[:, None]  # (4, 8)
per_token = torch.tensor([6.0, 6.0, 1.0, 1.0])[:, None].expand(4, 8)  # the short ones are bad, the long ones good
print(f"mean over all {int(mask.sum())} tokens: {per_token[mask].mean():.2f}")

# %% [markdown]
# **Predict.** Take the mean of each micro-batch over its own tokens, then the mean of these means. What does it give for
# the packings {1, 2} {3, 4}, for {1, 3} {2, 4} and for {1} {2, 3, 4}?

# %%
packings = {
    "{1,2} {3,4}": [[0, 1], [2, 3]],
    "{1,3} {2,4}": [[0, 2], [1, 3]],
    "{1} {2,3,4}": [[0], [1, 2, 3]],
}
for name, packing in packings.items():
    means = [per_token[part][mask[part]].mean() for part in packing]
    print(f"{name}   mean of means {torch.stack(means).mean():.2f}")

# %% [markdown]
# The same batch, the same student, and a loss that depends on how rows were put together. In a mean of means a token of
# a small micro-batch weighs more than one of a large one. Only the second packing comes out right, because its parts
# happen to have equally many tokens.
#
# The remedy is to divide every part by one number that is known before the parts are made: the tokens of the *whole*
# batch. So every loss of the library takes a `normalizer`, and the parts are added, not averaged.

# %% [markdown]
# ### Exercise 05.2 · Micro-batches that add up
#
# *Difficulty 2 of 5 · 10 minutes.* Write a function that takes losses per token and their mask, both (B, T), and the
# micro-batches as a list of row numbers each. It returns a list with one loss for each micro-batch. Their *sum* must be
# the mean over all response tokens of the batch. The check differentiates the losses, too.
#
# <details><summary>Hint 1</summary><code>masked_sum(values, mask, normalizer)</code> adds up what is unmasked and
# divides by the normaliser; without one it divides by the number of unmasked positions of this call.</details>
# <details><summary>Hint 2</summary>Padding is not a token: B × T is too large a number.</details>


# %%
def micro_batch_losses(
    per_token: torch.Tensor, mask: torch.Tensor, micro_batches: list[torch.Tensor]
) -> list[torch.Tensor]:
    """Losses of the micro-batches: (B, T), (B, T) bool, row numbers of each → scalars that add up."""
    ### BEGIN SOLUTION
    normalizer = mask.sum()
    return [masked_sum(per_token[rows], mask[rows], normalizer) for rows in micro_batches]
    ### END SOLUTION


# %%
check("05.2", micro_batch_losses)

# %%
for name, packing in packings.items():
    parts = [masked_sum(per_token[part], mask[part], normalizer=int(mask.sum())) for part in packing]
    print(f"{name}   one normaliser {sum(parts):.2f}")

# %% [markdown]
# ## The same with real gradients
#
# The batch of step 1, once as a whole and once in micro-batches of at most 800 tokens. Prompts and padding count in these 800,
# so fewer of them are response tokens. The library puts rows of similar length together, so that little padding is computed.
#
# **Predict.** How far from the gradient of the whole batch is the accumulated one, as a share of its length: with one
# normaliser, and with a mean of means?


# %%
def accumulated_gradient(own_normalizer):
    """Gradients of the micro-batches, added up; each loss is divided by its own tokens or by those of the batch."""
    total = torch.zeros_like(by_hand)
    for rows in parts:
        part = rollouts.rows(rows)
        logprobs = token_logprobs(logits_of(pair.student, part), part.responses[part.mask])
        advantage = advantages[rows][:, : part.mask.shape[1]][part.mask]
        total += flat_gradient(-(advantage * logprobs).sum() / (len(logprobs) if own_normalizer else len(tokens)))
    return total / len(parts) if own_normalizer else total


parts = split_rows(rollouts, 800)
print("tokens of the micro-batches:", [int(rollouts.rows(rows).mask.sum()) for rows in parts])
for name, own_normalizer in (("one normaliser", False), ("mean of means", True)):
    off = ((accumulated_gradient(own_normalizer) - by_hand).norm() / by_hand.norm()).item()
    print(f"{name}: off by {f'{off:.0%}' if off > 1e-4 else 'less than 0.01 %'}")

# %% [markdown]
# With one normaliser nothing is left but rounding. The mean of means is another gradient, and nobody is told: the loss
# falls, training goes on. Here it makes the micro-batches of short responses heavier than they are, and short responses
# are those that the student answered directly.
#
# ## More than one update from a batch
#
# Sampling is expensive, so a batch is often used several times. After the first update the student is not the one that
# wrote the batch any more. The ratio ρ = πθ(y_t)/π_old(y_t) corrects for that, and a clip takes away the reason to
# drive it far from 1. (It comes from PPO, proximal policy optimisation. The loss is called a *surrogate*, since it stands in for
# the objective that one means.)
#
# $$L_t=-\min\big(\rho A,\ \mathrm{clip}(\rho,\,0.8,\,1.2)\,A\big)$$
#
# **Predict.** On which side of 1 does the gradient vanish for a token with a negative advantage?
#
# The left-hand panel draws the formula. The right-hand panel trains on *one* batch eight times over, with the clip and
# without, and counts the tokens whose ratio has left the range from 0.8 to 1.2.


# %%
def reuse(clip, updates=8):
    """Share of tokens with a ratio outside 0.8–1.2 before each update from one and the same batch."""
    student = load_pair("near").student
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, weight_decay=0.0)
    old = None
    outside = []
    for _ in range(updates):
        logprobs = token_logprobs(logits_of(student, rollouts), tokens)[None]  # (1, N)
        old = logprobs.detach() if old is None else old
        ratio = (logprobs.detach() - old).exp()
        outside.append(((ratio < 0.8) | (ratio > 1.2)).float().mean().item())
        advantage = teacher_logprobs[None] - old
        loss = policy_gradient_loss(
            logprobs, old, advantage, everywhere[None], clip, clip
        )  # the clip below and above 1
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
    return outside


# %% tags=["nbval-ignore-output"]
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.8), layout="constrained")
ratios = torch.linspace(0.5, 1.5, 101)
for sign, line in ((1.0, "-"), (-1.0, "--")):
    one, old = torch.ones(1, 1), torch.zeros(1, 1)
    curve = [policy_gradient_loss(ratio.log().view(1, 1), old, sign * one, one, 0.2, 0.2) for ratio in ratios]
    left.plot(ratios, curve, line, label=f"A = {sign:+.0f}")
left.set(xlabel="ratio ρ = πθ/π_old", ylabel="loss of the token")
left.legend(frameon=False)
for name, clip, line, marker in (("clip 0.2", 0.2, "-", "o"), ("no clip", float("inf"), "--", "s")):
    right.plot(reuse(clip), line, marker=marker, markersize=4, label=name)
right.set(xlabel="updates made from the batch", ylabel="share with ρ outside 0.8–1.2", ylim=(0, None))
right.legend(frameon=False)
plt.show()

# %% [markdown]
# A line that runs flat has no gradient: for A = −1 that is the side below 0.8, for A = +1 the side above 1.2. The clip
# stops only what goes the way the advantage pushes; a token that has moved the wrong way is still pulled back.
#
# On the right, the share of tokens outside the range grows with every update, and here the clip changes little about it.
# It takes away the gradient of the token that has left the range; the other tokens share the same weights and go on
# moving them. And it is a bound on the ratio alone: an advantage of −14 nats passes unchanged. That will matter in the
# next notebook.
#
# Before the first update all ratios are 1 and nothing is clipped. That is why the loop above, with one update for each
# batch, could do without all this; the library's default is one update too.

# %% [markdown]
# ### Exercise 05.3 · The clipped surrogate
#
# *Difficulty 3 of 5 · 10 minutes.* Write the mean of $L_t$ over the unmasked tokens, for log-probabilities of the student
# now and when it sampled. The check differentiates it by the student's log-probabilities now.
#
# <details><summary>Hint 1</summary>The ratio is the <code>exp()</code> of a difference of log-probabilities.</details>
# <details><summary>Hint 2</summary>The smaller of the two products, for either sign of the advantage; then the minus
# sign, because it is a loss.</details>


# %%
def clipped_loss(
    logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """−min(ρA, clip(ρ, 0.8, 1.2)A), mean over unmasked tokens: (B, T) four times → scalar."""
    ### BEGIN SOLUTION
    ratio = (logprobs - old_logprobs).exp()
    smaller = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    return -smaller[mask].mean()
    ### END SOLUTION


# %%
check("05.3", clipped_loss)

# %% [markdown]
# ## The same training by the library
#
# `tgpo_lab.train` runs the loop for every method; reverse KL as policy gradient is called `rkl`. With the same seed it
# draws the same prompts and the same random numbers as our loop. So its numbers should be ours.

# %% tags=["nbval-ignore-output"]
output = Path("../runs/notebooks/05")
shutil.rmtree(output, ignore_errors=True)
config = TrainConfig.preset(
    "tiny",  # settings for these small models; what is not named below is theirs
    "rkl",
    student="near",
    steps=STEPS,
    prompts_per_step=8,
    learning_rate=1e-4,
    evaluate_every=7,
    evaluation_temperature=1.0,
    gradient_terms_every=0,  # do not measure the gradients of a loss's terms apart: there is one term
    output=str(output),
)
result = train(config, show_progress=False)
theirs = result.metrics.set_index("step").loc[: STEPS - 1]
both = sampled_run.set_index("step").join(theirs[["reward", "kl_sampled"]].add_suffix(" (library)"))
print(both.iloc[[0, 1, 2, 7, 13]].round(3).to_string())

# %% [markdown]
# Forty lines by hand and the library's loop give the same run. What the library adds is what a long run needs: it goes
# through large batches in parts, saves, resumes, and measures the same columns for every method. All of them are
# explained in [docs/metrics.md](../docs/metrics.md); these are the ones to look at first.

# %% tags=["nbval-ignore-output"]
plots.plot_runs(
    {"rkl on near": result},
    ["kl_sampled", "rejected", "positive_signal", "length", "entropy", "gradient_norm"],
)

# %% [markdown]
# - *KL sampled*, the mean of log πθ(y_t) − log πT(y_t), falls. It is what the loss is about.
# - *Rejected*, the share of tokens that the teacher finds less probable by more than 4 nats, falls with it. It is small
#   from the start: a few tokens in a hundred.
# - *Positive signal*, the share of tokens that the teacher finds *more* probable than the student does, is above one
#   half.
# - *Length* goes towards the teacher's 48 tokens, *entropy* falls: the student becomes sure of its way.
# - The *gradient norm* jumps about from batch to batch, and falls rather than grows.
#
# This is what a healthy run of reverse KL looks like.

# %% [markdown]
# ## Recap
#
# | equation | in the library |
# |---|---|
# | A_t = −(log πθ(y_t) − log πT(y_t)), detached | `losses.reverse_kl_advantage` |
# | −min(ρA, clip(ρ)A), sum over tokens divided by Z | `losses.policy_gradient_loss(…, normalizer=Z)` |
# | Σ_v πθ(v)(log πθ(v) − log πT(v)) at each position | `losses.reverse_kl` |
# | sample → teacher → loss → step | `training.train`, methods `rkl` and `exact-rkl` |
#
# - The loop is four steps. The student writes, the teacher judges every token, and only log πθ is differentiated.
# - On the near pair it works within a dozen steps, from the sampled token or from the whole distribution.
# - Divide every micro-batch by the tokens of the whole batch, and add. A mean of means is another gradient.
# - The clip bounds the ratio of the policies. It does not bound the advantage.
#
# **Next:** [06 · When reverse KL fails](06_when_reverse_kl_fails.ipynb)
