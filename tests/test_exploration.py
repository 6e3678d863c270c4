"""Responses under the students of a run's steps, and branches off them, without a browser."""

import json
import shutil
from collections import Counter
from dataclasses import replace

import pytest
import torch

from tgpo_lab.errors import InputError
from tgpo_lab.explorer.branching import continue_after
from tgpo_lab.explorer.exploration import Exploration
from tgpo_lab.explorer.student_history import StudentHistory
from tgpo_lab.losses import group_advantages
from tgpo_lab.methods import make_method
from tgpo_lab.models.pairs import load_model, load_pair
from tgpo_lab.schedules import LinearDecay
from tgpo_lab.tasks.rewards import marked_answer
from tgpo_lab.training import train

PROMPT, LIMIT = "1+2+4=", 12


@pytest.fixture(scope="module")
def pair(random_pair):
    return load_pair(random_pair.student, random_pair.teacher)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, tiny_config):
    """A run of 3 steps with a student of each, whose learning rate is so large that all of them differ."""
    config = tiny_config(
        tmp_path_factory.mktemp("explored"),
        method=make_method("tgpo", weight=LinearDecay(0.5, 0.1)),
        checkpoint_every=1,
        keep_checkpoints=0,
        learning_rate=0.03,
    )
    return train(config, show_progress=False).directory


@pytest.fixture
def exploration(pair):
    return Exploration(pair, [StudentHistory.of_pair(pair)], [PROMPT], ["7"], samples=6, max_new_tokens=LIMIT, seed=1)


@pytest.fixture
def over_steps(pair, run_folder):
    history = StudentHistory.of_run(run_folder)
    return Exploration(pair, [history], [PROMPT], ["7"], samples=4, max_new_tokens=LIMIT)


def ids(response) -> list[int]:
    return response.view.rollouts.responses[response.row, : response.length].tolist()


def test_a_group_is_sampled_judged_and_compared(exploration):
    responses = exploration.responses(0)
    assert [r.name for r in responses] == [f"0:{row}" for row in range(6)]
    rewards = [r.reward for r in responses]
    assert 0 < sum(rewards) < 6
    for response in responses:
        assert response.reward == (marked_answer(response.text, "7") if response.finished else 0.0)
        assert response.prompt == PROMPT and response.answer == "7" and response.branch is None
    assert torch.allclose(responses[0].view.advantages, group_advantages(torch.tensor(rewards), 6))


def test_everything_is_repeatable_and_kept(pair, exploration):
    again = Exploration(pair, [StudentHistory.of_pair(pair)], [PROMPT], ["7"], samples=6, max_new_tokens=LIMIT, seed=1)
    assert [ids(r) for r in again.responses(0)] == [ids(r) for r in exploration.responses(0)]
    assert exploration.responses(0)[2] is exploration.responses(0)[2]
    other = Exploration(pair, [StudentHistory.of_pair(pair)], [PROMPT], ["7"], samples=6, max_new_tokens=LIMIT, seed=2)
    assert [ids(r) for r in other.responses(0)] != [ids(r) for r in exploration.responses(0)]


def first_difference(exploration):
    return next((r, p) for r in exploration.responses(0) for p in range(1, r.length) if bool(r.view.differs[r.row, p]))


def test_the_teachers_token_starts_a_branch(pair, exploration):
    parent, position = first_difference(exploration)
    branch = exploration.take_token(parent.name, position)
    proposal = int(parent.view.teacher_best[parent.row, position])
    assert ids(branch)[:position] == ids(parent)[:position]
    assert ids(branch)[position] == proposal != ids(parent)[position]
    assert branch.length <= LIMIT
    assert (branch.branch.parent, branch.branch.position, branch.branch.token) == (parent.name, position, proposal)
    assert branch.reward == (marked_answer(branch.text, "7") if branch.finished else 0.0)
    assert exploration.branches == [branch] and exploration.find("0:b1", 0) is branch

    # All continuations again, from the function that makes them: their rewards are counted.
    rollouts = continue_after(
        pair,
        parent.view.rollouts,
        parent.row,
        position,
        proposal,
        max_new_tokens=LIMIT,
        continuations=6,
        seed=1,
    )
    right = sum(
        marked_answer(text, "7") if done else 0
        for text, done in zip(rollouts.texts(pair.tokenizer), rollouts.finished.tolist(), strict=True)
    )
    assert branch.branch.continuations == 6 and branch.right_continuations == right

    # Its advantage is that of the group in which it takes its parent's place.
    rewards = torch.tensor([r.reward for r in exploration.responses(0)])
    rewards[parent.row] = branch.reward
    assert branch.view.advantages.tolist() == pytest.approx([group_advantages(rewards, 6)[parent.row].item()])


def test_a_branch_is_compared_in_its_parents_place(pair, exploration):
    """A right response that is ended at once is wrong: its advantage is that of the group with one right less."""
    parent = next(r for r in exploration.responses(0) if r.reward == 1 and r.length > 1)
    branch = exploration.take_token(parent.name, 0, pair.end_tokens[0])
    rewards = torch.tensor([r.reward for r in exploration.responses(0)])
    rewards[parent.row] = 0.0
    assert branch.reward == 0
    assert branch.view.advantages.tolist() == pytest.approx([group_advantages(rewards, 6)[parent.row].item()])
    assert branch.view.advantages[0] != parent.view.advantages[parent.row]


def test_a_branch_off_a_branch_and_undoing_both(exploration):
    parent, position = first_difference(exploration)
    first = exploration.take_token(parent.name, position)
    other = next(
        t
        for t in first.view.student_top_tokens[0, position].tolist() + first.view.teacher_top_tokens[0, 0].tolist()
        if t != ids(first)[0]
    )
    second = exploration.take_token(first.name, 0, other)
    assert second.name == "0:b2" and second.branch.parent == "0:b1" and ids(second)[0] == other
    rewards = torch.tensor([r.reward for r in exploration.responses(0)])
    rewards[parent.row] = second.reward
    assert second.view.advantages.tolist() == pytest.approx([group_advantages(rewards, 6)[parent.row].item()])
    assert exploration.undo_branch() is second
    assert exploration.undo_branch() is first
    assert exploration.undo_branch() is None and exploration.branches_at(0) == []


def test_an_end_token_ends_the_branch(pair, exploration):
    parent = next(r for r in exploration.responses(0) if r.length > 3)
    branch = exploration.take_token(parent.name, 1, pair.end_tokens[0])
    assert ids(branch) == [ids(parent)[0], pair.end_tokens[0]] and branch.finished


def test_the_last_place_leaves_nothing_to_continue(pair):
    short = Exploration(pair, [StudentHistory.of_pair(pair)], [PROMPT], ["7"], samples=4, max_new_tokens=2)
    parent = next(r for r in short.responses(0) if not r.finished)
    token = next(t for t in range(40, 60) if t != ids(parent)[1] and t not in pair.end_tokens)
    branch = short.take_token(parent.name, 1, token)
    assert ids(branch) == [ids(parent)[0], token] and not branch.finished and branch.reward == 0


@pytest.mark.parametrize(
    ("name", "position", "token", "message"),
    [
        ("0:99", 0, None, "no response '0:99'"),
        ("0:0", 99, None, "no token 99"),
        ("0:0", -1, None, "no token -1"),
        ("0:0", 0, 10**6, "is no token"),
        ("0:0", 0, "written", "is that token already"),
    ],
)
def test_branches_that_cannot_be_are_refused(exploration, name, position, token, message):
    token = ids(exploration.responses(0)[0])[0] if token == "written" else token
    with pytest.raises(InputError, match=message):
        exploration.take_token(name, position, token)
    assert exploration.branches == []


def test_every_step_has_its_own_student(pair, over_steps, run_folder):
    assert over_steps.steps == [0, 1, 2, 3]
    written = [[ids(r) for r in over_steps.responses(step)] for step in over_steps.steps]
    assert written[0] != written[3]
    for step in (0, 3):
        response = over_steps.responses(step)[1]
        model = load_model(run_folder / "checkpoints" / f"step-{step:06d}", torch.float32, "cpu")
        tokens = torch.tensor([[*response.view.rollouts.prompts[1], *ids(response)]])
        with torch.no_grad():
            logprobs = model(tokens).logits[0, -1 - response.length : -1].log_softmax(-1)
        expected = logprobs[torch.arange(response.length), torch.tensor(ids(response))]
        found = response.view.student_logprobs[1, : response.length]
        assert torch.allclose(found, expected, atol=2e-4)


def test_the_same_responses_under_every_student(over_steps):
    first = over_steps.responses(0)
    later = over_steps.responses(3, written_at=0)
    assert [ids(r) for r in later] == [ids(r) for r in first]
    assert not torch.allclose(later[0].view.student_logprobs, first[0].view.student_logprobs, atol=1e-3)
    assert torch.allclose(later[0].view.teacher_logprobs, first[0].view.teacher_logprobs)
    assert over_steps.responses(0, written_at=0)[0] is first[0]


def test_guidance_has_the_weight_of_its_step(over_steps):
    found = [over_steps.responses(step)[0].view.guidance_weight for step in over_steps.steps]
    assert found == pytest.approx([0.5, 0.4, 0.3, 0.3])  # the last update was made with 0.3


def test_branches_belong_to_the_student_that_wrote_them(over_steps):
    parent = over_steps.responses(3)[0]
    token = next(t for t in parent.view.teacher_top_tokens[0, 0].tolist() if t != ids(parent)[0])
    branch = over_steps.take_token("0:0", 0, token, step=3)
    assert branch.step == 3
    assert over_steps.branches_at(3) == [branch] and over_steps.branches_at(0) == []
    with pytest.raises(InputError, match="no response '0:b1' at step 0"):
        over_steps.find("0:b1", 0)


def test_two_runs_start_alike_and_a_run_without_a_step_shows_its_last(pair, run_folder, tmp_path):
    fewer = tmp_path / "fewer"
    shutil.copytree(run_folder, fewer)
    for step in (1, 3):
        shutil.rmtree(fewer / "checkpoints" / f"step-{step:06d}")
    both = Exploration(
        pair, [StudentHistory.of_run(run_folder), StudentHistory.of_run(fewer)], [PROMPT], ["7"], samples=2,
        max_new_tokens=LIMIT,
    )  # fmt: skip
    assert both.steps == [0, 1, 2, 3]
    assert [(r.name, r.step) for r in both.responses(3)] == [("0:0", 3), ("0:1", 3), ("1:0", 2), ("1:1", 2)]
    start = both.responses(0)
    assert [ids(r) for r in start[:2]] == [ids(r) for r in start[2:]]


def test_given_rollouts_are_looked_at_as_they_are(pair, exploration):
    rollouts = exploration.responses(0)[0].view.rollouts
    given = Exploration(pair, [StudentHistory.of_pair(pair)], answers=["7"] * 6, rollouts=rollouts, max_new_tokens=4)
    assert [ids(r) for r in given.responses(0)] == [ids(r) for r in exploration.responses(0)]
    assert [r.reward for r in given.responses(0)] == [r.reward for r in exploration.responses(0)]
    assert given.responses(0)[0].prompt == PROMPT and not given.samples_anew
    assert given.max_new_tokens == rollouts.responses.shape[1]


def test_without_an_answer_nothing_is_judged(pair):
    unknown = Exploration(pair, [StudentHistory.of_pair(pair)], [PROMPT], samples=3, max_new_tokens=LIMIT)
    assert all(r.reward is None for r in unknown.responses(0))
    assert not unknown.responses(0)[0].view.advantages.any()
    token = (ids(unknown.responses(0)[0])[0] + 1) % pair.vocabulary_size
    branch = unknown.take_token("0:0", 0, token)
    assert branch.reward is None and branch.right_continuations is None


def test_greedy_has_one_response_and_one_continuation(pair):
    greedy = Exploration(pair, [StudentHistory.of_pair(pair)], [PROMPT], ["7"], temperature=0.0, max_new_tokens=LIMIT)
    (response,) = greedy.responses(0)
    assert ids(response) == response.view.student_best[0, : response.length].tolist()
    branch = greedy.take_token("0:0", 0, (ids(response)[0] + 1) % pair.vocabulary_size)
    assert branch.branch.continuations == 1
    assert ids(branch)[1:] == branch.view.student_best[0, 1 : branch.length].tolist()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": []}, "nothing to look at"),
        ({"answers": ["7", "8"]}, "one answer for each prompt, but there are 1 and 2"),
        ({"samples": 0}, "samples must be 1 or more"),
        ({"max_new_tokens": 0}, "max_new_tokens must be 1"),
        ({"max_new_tokens": 1000}, "made for at most 128"),
        ({"temperature": -1.0}, "temperature must be 0"),
        ({"temperature": float("nan")}, "temperature must be 0"),
        ({"top_k": 0}, "top_k must be from 1"),
        ({"reward": "kindness"}, "Unknown reward"),
        ({"histories": []}, "not 0"),
        ({"prompts": [""]}, "has no tokens"),
    ],
)
def test_impossible_explorations_are_refused(pair, changes, message):
    options = {"histories": [StudentHistory.of_pair(pair)], "prompts": [PROMPT], "answers": None, **changes}
    histories, prompts, answers = (options.pop(name) for name in ("histories", "prompts", "answers"))
    with pytest.raises(InputError, match=message):
        Exploration(pair, histories, prompts, answers, **options)


def test_rollouts_without_a_token_are_refused(pair, exploration):
    rollouts = exploration.responses(0)[0].view.rollouts
    empty = replace(rollouts, mask=torch.zeros_like(rollouts.mask))
    with pytest.raises(InputError, match="a row without tokens"):
        Exploration(pair, [StudentHistory.of_pair(pair)], rollouts=empty)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda h, pair: h.student(pair, 7), "no student of step 7: kept are 0, 1, 2, 3.*keep_checkpoints=0"),
        (lambda h, pair: h.student(replace(pair, vocabulary_size=10**6), 1), "Load the pair that the run was made"),
    ],
)
def test_students_that_do_not_fit_are_refused(pair, run_folder, call, message):
    with pytest.raises(InputError, match=message):
        call(StudentHistory.of_run(run_folder), pair)


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds no run"):
        StudentHistory.of_run(tmp_path)


def test_a_damaged_checkpoint_is_refused(pair, run_folder, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(run_folder, broken)
    weights = broken / "checkpoints" / "step-000001" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(InputError, match="damaged or cut short"):
        StudentHistory.of_run(broken).student(pair, 1)


def test_another_methods_run_is_looked_at_with_the_tiny_worlds_guidance(run_folder, tmp_path):
    other = tmp_path / "rkl"
    shutil.copytree(run_folder, other)
    file = other / "config.json"
    stored = json.loads(file.read_text())
    stored["config"]["method"] = {"class": "ReverseKLPolicyGradient", "clip_low": 0.2, "clip_high": 0.2}
    file.write_text(json.dumps(stored))
    history = StudentHistory.of_run(other)
    assert history.label == "rkl" and history.guidance(2)[1] == 0.02


def test_several_prompts_are_groups_of_their_own(pair):
    both = Exploration(
        pair, [StudentHistory.of_pair(pair)], [PROMPT, "0+0+7="], ["7", "8"], samples=4, max_new_tokens=LIMIT
    )
    found = both.responses(0)
    assert Counter(r.prompt for r in found) == {PROMPT: 4, "0+0+7=": 4}
    rewards = torch.tensor([r.reward for r in found])
    assert torch.allclose(found[0].view.advantages, group_advantages(rewards, 4))
