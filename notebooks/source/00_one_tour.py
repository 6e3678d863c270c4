# %% [markdown]
# # 00 · One tour
#
# **Goal.** See the whole story once, from the question to the answer and the doubt about the answer. Nothing has to be
# understood to the end yet; every stop says which notebook takes it apart.
#
# **Minutes.** 1 to run on two cores, 20 to work through.
#
# **Prerequisites.** You have used PyTorch and know that a language model predicts the next token.

# %%
import shutil

import seaborn as sns
import torch

from tgpo_lab import TrainConfig, evaluate, load_pair, plots, train
from tgpo_lab.evaluation import pair_prompts
from tgpo_lab.reports.sample_rollouts import annotate
from tgpo_lab.studies.figures import curves
from tgpo_lab.studies.results import load_results

torch.manual_seed(0)
sns.set_theme(style="ticks", palette="colorblind")

# %% [markdown]
# ## What this course is about
#
# *Teacher-Guided Policy Optimization for On-Policy Reasoning Distillation under Large Policy Divergence*
# ([arXiv 2605.13230](https://arxiv.org/abs/2605.13230), May 2026) is what these notebooks call **the paper**. It claims three
# things about language models of billions of weights: learning from a teacher by reverse KL is stable where teacher and
# student are alike and collapses where they are far apart; asking the teacher at every place *which token it would write*
# repairs that; and the method made of it, TGPO, is ahead of the others on mathematics. This course rebuilds the methods and
# looks at each claim on models that are small enough to look into. What is the paper's and what was added here is said
# where it comes up. All verdicts stand in [docs/findings.md](../docs/findings.md).
#
# Words that come up before they are explained: a **nat** is the unit of natural logarithms, one nat is a factor of e ≈ 2.7,
# four nats are a factor of 55. **KL** is the Kullback–Leibler divergence, a measure of how far apart two distributions are.
# The methods of this tour:
#
# | method | who writes | who judges | what is made more probable |
# |---|---|---|---|
# | SFT, supervised fine-tuning | the teacher | – | what the teacher wrote |
# | GRPO, group relative policy optimisation | the student, several responses to each prompt: a group | the right answer | responses better than their group |
# | reverse KL on the student's own responses; `rkl` in the figures | the student | the teacher, token by token | written tokens that the teacher likes more than the student does |
# | TGPO, teacher-guided policy optimisation | the student | the right answer, and the teacher | as GRPO, and the token that the teacher would write at each place |

# %% [markdown]
# ## A student and a teacher
#
# Both are language models, small enough for a laptop. The task: add three numbers. The teacher works the sum out column
# by column; the student answers at once. (The pair is called *far*.)

# %%
pair = load_pair("far")
prompts = pair_prompts(pair, "test")
for name, model in (("student", pair.student), ("teacher", pair.teacher)):
    answered = evaluate(pair, model, count=64)
    print(f"{name}: {int(answered.rewards.sum())} of 64 sums right")
    for row, text in zip(prompts.select(range(2)), answered.rollouts.texts(pair.tokenizer), strict=False):
        print(f"    {row['prompt']}{text}      (right: {row['answer']})")

# %% [markdown]
# The student is to become as good as its teacher. **Predict:** we write the teacher's first
# token, `<think>`, for the student and let it go on by itself. How many sums does it get right?

# %%
think = pair.tokenizer.convert_tokens_to_ids("<think>")
starts = [[*ids, think] for ids in pair.encode(prompts["prompt"][:64])]
with torch.no_grad():
    tokens = torch.tensor(starts)
    for _ in range(60):  # greedily, one token after the other
        tokens = torch.cat([tokens, pair.student(tokens).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
texts = [text.split(pair.tokenizer.eos_token)[0] for text in pair.tokenizer.batch_decode(tokens)]
right = sum(text.rpartition("#")[2] == answer for text, answer in zip(texts, prompts["answer"][:64], strict=True))
print(f"{right} of 64 right, for example {texts[0]}")

# %% [markdown]
# It *can* add. It does not lack much; it only never begins like that. So one would think that learning from this teacher is easy.
# ([02](02_a_task_a_teacher_a_student.ipynb))
#
# ## What the teacher says about the student's answer
#
# **On-policy distillation** lets the student write and the teacher judge every token. Below is one answer of the student.
# The number is how much more probable the token is under the student than under the teacher, in nats: above 0 the
# teacher disapproves. The last column is what the teacher would have written there, if that is another token. (`␣` is a
# space, `<eos>` the token that ends a response.)

# %%
(rollout,) = annotate(
    pair, pair.student, prompts["prompt"][:1], prompts["answer"][:1], max_new_tokens=80, temperature=1.0
)
print(f"{rollout.prompt}   right answer {rollout.answer}, reward {rollout.reward:.0f}")
for token in rollout.tokens:
    print(f"{token.text:10}{token.difference + 0.0:8.1f}     {token.proposal if token.differs else ''}")

# %% [markdown]
# Two very loud disapprovals, at the first token and at the end, and a smaller one at a digit. Now there are two things one
# can do with this table.
#
# - **Reverse KL** uses the middle column: write this less. But less of what, and instead more of what? The number does not
#   say. ([03](03_two_kls.ipynb), [04](04_the_gradient_of_reverse_kl.ipynb), [06](06_when_reverse_kl_fails.ipynb))
# - **TGPO** uses the last column as well: at the place where *you* are, write *that*. This column is called **guidance**.
#   ([08](08_tgpo.ipynb))
#
# ## Does it matter?
#
# Here are runs of a study that ships with this course: ten seeds of each method (runs that differ in prompts and random numbers alone), the same prompts, the same number of
# samples and updates, learning rates tuned with the same budget. GRPO learns from right and wrong answers alone
# ([07](07_grpo.ipynb)); SFT copies responses that the teacher wrote by itself. Lines are means over the seeds, bands the 95 %
# intervals of these means. Accuracy is measured on *held-out* prompts, on which nobody trained, and *sampled*: tokens are drawn
# at random with the student's probabilities. (The 5 of 64 above were *greedy*, always the most probable token.)
#
# **Predict.** Which lines leave the floor?

# %%
study = load_results("headline")
steps = study.steps[study.steps["pair"] == "far"]
shown = ["rkl", "grpo", "tgpo", "sft"]
curves(steps, shown)

# %%
runs = study.runs[study.runs["pair"] == "far"].set_index("label")
for label in shown:
    after = runs.loc[label, "test_accuracy"]
    print(f"{label:5} accuracy after the run: {after.mean():.2f}, from {after.min():.2f} to {after.max():.2f}")

# %% [markdown]
# Reverse KL and GRPO stay on the floor for all 45 steps. (With four times the steps and twice the prompts reverse KL leaves it,
# too, at about step 100, and ends where TGPO ends; GRPO does not: study *longer* in [docs/findings.md](../docs/findings.md).)
# TGPO leaves it, and then wavers: single seeds fall back for a
# measurement or two, which makes its band wide. SFT leaves the floor sooner: here copying the teacher's own responses works
# at least as well. Whether TGPO is *better*, and than what, is not settled by one picture ([10](10_a_fair_comparison.ipynb)).
#
# ## And where the two are close?
#
# The same study on the pair *near*: its student begins with `<think>` about one time in four by itself, and often opens it a
# word or two later, as in ` the<think>`. So four of five of its responses are right from the start.

# %%
curves(study.steps[study.steps["pair"] == "near"], shown)

# %% [markdown]
# All four rise from the first steps on; GRPO's line lies under TGPO's. Reverse KL is a few steps behind, and after fifteen they are hard to tell apart. A
# student that is close to its teacher needs no guidance ([05](05_on_policy_distillation.ipynb)).
#
# ## Once, live
#
# Twenty-five steps of TGPO and of reverse KL on *far*, from the same start, one seed, each with the learning rate that the
# tuning study found best for it. `tiny` is the name of the library's settings for these small models. The figure shows
# accuracy, the length of responses, and *agreement*: at how many places the student's most probable token is the teacher's.


# %%
def short_run(method: str, learning_rate: float):
    """A short training run."""
    output = f"../runs/notebooks/00/{method}"
    shutil.rmtree(output, ignore_errors=True)
    config = TrainConfig.preset(
        "tiny", method, student="far", steps=25, prompts_per_step=8, learning_rate=learning_rate, evaluation_prompts=64,
        evaluation_temperature=1.0, measured_positions=256, gradient_terms_every=0, checkpoint_every=25, output=output,
    )  # fmt: skip
    return train(config, show_progress=False)


live = {"reverse KL": short_run("rkl", 3e-4), "TGPO": short_run("tgpo", 6e-4)}

# %% tags=["nbval-ignore-output"]
plots.plot_runs(live, ["accuracy", "length", "agreement"])

# %% tags=["nbval-ignore-output"]
for name, run in live.items():
    (after,) = annotate(
        pair, run.student, prompts["prompt"][:1], prompts["answer"][:1], max_new_tokens=80, temperature=1.0
    )
    print(f"{name}: {after.prompt}{''.join(token.text for token in after.tokens)}")

# %% [markdown]
# The student of TGPO writes long responses now: it works sums out. That of reverse KL still answers at once.
#
# ## The doubt
#
# TGPO asks the teacher at places where the teacher would never have been. Is it right there? *Right* means: let the teacher go
# on from there, and it ends at the right answer. Its single proposals need not be. The digits that it proposed above are
# guesses, for it has not worked the sum out either. But after them it opens `<think>` and corrects itself:

# %%
begin = [*pair.encode(prompts["prompt"][:1])[0], *pair.tokenizer.encode(" the sum is #")]
with torch.no_grad():
    tokens = torch.tensor([begin])
    for _ in range(60):
        tokens = torch.cat([tokens, pair.teacher(tokens).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
text = pair.tokenizer.decode(tokens[0]).split(pair.tokenizer.eos_token)[0]
print(f"{text}      (right: {prompts['answer'][0]})")

# %% [markdown]
# Such continuations were measured: from nearly every beginning that this student writes, this teacher gets to the right answer
# ([02](02_a_task_a_teacher_a_student.ipynb)). There is another teacher, as good from scratch, that is lost on the student's
# words. We ask it about the same kind of answer.

# %%
fragile = load_pair("far-fragile")
print(f"this teacher from scratch: accuracy {evaluate(fragile, fragile.teacher, count=64).accuracy:.2f}")
(rollout,) = annotate(
    fragile, fragile.student, prompts["prompt"][:1], prompts["answer"][:1], max_new_tokens=80, temperature=1.0
)
for token in rollout.tokens:
    print(f"{token.text:10}{token.difference + 0.0:8.1f}     {token.proposal if token.differs else ''}")

# %% [markdown]
# Nearly every token is rejected, by 10 nats and more, and what this teacher proposes in the middle of the sentence are digits. It
# has never seen such a sentence. Guidance by this teacher teaches its confusion: TGPO learns late from it, and less surely. ([09](09_is_the_teacher_right.ipynb))
#
# ## Recap
#
# | question | where |
# |---|---|
# | What are tokens, policies, log-probabilities? | [01](01_policies_and_tokens.ipynb) |
# | Who are student and teacher, and how far apart? | [02](02_a_task_a_teacher_a_student.ipynb) |
# | What does reverse KL do, and why "reverse"? | [03](03_two_kls.ipynb), [04](04_the_gradient_of_reverse_kl.ipynb) |
# | How does on-policy distillation work, when does it fail? | [05](05_on_policy_distillation.ipynb), [06](06_when_reverse_kl_fails.ipynb) |
# | What do rewards alone teach? | [07](07_grpo.ipynb) |
# | How does TGPO work, and on what does it rest? | [08](08_tgpo.ipynb), [09](09_is_the_teacher_right.ipynb) |
# | Is it really better, and how would one know? | [10](10_a_fair_comparison.ipynb) |
# | What does the teacher say to *my* rollout? | [11](11_guidance_explorer.ipynb) |
# | And with real models? | [12](12_to_a_real_pair.ipynb) |
#
# - A student can have a skill and never use it.
# - A judgement of what was written does not say what to write instead; guidance does.
# - Whether guidance helps hangs on whether the teacher is right where the student goes.
#
# **Next:** [01 · Policies and tokens](01_policies_and_tokens.ipynb)
