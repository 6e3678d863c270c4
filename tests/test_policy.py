"""The shift from tokens to logits, masks and micro-batches, against references written position by position."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Llama4ForCausalLM, Llama4TextConfig

from tgpo_lab.errors import InputError
from tgpo_lab.losses import token_logprobs
from tgpo_lab.micro_batches import split_rows
from tgpo_lab.models.pairs import load_pair
from tgpo_lab.models.policy import check_projection, most_probable, project_to_vocabulary, response_hidden_states
from tgpo_lab.rollouts import Rollouts, join_rollouts
from tgpo_lab.teacher import ask_teacher


@pytest.fixture(scope="module")
def pair(random_pair):
    return load_pair(random_pair.student, random_pair.teacher)


def rollouts_from(lengths, seed=0):
    """Random prompts and responses of given lengths; responses may contain the padding id."""
    generator = torch.Generator().manual_seed(seed)
    width = max(response for _, response in lengths)
    mask = torch.tensor([[t < response for t in range(width)] for _, response in lengths])
    responses = torch.randint(0, 40, (len(lengths), width), generator=generator) * mask
    prompts = [torch.randint(0, 40, (prompt,), generator=generator).tolist() for prompt, _ in lengths]
    return Rollouts(prompts, responses, mask, torch.ones(len(lengths), dtype=torch.bool), pad_token=0)


LENGTHS = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 6)), min_size=1, max_size=5)


@torch.no_grad()
@settings(max_examples=25, deadline=None)
@given(LENGTHS, st.integers(0, 1000))
def test_logprobs_equal_those_of_each_sequence_alone_read_one_token_at_a_time(pair, lengths, seed):
    rollouts = rollouts_from(lengths, seed)
    logits = project_to_vocabulary(pair.student, response_hidden_states(pair.student, rollouts))
    ours = token_logprobs(logits.unsqueeze(0), rollouts.responses[rollouts.mask].unsqueeze(0))[0].tolist()
    expected = []
    for prompt, response, (_, length) in zip(rollouts.prompts, rollouts.responses.tolist(), lengths, strict=True):
        for t in range(length):
            # The distribution after prompt and the t tokens before it: no shift to get wrong.
            prefix = torch.tensor([prompt + response[:t]])
            expected.append(float(pair.student(prefix).logits[0, -1].log_softmax(-1)[response[t]]))
    assert ours == pytest.approx(expected, abs=1e-4)


@settings(max_examples=200)
@given(
    st.integers(1, 200).flatmap(
        lambda v: st.lists(
            st.lists(st.sampled_from([-torch.inf, -1e30, -2.0, 0.0, 1.0, 3.0]), min_size=v, max_size=v),
            min_size=1,
            max_size=3,
        )
    )
)
def test_the_most_probable_token_is_the_first_of_the_largest_logits(logits):
    assert most_probable(torch.tensor(logits)).tolist() == [row.index(max(row)) for row in logits]


@pytest.mark.parametrize("vocabulary", [1, 2, 63, 64, 65, 128, 1000, 2048, 50_257])
def test_the_most_probable_token_of_any_vocabulary(vocabulary):
    logits = torch.randn(20, vocabulary, generator=torch.Generator().manual_seed(0))
    logits[0] = -torch.inf
    logits[1], logits[1, -1] = 0.0, 1.0  # in the last block, which may not be full
    assert torch.equal(most_probable(logits), logits.argmax(-1))
    # As the teacher's logits come: the rows that are no tokens cut away, so not in one piece of memory.
    if vocabulary > 1:
        assert torch.equal(most_probable(logits[:, :-1]), logits[:, :-1].argmax(-1))
    assert most_probable(logits[:0]).shape == (0,)


@settings(max_examples=25, deadline=None)
@given(LENGTHS, st.integers(1, 30))
def test_micro_batches_hold_every_row_once_within_the_limit(lengths, limit):
    rollouts = rollouts_from(lengths)
    parts = split_rows(rollouts, limit)
    assert sorted(row for part in parts for row in part.tolist()) == list(range(len(lengths)))
    for part in parts:
        longest = max(sum(lengths[row]) for row in part.tolist())
        assert len(part) == 1 or len(part) * longest <= limit


def test_what_the_teacher_answers_does_not_depend_on_the_micro_batches(pair):
    rollouts = rollouts_from([(3, 5), (1, 2), (5, 6), (2, 1), (4, 4)])
    options = {"vocabulary_size": 2048, "keep_distribution": rollouts.mask, "top_k": 3}
    whole = ask_teacher(pair.teacher, rollouts, micro_batch_tokens=10_000, **options)
    parts = ask_teacher(pair.teacher, rollouts, micro_batch_tokens=8, **options)
    assert torch.equal(whole.tokens, parts.tokens)
    assert torch.equal(whole.top_tokens, parts.top_tokens)
    torch.testing.assert_close(whole.logprobs, parts.logprobs, atol=1e-5, rtol=1e-5)
    mask = rollouts.mask
    torch.testing.assert_close(
        whole.hidden[whole.hidden_index[mask]], parts.hidden[parts.hidden_index[mask]], atol=1e-5, rtol=1e-5
    )


def test_the_teachers_answers_equal_its_own_logits(pair):
    rollouts = rollouts_from([(3, 5), (2, 3)])
    answers = ask_teacher(pair.teacher, rollouts, vocabulary_size=2048, micro_batch_tokens=100, top_k=4)
    for row, t in rollouts.mask.nonzero().tolist():
        prefix = torch.tensor([rollouts.prompts[row] + rollouts.responses[row, :t].tolist()])
        logprobs = pair.teacher(prefix).logits[0, -1].log_softmax(-1)
        assert int(answers.tokens[row, t]) == int(logprobs.argmax())
        assert float(answers.confidence[row, t]) == pytest.approx(float(logprobs.max()), abs=1e-4)
        assert float(answers.logprobs[row, t]) == pytest.approx(float(logprobs[rollouts.responses[row, t]]), abs=1e-4)
        assert answers.top_tokens[row, t].tolist() == logprobs.topk(4).indices.tolist()
    assert (answers.logprobs[~rollouts.mask] == 0).all()


def test_a_token_sampled_from_the_teacher_follows_the_teacher(pair):
    rollouts = rollouts_from([(3, 1)] * 3000)  # one position, the same prompt
    rollouts = Rollouts([rollouts.prompts[0]] * 3000, rollouts.responses, rollouts.mask, rollouts.finished, 0)
    answers = ask_teacher(
        pair.teacher, rollouts, vocabulary_size=2048, micro_batch_tokens=10**6,
        sampling_seed=0,
    )  # fmt: skip
    probabilities = pair.teacher(torch.tensor([rollouts.prompts[0]])).logits[0, -1].softmax(-1)
    half = probabilities > probabilities.median()
    share = float(half[answers.sampled_tokens[:, 0]].float().mean())
    assert share == pytest.approx(float(probabilities[half].sum()), abs=0.04)


def test_joining_and_taking_rows_keeps_tokens_and_lengths():
    first, second = rollouts_from([(2, 3), (1, 1)]), rollouts_from([(3, 5)], seed=1)
    joined = join_rollouts([first, second])
    assert joined.lengths.tolist() == [3, 1, 5]
    taken = joined.rows(torch.tensor([2, 0]))
    assert taken.lengths.tolist() == [5, 3]
    assert taken.responses[1, :3].tolist() == first.responses[0].tolist()
    tokens, prompt_lengths = joined.sequences()
    assert prompt_lengths.tolist() == [2, 1, 3]
    assert tokens[0, :5].tolist() == first.prompts[0] + first.responses[0].tolist()


def test_an_architecture_with_unknown_logits_is_refused(pair, monkeypatch):
    monkeypatch.setattr(pair.student.config, "logit_scale", 3.0, raising=False)  # its forward pass does not scale
    with pytest.raises(InputError, match="computes its logits in a way"):
        check_projection(pair.student, "model")
    monkeypatch.setattr(pair.student.config, "logit_scale", None)
    check_projection(pair.student, "model")


def test_an_architecture_without_hidden_states_is_refused():
    model = Llama4ForCausalLM(
        Llama4TextConfig(
            vocab_size=64, hidden_size=32, intermediate_size=32, intermediate_size_mlp=32, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=1, head_dim=8, num_local_experts=2, pad_token_id=0,
        )
    ).eval()  # fmt: skip
    with pytest.raises(InputError, match=r"model \(Llama4ForCausalLM\) computes its logits in a way that"):
        check_projection(model, "model")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_taken_for_an_unknown_architecture(pair, value):
    weight = pair.student.get_output_embeddings().weight
    before = weight.data.clone()
    weight.data[5] = value
    try:
        with pytest.raises(InputError, match="The outputs of model on three tokens, in float32, are not finite"):
            check_projection(pair.student, "model")
    finally:
        weight.data.copy_(before)


def test_soft_caps_are_applied_as_in_the_models_own_forward_pass():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    model = Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8, final_logit_softcapping=0.1,
        )
    ).eval()  # fmt: skip
    check_projection(model, "gemma")
