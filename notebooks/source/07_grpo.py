# %% [markdown]
# # 07 · GRPO
#
# **Goal.** Build the loss of GRPO by hand from four written rollouts, and find out why a reward alone does not lead the
# far student to the teacher's way.
#
# **Minutes.** 1 to run on two cores, 50 to work through.
#
# **Prerequisites.** [02 · A task, a teacher, a student](02_a_task_a_teacher_a_student.ipynb) for the pairs and the
# reward, [04 · The gradient of reverse KL](04_the_gradient_of_reverse_kl.ipynb) for the score function,
# [05 · On-policy distillation](05_on_policy_distillation.ipynb) for the clip.

# %%
import math
import shutil

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
import torch

from tgpo_lab import TrainConfig, evaluate, load_pair, make_method, train
from tgpo_lab.evaluation import pair_prompts
from tgpo_lab.exercises import check
from tgpo_lab.losses import group_advantages, policy_gradient_loss
from tgpo_lab.models.policy import project_to_vocabulary, response_hidden_states
from tgpo_lab.plots import plot_runs
from tgpo_lab.tasks.rewards import marked_answer
from tgpo_lab.tiny_world.arithmetic import worked_text

torch.manual_seed(0)
sns.set_theme(style="ticks", palette="colorblind")
far = load_pair("far")

# %% [markdown]
# ## Four rollouts by hand
#
# So far the teacher gave the signal. Group relative policy optimisation (GRPO) uses none: the student writes G responses
# to one prompt, a *group*; each gets a verifiable reward; and each is judged against the mean of its own group. Before
# any training, here is a group of G = 4 that we have written ourselves: two terse and two worked responses, one right and
# one wrong of each.

# %%
prompt, answer = "21+34+12=", "67"
responses = {
    "terse, right": " the sum is #67",
    "terse, wrong": " the sum is #76",
    "worked, right": worked_text((21, 34, 12)),
    "worked, wrong": worked_text((21, 34, 12)).replace("#67", "#66"),
}
print(responses["worked, right"])

# %% [markdown]
# **Reward.** 1 if what stands after the last `#` is the answer, else 0. By hand it is one line; the library's
# `tasks.rewards.marked_answer` adds that it must be one plain integer.

# %%
rewards = torch.tensor([float(text.rpartition("#")[2] == answer) for text in responses.values()])  # (B,), B = G = 4
print("by hand", rewards.tolist())
print("library", [marked_answer(text, answer) for text in responses.values()])

# %% [markdown]
# **Advantage.** A sample's reward minus the mean of its group, divided by the group's standard deviation (with G − 1 in
# its denominator). Here the mean is ½, the squared differences are ¼ four times, so the deviation is √(1/3) ≈ 0.577 and
# the advantages are ±0.5/0.577.

# %%
advantages = (rewards - rewards.mean()) / rewards.std()  # (B,)
print("by hand", [round(value, 3) for value in advantages.tolist()])
print("library", [round(value, 3) for value in group_advantages(rewards, group_size=4).tolist()])

# %% [markdown]
# **Log-probabilities.** One forward pass of the student over prompt and response; the logits at a position predict the
# token after it, so they are shifted by one against the tokens ([01](01_policies_and_tokens.ipynb)).


# %%
def response_logprobs(text: str) -> torch.Tensor:
    """log πθ of each token of a response to the prompt, the end token included: (|y|,)."""
    before = far.encode([prompt])[0]
    written = far.encode([text])[0] + [far.tokenizer.eos_token_id]
    logits = far.student(torch.tensor([before + written])).logits[0]  # (prompt + |y|, V)
    logprobs = logits[len(before) - 1 : -1].log_softmax(-1)  # (|y|, V)
    return logprobs[torch.arange(len(written)), written]


logprobs = [response_logprobs(text).detach() for text in responses.values()]
lengths = torch.tensor([len(values) for values in logprobs])  # |y_i|
for name, values in zip(responses, logprobs, strict=True):
    print(f"{name:14} {len(values):3} tokens   log πθ(y|x) {values.sum():6.1f} nats   first token {values[0]:6.1f}")

# %% [markdown]
# The right worked response is improbable for one reason: its first token, `<think>`. Keep that number in mind. (The wrong one
# loses ten more nats at its wrong digit.)
#
# **Loss.** With $\rho_{i,t} = \pi_\theta(y_{i,t})/\pi_\text{old}(y_{i,t})$, where π_old is the student as it was when it
# sampled, and $Z = \sum_i |y_i|$, the number of response tokens:
#
# $$L_\text{GRPO} = -\frac1Z\sum_i\sum_t \min\big(\rho_{i,t}A_i,\;\mathrm{clip}(\rho_{i,t},\,0.8,\,1.2)\,A_i\big)$$
#
# Every token of a response carries the advantage of the whole response. The minimum is that of
# [05](05_on_policy_distillation.ipynb); at the first update π_old *is* πθ, every ρ is 1 and nothing is clipped. (GRPO as it was first
# published also has a KL term towards a reference model, the student before training, kept frozen. Here, as in the paper about TGPO, there is none.)
#
# **Predict.** What is the value of the loss then, and does that value say anything?

# %%
total = sum(int(n) for n in lengths)  # Z
by_hand = -sum(int(n) * float(a) for n, a in zip(lengths, advantages, strict=True)) / total

padded = torch.nn.utils.rnn.pad_sequence(logprobs, batch_first=True)  # (B, T)
mask = torch.arange(padded.shape[1]) < lengths.unsqueeze(-1)  # (B, T)
per_token = advantages.unsqueeze(-1).expand(padded.shape)  # (B, T)
current = padded.clone().requires_grad_()
loss = policy_gradient_loss(current, padded, per_token, mask)
(gradient,) = torch.autograd.grad(loss, current)
print(f"Z = {total} tokens")
print(f"loss by hand {abs(by_hand):.3f}, library {abs(loss.item()):.3f}")
print(f"pull on a token by hand: ±{advantages[0] / total:.5f}")
print("pull on the first token of each response, library:", [round(-g, 5) for g in gradient[:, 0].tolist()])

# %% [markdown]
# The value is zero because right and wrong responses are equally long here, and it stays a matter of lengths as long as
# ρ = 1: it says nothing. What counts is the gradient, and it is simple: descent pushes every token of a right response up
# by A/Z and every token of a wrong one down by as much. The one digit in which the two worked responses differ is pushed no
# harder than the forty tokens before it; but those stand in both, and there the two pushes cancel.

# %% [markdown]
# ### Exercise 07.1 · Group advantages
#
# *Difficulty 2 of 5 · 8 minutes.* Write the function for a whole batch: rewards (B,) of groups of G rows each, rows of one
# prompt together, to advantages (B,). A group whose rewards are all equal gets zeros.
#
# <details><summary>Hint 1</summary><code>rewards.view(-1, group_size)</code> has one group in each row; keep the dimension
# when you take the mean.</details>
# <details><summary>Hint 2</summary>Where all rewards of a group are equal the deviation is 0. Choose what to divide by with
# <code>torch.where</code>, or put zeros in the place of what is not a number.</details>


# %%
def advantages_of_groups(rewards: torch.Tensor, group_size: int) -> torch.Tensor:
    """(r − mean)/std within each group: (B,) → (B,)."""
    ### BEGIN SOLUTION
    groups = rewards.view(-1, group_size)
    centred = groups - groups.mean(-1, keepdim=True)
    deviation = groups.std(-1, keepdim=True)
    return torch.where(deviation > 0, centred / deviation.clamp(min=1e-6), 0.0).flatten()
    ### END SOLUTION


# %%
check("07.1", advantages_of_groups)

# %% [markdown]
# ## Groups without variance
#
# **Predict.** Four groups of eight: none right, one right, seven right, all right. What are the advantages in each?

# %%
for right in (0, 1, 7, 8):
    group = torch.tensor([1.0] * right + [0.0] * (8 - right))
    values = group_advantages(group, 8)
    shown = {"right": values[:right], "wrong": values[right:]}
    texts = [f"each {name} sample {part[0]:+.2f}" for name, part in shown.items() if len(part)]
    print(f"{right} of 8 right: {', '.join(texts)}")

# %% [markdown]
# Where all rewards are equal, nothing is better than the mean: every
# advantage is zero, and so is the gradient. Such a group costs sampling time and teaches nothing. A single right sample
# among eight, on the other hand, is pushed seven times as hard as each of the wrong ones.

# %% [markdown]
# ## The clipped ratio
#
# The clip is that of [05](05_on_policy_distillation.ipynb): where a batch is used for more than one update, the surrogate stops
# rewarding a move once it has gone far enough. *Clip-higher* (of DAPO, [arXiv 2503.14476](https://arxiv.org/abs/2503.14476)) sets the
# upper bound a little higher, 0.28 in place of 0.2, so that an improbable token may grow a little further in one batch.
#
# **Predict.** You know the four corners (A > 0 or A < 0, ρ large or small) from 05. In which of them does clip-higher change the
# gradient?

# %%
ratio = torch.linspace(0.4, 1.8, 281)
figure, axes = plt.subplots(1, 2, figsize=(8, 2.8), sharex=True, sharey=True)
for panel, advantage in zip(axes, (1.0, -1.0), strict=True):
    for high, line in ((0.2, "-"), (0.28, "--")):
        clipped = ratio.clamp(0.8, 1 + high)
        panel.plot(ratio, torch.minimum(ratio * advantage, clipped * advantage), line, label=f"clip 0.8 to {1 + high}")
    panel.axvline(1, color="0.7", linewidth=1)
    panel.set(xlabel="ratio ρ = πθ/π_old", title=f"A = {advantage:+.0f}".replace("-", "−"))
axes[0].set_ylabel("surrogate of one token")
axes[0].legend(frameon=False)
plt.show()

# %% [markdown]
# In one, at the upper right of the left-hand panel. Flat means no gradient: a token that is wanted and has already grown, or one
# that is not wanted and has already shrunk.
# The other two corners stay steep: a token that has moved the *wrong* way is always pulled back. That is what the minimum
# is for; clipping alone would let go of those as well.

# %% [markdown]
# ### Exercise 07.2 · Which tokens have stopped
#
# *Difficulty 2 of 5 · 6 minutes.* Without autograd: which tokens get no gradient from the clipped surrogate? Log-probabilities
# now and at sampling and the advantages are (B, T) each; low and high are the clip's two widths. Return (B, T) bool, True where the
# gradient is zero.
#
# <details><summary>Hint 1</summary>Read it off the two panels: one flat piece in each.</details>
# <details><summary>Hint 2</summary>And what if the advantage is zero, as in a group without variance?</details>


# %%
def stopped(
    logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor, low: float, high: float
) -> torch.Tensor:
    """Tokens without gradient: (B, T) three times → (B, T) bool."""
    ### BEGIN SOLUTION
    ratio = (logprobs - old_logprobs).exp()
    grown = (advantages > 0) & (ratio > 1 + high)
    shrunk = (advantages < 0) & (ratio < 1 - low)
    return grown | shrunk | (advantages == 0)
    ### END SOLUTION


# %%
check("07.2", stopped)

# %% [markdown]
# ## What to divide by
#
# GRPO here divides by Z, the tokens of the whole batch. It was first written with a mean over each response, then over
# responses; a third way divides by B times the token limit. The three differ in how hard they push *one token*:
#
# | divide by | push on a token of response i |
# |---|---|
# | Z, all tokens | A_i / Z |
# | own length, then B responses | A_i / (B·\|y_i\|) |
# | B × token limit | A_i / (B·limit) |
#
# **Predict.** Under the mean over each response, which of our four responses is favoured, and which is let off?

# %%
limit = 80
pushes = {
    "all tokens Z": advantages / lengths.sum(),
    "own length": advantages / (4 * lengths),
    "token limit": advantages / (4 * limit),
}
figure, axes = plt.subplots(figsize=(7, 2.9))
places = torch.arange(4)
for shift, hatch, (name, push) in zip((-0.27, 0, 0.27), ("", "//", ".."), pushes.items(), strict=True):
    axes.bar(places + shift, 1000 * push, 0.27, hatch=hatch, label=name)
axes.axhline(0, color="0.4", linewidth=1)
axes.set(xlabel="response", ylabel="push on one token (1/1000)", xticks=places,
         xticklabels=[f"{name}\n{n} tokens" for name, n in zip(responses, lengths.tolist(), strict=True)])  # fmt: skip
axes.legend(frameon=False, title="divided by")
plt.show()

# %% [markdown]
# Divided by its own length, a short right response is pushed up several times harder per token than a long right one, and a
# short wrong one is pushed down as hard. So a long *wrong* response is let off: being long makes being wrong cheap. Dividing by one number for all treats tokens
# alike. Of the two that do, Z depends on what the other samples of the batch happened to write, and the token limit
# does not.
#
# These choices go by many names. In the library they are the options of one method, and `grpo++` is a preset of them:

# %%
plain, plus = make_method("grpo"), make_method("grpo++")
for option in ("clip_low", "clip_high", "normalize_std", "normalizer", "drop_uniform_groups"):
    print(f"{option:20} grpo {getattr(plain, option)!s:8} grpo++ {getattr(plus, option)!s}")

# %% [markdown]
# `normalize_std=False` leaves the division by the group's deviation out. (With it, the rare response of a group is lifted: the
# deviation is 0.35 with one of eight right, and 0.53 with four of eight.) `drop_uniform_groups` leaves groups without variance out of the normaliser too.

# %% [markdown]
# ## Sparse reward on far
#
# Now the student itself: 512 prompts that it was not trained on, 8 samples each.
#
# **Predict.** The far student is right in about 3 of 100 samples. In how many of 100 groups do the rewards differ at all?
# If all prompts were equally hard, with accuracy p, the number of right samples in a group would be binomial, and a group
# would be informative with the chance $1-(1-p)^8-p^8$.

# %%
group_size = 8
pairs = {name: load_pair(name) for name in ("near", "mid", "far")}
sampled = {name: evaluate(pair, temperature=1.0, samples_per_prompt=group_size) for name, pair in pairs.items()}
figure, axes = plt.subplots(1, 2, figsize=(8.5, 2.9))
for panel, name in zip(axes, ("far", "near"), strict=True):
    result = sampled[name]
    right = result.rewards.view(-1, group_size).sum(-1).long()  # (prompts,)
    share = torch.bincount(right, minlength=group_size + 1) / len(right)
    p = result.accuracy
    binomial = [math.comb(group_size, k) * p**k * (1 - p) ** (group_size - k) for k in range(group_size + 1)]
    panel.bar(range(group_size + 1), share, color="C0", label="measured")
    panel.plot(range(group_size + 1), binomial, "D--", color="C1", label=f"binomial, p = {p:.2f}")
    panel.set(xlabel="right samples in a group of 8", ylabel="share of groups", title=name)
    panel.legend(frameon=False)
    mixed = ((right > 0) & (right < group_size)).float().mean()
    print(f"{name}: accuracy {p:.2f}, informative groups measured {mixed:.2f}, "
          f"expected {1 - (1 - p) ** group_size - p**group_size:.2f}")  # fmt: skip
plt.tight_layout()
plt.show()

# %% [markdown]
# On *far* about one group in five says anything, and then almost always by one lucky sample. On *near* it is four in
# five. The measured bars stand close to the binomial ones: in this world the prompts of a pair are about equally hard.
# Where prompts differ, fewer groups are informative than the mean accuracy suggests, because some are always solved
# and others never; the next exercise counts them right.

# %% [markdown]
# ### Exercise 07.3 · Expected number of informative groups
#
# *Difficulty 1 of 5 · 5 minutes.* Given the accuracy of each prompt, (prompts,), and one group of G samples for each, how
# many groups are expected to have rewards that are not all equal? Return a scalar tensor.
#
# <details><summary>Hint 1</summary>A group is uninformative in two ways. Both have a chance that is a power.</details>
# <details><summary>Hint 2</summary>Expectations add up, whatever the prompts have to do with each other.</details>


# %%
def informative_groups(accuracies: torch.Tensor, group_size: int) -> torch.Tensor:
    """Expected number of groups with unequal rewards: (prompts,) → scalar."""
    ### BEGIN SOLUTION
    return (1 - accuracies**group_size - (1 - accuracies) ** group_size).sum()
    ### END SOLUTION


# %%
check("07.3", informative_groups)

# %% [markdown]
# ## Will it find the teacher's way?
#
# A reward can only strengthen what was sampled. The far student *can* work a sum out: after a forced `<think>` it is
# right every time ([02](02_a_task_a_teacher_a_student.ipynb)). So how long until it samples one? A student may write
# `<think>` at any place of its response, so we sum its probability over all places of the responses that we have: their
# mean is the expected number of `<think>` in one response, and needs no waiting for one.
#
# **Predict.** On *far* the opening has about −13 nats at each of 8 places. How many responses until the first? At 64
# responses a step, how many steps?


# %%
@torch.no_grad()
def expected_openings(name: str) -> tuple[float, float, int]:
    """Mean log πθ(<think>) at the first place, expected number of <think> in a response, number counted in all."""
    pair, rollouts = pairs[name], sampled[name].rollouts
    think = pair.tokenizer.convert_tokens_to_ids("<think>")
    counted = int((rollouts.responses == think).sum())
    some = rollouts.rows(torch.arange(0, len(rollouts), group_size))  # one response to each prompt
    logits = project_to_vocabulary(pair.student, response_hidden_states(pair.student, some))  # (N, V)
    logprobs = logits.log_softmax(-1)[:, think]  # (N,)
    first = some.mask.nonzero()[:, 1] == 0
    return logprobs[first].mean().item(), logprobs.exp().sum().item() / len(some), counted


openings = {name: expected_openings(name) for name in pairs}
for name, (first, count, counted) in openings.items():
    responses_needed, expected = float(f"{1 / count:.2g}"), count * len(sampled[name].rollouts)
    print(f"{name:4} first place {first:5.1f} nats   one <think> in {responses_needed:>9,.1f} responses   "
          f"in our 4,096: expected {expected:9,.2f}, counted {counted:,}")  # fmt: skip

opened = (sampled["near"].rollouts.responses == pairs["near"].tokenizer.convert_tokens_to_ids("<think>")).any(-1)
for name, some in (("with", opened), ("without", ~opened)):
    print(f"near, {name} a <think>: accuracy {sampled['near'].rewards[some].mean():.2f}")

# %%
steps = torch.logspace(0, 4.5, 200)
figure, axes = plt.subplots(figsize=(6.5, 2.8))
for (name, (_, count, _)), line in zip(openings.items(), ("-", "--", "-."), strict=True):
    axes.plot(steps, 1 - torch.exp(-count * 64 * steps), line, linewidth=2, label=name)
axes.set(xlabel="steps of 64 responses", ylabel="chance of a <think> so far", xscale="log", ylim=(-0.03, 1.03))
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# On *near* the opening is in most responses, and it decides: with it nearly all are right, without it few. On *mid* one is
# expected every 16 steps or so: rare, but a right response among seven wrong ones is pushed hard. On *far* it takes
# hundreds of steps until the *first*: four nats cost a factor of e⁴ ≈ 55. (The curves take the student as it is at the
# start; training changes it meanwhile, as we see next.)
#
# Here −13 nats were set by design ([README](../README.md) says how). The rule is general: what matters is not whether
# the student can do it, but whether it does it by chance before patience ends.

# %% [markdown]
# ## What GRPO does learn
#
# Sixty steps on *far* and fifteen on *near*, 8 prompts × 8 samples a step, one seed. The reward is all they get.
#
# **Predict.** How many of the sixty steps on *far* have a gradient of exactly zero? A step has 8 groups.


# %%
def short_run(name: str, steps: int):
    """A short run of GRPO."""
    output = f"../runs/notebooks/07/{name}"
    shutil.rmtree(output, ignore_errors=True)
    config = TrainConfig.preset(
        "tiny", "grpo", student=name, steps=steps, prompts_per_step=8, measured_positions=256, evaluate_every=0,
        gradient_terms_every=0, checkpoint_every=steps, output=output,
    )  # fmt: skip
    return train(config, show_progress=False)


runs = {"GRPO on far": short_run("far", 60), "GRPO on near": short_run("near", 15)}
p = sampled["far"].accuracy
print(f"expected at the start: {60 * ((1 - p) ** 8 + p**8) ** 8:.0f} of 60 steps without gradient on far")

# %% tags=["nbval-ignore-output"]
for name, result in runs.items():
    norms = result.metrics["gradient_norm"].dropna()
    print(f"{name}: {(norms == 0).sum()} of {len(norms)} steps without gradient")
plot_runs(runs, ("reward", "entropy", "length"))

# %% [markdown]
# On *near* the reward starts high and rises within a few steps, and so does the length: the worked responses are the right
# ones, and the student soon works nearly every sum out. On *far* the reward stays near the floor, some of the steps have no
# gradient at all (a count like that varies by about three by chance, and a student that is sharper has fewer mixed groups), and
# the length stays at 8 tokens: no response was ever worked out. But the entropy falls.
#
# **Predict.** Where did that entropy go? Look at how many of the 8 responses to a prompt are different from each other.

# %% tags=["nbval-ignore-output"]
prompts = pair_prompts(far, "test")
think = far.tokenizer.convert_tokens_to_ids("<think>")


@torch.no_grad()
def look_at(student) -> dict[str, float]:
    """What a student does on the test prompts, sampled and greedily."""
    result = evaluate(far, student, temperature=1.0, samples_per_prompt=8)
    texts = result.rollouts.texts(far.tokenizer)
    groups = [set(texts[start : start + 8]) for start in range(0, len(texts), 8)]
    first = [student(torch.tensor([ids])).logits[0, -1].log_softmax(-1)[think].item()
             for ids in far.encode(prompts["prompt"][:64])]  # fmt: skip
    return {
        "sampled accuracy": result.accuracy,
        "greedy accuracy": evaluate(far, student).accuracy,
        "pass@8": result.pass_at_k(8, 8),
        "different responses of 8": sum(len(group) for group in groups) / len(groups),
        "log πθ(<think>), nats": sum(first) / len(first),
    }


table = pd.DataFrame({"before": look_at(far.student), "after": look_at(runs["GRPO on far"].student)})
print(table.round(3).to_string())

# %% [markdown]
# GRPO has *sharpened* the terse way: the student writes fewer different answers to a prompt than before. That moves the
# sampled accuracy by about one point of a hundred; nearly all answers are still wrong. Greedy accuracy *fell* in the run
# stored here, to about a third: what was rewarded is single lucky samples, and the most probable answer is now another one, more
# often wrong. Pass@8 did not rise either. And the log-probability of `<think>` is about where it was: no sample had it, so no
# reward could be credited to it.
#
# This is one seed and sixty steps. What many seeds say is in [docs/findings.md](../docs/findings.md) and in
# [10](10_a_fair_comparison.ipynb).

# %% [markdown]
# ## Recap
#
# | equation | in the library |
# |---|---|
# | r_i | `tasks.rewards.marked_answer`, for rollouts `tasks.rewards.score` |
# | A_i = (r_i − mean)/std within a group | `losses.group_advantages` |
# | −1/Z Σ min(ρA, clip(ρ)A) | `losses.policy_gradient_loss`, as a method `methods/grpo.py` |
# | GRPO++ : clip-higher, no std, token limit, uniform groups dropped | `make_method("grpo++")` |
#
# - A group whose rewards are equal has zero gradient. On *far* that is nearly four groups in five.
# - The minimum in the surrogate lets go of tokens that have moved far enough the right way, never of others.
# - A mean over each response favours short right responses and lets long wrong ones off.
# - Reward strengthens what was sampled. At −13 nats the teacher's opening is not sampled, and GRPO sharpened the guesses.
#
# **Next:** [08 · TGPO](08_tgpo.ipynb)
