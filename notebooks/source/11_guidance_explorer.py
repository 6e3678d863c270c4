# %% [markdown]
# # 11 · Guidance explorer
#
# **Goal.** Look into any rollout, token by token: what the teacher says, what each method would do to the student there,
# and which single token unlocks the answer. With the mouse or the keyboard, and from Python.
#
# **Minutes.** 1 to run on two cores, 20 to work through.
#
# **Prerequisites.** [08](08_tgpo.ipynb). Run the notebook: a saved page shows the tokens alone in place of the explorer,
# and tables in place of the panels.

# %%
import shutil
from pathlib import Path

import torch

from tgpo_lab import TrainConfig, load_pair, train
from tgpo_lab.checkpoints import checkpoint_folders
from tgpo_lab.explorer.guidance_view import advantages_by_prompt, view_guidance
from tgpo_lab.models.pairs import load_model
from tgpo_lab.sampling.cached_sampling import sample_responses
from tgpo_lab.tasks.rewards import marked_answer, score
from tgpo_lab.widgets import GuidanceExplorer, kl_panel, schedule_panel, softmax_panel

torch.manual_seed(0)
pair = load_pair("far")

# %% [markdown]
# ## First the numbers, without a widget
#
# Eight responses of the far student to one prompt, a group of GRPO, and everything that there is to say about their tokens.
# `view_guidance` asks student and teacher; each quantity comes from the same library functions as the training.

# %%
prompt, answer = "91+47+11=", "149"
rollouts = sample_responses(
    pair.student, pair.encode([prompt]), 80, pair.end_tokens, pair.pad_token, samples_per_prompt=8,
    generator=torch.Generator().manual_seed(0), vocabulary_size=pair.vocabulary_size,
)  # fmt: skip
rewards = score(rollouts, [answer] * 8, marked_answer, pair.tokenizer)
view = view_guidance(pair, rollouts, advantages=advantages_by_prompt(rollouts, rewards))
print("rewards", rewards.tolist())
table = view.frame(pair, 0)
table[["token", "proposal", "student_logprob", "teacher_logprob", "token_reward", "agreement"]].round(1)

# %% [markdown]
# (`agreement` is about the student's *most probable* token and not the one that was written: a token can be the teacher's proposal
# and still have no agreement.)
#
# **Predict.** Which of the four methods, reverse KL sampled or exact, GRPO and TGPO, would change the student most at the first token, and why does one of them do
# nothing at all? (`weight_…` is the length of the method's update of the logits there; the sign says whether it raises or
# lowers the token that was written.)

# %%
table[["token", *(column for column in table if column.startswith("weight"))]].round(5).replace(-0.0, 0.0)

# %% [markdown]
# TGPO, by far. GRPO does nothing: all eight rewards are 0, so all advantages are. Reverse KL has its largest advantage at the first token, −14
# nats, and moves next to nothing there: its update is the advantage times $e_{y_t}-\pi_\theta$, and the student is so sure of
# ` the` that this difference is almost zero. It spends its strength on the digits. Guidance is about *another* token,
# `<think>`, which has all the room to rise: its update has the length w·√2.
#
# ## The explorer
#
# To look at, with eight other responses to the same prompt. Colour is a quantity of your choice; above a token stands what the teacher would have written. Point at
# a token for details, click to lock it; `T` or *Take* writes the teacher's token there and lets the student go on from it.
#
# **Try.** Take the teacher's token at one of the digits of an answer, then at the first place. Which of the two unlocks the
# answer?

# %% tags=["nbval-ignore-output"]
explorer = GuidanceExplorer(pair, prompt, answer=answer)
explorer

# %% [markdown]
# What you do on the page can be read from Python, and the other way round. Here is the experiment as code, on the first
# response: at every place where the teacher would write another token, take it, let the student go on eight times, and count
# the right answers.

# %%
first = explorer.response()
written = first.frame()
places = written.loc[written["token_id"] != written["proposal_id"], "position"]
print(f"{first.prompt}{first.text}   reward {first.reward:.0f}")
for place in places:
    branch = explorer.take_token(place, response=first.name)
    taken = pair.tokenizer.decode([branch.branch.token])
    print(f"place {place}, {taken!r:10} taken: {branch.right_continuations} of {branch.branch.continuations} right, "
          f"for example{branch.text}")  # fmt: skip

# %% [markdown]
# `<think>` unlocks the answer, at the first place and just as well in place of the end, the two places where the teacher
# proposes it; a digit does not. The skill needs one token.
#
# ## A training run, step by step
#
# Two short runs from the same start, with every fifth step kept. The slider chooses the step whose student is shown, the two
# methods stand side by side.
#
# **Look for** the step at which TGPO's responses change, and where in a response they change first.

# %%
runs = {}
for name, method, rate in (("RKL", "rkl", 3e-4), ("TGPO", "tgpo", 6e-4)):
    runs[name] = f"../runs/notebooks/11/{method}"
    shutil.rmtree(runs[name], ignore_errors=True)
    config = TrainConfig.preset(
        "tiny", method, student="far", steps=20, prompts_per_step=8, learning_rate=rate, evaluate_every=0,
        measured_positions=256, gradient_terms_every=0, checkpoint_every=5, keep_checkpoints=0, output=runs[name],
    )  # fmt: skip
    train(config, show_progress=False)

# %% tags=["nbval-ignore-output"]
history = GuidanceExplorer(pair, runs, prompt=prompt, answer=answer)
history.step = 20
history

# %% [markdown]
# Without the page: the first response of each kept student, to the same prompt with the same random numbers.

# %% tags=["nbval-ignore-output"]
for name, folder in runs.items():
    for checkpoint in checkpoint_folders(Path(folder) / "checkpoints"):
        student = load_model(checkpoint, torch.float32, "cpu")
        one = sample_responses(
            student, pair.encode([prompt]), 80, pair.end_tokens, pair.pad_token,
            generator=torch.Generator().manual_seed(0), vocabulary_size=pair.vocabulary_size,
        )  # fmt: skip
        print(f"{name:5} {checkpoint.name}  {one.texts(pair.tokenizer)[0]}")

# %% [markdown]
# In the run stored here TGPO's response changes at its *end* first: after the terse answer a `<think>` opens the worked way.
#
# `history.save_html("page.html")` writes all steps into one file that opens anywhere, without Python and without a network:
# to send to someone, or to keep beside a result.
#
# ## Three small panels
#
# **Two KLs** ([03](03_two_kls.ipynb)): drag the distributions. Make the student's first token rare and watch which of the two
# sums notices.

# %% tags=["nbval-ignore-output"]
kl_panel()

# %% [markdown]
# **One position under three losses** ([08](08_tgpo.ipynb)): how each update of the logits depends on the temperature, on w, and
# on how probable the teacher's token is. (In the saved table sampled reverse KL looks many times as strong as TGPO. But its update is
# at the student's habit; in the row of the teacher's token it is the other way round. Adam, too, takes the size out of it.)

# %% tags=["nbval-ignore-output"]
softmax_panel()

# %% [markdown]
# **The schedule** of w beside what happened in a run: try another schedule on it.

# %% tags=["nbval-ignore-output"]
schedule_panel(runs["TGPO"])

# %% [markdown]
# ## Recap
#
# | what | in the library |
# |---|---|
# | log πT(y_t) − log πθ(y_t), proposals, weights of each method | `explorer.guidance_view.view_guidance`, as a table `view.frame` |
# | one update −∂L/∂z at a position | `explorer.logit_updates.logit_updates` |
# | take a token, go on from it | `GuidanceExplorer.take_token`, without a widget `explorer.exploration.Exploration` |
# | all of it, on the page | `widgets.GuidanceExplorer`, [docs/explorer.md](../docs/explorer.md) |
#
# - Everything the explorer shows is a number that you can have as a table.
# - One token decides on *far*, and the explorer finds it by taking it.
#
# **Next:** [12 · To a real pair on a GPU](12_to_a_real_pair.ipynb)
