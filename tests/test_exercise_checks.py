"""Checks of exercises: what a learner is told about functions as learners write them."""

import math

import pytest
import torch
import torch.nn.functional as F

from tgpo_lab.exercises import EXERCISES, check
from tgpo_lab.exercises.checking import LONGEST_MESSAGE, Exercise, check_function


def message(number, function):
    result = check(number, function)
    assert not result.passed
    assert len(result.message) <= LONGEST_MESSAGE
    return result.message


def cross_entropy_without_minus(logits, tokens, prompt_length):
    rows = logits[:, prompt_length - 1 : -1]
    return F.cross_entropy(rows.transpose(1, 2), tokens[:, prompt_length:], reduction="none")


def not_squeezed(logits, tokens, prompt_length):
    return logits[:, prompt_length - 1 : -1].log_softmax(-1).gather(-1, tokens[:, prompt_length:].unsqueeze(-1))


def whole_number_mask(responses, end_token):
    before = (responses == end_token).int().cumsum(-1) - (responses == end_token).int()
    return 1 - before.clamp(max=1)


def mean_of_chosen(values, mask, normalizer=None):
    return torch.where(mask, values, 0.0).mean()


def all_k_right(right, n, k):
    return sum(math.comb(c, k) / math.comb(n, k) for c in right) / len(right)


def threshold_too(student, teacher, mask, threshold):
    return ((student - teacher)[mask] >= threshold).float().mean().item()


def padding_above_the_bar(student, teacher, mask, threshold):
    return ((student - teacher > threshold).sum() / mask.sum()).item()


def probabilities_compared(student, teacher, mask, threshold):
    return ((student - teacher).exp()[mask] > threshold).float().mean().item()


def kls_with_swapped_weights(student_logits, teacher_logits):
    student, teacher = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    return (student.exp() * (teacher - student)).sum(-1), (teacher.exp() * (student - teacher)).sum(-1)


def cross_entropies(student_logits, teacher_logits):
    student, teacher = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    return -(teacher.exp() * student).sum(-1), -(student.exp() * teacher).sum(-1)


def kls_of_torch(student_logits, teacher_logits):
    student, teacher = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    options = {"log_target": True, "reduction": "batchmean"}
    return F.kl_div(student, teacher, **options), F.kl_div(teacher, student, **options)


def stacked_kls(student_logits, teacher_logits):
    return torch.stack(EXERCISES["03.1"].reference(student_logits, teacher_logits))


def one_kl_not_summed(student_logits, teacher_logits):
    student, teacher = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    return (teacher.exp() * (teacher - student)).sum(-1), (student.exp() * (student - teacher)).sum(-1, keepdim=True)


def reverse_kl_of(student_logits, teacher_logits):
    student, teacher = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    return (student.exp() * (student - teacher)).sum()


def by_grad(student_logits, teacher_logits):
    logits = student_logits.clone().requires_grad_()
    return torch.autograd.grad(reverse_kl_of(logits, teacher_logits), logits)[0]


def by_grad_switched_on(student_logits, teacher_logits):
    with torch.enable_grad():
        return by_grad(student_logits, teacher_logits)


def by_backward(student_logits, teacher_logits):
    student_logits.requires_grad_()
    reverse_kl_of(student_logits, teacher_logits).backward()
    return student_logits.grad


def by_transform(student_logits, teacher_logits):
    return torch.func.grad(reverse_kl_of)(student_logits, teacher_logits)


def by_jacobian(student_logits, teacher_logits):
    return torch.autograd.functional.jacobian(lambda logits: reverse_kl_of(logits, teacher_logits), student_logits)


def one_kl_for_all_positions(student_logits, teacher_logits):
    student, teacher = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    ratio = student - teacher
    return student.exp() * (ratio - (student.exp() * ratio).sum(-1).mean())


def scores_from_the_wrong_side(student_logits, teacher_logits):
    student, teacher = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    scores = torch.eye(len(student), dtype=student.dtype) - student.exp()
    return scores @ (student.exp() * (student - teacher))


def listens_without_weights(loss, student_logits, teacher_logits, other_teacher):
    gradients = []
    for teacher_now in (teacher_logits, other_teacher):
        logits = student_logits.clone().requires_grad_()
        total = sum(loss(logits, teacher_now, token) for token in range(len(logits)))
        gradients.append(torch.autograd.grad(total, logits)[0])
    return not torch.allclose(*gradients, atol=1e-6)


def listens_exactly(loss, student_logits, teacher_logits, other_teacher):
    gradients = []
    for teacher_now in (teacher_logits, other_teacher):
        logits = student_logits.clone().requires_grad_()
        weights = logits.softmax(-1).detach()
        total = sum(weight * loss(logits, teacher_now, token) for token, weight in enumerate(weights))
        gradients.append(torch.autograd.grad(total, logits)[0])
    return not torch.equal(*gradients)


def listens_by_one_draw(loss, student_logits, teacher_logits, other_teacher):
    token = torch.multinomial(student_logits.softmax(-1), 1).item()
    gradients = []
    for teacher_now in (teacher_logits, other_teacher):
        logits = student_logits.clone().requires_grad_()
        gradients.append(torch.autograd.grad(loss(logits, teacher_now, token), logits)[0])
    return not torch.allclose(*gradients, atol=1e-6)


def baseline_by_columns(student_logits, teacher_logits):
    student, teacher = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    scores = torch.eye(len(student), dtype=student.dtype) - student.exp()
    weights = student.exp() * scores.square().sum(0)
    return (weights * (student - teacher)).sum() / weights.sum()


def wrong_factor_detached(logprobs, teacher_logprobs, mask):
    return -((teacher_logprobs - logprobs) * logprobs.detach())[mask].mean()


def one_loss(per_token, mask, micro_batches):
    return sum(per_token[rows][mask[rows]].sum() / mask.sum() for rows in micro_batches)


def losses_as_numbers(per_token, mask, micro_batches):
    return [(per_token[rows][mask[rows]].sum() / mask.sum()).item() for rows in micro_batches]


def losses_without_gradient(per_token, mask, micro_batches):
    return [torch.tensor(loss) for loss in losses_as_numbers(per_token, mask, micro_batches)]


def losses_by_rows(per_token, mask, micro_batches):
    return [per_token[rows][mask[rows]].mean() * len(rows) / len(mask) for rows in micro_batches]


def ratio_detached(logprobs, old_logprobs, advantages, mask):
    ratio = (logprobs - old_logprobs).exp().detach()
    return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)[mask].mean()


def surrogate_times_mask(logprobs, old_logprobs, advantages, mask):
    ratio = (logprobs - old_logprobs).exp()
    return -(torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages) * mask).mean()


def waiting_without_exp(logprob, samples):
    p = -logprob
    return 1 / p, 1 - (1 - p) ** samples


def waiting_swapped(logprob, samples):
    p = math.exp(logprob)
    return 1 - (1 - p) ** samples, 1 / p


def moment_with_weight_inside(student_logits, teacher_logits):
    student, teacher = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    policy = student.exp()
    norm = 1 - 2 * policy + policy.square().sum(-1, keepdim=True)
    return ((policy * (teacher - student)).square() * norm).sum(-1)


@pytest.mark.parametrize(
    ("number", "function", "expected"),
    [
        ("01.1", cross_entropy_without_minus, "These are −log π"),
        ("01.1", not_squeezed, "drop the last dimension with squeeze(-1)"),
        ("01.2", whole_number_mask, "The numbers are right, but the mask must be bool"),
        ("01.3", mean_of_chosen, "mean() counts the places outside the mask as zeros"),
        ("02.2", all_k_right, "the chance that all k are right"),
        ("02.2", lambda right, n, k: [1 - math.comb(n - c, k) / math.comb(n, k) for c in right], "take their mean"),
        ("02.3", threshold_too, "Exactly the threshold is not above it."),
        ("02.3", padding_above_the_bar, "counted padding above the fraction bar"),
        ("02.3", probabilities_compared, "a ratio of probabilities"),
        ("03.1", kls_with_swapped_weights, "The weight must be the distribution in the numerator"),
        ("03.1", cross_entropies, "This is a cross-entropy"),
        ("03.1", kls_of_torch, "You took the mean over the positions"),
        ("03.2", one_kl_for_all_positions, "Each position has its own KL"),
        ("04.1", scores_from_the_wrong_side, "from the wrong side"),
        ("04.2", listens_without_weights, "The tokens are added without weights"),
        ("04.2", listens_exactly, "compare them with a tolerance"),
        ("04.2", listens_by_one_draw, "can cancel in the mean"),
        ("04.3", baseline_by_columns, "The score of a token is its row"),
        ("05.1", wrong_factor_detached, "You detached log πθ"),
        ("05.2", one_loss, "Return the list"),
        ("05.2", losses_as_numbers, "as tensors, so that they can be differentiated"),
        ("05.2", losses_without_gradient, "no gradient flows through them"),
        ("05.2", losses_by_rows, "weighed by its share of the rows"),
        ("05.3", ratio_detached, "the ratio must not be detached"),
        ("05.3", surrogate_times_mask, "not of the number it is divided by"),
        ("06.1", waiting_without_exp, "exp() turns a log-probability into a probability."),
        ("06.1", waiting_swapped, "The two are in the wrong order"),
        ("06.2", moment_with_weight_inside, "πθ(v) is inside the square"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value))[:40],
)
def test_what_learners_write_is_recognised(number, function, expected):
    assert expected in message(number, function)


@pytest.mark.parametrize(
    "function", [by_grad, by_grad_switched_on, by_backward, by_transform, by_jacobian], ids=lambda f: f.__name__
)
def test_autograd_is_noticed_where_it_is_not_wanted(function):
    assert message("03.2", function).startswith("Without autograd: ")


def test_an_error_without_autograd_stays_what_it_is():
    assert "your function raised IndexError" in message("03.2", lambda student, teacher: student[7])


def of_cases(reference, *cases, **options):
    return Exercise("0.0", "made up", reference, lambda: cases, **options)


def told(exercise, function):
    result = check_function(exercise, function)
    assert not result.passed
    assert len(result.message) <= LONGEST_MESSAGE
    return result.message


def test_the_result_is_told_before_the_call():
    expected = "Case 1: expected 0.5333, but got 1.0. (Called with [0, 1, 4, 10], 10, 3.)"
    assert message("02.2", lambda right, n, k: 1) == expected.replace("1.0", "1")
    assert message("02.2", lambda right, n, k: 1.0) == expected


def test_floats_look_like_floats():
    assert "expected -1.0, but got 0.0. (Called with 1.0, 2.)" in told(
        of_cases(lambda x, n: -x, (1.0, 2)), lambda x, n: 0.0
    )
    shown = told(of_cases(torch.exp, (torch.zeros(2),)), lambda x: x)
    assert "expected a tensor [1.0, 1.0], but got a tensor [0.0, 0.0]" in shown


def test_bools_are_shown_as_bools():
    shown = told(of_cases(lambda x: x > 0, (torch.tensor([1, -1]),)), lambda x: x < 0)
    assert "expected a tensor [True, False], but got a tensor [False, True]. (Called with a tensor [1, -1].)" in shown


def test_only_the_call_is_cut():
    exercise = of_cases(lambda *texts: 1.0, ["x" * 500] * 30)
    shown = told(exercise, lambda *texts: 0.0)
    assert shown.startswith("Case 1: expected 1.0, but got 0.0. (Called with 'xxx")
    assert shown.endswith("x….)")
    assert "raised ValueError: yyy" in told(exercise, fails("y" * 900))
    assert "Called with 'xxx" in told(exercise, fails("y" * 900))


def fails(text):
    def function(*arguments):
        raise ValueError(text)

    return function


def test_where_the_first_numbers_agree_the_place_is_told():
    def changed(x):
        x[1, 3] = 9.0
        return x

    assert "expected 0.0 at [1, 3], but got 9.0" in told(of_cases(lambda x: x, (torch.zeros(2, 4),)), changed)


def test_numbers_that_look_alike_are_told_precisely():
    exercise = of_cases(lambda: 0.5, (), tolerance=1e-9)
    assert "expected 0.5, but got 0.50000001" in told(exercise, lambda: 0.50000001)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda s, t: s, "Case 1: expected two results, but got one tensor. (Called"),
        (stacked_kls, "Case 1: expected two results, but got one tensor. (Called"),
        (lambda s, t: 0.5, "Case 1: expected two results, but got one number. (Called"),
        (lambda s, t: (s, t, s), "Case 1: expected two results, but got three. (Called"),
        (one_kl_not_summed, "Case 1, the reverse KL: expected the shape (2, 3), but got (2, 3, 1). (Called"),
        (lambda s, t: (s.sum(-1), t), "Case 1, the forward KL: expected a tensor ["),
    ],
)
def test_several_results_are_told_apart(function, expected):
    assert message("03.1", function).startswith(expected)


def test_results_without_names_are_numbered():
    exercise = of_cases(lambda x: [x, -x], (torch.ones(1),))
    assert told(exercise, lambda x: [x, x]).startswith(
        "Case 1, part 2: expected a tensor [-1.0], but got a tensor [1.0]."
    )
    assert message("06.1", lambda logprob, samples: (2.0, 0.5)).startswith(
        "Case 1, the expected number of samples: expected 1.6487, but got 2.0. (Called with -0.5, 1.)"
    )
    assert message("05.2", lambda per_token, mask, parts: [per_token.sum() for _ in parts]).startswith(
        "Case 1, your losses, part 1: expected a tensor 0."
    )


def test_a_wrong_value_comes_before_a_later_exception():
    exercise = of_cases(
        lambda x: 1 / (x + 1),
        (1.0,),
        (0.0,),
        mistakes={"The one is missing.": lambda x: 1 / x, "Twice too large.": lambda x: 2 / (x + 1)},
    )
    assert told(exercise, lambda x: 1 / x) == "The one is missing."
    assert told(exercise, lambda x: 3 / x) == "Case 1: expected 0.5, but got 3.0. (Called with 1.0.)"
    assert told(exercise, lambda x: 2 / (x + 1)) == "Twice too large."  # the mistake before it fails in case 2
    late = told(exercise, lambda x: 1 / (x + 1) if x else 1 / x)
    assert late.startswith("Case 2: your function raised ZeroDivisionError: ")
    early = told(exercise, lambda x: 5.0 if x == 0 else x / 0)
    assert early.startswith("Case 1: your function raised ZeroDivisionError: ")


def too_small(logprobs, teacher_logprobs, mask):
    return -(0.3 * (teacher_logprobs - logprobs).detach() * logprobs)[mask].mean()


def another_gradient(logprobs, old_logprobs, advantages, mask):
    value = EXERCISES["05.3"].reference(logprobs.detach(), old_logprobs, advantages, mask)
    return value + (logprobs - logprobs.detach()).sum()  # the value is right


@pytest.mark.parametrize(("number", "function"), [("05.1", too_small), ("05.3", another_gradient)])
def test_what_is_observed_is_named(number, function):
    start = "Case 1, the gradient of your loss by the student's log-probabilities: expected a tensor ["
    assert message(number, function).startswith(start)


def test_a_part_with_a_name_needs_no_other_words():
    words = {"observed": "what is observed", "parts": ("the first", "the second")}
    exercise = of_cases(lambda x: (x, -x), (1.0,), **words)
    assert told(exercise, lambda x: (x, x)).startswith("Case 1, the second: expected -1.0, but got 1.0.")
    assert told(exercise, lambda x: x).startswith("Case 1, what is observed: expected two results, but got one number.")


@pytest.mark.parametrize("number", ["05.1", "05.3"])
def test_what_is_no_loss_is_told(number):
    assert "returned a Python number: return a scalar tensor that still has its" in message(
        number, lambda *a: a[0].sum().item()
    )
    assert "returned the shape (3, 2): the loss is one number." in message(number, lambda *a: torch.ones(3, 2))
    assert "returned 'x': the loss is a scalar tensor." in message(number, lambda *a: "x")
    assert "cannot be differentiated" in message(number, differentiated_already)


def differentiated_already(logprobs, *others):
    loss = logprobs.square().sum()
    loss.backward()
    return loss


@pytest.mark.parametrize("number", ["05.1", "05.2", "05.3"])
def test_a_function_may_change_its_arguments(number):
    def changing(values, *others):
        copied = values.clone()
        values[:] = 0.0
        return EXERCISES[number].reference(copied, *others)

    assert check(number, changing).passed


def test_a_bool_tensor_is_another_kind_only_than_what_is_right():
    assert "expected a tensor of bool, but got one of int64" in told(
        of_cases(lambda x: x > 0, (torch.tensor([1, 0]),)), lambda x: x
    )
    # A mistake is recognised from numbers, too: it says more than the kind does.
    assert "always true" in message("01.2", lambda responses, end_token: torch.ones(responses.shape))


def test_an_error_of_torch_is_not_taken_for_an_empty_stub():
    assert "Nothing here yet" in message("01.1", stub)
    assert "not implemented for" in message("01.1", lambda logits, tokens, prompt: tokens.log_softmax(-1))


def stub(*arguments):
    raise NotImplementedError()


@pytest.mark.parametrize(
    "result",
    [torch.zeros(2, 3, 5, device="meta"), torch.zeros(2, 3, 5).to_sparse(), "text", [None], {}, object(), 10**400],
)
def test_a_check_never_raises(result):
    for exercise in EXERCISES.values():
        assert not check_function(exercise, lambda *arguments, **options: result).passed
