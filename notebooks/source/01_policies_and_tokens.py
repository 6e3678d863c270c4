# %% [markdown]
# # 01 · Policies and tokens
#
# **Goal.** Follow a text through a language model and back: tokens, logits, probabilities, a sampled response, and the
# log-probability of that response. On the way, two mistakes that are easily made and hardly noticed: a shift by one,
# and a mask that masks the wrong places.
#
# **Minutes.** 1 to run on two cores, 45 to work through.
#
# **Prerequisites.** PyTorch tensors, indexing and softmax. [00](00_one_tour.ipynb) says where this leads.

# %%
import math

import matplotlib.pyplot as plt
import seaborn as sns
import torch

from tgpo_lab import load_pair
from tgpo_lab.exercises import check
from tgpo_lab.losses import entropy, masked_sum, token_logprobs
from tgpo_lab.models.policy import project_to_vocabulary, response_hidden_states
from tgpo_lab.sampling.cached_sampling import draw_tokens, sample_responses

torch.manual_seed(0)
sns.set_theme(style="ticks", palette="colorblind")

# %% [markdown]
# ## Text becomes tokens
#
# The models of this course add up three numbers: the prompt is `47+85+36=`, and a response says the sum after a `#`.
# `load_pair` loads two tiny models and the tokenizer they share; here we only need the smaller one, and what it is a
# pair of is the subject of [02](02_a_task_a_teacher_a_student.ipynb).
#
# A **tokenizer** cuts text into pieces and gives each kind of piece a number, its id.

# %%
pair = load_pair("near")
model, tokenizer = pair.student, pair.tokenizer

prompt, response = "47+85+36=", "<think> ones 7+5=12 the sum is #168"
for name, text in (("prompt", prompt), ("response", response)):
    ids = tokenizer.encode(text)
    pieces = tokenizer.convert_ids_to_tokens(ids)
    print(f"{name}: {len(ids)} tokens")
    print("  ", " ".join(f"{token!r}:{index}" for token, index in zip(pieces, ids, strict=True)))
print("decoded again:", repr(tokenizer.decode(tokenizer.encode(response))))

# %% [markdown]
# Digits are tokens of their own, a word is one token and carries the space before it, and `<think>` is a single token
# although it has seven characters. Before a digit the space is a token by itself. Decoding gives back the text to the letter.
#
# There are a few tokens that are no text. Two matter to us: the one that ends a response, and the one that fills up
# places where there is nothing.

# %%
print(f"{pair.vocabulary_size} tokens in the vocabulary")
print("end of a response:", tokenizer.eos_token, "with id", tokenizer.eos_token_id)
print("padding:", tokenizer.pad_token, "with id", tokenizer.pad_token_id)
print("three of the words that the task never uses:", tokenizer.convert_ids_to_tokens([700, 1100, 1500]))

# %% [markdown]
# ## One forward pass
#
# The model reads B rows of L tokens and gives, for each place, one number for each token of the vocabulary: the
# **logits**, (B, L, V). The row of logits at a place is about the token that comes *next*. (Letters for shapes, here
# and everywhere: B rows, L tokens in a row, P of them in the prompt and T in the response, V in the vocabulary.)
#
# Softmax turns V logits into V probabilities: $\pi(v)=e^{z_v}/\sum_u e^{z_u}$.

# %%
prompt_ids = torch.tensor([tokenizer.encode(prompt)])  # (1, 9)
with torch.no_grad():
    logits = model(prompt_ids).logits  # (1, 9, V)
print("tokens", tuple(prompt_ids.shape), "→ logits", tuple(logits.shape))

last_logits = logits[0, -1].double()  # (V,) after the whole prompt
next_probabilities = last_logits.softmax(-1)
for probability, index in zip(*next_probabilities.topk(4), strict=True):
    print(f"{tokenizer.decode(index):8} {probability:.4f}")

# %% [markdown]
# After the prompt this model is in two minds: it says ` the` (as in ` the sum is #168`) or it starts to work the sum
# out with `<think>`. Hardly anything else is left.
#
# A rule that gives every next token a probability, whatever has been written so far, is called a **policy** and written
# π. In the words of reinforcement learning, what has been written is the state and the next token is the action. A
# language model with a softmax on top *is* a policy.

# %% [markdown]
# ## Sampling by hand
#
# To draw a token with these probabilities, lay the tokens side by side on a line from 0 to 1, each as wide as it is
# probable, throw a dart at the line, and see what it hits. The right edges of the pieces are the cumulative sum.

# %%
darts = torch.rand(1000, generator=torch.Generator().manual_seed(0))  # (1000,)
edges = next_probabilities.cumsum(-1)  # (V,)
hit = torch.searchsorted(
    edges, darts.double(), right=True
)  # (1000,) the first piece whose right edge is beyond the dart
for token in (" the", "<think>"):
    index = tokenizer.convert_tokens_to_ids(token)
    print(
        f"{token:8} probability {next_probabilities[index]:.3f}, share of the darts {(hit == index).float().mean():.3f}"
    )

drawn = draw_tokens(last_logits.expand(1000, -1), darts.double())  # the library's, with the same darts
print("the library draws the same tokens:", torch.equal(hit, drawn))

# %% [markdown]
# (In double precision, because the pieces of the thousands of other tokens are narrower than the rounding of a float32
# near 1: in single precision a dart there may hit the neighbour. That is so rare that below, for one response, single
# precision will do.)
#
# A response is drawn token by token: read what is there, draw one, append it, until the end token comes or there are
# enough. The next cell does just that. Then the library does it with the same random numbers. It reads only the new
# token in each step, because it keeps what attention needs of the earlier ones (the key-value cache); that changes the
# time and not the result.

# %%
darts = torch.rand(1, 80, generator=torch.Generator().manual_seed(3))  # (1, 80)
tokens = prompt_ids
with torch.no_grad():
    for step in range(80):
        probabilities = model(tokens).logits[0, -1].softmax(-1)  # (V,)
        new = torch.searchsorted(probabilities.cumsum(-1), darts[0, step], right=True)
        tokens = torch.cat([tokens, new.view(1, 1)], dim=1)
        if new == tokenizer.eos_token_id:
            break
by_hand = tokens[:, prompt_ids.shape[1] :]  # (1, T)
print("by hand ", repr(tokenizer.decode(by_hand[0])))

rollouts = sample_responses(
    model,
    prompt_ids.tolist(),
    80,
    pair.end_tokens,
    pair.pad_token,
    temperature=1.0,
    generator=torch.Generator().manual_seed(3),
)
print("library ", repr(tokenizer.decode(rollouts.responses[0])))

# %% [markdown]
# The tokens of a response up to some place are its **prefix** there. A response together with the prompt it answers is called a
# **rollout**. When the policy that is being trained writes
# the rollouts it is trained on, the training is **on-policy**.

# %% [markdown]
# ## Temperature
#
# Before the softmax all logits can be divided by a **temperature** τ: $\pi_\tau(v)\propto e^{z_v/\tau}$. At τ = 1 the
# policy is as it is; the limit τ → 0 always takes the most probable token, which is called **greedy**.
#
# **Predict.** ` the` has 0.77 and `<think>` 0.23 at τ = 1. What becomes of the two at τ = 0.5? And where does the
# probability go at τ = 3, when there are 2,046 other tokens?

# %%
temperatures = [0.25, 0.5, 1.0, 2.0, 3.0]
shown = [" the", "<think>"]
shown_ids = tokenizer.convert_tokens_to_ids(shown)
figure, axes = plt.subplots(figsize=(6.5, 2.6))
for place, temperature in enumerate(temperatures):
    probabilities = (last_logits / temperature).softmax(-1)
    parts = [*probabilities[shown_ids].tolist()]
    parts.append(1 - sum(parts))
    left = 0.0
    for part, color, hatch in zip(parts, ("C0", "C1", "0.8"), ("", "//", ".."), strict=True):
        axes.barh(place, part, left=left, color=color, hatch=hatch, edgecolor="white")
        left += part
    print(f"τ = {temperature}: the {parts[0]:.2f}, <think> {parts[1]:.2f}, all others {parts[2]:.2f}")
axes.set(xlabel="the line from 0 to 1", ylabel="temperature τ", yticks=range(len(temperatures)), xlim=(0, 1))
axes.set_yticklabels(temperatures)
axes.legend(["the", "<think>", "all others"], frameon=False, loc="upper center", bbox_to_anchor=(0.5, 1.22), ncols=3)
plt.show()

# %% [markdown]
# A low temperature widens the leader's piece, a high one makes all pieces alike. There are so many other tokens that
# together they take the line over soon, although each of them had next to nothing.
#
# How spread out a distribution is has a number, its **entropy** $-\sum_v \pi(v)\log\pi(v)$ in nats. It is 0 where one
# token has everything, and log V where all tokens are alike. We compare the place after the prompt with one where the
# model knows what comes next: after `<think> ones ` it is to write the 7 of 47.

# %%
with torch.no_grad():
    sure = model(torch.tensor([tokenizer.encode(prompt + "<think> ones ")])).logits[0, -1]  # (V,)
undecided = last_logits.float()  # (V,)

scale = torch.logspace(-1, 1, 41)  # temperatures from 0.1 to 10
figure, axes = plt.subplots(figsize=(6.5, 2.8))
for name, row, line in (("after the prompt", undecided, "-"), ("after “<think> ones ”", sure, "--")):
    axes.plot(scale, entropy((row / scale[:, None])[None])[0], line, label=name)
    print(f"{name}: entropy {entropy(row.view(1, 1, -1)).item():.2f} nats at τ = 1")
axes.axhline(math.log(pair.vocabulary_size), color="0.6", linewidth=1)
axes.text(0.11, 7.0, f"log {pair.vocabulary_size}", color="0.4")
axes.set(xlabel="temperature τ", ylabel="entropy (nats)", xscale="log", ylim=(0, 8))
axes.legend(frameon=False, loc="center left")
plt.show()

# %% [markdown]
# Both curves end near the ceiling log V. They part at the low end: where the model is sure, the entropy is near 0 until
# the temperature passes 1; where it is undecided, it takes a low temperature to make it decide.
#
# In this course rollouts for training are drawn at τ = 1, because then the policy that writes is the policy that is
# trained. Accuracy is measured greedily as well, at τ = 0.

# %% [markdown]
# ## The log-probability of a response
#
# A response is as probable as all its tokens in turn:
# $$\log\pi(y\,|\,x)=\sum_{t=1}^{|y|}\log\pi(y_t\,|\,x,y_{<t}).$$
#
# One forward pass over prompt *and* response holds all of it, since the model's row at each place has read everything
# up to there. What remains is to pick the right number out of each row: the entry of the token that was written. From
# which row, though?
#
# **Predict.** Below, the same response is scored twice. Once the entry of token `tokens[:, i]` is taken from
# `logits[:, i]`, once from `logits[:, i - 1]`. Which one is right, and how far off is the other? The model has written
# this response itself.

# %%
tokens = torch.cat([prompt_ids, by_hand], dim=1)  # (1, L) with L = P + T
P = prompt_ids.shape[1]
with torch.no_grad():
    all_logprobs = model(tokens).logits.log_softmax(-1)  # (1, L, V)
index = by_hand.unsqueeze(-1)  # (1, T, 1)
unshifted = all_logprobs[:, P:].gather(-1, index).squeeze(-1)  # (1, T) logits[:, i] for tokens[:, i]
shifted = all_logprobs[:, P - 1 : -1].gather(-1, index).squeeze(-1)  # (1, T) logits[:, i - 1] for tokens[:, i]
print(f"logits[:, i]      log π = {unshifted.sum():8.1f} nats, {unshifted.mean():.1f} per token")
print(f"logits[:, i - 1]  log π = {shifted.sum():8.1f} nats, {shifted.mean():.2f} per token")

# %%
names = [tokenizer.decode(i).strip() or "␣" for i in by_hand[0]]
first = 22
figure, axes = plt.subplots(figsize=(8, 3))
axes.plot(shifted[0, :first], "o-", label="logits[:, i - 1]")
axes.plot(unshifted[0, :first], "x--", label="logits[:, i]")
axes.set(xlabel="token of the response", ylabel="log-probability (nats)", xticks=range(first))
axes.set_xticklabels(names[:first], rotation=60)
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# The row at place i has *read* token i and predicts token i + 1. Asked about the token it has just read, it gives
# nonsense. For the first token of the response the right row is that of the last prompt token, P − 1.
#
# Nothing warns you. Shapes fit and gradients flow; to make such a loss small, a model has to repeat the token before
# its eyes. So the library makes the shift in one function, `models.policy.response_hidden_states`, and everything behind it
# works with **aligned** tensors: row t of the logits is about token t of the response. Every loss in `tgpo_lab.losses`
# expects them so.
#
# A **hidden state** is the model's vector of H numbers at a place, just before its last linear layer makes V logits of it.
# `response_hidden_states` returns those that predict the N response tokens of a batch, row after row, without padding;
# `project_to_vocabulary` makes logits of them. Here there is one row, so N = T.

# %%
with torch.no_grad():
    hidden = response_hidden_states(model, rollouts)  # (N, H)
    aligned = project_to_vocabulary(model, hidden).unsqueeze(0)  # (1, N, V)
library = token_logprobs(aligned, rollouts.responses)  # (1, N)
print(f"by hand {shifted.sum():.3f}   library {library.sum():.3f}")

# %% [markdown]
# ### Exercise 01.1 · Log-probabilities of a response
#
# *Difficulty 2 of 5 · 8 minutes.* Write a function that takes the logits of a forward pass over prompt and response,
# (B, L, V) as the model gives them, the tokens (B, L) and the length P of the prompts, the same for all rows. It
# returns the log-probability of every response token, (B, L − P). (`check` in the cell after it says whether it is right, and
# names the likely mistake; it must stand in the last line of its cell.)
#
# <details><summary>Hint 1</summary>Of the L rows of logits, L − P are wanted: from place P − 1 to the last but
# one.</details>
# <details><summary>Hint 2</summary><code>log_softmax(-1)</code> first, then <code>gather</code> with an index that has
# one more dimension than the tokens.</details>


# %%
def response_logprobs(logits: torch.Tensor, tokens: torch.Tensor, prompt_length: int) -> torch.Tensor:
    """log π of each response token: (B, L, V) not aligned, (B, L) → (B, L − P)."""
    ### BEGIN SOLUTION
    logprobs = logits[:, prompt_length - 1 : -1].log_softmax(-1)
    return logprobs.gather(-1, tokens[:, prompt_length:].unsqueeze(-1)).squeeze(-1)
    ### END SOLUTION


# %%
check("01.1", response_logprobs)

# %% [markdown]
# ## Several responses at once: padding and masks
#
# Responses have different lengths, a tensor has one width. So short rows are filled up with padding, and a **mask**
# says which places count: True on tokens of the response, its end token included.

# %%
rollouts = sample_responses(
    model,
    [tokenizer.encode("20+30+10=")],
    80,
    pair.end_tokens,
    pair.pad_token,
    samples_per_prompt=4,
    generator=torch.Generator().manual_seed(6),
)
for text, length in zip(rollouts.texts(tokenizer), rollouts.lengths, strict=True):
    print(f"{length:3} tokens  {text!r}")
print("responses", tuple(rollouts.responses.shape))

# %% [markdown]
# Where does the mask come from? Three ways to make one:
#
# 1. `torch.ones_like(responses)`: the tensor is there, so it is used. This mask is always true.
# 2. `responses != pad_token`: from the ids.
# 3. From the lengths, which are known when the response ends.
#
# **Predict.** Many tokenizers have no padding token, and then the end token is used to pad. What does the second mask
# do then?

# %%
end = tokenizer.eos_token_id
padded_with_end = torch.where(rollouts.mask, rollouts.responses, end)  # (B, T): end and padding have one id now
T = padded_with_end.shape[1]
masks = {
    "always true": torch.ones_like(padded_with_end).bool(),
    "from the ids": padded_with_end != end,
    "from the lengths": torch.arange(T) < rollouts.lengths[:, None],
}
figure, panels = plt.subplots(1, 3, figsize=(9, 2.2), sharey=True)
for axes, (name, mask) in zip(panels, masks.items(), strict=True):
    axes.imshow(mask, aspect="auto", cmap="Greys", vmin=0, vmax=2, interpolation="nearest")
    ends = rollouts.lengths - 1
    axes.plot(ends, range(len(ends)), "kx", markersize=5)
    axes.set(title=name, xlabel="place in the response", ylabel="row", yticks=range(len(ends)))
    print(f"{name:17} tokens that count in each row: {mask.sum(-1).tolist()}")
plt.show()

# %% [markdown]
# Grey places count, and a cross marks the token that ended the response. The first mask counts padding as if the model
# had written it. The second one lacks one token in each row: the end token itself. A policy trained with it is never
# taught anything about stopping, and may go on to the token limit.
#
# The third is right whatever the ids are. The library's `Rollouts` carry it from the sampler: `rollouts.mask`.

# %%
print("the same as the library's mask:", torch.equal(masks["from the lengths"], rollouts.mask))

# %% [markdown]
# ### Exercise 01.2 · A mask when the padding is the end token
#
# *Difficulty 3 of 5 · 10 minutes.* You are given responses (B, T) in which the rest of a row is filled up with the end
# token. Write a function that returns the mask (B, T): True up to and including the first end token. A row without any
# end token was cut at the token limit, and all of it counts.
#
# <details><summary>Hint 1</summary>Find the length of each row first. Then compare <code>torch.arange(T)</code> with
# the lengths.</details>
# <details><summary>Hint 2</summary><code>(responses == end_token).int().argmax(-1)</code> is the place of the first end
# token, and 0 in a row that has none.</details>


# %%
def response_mask(responses: torch.Tensor, end_token: int) -> torch.Tensor:
    """True on what was written, the first end token included: (B, T) ids → (B, T) bool."""
    ### BEGIN SOLUTION
    is_end = responses == end_token
    width = responses.shape[1]
    lengths = torch.where(is_end.any(-1), is_end.int().argmax(-1) + 1, width)
    return torch.arange(width) < lengths.unsqueeze(-1)
    ### END SOLUTION


# %%
check("01.2", response_mask)

# %% [markdown]
# ## Sums that leave padding out
#
# A loss is a sum over tokens, divided by something: the **normaliser**. With a mask, the sum is taken where the mask is
# true, and the usual normaliser is the number of true places. We take the mean log-probability of a token in the batch
# above.
#
# **Predict.** Will the mean over *all* places, padding included, be much different? What is the log-probability of
# padding under the model, at a place after the end?

# %%
with torch.no_grad():
    tokens, prompt_lengths = rollouts.sequences()  # prompt and response joined, (B, L)
    P = int(prompt_lengths[0])  # one prompt, so one length
    values = token_logprobs(model(tokens).logits[:, P - 1 : -1], tokens[:, P:])  # (B, T)
mask = rollouts.mask
print(f"mean over all {mask.numel()} places        {values.mean():.2f} nats")
print(f"mean over the {int(mask.sum())} tokens written  {values[mask].mean():.2f} nats")
print(f"library                         {masked_sum(values, mask):.2f} nats")
print(f"mean over the padding alone     {values[~mask].mean():.2f} nats")

# %% [markdown]
# Padding is nothing that the model would write, so the mean over all places says more about padding than about the response.
#
# (Here all prompts are equally long. Prompts of unequal length are padded on the *left*, so that each response follows its prompt
# without a gap; `sample_responses` does that, and [12](12_to_a_real_pair.ipynb) takes it apart.)
#
# Two more ways to go wrong, both in one line. Multiplying by the mask instead of selecting breaks as soon as a padded
# place holds an infinite value, because 0 · ∞ is not a number. And averaging each row first gives the tokens of a short
# response more weight than those of a long one.

# %%
broken = values.masked_fill(~mask, -math.inf)
print(f"multiplied by the mask   {(broken * mask).sum() / mask.sum():.2f}")
print(f"selected by the mask     {masked_sum(broken, mask):.2f}")
rows = torch.where(mask, values, 0.0).sum(-1) / mask.sum(-1)  # (B,)
print(f"mean of the rows' means  {rows.mean():.2f}")

# %% [markdown]
# The short response is less probable per token than the long ones, and as one row of four it pulls the mean of the rows
# down. Averaging rows is not always a mistake, but it is another loss, and one should know which of the two one has.
#
# The normaliser can be given: `masked_sum(values, mask, normalizer)`. Training needs that when a batch is worked off in
# parts. Each part divides by the number of tokens of the *whole* batch; then the parts add up to the loss of the batch,
# however it was split.

# %%
total = mask.sum()
parts = [masked_sum(values[rows], mask[rows], total) for rows in ([0], [1, 2], [3])]
print(f"three parts with the batch's normaliser, added   {sum(parts):.4f}")
print(f"the whole batch                                  {masked_sum(values, mask):.4f}")
own = [masked_sum(values[rows], mask[rows]) for rows in ([0], [1, 2], [3])]
print(f"three parts, each with its own count, averaged   {sum(own) / 3:.4f}")

# %% [markdown]
# ### Exercise 01.3 · A masked mean
#
# *Difficulty 2 of 5 · 7 minutes.* Write `masked_sum` yourself: the sum of values (B, T) where the mask (B, T) is true,
# divided by the normaliser; without one, by the number of true places. Values where the mask is false may be infinite.
#
# <details><summary>Hint 1</summary><code>torch.where(mask, values, 0.0)</code> chooses and does not
# multiply.</details>
# <details><summary>Hint 2</summary>The normaliser may be larger than the number of true places: this can be a part of a
# larger batch.</details>


# %%
def masked_mean(values: torch.Tensor, mask: torch.Tensor, normalizer: float | None = None) -> torch.Tensor:
    """Masked sum over a normaliser: (B, T) twice → a scalar."""
    ### BEGIN SOLUTION
    if normalizer is None:
        normalizer = mask.sum()
    return torch.where(mask, values, 0.0).sum() / normalizer
    ### END SOLUTION


# %%
check("01.3", masked_mean)

# %% [markdown]
# ## Recap
#
# | equation | in the library |
# |---|---|
# | π(v) = softmax(z/τ), one token drawn | `sampling.cached_sampling.draw_tokens`, whole responses `sampling.cached_sampling.sample_responses` |
# | log π(y_t given x, y_<t), shift included | `models.policy.response_hidden_states`, then `models.policy.project_to_vocabulary`, then `losses.token_logprobs` |
# | −Σ_v π(v) log π(v) | `losses.entropy` |
# | 1/Z Σ over masked tokens | `losses.masked_sum`, mask from `Rollouts.mask` |
#
# - A language model with a softmax is a policy; a response is drawn from it with one random number for each token.
# - Temperature below 1 sharpens, above 1 spreads; with 2,048 tokens the many improbable ones soon take over.
# - The logits at a place predict the *next* token. The shift belongs in one function.
# - Masks come from lengths. Made from ids they lose the end token as soon as padding has the same id.
# - The same sum with another normaliser is another loss.
#
# **Next:** [02 · A task, a teacher, a student](02_a_task_a_teacher_a_student.ipynb)
