"""A teacher behind a real HTTP server on this machine: its answers, a training step with them, and all that goes wrong.

The server speaks vLLM's form of completions with prompt_logprobs and computes each answer from the plain forward pass
of the whole model, not with any function of the package.
"""

import asyncio
import functools
import json
import shutil
import signal
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import tgpo_lab
from tgpo_lab.doctor.diagnose import diagnose
from tgpo_lab.errors import InputError
from tgpo_lab.methods import make_method
from tgpo_lab.rollouts import Rollouts
from tgpo_lab.runs import latest_checkpoint
from tgpo_lab.teacher import ask_teacher
from tgpo_lab.teachers import server as server_module
from tgpo_lab.teachers.prompt_logprobs import PrefixAnswer, TeacherServerError
from tgpo_lab.teachers.server import KEY_VARIABLE, ServerTeacher

VOCABULARY = 2048


class Server:
    """An HTTP server with a tiny teacher. ``fault`` and ``alter`` spoil its answers; ``raised`` its last tokens."""

    def __init__(self, folder: Path):
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.raised = 0  # so many of the last tokens are far more probable than all others
        self.fault: Callable[[int, BaseHTTPRequestHandler], bool] = lambda number, handler: False
        self.alter: Callable[[dict], object] = lambda answer: answer
        self.models = [{"id": "teacher", "object": "model", "root": str(folder), "max_model_len": 128}]
        self.bodies: list[dict] = []
        self.keys: list[str | None] = []
        self.under_way = self.most_under_way = self.completions = 0
        self.pause = 0.0
        self.release = threading.Event()
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_GET(self):
                outer.keys.append(self.headers.get("Authorization"))
                self.reply({"object": "list", "data": outer.models} if self.path == "/v1/models" else {}, 200)

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.keys.append(self.headers.get("Authorization"))
                if self.path == "/tokenize" and outer.tokenizer is None:
                    self.reply({"detail": "Not Found"}, 404)
                    return
                if self.path == "/tokenize":
                    self.reply({"tokens": outer.tokenizer.encode(body["prompt"], add_special_tokens=False)}, 200)
                    return
                with outer._lock:
                    outer.bodies.append(body)
                    outer.completions += 1
                    number = outer.completions
                    outer.under_way += 1
                    outer.most_under_way = max(outer.most_under_way, outer.under_way)
                try:
                    time.sleep(outer.pause)
                    if not outer.fault(number, self):
                        self.reply(*outer.complete(body))
                finally:
                    with outer._lock:
                        outer.under_way -= 1

            def reply(self, answer, status):
                data = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}/v1"

    def close(self):
        self.release.set()
        self._http.shutdown()
        self._http.server_close()

    @torch.no_grad()
    def logits(self, tokens: list[int]) -> torch.Tensor:
        logits = self.model(torch.tensor([tokens])).logits[0].clone()
        if self.raised:
            logits[:, -self.raised :] += 9.0
        return logits

    def complete(self, body: dict) -> tuple[object, int]:
        """As vLLM: entry t is a table of token id → log-probability after t tokens, the prompt's own among them."""
        tokens, count = body["prompt"], body["prompt_logprobs"]
        if count > 20:
            return {"error": {"message": f"Requested prompt logprobs of {count}, which is greater than 20"}}, 400
        if body.get("max_tokens", 16) < 1:
            return {"error": {"message": "max_tokens must be at least 1"}}, 400
        with self._lock:
            logprobs = self.logits(tokens).log_softmax(-1)
        entries: list[dict | None] = [None]
        for position in range(1, len(tokens)):
            row = logprobs[position - 1]
            top = [tokens[position], *row.topk(count).indices.tolist()]
            entries.append(
                {
                    str(t): {"logprob": float(row[t]), "rank": int((row > row[t]).sum()) + 1, "decoded_token": "?"}
                    for t in top
                }
            )
        choice = {"index": 0, "text": "?", "logprobs": None, "finish_reason": "length", "prompt_logprobs": entries}
        if body.get("return_token_ids"):
            choice["prompt_token_ids"] = tokens
        return self.alter({"id": "cmpl-1", "object": "text_completion", "choices": [choice]}), 200


@pytest.fixture
def server(random_pair, monkeypatch):
    monkeypatch.setattr(server_module, "FIRST_PAUSE", 0.01)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    running = Server(random_pair.teacher)
    yield running
    running.close()


@pytest.fixture
def asking(server):
    """A function that makes a ServerTeacher, which has not checked its server."""

    def make(**options):
        return ServerTeacher(server.url, **{"vocabulary_size": VOCABULARY, "teacher_rows": VOCABULARY, **options})

    return make


@pytest.fixture
def tiny_config(tiny_config, tmp_path):
    return functools.partial(tiny_config, tmp_path)


def rollouts_from(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    width = max(response for _, response in lengths)
    mask = torch.tensor([[t < response for t in range(width)] for _, response in lengths])
    responses = torch.randint(0, VOCABULARY, (len(lengths), width), generator=generator) * mask
    prompts = [torch.randint(0, VOCABULARY, (prompt,), generator=generator).tolist() for prompt, _ in lengths]
    return Rollouts(prompts, responses, mask, torch.ones(len(lengths), dtype=torch.bool), pad_token=0)


SOME = [(3, 5), (1, 2), (5, 6), (2, 1), (4, 4), (3, 0)]


# ── Answers ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("top_k", [0, 4, 20])
def test_a_server_answers_as_the_model_in_this_process_does(server, asking, top_k):
    rollouts = rollouts_from(SOME)
    ours = ask_teacher(server.model, rollouts, vocabulary_size=VOCABULARY, micro_batch_tokens=30, top_k=top_k)
    theirs = asking(requests=2).ask(rollouts, top_k=top_k)
    assert torch.equal(theirs.tokens, ours.tokens)
    for name in ("logprobs", "confidence"):
        torch.testing.assert_close(getattr(theirs, name), getattr(ours, name), atol=1e-4, rtol=0)
    if top_k:
        assert torch.equal(theirs.top_tokens, ours.top_tokens)
        torch.testing.assert_close(theirs.top_logprobs, ours.top_logprobs, atol=1e-4, rtol=0)
    assert (theirs.top_tokens is None) == (top_k == 0)
    assert theirs.hidden is None and theirs.sampled_tokens is None


def test_what_is_sent_is_token_ids_and_one_request_a_row(server, asking):
    rollouts = rollouts_from(SOME)
    asking().ask(rollouts)
    sequences, lengths = rollouts.sequences()
    sent = [row[: length + n].tolist() for row, length, n in zip(sequences, lengths, rollouts.lengths, strict=True)]
    assert sorted(body["prompt"] for body in server.bodies) == sorted(sent)
    assert {(body["prompt_logprobs"], body["max_tokens"]) for body in server.bodies} == {(1, 1)}


def test_no_more_requests_are_under_way_than_allowed(server, asking):
    server.pause = 0.02
    asking(requests=3).ask(rollouts_from(SOME * 3))
    assert 1 < server.most_under_way <= 3


def test_waiting_for_a_place_is_not_held_against_a_request(server, asking):
    server.pause = 0.1  # 25 one after the other take longer than one may
    assert len(asking(requests=1, timeout=2, retries=0).ask(rollouts_from(SOME[:5] * 5)).tokens) == 25


def test_it_can_be_asked_where_a_loop_runs_already_as_in_a_notebook(server, asking):
    async def cell():
        return asking().ask(rollouts_from(SOME))

    assert torch.equal(asyncio.run(cell()).tokens, asking().ask(rollouts_from(SOME)).tokens)


@pytest.mark.parametrize(("raised", "asked"), [(2, [5]), (6, [5, 10]), (16, [5, 10, 20])])
def test_tokens_that_the_student_lacks_are_cut_and_the_rest_is_divided_by_what_is_left(server, asking, raised, asked):
    server.raised = raised
    rollouts, kept = rollouts_from([(3, 5), (2, 3)]), VOCABULARY - raised
    rollouts.responses.clamp_(max=kept - 1)
    answers = asking(vocabulary_size=kept).ask(rollouts)
    for row, t in rollouts.mask.nonzero().tolist():
        prefix = rollouts.prompts[row] + rollouts.responses[row, :t].tolist()
        logprobs = server.logits(prefix)[-1, :kept].double().log_softmax(-1)
        assert int(answers.tokens[row, t]) == int(logprobs.argmax())
        assert float(answers.confidence[row, t]) == pytest.approx(float(logprobs.max()), abs=1e-3)
        own = float(logprobs[rollouts.responses[row, t]])
        assert float(answers.logprobs[row, t]) == pytest.approx(own, abs=1e-3)
    assert [body["prompt_logprobs"] for body in server.bodies if body["prompt"][:3] == rollouts.prompts[0]] == asked


def test_a_teacher_that_writes_nothing_the_student_has_is_refused(server, asking):
    server.raised = 40
    with pytest.raises(InputError, match="20 most probable tokens are such as the student lacks"):
        asking(vocabulary_size=VOCABULARY - 40).ask(rollouts_from([(3, 2)]))


def test_cutting_by_hand():
    # Half the mass lies on token 9, which is cut: what is left counts double.
    found = PrefixAnswer(-3.0, [(9, torch.tensor(0.5).log().item()), (2, -1.5), (4, -1.5)]).within(9)
    assert found.logprob == pytest.approx(-3.0 + 0.6931472)
    assert [token for token, _ in found.top] == [2, 4]
    assert [value for _, value in found.top] == pytest.approx([-1.5 + 0.6931472] * 2)


def test_of_equal_tokens_the_lowest_is_taken_as_a_model_here_does(server, asking):
    def tie(answer):
        for entry in answer["choices"][0]["prompt_logprobs"][1:]:
            best = max(value["logprob"] for value in entry.values())
            for value in entry.values():
                value["logprob"] = min(best, -1.0)
        return answer

    server.alter = tie
    rollouts = rollouts_from([(2, 4)])
    tokens = asking().ask(rollouts).tokens[0]
    entries = server.complete(completion_body(server.bodies[0]))[0]["choices"][0]["prompt_logprobs"][2:]
    assert tokens.tolist() == [min(map(int, entry)) for entry in entries]


def completion_body(body):
    return {**body, "return_token_ids": False}


def test_what_a_server_cannot_give_is_refused(asking):
    rollouts = rollouts_from([(2, 2)])
    with pytest.raises(InputError, match="not whole distributions"):
        asking().ask(rollouts, keep_distribution=rollouts.mask)
    with pytest.raises(InputError, match="not tokens drawn from the teacher"):
        asking().ask(rollouts, sampling_seed=1)
    with pytest.raises(InputError, match="writes no responses"):
        asking().write([[1]], 1, 0)


# ── What goes wrong on the way ───────────────────────────────────────────────────────────────────


def status_500(number, handler):
    handler.reply({"error": {"message": "the engine is starting"}}, 500)
    return True


def dies_in_mid_answer(number, handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [{"prompt_logpr')
    handler.close_connection = True
    return True


def not_json(number, handler):
    return sends(b"<html>Bad gateway</html>", handler)


def nested(number, handler):
    return sends(b"[" * 100_000, handler)


def sends(data: bytes, handler) -> bool:
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data)
    return True


def stalls(server):
    def fault(number, handler):
        server.release.wait(20)
        return True

    return fault


def trickles(server):
    """A byte now and then: no single wait is long."""

    def fault(number, handler):
        handler.send_response(200)
        handler.send_header("Content-Length", "100000")
        handler.end_headers()
        while not server.release.wait(0.02):
            handler.wfile.write(b" ")
            handler.wfile.flush()
        return True

    return fault


FAULTS = {
    "500": (lambda server: status_500, "answered with status 500 .the engine is starting."),
    "mid-answer": (lambda server: dies_in_mid_answer, "could not be reached or broke off .RemoteProtocolError"),
    "not JSON": (lambda server: not_json, "something that is not JSON .<html>Bad gateway</html>."),
    "brackets": (lambda server: nested, "something that is not JSON .\\[\\[\\["),
    "stalls": (stalls, "did not answer within 0.3 seconds"),
    "trickles": (trickles, "did not answer within 0.3 seconds"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_that_passes_is_outlived(server, asking, name):
    fault, _ = FAULTS[name]
    teacher, rollouts = asking(timeout=0.3, retries=2), rollouts_from([(3, 4)])
    expected = ask_teacher(server.model, rollouts, vocabulary_size=VOCABULARY, micro_batch_tokens=100)
    server.fault = lambda number, handler: number <= 2 and fault(server)(number, handler)
    assert torch.equal(teacher.ask(rollouts).tokens, expected.tokens)
    assert server.completions == 3


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_that_stays_ends_in_one_sentence_after_the_bound(server, asking, name):
    fault, message = FAULTS[name]
    server.fault = fault(server)
    with pytest.raises(TeacherServerError, match=rf"{message}.*; attempts: 3\. "):
        asking(timeout=0.3, retries=2).ask(rollouts_from([(3, 4)]))
    assert server.completions == 3


def test_a_server_that_is_not_there(server, asking):
    teacher = asking(retries=1)
    server.close()
    with pytest.raises(TeacherServerError, match=r"could not be reached or broke off .ConnectError"):
        teacher.ask(rollouts_from([(3, 4)]))


def test_one_failure_ends_the_requests_under_way(server, asking):
    def fault(number, handler):
        if number == 2:
            handler.reply({"error": {"message": "no"}}, 403)
        else:
            server.release.wait(20)
        return True

    server.fault = fault
    with pytest.raises(TeacherServerError, match="refused with status 403"):
        asking(timeout=600).ask(rollouts_from(SOME))
    assert not server.release.is_set()


def test_ctrl_c_ends_a_request_under_way(server, asking):
    def fault(number, handler):
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        server.release.wait(20)
        server.release.set()
        return True

    server.fault = fault
    with pytest.raises(KeyboardInterrupt):
        asking(timeout=600).ask(rollouts_from([(3, 4)]))
    assert not server.release.is_set(), "the request was waited for"


def at_position(number, change):
    def alter(answer):
        answer["choices"][0]["prompt_logprobs"][number] = change(answer["choices"][0]["prompt_logprobs"][number])
        return answer

    return alter


def with_logprobs(value):
    return lambda entry: {token: {**found, "logprob": value} for token, found in entry.items()}


def shortened(answer):
    answer["choices"][0]["prompt_logprobs"].pop()
    return answer


def of_another_prompt(answer):
    answer["choices"][0]["prompt_token_ids"] = [1] * len(answer["choices"][0]["prompt_token_ids"])
    return answer


def text_tokens(entry):
    return {f"token {token}": found for token, found in entry.items()}


NONSENSE = {
    "a list": (lambda answer: [], r"no choices\[0\].prompt_logprobs"),
    "no choices": (lambda answer: {"choices": []}, r"no choices\[0\].prompt_logprobs"),
    "null": (lambda answer: {"choices": [{"prompt_logprobs": None}]}, r"no choices\[0\].prompt_logprobs"),
    "too short": (shortened, "6 positions for a prompt of 7 tokens"),
    "another prompt": (of_another_prompt, "another prompt than the one that was sent"),
    "an empty position": (at_position(4, lambda entry: None), "no table of log-probabilities"),
    "no log-probability": (at_position(4, lambda entry: {t: {} for t in entry}), "no table of log-probabilities"),
    "texts for ids": (at_position(4, text_tokens), "no table of log-probabilities"),
    "other tokens": (at_position(4, lambda entry: {"3": {"logprob": -1.0}}),
                     r"the tokens \[3\] where token \d+ was sent"),
    "NaN": (at_position(5, with_logprobs(float("nan"))), "a log-probability that is not finite"),
    "infinity": (at_position(5, with_logprobs(float("-inf"))), "a log-probability that is not finite"),
    "logits": (at_position(5, with_logprobs(12.5)), "numbers up to 12.5 as log-probabilities"),
    "too probable": (at_position(5, with_logprobs(-0.01)), "which make a probability of 1.98"),
}  # fmt: skip


@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense_is_named_and_not_learned_from(server, asking, name):
    server.alter, message = NONSENSE[name]
    with pytest.raises(TeacherServerError, match=message):
        asking().ask(rollouts_from([(3, 4)]))
    assert server.completions == 1  # asking again would give the same


# ── Before a run ─────────────────────────────────────────────────────────────────────────────────


def test_a_server_is_examined_before_a_run(server, asking):
    assert asking().check(longest=100, top_k=8) == "teacher"
    with pytest.raises(InputError, match=r"The longest sequence may have 128 tokens, .* at most 128"):
        asking().check(longest=128, top_k=1)
    with pytest.raises(InputError, match="serves no model 'other': it serves teacher"):
        asking(model="other").check(10, 1)
    with pytest.raises(InputError, match=r"status 400 .Requested prompt logprobs of 21.*max-logprobs"):
        asking().check(10, 21)
    server.models.append({"id": "draft"})
    with pytest.raises(InputError, match=r"serves draft, teacher\. Name one as teacher_server_model"):
        asking().check(10, 1)
    assert asking(model="draft").check(1000, 1) == "draft"  # its limit is not known
    assert server.bodies[-1]["model"] == "draft"
    with pytest.raises(InputError, match="lists no models"):
        ServerTeacher(server.url + "/v2", vocabulary_size=10, teacher_rows=10).check(10, 1)


def test_a_key_comes_from_the_environment_and_is_not_written_down(server, tiny_config, monkeypatch):
    config = tiny_config(teacher_server=server.url, steps=1)
    monkeypatch.setenv(KEY_VARIABLE, "very-secret")
    result = tgpo_lab.train(config, show_progress=False)
    assert set(server.keys) == {"Bearer very-secret"}
    texts = [f.read_bytes() for f in Path(result.directory).rglob("*") if f.is_file()]
    assert not any(b"very-secret" in text for text in texts)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "exact-rkl"}, "exact-rkl needs the teacher's whole distribution"),
        ({"method": "gkd"}, "gkd needs the teacher's whole distribution"),
        ({"method": "tgpo-full"}, "tgpo-full needs the teacher's whole distribution"),
        ({"method": "tgpo-sampled"}, "tgpo-sampled needs a token drawn from the teacher"),
        ({"method": "sft"}, "sft needs responses that the teacher writes"),
        ({"method": "luffy"}, "luffy needs responses that the teacher writes"),
        ({"method": "tgpo-unconditioned"}, "tgpo-unconditioned needs responses"),
        ({"teacher_device": "cpu"}, "teacher_device is for a teacher in this process"),
        ({"teacher_offload": True}, "teacher_offload is for a teacher in this process"),
        ({"teacher_cache": "traces"}, "teacher_cache is for a teacher in this process"),
        ({"teacher_server": "host:8000"}, "must be an address such as .* but is 'host:8000'"),
        ({"teacher_server": "http://host:port/v1"}, "must be an address such as"),
        ({"teacher_server": "http:///v1"}, "must be an address such as"),
        ({"teacher_server": "http://me:secret@host/v1"}, "must be an address alone"),
        ({"teacher_server": "http://host/v1?key=secret"}, "must be an address alone"),
        ({"teacher_server_requests": 0}, "teacher_server_requests must be 1 or more"),
        ({"teacher_server_retries": -1}, "teacher_server_retries must be 0 or more"),
        ({"teacher_server_timeout": 0.0}, "teacher_server_timeout must be above 0"),
    ],
)
def test_a_configuration_that_a_server_cannot_serve_is_refused(tiny_config, changes, message):
    with pytest.raises(InputError, match=message) as refused:
        tiny_config(**{"teacher_server": "http://host:8000/v1", **changes})
    assert "secret" not in str(refused.value)


# ── Training ─────────────────────────────────────────────────────────────────────────────────────


def weights(folder):
    return load_file(latest_checkpoint(Path(folder)) / "model.safetensors")


def gradients_of_one_update(config, monkeypatch):
    seen = {}

    def keep(self, *args, **kwargs):
        for number, group in enumerate(self.param_groups):
            for index, parameter in enumerate(group["params"]):
                seen[number, index] = parameter.grad.clone()

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", keep)
        return seen, tgpo_lab.train(config, show_progress=False).metrics


@pytest.mark.parametrize("method", ["tgpo", "tgpo-top-k", "tgpo-soft-horizon", "rkl", "kdrl"])
def test_a_step_through_the_server_is_the_step_with_the_model_here(
    server, tiny_config, tmp_path, monkeypatch, random_pair, method
):
    common = {"method": method, "steps": 1, "max_gradient_norm": 1e9}
    ours, here = gradients_of_one_update(tiny_config(output=str(tmp_path / "here"), **common), monkeypatch)
    without = shutil.copytree(random_pair.teacher, tmp_path / "no-weights")
    (without / "model.safetensors").unlink()  # nothing of them is needed here
    config = tiny_config(output=str(tmp_path / "server"), teacher=str(without), teacher_server=server.url, **common)
    theirs, there = gradients_of_one_update(config, monkeypatch)
    scale = max(float(gradient.abs().max()) for gradient in ours.values())
    assert scale > 0
    for key in ours:
        torch.testing.assert_close(theirs[key], ours[key], atol=1e-4 * scale, rtol=1e-3)
    for name in ("reward", "entropy", "kl_sampled", "rejected", "agreement", "loss_teacher", "teacher_tokens"):
        assert there[name].iloc[0] == pytest.approx(here[name].iloc[0], rel=1e-4, abs=1e-5), name
    assert here["reverse_kl"].notna().iloc[0]
    assert there[["reverse_kl", "forward_kl", "teacher_entropy"]].isna().all(axis=None)
    read = sum(len(body["prompt"]) for body in server.bodies[1:])  # the first was the examination
    assert there["teacher_tokens"].iloc[0] == read


def test_a_server_that_dies_in_a_run_leaves_a_whole_checkpoint_and_the_run_goes_on_at_another(
    server, tiny_config, tmp_path, random_pair
):
    common = {"steps": 4, "checkpoint_every": 1, "teacher_server_retries": 1}
    whole = tgpo_lab.train(
        tiny_config(output=str(tmp_path / "whole"), teacher_server=server.url, **common), show_progress=False
    )
    server.completions, server.fault = 0, lambda number, handler: number > 20 and status_500(number, handler)
    config = tiny_config(output=str(tmp_path / "cut"), teacher_server=server.url, **common)
    with pytest.raises(
        TeacherServerError,
        match=rf"status 500 .*step-000002\. Once that is put right, go on: .*--resume {config.output}",
    ):
        tgpo_lab.train(config, show_progress=False)
    assert latest_checkpoint(Path(config.output)).name == "step-000002"
    other = Server(random_pair.teacher)
    try:
        resumed = tgpo_lab.train(config.with_changes(teacher_server=other.url), resume=True, show_progress=False)
    finally:
        other.close()
    assert resumed.completed
    one, two = weights(whole.directory), weights(resumed.directory)
    assert all(torch.equal(one[name], two[name]) for name in one)
    with pytest.raises(InputError, match="teacher_server"):
        tgpo_lab.train(config.with_changes(teacher_server=None), resume=True, show_progress=False)


def test_a_server_that_runs_out_of_memory_is_no_reason_to_halve_micro_batches_here(server, tiny_config, capsys):
    def full(number, handler):
        if number > 1:  # the first is the examination
            handler.reply({"error": {"message": "CUDA out of memory. Tried to allocate 2 GiB."}}, 500)
        return number > 1

    server.fault = full
    config = tiny_config(teacher_server=server.url, teacher_server_retries=0, teacher_server_requests=1)
    with pytest.raises(TeacherServerError, match=r"status 500 .CUDA out of memory.*Once that is put right, go on: "):
        tgpo_lab.train(config, show_progress=False)
    assert server.completions == 2 and "micro_batch" not in capsys.readouterr().err


def test_a_server_that_cannot_serve_the_run_stops_it_before_anything_is_written(server, tiny_config, tmp_path):
    server.models[0]["max_model_len"] = 10
    with pytest.raises(InputError, match="reads at most 10"):
        tgpo_lab.train(tiny_config(teacher_server=server.url), show_progress=False)
    assert not (tmp_path / "run").exists()


def test_the_server_is_reached_from_the_command_line(server, command, random_pair, tmp_path):
    flags = ["--quiet", "--method", "rkl", "--student", random_pair.student, "--teacher", random_pair.teacher,
             "--dataset", random_pair.prompts, "--steps", 1, "--prompts-per-step", 2, "--group-size", 2,
             "--max-new-tokens", 8, "--evaluation-prompts", 4, "--output", tmp_path / "run"]  # fmt: skip
    nowhere = ["--teacher-server", "http://127.0.0.1:9/v1", "--teacher-server-retries", 0]
    status, _, error = command("train", *flags, *nowhere)
    assert status == 2
    assert error.startswith("tgpo-lab: The teacher's server http://127.0.0.1:9/v1/models could not be reached")
    assert len(error.splitlines()) == 1 and not (tmp_path / "run").exists()
    status, _, error = command("train", *flags, "--teacher-server", server.url)
    assert status == 0, error
    server.completions, server.fault = 0, lambda number, handler: number > 2 and status_500(number, handler)
    again = [*flags[:-1], tmp_path / "cut", "--teacher-server", server.url, "--teacher-server-retries", 0,
             "--teacher-server-requests", 1]  # fmt: skip
    status, _, error = command("train", *again)
    assert status == 1 and len(error.splitlines()) == 1  # what was given was right
    assert error.strip().endswith(f"go on: tgpo-lab train --resume {tmp_path / 'cut'}")


def test_the_shares_of_a_schedule_that_waits_for_agreement_are_there(server, tiny_config):
    from tgpo_lab.schedules import UntilAgreement

    method = make_method("tgpo", weight=UntilAgreement(0.5, agreement=0.001, patience=1, ramp=2))
    frame = tgpo_lab.train(tiny_config(method=method, teacher_server=server.url), show_progress=False).metrics
    assert frame["weight"].iloc[2] < frame["weight"].iloc[0]


# ── The doctor ───────────────────────────────────────────────────────────────────────────────────


def test_the_doctor_examines_the_server_in_place_of_the_weights(server, tiny_config, random_pair, tmp_path):
    without = shutil.copytree(random_pair.teacher, tmp_path / "no-weights")
    (without / "model.safetensors").unlink()
    found = diagnose(tiny_config(teacher=str(without), teacher_server=server.url), prompts=4, device="cpu")
    said = {(f.level, f.subject): f.text for f in found.findings}
    assert found.status == 1, str(found)
    assert "It cuts texts as" in said["ok", "teacher server"]
    assert said["warning", "divergence"].startswith("It was not measured")
    assert ("ok", "sampling noise") in said and "teacher" not in found.memory.parts
    tokens, pair = [], tgpo_lab.load_pair(random_pair.student, random_pair.teacher)
    for prompt in tgpo_lab.tasks.prompts.load_prompts(random_pair.prompts)["validation"]["prompt"][:4]:
        tokens.append(int(server.logits(pair.encode([prompt])[0])[-1].argmax()))
    assert repr(pair.tokenizer.decode([max(tokens, key=tokens.count)])) in said["ok", "opening"]


def test_the_doctor_refuses_a_server_with_another_tokenizer_and_one_out_of_reach(server, tiny_config):
    config = tiny_config(teacher_server=server.url, teacher_server_retries=0)
    whole = server.tokenizer
    server.tokenizer = SimpleNamespace(encode=lambda text, **_: whole.encode(text, add_special_tokens=False)[::-1])
    found = diagnose(config, prompts=4, device="cpu")
    assert found.status == 2 and "into other tokens than the tokenizer of" in str(found)
    server.tokenizer = None
    assert "its tokenizer was not compared" in str(diagnose(config, prompts=4, device="cpu"))
    server.close()
    found = diagnose(config, prompts=4, device="cpu")
    assert found.status == 2 and "could not be reached" in str(found)


@pytest.mark.parametrize("changes", [{"teacher_offload": True}, {"teacher_device": "cpu"}])
def test_the_doctor_examines_a_teacher_elsewhere(tiny_config, changes):
    assert diagnose(tiny_config(**changes), prompts=4, device="cpu").card is not None
