"""Importance weights: unbiased by enumeration, truncated by hand, and in every policy gradient."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tgpo_lab.importance import truncated_importance_weights
from tgpo_lab.losses import kdrl_loss, policy_gradient_loss
from tgpo_lab.methods import make_method, method_entries
from tgpo_lab.metrics import read_rows
from tgpo_lab.sampling import engine
from tgpo_lab.sampling.cached_sampling import sample_responses
from tgpo_lab.training import train

LOGITS = torch.tensor([0.3, -1.2, 2.0, 0.0, -0.4], dtype=torch.float64)
ENGINE = torch.tensor([0.5, -1.0, 1.5, 0.4, -0.9], dtype=torch.float64).log_softmax(-1)
REWARDS = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.0], dtype=torch.float64)


def expected_gradient(loss, drawn_under: torch.Tensor, cap: float | None) -> torch.Tensor:
    """Σ_y π_drawn(y) · ∇ loss(y), token by token."""
    total = torch.zeros_like(LOGITS)
    for token in range(len(LOGITS)):
        logits = LOGITS.clone().requires_grad_()
        own = logits.log_softmax(-1)[token].view(1, 1)
        weights = None if cap is None else truncated_importance_weights(own, drawn_under[token].view(1, 1), cap)
        loss(own, token, weights).backward()
        total += drawn_under[token].exp() * logits.grad
    return total


def gradient_of_policy(own, token, weights):
    mask = torch.ones(1, 1)
    return policy_gradient_loss(own, own.detach(), REWARDS[token].view(1, 1), mask, math.inf, math.inf, 1, weights)


def gradient_of_kdrl(own, token, weights):
    teacher = REWARDS.log_softmax(-1)[token].view(1, 1)
    return kdrl_loss(own, teacher, torch.ones(1, 1), 1, weights)


@pytest.mark.parametrize("loss", [gradient_of_policy, gradient_of_kdrl])
def test_without_a_cap_tokens_of_another_policy_give_the_gradient_of_this_one(loss):
    wanted = expected_gradient(loss, LOGITS.log_softmax(-1), None)
    torch.testing.assert_close(expected_gradient(loss, ENGINE, math.inf), wanted, rtol=1e-12, atol=1e-12)
    assert (expected_gradient(loss, ENGINE, None) - wanted).abs().max() > 0.05  # uncorrected, it is another


def test_the_policy_gradient_is_that_of_the_mean_reward():
    logits = LOGITS.clone().requires_grad_()
    (-(logits.softmax(-1) * REWARDS).sum()).backward()
    torch.testing.assert_close(expected_gradient(gradient_of_policy, ENGINE, math.inf), logits.grad)


def test_weights_by_hand():
    # Ratios 0.5/0.1 = 5, 0.2/0.4 = 0.5, 0.3/0.3 = 1 under a cap of 2.
    updated, drawn = torch.tensor([[0.5, 0.2, 0.3]]).log(), torch.tensor([[0.1, 0.4, 0.3]]).log()
    weights = truncated_importance_weights(updated.requires_grad_(), drawn, 2.0)
    torch.testing.assert_close(weights, torch.tensor([[2.0, 0.5, 1.0]]))
    assert not weights.requires_grad
    assert float(truncated_importance_weights(updated, drawn, math.inf)[0, 0].detach()) == pytest.approx(5.0)
    assert truncated_importance_weights(updated, updated, 1.0).tolist() == [[1.0, 1.0, 1.0]]


def test_a_weighted_token_by_hand():
    # −(2·3·1 + 0.5·(−1)·1)/2 = −2.75
    own = torch.tensor([[0.5, 0.25]]).log()
    loss = policy_gradient_loss(
        own, own, torch.tensor([[3.0, -1.0]]), torch.ones(1, 2), weights=torch.tensor([[2.0, 0.5]])
    )
    assert float(loss) == pytest.approx(-2.75)


def test_a_cap_below_one_is_refused():
    with pytest.raises(ValueError, match=r"cap must be 1 or more, but is 0\.5"):
        truncated_importance_weights(torch.zeros(1, 1), torch.zeros(1, 1), 0.5)


def shifted(monkeypatch, by: float) -> None:
    """Let the own engine say that it drew every token under a log-probability lower by so much."""

    def sample(*arguments, **options):
        rollouts = sample_responses(*arguments, **options)
        return replace(rollouts, logprobs=None if rollouts.logprobs is None else rollouts.logprobs - by)

    monkeypatch.setattr(engine, "sample_responses", sample)


def losses_of_first_step(config) -> dict[str, float]:
    train(config, show_progress=False)
    return read_rows(config_rows(config))[0]


def config_rows(config) -> Path:
    return Path(config.output) / "metrics.jsonl"


SCALED = {"grpo": "reward", "grpo++": "reward", "luffy": "reward", "tgpo": "reward", "kdrl": "both", "rkl": "teacher"}
UNSCALED = {"sft": "teacher", "exact-rkl": "teacher", "gkd": "teacher"}


@pytest.mark.parametrize("method", [*SCALED, *UNSCALED])
@pytest.mark.parametrize("updates", [1, 2])
def test_weights_reach_every_policy_gradient_and_nothing_else(tiny_config, tmp_path, monkeypatch, method, updates):
    """All ratios are 1.5, so terms with weights are 1.5 times as large, and under a cap of 1.2 they are 1.2 times."""
    if updates == 2 and method not in ("rkl", "kdrl"):
        pytest.skip("log π_old is the same for all methods")
    changes = {"method": method, "steps": 1, "evaluate_every": 0, "gradient_terms_every": 1, "mini_batches": updates}
    plain = losses_of_first_step(tiny_config(tmp_path, **changes, output=str(tmp_path / "plain")))
    shifted(monkeypatch, math.log(1.5))
    for cap, factor in ((2.0, 1.5), (1.2, 1.2)):
        config = tiny_config(tmp_path, **changes, importance_cap=cap, output=str(tmp_path / f"cap-{cap}"))
        row = losses_of_first_step(config)
        for kind in ("reward", "teacher"):
            wanted = factor if SCALED.get(method) in (kind, "both") else 1.0
            if f"gradient_norm_{kind}" in plain:
                # Of several updates this is the first one's, made before the student has moved.
                assert row[f"gradient_norm_{kind}"] == pytest.approx(wanted * plain[f"gradient_norm_{kind}"], rel=1e-3)
        assert row["importance_truncated"] == (1.0 if factor == cap else 0.0)
        assert row["engine_difference"] == pytest.approx(math.log(1.5), abs=1e-5)
        assert row["engine_difference_largest"] == pytest.approx(math.log(1.5), abs=1e-4)
        assert row["engine_kl"] == pytest.approx(1.5 - 1 - math.log(1.5), abs=1e-5)
        assert row["kl_sampled"] == pytest.approx(plain["kl_sampled"], rel=1e-5)  # log π_old is the update's own


def test_every_method_is_looked_at():
    """A new class of method has to be put into one of the two lists."""
    known = {type(make_method(name)) for name in (*SCALED, *UNSCALED)}
    assert {type(entry.method) for entry in method_entries()} == known


def test_without_a_cap_the_run_is_the_same_whatever_the_engine_says(tiny_config, tmp_path, monkeypatch):
    plain = train(tiny_config(tmp_path, output=str(tmp_path / "plain")), show_progress=False)
    shifted(monkeypatch, 1.0)
    other = train(tiny_config(tmp_path, output=str(tmp_path / "shifted")), show_progress=False)
    assert all(torch.equal(a, b) for a, b in zip(plain.student.parameters(), other.student.parameters(), strict=True))
    assert "importance_truncated" not in read_rows(config_rows(other.config))[0]


def test_where_engine_and_update_agree_weights_change_nothing_but_rounding(tiny_config, tmp_path):
    plain = train(tiny_config(tmp_path, output=str(tmp_path / "plain")), show_progress=False)
    weighted = train(tiny_config(tmp_path, importance_cap=2.0, output=str(tmp_path / "w")), show_progress=False)
    for a, b in zip(plain.student.parameters(), weighted.student.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    row = read_rows(config_rows(weighted.config))[0]
    assert 0 <= row["engine_kl"] < 1e-10 and row["engine_difference"] < 1e-5 and row["importance_truncated"] == 0.0


def test_sampling_in_bfloat16_is_measured(tiny_config, tmp_path):
    config = tiny_config(tmp_path, precision="bfloat16", importance_cap=math.inf, steps=1)
    row = losses_of_first_step(config)
    assert 1e-5 < row["engine_difference"] < row["engine_difference_largest"] < 1.0
