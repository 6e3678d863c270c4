"""How prompts are put before the models: plain, with a template, as a chat."""

import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tgpo_lab.errors import InputError
from tgpo_lab.models.pairs import load_pair
from tgpo_lab.tasks.prompt_format import PromptFormat
from tgpo_lab.training import train

# In words that the project's tokenizer knows: turns between ; and <eos>.
TEMPLATE = (
    "{% for m in messages %}{{ {'system': '*', 'user': '?', 'assistant': ':'}[m['role']] }}{{ m['content'] }}"
    "{{ '<eos>' if m['role'] == 'assistant' else ';' }}{% endfor %}{% if add_generation_prompt %}:{% endif %}"
)


@pytest.fixture
def chatting(random_pair, tmp_path):
    """A function that copies a model of the random pair and gives it a chat template."""

    def make(role: str, template: str = TEMPLATE) -> Path:
        folder = Path(shutil.copytree(getattr(random_pair, role), tmp_path / role))
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
        return folder

    return make


def texts(pair, *prompts: str) -> list[str]:
    return pair.tokenizer.batch_decode(pair.encode(list(prompts)))


def test_plain_prompts_stay_as_they_are_and_templates_go_around_them(random_pair):
    assert texts(load_pair(random_pair.student, random_pair.teacher), "1+2=") == ["1+2="]
    form = PromptFormat(prompt_template="the sum {x} {prompt} is")  # braces of its own do no harm
    pair = load_pair(random_pair.student, random_pair.teacher, prompt_format=form)
    assert texts(pair, "1+2", "{x}") == [pair.tokenizer.decode(pair.tokenizer.encode(t)) for t in
                                         ("the sum {x} 1+2 is", "the sum {x} {x} is")]  # fmt: skip


def test_a_chat_opens_the_turn_of_the_assistant(chatting, random_pair):
    student = chatting("student")
    pair = load_pair(student, random_pair.teacher, prompt_format=PromptFormat(True))
    assert texts(pair, "1+2=") == ["?1+2=;:"]
    pair = load_pair(student, random_pair.teacher, prompt_format=PromptFormat(True, "+", "{prompt}="))
    assert texts(pair, "1+2") == ["*+;?1+2=;:"]


def test_special_tokens_are_not_added_twice(chatting, random_pair):
    # A tokenizer that puts <eos> before every text, as some put a beginning-of-text token.
    student = chatting("student", "<eos>" + TEMPLATE)
    tokenizer = AutoTokenizer.from_pretrained(student)
    first = tokenizer.eos_token_id
    from tokenizers import processors

    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<eos> $A", special_tokens=[("<eos>", first)]
    )
    tokenizer.save_pretrained(student)
    plain = load_pair(student, random_pair.teacher)
    assert plain.encode(["1"])[0].count(first) == 1
    chat = load_pair(student, random_pair.teacher, prompt_format=PromptFormat(True))
    assert chat.encode(["1"])[0].count(first) == 1


def test_the_end_of_a_turn_ends_a_response(chatting, random_pair, tokenizer):
    mark = "</think>"
    student = chatting("student", TEMPLATE.replace("<eos>", mark))
    assert PromptFormat(True).end_of_turn(AutoTokenizer.from_pretrained(student)) == tokenizer.convert_tokens_to_ids(
        mark
    )
    chat = load_pair(student, random_pair.teacher, prompt_format=PromptFormat(True))
    assert chat.end_tokens == sorted([tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(mark)])
    assert load_pair(student, random_pair.teacher).end_tokens == [tokenizer.eos_token_id]  # plain: no turns
    assert (
        PromptFormat(True).end_of_turn(
            AutoTokenizer.from_pretrained(chatting("teacher", TEMPLATE.replace("<eos>", ".")))
        )
        is None
    )


def test_a_template_is_told_its_options(chatting, random_pair):
    # As Qwen3's: false in place of the text "false" decides.
    think = "{{ '' if enable_thinking is defined and enable_thinking is false else '<think>' }}{{ more }}"
    student = chatting("student", TEMPLATE + think)

    def read(*options: str) -> str:
        form = PromptFormat(True, chat_template_options=options)
        return form.text(load_pair(student, random_pair.teacher, prompt_format=form).tokenizer, "1")

    assert read() == "?1;:<think>"
    assert read("enable_thinking=false") == "?1;:"
    assert read("enable_thinking=true", "more=a=b") == "?1;:<think>a=b"


def test_the_end_of_a_turn_is_looked_for_with_the_options(chatting):
    needs = "{% if style != 1 %}{{ raise_exception('style?') }}{% endif %}" + TEMPLATE
    tokenizer = AutoTokenizer.from_pretrained(chatting("student", needs))
    assert PromptFormat(True, chat_template_options=("style=1",)).end_of_turn(tokenizer) == tokenizer.eos_token_id
    with pytest.raises(InputError, match="cannot be filled"):
        PromptFormat(True).end_of_turn(tokenizer)


def test_training_in_a_chat_starts_from_the_chat(chatting, tiny_config, tmp_path):
    student = str(chatting("student"))
    plain = train(tiny_config(tmp_path / "plain", student=student, steps=1), show_progress=False)
    chat = train(tiny_config(tmp_path / "chat", student=student, steps=1, chat_template=True), show_progress=False)
    assert chat.completed and chat.metrics["kl_sampled"][0] != plain.metrics["kl_sampled"][0]


def test_what_cannot_work_is_refused(random_pair, chatting):
    with pytest.raises(InputError, match=r"prompt_template.*'Solve:' has no \{prompt\}"):
        PromptFormat(prompt_template="Solve:")
    with pytest.raises(InputError, match=r"system_prompt is a message of a chat. Set chat_template"):
        PromptFormat(system_prompt="Be brief.")
    with pytest.raises(InputError, match=r"chat_template_options are of a chat template. Set chat_template"):
        PromptFormat(chat_template_options=("a=1",))
    for option in ("enable_thinking", "=1", "a b=1", "tokenize=true", "messages=1"):
        with pytest.raises(InputError, match=rf"must be NAME=VALUE .* there is '{option}'"):
            PromptFormat(True, chat_template_options=(option,))
    pair = load_pair(random_pair.student, random_pair.teacher, prompt_format=PromptFormat(True))
    with pytest.raises(InputError, match=rf"{random_pair.student} has no chat template"):
        pair.encode(["1"])


@pytest.mark.parametrize(
    "template, said",
    [("{{ raise_exception('no system message here') }}", "no system message here"), ("{{ 1 // 0 }}", "by zero"),
     ("{% for m in messages %}", "end of template"), ("{{ [][0].content }}", "no element 0")],
)  # fmt: skip
def test_a_template_that_fails_is_refused(random_pair, chatting, template, said):
    student = chatting("student", template)
    with pytest.raises(InputError, match=rf"chat template of {student} cannot be filled .*{said}"):
        load_pair(student, random_pair.teacher, prompt_format=PromptFormat(True))
