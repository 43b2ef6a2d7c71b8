"""Llama 2's template: rendered, parsed back, and verified on tokens."""

import pytest

from helpers import prompts
from helpers.prompts import Conversation, TemplateError

PROMPT = prompts.render_prompt("Add two numbers.", "Be brief.")
COMPLETION = prompts.render_completion("Use `+`:\n\n```python\n1 + 2\n```")


def test_the_template_letter_by_letter():
    """As `chat_completion` in Meta's repository writes it, with BOS and EOS left to the
    tokenizer.
    """
    text = prompts.render(Conversation("S", (("U", "A"),)), bos="<s>", eos="</s>")
    assert text == "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nU [/INST] A </s>"


@pytest.mark.parametrize("bos, eos", [("", ""), ("<s>", "</s>")])
@pytest.mark.parametrize(
    "turns",
    [
        (("U", None),),
        (("U\n\nwith [brackets] and << signs", "A"),),
        (("U", "A"), ("more?", "B\n1. x"), ("last", None)),
        (("U", "A"), ("again", "B")),
    ],
)
def test_parse_undoes_render(turns, bos, eos):
    conversation = Conversation("System\ntext", turns)
    assert prompts.parse(prompts.render(conversation, bos, eos), bos, eos) == conversation


@pytest.mark.parametrize(
    "text",
    [
        PROMPT.replace("<<SYS>>", "<</SYS>>", 1) + COMPLETION,  # the article's training text
        "x" + PROMPT + COMPLETION,
        PROMPT + COMPLETION + "tail",
        PROMPT.replace("[/INST]", "") + COMPLETION,
        "Add two numbers.",
        "",
    ],
)
def test_parse_refuses_other_text(text):
    with pytest.raises(TemplateError):
        prompts.parse(text)


@pytest.mark.parametrize("marker", prompts.MARKERS)
def test_a_marker_in_the_text_is_refused(marker):
    with pytest.raises(TemplateError, match="marker"):
        prompts.render_prompt(f"text {marker} text", "S")
    with pytest.raises(TemplateError, match="answer"):
        prompts.render_completion(f"text {marker} text")


def test_labels_cover_the_answer_and_the_eos(tokenizer):
    row = prompts.encode(tokenizer, PROMPT, COMPLETION)
    learned = [token for token in row["labels"] if token != prompts.IGNORED_LABEL]
    assert tokenizer.decode(learned) == COMPLETION + tokenizer.eos_token
    assert row["input_ids"][0] == tokenizer.bos_token_id
    assert len(row["labels"]) == len(row["input_ids"])


def test_a_good_row_has_no_problem(tokenizer):
    assert prompts.verify(tokenizer, PROMPT, COMPLETION) == []


def bad_rows(tokenizer):
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    return {
        "no \\[INST\\] <<SYS>>": (PROMPT.replace("<<SYS>>", "<</SYS>>", 1), COMPLETION),
        "2 BOS": (bos + PROMPT, COMPLETION),
        "2 EOS": (PROMPT, COMPLETION + eos),
        "not a prefix": (PROMPT + " ", COMPLETION.lstrip()),
        "EOS are not both": (PROMPT, ""),
    }


@pytest.mark.parametrize("place", range(5))
def test_each_bad_template_is_named(tokenizer, place):
    words, row = list(bad_rows(tokenizer).items())[place]
    with pytest.raises(AssertionError, match=words):
        raise AssertionError("; ".join(prompts.verify(tokenizer, *row)) or "nothing was found")


def test_a_tokenizer_that_adds_no_bos_fails(tokenizer):
    """As this model's own setting does: the helper that loads it switches BOS on."""

    class WithoutBos:
        bos_token_id, eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        eos_token, added_tokens_decoder = tokenizer.eos_token, tokenizer.added_tokens_decoder

        def __call__(self, texts):
            return {"input_ids": tokenizer(texts, add_special_tokens=False)["input_ids"]}

    problems = prompts.verify(WithoutBos(), PROMPT, COMPLETION)
    assert any("0 BOS" in problem for problem in problems)


def test_rows_are_verified_in_order_and_across_batches(tokenizer):
    rows = [(PROMPT, COMPLETION), (PROMPT + " ", COMPLETION.lstrip())] * 5
    found = list(prompts.verify_rows(tokenizer, rows, batch_size=3))
    assert [bool(problems) for _, problems in found] == [False, True] * 5
    lengths = [len(prompts.encode(tokenizer, *row)["input_ids"]) for row in rows]
    assert [length for length, _ in found] == lengths
