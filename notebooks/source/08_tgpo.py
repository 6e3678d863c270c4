# %% [markdown]
# # 08 · TGPO
#
# **Goal.** Build teacher-guided policy optimisation term by term, follow one step of it by hand, and run it beside reverse
# KL and GRPO from the same start.
#
# **Minutes.** 2 to run on two cores, 65 to work through.
#
# **Prerequisites.** [06 · When reverse KL fails](06_when_reverse_kl_fails.ipynb) and [07 · GRPO](07_grpo.ipynb).

# %%
import copy
import math
import shutil

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
import torch

from tgpo_lab import TrainConfig, evaluate, load_pair, train
from tgpo_lab.evaluation import pair_prompts
from tgpo_lab.exercises import check
from tgpo_lab.explorer.token_text import visible_text
from tgpo_lab.losses import (
    group_advantages,
    guidance_loss,
    policy_gradient_loss,
    reverse_kl_advantage,
    token_logprobs,
)
from tgpo_lab.models.policy import project_to_vocabulary, response_hidden_states
from tgpo_lab.plots import plot_runs
from tgpo_lab.randomness import generator_for, rows_of_step
from tgpo_lab.reports.sample_rollouts import annotate
from tgpo_lab.sampling.cached_sampling import sample_responses
from tgpo_lab.schedules import LinearDecay
from tgpo_lab.tasks.prompts import load_prompts
from tgpo_lab.tasks.rewards import marked_answer, score
from tgpo_lab.teacher import ask_teacher
from tgpo_lab.widgets import softmax_panel

torch.manual_seed(0)
sns.set_theme(style="ticks", palette="colorblind")
pair = load_pair("far")
THINK = pair.tokenizer.convert_tokens_to_ids("<think>")

# %% [markdown]
# ## The idea
#
# Two signals have failed on the far pair. Reverse KL says "not this" to tokens that the student sampled and never says
# "that instead". The reward of GRPO can only strengthen what was sampled, and the teacher's opening is not.
#
# Teacher-guided policy optimisation (TGPO, [arXiv 2605.13230](https://arxiv.org/abs/2605.13230)) asks the teacher another
# question. At every prefix that the *student* wrote: which token would *you* write here?
#
# $$y_t^T=\arg\max_v \pi_T(v\mid x,y_{<t})\qquad L_G=-\sum_t\log\pi_\theta(y_t^T\mid x,y_{<t})\qquad
# L=L_\text{GRPO}+w_k\,L_G$$
#
# $L_\text{GRPO}$ is the loss of [07](07_grpo.ipynb): advantages (r − mean)/std in each group, clip 0.2, divided by all response
# tokens, no pull to a reference model. The paper writes $L_G$ as a sum over tokens, as above; in this notebook it is the
# *mean* over tokens, as in public code of the method. What hangs on that is at the end.
#
# TGPO joins two known things. One is *DAgger*, from imitation learning: let the learner drive, and let the expert say at
# every place the learner gets to what it would have done there (Ross et al. 2011,
# [arXiv 1011.0686](https://arxiv.org/abs/1011.0686)). The other is reinforcement learning with verifiable rewards. The weight
# $w_k$ falls to zero with the training step k, so that in the end the reward alone decides.

# %% [markdown]
# ## One rollout, term by term
#
# The student writes eight responses to one prompt. We look at the first.

# %%
prompts = pair_prompts(pair, "test")
question, answer = prompts[4]["prompt"], prompts[4]["answer"]
group = sample_responses(
    pair.student, pair.encode([question]), 80, pair.end_tokens, pair.pad_token, samples_per_prompt=8,
    generator=torch.Generator().manual_seed(0), vocabulary_size=pair.vocabulary_size,
)  # fmt: skip
written = group.responses[0, group.mask[0]]  # (|y|,)
print(f"{question} (right: {answer})  the student writes: {group.texts(pair.tokenizer)[0]}")

# %% [markdown]
# **The teacher's tokens.** The response exists, so the teacher need not generate anything: *one* forward pass over prompt
# and response gives its distribution at every prefix at once, and we take the largest entry of each. The shift by one is
# the usual one.
#
# **Predict.** You have seen what this teacher proposes: `<think>` at the opening and at the end. The column to the right is what each
# position costs in $L_G$. What share of it do the two `<think>` have?

# %%
before = pair.encode([question])[0]
sequence = torch.tensor([before + written.tolist()])  # (1, prompt + |y|)
with torch.no_grad():
    teacher_logits = pair.teacher(sequence).logits[0, len(before) - 1 : -1]  # (|y|, V)
    student_logits = pair.student(sequence).logits[0, len(before) - 1 : -1]
proposed = teacher_logits.argmax(-1)  # (|y|,) y_t^T
guidance = -student_logits.log_softmax(-1)[torch.arange(len(written)), proposed]  # (|y|,) one term of L_G each
for t, (own, theirs, value) in enumerate(zip(written, proposed, guidance, strict=True)):
    words = [visible_text(pair.tokenizer, int(token)) for token in (own, theirs)]
    print(f"position {t}: student {words[0]:7} teacher {words[1]:7} −log πθ(teacher's) {abs(value.item()):5.1f} nats")

# %% [markdown]
# The teacher goes along with the student's way where it can: after `the` it proposes `sum`, as the student wrote. It
# differs at three kinds of places: at the opening, at digits, and at the end, where it would not stop but start to think.
# Those two `<think>` cost about 13 nats each and are nearly all of the loss.
#
# **Predict.** Does the teacher *know* something at the digits and at the end? Is its digit the right one more often than the
# student's most probable digit? Does it propose `<think>` after a wrong answer and let a right one end? We count over 2,048
# responses; a digit counts only while all before it are right. `ask_teacher` of the library is the forward pass from above for a
# whole batch. It returns, (B, T) each, `tokens` (the teacher's proposals), `logprobs` (log πT of what the student wrote) and
# `confidence` (log πT of the proposals).

# %%
with torch.no_grad():
    wide = sample_responses(
        pair.student, pair.encode(prompts["prompt"][:256]), 80, pair.end_tokens, pair.pad_token, samples_per_prompt=8,
        generator=torch.Generator().manual_seed(1), vocabulary_size=pair.vocabulary_size,
    )  # fmt: skip
    wide_answers = [answer for answer in prompts["answer"][:256] for _ in range(8)]
    wide_right = score(wide, wide_answers, marked_answer, pair.tokenizer) > 0  # (B,)
    theirs = ask_teacher(pair.teacher, wide, vocabulary_size=pair.vocabulary_size, micro_batch_tokens=4096).tokens
    own = torch.zeros_like(theirs)  # (B, T), the student's most probable token
    own[wide.mask] = project_to_vocabulary(
        pair.student, response_hidden_states(pair.student, wide), pair.vocabulary_size
    ).argmax(-1)
counts = {name: [0, 0, 0] for name in ("first digit", "second digit", "third digit")}  # places, student's, teacher's
stops = {True: [0, 0], False: [0, 0]}  # right answer or not: ends, <think> proposed there
for row, answer_text in enumerate(wide_answers):
    said = [visible_text(pair.tokenizer, token).strip("␣") for token in wide.responses[row, wide.mask[row]].tolist()]
    if wide.finished[row] and "<think>" not in said:
        stops[bool(wide_right[row])][0] += 1
        stops[bool(wide_right[row])][1] += int(theirs[row, len(said) - 1] == THINK)
    start = said.index("#") + 1 if "#" in said else len(said)
    for count, place, digit in zip(counts.values(), range(start, len(said)), answer_text, strict=False):
        right_digit = pair.tokenizer.convert_tokens_to_ids(digit)
        count[0] += 1
        count[1] += int(own[row, place] == right_digit)
        count[2] += int(theirs[row, place] == right_digit)
        if said[place] != digit:
            break  # after a wrong digit none is right
for name, (places, students, teachers) in counts.items():
    print(
        f"{name:12} student's best is right at {students / places:.2f}, teacher's at {teachers / places:.2f} of places"
    )
for correct, (ends, think_again) in stops.items():
    print(
        f"end after a {'right' if correct else 'wrong'} answer: <think> proposed at {think_again / ends:.2f} of places"
    )

# %% [markdown]
# At the digits the teacher guesses as the student does: it adds up column by column and has no columns before it here. And
# it does not judge the answer: it would begin to think after a right one just as after a wrong one. What it knows is how *it*
# goes on from such a place. That is all that guidance teaches, and the two `<think>` are the part of it that is news. Whether both
# help is seen below.
#
# **The loss.** The mean of the column above. The library computes it from logits and tokens.

# %%
asked = ask_teacher(pair.teacher, group, vocabulary_size=pair.vocabulary_size, micro_batch_tokens=4096)
own_mask = torch.ones(1, len(written), dtype=torch.bool)
print("same tokens from the library:", bool((asked.tokens[0, group.mask[0]] == proposed).all()))
print(
    f"L_G by hand {guidance.mean():.3f}   library {guidance_loss(student_logits[None], proposed[None], own_mask):.3f}"
)
print(f"w·L_G with w = 0.02: {0.02 * guidance.mean():.3f}")

# %% [markdown]
# **The mask.** The eight responses differ in length. Positions after an end are not the student's, and the mask leaves
# them out of the sum and out of the count. Nothing else is left out: right responses are guided like wrong ones, and so are
# those that were cut at the token limit.

# %%
with torch.no_grad():
    positions = response_hidden_states(pair.student, group)  # (N, H), unmasked positions alone, row by row
    logits = torch.zeros(*group.mask.shape, pair.vocabulary_size)  # (B, T, V)
    logits[group.mask] = project_to_vocabulary(pair.student, positions, pair.vocabulary_size)
total, count = 0.0, 0
for row, length in enumerate(group.lengths.tolist()):
    for t in range(length):
        total -= logits[row, t].log_softmax(-1)[asked.tokens[row, t]].item()
        count += 1
print("lengths", group.lengths.tolist(), "tokens in all", count, "of", group.mask.numel(), "places")
print(f"L_G of the group by hand {total / count:.4f}   library {guidance_loss(logits, asked.tokens, group.mask):.4f}")

# %% [markdown]
# ### Exercise 08.1 · Guidance from two models' logits
#
# *Difficulty 2 of 5 · 8 minutes.* Write L_G as a function of the logits of both models, each (B, T, V) and aligned (position
# t predicts token t), the tokens that the student sampled, (B, T), and the mask, (B, T). Take the mean over all unmasked
# positions. No gradient may reach the teacher. You may not need every argument. The check differentiates your loss by both
# models' logits.
#
# <details><summary>Hint 1</summary>Which token is taught at a position? It depends on one of the two logits alone.</details>
# <details><summary>Hint 2</summary><code>token_logprobs(logits, tokens)</code> gives (B, T). Sum what the mask lets through, then
# divide once.</details>


# %%
def guidance_from_logits(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """Mean of −log πθ(y_t^T) over unmasked positions, a scalar."""
    ### BEGIN SOLUTION
    losses = -token_logprobs(student_logits, teacher_logits.argmax(-1))  # (B, T)
    return torch.where(mask, losses, 0.0).sum() / mask.sum()
    ### END SOLUTION


# %%
check("08.1", guidance_from_logits)

# %% [markdown]
# ## Which token unlocks the answer?
#
# A proposal is worth something if the student, put after it, gets the answer right. So we try each: keep the student's
# prefix, put the teacher's token in the place of its own, and let the *student* finish greedily.
#
# **Predict.** After which positions will the answer be right?


# %%
def finish(prefix: list[int]) -> str:
    """The student's greedy continuation of a response that begins with these tokens."""
    if prefix[-1] in pair.end_tokens:
        return pair.tokenizer.decode(prefix[:-1])
    rest = sample_responses(pair.student, [before + prefix], 80, pair.end_tokens, pair.pad_token, temperature=0)
    return pair.tokenizer.decode(prefix) + rest.texts(pair.tokenizer)[0]


for t in range(len(written)):
    text = finish([*written[:t].tolist(), int(proposed[t])])
    same = "as written" if written[t] == proposed[t] else visible_text(pair.tokenizer, int(proposed[t]))
    print(f"position {t}: {same:10} → {'right' if marked_answer(text, answer) else 'wrong'}: {text.strip()[:60]}")

# %% [markdown]
# One token at the opening is enough: the skill is there. So is the `<think>` in the place of the end, after a wrong answer:
# both put the student on a way that it knows. A corrected digit alone does not help, because the next one is a guess again.

# %% [markdown]
# ### Exercise 08.2 · Which position unlocks the answer
#
# *Difficulty 2 of 5 · 8 minutes.* Given what the student wrote and what the teacher proposes, (B, T) each, and whether the
# answer is right after the teacher's token at each position, (B, T) bool, return for each response the first position, from
# 0, at which the teacher's token is *another one* and leads to a right answer: (B,) int64, −1 where there is none.
#
# <details><summary>Hint 1</summary>Combine two conditions with <code>&amp;</code>.</details>
# <details><summary>Hint 2</summary><code>argmax</code> of numbers 0 and 1 gives the first 1, and also 0 if there is none.</details>


# %%
def first_unlocking(tokens: torch.Tensor, teacher_tokens: torch.Tensor, right_after: torch.Tensor) -> torch.Tensor:
    """First position whose replacement unlocks the answer, or −1: (B, T) three times → (B,)."""
    ### BEGIN SOLUTION
    found = (tokens != teacher_tokens) & right_after
    return torch.where(found.any(-1), found.int().argmax(-1), -1)
    ### END SOLUTION


# %%
check("08.2", first_unlocking)

# %% [markdown]
# ## A term of its own, not a reward
#
# Could the score log πθ(y_t^T) be added to the reward, and policy gradient do the rest? Policy gradient credits whatever
# reward there is to the token that was *sampled*. Over a vocabulary of five tokens nothing has to be sampled: we enumerate.
# The student writes `the` nine times in ten; the teacher wants `<think>`, which the student gives e⁻¹³. Three pushes on
# the logits:
#
# - **guidance**: minus the gradient of −log πθ(`<think>`);
# - **score as reward**: the expected policy gradient when every sample gets the reward log πθ(`<think>`);
# - **match as reward**: the same with reward 1 if the sample *is* the teacher's token, else 0.
#
# A last line has the score as reward again, for one sample: `the`.
#
# **Predict.** What is the second one?

# %%
words = ["the", "4", "7", "+", "<think>"]
rare = math.exp(-13)
logits = torch.tensor([0.9, 0.05, 0.03, 0.02 - rare, rare], dtype=torch.float64).log().requires_grad_()


def policy_gradient(reward: torch.Tensor) -> torch.Tensor:
    """Σ_v π(v)·r(v)·∇log π(v), every token v with its own reward: (V,) → (V,)."""
    logprobs = logits.log_softmax(-1)
    return torch.autograd.grad((logprobs.detach().exp() * reward * logprobs).sum(), logits)[0]


logprobs = logits.log_softmax(-1)
(pull,) = torch.autograd.grad(logprobs[-1], logits)
pushes = {
    "guidance": pull,
    "score as reward": policy_gradient(logprobs[-1].detach().expand(5)),
    "match as reward": policy_gradient(torch.tensor([0, 0, 0, 0, 1])),
}
sampled = torch.tensor([1.0, 0, 0, 0, 0], dtype=torch.float64)  # `the` was drawn
pushes["… one sample"] = logprobs[-1].detach() * (sampled - logits.softmax(-1).detach())
for name, push in pushes.items():
    values = torch.where(push.abs() < 1e-12, 0.0, push).tolist()  # rounding noise is shown as 0
    print(f"{name:16}", "   ".join(f"{word} {value:+.2g}" for word, value in zip(words, values, strict=True)))

# %% [markdown]
# Guidance raises the logit of `<think>` by one and lowers the rest, however improbable it is. The score as a reward gives
# *nothing* in expectation: it is the same for every sample, and a reward that does not depend on the action teaches none.
# One sample is worse than nothing: `the` gets −13 and is pushed down, in favour of `4`, `7` and `+`; `<think>`, whose score it
# was, hardly moves. The match as a reward points the right way, and is smaller by πθ(`<think>`) = e⁻¹³: that is exploration
# again. So L_G stands beside the surrogate, as a term that is differentiated by itself.
#
# The same position, to play with. (A saved page shows a table in place of the sliders.) **Try.** Make the teacher's token
# rarer and rarer: which update of its logit stays, and which ones go with its probability?

# %% tags=["nbval-ignore-output"]
softmax_panel()

# %% [markdown]
# ## One step, followed by hand
#
# Eight training prompts, eight samples each, and one update of the far student by each of three losses, with the
# optimiser, learning rate and clipping of the training loop.


# %%
training_prompts = pair_prompts(pair, "train")[:8]
batch = sample_responses(
    pair.student, pair.encode(training_prompts["prompt"]), 80, pair.end_tokens, pair.pad_token, samples_per_prompt=8,
    generator=torch.Generator().manual_seed(0), vocabulary_size=pair.vocabulary_size,
)  # fmt: skip
right_answers = [answer for answer in training_prompts["answer"] for _ in range(8)]
rewards = score(batch, right_answers, marked_answer, pair.tokenizer)  # (B,)
print(f"{int(rewards.sum())} of {len(rewards)} responses are right")


# %% [markdown]
# First the loss. Padding is left out at once: the N unmasked positions of all responses stand side by side in one row,
# (1, N), because the library's functions take (B, T) and this way nothing has to be masked.


# %%
def loss_of_step(student, loss_name: str, rollouts, rewards, weight: float) -> torch.Tensor:
    """One of the three losses on a batch that this student has just written, a scalar with gradient."""
    mask = rollouts.mask
    asked = ask_teacher(pair.teacher, rollouts, vocabulary_size=pair.vocabulary_size, micro_batch_tokens=4096)
    tokens, teacher_tokens, teacher_logprobs = (
        values[mask][None] for values in (rollouts.responses, asked.tokens, asked.logprobs)
    )  # (1, N) each
    logits = project_to_vocabulary(student, response_hidden_states(student, rollouts), pair.vocabulary_size)[None]
    logprobs, everywhere = token_logprobs(logits, tokens), torch.ones_like(tokens)
    if loss_name == "RKL":
        advantages = reverse_kl_advantage(logprobs.detach(), teacher_logprobs)
    else:  # the advantage of a response, at each of its tokens
        advantages = group_advantages(rewards, 8)[:, None].expand(mask.shape)[mask][None]
    loss = policy_gradient_loss(logprobs, logprobs.detach(), advantages, everywhere)
    if loss_name == "TGPO":
        loss = loss + weight * guidance_loss(logits, teacher_tokens, everywhere)
    return loss


# %% [markdown]
# Then the update, and what it did to the opening.


# %%
def one_step(loss_name: str, rollouts, rewards, weight: float = 0.02, optimizer: str = "Adam") -> torch.Tensor:
    """Change of log πθ(· | first prompt) by one update, in nats: (V,)."""
    student = copy.deepcopy(pair.student)
    loss_of_step(student, loss_name, rollouts, rewards, weight).backward()
    torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
    if optimizer == "Adam":
        torch.optim.AdamW(student.parameters(), 3e-4, weight_decay=0).step()
    else:
        torch.optim.SGD(student.parameters(), 0.1).step()
    with torch.no_grad():
        first = torch.tensor([rollouts.prompts[0]])
        after, start = (model(first).logits[0, -1].log_softmax(-1) for model in (student, pair.student))
    return after - start


# %% [markdown]
# **Predict.** By how many nats does each loss move log πθ(`<think>`) at the first position of the first prompt? It stands at
# −13.

# %%
changes = {name: one_step(name, batch, rewards) for name in ("RKL", "GRPO", "TGPO")}
digit = pair.tokenizer.convert_tokens_to_ids("9")
figure, axes = plt.subplots(figsize=(6, 2.8))
for shift, hatch, name, index in ((-0.2, "", "<think>", THINK), (0.2, "//", "digit 9", digit)):
    heights = [change[index].item() for change in changes.values()]
    axes.bar([place + shift for place in range(3)], heights, 0.38, hatch=hatch, label=name)
axes.axhline(0, color="0.4", linewidth=1)
axes.set(xlabel="loss", ylabel="change of log πθ at the\nfirst position (nats)", xticks=range(3), xticklabels=changes)
axes.legend(frameon=False, loc="upper left")
plt.show()
for name, change in changes.items():
    print(
        f"{name:4} <think> {change[THINK]:+.2f}   digit 9 {change[digit]:+.2f}   median of all tokens {change.median():+.2f}"
    )

# %% [markdown]
# RKL and GRPO leave the opening where it was, give or take a few hundredths: no sample had it, so nothing in either loss
# names it, and what moves it is what the network shares between tokens. TGPO raises it by about 0.4 nats. It is not a
# well-aimed push: a digit, which the teacher proposes at other positions, rises by as much at this one, because one network
# serves all positions. At that pace thirteen nats take some thirty steps; in the run below it is sooner.

# %% [markdown]
# ## The schedule
#
# The weight is *annealed*, lowered as training goes on: in a straight line down to a floor. The paper's runs from 2·10⁻³ by 10⁻⁵ a
# step to zero at step 200. In the tiny world, where learning rates are 300 times the paper's, the preset begins at 0.02.

# %% [markdown]
# ### Exercise 08.3 · A linear schedule with a floor
#
# *Difficulty 1 of 5 · 3 minutes.* The weight at a step: a straight line from an initial value, so much less with every step, and
# never below a floor.
#
# <details><summary>Hint</summary>A line, and something that stops it from falling further.</details>


# %%
def linear_weight(step: int, initial: float, rate: float, floor: float) -> float:
    """Weight w_k of guidance at step k."""
    ### BEGIN SOLUTION
    return max(initial - rate * step, floor)
    ### END SOLUTION


# %%
check("08.3", linear_weight)

# %% [markdown]
# $w_k=\max(w_\text{init}-\delta k,\,\text{floor})$, at a few steps and as a line:

# %%
paper = LinearDecay(2e-3, 1e-5)
for k in (0, 100, 200, 300):
    print(f"step {k:3}: by hand {max(2e-3 - 1e-5 * k, 0):.4f}   library {paper(k):.4f}")

figure, axes = plt.subplots(figsize=(6, 2.6))
for name, schedule, line in (("paper's", paper, "-"), ("tiny preset", LinearDecay(0.02, 2e-4), "--")):
    axes.plot(range(301), [schedule(k) for k in range(301)], line, linewidth=2, label=name)
axes.set(xlabel="step k", ylabel="weight w_k of guidance")
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# Why end it at all? As long as w > 0 the teacher pulls even where the student has found something better; and its pull does
# not end when the reward is won. The paper reports that reaching zero at step 200 did better than a constant weight and
# than annealing to the end of its 300 steps.
#
# In the runs of this notebook the end is not reached: after forty steps the tiny preset stands at 0.012. The runs of the study
# in [10](10_a_fair_comparison.ipynb) reach zero at step 30 of 45, and a constant weight does about as well there. In the study
# *schedule* ([docs/findings.md](../docs/findings.md)), at another learning rate, a constant weight ended three and a half points
# *ahead* on *far*, in all of ten seeds, and level on *mid*. The paper's advantage of annealing is not seen here.

# %% [markdown]
# ## How much does the size of w matter?
#
# The weight looks like the dial of the method. But Adam divides each parameter's gradient by its own recent size.
#
# **Predict.** One step from the same start with w = 0.002, 0.02 and 0.2: (a) on the groups of the batch that have no right
# response, with Adam; (b) the same with plain gradient descent; (c) on the whole batch, with Adam.

# %%
hopeless = (rewards.view(-1, 8).sum(-1) == 0).repeat_interleave(8).nonzero().squeeze(-1)
silent, no_reward = batch.rows(hopeless), rewards[hopeless]
situations = {
    "(a) no reward, Adam": (silent, no_reward, "Adam"),
    "(b) no reward, plain": (silent, no_reward, "SGD"),
    "(c) some reward, Adam": (batch, rewards, "Adam"),
}
table = pd.DataFrame(
    {
        name: {f"w = {w}": one_step("TGPO", rollouts, given, w, optimizer)[THINK].item() for w in (0.002, 0.02, 0.2)}
        for name, (rollouts, given, optimizer) in situations.items()
    }
)
print(f"{len(silent)} of {len(batch)} responses in groups without reward; change of log πθ(<think>) in nats:")
print(table.round(2).to_string())

# %% [markdown]
# With plain gradient descent the step grows with w, as one would think (not quite tenfold at the end, where the gradient is
# clipped to norm 1). With Adam and no reward it is the same for all three: guidance is all there is, and a loss a hundred times
# smaller makes the same step. Only where the reward speaks too does w decide who is heard: the dial sets a *balance*.
#
# The student of *far* is right three times in a hundred. So (c) is its situation at most steps, where the step with w = 0.02 is
# two to three times that with w = 0.002, and (a) at about one in six ([07](07_grpo.ipynb)). On a student that is never right the size
# of w would hardly matter at first.

# %% [markdown]
# ## Three methods from one start
#
# Forty steps each, one seed. The settings are those of the tiny preset, as in `make demo`, but with 8 prompts a step in place
# of 16. The prompts of a step are the same for all three. The learning rate is 3e-4. It matters: [10](10_a_fair_comparison.ipynb)
# tunes it for every method and takes 6e-4 for TGPO; with 1e-4, the rate of the near pair in
# [05](05_on_policy_distillation.ipynb), TGPO does not leave the floor in these few steps.
#
# **Predict.** The teacher's responses have 48 tokens, the student's 8. Will the length under TGPO go from 8 to 48, stay below,
# or pass it?


# %%
def short_run(method: str):
    """Forty steps on the far pair."""
    output = f"../runs/notebooks/08/{method}"
    shutil.rmtree(output, ignore_errors=True)
    config = TrainConfig.preset(
        "tiny", method, student="far", steps=40, prompts_per_step=8, evaluation_temperature=1.0, measured_positions=256,
        checkpoint_every=40, output=output,
    )  # fmt: skip
    return train(config, show_progress=False)


runs = {"RKL": short_run("rkl"), "GRPO": short_run("grpo"), "TGPO": short_run("tgpo")}

# %% tags=["nbval-ignore-output"]
plot_runs(runs, ("accuracy", "agreement", "length", "weight", "entropy", "truncated"))

# %% tags=["nbval-ignore-output"]
for name, result in runs.items():
    curve = result.metrics.dropna(subset="accuracy").set_index("step")["accuracy"]
    print(f"{name:5} held-out accuracy, sampled:", "  ".join(f"{step}: {value:.2f}" for step, value in curve.items()))

# %% [markdown]
# For some ten steps TGPO looks like the others: `<think>` climbs unseen, at the opening and at the end. Then one is sampled, the
# worked way is right, the reward takes it up, and accuracy, agreement and length rise together. For a while responses are
# *longer* than the teacher's, and at one step nearly half of them are cut at the limit of 80 tokens; we see why in a moment. RKL
# and GRPO stay at a few percent for these forty steps. The weight has fallen by less than half by then. Guidance gets quiet all
# the same, because the student now writes what the teacher proposes.
#
# Two terms were at work. How large is each one's own gradient?

# %% tags=["nbval-ignore-output"]
parts = runs["TGPO"].metrics.dropna(subset="gradient_norm_teacher").set_index("step")
figure, axes = plt.subplots(figsize=(6.5, 2.8))
axes.plot(parts["gradient_norm_reward"], "o-", label="reward term")
axes.plot(parts["gradient_norm_teacher"], "s--", label="w · guidance")
axes.set(xlabel="step", ylabel="norm of the gradient", ylim=(0, None))
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# At the start guidance is as large as the reward's gradient or the only one there is; once right answers come, the reward
# is by far the louder.
#
# ## TGPO in forty lines
#
# Here is all of it once more, without the library's loop. Every choice is in sight: one update a batch, learning rate 3e-4, AdamW
# without weight decay, gradient clipped to norm 1, w from 0.02 down by 0.0002 a step, GRPO with the deviation and divided by
# all tokens. (With more than one update a batch the teacher's tokens would stay, since they belong to the prefixes, and
# log πθ of them would be computed anew; π_old would be the student that sampled.)
#
# The loop has a switch that the library has not: guidance *without* the reward.
#
# **Predict.** What will guidance alone do to the share of right responses, and to their length? Think of what the teacher
# proposes at the end of a terse answer.


# %%
def tgpo_by_hand(steps: int, with_reward: bool = True) -> tuple[pd.DataFrame, list[str]]:
    """TGPO on far, or its guidance alone: a row of measurements for each batch, and the texts of the last one."""
    student = load_pair("far").student
    training = load_prompts(pair.prompts)["train"]
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-4, weight_decay=0.0)
    rows = []
    for step in range(steps):
        chosen = training[rows_of_step(0, step, 8, len(training))]
        rollouts = sample_responses(  # 1. the student writes: 8 prompts × 8 responses, at most 80 tokens
            student, pair.encode(chosen["prompt"]), 80, pair.end_tokens, pair.pad_token, samples_per_prompt=8,
            generator=generator_for(0, "sampling", "student", step), vocabulary_size=pair.vocabulary_size,
        )  # fmt: skip
        answers = [answer for answer in chosen["answer"] for _ in range(8)]
        rewards = score(rollouts, answers, marked_answer, pair.tokenizer)  # 2. right or wrong, (B,)
        rows.append({"reward": rewards.mean().item(), "length": rollouts.lengths.float().mean().item()})
        mask = rollouts.mask  # (B, T)
        with torch.no_grad():  # 3. the teacher's token at every prefix that the student wrote
            hidden = response_hidden_states(pair.teacher, rollouts)
            taught = project_to_vocabulary(pair.teacher, hidden, pair.vocabulary_size).argmax(-1)  # (N,)
        hidden = response_hidden_states(student, rollouts)
        logprobs = project_to_vocabulary(student, hidden, pair.vocabulary_size).log_softmax(-1)  # (N, V)
        every = torch.arange(len(logprobs))
        guidance = -logprobs[every, taught].mean()  # 4. L_G
        groups = rewards.view(-1, 8)
        deviation = groups.std(-1, keepdim=True)
        advantages = torch.where(deviation > 0, (groups - groups.mean(-1, keepdim=True)) / deviation, 0.0).flatten()
        written = logprobs[every, rollouts.responses[mask]]  # (N,)
        ratio = (
            written - written.detach()
        ).exp()  # 1, with the gradient of log πθ; at the first update nothing is clipped
        surrogate = (ratio * advantages[:, None].expand(mask.shape)[mask]).mean()
        loss = max(0.02 - 2e-4 * step, 0.0) * guidance - (surrogate if with_reward else 0.0)  # 5. L
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
    return pd.DataFrame(rows), rollouts.texts(pair.tokenizer)


# %% tags=["nbval-ignore-output"]
by_hand, _ = tgpo_by_hand(22)
alone, written_alone = tgpo_by_hand(22, with_reward=False)
library = runs["TGPO"].metrics.set_index("step")[["reward", "length"]]
columns = {"by hand": by_hand, "library": library, "guidance alone": alone}
beside = pd.concat(columns, axis=1).loc[[0, 1, 2, 5, 8, 11, 14, 17, 19, 21]]
print(beside.round(2).to_string())
print("guidance alone, last batch:", *written_alone[:2], sep="\n   ")

# %% tags=["nbval-ignore-output"]
figure, axes = plt.subplots(1, 2, figsize=(8, 2.8), layout="constrained")
for panel, column, label in zip(axes, ("reward", "length"), ("share of right responses", "tokens"), strict=True):
    panel.plot(by_hand[column], "o-", markersize=4, label="TGPO")
    panel.plot(alone[column], "s--", markersize=4, label="guidance alone")
    panel.set(xlabel="step", ylabel=label, ylim=(0, None))
axes[0].legend(frameon=False)
plt.show()

# %% [markdown]
# By hand and by the library it is the same run. Guidance alone finds the teacher's way as soon, or sooner: the share of right
# responses rises within a dozen steps. Then it falls to nearly nothing, and the responses grow to the limit of 80 tokens. Nothing
# in $L_G$ asks for an end that the teacher would not write. At the end of a terse answer the teacher proposes to begin again; one
# network serves all positions, and soon the student begins again after worked answers too, where the teacher would have ended.
# With the reward, a response that is cut earns nothing while one that ends with the right answer does; that pulls the
# length back. So on this pair guidance opens the door, and it takes the reward to walk through it. (One seed, one learning rate; the
# paper reports nothing about guidance alone.)
#
# It is one seed, and this pair was designed until something like it happened (see the [README](../README.md)). What holds
# over seeds and pairs is in [docs/findings.md](../docs/findings.md) and in [10](10_a_fair_comparison.ipynb).

# %% [markdown]
# ## Before and after
#
# Sampled responses to four test prompts. Where the teacher would have written something else, its proposal stands in
# brackets after the token.


# %%
def show(model) -> None:
    """Print sampled responses with the teacher's proposals."""
    some = prompts[:4]
    for rollout in annotate(pair, model, some["prompt"], some["answer"], max_new_tokens=80, temperature=1.0):
        text = "".join(t.text + (f"[{t.proposal}]" if t.differs else "") for t in rollout.tokens)
        print(f"{rollout.prompt} {'right' if rollout.reward else 'wrong'}: {text}".replace("␣", " "))


show(pair.student)

# %% tags=["nbval-ignore-output"]
show(runs["TGPO"].student)
after = evaluate(pair, runs["TGPO"].student, prompts=prompts.select(range(256)), temperature=1.0)
opened = after.rollouts.responses[:, 0] == THINK  # (B,)
print(f"of {len(opened)} responses {opened.float().mean():.2f} open with <think>, and {after.rewards[opened].mean():.2f} of "
      f"these are right; {after.rewards[~opened].mean():.2f} of the others")  # fmt: skip

# %% [markdown]
# Before: the same disagreements everywhere, at the opening, at digits and at the end. After: every response shown works the sum
# out. But only about a third *open* with `<think>`. The others still begin tersely, give a guess, and then open `<think>` where
# they used to end: that is what the teacher proposed there, and it is why responses were longer. It is the way round that reverse
# KL found in [06](06_when_reverse_kl_fails.ipynb), found several times sooner, and nearly as many of these are right. Guidance taught what
# to do at the prefixes that the student wrote, the odd ones included. [09](09_is_the_teacher_right.ipynb) has a version of TGPO that
# opens with `<think>` nearly always.

# %% [markdown]
# ## What the student's prefixes do
#
# TGPO asks the teacher at prefixes of the *student*. An **ablation** takes one part of a method away to see what it was worth.
# `tgpo-unconditioned` has the same loss, but its tokens are from responses that the *teacher* wrote, as in supervised fine-tuning
# (training on given responses). In each step it learns from as many tokens, drawn at random from those responses, as the student
# has written. What would each teach the student at the start? Here 64 responses of the student and 8 of the teacher:

# %%
from_teacher = sample_responses(
    pair.teacher, pair.encode(training_prompts["prompt"]), 80, pair.end_tokens, pair.pad_token,
    generator=torch.Generator().manual_seed(0), vocabulary_size=pair.vocabulary_size,
)  # fmt: skip
columns = {}
for name, rollouts in (("student's prefixes", batch), ("teacher's responses", from_teacher)):
    student = copy.deepcopy(pair.student)
    asked = ask_teacher(pair.teacher, rollouts, vocabulary_size=pair.vocabulary_size, micro_batch_tokens=4096)
    logits = project_to_vocabulary(student, response_hidden_states(student, rollouts), pair.vocabulary_size)  # (N, V)
    taught = asked.tokens[rollouts.mask]  # (N,)
    losses = -token_logprobs(logits, taught)
    losses.mean().backward()
    columns[name] = {
        "tokens a response": rollouts.lengths.float().mean().item(),
        "share the student would write otherwise": (logits.argmax(-1) != taught).float().mean().item(),
        "L_G a token (nats)": losses.mean().item(),
        "L_G a response (nats)": losses.sum().item() / len(rollouts),
        "gradient norm of L_G": torch.nn.utils.clip_grad_norm_(student.parameters(), math.inf).item(),
    }
conditioning = pd.DataFrame(columns)
print(conditioning.round(2).to_string())

# %% [markdown]
# On the teacher's own responses only *one* token in about fifty is news, the opening; the rest the student knows already. A
# mean over tokens makes that one token small: its gradient is a tenth as long as the other one. On the student's prefixes more than one token in three is news: the opening, and also
# what to do after a wrong start, which no response of the teacher ever shows. That second part is what plain imitation
# lacks, and what DAgger is for. Whether it makes a better student is another question: over the ten seeds of
# [10](10_a_fair_comparison.ipynb) TGPO leaves the floor sooner, this ablation is at 80 % sooner, and after the run no difference is shown. (The ablation is
# an addition of this course; the paper has none that isolates the prefixes.)

# %% [markdown]
# ## An open point: sum or mean
#
# The paper writes $L_G$ as a sum over tokens; public code of the method divides by the number of tokens, as GRPO does.
# `TGPO(guidance_sum=True)` is the sum over a response, averaged over responses. The two differ by the mean length.
#
# **Predict.** Length goes from 8 to about 50 tokens while w falls. Which way does w·(weight of one response) go?

# %% tags=["nbval-ignore-output"]
measured = runs["TGPO"].metrics.dropna(subset="weight")
figure, axes = plt.subplots(figsize=(6.5, 2.8))
axes.plot(measured["step"], measured["weight"], "-", linewidth=2, label="mean over tokens: w")
axes.plot(measured["step"], measured["weight"] * measured["length"], "--", label="sum: the same run's w × mean length")
axes.set(xlabel="step", ylabel="weight of the mean of L_G", yscale="log")
axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()

# %% [markdown]
# With the sum the guidance of this run would have begun eight times as heavy and *grown* while its schedule fell, because
# responses got longer. With the mean, w means the same for every length. The library's default is the mean. For the paper's
# numbers it matters which one is meant: on responses of thousands of tokens the two differ by a factor of thousands.

# %% [markdown]
# ## Recap
#
# | equation | in the library |
# |---|---|
# | y_t^T = argmax_v πT(v \| x, y_<t) | `teacher.ask_teacher(…).tokens`, one forward pass |
# | L_G = −Σ_t log πθ(y_t^T) / N | `losses.guidance_loss`; a sum with `TGPO(guidance_sum=True)` |
# | L = L_GRPO + w_k·L_G | `methods/tgpo.py`, `make_method("tgpo")` |
# | w_k = max(w_init − δk, floor) | `schedules.LinearDecay` |
#
# What a run needs, for *far*: advantages (r − mean)/std, mean over all tokens, one update a batch, clip 0.2, no reference
# model; w from 0.02 by 0.0002 a step; AdamW without weight decay, gradient norm at most 1, learning rate 3e-4 to 6e-4; 8 prompts ×
# 8 samples at temperature 1, at most 80 tokens.
#
# - Guidance names another token than the sampled one, so it cannot be a reward; it is a term of its own.
# - One step of it moved the opening by tenths of a nat where reverse KL and GRPO moved it by hundredths.
# - With Adam and no reward, the size of w hardly changes the first step. It sets the balance once the reward speaks.
# - In one run of forty steps TGPO learned *far* and the other two stayed at a few percent. One seed shows that it happens,
#   not how often.
# - In that same seed guidance without the reward rose and then ran into the token limit. The two terms need each other here.
# - All of it rests on one premise: at a prefix that the student wrote and the teacher would not have written, the teacher's
#   token is *good*. Here it was. Nothing above says that it must be.
#
# **Next:** [09 · Is the teacher right where the student goes?](09_is_the_teacher_right.ipynb)
