# %% [markdown]
# # 02 · A task, a teacher, a student
#
# **Goal.** Meet the pairs of this course: what they are to do, how an answer is judged, how well each does it, whether
# sampling can find the teacher's way, and how far apart two policies are, as a number.
#
# **Minutes.** 2 to run on two cores, 55 to work through.
#
# **Prerequisites.** [01](01_policies_and_tokens.ipynb): log-probabilities, masks, greedy and sampled responses.

# %%
import json
import math
from itertools import combinations

import matplotlib.pyplot as plt
import seaborn as sns
import torch
from IPython.display import Markdown

from tgpo_lab import evaluate, load_pair, measure_pair
from tgpo_lab.diagnostics.pair_card import card_markdown
from tgpo_lab.diagnostics.premise import continue_from
from tgpo_lab.evaluation import pair_prompts
from tgpo_lab.exercises import check
from tgpo_lab.models.pairs import DATA
from tgpo_lab.models.policy import project_to_vocabulary, response_hidden_states
from tgpo_lab.sampling.cached_sampling import sample_responses
from tgpo_lab.tasks.rewards import marked_answer
from tgpo_lab.tiny_world.arithmetic import terse_text, worked_text

torch.manual_seed(0)
sns.set_theme(style="ticks", palette="colorblind")

# %% [markdown]
# ## The task, and two ways to do it
#
# Add three two-digit numbers. Two styles of response end in the same answer: *terse* says the sum at once, *worked*
# goes column by column with carries and says the sum then.

# %%
pairs = {name: load_pair(name) for name in ("near", "mid", "far")}
tokenizer = pairs["far"].tokenizer  # the same one everywhere

problem = (47, 85, 36)
for name, text in (("terse", terse_text(sum(problem))), ("worked", worked_text(problem))):
    print(f"{name}, {len(tokenizer.encode(text)) + 1} tokens with the end token:\n   {text}")

# %% [markdown]
# Every prompt comes with its answer. There are three splits: one to train on, one to look at during training, and one
# for the figures that count. None of the test prompts has been seen by any of the models here.

# %%
splits = {name: pair_prompts(pairs["far"], name) for name in ("train", "validation", "test")}
print("prompts:", {name: len(rows) for name, rows in splits.items()})
seen = set(splits["train"]["prompt"])
print("test prompts that are also in train:", sum(prompt in seen for prompt in splits["test"]["prompt"]))
print("the first of test:", splits["test"][0])

# %% [markdown]
# ## A verifiable reward
#
# A **verifiable reward** is 1 for a response that gives the right answer and 0 for any other, decided by a program and
# not by a model or a person. It sounds easy. Here are two ways to write it, and below them responses that were made to
# fool them. The right answer is 168.
#
# **Predict.** Which of these responses should have the reward 1?


# %%
def contains(response: str, answer: str) -> float:
    """The answer stands somewhere in the response."""
    return float(answer in response)


def contains_after_mark(response: str, answer: str) -> float:
    """The answer stands somewhere after the last # (or anywhere, if there is none)."""
    return float(answer in response.split("#")[-1])


responses = [
    " the sum is #168",
    " the sum is 168",
    " #168 #170",
    " #170 #168",
    " #1681",
    " #160 161 162 163 164 165 166 167 168",
    " #168 or so",
    " #0168",
    " #100+68",
    " #１６８",
]
print("contains   after mark   library")
for response in responses:
    judged = [judge(response, "168") for judge in (contains, contains_after_mark, marked_answer)]
    print("{:^8.0f}   {:^10.0f}   {:^7.0f}".format(*judged), response)

# %% [markdown]
# The library's rule: what stands after the *last* `#`, up to the end of the response, must be one plain integer with
# the same digits as the answer, spaces around it allowed. A response that names several answers has named the last one;
# one that goes on talking has named none. A list of numbers earns a point from both loose rewards, so a policy that is
# trained with them is paid for listing numbers.
#
# The last two show why text is compared here and never evaluated. `eval("100+68")` is 168, and `eval` would run
# any other program just as gladly; `int("１６８")` is 168 too, although not one of these three characters is a digit of
# the tokenizer's.
#
# One more rule stands outside the reward: a response that was cut at the token limit has not given its answer yet, and
# counts as wrong.

# %%
cut = evaluate(pairs["far"], pairs["far"].teacher, count=32, max_new_tokens=20)
print(f"teacher, at most 20 tokens: cut {cut.truncated:.2f}, accuracy {cut.accuracy:.2f}")

# %% [markdown]
# ### Exercise 02.1 · A reward
#
# *Difficulty 2 of 5 · 8 minutes.* Write the library's rule: 1.0 if what stands after the last `#` is one plain integer
# with the same digits as the answer, spaces around it allowed, and 0.0 otherwise. The answer is text, as the response
# is.
#
# <details><summary>Hint 1</summary><code>response.rpartition("#")</code> gives three parts: before the last mark, the
# mark, and after it. Without a mark the second one is empty.</details>
# <details><summary>Hint 2</summary>If the text that is left is <em>equal</em> to the answer, it has its digits. No
# conversion to a number is needed.</details>


# %%
def reward(response: str, answer: str) -> float:
    """1.0 for a response that ends in # and the answer, 0.0 for any other."""
    ### BEGIN SOLUTION
    _, mark, said = response.rpartition("#")
    return float(mark == "#" and said.strip(" ") == answer)
    ### END SOLUTION


# %%
check("02.1", reward)

# %% [markdown]
# ## Student and teacher answer the same prompts
#
# A **pair** is a student, which is to be trained, a teacher, which is better, and their common tokenizer. We take the
# pair called *far* and let both answer four prompts of the test split, sampled at temperature 1.

# %%
pair = pairs["far"]
for role, model in (("student", pair.student), ("teacher", pair.teacher)):
    shown = evaluate(pair, model, count=4, temperature=1.0)
    print(role)
    for row, text, right in zip(splits["test"], shown.rollouts.texts(tokenizer), shown.rewards, strict=False):
        print(f"   {'right' if right else 'wrong'}  {row['prompt']}{text}")

# %% [markdown]
# The teacher works the sum out. The student says a number of the right size.
#
# There are three pairs with one and the same teacher, and students that differ: *near*, *mid* and *far*. Their accuracy
# before any training, on 128 prompts, greedy and sampled:

# %%
count = 128
test = splits["test"].select(range(count))
greedy = {name: evaluate(p, count=count) for name, p in pairs.items()}
sampled = {name: evaluate(p, count=count, temperature=1.0) for name, p in pairs.items()}
taught = evaluate(pair, pair.teacher, count=count)

figure, axes = plt.subplots(figsize=(6, 2.8))
places = torch.arange(len(pairs))
axes.bar(places - 0.2, [e.accuracy for e in greedy.values()], 0.4, label="student, greedy")
axes.bar(places + 0.2, [e.accuracy for e in sampled.values()], 0.4, label="student, sampled", hatch="//")
axes.axhline(taught.accuracy, color="0.4", linestyle="--", linewidth=1, label="teacher, greedy")
axes.set(xlabel="pair", ylabel="accuracy", ylim=(0, 1.1), xticks=places, xticklabels=list(pairs))
axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()
for name in pairs:
    print(
        f"{name:5} greedy {greedy[name].accuracy:.2f}, sampled {sampled[name].accuracy:.2f}, "
        f"{sampled[name].length:.0f} tokens a response"
    )
print(f"teacher {taught.accuracy:.2f}, {taught.length:.0f} tokens a response")

# %% [markdown]
# The length tells what the accuracy comes from. *near* writes long responses: most of the time it works the sum out,
# sometimes after a few words of the terse style. *mid* and *far* answer tersely, and are right once in thirty times.

# %% [markdown]
# ## pass@k: can sampling find a right answer?
#
# Training by rewards needs right answers to learn from. How likely is it that k samples for one prompt contain at least
# one? That is **pass@k**.
#
# Take n samples of which c are right. Draw k of the n without putting back: the share of such draws that contain a
# right one is an estimate of pass@k that is right on average (*unbiased*),
#
# $$\widehat{\text{pass@}k}=1-\binom{n-c}{k}\Big/\binom{n}{k}.$$
#
# (1 − (1 − c/n)ᵏ, which puts every sample back before the next is drawn, is too low on average.) With 6 samples of which 2 are
# right, and k = 3, all draws can be listed:

# %%
marks = [True, False, False, True, False, False]
draws = list(combinations(marks, 3))
print(f"{sum(any(draw) for draw in draws)} of {len(draws)} draws contain a right one")
print("formula:", 1 - math.comb(6 - 2, 3) / math.comb(6, 3))

# %% [markdown]
# ### Exercise 02.2 · pass@k
#
# *Difficulty 2 of 5 · 8 minutes.* Write a function that takes the number of right samples of each prompt, the number n
# of samples a prompt and k, and returns the mean over prompts of the estimate.
#
# <details><summary>Hint 1</summary><code>math.comb(a, k)</code> is 0 where a &lt; k, which is what is wanted: with
# fewer than k wrong ones, every draw contains a right one.</details>
# <details><summary>Hint 2</summary>The estimate of each prompt first, then the mean. Prompts are not alike.</details>


# %%
def pass_at_k(right: list[int], n: int, k: int) -> float:
    """Mean over prompts of the chance that one of k samples is right; ``right`` has one count for each prompt."""
    ### BEGIN SOLUTION
    return sum(1 - math.comb(n - c, k) / math.comb(n, k) for c in right) / len(right)
    ### END SOLUTION


# %%
check("02.2", pass_at_k)

# %% [markdown]
# Now the students: 64 prompts with 64 samples each for *mid* and *far*, 16 each for *near*. The library's
# `pass_at_k` does the arithmetic.
#
# **Predict.** One response of *far* is right in thirty. What is its pass@64? And does a high pass@64 mean that among
# the 64 samples there is one that works the sum out?

# %%
samples = {"near": 16, "mid": 64, "far": 64}
many = {name: evaluate(pairs[name], count=64, temperature=1.0, samples_per_prompt=n) for name, n in samples.items()}
texts = {name: e.rollouts.texts(tokenizer) for name, e in many.items()}

figure, axes = plt.subplots(figsize=(6.5, 3))
for (name, n), line, marker in zip(samples.items(), ("-", "--", ":"), ("o", "s", "^"), strict=True):
    ks = [2**i for i in range(7) if 2**i <= n]
    curve = [many[name].pass_at_k(n, k) for k in ks]
    axes.plot(ks, curve, line, marker=marker, markersize=5, label=name)
    print(f"{name:5} pass@1 {curve[0]:.2f}   pass@8 {curve[3]:.2f}   pass@{ks[-1]} {curve[-1]:.2f}")
axes.set(xlabel="k (samples for one prompt)", ylabel="pass@k", ylim=(0, 1.05))
axes.set_xscale("log", base=2)
axes.set_xticks(ks, ks)
axes.legend(frameon=False)
plt.show()

# %%
right_samples = (many["far"].rewards.view(-1, 64) > 0).sum(-1).tolist()  # right ones among the 64 of each prompt
by_formula = sum(1 - math.comb(64 - c, 8) / math.comb(64, 8) for c in right_samples) / len(right_samples)
print(f"pass@8 of far: by the formula {by_formula:.4f}, library {many['far'].pass_at_k(64, 8):.4f}")

# %% [markdown]
# *far* even lies above *mid* at k = 64; with 64 prompts that is noise, for each of the two has a standard error of 0.03 to 0.04.
# So much for the answers. And the way to them?

# %%
for name in pairs:
    print(
        f"{name:5} {sum('<think>' in text for text in texts[name]):5} of {len(texts[name])} responses contain <think>"
    )

# %% [markdown]
# With 64 samples *far* has a right answer for nearly every prompt, and not one of its 4,096 responses was worked out. (With
# another seed one may be: with `seed=1` there is one.) pass@k counts right *answers*; it does not ask how they came
# about. How *far* comes to its answers can be seen in its errors:

# %%
answers = [int(answer) for answer in splits["test"].select(range(64))["answer"] for _ in range(64)]
said = [text.rpartition("#")[2] for text in texts["far"]]
errors = torch.tensor(
    [int(number) - answer for number, answer in zip(said, answers, strict=True) if number.isdecimal()]
)

figure, axes = plt.subplots(figsize=(6.5, 2.6))
axes.hist(errors, bins=torch.arange(-60, 61, 3) - 1.5, color="0.6", edgecolor="white")
axes.set(xlabel="answer of the far student − right sum", ylabel="responses")
plt.show()
chance = (errors == 0).float().mean()
print(f"standard deviation {errors.float().std():.1f}, exactly right {chance:.3f}")
print(f"64 tickets with that chance: at least one wins with probability {1 - (1 - chance) ** 64:.2f}")

# %% [markdown]
# A bell around the right sum. The student guesses the size of the number, and now and then the guess is right. Sample
# often enough and one guess will be: 64 tickets of a lottery with this chance do about as well as the curve above (about: here
# all prompts are given one chance).
#
# So a reward finds something among 64 samples for most prompts, and what it finds are lucky guesses. The teacher's way,
# which is right every time, does not occur among them.

# %% [markdown]
# ## The skill is latent
#
# How improbable is the teacher's way under the student? The worked style opens with one token, `<think>`. We take its
# log-probability under each student, after the prompt alone.

# %%
think = tokenizer.convert_tokens_to_ids("<think>")
prompts = pair.encode(test["prompt"])
for name, p in pairs.items():
    with torch.no_grad():
        last = torch.stack([p.student(torch.tensor([ids])).logits[0, -1] for ids in prompts])  # (128, V)
    opening = last.log_softmax(-1)[:, think].mean()
    print(
        f"{name:5} log π(<think>) = {opening:6.1f} nats: about once in {float(f'{math.exp(-opening):.2g}'):,.0f} times"
    )

# %% [markdown]
# A terse answer has seven tokens more, and at each of them the student could still open its `<think>`. The sum of the
# token's probability over the places of a response is the expected number of openings in it.

# %%
with torch.no_grad():
    for name, p in pairs.items():
        hidden = response_hidden_states(p.student, sampled[name].rollouts)
        expected = project_to_vocabulary(p.student, hidden).softmax(-1)[:, think].sum() / count
        print(f"{name:5} expected openings in a response {expected:.1g}")

# %% [markdown]
# For *far* that is one in some 50,000 responses. The teacher opens with this token nearly always.
#
# Now we write it for the student: after each prompt the token `<think>` is put, and the student goes on greedily by
# itself.
#
# **Predict.** [00](00_one_tour.ipynb) did so with *far*, whose accuracy by itself is 0.05 greedily. What will it be for *mid*? And
# the other way round: if ` the` is written for the *teacher*, the student's first token, what is left of its accuracy? (0.05 is
# of the 128 prompts used here. Other notebooks count other numbers of prompts and get from 0.05 to 0.11 for the same student:
# with 128 prompts such a share has a standard error of two hundredths or so.)


# %%
def accuracy_after(model, opening: str) -> float:
    """Share of right answers if ``opening`` is written for the model, and it goes on greedily."""
    opened = [[*ids, *tokenizer.encode(opening)] for ids in prompts]
    forced = sample_responses(model, opened, 80, pair.end_tokens, pair.pad_token, temperature=0.0)
    right = [
        marked_answer(opening + text, answer) if finished else 0.0
        for text, answer, finished in zip(forced.texts(tokenizer), test["answer"], forced.finished, strict=True)
    ]
    print(f"   {test['prompt'][0]}{opening}|{forced.texts(tokenizer)[0]}")
    return sum(right) / count


for name in ("far", "mid"):
    after = accuracy_after(pairs[name].student, "<think>")
    print(f"{name}: as it is {greedy[name].accuracy:.2f}, after <think> {after:.2f}")
print(f"teacher: as it is {taught.accuracy:.2f}, after “ the” {accuracy_after(pair.teacher, ' the'):.2f}")
library = continue_from(
    pair, pair.student, prompts, [[think]] * count, test["answer"], max_new_tokens=80, reward="marked_answer"
)
print(f"library: far after <think> {sum(library) / count:.2f}")

# %% [markdown]
# The students can add. The teacher finishes the terse answer that was begun for it, wrongly, and then works the sum out after
# all: forced into the student's words, it loses nothing. The student was taught both styles, and then made to hardly ever open the second one. What separates it
# from the teacher is one decision at the start, and that decision is hardly ever among its samples. Such a skill, there
# but not used, is called **latent**; training has to elicit it.

# %% [markdown]
# ## How far apart are the two?
#
# We let the *student* write and both models read what it wrote. First, one response, token by token. The difference
# $d_t=\log\pi_\theta(y_t)-\log\pi_T(y_t)$ says how much more probable the token is under the student, πθ (θ stands for its
# parameters), than under the teacher, πT, in nats; and next to it stands the token that the teacher finds most probable there.
#
# **Predict.** The answer is wrong, and 00 showed where the teacher is loud. Will it also reject the wrong *digits*?

# %%
rollouts = sampled["far"].rollouts
mask = rollouts.mask
with torch.no_grad():
    student_logits, teacher_logits = (
        project_to_vocabulary(model, response_hidden_states(model, rollouts)) for model in (pair.student, pair.teacher)
    )  # (N, V), all response tokens of all rows, one after the other
student, teacher = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
written = rollouts.responses[mask].unsqueeze(-1)  # (N, 1)
d = (student - teacher).gather(-1, written).squeeze(-1)  # (N,)

print(tokenizer.decode(rollouts.prompts[0]), "answer", test["answer"][0])
print("student wrote   d_t (nats)   teacher would write")
for place in range(int(rollouts.lengths[0])):
    token, best = (tokenizer.decode(index) for index in (written[place, 0], teacher[place].argmax()))
    print(
        f"{token!r:13} {round(d[place].item(), 1) + 0.0:10.1f}       {best!r:10} p = {teacher[place].max().exp():.2f}"
    )

# %% [markdown]
# Two tokens are rejected, the first and the last: instead of ` the` the teacher would have opened `<think>`, and
# instead of ending it would have opened `<think>` then. In between it goes along. It has read ` the`, and after that `
# sum` is what comes, whoever writes. Even the digits of the wrong answer pass: without working the sum out, the teacher
# does not know better.
#
# Now all responses. A few numbers say how far apart the two policies are **on what the student writes**. A token counts
# as *rejected* if d is above a threshold; the course takes 4 nats, a factor of 55. The two *agree* at a place if they
# have the same most probable token there. And there are two **KL divergences**. KL(p‖q) = Σ_v p(v) log(p(v)/q(v)) is the mean
# of log p/q over tokens drawn from p. With p the student it is called *reverse*, with p the teacher *forward*;
# [03](03_two_kls.ipynb) is about their difference.

# %%
by_hand = {
    "KL(student‖teacher)": (student.exp() * (student - teacher)).sum(-1).mean(),
    "KL(teacher‖student)": (teacher.exp() * (teacher - student)).sum(-1).mean(),
    "rejected, d > 4": (d > 4).float().mean(),
    "agreement": (student.argmax(-1) == teacher.argmax(-1)).float().mean(),
}
for name, value in by_hand.items():
    print(f"{name:20} {value:.2f}")

places = torch.arange(mask.shape[1]).expand_as(mask)[mask]  # (N,)
last = (rollouts.lengths - 1)[:, None].expand_as(mask)[mask]  # (N,)
between = (places > 0) & (places < last)
for name, where in (("first tokens", places == 0), ("tokens in between", between), ("last tokens", places == last)):
    print(f"   rejected among the {name}: {(d[where] > 4).float().mean():.2f}")

# %% [markdown]
# What was seen in one response holds for all: the teacher says no at the beginning and at the end, and goes along in
# between, apart from a few digits.
#
# ### Exercise 02.3 · The rejected share
#
# *Difficulty 1 of 5 · 5 minutes.* Write a function that takes the log-probabilities of the written tokens under student
# and teacher, both (B, T), the mask (B, T) and a threshold in nats, and returns the share of the tokens that the
# teacher finds less probable than the student by more than the threshold.
#
# <details><summary>Hint 1</summary>Places outside the mask count neither above nor below the fraction bar.</details>
# <details><summary>Hint 2</summary>Indexing a tensor (B, T) with the mask leaves the values of the tokens
# alone.</details>


# %%
def rejected_share(
    student_logprobs: torch.Tensor, teacher_logprobs: torch.Tensor, mask: torch.Tensor, threshold: float
) -> float:
    """Share of masked tokens with log πθ − log πT above the threshold: (B, T) three times → a number."""
    ### BEGIN SOLUTION
    difference = (student_logprobs - teacher_logprobs)[mask]
    return (difference > threshold).float().mean().item()
    ### END SOLUTION


# %%
check("02.3", rejected_share)

# %% [markdown]
# `measure_pair` measures all this and some more for any pair, before any training, and makes a card of it.

# %%
card = measure_pair(pair, count=count)
Markdown(card_markdown(card).split("\n", 2)[2])

# %% [markdown]
# KL, rejected tokens and agreement are the numbers that were computed by hand. The line on *reliability* answers
# another question: after so many tokens of the student's response (the *depth*), how often does the teacher get to the right
# answer from there? Here it always does. That is another thing than always *proposing* the right token: a digit that it
# proposed above was wrong. What it does when it goes on, you saw after ` the`: it writes a wrong sum and then works
# it out. Much hangs on this, and [09](09_is_the_teacher_right.ipynb) is about it.
#
# Each shipped pair has its card beside it. Side by side:

# %%
cards = {name: json.loads((DATA / "pairs" / name / "card.json").read_text()) for name in ("near", "mid", "far")}
rows = {
    "log π(opening), nats": "opening_logprob",
    "KL(student‖teacher)": "reverse_kl",
    "KL(teacher‖student)": "forward_kl",
    "rejected": "rejected",
    "agreement": "agreement",
    "after the opening": "forced_opening_accuracy",
}
print(" " * 22 + "".join(f"{name:>8}" for name in cards))
for title, key in rows.items():
    print(f"{title:22}" + "".join(f"{entry[key]:8.2f}" for entry in cards.values()))

# %% [markdown]
# Look at *mid* and *far*. KL(student‖teacher), rejected tokens and agreement hardly tell them apart, since these are means over
# what the student writes now, and both write the same terse answers. KL(teacher‖student) does by one nat, because it is weighed
# by what the teacher would write. What differs by four nats, a factor of about 55, is how often sampling opens the teacher's
# way. No single number says how far apart two policies are.
#
# There is a fourth pair, *far-fragile*: the student of *far* with a teacher that is not reliable. It waits for 09.
#
# ## How these pairs came about
#
# They were designed. Student and teacher are trained on texts in the two styles, and the student's log-probability of
# `<think>` was then set to a wanted value. *far* was designed until TGPO ([08](08_tgpo.ipynb)) learned and reverse KL
# did not, on one seed. At −9 nats, which is *mid* now, reverse KL and rewards alone learned it too, only later than
# TGPO. And in an earlier version, in which the words that neither style uses were as probable as the teacher's opening, TGPO failed too. So
# those words were made rarer; [06](06_when_reverse_kl_fails.ipynb) shows what hangs on the runner-up, the token that gains most when the student's own is pushed down. A result on *far* shows that such a situation exists, and not how common it is. Keep that in mind for everything that
# follows.

# %% [markdown]
# ## Recap
#
# | equation | in the library |
# |---|---|
# | r(x, y) ∈ {0, 1} | `tasks.rewards.marked_answer`, for all rollouts of a batch `tasks.rewards.score` |
# | 1 − C(n − c, k)/C(n, k) | `Evaluation.pass_at_k`, from `evaluate(…, samples_per_prompt=n)` |
# | d_t = log πθ(y_t) − log πT(y_t) | `losses.sampled_kl(…, "k1")`: comes in [04](04_the_gradient_of_reverse_kl.ipynb) |
# | divergence and reliability of a pair | `measure_pair`, `diagnostics.pair_card.card_markdown` |
#
# - A reward must hold against responses that were made to fool it; text is compared and never evaluated.
# - *far* is right in about 3 of 100 samples, by guessing. pass@64 is high, and none of 4,096 samples was worked out.
# - After one forced token the same student is right on every prompt tried: the skill is latent.
# - On the student's own responses the teacher rejects about one token in four, and it is the opening and the end that
#   it rejects.
#
# **Next:** [03 · Two KLs](03_two_kls.ipynb)
