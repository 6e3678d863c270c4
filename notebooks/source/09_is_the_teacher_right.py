# %% [markdown]
# # 09 · Is the teacher right where the student goes?
#
# **Goal.** Measure the premise of teacher guidance, see what TGPO makes of a teacher that breaks it, and repair it
# with a trust horizon.
#
# **Minutes.** 2 to run on two cores, 75 to work through.
#
# **Prerequisites.** [08 · TGPO](08_tgpo.ipynb); the pairs and the reward of [02](02_a_task_a_teacher_a_student.ipynb).

# %%
import math
import shutil
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
import torch

from tgpo_lab import TrainConfig, evaluate, load_pair, measure_pair, train
from tgpo_lab.checkpoints import checkpoint_folders
from tgpo_lab.diagnostics.premise import premise_by_depth
from tgpo_lab.evaluation import pair_prompts
from tgpo_lab.exercises import check
from tgpo_lab.explorer.token_text import visible_text
from tgpo_lab.guidance import confidence_gate, teacher_doubt, trust_horizon_gate, trust_horizon_weights
from tgpo_lab.losses import entropy
from tgpo_lab.models.pairs import load_model
from tgpo_lab.plots import plot_runs
from tgpo_lab.sampling.cached_sampling import sample_responses
from tgpo_lab.studies.results import load_results
from tgpo_lab.tasks.rewards import marked_answer
from tgpo_lab.teacher import ask_teacher

torch.manual_seed(0)
sns.set_theme(style="ticks", palette="colorblind")
far, fragile = load_pair("far"), load_pair("far-fragile")
tokenizer = far.tokenizer
THINK = tokenizer.convert_tokens_to_ids("<think>")
RUNS = Path("../runs/notebooks/09")

# %% [markdown]
# ## What everything so far rests on
#
# Guidance asks the teacher for its next token at every prefix of a response, and the *student* wrote the prefix. In
# [08](08_tgpo.ipynb) that went well: after a wrong answer in the student's style the teacher opened `<think>` and
# saved it. But a language model is at its best on text like that which it was trained on. A prefix that it would
# write itself once in a million times is not such text. Nothing in the loss asks whether the teacher knows what to
# do there.
#
# So we measure it. Cut the student's response after k tokens, let the teacher go on from there to the end, and
# judge the whole as one response. The share that is right is the teacher's **reliability** at depth k. Three times
# by hand, at depth 4, with the pair *far*:

# %%
prompts = pair_prompts(far, "test").select(range(64))
sampled = evaluate(far, prompts=prompts, temperature=1.0)  # the student of far; far-fragile has the same one
rollouts = sampled.rollouts


def goes_on(pair, depth: int) -> tuple[list[str], list[str], list[bool], list[str]]:
    """Prefixes of ``depth`` tokens, the teacher's greedy continuations, whether they ended, and the right answers."""
    rows = [row for row, length in enumerate(rollouts.lengths.tolist()) if length > depth]
    prefixes = [rollouts.responses[row, :depth].tolist() for row in rows]
    starts = [rollouts.prompts[row] + prefix for row, prefix in zip(rows, prefixes, strict=True)]
    rest = sample_responses(pair.teacher, starts, 80, pair.end_tokens, pair.pad_token, temperature=0.0)
    texts = [tokenizer.decode(prefix) for prefix in prefixes]
    return texts, rest.texts(tokenizer), rest.finished.tolist(), [prompts[row]["answer"] for row in rows]


for prefix, continuation, _, answer in zip(*(column[:3] for column in goes_on(far, 4)), strict=True):
    print(f"right answer {answer}; student:{prefix}\n   teacher: {continuation}")

# %% [markdown]
# The teacher finishes the terse answer, wrongly, because it cannot add in its head either; then it opens `<think>`
# where the student would have ended, works the sum out, and is right. It was *trained* to do so: most of its texts
# began with a prefix that it had not written.

# %% [markdown]
# ### Exercise 09.1 · Reliability from continuations
#
# *Difficulty 2 of 5 · 6 minutes.* Given the texts of prefixes, the teacher's continuations, whether each
# continuation ended by itself (False: cut at the token limit), and the right answers, return the teacher's
# reliability: the share of all prefixes from which it got to a right answer.
#
# <details><summary>Hint 1</summary>The student may have written <code>#1</code> and the teacher <code>49</code>.
# What is the response?</details>
# <details><summary>Hint 2</summary><code>marked_answer(text, answer)</code> is 1.0 or 0.0. A cut response has not
# given an answer.</details>


# %%
def reliability(prefixes: list[str], continuations: list[str], finished: list[bool], answers: list[str]) -> float:
    """Share of prefixes from which the teacher goes on to a right answer; four lists of the same length."""
    ### BEGIN SOLUTION
    right = 0.0
    for prefix, continuation, done, answer in zip(prefixes, continuations, finished, answers, strict=True):
        if done:
            right += marked_answer(prefix + continuation, answer)
    return right / len(prefixes)
    ### END SOLUTION


# %%
check("09.1", reliability)

# %% [markdown]
# ## By depth, and two columns more
#
# The library does this for all depths. `premise_by_depth` gives a row for each prefix, with the teacher's
# continuation and two more, both by the *student*:
#
# - **as it is**: the student goes on from its own prefix;
# - **after the teacher's token**: one token by the teacher, which is all that guidance teaches at that position,
#   and then the student again.
#
# A response of the student has about eight tokens, so there are depths 0 (the prompt alone) to 7. (Two more columns come into use
# below: `teacher_confidence`, the probability of the teacher's token, and `prefix_surprise`, −log πT of the least probable token of
# the prefix.)
#
# **Predict.** The teacher of *far* is right from depth 4. In 08 one token of it was enough at the opening and at the end, on one
# response. Over 64 responses, where will depth 6 lie, at which some are complete and others not?

# %%
depths = range(8)
premise = {
    name: premise_by_depth(pair, sampled, prompts, depths=depths)
    for name, pair in (("far", far), ("far-fragile", fragile))
}
columns = {
    "teacher_right": "teacher goes on",
    "student_right_after_token": "student after teacher's token",
    "student_right": "student as it is",
}
by_hand = []
for depth in depths:
    judged = zip(*goes_on(far, depth), strict=True)
    right = [marked_answer(prefix + rest, answer) if done else 0.0 for prefix, rest, done, answer in judged]
    by_hand.append(sum(right) / len(right))
far_table = premise["far"].groupby("depth")[list(columns)].mean()
print("by hand", [round(share, 3) for share in by_hand])
print("library", far_table["teacher_right"].round(3).tolist())
print(far_table.rename(columns=columns).round(2).to_string())

# %% [markdown]
# From every prefix this teacher gets to the right answer. The premise holds, and that is why 08 worked. But its
# single token is worth something at two places only, at the very start and after the complete answer (a little at
# depth 6, where a response of two digits is complete). The last column falls at depth 6, because two or more of the student's own
# sampled digits stand in the prefix then, most of them wrong; depth 7 is left with the responses of three digits. In between the teacher goes along with the prefix, and so
# its token is nearly the student's own. Reliability says whether guidance is *safe*; the value of the token says
# whether it teaches anything *new*.

# %% [markdown]
# ## Another teacher
#
# You met *far-fragile* in [06](06_when_reverse_kl_fails.ipynb); now it is measured. It has the same student. Its teacher saw worked solutions only, each from the start, and never a prefix
# in another style. On the prompts themselves:

# %%
for name, pair in (("far", far), ("far-fragile", fragile)):
    print(f"teacher of {name:11} from scratch: {evaluate(pair, pair.teacher, prompts=prompts).accuracy:.2f} right")

# %% [markdown]
# A benchmark could not tell the two apart.
#
# **Predict.** Its reliability at depth 0, at depth 1 (after ` the`), and at depth 4. And how sure of its next token
# will it be there: more or less than the teacher of *far*?

# %%
figure, panels = plt.subplots(1, 2, figsize=(9, 3), sharey=True, layout="constrained")
for axes, (name, frame) in zip(panels, premise.items(), strict=True):
    shares = frame.groupby("depth")[list(columns)].mean()
    for (column, label), line, marker in zip(columns.items(), ("-", "--", ":"), ("o", "s", "^"), strict=True):
        axes.plot(shares.index, shares[column], line, marker=marker, markersize=6, label=label)
    axes.set(xlabel="tokens of the student's prefix", ylabel="share of right answers", ylim=(-0.05, 1.05))
    axes.set_title(name, loc="left")
figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
plt.show()
print(
    "far-fragile, teacher goes on:", premise["far-fragile"].groupby("depth")["teacher_right"].mean().round(2).tolist()
)

# %% [markdown]
# Right on every prompt, and lost one token later. After ` the` it is never right again, except for the few responses
# that are right already when it is asked. Its single token is worse than nothing: at depths 1 to 6 the student is
# right now and then when left alone, and after the teacher's token less often or never.
#
# Now one response, token by token, with what both teachers propose at every position, how sure they are of it, and
# their entropy. It is the forward pass of 08.

# %%
row = 0
written = rollouts.responses[row, rollouts.mask[row]]  # (|y|,)
sequence = torch.tensor([rollouts.prompts[row] + written.tolist()])
print(f"{prompts[row]['prompt']} (right: {prompts[row]['answer']})     teacher of far          teacher of far-fragile")
print("position  student   proposes    p   entropy     proposes    p   entropy (nats)")
with torch.no_grad():
    both = [
        pair.teacher(sequence).logits[0, len(rollouts.prompts[row]) - 1 : -1] for pair in (far, fragile)
    ]  # (|y|, V)
for t, token in enumerate(written.tolist()):
    parts = []
    for logits in both:
        best = int(logits[t].argmax())
        probability, spread = logits[t].softmax(-1)[best], entropy(logits[t])
        parts.append(f"{visible_text(tokenizer, best):8} {probability:5.2f}  {spread.abs():6.1f}")
    print(f"{t:8}  {visible_text(tokenizer, token):8}  " + "      ".join(parts))

# %% [markdown]
# Both open with `<think>`. After that the first one goes along with the student, and where nobody can know, at the
# second and third digit, it says so: its entropy rises. The second one proposes digits in the middle of a sentence and hardly ever
# doubts them. It goes on with pieces of a worked solution, as if it were somewhere inside one.
#
# Over all prefixes, for each depth: how probable does a teacher find its own proposal, and how reliable is it?

# %%
figure, axes = plt.subplots(figsize=(5.5, 3.4))
for (name, frame), marker in zip(premise.items(), ("o", "^"), strict=True):
    points = frame.groupby("depth")[["teacher_confidence", "teacher_right"]].mean()
    axes.scatter(points["teacher_confidence"], points["teacher_right"], s=60, marker=marker, label=f"teacher of {name}")
    for depth in (0, 6, 7) if name == "far" else (7,):
        spot = (points.loc[depth, "teacher_confidence"], points.loc[depth, "teacher_right"])
        axes.annotate(f"depth {depth}", spot, (0, -15 if name == "far" and depth != 7 else 9), textcoords="offset points",
                      ha="center", fontsize=9)  # fmt: skip
axes.set(xlabel="mean probability of the teacher's proposal", ylabel="reliability", xlim=(0, 1.08), ylim=(-0.1, 1.2))
axes.legend(frameon=False, loc="center left")
plt.show()
for name, frame in premise.items():
    lost = frame[frame["depth"].between(1, 6)]
    print(
        f"{name:11} depths 1 to 6: mean probability {lost['teacher_confidence'].mean():.2f}, "
        f"reliability {lost['teacher_right'].mean():.2f}"
    )

# %% [markdown]
# The teacher that is unsure gets there, and the one that is sure does not. *Confidently wrong* is what networks
# tend to be on inputs unlike those they were trained on: a softmax knows how to choose between continuations and
# has no word for "I have never seen this".

# %% [markdown]
# ## What TGPO makes of it
#
# Forty steps of TGPO on *far-fragile*, with the settings of 08, and checkpoints on the way.
#
# **Predict.** The student is taught nonsense at seven positions of eight and `<think>` at one. Which of accuracy
# and agreement with the teacher will rise?


# %%
def short_run(pair: str, method: str):
    """Forty steps with the settings of notebook 08."""
    output = RUNS / f"{pair}-{method}"
    shutil.rmtree(output, ignore_errors=True)
    config = TrainConfig.preset(
        "tiny", method, student=pair, steps=40, prompts_per_step=8, evaluation_temperature=1.0, measured_positions=256,
        gradient_terms_every=0, checkpoint_every=10, keep_checkpoints=0, output=str(output),
    )  # fmt: skip
    return train(config, show_progress=False)


runs = {"TGPO": short_run("far-fragile", "tgpo")}

# %% tags=["nbval-ignore-output"]
plot_runs(runs, ("accuracy", "agreement", "length"))

# %% [markdown]
# For some twenty-five steps agreement climbs past one half while accuracy stays at a few percent: the loss is being
# minimised, and the student learns what it is taught. (Responses lengthen, too: what is taught has no end in it.) Near the end accuracy may rise after all. To see why, look
# into the checkpoints and keep two kinds of responses apart: those that open with `<think>` and those that do not.

# %% tags=["nbval-ignore-output"]
rows = []
for folder in checkpoint_folders(RUNS / "far-fragile-tgpo" / "checkpoints"):
    student = load_model(folder, torch.float32, "cpu")
    seen = evaluate(fragile, student, prompts=prompts, temperature=1.0)
    theirs = ask_teacher(
        fragile.teacher, seen.rollouts, vocabulary_size=fragile.vocabulary_size, micro_batch_tokens=4096
    )
    same = (seen.rollouts.responses == theirs.tokens) & seen.rollouts.mask  # (B, T)
    opened = seen.rollouts.responses[:, 0] == THINK  # (B,)
    line = {"step": int(folder.name.removeprefix("step-")), "open with <think>": opened.float().mean().item()}
    for name, kind in (("opened", opened), ("others", ~opened)):
        line[f"{name}: right"] = seen.rewards[kind].mean().item()
        line[f"{name}: as teacher says"] = (same[kind].sum() / seen.rollouts.mask[kind].sum()).item()
    rows.append(line)
    if line["step"] == 20:
        halfway = [text for text, first in zip(seen.rollouts.texts(tokenizer), opened, strict=True) if not first][:5]
print(pd.DataFrame(rows).set_index("step").round(2).to_string(na_rep="–"))
print("after 20 steps, among the others:", *halfway, sep="\n   ")

# %% [markdown]
# The last two columns are what a broken premise does. The responses that do not open with `<think>` come to follow
# the teacher, from about a tenth of their tokens to well over a third, and are not right more often for it; they
# read like what the teacher proposed in the table above. Guidance has taught the teacher's confusion. It leaks,
# too: one network serves all positions, and the first responses that do open with `<think>` are mostly wrong,
# although the student of *far* was right after a forced `<think>` on every prompt (02).
#
# What can save the run is the first position. There the prefix is the prompt, this teacher knows it well, and it
# says `<think>`. A response that opens so is on the teacher's own ground: guidance repairs it there, and the reward
# helps. So TGPO may get out here, late. Three seeds were tried when this was written, and held-out accuracy,
# measured every five steps, was first at one half or above at steps 40, 30 and 30; in 08, on *far*, at step 20. If
# the teacher's *first* word were wrong too, nothing in this loss would notice.

# %% [markdown]
# ## Repair one: ask only a teacher that is sure
#
# The obvious repair is a gate: no guidance where the teacher gives its token 0.9 or less.
#
# **Predict.** Which share of the positions does this gate let through, on the student's responses, for each of the two
# teachers?

# %%
mask = rollouts.mask
asked = {
    name: ask_teacher(pair.teacher, rollouts, vocabulary_size=pair.vocabulary_size, micro_batch_tokens=4096)
    for name, pair in (("far", far), ("far-fragile", fragile))
}
for name, answers in asked.items():
    by_hand = answers.confidence.exp() > 0.9
    library = confidence_gate(answers.confidence, 0.9)
    print(f"{name:11} by hand {by_hand[mask].float().mean():.2f}   library {library[mask].float().mean():.2f}")

# %% [markdown]
# It lets more through from the lost teacher than from the good one. The good teacher is unsure where nobody can
# know; the other one is sure all the same. Such a gate measures how peaked a distribution is, and that was never
# the question.

# %% [markdown]
# ## Repair two: ask only where the teacher can know
#
# What follows is an addition of this course. The paper about TGPO asks the teacher everywhere and has no such gate.
#
# The teacher's probability of its *own* token says little. Its probability of the *student's* tokens says more: a
# prefix that the teacher would hardly write is one that it hardly knows. Call $s_i=-\log\pi_T(y_i\mid x,y_{<i})$
# the teacher's **surprise** at token i, in nats, and let its **doubt** before position t be
#
# $$D_t=\max(\lambda D_{t-1},\,s_{t-1})\quad\text{(worst token)}\qquad\text{or}\qquad
# D_t=\lambda D_{t-1}+s_{t-1}\quad\text{(sum)},\qquad D_0=0.$$
#
# The memory λ, from 0 to 1, says how slowly doubt fades. The **trust horizon** is where doubt is small: *hard*,
# guidance counts where $D_t\le\tau$; *soft*, it is weighted by $e^{-D_t/\tau}$. (τ is a threshold in nats here, not the
# temperature of [01](01_policies_and_tokens.ipynb).) With the worst token, λ = 1 and τ =
# 4 nats guidance goes on until the student has written one token that the teacher gives less than e⁻⁴, and never
# comes back.
#
# For example, surprises of 0, 14, 1 and 0 nats give the doubts 0, 0, 14, 14 (worst token, λ = 1) or 0, 0, 14, 13.6 (sum, λ = 0.9: the
# last is 0.9·14 + 1).
#
# With $g_t$ for 1 or 0 inside and outside, or for the weight, the loss becomes $L_G=\sum_t g_t\,(-\log\pi_\theta(y_t^T))\,/\,N$. N
# is still the number of *all* response tokens, not of the guided ones: a gate takes terms away and makes none of the others
# larger.
#
# Note that $D_t$ is made of the tokens *before* t. At a departure itself the teacher is still asked: the prefix up
# to there is its own, and its answer is exactly what the student should have written.
#
# A simpler relative is *first departure*: guidance up to and including the first position at which the student
# writes another token than the teacher's best. It can end sooner; a token that the teacher gives 0.4, beside a best
# one with 0.5, is a departure for it and no surprise. (On *far* ` the` is a departure and a surprise at once, and comes
# first: in the study of [10](10_a_fair_comparison.ipynb) the two gates gave the same runs.)
#
# ### Exercise 09.2 · Doubt with a memory
#
# *Difficulty 2 of 5 · 8 minutes.* Compute the *sum* $D_t$ from the teacher's log-probabilities of the tokens that
# stand in the rollouts, (B, T), and λ. Return (B, T).
#
# <details><summary>Hint 1</summary>A loop over positions is fine. Write the doubt down <em>before</em> you add the
# token of that position.</details>
# <details><summary>Hint 2</summary><code>torch.stack(list, dim=-1)</code> makes (B, T) of T tensors (B,).</details>


# %%
def doubt(teacher_logprobs: torch.Tensor, memory: float) -> torch.Tensor:
    """The sum D_t before each position: (B, T) → (B, T), in nats."""
    ### BEGIN SOLUTION
    now = torch.zeros(len(teacher_logprobs))
    doubts = []
    for t in range(teacher_logprobs.shape[1]):
        doubts.append(now)
        now = memory * now - teacher_logprobs[:, t]
    return torch.stack(doubts, dim=-1)
    ### END SOLUTION


# %%
check("09.2", doubt)

# %% [markdown]
# ### Exercise 09.3 · A trust horizon
#
# *Difficulty 3 of 5 · 8 minutes.* Write the hard horizon with the worst token and λ = 1 as a mask, (B, T) bool. You
# are given the log-probabilities of the written tokens under student and teacher, the mask of the responses, (B, T)
# each, and τ. You may not need every argument. Position t is True where it belongs to a response and no token
# *before* t has a surprise above τ.
#
# <details><summary>Hint 1</summary>Which positions are fatal for the ones after them? Then: has there been a fatal
# one before?</details>
# <details><summary>Hint 2</summary><code>cumsum</code> or <code>cummax</code> along the last dimension; the shift
# by one decides whether the departure itself is in.</details>


# %%
def horizon_mask(
    student_logprobs: torch.Tensor, teacher_logprobs: torch.Tensor, mask: torch.Tensor, threshold: float
) -> torch.Tensor:
    """Where guidance counts: (B, T) twice, mask (B, T) bool → (B, T) bool."""
    ### BEGIN SOLUTION
    fatal = (-teacher_logprobs > threshold).long()
    before = fatal.cumsum(-1) - fatal  # departures strictly before each position
    return (before == 0) & mask
    ### END SOLUTION


# %%
check("09.3", horizon_mask)

# %% [markdown]
# ## Inside and outside
#
# Does the horizon separate where the teacher knows from where it does not? The responses of *far* leave it with
# their first word, so they cannot say: depth 0 is inside and everything else outside. The student of *near* writes
# both ways. It opens `<think>` one time in four; else it mostly says some terse words first and opens then, and about one
# response in six never does. The same teacher, *far-fragile*'s, at the prefixes of this student:

# %%
two_ways = load_pair("near").student
mixed = evaluate(fragile, two_ways, prompts=prompts, temperature=1.0)
print(*mixed.rollouts.texts(tokenizer)[:4], sep="\n")
frame = premise_by_depth(fragile, mixed, prompts, student=two_ways, depths=(0, 1, 2, 4, 8, 16, 32, 44))

# %% [markdown]
# **Predict.** Take prefixes of one and the same depth, say 16 tokens. Some have departed at some place, others not.
# What is the reliability of each kind? And among those that departed, which way does it go with depth?

# %%
frame["inside"] = frame["prefix_surprise"] <= 4.0  # the worst token, with λ = 1 and τ = 4 nats
both_sides = frame.groupby(["inside", "depth"])[["teacher_right", "teacher_confidence"]].mean()
figure, axes = plt.subplots(figsize=(6, 3))
for inside, label, line, marker in ((True, "inside", "-", "o"), (False, "outside", "--", "s")):
    side = both_sides.loc[inside]
    axes.plot(side.index, side["teacher_right"], line, marker=marker, label=f"{label}: reliability")
side = both_sides.loc[False]
axes.plot(side.index, side["teacher_confidence"], ":", marker="^", color="0.4", label="outside: teacher's confidence")
axes.set(
    xlabel="tokens of the student's prefix", ylabel="share of right answers,\nmean probability", ylim=(-0.05, 1.05)
)
axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()
for title, table in (
    ("share continued rightly", both_sides["teacher_right"].unstack().round(2)),
    ("number of prefixes", frame.groupby(["inside", "depth"]).size().unstack(fill_value=0)),
):
    print(title, table.rename(index={True: "inside", False: "outside"}).to_string(na_rep="–"), sep="\n")

# %% [markdown]
# Inside, every prefix is continued to a right answer, at every depth (of responses they are about a dozen at each). Outside, none at first; and it gets *better*
# with depth. The long ones among these responses opened `<think>` after a few terse words, and as more of the
# prefix is in the teacher's own style it finds its way back. (It also has less left to do.) Its confidence says
# nothing of all this: it is high throughout.
#
# A horizon that never recovers does not notice the way back. One with a memory may: we split the prefixes that
# departed by the doubt of the sum with λ = 0.9, at 8 nats.

# %%
theirs = ask_teacher(fragile.teacher, mixed.rollouts, vocabulary_size=fragile.vocabulary_size, micro_batch_tokens=4096)
fading = teacher_doubt(theirs.logprobs, "sum", 0.9)  # (B, T)
frame["doubt"] = [fading[row, depth].item() for row, depth in zip(frame["row"], frame["depth"], strict=True)]
gone = frame[~frame["inside"] & (frame["depth"] >= 16)]
for name, kind in (("doubted still", gone["doubt"] > 8.0), ("trusted again", gone["doubt"] <= 8.0)):
    by_depth = gone[kind].groupby("depth")["teacher_right"]
    print(f"{name}:", "  ".join(f"depth {d}: {len(part)} prefixes, {part.mean():.2f} right" for d, part in by_depth))

# %% [markdown]
# Hardly a prefix of 16 or 32 tokens is trusted again, and those few are mostly right. At 44 nearly half are; there
# all are right, the doubted ones too, since little more than the answer is left to write. So this memory errs on
# the careful side: it comes back later than it could.

# %% [markdown]
# ## Over one response
#
# One response of that kind, under both teachers. Above, how surprised the teacher is at each token. Below, how much
# guidance counts under three horizons: hard without recovery (worst token, λ = 1, τ = 4), hard with memory (sum, λ
# = 0.9, τ = 8), and the soft one with the same doubt. Doubt is made of the tokens *before*, so its line rises one position
# after the bar that raised it.

# %%
departed = next(
    row
    for row in range(len(prompts))
    if mixed.rewards[row] and 2 <= mixed.rollouts.responses[row].tolist().index(THINK) <= 6
)
one = mixed.rollouts.rows(torch.tensor([departed]))
spelled = [visible_text(tokenizer, token) for token in one.responses[0, one.mask[0]].tolist()]
figure, panels = plt.subplots(2, 2, figsize=(11, 4.6), sharex=True, sharey="row", layout="constrained")
for column, (name, pair) in enumerate((("far", far), ("far-fragile", fragile))):
    theirs = ask_teacher(pair.teacher, one, vocabulary_size=pair.vocabulary_size, micro_batch_tokens=4096).logprobs
    fading = teacher_doubt(theirs, "sum", 0.9)
    horizons = {
        "hard, no recovery": trust_horizon_gate(teacher_doubt(theirs, "worst_token", 1.0), 4.0).float(),
        "hard, memory 0.9": trust_horizon_gate(fading, 8.0).float(),
        "soft, memory 0.9": trust_horizon_weights(fading, 8.0),
    }
    upper, lower = panels[:, column]
    upper.bar(range(len(spelled)), (-theirs[0]).tolist(), color="0.5", label="surprise s_t")
    upper.plot(fading[0], "C3-", label="doubt D_t (sum, λ = 0.9)")
    upper.set(xlabel="position", ylabel="nats")
    upper.set_title(f"teacher of {name}", loc="left")
    for (label, weights), line in zip(horizons.items(), ("-", "--", ":"), strict=True):
        lower.step(range(len(spelled)), weights[0].tolist(), line, where="mid", linewidth=2, label=label)
    lower.set(xlabel="position", ylabel="weight of guidance", ylim=(-0.05, 1.05))
    print(f"{name:11} guided share:", ", ".join(f"{label} {weights.mean():.2f}" for label, weights in horizons.items()))
panels[0, 1].legend(frameon=False, loc="upper right")
figure.legend(*panels[1, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
plt.show()
print("".join(spelled))

# %% [markdown]
# Without recovery both are guided at the first position alone. With memory they differ, because the two teachers
# do. The good one is surprised twice, at ` the` and at a `<think>` in the middle of a sentence; then it goes along,
# its doubt fades, and guidance is back for three quarters of the response. The lost one goes on being surprised
# inside the worked solution, now and then by more than ten nats, and each time its doubt is renewed: the horizon
# stays shut nearly to the end. Memory is not a clock. Trust comes back when the teacher stops being surprised.

# %% [markdown]
# ## The repairs, live
#
# The confidence gate and the trust horizon (worst token, λ = 1, τ = 4) on *far-fragile*, and the trust horizon on
# *far*, where the teacher needs no such care.
#
# **Predict.** Order the four runs by when they learn. And how much will the horizon cost on *far*, where it takes
# guidance away at seven positions of eight?

# %%
runs["TGPO, confidence > 0.9"] = short_run("far-fragile", "tgpo-confidence")
runs["TGPO, trust horizon"] = short_run("far-fragile", "tgpo-trust-horizon")
on_far = short_run("far", "tgpo-trust-horizon")

# %% tags=["nbval-ignore-output"]
plot_runs(
    {**runs, "trust horizon, on far": on_far},
    ("accuracy", "agreement", "length", "guided"),
)

# %% tags=["nbval-ignore-output"]
for name, result in {**runs, "trust horizon, on far": on_far}.items():
    curve = result.metrics.dropna(subset="accuracy").set_index("step")["accuracy"]
    print(f"{name:24}", "  ".join(f"{step}: {value:.2f}" for step, value in curve.items()))

# %% [markdown]
# The trust horizon learns first, soon after step 10, with the lost teacher as with the good one: but for agreement,
# which begins higher with the good one, its two curves lie on each other. Within the horizon the two teachers say
# the same. At first that is one position in eight, `<think>` after the prompt (the panel *guided*); as responses
# open so, their prefixes are the teacher's own, the horizon moves out, and in the end nearly everything is guided.
# No nonsense is taught on the way.
#
# The confidence gate goes the way of no gate: most positions guided, the same confusion, but some ten steps less of
# it. On the three seeds tried it was first at one half or above at steps 30, 25 and 25, where no gate took 40, 30 and
# 30 and the trust horizon 20, 20 and 20.
#
# On *far* the horizon cost nothing to be seen in this run: it took away seven positions of eight, and learned as
# soon as plain TGPO in 08, and then faster. What it took away there taught little: tokens that the student would
# have written anyhow, and digits that nobody can know. It took away one that taught something, the `<think>` after
# a complete answer. In 08 that led to responses with two answers: at step 40 two in three still began tersely and opened
# `<think>` at the end. Here nearly all open with it:

# %% tags=["nbval-ignore-output"]
after = evaluate(far, on_far.student, prompts=pair_prompts(far, "test").select(range(256)), temperature=1.0)
opened = after.rollouts.responses[:, 0] == THINK  # (B,)
two = (after.rollouts.responses == tokenizer.convert_tokens_to_ids("#")).sum(-1) + (
    after.rollouts.responses == tokenizer.convert_tokens_to_ids(" #")
).sum(-1) > 1
print(f"trust horizon on far: {opened.float().mean():.2f} open with <think>, {two.float().mean():.2f} give two answers")

# %% [markdown]
# That is what the horizon is worth even with a good teacher: it does not teach how to go on from a wrong start, so the student
# learns to start rightly. (Whether the shorter way is *better* is for the task to say; both are right.)
#
# The curves are single runs, on pairs that were built to be like this, and a teacher whose first word is always right.
# What holds over seeds is in [docs/findings.md](../docs/findings.md) and in [10](10_a_fair_comparison.ipynb).

# %% [markdown]
# ## Long responses
#
# Eight tokens are short. What would a horizon do to a response of a hundred? Two constructed ones: in both the
# teacher is a little surprised at every token, by 0.3 nats, as it is by ordinary choices of words; in the second
# one, there is one departure of 14 nats at position 20.
#
# **Predict.** For each of three horizons, where does guidance end, and does it come back? Worst token with λ = 1
# and τ = 4; sum with λ = 1 and τ = 8; sum with λ = 0.9 and τ = 8.

# %%
quiet = torch.full((1, 100), -0.3)
departing = quiet.clone()
departing[0, 20] = -14.0
kinds = {
    "worst token, λ = 1, τ = 4": ("worst_token", 1.0, 4.0),
    "sum, λ = 1, τ = 8": ("sum", 1.0, 8.0),
    "sum, λ = 0.9, τ = 8": ("sum", 0.9, 8.0),
}


def doubts_by_hand(logprobs: list[float], kind: str, memory: float) -> list[float]:
    """D_t by its definition, one position after the other."""
    now, doubts = 0.0, []
    for logprob in logprobs:
        doubts.append(now)
        now = memory * now - logprob if kind == "sum" else max(memory * now, -logprob)
    return doubts


figure, panels = plt.subplots(1, 2, figsize=(10, 3), sharey=True, layout="constrained")
for axes, (title, logprobs) in zip(panels, (("quiet", quiet), ("one departure", departing)), strict=True):
    for (label, (kind, memory, threshold)), line in zip(kinds.items(), ("-", "--", ":"), strict=True):
        by_hand = torch.tensor([doubts_by_hand(logprobs[0].tolist(), kind, memory)])
        doubts = teacher_doubt(logprobs, kind, memory)
        shut = (~trust_horizon_gate(doubts, threshold)).nonzero()[:, 1].tolist()
        where = f"shut from {shut[0]} to {shut[-1]}, {len(shut)} positions" if shut else "open everywhere"
        print(f"{title:14} {label:26} {where:38} as by hand: {torch.allclose(by_hand, doubts, atol=1e-4)}")
        axes.plot(doubts[0] / threshold, line, linewidth=2, label=label)
    axes.axhline(1, color="0.4", linewidth=1)
    axes.set(xlabel="position", ylabel="doubt / threshold, D_t/τ", ylim=(0, 4.5))
    axes.set_title(title, loc="left")
panels[0].legend(frameon=False, loc="upper left")
plt.show()

# %% [markdown]
# - **Worst token, λ = 1.** Ordinary surprise never adds up: the quiet response is guided to its end. One slip ends
#   it for good: the departure at 20 is the last guided position, 79 of 100 are lost.
# - **Sum, λ = 1.** Even without any departure the horizon ends: 27 tokens of 0.3 nats are 8.1. On a long response
#   it would guide the beginning and nothing else.
# - **Sum, λ = 0.9.** A steady surprise h brings the doubt to h/(1 − λ), here 3 nats, and no further: such a horizon
#   bears τ·(1 − λ) = 0.8 nats a token. The departure raises the doubt to 16.4; its excess over 3 falls by a tenth
#   with each token and is below 5 after ten, (16.4 − 3)·0.9¹⁰ = 4.7. So positions 21 to 30 are shut and 31 is open
#   again.
#
# Which one is right depends on the teacher: whether it finds its way back, and how soon, is what reliability
# outside the horizon shows. The presets `tgpo-trust-horizon`, `tgpo-recovering-horizon` and `tgpo-soft-horizon` are
# the first one, the last one, and the last one with a soft edge.
#
# What comes of it in training was measured: sums of four six-digit numbers, worked out in 180 tokens, 45 steps of TGPO with each of
# the three and with none, ten seeds (study *long* in [docs/findings.md](../docs/findings.md)). The teachers are of the same two
# kinds.
#
# **Predict.** Which of the four learns with both teachers? And what does a horizon without recovery make of a student whose first
# slip comes early in a response of 180 tokens?

# %%
runs_of_long = load_results("long").runs
shares = 100 * runs_of_long.groupby(["label", "pair"])["test_accuracy"].mean().unstack("pair")
learned = (
    (runs_of_long["test_accuracy"] > 0.2).groupby([runs_of_long["label"], runs_of_long["pair"]]).sum().unstack("pair")
)
print("right after the run, in per cent\n" + shares.round(0).astype(int).to_string())
print("seeds of ten above 20 per cent\n" + learned.to_string())

# %% [markdown]
# Without recovery not one seed learns, with either teacher. It does learn to open `<think>`; but those first steps also cost it some
# of its skill, nearly every long response has a slip somewhere, and from there on nothing is guided and nothing rewarded. Plain
# TGPO learns in a few seeds with the good teacher and in none with the lost one. With recovery it depends on the seed; with a soft
# edge all seeds learn from the good teacher, and more than half from the lost one. On terse responses of eight tokens the simplest
# horizon was the best one. It need not be elsewhere.

# %% [markdown]
# ## A real pair: measure before you trust
#
# For a real pair nobody can say beforehand which kind of teacher it has, and its benchmark figures do not tell.
# `measure_pair` brings the reliability by depth with its card, for any pair and any prompts with answers; 64
# prompts are enough to see which situation one is in.

# %%
cards = {name: measure_pair(load_pair(name), count=64) for name in ("far", "far-fragile")}
for name, card in cards.items():
    by_depth = "  ".join(f"{depth}: {share:.2f}" for depth, share in card.reliability_by_depth.items())
    print(f"{name:11} teacher from scratch {card.teacher_accuracy:.2f}, on the student's prefixes by depth  {by_depth}")
print("prefixes tried at these depths:", cards["far"].prefixes_by_depth)
print(f"standard error of a share near one half, from 64: {math.sqrt(0.5 * 0.5 / 64):.2f}")

# %% [markdown]
# From scratch both teachers are perfect. One step into the student's own text one of them is at zero.
#
# With n prefixes a share p is known to about √(p(1 − p)/n): with 64 to six hundredths at worst. That tells 0.2 from
# 0.8, and not 0.9 from 0.95. Look at more than the mean:
#
# - **High at every depth:** guidance is safe. Whether it teaches anything is the other column,
#   `student_right_after_token` of `premise_by_depth`.
# - **High at depth 0, low later:** use a trust horizon. Split the prefixes at the threshold you mean to take, as
#   above: reliability inside must be high. Take the largest τ at which it still is about what it is at depth 0. Reliability
#   outside, by depth, says whether to let it recover.
# - **Low at depth 0 already** (the teacher's accuracy from scratch on the card): no horizon helps. The teacher
#   cannot do the task, or the two do not agree on the format.
#
# Prefixes change as the student learns: what is measured before training is about the student before training.
# Measure again on the way, at checkpoints. And on a real pair, continuations are far longer than here; they are the
# cost of this measurement, and `max_new_tokens` must leave room for them, or they count as wrong.

# %% [markdown]
# ## Recap
#
# | equation | in the library |
# |---|---|
# | P(right \| prefix of k student tokens, then the teacher), reliability | `diagnostics.premise.premise_by_depth`, for a pair `measure_pair` |
# | s_t = −log πT(y_t) | `ask_teacher(…).logprobs`, with a minus sign |
# | D_t = max(λ·D_{t−1}, s_{t−1}) or λ·D_{t−1} + s_{t−1} | `guidance.teacher_doubt` |
# | guidance where D_t ≤ τ, or weighted by exp(−D_t/τ) | `guidance.trust_horizon_gate`, `guidance.trust_horizon_weights` |
# | the gates by name | `TGPO(gate=…)`; the presets `tgpo-confidence`, `tgpo-first-departure`, `tgpo-trust-horizon` and others |
#
# - A teacher can be right on every prompt and lost one token into the student's response. Only continuing the
#   student's prefixes shows it.
# - Lost, it was sure of itself; the good teacher was less sure. Confidence did not tell them apart.
# - Guided by the lost teacher, agreement rose for some twenty-five steps and accuracy did not.
# - Its surprise at what the student had *written* did tell: inside the horizon it was right at every depth tried.
#   With guidance inside alone, the student learned from the lost teacher as from the good one (the curves: one
#   seed; the step of one half: three).
# - A horizon without recovery loses the rest of a long response to one slip, and on responses of 180 tokens no student learned
#   with it; with a memory λ < 1 it comes back once the teacher stops being surprised.
#
# **Next:** [10 · A fair comparison](10_a_fair_comparison.ipynb)
