# %% [markdown]
# # 06 · When reverse KL fails
#
# **Goal.** See, token by token, what reverse-KL distillation says to a student that is far from its teacher; why that
# does not bring it there; and what happens when one trains all the same.
#
# **Minutes.** 2 to run on two cores, 65 to work through.
#
# **Prerequisites.** [05](05_on_policy_distillation.ipynb) for the loop and its advantage,
# [04](04_the_gradient_of_reverse_kl.ipynb) for the score function, [02](02_a_task_a_teacher_a_student.ipynb) for the pairs.

# %%
import math
import shutil
from collections import Counter
from pathlib import Path

import matplotlib.pyplot as plt
import seaborn as sns
import torch

from tgpo_lab import TrainConfig, evaluate, load_pair, plots, train
from tgpo_lab.checkpoints import checkpoint_folders
from tgpo_lab.diagnostics.gradient_signal import signal_moments
from tgpo_lab.diagnostics.premise import continue_from
from tgpo_lab.exercises import check
from tgpo_lab.explorer.token_text import visible_text
from tgpo_lab.losses import token_logprobs
from tgpo_lab.models.pairs import load_model
from tgpo_lab.models.policy import project_to_vocabulary, response_hidden_states
from tgpo_lab.reports.sample_rollouts import annotate
from tgpo_lab.sampling.cached_sampling import sample_responses
from tgpo_lab.tasks.prompts import load_prompts

sns.set_theme(style="ticks", palette="colorblind")
colors = sns.color_palette("colorblind")
NAMES = ("near", "far", "far-fragile")
LOOK = {"near": ("-", "o"), "far": ("--", "s"), "far-fragile": (":", "^")}  # second channel beside colour
RUNS = Path("../runs/notebooks/06")

# %% [markdown]
# ## The far pair
#
# Three pairs with the same task. *near* is the pair of [05](05_on_policy_distillation.ipynb). The student of *far* has
# the same skill but not the habit: it answers at once. *far-fragile* has that same student and another teacher; we come
# to it at the end. Two numbers of each student: how often a sampled response is right, and how often it is right if we
# write `<think>` for it, the token with which all the teachers open.

# %%
pairs = {name: load_pair(name) for name in NAMES}
tokenizer, end_token, size = pairs["far"].tokenizer, pairs["far"].end_tokens[0], pairs["far"].vocabulary_size
think = tokenizer.convert_tokens_to_ids("<think>")
prompts = load_prompts(pairs["far"].prompts)["test"].select(range(64))
encoded = pairs["far"].encode(prompts["prompt"])
for name in ("near", "far"):
    pair = pairs[name]
    accuracy = evaluate(pair, temperature=1.0, count=128).accuracy
    opened = [[think]] * len(encoded)
    forced = continue_from(
        pair, pair.student, encoded, opened, prompts["answer"], max_new_tokens=80, reward="marked_answer"
    )
    print(f"{name:5} sampled accuracy {accuracy:.2f}, with <think> written for it {sum(forced) / len(forced):.2f}")

# %% [markdown]
# The student of *far* can do it. It only has to begin.
#
# **Predict.** You put this pair into the loop of 05. By how many nats is the first token of a response rejected, and by how many
# the last one? Which token would have to be praised so that the student begins as its teacher does?
#
# ## What the teacher says to each token
#
# 256 responses of each student, and the advantage of every token, log πT(y_t) − log πθ(y_t). (The paper calls it the token's
# reward. *Reward* is kept here for right and wrong answers.) Below −4 nats we call a token *rejected*, as the library does: the
# teacher gives it less than a fiftieth of the student's probability.


# %%
@torch.no_grad()
def logits_of(model, rollouts):
    """Logits that predict the response tokens: (N, V)."""
    return project_to_vocabulary(model, response_hidden_states(model, rollouts), size)


rollouts, student_logits, teacher_logits, tokens, place, advantage = {}, {}, {}, {}, {}, {}
for name, pair in pairs.items():
    rollouts[name] = sample_responses(
        pair.student,
        encoded,
        80,
        pair.end_tokens,
        pair.pad_token,
        samples_per_prompt=4,
        generator=torch.Generator().manual_seed(0),
        vocabulary_size=size,
    )
    student_logits[name] = logits_of(pair.student, rollouts[name])  # (N, V)
    teacher_logits[name] = logits_of(pair.teacher, rollouts[name])
    tokens[name] = rollouts[name].responses[rollouts[name].mask]  # (N,)
    place[name] = rollouts[name].mask.nonzero()[:, 1]  # (N,) place of each token in its response, from 0
    advantage[name] = token_logprobs(teacher_logits[name], tokens[name]) - token_logprobs(
        student_logits[name], tokens[name]
    )

# %%
figure, axes = plt.subplots(figsize=(7, 3))
bins = torch.arange(-18, 5.5, 0.5)
for (name, color), hatch in zip((("near", colors[0]), ("far", colors[1])), ("", "//"), strict=True):
    share = torch.full_like(advantage[name], 1 / len(advantage[name]))
    axes.hist(
        advantage[name], bins, weights=share, histtype="stepfilled", alpha=0.45, color=color, hatch=hatch, label=name
    )
axes.axvline(-4, color="0.3", linestyle=":")
axes.set(xlabel="advantage of the token, log πT − log πθ (nats)", ylabel="share of tokens", yscale="log")
axes.legend(frameon=False, loc="upper center")
plt.show()
for name in ("near", "far"):
    r = advantage[name]
    print(
        f"{name:5} mean {r.mean():+.2f} nats, within ±1 nat {(r.abs() < 1).float().mean():.2f}, "
        f"rejected {(r < -4).float().mean():.2f}, above +4 {(r > 4).float().mean():.2f}, largest {r.max():+.1f}"
    )

# %% [markdown]
# Most tokens lie in the middle: both agree, and the advantage is about 0. On *far* every fourth token is rejected, by up to
# 16 nats. And the right-hand side is empty on both pairs: no token gets more than +2.
#
# That is not an accident of the sample. An advantage of +10 needs a token to which the student gives e¹⁰ times less than the
# teacher does, at most 0.00005, and then the student hardly ever writes it. What the student does write can be punished
# without limit.

# %% [markdown]
# ## Which tokens are rejected
#
# A response of *far* has eight tokens or so: `the sum is #`, two or three digits and the end. The first and the last are rejected
# in every response, as [02](02_a_task_a_teacher_a_student.ipynb) showed.
#
# **Predict.** Is a wrong *digit* rejected, too, and how often? And what would the teacher have written at the end?

# %%
rejected = advantage["far"] < -4
counts = Counter(visible_text(tokenizer, token) for token in tokens["far"][rejected].tolist())
for text, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:4]:
    same = [visible_text(tokenizer, token) == text for token in tokens["far"].tolist()]
    print(
        f"{text:6} rejected {count:3} times, mean advantage {advantage['far'][torch.tensor(same) & rejected].mean():+.1f}"
    )

# %% [markdown]
# The first and the last: "you should not have begun like this" and "you should not stop here". Digits come far behind.
#
# Here is one response, token by token. `annotate` of the library samples it and asks the teacher, who also has a
# *proposal* at each place: the token that it would write there. Where it differs from what was written, it stands above
# the bar, after an arrow.

# %%
(shown,) = annotate(
    pairs["far"], pairs["far"].student, prompts["prompt"][:1], prompts["answer"][:1], max_new_tokens=80, temperature=1.0
)
print(f"{shown.prompt} the right answer is {shown.answer}")
figure, axes = plt.subplots(figsize=(8, 3))
axes.bar(range(len(shown.tokens)), [-token.difference for token in shown.tokens], color=colors[1])
for index, token in enumerate(shown.tokens):
    if token.differs:
        axes.text(index, 0.6, f"→ {token.proposal}", ha="center", fontsize=11)
axes.axhline(0, color="0.4", linewidth=1)
axes.set(
    xlabel="token that the student wrote", ylabel="advantage (nats)", ylim=(-17, 3), xticks=range(len(shown.tokens))
)
axes.set_xticklabels([token.text for token in shown.tokens])
plt.show()

# %% [markdown]
# The teacher knows what it wants: `<think>` at the beginning, and once more at the end, where the student stops. But the
# proposals are not in the advantage. The bars are all that reverse KL learns from, and they stand under tokens that the
# student wrote. To hear something good about `<think>`, it must first write `<think>`.
#
# ## How long until it does?
#
# **Predict.** log πθ(`<think>`) is about −1.5 at the beginning of a response of *near* and −13 on *far*. A batch has 64
# responses. How many batches is that?

# %% [markdown]
# ### Exercise 06.1 · How long until a token is drawn
#
# *Difficulty 1 of 5 · 5 minutes.* Write a function of a token's log-probability in nats and of a number of samples n. It
# returns the expected number of samples up to and including the first with that token, and the probability of having
# drawn it at least once in n samples.
#
# <details><summary>Hint</summary>"Not once in n" is easier than "at least once".</details>


# %%
def waiting(logprob: float, samples: int) -> tuple[float, float]:
    """Expected samples until the token is drawn, and the chance of at least one in ``samples``."""
    ### BEGIN SOLUTION
    probability = math.exp(logprob)
    return 1 / probability, 1 - (1 - probability) ** samples
    ### END SOLUTION


# %%
check("06.1", waiting)

# %% [markdown]
# For the two openings, with the chance as a function of the number of responses:

# %%
opening = {
    name: student_logits[name].log_softmax(-1)[place[name] == 0, think].mean().item() for name in ("near", "far")
}
samples = torch.logspace(0, 7, 141, dtype=torch.float64)
figure, axes = plt.subplots(figsize=(7, 2.8))
for name, logprob in opening.items():
    seen = -torch.expm1(samples * math.log1p(-math.exp(logprob)))  # 1 − (1 − p)^n
    axes.plot(samples, seen, LOOK[name][0], label=f"{name}: log πθ(<think>) = {logprob:.1f}")
    waited = math.exp(-logprob)
    print(f"{name:5} one response in {float(f'{waited:.2g}'):,.0f}; expected in a batch of 64: {64 / waited:.2g}")
for number, text in ((64, "one batch"), (64 * 45, "45 batches")):
    axes.axvline(number, color="0.6", linewidth=1)
    axes.text(number * 1.15, 0.45, text, color="0.3", fontsize=9)
axes.set(xlabel="responses sampled", ylabel="chance of at least one\nthat begins with <think>", xscale="log")
axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
plt.show()

# %% [markdown]
# On *far* that is one in about 7,000 batches, if only the first place counts. A response has eight places, and at others
# `<think>` is about as probable, so the chance that it stands *anywhere* is about eight times as large. Even so no run of this
# notebook has more than 112 batches.
#
# Theory, so let us count: 8,192 responses of *far*, `<think>` anywhere in them.

# %%
many = sample_responses(
    pairs["far"].student,
    encoded,
    80,
    [end_token],
    pairs["far"].pad_token,
    samples_per_prompt=128,
    generator=torch.Generator().manual_seed(1),
    vocabulary_size=size,
)
found = int(((many.responses == think) & many.mask).any(-1).sum())
expected = student_logits["far"].log_softmax(-1)[:, think].exp().sum().item() / len(rollouts["far"]) * len(many)
near_found = int(((rollouts["near"].responses == think) & rollouts["near"].mask).any(-1).sum())
print(f"far:  {found} of {len(many):,} responses hold a <think>; expected {expected:.2f}")
print(f"near: {near_found} of {len(rollouts['near'])} responses hold one")

# %% [markdown]
# ## Large in nats, small in the gradient
#
# Advantages of −14 sound like a strong signal. Two things have to be told apart: the advantage, and the gradient that it makes.
#
# The **advantage** has a simple bound. Where the student gives a token at least δ and the teacher at most ε,
#
# $$\Big|\log\frac{\pi_\theta}{\pi_T}\Big|\ \ge\ \log\frac{\delta}{\epsilon},$$
#
# and nothing stops ε from being smaller still, and the bound from growing. Take δ = 0.01 and ε = 10⁻⁶:

# %%
delta, epsilon = 0.01, 1e-6
print(f"bound: {math.log(delta / epsilon):.1f} nats")
for name in NAMES:
    own = token_logprobs(student_logits[name], tokens[name]).exp()
    theirs = token_logprobs(teacher_logits[name], tokens[name]).exp()
    inside = advantage[name][(own >= delta) & (theirs <= epsilon)].abs()
    print(
        f"{name:11} {len(inside) / len(own):.3f} of the tokens in that corner, their |advantage| from {inside.min():.1f} to "
        f"{inside.max():.1f} nats"
    )

# %% [markdown]
# The **gradient** of a sampled token is its advantage, r_v here, times the score function. For the logits of a position that is
# r_v·(e_v − π): e_v is one at the token v and zero elsewhere, π is the student's distribution. Its mean square,
# ‖r_v·(e_v − π)‖² averaged over v ~ πθ, is the **second moment**: every token of the vocabulary has a part in it, its probability
# times its square.
#
# **Predict.** The student of *far* writes `the` with probability 0.999998. How long is the vector e_v − π then?

# %%
start = int((place["far"] == 0).nonzero()[0])  # first token of the first response
student = student_logits["far"][start].double().log_softmax(-1)  # (V,)
log_ratio = teacher_logits["far"][start].double().log_softmax(-1) - student  # r_v
policy = student.exp()
one_hot = torch.eye(size, dtype=torch.float64)
for token in (int(tokens["far"][start]), think):
    length = (one_hot[token] - policy).norm().item()  # ‖e_v − π‖
    gradient = abs(log_ratio[token].item()) * length
    print(
        f"{visible_text(tokenizer, token):8} πθ {policy[token]:.6f}   advantage {log_ratio[token]:+.1f}   "
        f"‖e_v − π‖ {length:.1e}   gradient if drawn {gradient:.2g}   "
        f"part of the second moment {policy[token] * gradient**2:.0e}"
    )

# %% [markdown]
# The rejected token gets an advantage of −14 and next to no gradient: a softmax that is certain does not move. The vector
# e_v − π is a few millionths long. And the token that would get a large gradient
# is not drawn.
#
# In [04](04_the_gradient_of_reverse_kl.ipynb) the rejected token was loud. The difference: there the student was undecided between
# four rejected tokens, here it is certain of one.
#
# Adam divides its steps by the root of a running mean of squared gradients. The paper ([arXiv 2605.13230](https://arxiv.org/abs/2605.13230)) argues that where teacher and student are far
# apart the second moment grows without bound, and that training breaks down for it. At the opening of *far* it is small, and
# nearly all of it is `<think>`, which a batch does not see.

# %% [markdown]
# ### Exercise 06.2 · The second moment
#
# *Difficulty 3 of 5 · 10 minutes.* Write the second moment of every position,
# $\sum_v\pi_\theta(v)\,r_v^2\,\lVert e_v-\pi_\theta\rVert^2$ with $r_v=\log\pi_T(v)-\log\pi_\theta(v)$, from logits.
#
# <details><summary>Hint 1</summary>‖e_v − π‖² = 1 − 2π(v) + Σ_u π(u)²: multiply it out.</details>
# <details><summary>Hint 2</summary>The last sum is one number for each position, so keep its dimension.</details>


# %%
def second_moment(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """E over v ~ πθ of ‖r_v(e_v − πθ)‖²: (N, V) twice → (N,)."""
    ### BEGIN SOLUTION
    student, teacher = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    policy = student.exp()
    score_norm = 1 - 2 * policy + policy.square().sum(-1, keepdim=True)
    return (policy * (teacher - student).square() * score_norm).sum(-1)
    ### END SOLUTION


# %%
check("06.2", second_moment)

# %% [markdown]
# `signal_moments` of the library goes through the whole vocabulary for it, and for the *variance*, which is the second moment
# minus the squared length of the mean: the part that comes from the draw of v. It also has two other signals to compare with.
# One is the mean itself, the exact gradient. The other is *guidance*, the gradient e − π of log πθ at the teacher's token,
# which [08](08_tgpo.ipynb) adds to the loss.

# %%
moments = {name: signal_moments(student_logits[name], teacher_logits[name]) for name in NAMES}
for name in NAMES:
    values = moments[name]
    print(
        f"{name:11} second moment {values['policy_gradient_second_moment'].mean():5.2g}   "
        f"variance {values['policy_gradient_variance'].mean():5.2g}   (nats², mean over positions)"
    )
values = moments["near"]["policy_gradient_second_moment"]
print(f"of near's second moment, {values[place['near'] < 8].sum() / values.sum():.2f} is in the first eight places")

figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3), layout="constrained")
for name in NAMES:
    at = [moments[name]["policy_gradient_second_moment"][place[name] == step].mean().item() for step in range(8)]
    left.plot(range(8), at, LOOK[name][0], marker=LOOK[name][1], label=name)
for key, text, line, marker in (
    ("exact_squared_norm", "exact reverse KL", "-", "o"),
    ("guidance_squared_norm", "guidance: e − π of the teacher's token", "--", "s"),
):
    at = [moments["far"][key][place["far"] == step].mean().item() for step in range(8)]
    at = [value if value > 1e-11 else math.nan for value in at]  # a zero has no place on a logarithmic axis
    right.plot(range(8), at, line, marker=marker, label=text)
left.set(xlabel="place in the response", ylabel="second moment (nats²)", yscale="log")
left.legend(frameon=False, title="sampled reverse KL")
right.set(xlabel="place in the response", ylabel="squared norm (nats²)", yscale="log", ylim=(1e-11, 1e7))
right.legend(frameon=False, title="on far", loc="upper left", alignment="left")
plt.show()

# %% [markdown]
# Look at places 0 and 7 of *far* on the left, the two that are always rejected: the second moment is below a thousandth.
# On the right, the squared length of the exact gradient there is below 10⁻⁷, in a place where that of guidance is 2, nearly the
# most that is possible. (Where both agree guidance has nothing to say;
# those points are missing.)
#
# Averaged over positions, the signal of *far* is not the larger one. *near* has more, nearly all of it in the first eight
# places: there its student is of two minds, a rejected token is not a certain one, and a rejection moves something. What
# the teacher rejects on *far*, the student is sure of. The pair with the strong and noisy signal is *far-fragile*: more
# than ten times *near*, nearly all of it variance, and all of it at the digits.
#
# ## Train all the same
#
# 45 steps of `rkl` on *far* and a dozen on *near*, with the same settings.
#
# **Predict.** For *far*: does accuracy rise, does the gradient norm go to zero or does it explode, and what becomes of
# length and entropy?


# %%
def configuration(name, steps, seed=0):
    """Settings of a short run; its folder is made anew."""
    output = RUNS / name
    shutil.rmtree(output, ignore_errors=True)
    return TrainConfig.preset(
        "tiny",
        "rkl",
        student=name,
        steps=steps,
        prompts_per_step=8,
        evaluate_every=6 if name == "near" else 15,
        evaluation_prompts=64,
        evaluation_temperature=1.0,
        measured_positions=256,  # exact divergences of a step are measured at so many positions
        gradient_terms_every=0,
        checkpoint_every=10,
        keep_checkpoints=0,  # all of them
        seed=seed,
        output=str(output),
    )


# %% tags=["nbval-ignore-output"]
far_config = configuration("far", steps=45)
runs = {
    "near": train(configuration("near", steps=12), show_progress=False),
    "far": train(far_config, show_progress=False),
}
plots.plot_runs(runs, ["accuracy", "kl_sampled", "rejected", "length", "entropy", "gradient_norm"])

# %% [markdown]
# *near* is done after a few steps. On *far* nothing happens that one could see: a few responses in a hundred are right,
# the divergence stays near 3.7 nats a token, every fourth token is rejected, responses keep their eight tokens, entropy
# sinks a little. The gradient norm is neither zero nor exploding: it begins where that of *near* begins and goes up and down
# around it, while *near*'s falls as *near* learns. The digits make it, the only places where this student is unsure (left panel of
# the figure before the training).


# %%
def show_responses(model) -> None:
    """Print sampled responses to four prompts, with the same random numbers each time."""
    written = sample_responses(
        model, encoded[:4], 80, [end_token], pairs["far"].pad_token,
        generator=torch.Generator().manual_seed(2), vocabulary_size=size,
    )  # fmt: skip
    for prompt, answer, text in zip(prompts["prompt"], prompts["answer"], written.texts(tokenizer), strict=False):
        print(f"   {prompt}{answer:4} {text}")


print("before")
show_responses(pairs["far"].student)

# %% tags=["nbval-ignore-output"]
print("after 45 steps")
show_responses(runs["far"].student)

# %% [markdown]
# **Beside the paper.** The paper reports that reverse KL is stable on a pair of one family (Qwen2.5-Math-7B teaching
# Qwen2.5-Math-1.5B) and *collapses* on a pair of two families (Qwen3-30B-A3B teaching Qwen2.5-Math-7B): the reward falls,
# the gradient norm spikes, responses grow to the token limit. What you see here on *far* is not that. Reverse KL
# *stalls*: the student stays what it was. The two have in common that the student does not get to the teacher's way, and
# that the teacher rejects what is sampled while its own way is not.
#
# ## Go on: what is a stall made of?
#
# 45 steps are what the library's tuning study gives each method. The run can go on from its last checkpoint. While it does,
# we watch a number that is in no loss: log πθ(`<think>`), at the beginning of a response and at its end, where the
# student writes `<eos>`. The prefixes are terse responses of the student before training, the same ones throughout.
#
# **Predict.** `<think>` is never sampled. Does its log-probability move?

# %% tags=["nbval-ignore-output"]
runs["far"] = train(far_config.with_changes(steps=100), resume=True, show_progress=False)

terse = rollouts["far"].rows(torch.arange(0, 256, 4))  # one response for each prompt
ends = terse.responses[terse.mask] == end_token
starts = terse.mask.nonzero()[:, 1] == 0
steps, at_start, at_end, others = [], [], [], []
for folder in checkpoint_folders(RUNS / "far" / "checkpoints"):
    logprobs = logits_of(load_model(folder, torch.float32, "cpu"), terse).log_softmax(-1)
    steps.append(int(folder.name.removeprefix("step-")))
    at_start.append(logprobs[starts, think].mean().item())
    at_end.append(logprobs[ends, think].mean().item())
    others.append(logprobs[ends].median().item())
theirs = logits_of(pairs["far"].teacher, terse).log_softmax(-1)[ends, think].median()
print(f"log πT(<think>) at the end, of the teacher: {theirs:.1f} (median)")
for step in (80, 100):
    now = steps.index(step)
    moved = [values[now] - values[0] for values in (at_end, at_start, others)]
    print(f"gained by step {step:3}: <think> at the end {moved[0]:.1f} nats, at the beginning {moved[1]:.1f}, "
          f"median token at the end {moved[2]:.1f}")  # fmt: skip

metrics = runs["far"].metrics
figure, (left, middle, right) = plt.subplots(1, 3, figsize=(10, 3), layout="constrained")
left.plot(steps, at_end, "--", marker="s", markersize=4, color=colors[1], label="<think> at the end")
left.plot(steps, at_start, "-", marker="o", markersize=4, color=colors[0], label="<think> at the beginning")
left.plot(steps, others, ":", marker="^", markersize=4, color=colors[2], label="median token at the end")
left.set(xlabel="step", ylabel="log πθ (nats)")
figure.legend(frameon=False, loc="outside upper center", ncols=3)
middle.plot(metrics["step"], metrics["length"])
middle.set(xlabel="step", ylabel="length (tokens)", ylim=(0, 82))
right.plot(metrics["step"], metrics["reward"])
right.set(xlabel="step", ylabel="share of right responses", ylim=(0, 1.03))
plt.show()

# %% tags=["nbval-ignore-output"]
best = student_logits["far"].log_softmax(-1)[tokens["far"] == end_token].mean(0).topk(3)
print("most probable at the end, before training:")
for value, token in zip(best.values.tolist(), best.indices.tolist(), strict=True):
    print(f"   {visible_text(tokenizer, token):8} {value:5.1f}")
print("responses after 100 steps:")
show_responses(runs["far"].student)

# %% [markdown]
# It moves, slowly. "Not `<eos>`" lowers the logit of `<eos>`, so all other tokens gain, even the median one: that is more than
# half of what `<think>` has gained by step 80. The rest is its own. Logits are pushed up in proportion to probabilities, so the
# runner-up gains most, and here the runner-up behind `<eos>` *is* `<think>`, by several nats: these pairs were built so that the
# unused words together get e⁻³ of its probability. Step
# after step it gains without having been sampled, until, after eighty or ninety steps, the lengths show the first ones. For them the
# teacher has a *positive* advantage of several nats at last, and within ten steps it is a habit. Responses jump from 8 tokens
# to nearly the limit of 80, because the student opens again and again, and the share of right ones begins to rise.
#
# The student has found a way around: it still answers first, wrongly, and then works the sum out. At the beginning of a
# response log πθ(`<think>`) has gained two nats in all this time, of thirteen. (Why the beginning is so much slower does not
# follow from what stands above: it starts from the same −13 nats and is rejected as strongly. All positions share the weights,
# and the arithmetic of one position's logits does not say what a step does to another's. We leave it open.)
#
# So be exact about the failure. On this pair reverse KL is not stuck for ever. (Not shown: when this was written, three seeds
# left the stall between steps 80 and 95, and seed 0 was right on four of five held-out prompts after 120.) It is *slow*, because what
# it can teach is proportional to what the student does already, and it goes to whatever token is the runner-up. Were that
# another word, the same arithmetic would go to that word.

# %% [markdown]
# ## A teacher that is lost
#
# *far-fragile*: the same student, and a teacher that was trained on clean text alone. On its own text it is as good as
# the other. On a prefix that the student wrote it has never been. Its rejections are larger, and it rejects nearly
# everything, the second token of a response too, once the first was not its own.

# %%
for name in ("far", "far-fragile"):
    proposals = [
        Counter(teacher_logits[name][place[name] == step].argmax(-1).tolist()).most_common(1)[0][0] for step in range(4)
    ]
    print(
        f"{name:11} rejected {(advantage[name] < -4).float().mean():.2f}, mean advantage {advantage[name].mean():+.1f}; "
        f"proposals at places 0 to 3: {' '.join(visible_text(tokenizer, token) for token in proposals)}"
    )

# %% [markdown]
# **Predict.** What does reverse KL make of a student whose teacher says "no" to everything, and where it proposes
# something, proposes nonsense?

# %% tags=["nbval-ignore-output"]
fragile_config = configuration("far-fragile", steps=112, seed=2).with_changes(checkpoint_every=4)
runs["far-fragile"] = train(fragile_config, show_progress=False)
plots.plot_runs(
    {"far": runs["far"], "far-fragile": runs["far-fragile"]},
    ["reward", "kl_sampled", "agreement", "length", "truncated", "gradient_norm"],
)

# %% tags=["nbval-ignore-output"]
for step in (76, 112):
    print(f"after {step} steps")
    show_responses(load_model(RUNS / "far-fragile" / "checkpoints" / f"step-{step:06d}", torch.float32, "cpu"))

# %% [markdown]
# This is the textbook failure, and in length it looks like what the paper reports; the gradient norm rises to about four times
# what it was. Read it in order. After a long stall the student comes upon `<think>`, around step 77: agreement rises, the
# divergence falls. Then it loses it again, and in between the gradient norm is at its highest. In the end responses grow to the
# limit and none is right. And look at *agreement*: it goes up a second time, the divergence comes down again, and the gradient
# norm is *small*. The student has found prefixes that the teacher has never seen, and on which it calls likely what the student
# writes. The loss is being minimised.
#
# **One seed of three.** This one is shown because it collapses. The others are not shown: when this was written, seed 0 escaped, by way
# of `<think>` at the very beginning, and was right on 0.84 of 64 held-out prompts after 150 steps; seed 1 had not moved after 140.
# Three seeds, three ends, and nothing differs between them but which prompts and tokens were drawn. (On another processor
# rounding may send this run to another of these ends.)

# %% [markdown]
# ## Why an advantage cannot say "that instead"
#
# The first position of *far* once more. By how much does each signal raise the logit of `<think>`?

# %%
the = int(tokens["far"][start])
sampled = log_ratio[the] * (one_hot[the] - policy)  # (V,) what a batch gives: the drawn token
mean = policy * (log_ratio - (policy * log_ratio).sum())  # its mean over all tokens, the exact gradient turned round
guided = one_hot[think] - policy  # gradient of log πθ of the teacher's token
for name, direction in (("advantage of the sampled token", sampled), ("exact reverse KL", mean), ("guidance", guided)):
    print(f"{name:30} {direction[think]:.1g}")
print(f"{'πθ(<think>), for comparison':30} {policy[think]:.1g}")

# %% [markdown]
# An advantage, whatever its value, is multiplied by e_v − π of the token v that was *written*. It can make that token more
# or less probable. All the others move together, each in proportion to its own probability: "not this, and do more of
# whatever else you do". The exact sum over the vocabulary does not change that, it is an average of such terms. The
# teacher's proposal is known at every one of these places, in the same forward pass, and it is thrown away.
#
# There are two ways on. One is a reward, which is about the answer instead of the tokens: [07](07_grpo.ipynb) tries it,
# and meets the same opening that is not sampled. The other is to tell the student the token: [08](08_tgpo.ipynb).

# %% [markdown]
# ## Recap
#
# | equation | in the library |
# |---|---|
# | log πT(y_t) − log πθ(y_t), the advantage of a token | `losses.reverse_kl_advantage`; `rejected` in `docs/metrics.md` |
# | \|log πθ/πT\| ≥ log(δ/ε) in the rejection regime | `largest_rejection` of `diagnostics.gradient_signal.signal_moments` |
# | Σ_v πθ(v)·r_v²·‖e_v − πθ‖² | `policy_gradient_second_moment` of `diagnostics.gradient_signal.signal_moments` |
# | one response with what the teacher says to it | `reports.sample_rollouts.annotate` |
#
# - Sampled tokens can be rejected without limit and hardly ever praised: what deserves praise is not sampled.
# - On *far* the opening that would do it comes once in several hundred thousand responses. Reverse KL stalls there; it
#   does not collapse. It leaves the stall late, by way of the runner-up behind a rejected token.
# - Where the student is certain, even an advantage of −14 nats makes next to no gradient.
# - On *far-fragile* the signal is more than ten times stronger and nearly all variance. Of three seeds one collapsed.
# - An advantage moves the token that was written. It cannot name another one.
#
# **Next:** [07 · GRPO](07_grpo.ipynb)
