"""The loop: every method, micro-batches, several updates, exact resume, interruption, non-finite numbers."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tgpo_lab
from tgpo_lab import batch, teacher, training
from tgpo_lab.errors import InputError
from tgpo_lab.loop import preparation, student_pass
from tgpo_lab.loop.stopping import NonFiniteError
from tgpo_lab.methods import make_method, method_entries
from tgpo_lab.metrics import METRICS
from tgpo_lab.runs import latest_checkpoint
from tgpo_lab.schedules import Constant, LinearDecay
from tgpo_lab.teachers import sources

ALL_METHODS = [entry.name for entry in method_entries()]


@pytest.fixture
def tiny_config(tiny_config, tmp_path):
    return functools.partial(tiny_config, tmp_path)


def weights(result_or_folder):
    folder = getattr(result_or_folder, "directory", result_or_folder)
    return load_file(latest_checkpoint(Path(folder)) / "model.safetensors")


def largest_difference(first, second):
    first, second = weights(first), weights(second)
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def run(config, **options):
    return tgpo_lab.train(config, show_progress=False, **options)


@pytest.mark.parametrize("method", ALL_METHODS)
def test_every_method_trains_and_fills_the_same_columns(tiny_config, method):
    result = run(tiny_config(method=make_method(method, tiny=True), gradient_terms_every=1))
    assert result.completed
    frame = result.metrics
    assert list(frame.columns) == ["step", *METRICS]
    row = frame.iloc[0]
    always = ["reward", "length", "entropy", "kl_sampled", "reverse_kl", "forward_kl", "agreement", "rejected",
              "positive_signal", "clip_fraction", "gradient_norm", "truncated", "tokens", "seconds_update"]  # fmt: skip
    assert row[always].notna().all()
    assert frame["accuracy"].iloc[-1] == frame["accuracy"].iloc[-1]  # the last row has the final accuracy
    assert torch.isfinite(torch.tensor(row[always].to_numpy(dtype=float))).all()


def changed_teacher(tmp_path, random_pair):
    """The same pair with a teacher of other weights."""
    pair = tgpo_lab.load_pair(random_pair.student, random_pair.teacher)
    torch.manual_seed(99)
    for parameter in pair.teacher.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    pair.teacher.save_pretrained(tmp_path / "other-teacher")
    pair.tokenizer.save_pretrained(tmp_path / "other-teacher")
    return str(tmp_path / "other-teacher")


@pytest.mark.parametrize("method", [name for name in ALL_METHODS if name not in ("grpo", "grpo++")])
def test_every_method_with_a_teacher_learns_something_else_from_another_teacher(
    tiny_config, tmp_path, random_pair, method, monkeypatch
):
    """Public code has trained with teacher terms in which the teacher did not occur."""
    if method == "kdrl-wrong-groups":  # it asks the teacher only where no response of a group is right
        monkeypatch.setattr(training, "score", lambda rollouts, *others, processes: torch.zeros(len(rollouts)))
    made = make_method(method, tiny=True)
    one = run(tiny_config(method=made, output=str(tmp_path / "one"), steps=1))
    two = run(
        tiny_config(method=made, output=str(tmp_path / "two"), steps=1, teacher=changed_teacher(tmp_path, random_pair))
    )
    assert largest_difference(one, two) > 1e-6


def test_luffy_learns_from_the_teachers_trace(tiny_config, tmp_path, random_pair, monkeypatch):
    """The trace is right and the samples are wrong, as its whole point is; so the traces decide the update."""

    def traces_are_right(rollouts, answers, judge, tokenizer, *, processes):
        rewards = torch.zeros(len(rollouts))
        rewards[8:] = 1.0  # 2 prompts × 4 samples come first
        return rewards

    monkeypatch.setattr(training, "score", traces_are_right)
    made = make_method("luffy")
    one = run(tiny_config(method=made, output=str(tmp_path / "one"), steps=1))
    two = run(
        tiny_config(method=made, output=str(tmp_path / "two"), steps=1, teacher=changed_teacher(tmp_path, random_pair))
    )
    assert one.metrics["teacher_trace_tokens"].iloc[0] > 0
    assert largest_difference(one, two) > 1e-6


@pytest.mark.parametrize(
    "method",
    ["tgpo", "grpo++", "rkl", "exact-rkl", "kdrl", "tgpo-full", "tgpo-top-k", "tgpo-soft-horizon", "sft"],
)
def test_splitting_a_batch_into_micro_batches_changes_nothing_but_rounding(tiny_config, tmp_path, method):
    made = make_method(method, tiny=True)
    common = {"method": made, "steps": 1, "max_new_tokens": 16, "gradient_terms_every": 1, "measured_positions": 0}
    whole = run(tiny_config(output=str(tmp_path / "whole"), micro_batch_tokens=100_000, **common))
    parts = run(tiny_config(output=str(tmp_path / "parts"), micro_batch_tokens=30, **common))
    start = load_file(Path(whole.directory) / "checkpoints" / "step-000000" / "model.safetensors")
    assert max(float((weights(whole)[n] - start[n]).abs().max()) for n in start) > 1e-5, "nothing was learned"
    columns = ["reverse_kl", "agreement", "kl_sampled", "gradient_norm", "loss_teacher", "gradient_norm_teacher"]
    for column in [*columns, "guided"]:
        pair = whole.metrics[column].iloc[0], parts.metrics[column].iloc[0]
        assert pair[0] == pytest.approx(pair[1], rel=1e-4, abs=1e-6, nan_ok=True), column


@pytest.mark.parametrize("mini_batches", [1, 2])
def test_the_share_of_guided_tokens_is_reported_while_guidance_counts(tiny_config, tmp_path, mini_batches):
    def guided(name, **options):
        made = make_method(name, **{"weight": LinearDecay(0.1, 0.05), **options} if name != "grpo" else {})
        config = tiny_config(method=made, output=str(tmp_path / name), mini_batches=mini_batches)
        return run(config).metrics["guided"].tolist()[:3]

    nan = pytest.approx(float("nan"), nan_ok=True)
    assert guided("tgpo") == [1, 1, nan]  # the weight has reached 0 at the third step
    assert guided("tgpo-trust-horizon", gate_threshold=1e6) == [1, 1, nan]
    soft = guided("tgpo-soft-horizon")
    assert 0 < soft[0] < 1 and 0 < soft[1] < 1
    for name in ("tgpo-unconditioned", "grpo"):
        assert guided(name) == [nan, nan, nan]


def gradients_of_one_update(config, monkeypatch):
    """Gradients as the optimiser gets them: with AdamW's first step, weights alone would show only their signs."""
    seen = {}

    def keep(self, *args, **kwargs):
        for number, group in enumerate(self.param_groups):
            for index, parameter in enumerate(group["params"]):
                seen[number, index] = parameter.grad.clone()

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", keep)
        run(config)
    return seen


@pytest.mark.parametrize("method", ["tgpo", "rkl", "kdrl", "gkd", "sft", "tgpo-soft-horizon", "tgpo-unconditioned"])
def test_gradients_of_micro_batches_add_up_to_the_gradient_of_the_batch(tiny_config, tmp_path, monkeypatch, method):
    common = {"method": make_method(method, tiny=True), "steps": 1, "max_gradient_norm": 1e9}
    whole = gradients_of_one_update(
        tiny_config(output=str(tmp_path / "whole"), micro_batch_tokens=100_000, **common), monkeypatch
    )
    parts = gradients_of_one_update(
        tiny_config(output=str(tmp_path / "parts"), micro_batch_tokens=30, **common), monkeypatch
    )
    scale = max(float(g.abs().max()) for g in whole.values())
    assert scale > 0
    for key in whole:
        torch.testing.assert_close(whole[key], parts[key], atol=1e-4 * scale, rtol=1e-3)


def test_the_same_seed_gives_the_same_run_and_another_seed_another(tiny_config, tmp_path):
    first = run(tiny_config(output=str(tmp_path / "a")))
    again = run(tiny_config(output=str(tmp_path / "b")))
    other = run(tiny_config(output=str(tmp_path / "c"), seed=1))
    assert largest_difference(first, again) == 0.0
    assert largest_difference(first, other) > 0.0
    columns = [c for c in METRICS if not c.startswith("seconds")]
    assert first.metrics[columns].equals(again.metrics[columns])


def test_all_methods_see_the_same_prompts_and_the_same_first_samples(tiny_config, tmp_path):
    runs = [
        run(tiny_config(method=make_method(m, tiny=True), output=str(tmp_path / m))) for m in ("rkl", "grpo", "tgpo")
    ]
    for column in ("reward", "length", "kl_sampled", "reverse_kl", "accuracy"):
        assert len({float(result.metrics[column].iloc[0]) for result in runs}) == 1


def test_a_teacher_that_is_the_student_gives_no_reverse_kl_and_no_gradient(tiny_config, random_pair):
    config = tiny_config(
        method=make_method("exact-rkl"), teacher=str(random_pair.student), steps=1, measured_positions=0
    )
    row = run(config).metrics.iloc[0]
    for column in ("reverse_kl", "forward_kl", "kl_sampled", "rejected", "loss_teacher"):
        assert row[column] == pytest.approx(0.0, abs=1e-6), column
    assert row["agreement"] == 1.0
    assert row["gradient_norm"] < 1e-5


@pytest.mark.parametrize("name", ["exact-rkl", "gkd", "forward-kl"])
def test_what_the_loss_projects_is_not_projected_before_it(tiny_config, tmp_path, monkeypatch, name):
    """The same run with the teacher's output layer once, and once in each of the two phases."""
    positions, found, true = [], {}, teacher.project_to_vocabulary

    def counted(model, hidden, *size):
        if not model.get_output_embeddings().weight.requires_grad:
            positions[-1] += len(hidden)
        return true(model, hidden, *size)

    monkeypatch.setattr(teacher, "project_to_vocabulary", counted)
    monkeypatch.setattr(batch, "project_to_vocabulary", counted)
    options = {"method": make_method(name), "micro_batch_tokens": 64, "measured_positions": 1,
               "gradient_terms_every": 0}  # fmt: skip
    for alone in (True, False):
        positions.append(0)
        monkeypatch.setattr(type(options["method"]), "asks_for_logits_alone", alone)
        found[alone] = run(tiny_config(**options, output=str(tmp_path / str(alone))))
    first, second = found[True].metrics, found[False].metrics
    tokens, steps = first["tokens"].sum(), first["tokens"].notna().sum()
    assert positions == [tokens + steps, 2 * tokens + steps]  # one is measured in each step
    assert largest_difference(found[True], found[False]) == 0
    for column in METRICS.keys() - {c for c in METRICS if c.startswith("seconds")}:
        assert first[column].tolist() == pytest.approx(second[column].tolist(), rel=1e-4, abs=1e-6, nan_ok=True), column
    monkeypatch.setattr(type(options["method"]), "asks_for_logits_alone", True)
    several = run(tiny_config(**options, mini_batches=2, output=str(tmp_path / "several")))  # looked at without a loss
    assert several.metrics["kl_sampled"][0] == pytest.approx(first["kl_sampled"][0], rel=1e-4)


def test_with_several_updates_the_first_ratio_is_one_and_later_ones_are_clipped(tiny_config, tmp_path):
    method = make_method("rkl")
    once = run(tiny_config(method=method, output=str(tmp_path / "once"), steps=1))
    assert once.metrics["clip_fraction"].iloc[0] == 0.0
    many = run(
        tiny_config(method=method, output=str(tmp_path / "many"), steps=1, mini_batches=2, passes=4, learning_rate=3e-2)
    )
    assert many.metrics["clip_fraction"].iloc[0] > 0.2
    # The measurements are those before the first update, so they do not change.
    for column in ("reverse_kl", "kl_sampled", "reward"):
        assert many.metrics[column].iloc[0] == pytest.approx(once.metrics[column].iloc[0], rel=1e-2)


def test_bfloat16_runs_and_measures_about_the_same(tiny_config, tmp_path):
    exact = run(tiny_config(output=str(tmp_path / "exact"), steps=1, measured_positions=0))
    half = run(tiny_config(output=str(tmp_path / "half"), steps=1, measured_positions=0, precision="bfloat16"))
    assert half.metrics["entropy"].iloc[0] == pytest.approx(exact.metrics["entropy"].iloc[0], rel=0.05)
    assert weights(half)["model.norm.weight"].dtype == torch.float32


def test_gradient_checkpointing_changes_nothing_but_rounding(tiny_config, tmp_path, monkeypatch):
    plain = gradients_of_one_update(tiny_config(output=str(tmp_path / "plain"), steps=1), monkeypatch)
    recomputed = gradients_of_one_update(
        tiny_config(output=str(tmp_path / "again"), steps=1, gradient_checkpointing=True), monkeypatch
    )
    for key in plain:
        torch.testing.assert_close(plain[key], recomputed[key], atol=1e-6, rtol=1e-4)


def test_gradient_checkpointing_computes_again_and_brings_no_dropout(tiny_config, tmp_path, random_pair, monkeypatch):
    student = Path(shutil.copytree(random_pair.student, tmp_path / "student"))
    settings = json.loads((student / "config.json").read_text())
    (student / "config.json").write_text(json.dumps(settings | {"attention_dropout": 0.5}))
    usual, computed = torch.nn.functional.silu, []  # of each layer, by whichever way it is read
    monkeypatch.setattr(torch.nn.functional, "silu", lambda x, **options: (computed.append(1), usual(x, **options))[1])
    found, counts = [], []
    for again in (False, True):
        config = tiny_config(output=str(tmp_path / str(again)), student=str(student), teacher=str(random_pair.teacher),
                             steps=1, evaluate_every=0, gradient_checkpointing=again)  # fmt: skip
        computed.clear()
        found.append(gradients_of_one_update(config, monkeypatch))
        counts.append(len(computed))
    assert counts[1] > counts[0]
    for key, gradient in found[0].items():
        assert (found[1][key] - gradient).norm() <= 1e-4 * gradient.norm(), key


def test_gradient_checkpointing_goes_on_after_an_update(tiny_config, tmp_path):
    # Held-out accuracy is sampled with a cache, which recomputation in training mode does not allow.
    plain, recomputed = (
        run(tiny_config(output=str(tmp_path / str(again)), evaluate_every=1, gradient_checkpointing=again))
        for again in (False, True)
    )
    assert recomputed.metrics["accuracy"].notna().all()
    for name in ("accuracy", "reward", "tokens"):
        assert recomputed.metrics[name].equals(plain.metrics[name])


COMMAND = [sys.executable, "-m", "tgpo_lab", "train"]


def flags(config):
    return [
        "--quiet", "--method", "tgpo", "--method.weight", "UntilAgreement(0.5, agreement=0.001, patience=3, ramp=4)",
        "--student", config.student, "--teacher", config.teacher, "--dataset", config.dataset,
        "--steps", "8", "--prompts-per-step", "2", "--group-size", "4", "--max-new-tokens", "12",
        "--evaluate-every", "0", "--evaluation-prompts", "4", "--checkpoint-every", "3", "--learning-rate", "1e-3",
    ]  # fmt: skip


def start(arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*COMMAND, *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_for_rows(folder, count, process, seconds=120):
    file = folder / "metrics.jsonl"
    limit = time.monotonic() + seconds
    while not (file.exists() and len(file.read_text().splitlines()) >= count):
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < limit, "the run makes no progress"
        time.sleep(0.01)


def test_a_run_killed_and_resumed_ends_with_the_same_weights_bit_for_bit(tiny_config, tmp_path):
    config = tiny_config()
    whole = start([*flags(config), "--output", str(tmp_path / "whole")])
    assert whole.wait(300) == 0, whole.stderr.read().decode()
    killed = tmp_path / "killed"
    for rows in (2, 5):  # killed before the first later checkpoint, then again between two
        arguments = (
            ["--quiet", "--resume", str(killed)] if killed.exists() else [*flags(config), "--output", str(killed)]
        )
        process = start(arguments)
        wait_for_rows(killed, rows, process)
        process.send_signal(signal.SIGKILL)
        process.wait(60)
        assert len((killed / "metrics.jsonl").read_text().splitlines()) < 8
    (killed / "checkpoints" / ".step-000009.writing").mkdir()  # what a kill while saving leaves behind
    with (killed / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "rew')  # and a line that was cut short
    resumed = start(["--quiet", "--resume", str(killed)])
    assert resumed.wait(300) == 0, resumed.stderr.read().decode()

    assert largest_difference(tmp_path / "whole", killed) == 0.0
    optimizers = [
        load_file(latest_checkpoint(tmp_path / name) / "optimizer.safetensors") for name in ("whole", "killed")
    ]
    assert all(torch.equal(optimizers[0][key], optimizers[1][key]) for key in optimizers[0])
    rows = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "killed")
    ]
    assert [row["step"] for row in rows[1]] == list(range(9))
    for one, two in zip(*rows, strict=True):
        assert {k: v for k, v in one.items() if "seconds" not in k} == {
            k: v for k, v in two.items() if "seconds" not in k
        }
    assert rows[0][-2]["weight"] < rows[0][0]["weight"], "the schedule's state was not exercised"


def test_ctrl_c_saves_and_says_how_to_go_on(tiny_config, tmp_path):
    config, folder = tiny_config(), tmp_path / "stopped"
    arguments = [a for a in flags(config) if a != "--quiet"]
    arguments[arguments.index("--steps") + 1] = "500"
    process = start([*arguments, "--output", str(folder)])
    wait_for_rows(folder, 2, process)
    process.send_signal(signal.SIGINT)
    output, errors = (stream.decode() for stream in process.communicate(timeout=120))
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert "To go on: tgpo-lab train --resume" in output
    saved = json.loads((latest_checkpoint(folder) / "state.json").read_text())["step"]
    assert saved == len((folder / "metrics.jsonl").read_text().splitlines())
    assert tgpo_lab.load_run(folder).completed is False


def test_a_non_finite_loss_stops_with_step_term_and_batch_saved(tiny_config, tmp_path, monkeypatch):
    config = tiny_config(output=str(tmp_path / "broken"), checkpoint_every=1)
    true_teacher = sources.ask_teacher
    calls = []

    def teacher_with_an_infinite_answer(*args, **kwargs):
        answers = true_teacher(*args, **kwargs)
        calls.append(1)
        if len(calls) == 2:
            answers.logprobs[0, 0] = -torch.inf
        return answers

    monkeypatch.setattr(sources, "ask_teacher", teacher_with_an_infinite_answer)
    with pytest.raises(NonFiniteError, match="Step 1: loss_teacher is not finite"):
        run(config.with_changes(method=make_method("rkl")))
    kept = tmp_path / "broken" / "failed-step-000001"
    assert json.loads((kept / "failure.json").read_text())["where"] == "loss_teacher"
    assert torch.isinf(load_file(kept / "batch.safetensors")["teacher_logprobs"][0, 0])
    checkpoint = latest_checkpoint(tmp_path / "broken")
    assert checkpoint.name == "step-000001"
    assert all(torch.isfinite(tensor).all() for tensor in load_file(checkpoint / "model.safetensors").values())


def test_a_checkpoint_is_an_ordinary_hugging_face_folder(tiny_config):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result = run(tiny_config())
    folder = latest_checkpoint(result.directory)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    tokens = torch.tensor([tokenizer.encode("47+85=")])
    assert torch.equal(model(tokens).logits, result.student(tokens).logits)
    assert not list(Path(result.directory).rglob("*.bin")) + list(Path(result.directory).rglob("*.pt"))


def test_a_longer_run_goes_on_where_a_shorter_one_ended(tiny_config, tmp_path):
    short = tiny_config(output=str(tmp_path / "run"), steps=2)
    run(short)
    longer = run(short.with_changes(steps=4), resume=True)
    straight = run(short.with_changes(steps=4, output=str(tmp_path / "straight")))
    assert largest_difference(longer, straight) == 0.0
    assert longer.metrics["step"].tolist() == [0, 1, 2, 3, 4]


def test_no_two_students_are_there_when_a_run_goes_on(tiny_config, tmp_path, monkeypatch):
    config = tiny_config(output=str(tmp_path / "run"))
    run(config)
    loaded, alive = [], []
    load_pair, load_model = preparation.load_pair, preparation.load_model

    def loads_pair(*arguments, **options):
        pair = load_pair(*arguments, **options)
        loaded.append(weakref.ref(pair.student))
        return pair

    def loads_checkpoint(*arguments, **options):
        alive.append(loaded[0]() is not None)
        return load_model(*arguments, **options)

    monkeypatch.setattr(preparation, "load_pair", loads_pair)
    monkeypatch.setattr(preparation, "load_model", loads_checkpoint)
    assert run(config.with_changes(steps=config.steps + 1), resume=True).completed
    assert alive == [False]


def test_resuming_with_other_options_is_refused(tiny_config, tmp_path):
    config = tiny_config(output=str(tmp_path / "run"))
    run(config)
    with pytest.raises(InputError, match="learning_rate"):
        run(config.with_changes(learning_rate=1.0), resume=True)
    with pytest.raises(InputError, match="already holds a run"):
        run(config)


def test_a_weight_of_zero_is_plain_grpo(tiny_config, tmp_path):
    guided = run(tiny_config(method=make_method("tgpo", weight=Constant(0.0)), output=str(tmp_path / "zero")))
    plain = run(tiny_config(method=make_method("grpo"), output=str(tmp_path / "plain")))
    assert largest_difference(guided, plain) == 0.0


@pytest.mark.parametrize("name", ["tgpo", "exact-rkl", "luffy"])
def test_projecting_a_few_positions_at_a_time_changes_nothing_but_rounding(tiny_config, tmp_path, monkeypatch, name):
    """Student and teacher alike: with chunks of 3 positions every response spans several."""
    config = tiny_config(method=make_method(name), steps=1, gradient_terms_every=1)
    whole = run(config.with_changes(output=str(tmp_path / "whole")))
    for module in (student_pass, teacher):
        monkeypatch.setattr(module, "positions_at_once", lambda vocabulary_size, device: 3)
    parts = run(config.with_changes(output=str(tmp_path / "parts")))
    for column in ("gradient_norm", "gradient_norm_teacher", "loss_teacher", "reverse_kl", "kl_sampled"):
        assert parts.metrics[column].iloc[0] == pytest.approx(whole.metrics[column].iloc[0], rel=1e-4)
    assert whole.metrics["gradient_norm"].iloc[0] > 0
