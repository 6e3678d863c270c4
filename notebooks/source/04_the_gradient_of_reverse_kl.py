# %% [markdown]
# # 04 · The gradient of reverse KL
#
# **Goal.** Know which losses on sampled tokens have the gradient of reverse KL, which have another one, and which teach
# nothing; and know how noisy the right one is, what a baseline does about it, and what it cannot do.
#
# **Minutes.** 1 to run on two cores, 80 to work through.
#
# **Prerequisites.** [03](03_two_kls.ipynb): both KLs and their gradients. Autograd, `detach`.

# %%
import matplotlib.pyplot as plt
import seaborn as sns
import torch

from tgpo_lab.exercises import check
from tgpo_lab.losses import policy_gradient_loss, reverse_kl, reverse_kl_advantage, sampled_kl, token_logprobs

torch.manual_seed(0)
sns.set_theme(style="ticks", palette="colorblind")

# %% [markdown]
# ## Everything can be listed
#
# A gradient estimated from samples is a random quantity, and it takes many samples to see what it is on average. Here
# the vocabulary has five tokens. So instead of sampling we list all five, compute what each would give, and weigh it
# with the probability that it is drawn. There is no sampling error left: what comes out is the **expected gradient**,
# in double precision.
#
# One position, a student that rarely writes `<think>`, and a teacher that nearly always does:

# %%
tokens = ["<think>", "4", "7", "1", "+"]
student = torch.tensor([0.02, 0.50, 0.25, 0.15, 0.08], dtype=torch.float64).log()  # (V,) logits
teacher = torch.tensor([0.80, 0.05, 0.10, 0.03, 0.02], dtype=torch.float64).log()  # (V,)
another_teacher = torch.tensor([0.01, 0.01, 0.01, 0.01, 0.96], dtype=torch.float64).log()  # (V,) always writes +


def show(**gradients: torch.Tensor) -> None:
    """Gradients (V,) as rows of a table."""
    print(" " * 24 + "".join(f"{token:>9}" for token in tokens))
    for name, gradient in gradients.items():
        print(f"{name.replace('_', ' '):24}" + "".join(f"{round(x, 3) + 0.0:9.3f}" for x in gradient.tolist()))


# %% [markdown]
# First the gradient that we want, by the student's logits: from the whole distribution by autograd, and by the formula
# of [03](03_two_kls.ipynb).


# %%
def exact_reverse_kl(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """KL(πθ‖πT): (V,) twice → a scalar."""
    log_ratio = student_logits.log_softmax(-1) - teacher_logits.log_softmax(-1)
    return (student_logits.softmax(-1) * log_ratio).sum()


logits = student.clone().requires_grad_()
(wanted,) = torch.autograd.grad(exact_reverse_kl(logits, teacher), logits)
# These logits are logarithms of probabilities already, so log_softmax would change nothing here.
by_formula = student.exp() * (student - teacher - exact_reverse_kl(student, teacher))
show(by_autograd=wanted, by_formula=by_formula)

# %% [markdown]
# Descent subtracts the gradient, so `<think>` and `7` go up and `4` goes down.
#
# The whole distribution of the teacher, at every position, is a lot to compute, to send and to keep when a vocabulary
# has 150,000 tokens. Often only one number a position is there: the log-probability of the token that the student
# sampled. Can the same gradient be had from that?

# %% [markdown]
# ## The estimate that measures well and teaches nothing
#
# The log-ratio of the sampled token, $d=\log\pi_\theta(y)-\log\pi_T(y)$, has the reverse KL for its mean: that is just
# the definition. It is called **k1**, and as a measurement it is fine.
#
# So why not use it as a loss: sample a token, compute d, call `backward()`?
#
# **Predict.** What is the expected gradient of this loss? What becomes of it if the teacher is exchanged for another
# one?


# %%
def log_ratio(student_logits: torch.Tensor, teacher_logits: torch.Tensor, token: int) -> torch.Tensor:
    """d of one token."""
    return student_logits.log_softmax(-1)[token] - teacher_logits.log_softmax(-1)[token]


def expected_gradient(loss, student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """Gradient of ``loss(student_logits, teacher_logits, token)``, weighed by how often each token is drawn: (V,)."""
    logits = student_logits.clone().requires_grad_()
    weights = logits.softmax(-1).detach()  # sampling is not differentiated
    total = sum(weight * loss(logits, teacher_logits, token) for token, weight in enumerate(weights))
    return torch.autograd.grad(total, logits)[0]


mean_d = sum(student.exp()[v] * log_ratio(student, teacher, v) for v in range(5))
print(f"mean of k1 {mean_d:.4f}, reverse KL {exact_reverse_kl(student, teacher):.4f} nats")
show(
    wanted=wanted,
    k1_as_a_loss=expected_gradient(log_ratio, student, teacher),
    with_another_teacher=expected_gradient(log_ratio, student, another_teacher),
)

# %% [markdown]
# Zero, whoever the teacher is. And it is not that the teacher cancels out on average. It is not there in the first
# place: $\log\pi_T(y)$ is a number without gradient, so $\nabla d=\nabla\log\pi_\theta(y)$ for every single sample.
# What is left has mean zero:
#
# $$\sum_v\pi_\theta(v)\,\nabla\log\pi_\theta(v)=\sum_v\nabla\pi_\theta(v)=\nabla\,1=0.$$
#
# What went wrong? The reverse KL depends on θ twice, in the log-ratio and in how often each token is drawn:
#
# $$\nabla\sum_v\pi_\theta(v)\,d_v=\underbrace{\sum_v \nabla\pi_\theta(v)\;d_v}_{\text{the whole gradient}}
# +\underbrace{\sum_v\pi_\theta(v)\,\nabla d_v}_{=\,0}.$$
#
# `backward()` on a sample sees only the second term. It is an easy mistake to make: nothing crashes, and the logged value of
# the "KL loss" is even right.

# %% [markdown]
# ## k2 and k3 as losses
#
# Two other estimates are in use: $k_2=\tfrac12 d^2$ and $k_3=e^{-d}-1+d$. Unlike k1 they are never negative.

# %%
d = torch.linspace(-3, 3, 121, dtype=torch.float64)
figure, axes = plt.subplots(figsize=(6, 3))
for name, line in (("k1", "-"), ("k2", "--"), ("k3", ":")):
    axes.plot(d, sampled_kl(d, torch.zeros_like(d), name), line, linewidth=2, label=name)
axes.axhline(0, color="0.7", linewidth=1)
axes.set(xlabel="d = log πθ(y) − log πT(y) (nats)", ylabel="estimate (nats)", ylim=(-4.8, 8))
axes.text(-2.9, -4.3, "← teacher likes it more", color="0.4", fontsize=10)
axes.text(2.9, -4.3, "student likes it more →", color="0.4", fontsize=10, ha="right")
axes.legend(frameon=False, loc="upper center")
plt.show()

# %% [markdown]
# **Predict.** Differentiated as losses, is one of them right? For each, $\nabla k=k'(d)\,\nabla\log\pi_\theta(y)$; so
# look at the slopes of the three curves.


# %%
def k2(student_logits: torch.Tensor, teacher_logits: torch.Tensor, token: int) -> torch.Tensor:
    """½d²"""
    return 0.5 * log_ratio(student_logits, teacher_logits, token) ** 2


def k3(student_logits: torch.Tensor, teacher_logits: torch.Tensor, token: int) -> torch.Tensor:
    """e^−d − 1 + d"""
    d = log_ratio(student_logits, teacher_logits, token)
    return (-d).exp() - 1 + d


show(
    reverse_KL_exactly=wanted,
    k2_as_a_loss=expected_gradient(k2, student, teacher),
    forward_KL_exactly=student.softmax(-1) - teacher.softmax(-1),
    k3_as_a_loss=expected_gradient(k3, student, teacher),
)

# %% [markdown]
# k2 has the gradient of the reverse KL, and k3 that of the *forward* KL. The slopes say why. That of k2 is d, so its
# expected gradient is $\sum\pi_\theta\,d\,\nabla\log\pi_\theta=\sum d\,\nabla\pi_\theta$, the first term above. That of
# k3 is $1-e^{-d}=1-\pi_T/\pi_\theta$: the 1 has mean zero, and
# $-\sum\pi_\theta\frac{\pi_T}{\pi_\theta}\nabla\log\pi_\theta$ is the gradient of the cross-entropy with the teacher.
# The slope of k1 is 1.
#
# So the better estimate of a number need not be the better loss. For *measuring* the reverse KL, k1 and k3 are right on
# average, and k2 is not. (For k3: the mean of $e^{-d}=\pi_T/\pi_\theta$ under πθ is $\sum\pi_T=1$, so what is added to d has the
# mean 0.)

# %%
for name, loss in (("k1", log_ratio), ("k2", k2), ("k3", k3)):
    mean = sum(student.exp()[v] * loss(student, teacher, v) for v in range(5))
    print(f"mean of {name} {mean:.3f}   (reverse KL {exact_reverse_kl(student, teacher):.3f})")

# %% [markdown]
# ## The score function
#
# There is a direct way to the first term. Since $\nabla\pi_\theta(v)=\pi_\theta(v)\,\nabla\log\pi_\theta(v)$,
#
# $$\nabla\,\mathrm{KL}(\pi_\theta\|\pi_T)=\sum_v\pi_\theta(v)\;d_v\,\nabla\log\pi_\theta(v)
# =-\,\mathbb{E}_{y\sim\pi_\theta}\big[A(y)\,\nabla\log\pi_\theta(y)\big]\qquad A(y)=\log\pi_T(y)-\log\pi_\theta(y).$$
#
# $\nabla\log\pi_\theta$ is called the **score**, and A the **advantage**: how much more of this token is wanted. In the
# words of reinforcement learning this is a **policy gradient** with a reward for each token, above 0 where the teacher
# likes it more than the student does. As a loss it is −A · log πθ(y), with A detached.
#
# **Predict.** k1 does not work as a loss but works as an advantage. What of −k2 and −k3 as advantages?


# %%
def policy_gradient_with(estimate):
    """The loss −A · log πθ(y) with A = −estimate, detached."""

    def loss(student_logits: torch.Tensor, teacher_logits: torch.Tensor, token: int) -> torch.Tensor:
        advantage = -estimate(student_logits, teacher_logits, token).detach()
        return -advantage * student_logits.log_softmax(-1)[token]

    return loss


show(
    reverse_KL_exactly=wanted,
    advantage_minus_k1=expected_gradient(policy_gradient_with(log_ratio), student, teacher),
    advantage_minus_k2=expected_gradient(policy_gradient_with(k2), student, teacher),
    advantage_minus_k3=expected_gradient(policy_gradient_with(k3), student, teacher),
)

# %% [markdown]
# With −k2 and −k3 the sign at `<think>` is wrong: descent takes probability *away* from the teacher's favourite. These
# two are never negative as costs, so they cannot say "more of this". `<think>` has d = −3.7; its k2 and k3 are the
# largest of all five tokens, and as costs they are held against it.
#
# Let the student learn with the six, step by step, each time with the expected gradient, so that no chance is involved.

# %%
recipes = {
    "k1 as a loss": (log_ratio, "-"),
    "k2 as a loss": (k2, "--"),
    "k3 as a loss": (k3, "-."),
    "advantage −k1": (policy_gradient_with(log_ratio), ":"),
    "advantage −k2": (policy_gradient_with(k2), (0, (5, 1, 1, 1, 1, 1))),
    "advantage −k3": (policy_gradient_with(k3), (0, (1, 3))),
}
figure, axes = plt.subplots(figsize=(6.5, 3.2))
for place, (name, (loss, line)) in enumerate(recipes.items()):
    position = student.clone()
    curve = []
    for _ in range(150):
        curve.append(exact_reverse_kl(position, teacher).item())
        position = position - 0.5 * expected_gradient(loss, position, teacher)
    width = 5 if name == "k2 as a loss" else 2
    marker = {"advantage −k2": "s", "advantage −k3": "^"}.get(name)
    axes.plot(curve, linestyle=line, linewidth=width, alpha=0.5 if width == 5 else 1, label=name, color=f"C{place}",
              marker=marker, markevery=25, markersize=5)  # fmt: skip
    print(f"{name:14} reverse KL {curve[0]:.2f} → {curve[-1]:.2f}, πθ(<think>) 0.02 → {position.softmax(-1)[0]:.3f}")
axes.set(xlabel="step", ylabel="KL(πθ‖πT) (nats)", ylim=(-0.1, 2.5))
axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()

# %% [markdown]
# Three get to the teacher: k2 as a loss, k3 as a loss, and the advantage −k1. The first and the third lie on one
# another, since $d\,\nabla\log\pi_\theta$ is the gradient of both, sample by sample. k3 is the fastest here, because
# the pull of the forward KL has no πθ in front. k1 as a loss does not move. The other two lead away from `<think>`. Do not
# be misled by the curve of −k2, which falls a little: it comes nearer to the teacher among the other four tokens and gives up
# the one that counts.
#
# The library has the policy gradient in two functions, on aligned (B, T) log-probabilities, and the exact divergence in
# one. (`policy_gradient_loss` takes log-probabilities now, those from the time of sampling, advantages and mask. The second is
# for batches that are used for more than one update: the change since then is clipped. Here nothing has changed yet, and it
# makes no difference.)
# Token by token with the library's functions, and weighed as before:


# %%
def library_policy_gradient(student_logits: torch.Tensor, teacher_logits: torch.Tensor, token: int) -> torch.Tensor:
    """The loss of one sampled token, from `tgpo_lab.losses`."""
    sampled = torch.tensor([[token]])  # (B, T) = (1, 1)
    own = token_logprobs(student_logits.view(1, 1, -1), sampled)
    advantage = reverse_kl_advantage(own, token_logprobs(teacher_logits.view(1, 1, -1), sampled))
    return policy_gradient_loss(own, own.detach(), advantage, torch.ones(1, 1))


logits = student.clone().requires_grad_()
exact = reverse_kl(logits.view(1, 1, -1), teacher.view(1, 1, -1), torch.ones(1, 1))
show(
    by_hand=wanted,
    library_exact=torch.autograd.grad(exact, logits)[0],
    library_policy_gradient=expected_gradient(library_policy_gradient, student, teacher),
)

# %% [markdown]
# ### Exercise 04.1 · The score function, without autograd
#
# *Difficulty 2 of 5 · 10 minutes.* Write the expected gradient of the policy gradient with advantage log πT − log πθ:
# the sum over all tokens of πθ(v) · d(v) · ∇log πθ(v), by the logits. The score of token v is
# $\nabla_z\log\pi_\theta(v)=e_v-\pi_\theta$, a one at v minus all probabilities.
#
# <details><summary>Hint 1</summary>All scores at once are a matrix (V, V): the identity minus the probabilities in each
# row.</details>
# <details><summary>Hint 2</summary>One weight for each row of this matrix, then a sum over the rows. Check yourself
# against <code>wanted</code>.</details>


# %%
def score_function_gradient(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """Expected gradient of the loss −A · log πθ(y): (V,) twice → (V,)."""
    ### BEGIN SOLUTION
    student, teacher = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    scores = torch.eye(len(student), dtype=student.dtype) - student.exp()  # (V, V), one row for each token drawn
    weights = student.exp() * (student - teacher)  # (V,)
    return weights @ scores
    ### END SOLUTION


# %%
check("04.1", score_function_gradient)

# %% [markdown]
# ### Exercise 04.2 · Does this loss listen to the teacher?
#
# *Difficulty 3 of 5 · 10 minutes.* You are given a loss of one sampled token, `loss(student_logits, teacher_logits,
# token)`, a student and two teachers, logits (V,) each. Return True if the loss teaches something about the teacher: if
# its expected gradient is another one for the second teacher. Return False if it is the same, also where the loss
# itself has another value.
#
# <details><summary>Hint 1</summary>The function <code>expected_gradient</code> above has what you need, once for each
# teacher.</details>
# <details><summary>Hint 2</summary>The weights are how often a token is drawn. <code>backward</code> on a sample does
# not see them, so they must be detached.</details>
# <details><summary>Hint 3</summary>A single token does not decide it: what depends on the teacher there may cancel in
# the mean.</details>
# <details><summary>Hint 4</summary>Two gradients that are equal on paper differ by rounding: compare with
# <code>torch.allclose</code>.</details>


# %%
def listens(loss, student_logits: torch.Tensor, teacher_logits: torch.Tensor, other_teacher: torch.Tensor) -> bool:
    """Whether the expected gradient of a sampled loss depends on the teacher."""
    ### BEGIN SOLUTION
    gradients = []
    for teacher_now in (teacher_logits, other_teacher):
        logits = student_logits.clone().requires_grad_()
        weights = logits.softmax(-1).detach()
        total = sum(weight * loss(logits, teacher_now, token) for token, weight in enumerate(weights))
        gradients.append(torch.autograd.grad(total, logits)[0])
    return not torch.allclose(*gradients, atol=1e-6)
    ### END SOLUTION


# %%
check("04.2", listens)

# %% [markdown]
# ## How noisy is it?
#
# On average the policy gradient is exact. A single sample gives $d_y\,\nabla\log\pi_\theta(y)$, and that can be far
# from the mean. How far depends on d, and d has no limit: where the student gives a token at least δ and the teacher at
# most ε,
#
# $$|d|\ \ge\ \log(\delta/\varepsilon),$$
#
# a *lower* bound, which grows without limit as ε goes to 0. This is the **rejection regime**: the student writes what the
# teacher finds impossible.
#
# To look at it we let the teacher go away from the student. `<think>` gets 1 − ε under the teacher and 0.001 under the
# student. The other four share ε under the teacher, and nearly everything under the student.

# %%
distances = torch.arange(1.0, 31.0, dtype=torch.float64)  # −log ε in nats
writes = torch.cat([torch.tensor([0.001]), 0.999 * torch.tensor([0.5, 0.25, 0.15, 0.1])]).double()  # (V,) πθ
shares = torch.tensor([0.2, 0.4, 0.3, 0.1], dtype=torch.float64)


def distant_teacher(nats: torch.Tensor) -> torch.Tensor:
    """Teacher with e^−nats left for all tokens but <think>: () → (V,) probabilities."""
    rest = torch.exp(-nats)
    return torch.cat([(1 - rest).view(1), rest * shares])


def gradients_of_samples(nats: torch.Tensor, baseline: float | torch.Tensor = 0.0) -> torch.Tensor:
    """(d − baseline) · score for each token that could be drawn: (V, V), a row for each."""
    d = writes.log() - distant_teacher(nats).log()  # (V,)
    scores = torch.eye(5, dtype=torch.float64) - writes  # (V, V)
    return (d - baseline).unsqueeze(-1) * scores


def mean_and_noise(rows: torch.Tensor) -> tuple[float, float]:
    """Length of the expected gradient, and root of the mean squared distance of a sample from it."""
    mean = writes @ rows  # (V,)
    return mean.norm().item(), (writes @ (rows - mean).square().sum(-1)).sqrt().item()


# %% [markdown]
# **Predict.** As ε falls, what does the length of the expected gradient do? And the noise of a single sample?

# %%
plain = [mean_and_noise(gradients_of_samples(nats)) for nats in distances]
bound = [(0.0999 / torch.exp(-nats)).log().item() for nats in distances]  # δ: the least of the four is written so often

figure, axes = plt.subplots(figsize=(6.5, 3))
axes.plot(distances, [noise for _, noise in plain], "-", label="noise of one sample")
axes.plot(distances, [mean for mean, _ in plain], "--", label="length of the expected gradient")
far_enough = slice(3, None)  # nearer than 4 nats ε is above δ, and the bound says nothing
axes.plot(distances[far_enough], bound[far_enough], ":", color="0.4", label="least |d| of a rejected token, log(δ/ε)")
axes.set(xlabel="−log ε (nats)", ylabel="gradient, or |d| (nats)", yscale="log", ylim=(0.05, 50))
axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()
for nats in (5, 15, 30):
    mean, noise = plain[nats - 1]
    print(f"−log ε = {nats:2}: expected gradient {mean:.2f}, noise {noise:5.2f}, {noise / mean:4.0f} times as much")
pull = -(writes @ gradients_of_samples(distances[14]))[0]
print(f"expected pull on the logit of <think> at 15 nats: {pull:.3f}")

# %% [markdown]
# The expected gradient hardly changes. All four tokens are rejected more and more, but what counts for it is how their
# d differ from one another, and that stays as it is. What should rise is `<think>`, and the pull on it has 0.001 in
# front. The noise rises along with the least |d|, up and up. (It lies a little below it at the end, because a sample's gradient is d
# times the length of the score, and that is less than one for a token which is drawn half of the time.) What a sample says in
# this regime is "not this", as loudly as you like, whichever of the four it was.
#
# It is loud because this student is *undecided* among the four. Were it certain of one of them, that one's score would be
# nearly zero and the loud "no" would move nothing. Such a student comes in [06](06_when_reverse_kl_fails.ipynb).
#
# Adam divides by the root of a running mean of squared gradients. This noise is what that mean will consist of.

# %% [markdown]
# ## A baseline
#
# Use $d-b$ in place of d, with one number b for all tokens: a **baseline**. It changes nothing on average, for
#
# $$\sum_v\pi_\theta(v)\;b\;\nabla\log\pi_\theta(v)=b\cdot 0=0.$$
#
# This is the fact that made k1 useless as a loss. Here it is a gift.
#
# **Predict.** Every token is told "no" with about the same force. Which b takes away most of the noise? What will be left of it?

# %%
nats = torch.tensor(15.0, dtype=torch.float64)
mean_d = (writes * (writes.log() - distant_teacher(nats).log())).sum()  # the reverse KL
baselines = torch.linspace(0, 25, 101, dtype=torch.float64)
with_baseline = [mean_and_noise(gradients_of_samples(nats, b)) for b in baselines]
least = min(range(101), key=lambda place: with_baseline[place][1])

figure, axes = plt.subplots(figsize=(6.5, 2.8))
axes.plot(baselines, [noise for _, noise in with_baseline], "-", label="noise of one sample")
axes.plot(baselines, [mean for mean, _ in with_baseline], "--", label="length of the expected gradient")
axes.axvline(mean_d, color="0.5", linestyle=":", label="b = mean of d")
axes.set(xlabel="baseline b (nats)", ylabel="gradient (nats)", ylim=(0, None))
axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()
print(f"without a baseline: noise {with_baseline[0][1]:.1f}")
print(f"least noise {with_baseline[least][1]:.2f} at b = {baselines[least]:.1f}; the mean of d is {mean_d:.1f}")

# %% [markdown]
# The expected gradient is a flat line, as it must be. Close to b = mean of d the noise falls to a fourteenth of what it was,
# which is still twice the expected gradient. The mean of d is the reverse KL itself: a number that is at hand, as the mean over a batch of samples. With it, over all
# distances:

# %%
helped = []
for nats in distances:
    mean_d = (writes * (writes.log() - distant_teacher(nats).log())).sum()
    helped.append(mean_and_noise(gradients_of_samples(nats, mean_d)))

figure, axes = plt.subplots(figsize=(6.5, 3))
axes.plot(distances, [noise for _, noise in plain], "-", label="noise, no baseline")
axes.plot(distances, [noise for _, noise in helped], "-.", label="noise, b = mean of d")
axes.plot(distances, [mean for mean, _ in helped], "--", label="length of the expected gradient")
axes.set(xlabel="−log ε (nats)", ylabel="gradient (nats)", yscale="log", ylim=(0.05, 50))
axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()
print(f"at 30 nats: noise {plain[-1][1]:.1f} without, {helped[-1][1]:.1f} with the baseline")

# %% [markdown]
# Most of the noise is gone, and what remains grows far more slowly. (It still grows: `<think>`, once drawn, is far from
# the mean.) The reverse-KL policy gradient that this course compares with, `rkl`, has no baseline: it stands for the paper's
# OP-Distill, which is defined without one.
#
# ### Exercise 04.3 · The best baseline
#
# *Difficulty 4 of 5 · 15 minutes.* The expected gradient does not depend on b, so the b of least noise is that of the
# least $\mathbb{E}\big[(d-b)^2\,\|s\|^2\big]$, where s is the score. Set the derivative by b to zero, and write a
# function that returns this b.
#
# <details><summary>Hint 1</summary>The result is a weighted mean of d. What are the weights, apart from πθ?</details>
# <details><summary>Hint 2</summary>b = E[‖s‖² d] / E[‖s‖²]. Square the scores, and sum over each row.</details>


# %%
def best_baseline(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """The baseline with the least noise: (V,) twice → a scalar."""
    ### BEGIN SOLUTION
    student, teacher = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    scores = torch.eye(len(student), dtype=student.dtype) - student.exp()  # (V, V)
    weights = student.exp() * scores.square().sum(-1)  # (V,)
    return (weights * (student - teacher)).sum() / weights.sum()
    ### END SOLUTION


# %%
check("04.3", best_baseline)

# %% [markdown]
# ## What no baseline can do
#
# A baseline takes noise away. The token that the teacher wants must still be drawn before a sample can speak for it. We
# ask how many samples the mean needs until it knows the direction on the logit of `<think>`: until its noise, which
# falls with the root of the number, is as small as the expected value. That number is variance / mean².
#
# The teacher is at 15 nats now, and the student's probability of `<think>` falls from e⁻⁴ to e⁻¹⁴.
#
# **Predict.** What is the curve with a baseline on a logarithmic axis, and how many samples does it take at e⁻¹³, where
# the far student of [02](02_a_task_a_teacher_a_student.ipynb) is?

# %%
openings = torch.arange(4.0, 15.0, dtype=torch.float64)  # −log πθ(<think>)
needed = {"no baseline": [], "b = mean of d": []}
for opening in openings:
    own = torch.cat([torch.exp(-opening).view(1), (1 - torch.exp(-opening)) * writes[1:] / writes[1:].sum()])  # (V,)
    d = own.log() - distant_teacher(torch.tensor(15.0, dtype=torch.float64)).log()
    score = torch.eye(5, dtype=torch.float64)[0] - own[0]  # (V,) of the logit of <think>, for each token drawn
    for name, b in (("no baseline", 0.0), ("b = mean of d", (own * d).sum())):
        sample = (d - b) * score
        mean = (own * sample).sum()
        needed[name].append(((own * (sample - mean).square()).sum() / mean.square()).item())

figure, axes = plt.subplots(figsize=(6.5, 3))
axes.plot(openings, openings.exp(), color="0.8", linewidth=7, label="1/πθ(<think>)")
for (name, points), line, marker in zip(needed.items(), ("-", "--"), ("o", "s"), strict=True):
    axes.plot(openings, points, line, marker=marker, markersize=4, label=name)
axes.set(xlabel="−log πθ(<think>) (nats)", ylabel="samples needed", yscale="log")
axes.legend(frameon=False)
plt.show()
print(f"at e^−13: {needed['b = mean of d'][9]:,.2g} samples with a baseline, {needed['no baseline'][9]:,.2g} without")

# %% [markdown]
# With a baseline the curve is a straight line: as many samples as it takes to draw the token once.
#
# The surprise is the other one: *without* a baseline fewer samples are needed, 25 times fewer at e⁻⁴ and still five times
# fewer at e⁻¹³. Was the baseline a gift or not? Without it every "no" to a drawn token raises all the others a little, each by
# its probability, and `<think>` among them. That is a pull in the right direction, and it is not knowledge about `<think>`: a
# worthless token of the same probability gets the same from those draws. Only once it is drawn itself is it told "no" too, and
# for that one waits 1/πθ samples again.
#
# This is the same wall as in [03](03_two_kls.ipynb): there the exact gradient had πθ in front, here the samples are
# drawn from πθ. The teacher is asked only about what the student has already said.

# %% [markdown]
# ## Recap
#
# | equation | in the library |
# |---|---|
# | k1 = d, k2 = ½d², k3 = e^−d − 1 + d | `losses.sampled_kl` |
# | A = log πT(y) − log πθ(y), detached | `losses.reverse_kl_advantage` |
# | −A · log πθ(y) | `losses.policy_gradient_loss` |
# | ½d², differentiated | `losses.kdrl_loss`, named after the method of [10](10_a_fair_comparison.ipynb) that uses it |
# | Σ_v πθ (log πθ − log πT), differentiated | `losses.reverse_kl` |
#
# - k1 as a loss has an expected gradient of zero, without the teacher in it. k2 as a loss gives reverse KL, k3 forward
#   KL.
# - Policy gradient with advantage −k1 gives reverse KL. With −k2 or −k3 it drove the student from the teacher's token.
# - Where the teacher rejects all that the student writes, the noise grows with log(δ/ε), and the expected gradient
#   hardly at all.
# - A baseline costs nothing on average and took most of that noise away. With it, the samples needed to find a token that the
#   student hardly ever writes stayed near 1/πθ; without it they were fewer, by a pull that does not ask which token it is.
#
# **Next:** [05 · On-policy distillation](05_on_policy_distillation.ipynb)
