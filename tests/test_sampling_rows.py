"""Sampling a few rows at a time: the responses of all at once, and never more rows than the bound in the model."""

import json
from pathlib import Path

import pytest
import torch
from process_group import Group

from tgpo_lab.cli import evaluate as cli
from tgpo_lab.config import TrainConfig
from tgpo_lab.errors import InputError
from tgpo_lab.methods import make_method
from tgpo_lab.models.pairs import load_model, load_pair
from tgpo_lab.parallel.processes import Processes
from tgpo_lab.rollouts import Rollouts
from tgpo_lab.sampling.cached_sampling import sample_responses
from tgpo_lab.sampling.divided_sampling import sample_divided
from tgpo_lab.sampling.engine import OwnEngine
from tgpo_lab.sampling.fixed_shape_decoding import FixedShapeDecoder
from tgpo_lab.training import train

EVEN = ["1+2+4=", "3+3+1=", "7+0+0=", "2+2+3=", "6+1+0="]  # 6 tokens each
UNEVEN = ["47+85+36=", "7+8=", "12+34+56+78=", "1=", "3+3+1="]


@pytest.fixture(scope="module")
def pair(random_pair):
    return load_pair(random_pair.student, random_pair.teacher)


class Rows:
    """Most rows that have gone through a model at once; and through which calls."""

    def __init__(self, *models):
        self.seen: list[int] = []
        for model in models:
            # The embeddings are read in every pass, the one over the prompts and those over single tokens.
            model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: self.add(len(inputs[0])))

    def add(self, rows: int) -> None:
        self.seen.append(rows)

    @property
    def most(self) -> int:
        return max(self.seen)


def sample(model, pair, texts, bound=0, *, tokens=14, samples=3, decoder=None, **options) -> Rollouts:
    options = {"temperature": 1.0, "generator": torch.Generator().manual_seed(5), **options}
    return sample_responses(
        model, pair.encode(texts), tokens, pair.end_tokens, pair.pad_token, samples_per_prompt=samples,
        vocabulary_size=pair.vocabulary_size, rows_at_once=bound, decoder=decoder, **options,
    )  # fmt: skip


def assert_same(found: Rollouts, wanted: Rollouts) -> None:
    assert found.prompts == wanted.prompts and found.pad_token == wanted.pad_token
    for name in ("responses", "mask", "finished"):
        assert torch.equal(getattr(found, name), getattr(wanted, name)), name
    assert (found.logprobs is None) == (wanted.logprobs is None)
    if wanted.logprobs is not None:
        torch.testing.assert_close(found.logprobs, wanted.logprobs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("texts", [EVEN, UNEVEN], ids=["even", "uneven"])
@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize("bound", [1, 3, 5, 6, 8, 14, 15, 100])
@pytest.mark.parametrize("way", ["sampled", "greedy", "fixed shapes"])
def test_responses_are_those_of_all_at_once(pair, texts, role, bound, way):
    model = getattr(pair, role)
    options = {"temperature": 0.0 if way == "greedy" else 1.0}
    wanted = sample(model, pair, texts, **options)
    assert 0 < int(wanted.finished.sum()) < len(wanted) or way == "greedy", "take another seed: both kinds are needed"
    decoder = FixedShapeDecoder(model, compiled=False) if way == "fixed shapes" else None
    assert_same(sample(model, pair, texts, bound, decoder=decoder, **options), wanted)


@pytest.mark.parametrize("bound, most", [(0, 15), (1, 3), (3, 3), (5, 3), (6, 6), (8, 6), (12, 12), (100, 15)])
def test_no_more_rows_than_the_bound_but_a_whole_group_go_through_the_model(random_pair, pair, bound, most):
    model = load_model(random_pair.student, torch.float32, "cpu")
    rows = Rows(model)
    sample(model, pair, UNEVEN, bound)
    assert rows.most == most
    assert most <= max(bound, 3) or not bound


def test_numbers_that_are_given_and_a_part_of_the_prompts_are_divided_alike(pair):
    uniform = torch.rand(15, 14, generator=torch.Generator().manual_seed(5))
    wanted = sample(pair.student, pair, EVEN, generator=None, uniform=uniform)
    assert_same(sample(pair.student, pair, EVEN, 4, generator=None, uniform=uniform), wanted)
    part = sample(pair.student, pair, EVEN[1:4], 3, first=1, of=5)
    assert part.responses.tolist() == sample(pair.student, pair, EVEN).rows(torch.arange(3, 12)).responses.tolist()


def test_the_generator_is_left_where_it_would_be(pair):
    """Whoever draws from it afterwards draws the same."""
    states = []
    for bound in (0, 3):
        generator = torch.Generator().manual_seed(5)
        sample(pair.student, pair, EVEN, bound, generator=generator)
        states.append(generator.get_state())
    assert torch.equal(*states)


# ── In a run ─────────────────────────────────────────────────────────────────────────────────────


def rows_of_run(folder) -> list[dict]:
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if "seconds" not in name} for line in lines]


@pytest.mark.parametrize("changes", [{}, {"teacher_cache": "cache"}], ids=["drawn", "cached"])
def test_a_run_samples_evaluates_and_lets_the_teacher_write_within_the_bound(
    tiny_config, tmp_path, monkeypatch, changes
):
    """Updates read other numbers of rows: so only what passes while something is sampled is counted."""
    from tgpo_lab.sampling import cached_sampling

    rows: dict[str, list[int]] = {}
    real = cached_sampling._sample_at_once

    def counted(model, *arguments):
        counter = Rows()
        hook = model.get_input_embeddings().register_forward_hook(lambda m, inputs, output: counter.add(len(inputs[0])))
        found = real(model, *arguments)
        hook.remove()
        rows.setdefault(type(model).__name__, []).append(counter.most)
        return found

    monkeypatch.setattr(cached_sampling, "_sample_at_once", counted)
    if changes:
        changes = {"teacher_cache": str(tmp_path / "cache")}
    settings = {"method": "sft", "prompts_per_step": 4, "evaluation_prompts": 6, **changes}
    most, logs = {}, {}
    for bound in (0, 5):  # of groups of 4: one at a time; of held-out prompts, five
        config = tiny_config(tmp_path, output=str(tmp_path / f"by-{bound}"), sampling_rows=bound, **settings)
        if changes:
            config = config.with_changes(teacher_cache=str(tmp_path / f"cache-{bound}"))
        rows.clear()
        train(config, show_progress=False)
        most[bound], logs[bound] = {name: max(seen) for name, seen in rows.items()}, rows_of_run(config.output)
    assert most == {
        0: {"LlamaForCausalLM": 16, "Qwen3ForCausalLM": 16},
        5: {"LlamaForCausalLM": 5, "Qwen3ForCausalLM": 4},
    }
    for found, wanted in zip(logs[5], logs[0], strict=True):
        assert found == pytest.approx(wanted, rel=1e-4, abs=1e-6)


def test_a_run_that_is_resumed_may_have_another_bound(tiny_config, tmp_path):
    train(tiny_config(tmp_path, steps=2), show_progress=False)
    assert train(tiny_config(tmp_path, steps=3, sampling_rows=4), resume=True, show_progress=False).completed


def test_several_processes_bound_each_their_share(random_pair, tmp_path):
    """Five prompts over two processes, groups of three, at most six rows: two prompts, and then the third."""
    pair = load_pair(random_pair.student, random_pair.teacher)
    wanted = sample(pair.student, pair, UNEVEN)

    def work(index: int) -> None:
        from accelerate import Accelerator

        own = load_pair(random_pair.student, random_pair.teacher)
        rows, processes = Rows(own.student), Processes(Accelerator(cpu=True))
        found = sample_divided(
            processes, OwnEngine(own.student, rows_at_once=6), own.encode(UNEVEN), 14, own.end_tokens, own.pad_token,
            samples_per_prompt=3, generator=torch.Generator().manual_seed(5), vocabulary_size=own.vocabulary_size,
        )  # fmt: skip
        assert_same(found, wanted)
        assert processes.number == 2 and rows.most == 6

    group = Group(2, work, tmp_path)
    assert group.wait() == [0, 0], (group.errors(0), group.errors(1))


# ── Evaluation, and what is refused ──────────────────────────────────────────────────────────────


def test_evaluating_a_run_keeps_its_bound_unless_another_is_given(tiny_config, tmp_path, command, monkeypatch):
    run = train(tiny_config(tmp_path, steps=1, sampling_rows=4), show_progress=False)
    real = cli.evaluate
    most = []

    def evaluate(pair, model, **options):
        rows = Rows(model)
        found = real(pair, model, **options)
        most.append(rows.most)
        return found

    monkeypatch.setattr(cli, "evaluate", evaluate)
    flags = ["evaluate", "--run", run.directory, "--samples-per-prompt", 2, "--temperature", 1]
    printed = [command(*flags, *more)[1] for more in ([], ["--sampling-rows", 0], ["--sampling-rows", 7])]
    assert most == [4, 12, 6]  # six test prompts, two samples each
    assert printed[0] == printed[1] == printed[2] and "accuracy" in printed[0]


def test_a_bound_below_zero_is_refused(command):
    with pytest.raises(InputError, match="sampling_rows must be 0 or more, but is -1"):
        TrainConfig(sampling_rows=-1)
    status, _, error = command("evaluate", "--student", "far", "--sampling-rows", -1)
    assert status == 2 and "sampling_rows must be 0 (all at once) or more, but is -1" in error


def test_vllm_leaves_the_bound_to_the_teacher():
    assert TrainConfig(engine="vllm", sampling_rows=4, method=make_method("sft")).sampling_rows == 4
