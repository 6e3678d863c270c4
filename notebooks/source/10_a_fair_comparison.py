# %% [markdown]
# # 10 · A fair comparison
#
# **Goal.** Read the study that ships with this course with a critical eye: seeds, intervals, paired tests, many
# comparisons at once, tuning budgets. Then design and run an ablation of your own.
#
# **Minutes.** 2 to run on two cores, 45 to work through.
#
# **Prerequisites.** The methods ([05](05_on_policy_distillation.ipynb), [07](07_grpo.ipynb), [08](08_tgpo.ipynb)). Mean
# and standard deviation; no statistics course.

# %%
import itertools
import shutil
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from scipy import stats

from tgpo_lab.exercises import check
from tgpo_lab.schedules import LinearDecay
from tgpo_lab.studies.figures import ranking
from tgpo_lab.studies.plan import Study, Variant
from tgpo_lab.studies.results import gather, load_results
from tgpo_lab.studies.runner import run_cell
from tgpo_lab.studies.statistics import mean_interval, sign_flip_p
from tgpo_lab.studies.tables import comparison, summary

sns.set_theme(style="ticks", palette="colorblind")
colors = sns.color_palette("colorblind")

# %% [markdown]
# ## What was run
#
# Every method of the library on *near* and on *far*, ten seeds each. A seed decides the prompts and all random numbers, and
# it is the same for all methods. Held-out accuracy is measured every five steps, of sampled responses. Two numbers are
# taken from each run:
#
# - `test_accuracy`: accuracy on 512 test prompts after the run: *how far* it got;
# - `area`: the mean of held-out accuracy over the run: *how soon* it got there, too.

# %%
study = load_results("headline")
print(
    study.about["runs_finished"],
    "runs:",
    study.runs["label"].nunique(),
    "methods,",
    study.runs["seed"].nunique(),
    "seeds",
)
settings = study.about["settings"]
print({name: settings[name] for name in ("steps", "prompts_per_step", "evaluate_every", "evaluation_prompts")})
far = study.runs[study.runs["pair"] == "far"]
far[["label", "seed", "accuracy_before", "test_accuracy", "area", "steps_to_50", "collapsed"]].head(3).round(3)

# %% [markdown]
# ## One seed is an anecdote
#
# Two of the methods, TGPO with its guidance annealed and TGPO with a constant weight. One dot is one run, a line joins the
# two runs of a seed.
#
# **Predict.** If you had run a single seed, which would you have called the better one?

# %%
pair_of = ("tgpo", "tgpo-constant")
wide = far[far["label"].isin(pair_of)].pivot(index="seed", columns="label", values="area")[list(pair_of)]
figure, axes = plt.subplots(figsize=(5.5, 3))
for a, b in wide.to_numpy():
    axes.plot([0, 1], [a, b], "o-" if a > b else "s--", color=colors[0] if a > b else colors[1], markersize=5)
axes.set(xlabel="method", ylabel="area (mean accuracy)", xticks=[0, 1], xticklabels=pair_of, xlim=(-0.4, 1.4))
plt.show()
difference = (wide["tgpo"] - wide["tgpo-constant"]).to_numpy()  # (10,)
print("differences, seed by seed:", np.round(difference, 3).tolist())
print(f"tgpo ahead in {int((difference > 0).sum())} of {len(difference)} seeds, mean {difference.mean():+.3f}")

# %% [markdown]
# Lines of both kinds. Whoever runs a single seed gets an answer, and which one depends on the seed.
#
# ## An interval
#
# The mean of ten differences is itself uncertain. Student's t interval says by how much: mean ± t · s/√n, with s the
# standard deviation of the differences and t = 2.26 for ten seeds at 95 %.

# %%
n = len(difference)
error = difference.std(ddof=1) / np.sqrt(n)
t = stats.t.ppf(0.975, n - 1)
print(
    f"by hand  {difference.mean():+.4f} from {difference.mean() - t * error:+.4f} to {difference.mean() + t * error:+.4f}"
)
interval = mean_interval(difference)
print(f"library  {interval.mean:+.4f} from {interval.low:+.4f} to {interval.high:+.4f}")

# %% [markdown]
# **Predict.** A popular alternative draws the differences again and again with replacement and takes the middle 95 % of the
# means (the percentile bootstrap). How often does each kind of interval contain the truth, with five seeds? We try it on
# numbers of which we know the mean.

# %%
random = np.random.default_rng(0)
hits = {"Student's t": 0, "percentile bootstrap": 0}
for _ in range(2000):
    sample = random.normal(0.0, 1.0, size=5)
    interval = mean_interval(sample)
    hits["Student's t"] += interval.low <= 0 <= interval.high
    means = random.choice(sample, size=(400, 5)).mean(-1)
    low, high = np.quantile(means, [0.025, 0.975])
    hits["percentile bootstrap"] += low <= 0 <= high
for name, count in hits.items():
    print(f"{name:22} contains the truth in {100 * count / 2000:.0f} % of 2,000 trials")

# %% [markdown]
# With few seeds the bootstrap is too sure of itself. That is why all intervals here are Student's t.
#
# ## Seed by seed, or all together?
#
# The two methods saw the same prompts with the same random numbers. So we compare them seed by seed (*paired*). Had we
# thrown the pairing away, the noise that both share would count against us.

# %%
a, b = wide["tgpo"].to_numpy(), wide["tgpo-constant"].to_numpy()
paired = difference.std(ddof=1) / np.sqrt(n)
unpaired = np.sqrt((a.var(ddof=1) + b.var(ddof=1)) / n)
print(f"standard error of the difference: paired {paired:.4f}, not paired {unpaired:.4f}")
print(f"correlation over seeds {np.corrcoef(a, b)[0, 1]:+.2f}")

# %% [markdown]
# How much pairing helps hangs on how alike a seed makes the two runs: with a correlation near 1 nearly all of the noise
# cancels, near 0 none of it.
#
# ## A test without assumptions
#
# If the two methods were equally good, each difference could just as well have had the other sign. There are 2¹⁰ = 1,024
# ways to choose the signs. How many of them give a mean as far from zero as ours? Their share is the p-value of the **sign-flip
# test**.

# %%
signs = np.array(list(itertools.product([1, -1], repeat=n)))  # (1024, 10)
means = (signs * difference).mean(-1)  # (1024,)
p = (np.abs(means) >= abs(difference.mean()) - 1e-12).mean()
print(f"by hand p = {p:.4f}, library p = {sign_flip_p(difference):.4f}, smallest possible {2 / 2**n:.4f}")
figure, axes = plt.subplots(figsize=(5.5, 2.6))
axes.hist(means, bins=40, color="0.75")
for side in (-1, 1):
    axes.axvline(side * difference.mean(), color=colors[1], linestyle="--")
axes.set(xlabel="mean difference in area, signs flipped", ylabel="sign patterns")
plt.show()

# %% [markdown]
# ### Exercise 10.1 · The sign-flip test
#
# *Difficulty 2 of 5 · 8 minutes.* Write a function that takes the differences (n,) and returns the two-sided p-value.
#
# <details><summary>Hint 1</summary>The observed signs are one of the patterns and count.</details>
# <details><summary>Hint 2</summary>Rounding can make an equal mean a tiny bit smaller: compare with a margin of
# 1e-12.</details>


# %%
def sign_flip(differences: np.ndarray) -> float:
    """Two-sided p-value that paired differences have mean zero."""
    ### BEGIN SOLUTION
    patterns = np.array(list(itertools.product([1, -1], repeat=len(differences))))
    means = (patterns * differences).mean(-1)
    return float((np.abs(means) >= abs(differences.mean()) - 1e-12).mean())
    ### END SOLUTION


# %%
check("10.1", sign_flip)

# %% [markdown]
# ## Twenty tests at once
#
# TGPO is compared with all other methods. **Predict.** If *no* method differed from it, how likely would at least one of 20
# tests give p < 0.05?

# %%
ps = np.random.default_rng(1).uniform(size=(2000, 20))  # where nothing differs, every p-value is as likely as any other
plain = (ps.min(-1) < 0.05).mean()
corrected = (stats.false_discovery_control(ps, axis=-1).min(-1) < 0.05).mean()
print(
    f"at least one p < 0.05: {plain:.2f} as they are (1 − 0.95²⁰ = {1 - 0.95**20:.2f}), {corrected:.2f} after correction"
)

# %% [markdown]
# The correction of Benjamini and Hochberg: sort the m p-values, multiply the k-th smallest by m/k, and let none be larger
# than one that comes after it. Of the differences that are called real, at most 5 % are then expected to be false.

# %% [markdown]
# ### Exercise 10.2 · Benjamini and Hochberg
#
# *Difficulty 3 of 5 · 10 minutes.* Write the correction: p-values (m,) in any order → adjusted p-values in the same order.
#
# <details><summary>Hint 1</summary><code>np.argsort</code> gives the order; put the results back with
# <code>result[order] = …</code>.</details>
# <details><summary>Hint 2</summary>"None larger than one that comes after it" is a running minimum from the end:
# <code>np.minimum.accumulate(x[::-1])[::-1]</code>. And no p-value is above 1.</details>


# %%
def adjusted(p_values: np.ndarray) -> np.ndarray:
    """Benjamini-Hochberg adjusted p-values: (m,) → (m,)."""
    ### BEGIN SOLUTION
    m = len(p_values)
    order = np.argsort(p_values)
    scaled = p_values[order] * m / np.arange(1, m + 1)
    result = np.empty(m)
    result[order] = np.minimum(np.minimum.accumulate(scaled[::-1])[::-1], 1)
    return result
    ### END SOLUTION


# %%
check("10.2", adjusted)

# %% [markdown]
# ## The same budget for everyone
#
# Before the study, every method got the same number of learning rates to try, on other seeds (study *tuning*). Here is what
# each would have reached on *far* with 1e-4 and with the best of the four.
#
# **Predict.** Someone uses 1e-4 for all, since it is the best for reverse KL and GRPO. What would they conclude about TGPO?

# %%
tuning = load_results("tuning").runs
tuned = tuning[tuning["pair"] == "far"].copy()
tuned["method"] = tuned["label"].str.rsplit(" ", n=1).str[0]
tuned["rate"] = tuned["label"].str.rsplit(" ", n=1).str[1].astype(float)
area = tuned.groupby(["method", "rate"])["area"].mean().unstack("rate")
shown = ["rkl", "grpo", "kdrl", "luffy", "sft", "tgpo", "tgpo-trust-horizon"]
figure, axes = plt.subplots(figsize=(7, 3))
places = np.arange(len(shown))
axes.bar(places - 0.2, area.loc[shown, 1e-4], 0.4, label="learning rate 1e-4")
axes.bar(places + 0.2, area.loc[shown].max(axis=1), 0.4, label="best of four", hatch="//")
axes.set(xlabel="method", ylabel="area (mean accuracy)", xticks=places)
axes.set_xticklabels(shown, rotation=20)
axes.legend(frameon=False)
plt.show()
print(area.loc[shown].round(2).to_string())

# %% [markdown]
# That guidance does nothing: at 1e-4 TGPO lies on the floor beside reverse KL. At 6e-4 it reaches 0.62. And at 1.2e-3 it is on
# the floor again. What reverse KL and GRPO reach does not hang on the rate.
#
# ## The verdict
#
# All methods on *far*: dots are means, bars 95 % intervals, small marks the seeds.

# %%
ranking(far)

# %%
keep = ["method", "test accuracy", "area", "steps to 80 %", "collapsed"]
best = far.groupby("label")["area"].mean().sort_values(ascending=False).index
table = summary(far).set_index("method").loc[best].reset_index()[keep]
print(table.to_string(index=False))

# %%
against = comparison(far, "tgpo", "test_accuracy")
named = ["sft", "rkl", "grpo++", "kdrl", "luffy", "tgpo-constant", "tgpo-unconditioned", "tgpo-trust-horizon"]
print(against[against["tgpo against"].isin(named)].drop(columns="pair").to_string(index=False))

# %% [markdown]
# Three groups. On the floor lies everything that only judges what the student wrote: reverse KL in all its forms, KDRL, and
# rewards alone; LUFFY, too, with one teacher's response in each group. In the middle are the divergences that ask for the
# teacher's whole distribution, but without a reward. On top are guidance in all its forms, and SFT.
#
# TGPO is ahead of all of the first two groups, in every seed. It is **not** ahead of SFT: after the run no difference is shown,
# and SFT is there sooner. Of its own relatives plain TGPO is not the best: with a trust horizon
# ([09](09_is_the_teacher_right.ipynb)) guidance is sooner in every seed.
#
# Look at the smallest p-value, and at how many seeds there are: with five, no p-value can be below 0.06, however clear the
# difference. Then intervals and the number of seeds won say more.
#
# And on *near*, where the student begins like its teacher one time in four:

# %%
near = study.runs[study.runs["pair"] == "near"]
ranking(near)

# %% [markdown]
# Nothing to choose: after the run all methods lie within two points of each other. Where sampling finds the teacher's way by
# itself, guidance is not needed. (The paper reports TGPO ahead in-family, too. That is not seen here.)
#
# ## An ablation of your own
#
# An ablation changes one thing and keeps all others. In the library it is a `Study`: a question, variants, seeds, settings.
# This one asks whether the size of w matters at the start, when no reward is found yet: 0.002 against 0.02. It is small, so
# that it runs here.
#
# **Predict.** Ten times the weight: how much sooner does the student leave the floor? [08](08_tgpo.ipynb) had a hint.


# %%
def weighted(weight: float) -> Variant:
    """TGPO with a weight that is annealed over 30 steps."""
    return Variant(f"w {weight:g}", "tgpo", {"weight": LinearDecay(weight, weight / 30)}, {"learning_rate": 6e-4})


ablation = Study(
    "my-ablation",
    "Does the size of w matter before any reward is found?",
    ("far",),
    (weighted(0.02), weighted(0.002)),
    seeds=(0, 1, 2),
    settings={
        "steps": 16, "prompts_per_step": 8, "evaluate_every": 4, "evaluation_prompts": 64, "evaluation_temperature": 1.0,
        "measured_positions": 256, "gradient_terms_every": 0, "checkpoint_every": 16,
    },
    references=("w 0.02",),
)  # fmt: skip
place = Path("../runs/notebooks/10")
shutil.rmtree(place, ignore_errors=True)
for cell in ablation.cells():
    run_cell(cell, place / "runs", place / "pairs")

# %% tags=["nbval-ignore-output"]
mine = gather(ablation, place / "runs", place / "results")
figure, axes = plt.subplots(figsize=(5.5, 2.8))
for (label, steps), line, color in zip(mine.steps.groupby("label"), ("-", "--"), colors, strict=False):
    for number, (_, run) in enumerate(steps.dropna(subset=["accuracy"]).groupby("seed")):
        axes.plot(run["step"], run["accuracy"], line, color=color, label=label if number == 0 else None)
axes.set(xlabel="step", ylabel="held-out accuracy", ylim=(0, 1))
axes.legend(frameon=False)
plt.show()
print(comparison(mine.runs, "w 0.02").drop(columns="pair").to_string(index=False))

# %% [markdown]
# In the run stored here the larger weight is sooner in all three seeds. So w does matter, although Adam divides by the size of the
# gradient ([08](08_tgpo.ipynb)): now and then a lucky guess is rewarded, and beside that gradient a small w drowns. Three
# seeds can not give a p-value below 0.25. What would you do before you told anyone?
#
# Now change one thing: `guidance="sampled"` in place of the weight, `gate="first_departure"`, another pair. With `tgpo-lab
# study NAME` the studies of the library run in the same way, over many processes; each finished run is a file, and nothing is
# lost when you stop it.
#
# ## Recap
#
# | idea | in the library |
# |---|---|
# | mean ± t·s/√n | `studies.statistics.mean_interval` |
# | paired sign-flip test, corrected over all comparisons | `studies.statistics.paired_comparison` |
# | a study: variants × pairs × seeds | `studies.plan.Study`, run by `tgpo-lab study` |
# | all results, and the paper's claims beside them | [docs/findings.md](../docs/findings.md) |
#
# - A single seed can show either order of two methods that are close.
# - Compare seed by seed where seeds share their random numbers, and look at the interval before the p-value.
# - Of twenty tests one is expected below 0.05 by chance: correct for it.
# - A method that was not tuned has not been compared.
#
# **Next:** [11 · Guidance explorer](11_guidance_explorer.ipynb)
