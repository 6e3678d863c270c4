# %% [markdown]
# # 03 · Two KLs
#
# **Goal.** Tell forward and reverse KL apart: by their formulas, by what they make of a student that cannot copy its
# teacher, and by the gradient that reaches a token the student hardly ever writes.
#
# **Minutes.** 1 to run on two cores, 35 to work through.
#
# **Prerequisites.** PyTorch tensors, softmax and cross-entropy. [01](01_policies_and_tokens.ipynb) helps.

# %%
import matplotlib.pyplot as plt
import seaborn as sns
import torch

from tgpo_lab.exercises import check
from tgpo_lab.losses import forward_kl_per_token, reverse_kl_per_token
from tgpo_lab.widgets import kl_panel

torch.manual_seed(0)
sns.set_theme(style="ticks", palette="colorblind")

# %% [markdown]
# ## Two questions about the same two distributions
#
# A position of a response has one distribution under the student, πθ, and one under the teacher, πT, over a vocabulary
# of V tokens. There are two ways to ask how far apart they are:
#
# $$\text{forward}\quad \mathrm{KL}(\pi_T\|\pi_\theta)=\sum_v \pi_T(v)\,\log\frac{\pi_T(v)}{\pi_\theta(v)}
# \qquad\qquad \text{reverse}\quad \mathrm{KL}(\pi_\theta\|\pi_T)=\sum_v \pi_\theta(v)\,\log\frac{\pi_\theta(v)}{\pi_T(v)}$$
#
# The only difference is who holds the pen: forward KL weighs every token by how often the *teacher* writes it, reverse
# KL by how often the *student* does. *Forward* is the usual direction: the data hold the pen, here the teacher, as they do in
# cross-entropy, which is the forward KL plus the entropy of the data. *Reverse* has the two swapped.

# %%
tokens = ["<think>", "4", "7", "1", "+", "…"]
student = torch.tensor([0.001, 0.55, 0.25, 0.15, 0.04, 0.009])  # (V,) answers at once
teacher = torch.tensor([0.960, 0.02, 0.01, 0.006, 0.001, 0.003])  # (V,) thinks first

figure, axes = plt.subplots(figsize=(6, 2.6))
places = torch.arange(len(tokens))
axes.bar(places - 0.2, student, 0.4, label="student πθ")
axes.bar(places + 0.2, teacher, 0.4, label="teacher πT", hatch="//")
axes.set(xlabel="next token", ylabel="probability", xticks=places, xticklabels=tokens)
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# **Predict.** Which of the two sums is larger here? Which single token contributes most to it? Think of each sum as a
# weighted mean of a log-ratio before you run the next cell.

# %%
log_ratio = (teacher / student).log()  # (V,) above 0 where the teacher likes the token more
forward_parts = teacher * log_ratio
reverse_parts = student * -log_ratio
for token, forward_part, reverse_part in zip(tokens, forward_parts, reverse_parts, strict=True):
    print(f"{token:8} forward {forward_part:+.3f}   reverse {reverse_part:+.3f}")
print(f"sum      forward {forward_parts.sum():+.3f}   reverse {reverse_parts.sum():+.3f}   (nats)")

# %% [markdown]
# Nearly all of the forward KL comes from `<think>`, the token that the teacher wants. In the reverse KL that token has
# almost no part: the student gives it 0.001, so it is weighed by 0.001. What the reverse KL is made of is everything
# the student *does* write and the teacher would not.
#
# The library computes both from logits, for all positions of a batch at once. The letters are those of
# [01](01_policies_and_tokens.ipynb): B rows, T positions, V tokens. Here B and T are 1.

# %%
student_logits, teacher_logits = student.log().view(1, 1, -1), teacher.log().view(1, 1, -1)  # (1, 1, V)
print(f"by hand  forward {forward_parts.sum():.4f}   reverse {reverse_parts.sum():.4f}")
print(
    f"library  forward {forward_kl_per_token(student_logits, teacher_logits).item():.4f}   "
    f"reverse {reverse_kl_per_token(student_logits, teacher_logits).item():.4f}"
)

# %% [markdown]
# Now with distributions to drag, over four tokens. (A saved page shows a table in place of the sliders.) **Try.** Token 4 is the one
# that the teacher wants: push *student 4* all the way to the left. Which of the sums keeps growing, and which one hardly
# notices? Then the other way round: put *student 4* back, and push *teacher 1* to the left, the student's favourite.

# %% tags=["nbval-ignore-output"]
kl_panel()

# %% [markdown]
# With *student 4* at the left end the forward sum has doubled, from 3.6 to 7.3 nats, and the reverse one has hardly moved, from 3.3
# to 3.4: the token is weighed by the student, who does not write it. With *teacher 1* at the left end it is the reverse sum that
# grew, from 3.3 to 8.1, and the forward one that stayed (3.6 and 3.8).

# %% [markdown]
# ### Exercise 03.1 · Both KLs from logits
#
# *Difficulty 1 of 5 · 5 minutes.* Write a function that takes logits of student and teacher, each (B, T, V), and
# returns the forward and the reverse KL of every position, each (B, T), in nats.
#
# <details><summary>Hint 1</summary>Turn logits into log-probabilities with <code>log_softmax(-1)</code>; a logarithm of
# a softmax can be −∞ for large logits.</details>
# <details><summary>Hint 2</summary>The weight of each sum is the <code>exp()</code> of one of the two
# log-probabilities. Sum over the last dimension only.</details>


# %%
def both_kls(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Forward and reverse KL of each position: (B, T, V) twice → (B, T) twice."""
    ### BEGIN SOLUTION
    student, teacher = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    forward = (teacher.exp() * (teacher - student)).sum(-1)
    reverse = (student.exp() * (student - teacher)).sum(-1)
    return forward, reverse
    ### END SOLUTION


# %%
check("03.1", both_kls)

# %% [markdown]
# ## What a student makes of a teacher that it cannot copy
#
# Let the teacher's distribution over 60 values have two peaks, and the student's only one: it can choose where its peak
# is and how wide. No choice is right, so the divergence decides what goes wrong.

# %%
values = torch.arange(60.0)


def peak(center: torch.Tensor, width: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of one peak: (…) and (…) → (…, 60)."""
    return (-0.5 * ((values - center[..., None]) / width[..., None]) ** 2).log_softmax(-1)


two_peaks = torch.logsumexp(
    torch.stack(
        [
            peak(torch.tensor(15.0), torch.tensor(3.0)) + torch.tensor(0.6).log(),
            peak(torch.tensor(44.0), torch.tensor(4.0)) + torch.tensor(0.4).log(),
        ]
    ),
    dim=0,
)  # (60,) log-probabilities

# %% [markdown]
# **Predict.** Where does the student's peak go, and how wide is it, if the forward KL is to be smallest? And for the
# reverse KL? Three candidates: on the left peak, on the right peak, across both.
#
# The next cell tries every centre and width on a grid and keeps the best of each.

# %%
centers, widths = torch.meshgrid(torch.linspace(0, 59, 119), torch.linspace(1, 25, 97), indexing="ij")
students = peak(centers, widths)  # (119, 97, 60)
divergence = {
    "forward": forward_kl_per_token(students, two_peaks.expand_as(students)),  # (119, 97)
    "reverse": reverse_kl_per_token(students, two_peaks.expand_as(students)),
}
best = {}
for name, table in divergence.items():
    row, column = divmod(int(table.argmin()), table.shape[1])
    best[name] = students[row, column]
    print(
        f"{name}: centre {centers[row, column]:.1f}, width {widths[row, column]:.1f}, "
        f"divergence {table[row, column]:.2f} nats"
    )

# %%
figure, axes = plt.subplots(figsize=(6.5, 2.8))
axes.fill_between(values, two_peaks.exp(), color="0.85", label="teacher")
axes.plot(values, best["forward"].exp(), label="student, smallest forward KL", linestyle="--")
axes.plot(values, best["reverse"].exp(), label="student, smallest reverse KL")
axes.set(xlabel="value", ylabel="probability", ylim=(0, None))
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# The forward KL *covers*: where the teacher writes and the student does not, its log-ratio is large and heavily weighed,
# so the student spreads over both peaks and over the gap between them, where the teacher hardly ever is. The reverse KL
# *seeks a mode*: values the student leaves out cost it nothing, so it gives up the smaller peak.
#
# That is why reverse KL is liked for distillation: a small student is better off doing one of the teacher's ways well.
# But the grid search above looked everywhere. Training does not.

# %% [markdown]
# ## The same choice by gradient
#
# Now the student walks downhill from where it is. We start it on the *right* peak, the smaller one.
#
# **Predict.** Which of the two students ends near the grid's best?


# %%
def walk(kind: str, center: float, width: float, steps: int = 1000) -> list[float]:
    """Centre of the student's peak along gradient descent on one of the two KLs."""
    position = torch.tensor([center, width], requires_grad=True)
    optimizer = torch.optim.Adam([position], lr=0.2)
    loss_of = {"forward": forward_kl_per_token, "reverse": reverse_kl_per_token}[kind]
    path = []
    for _ in range(steps):
        path.append(position[0].item())
        loss = loss_of(peak(position[0], position[1].clamp(min=1)), two_peaks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return path


figure, axes = plt.subplots(figsize=(6.5, 2.8))
for kind, line in (("forward", "--"), ("reverse", "-")):
    path = walk(kind, center=46.0, width=4.0)
    axes.plot(path, line, label=f"{kind} KL")
    print(f"{kind}: from centre 46.0 to centre {path[-1]:.1f}")
axes.axhline(15, color="0.6", linewidth=1)
axes.text(5, 16, "larger peak of the teacher", color="0.4")
axes.set(xlabel="step", ylabel="centre of the peak (value)", ylim=(0, 59))
axes.legend(frameon=False, loc="lower right")
plt.show()

# %% [markdown]
# Forward KL ends near the grid's best, across both peaks. Reverse KL stays on the peak where it started. From there it cannot know
# of the other one: it is weighed by the student's own probabilities, and those are almost zero at the other peak. On the right
# peak the divergence is −log 0.4 = 0.92 nats, on the left one −log 0.6 = 0.51; the right one is worse, and still every small
# step away from it raises the loss. Keep this picture. The whole course is about
# a student that starts on the wrong peak.

# %% [markdown]
# ## How much of the gradient reaches the teacher's token?
#
# For a softmax over logits $z$, both gradients can be written down:
#
# $$\frac{\partial\,\mathrm{KL}(\pi_T\|\pi_\theta)}{\partial z_v}=\pi_\theta(v)-\pi_T(v)
# \qquad
# \frac{\partial\,\mathrm{KL}(\pi_\theta\|\pi_T)}{\partial z_v}
# =\pi_\theta(v)\Big(\log\tfrac{\pi_\theta(v)}{\pi_T(v)}-\mathrm{KL}(\pi_\theta\|\pi_T)\Big)$$
#
# (For the second: $\partial\pi_\theta(u)/\partial z_v=\pi_\theta(u)(1[u=v]-\pi_\theta(v))$, and what the logarithm's own
# derivative adds is 1 for every token, which cancels.)
#
# It has $\pi_\theta(v)$ in front of everything. Take `<think>` at e⁻⁹: its log-ratio is about −9 and the KL about 3, so the
# bracket is −12 and the gradient −12·e⁻⁹ ≈ −0.0015. Descent raises the logit by that little.

# %% [markdown]
# ### Exercise 03.2 · The gradient of reverse KL, written down
#
# *Difficulty 2 of 5 · 10 minutes.* Write the right-hand formula as a function of logits, without autograd.
#
# <details><summary>Hint 1</summary>Compute the log-ratio of every token first, then its mean under the student: that
# mean <em>is</em> the reverse KL.</details>
# <details><summary>Hint 2</summary>The entries must add up to zero over the vocabulary: raising all logits by the same
# amount changes nothing.</details>


# %%
def reverse_kl_gradient(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """Gradient of KL(πθ‖πT) by the student's logits: (B, T, V) twice → (B, T, V), each position on its own."""
    ### BEGIN SOLUTION
    student, teacher = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    ratio = student - teacher  # (B, T, V)
    kl = (student.exp() * ratio).sum(-1, keepdim=True)  # (B, T, 1)
    return student.exp() * (ratio - kl)
    ### END SOLUTION


# %%
check("03.2", reverse_kl_gradient)

# %% [markdown]
# Now the first picture again: a student that gives the teacher's token `<think>` a small probability. We let that
# probability fall from e⁻¹ to e⁻¹⁶ and look at the pull on its logit, by autograd, so that no formula of ours is trusted.
#
# **Predict.** On a logarithmic axis, what are the two curves?

# %%
openings = torch.arange(1.0, 17.0)  # −log πθ(<think>) in nats
pull = {"forward KL": [], "reverse KL": []}
for nats in openings:
    rest = 1 - torch.exp(-nats)
    probabilities = torch.cat([torch.exp(-nats).view(1), rest * student[1:] / student[1:].sum()])
    logits = probabilities.log().requires_grad_()
    for name, loss_of in (("forward KL", forward_kl_per_token), ("reverse KL", reverse_kl_per_token)):
        (gradient,) = torch.autograd.grad(loss_of(logits, teacher.log()), logits)
        pull[name].append(-gradient[0].item())  # descent raises the logit by this much

figure, axes = plt.subplots(figsize=(6.5, 2.8))
for (name, points), line, marker in zip(pull.items(), ("--", "-"), ("s", "o"), strict=True):
    axes.plot(openings, points, line, marker=marker, markersize=4, label=name)
axes.set(xlabel="−log πθ(<think>) before the step (nats)", ylabel="pull on its logit", yscale="log")
axes.legend(frameon=False)
plt.show()
for place in (0, 8, 12):
    print(
        f"at e^−{openings[place]:.0f}: forward {pull['forward KL'][place]:.2g}, reverse {pull['reverse KL'][place]:.2g}"
    )

# %% [markdown]
# Forward KL pulls with nearly full strength, however small the probability. The pull of reverse KL falls with the student's own
# probability, nearly in a straight line on this axis: from e⁻¹ to e⁻⁹, eight nats, it loses nearly three powers of ten.
#
# And this was the *exact* reverse KL, which sees the whole vocabulary. What is used in practice sees only tokens that the
# student has sampled: [04](04_the_gradient_of_reverse_kl.ipynb) is about that.

# %% [markdown]
# ## Recap
#
# | equation | in the library |
# |---|---|
# | KL(πT‖πθ), forward | `losses.forward_kl`, per position `losses.forward_kl_per_token` |
# | KL(πθ‖πT), reverse | `losses.reverse_kl`, per position `losses.reverse_kl_per_token` |
# | a family that has both as its limits, the generalised Jensen–Shannon divergence (JSD) of [10](10_a_fair_comparison.ipynb) | `losses.generalized_jsd` (β = 0 forward, β = 1 reverse) |
#
# The panel is `widgets.kl_panel()`.
#
# - Forward KL is weighed by the teacher, reverse KL by the student.
# - A student that can only do one thing covers under forward KL, and chooses one mode under reverse KL.
# - Downhill, reverse KL chooses the mode it is at. Its pull towards a token is nearly proportional to how often the student
#   writes that token already.
#
# **Next:** [04 · The gradient of reverse KL](04_the_gradient_of_reverse_kl.ipynb)
