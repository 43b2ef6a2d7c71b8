"""Llama 2's template: rendered, parsed back, and verified on tokens."""

import itertools

import pytest
import tokenizers
from tokenizers import normalizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from helpers import prompts
from helpers.prompts import Conversation, TemplateError
from tests.conftest import problems_of

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
        (("", ""), ("U [/INST", "] [INST")),
        (("    x = 0\n    y", "        x = 1\n    y "), ("\tU ", " "), (" ", None)),
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
        PROMPT + " ",  # one of the two spaces around an empty answer
        PROMPT + COMPLETION + PROMPT,
        PROMPT.replace("[/INST]", "") + COMPLETION,
        "Add two numbers.",
        "",
    ],
)
def test_parse_refuses_other_text(text):
    with pytest.raises(TemplateError):
        prompts.parse(text)


def test_indentation_stays_and_blank_lines_around_go():
    code = "    x = 0\n    y = x + 1"
    assert prompts.render_completion(f"\n\n{code}\n") == f" {code} "
    assert prompts.render_prompt(f"\n{code}\n\n", "\nS\n").endswith(
        f"\nS\n<</SYS>>\n\n{code} [/INST]"
    )


@pytest.mark.parametrize("answer", ["    x = 0\n    y = 1", "\tx", "  - a\n  - b  "])
def test_a_row_that_begins_with_indentation_verifies(tokenizer, answer):
    user = "    x = 0\nWhat is x?"
    prompt, completion = prompts.render_prompt(user, "S"), prompts.render_completion(answer)
    assert prompts.parse(prompt + completion) == Conversation("S", ((user, answer),))
    assert prompts.read_completion(completion) == answer
    assert problems_of(tokenizer, prompt, completion) == []
    row = prompts.encode(tokenizer, prompt, completion)
    learned = [token for token in row["labels"] if token != prompts.IGNORED_LABEL]
    assert row["input_ids"] == tokenizer(prompt)["input_ids"] + learned
    assert tokenizer.decode(learned) == completion + tokenizer.eos_token


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
    assert problems_of(tokenizer, PROMPT, COMPLETION) == []


def bad_rows(tokenizer):
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    return {
        "no \\[INST\\] <<SYS>>": (PROMPT.replace("<<SYS>>", "<</SYS>>", 1), COMPLETION),
        "2 BOS": (bos + PROMPT, COMPLETION),
        "2 EOS": (PROMPT, COMPLETION + eos),
        "not a prefix": (PROMPT + " ", COMPLETION.lstrip()),
        "ends in '..*/INST\\] ' and not in": (PROMPT + " ", COMPLETION),
        "EOS are not both": (PROMPT, ""),
    }


@pytest.mark.parametrize("place", range(6))
def test_each_bad_template_is_named(tokenizer, place):
    words, row = list(bad_rows(tokenizer).items())[place]
    with pytest.raises(AssertionError, match=words):
        raise AssertionError("; ".join(problems_of(tokenizer, *row)) or "nothing was found")


class WithoutBos:
    """A tokenizer that writes no BOS, as Qwen 2's; the embedded model's own setting is the same."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def __call__(self, texts):
        return self.tokenizer(texts, add_special_tokens=False)


def test_where_the_tokenizer_writes_no_bos_there_must_be_none(tokenizer):
    without = WithoutBos(tokenizer)
    assert problems_of(without, PROMPT, COMPLETION) == []
    assert f"special token {tokenizer.bos_token} stands in the text" in "; ".join(
        problems_of(without, tokenizer.bos_token + PROMPT, COMPLETION)
    )


def test_rows_are_verified_in_order_and_across_batches(tokenizer):
    rows = [(PROMPT, COMPLETION), (PROMPT + " ", COMPLETION.lstrip())] * 5
    found = list(prompts.verify_rows(tokenizer, rows, batch_size=3))
    assert [bool(problems) for _, problems in found] == [False, True] * 5
    lengths = [len(prompts.encode(tokenizer, *row)["input_ids"]) for row in rows]
    assert [length for length, _ in found] == lengths


@pytest.fixture(scope="module")
def llama_like_tokenizer():
    """Built as Llama 2's is: no words are split off first, a space is a letter, bytes at need."""
    vocabulary = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True, unk_token="<unk>"))
    vocabulary.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, special_tokens=special)
    texts = ["[INST] x [/INST] x ]x ll l]l 1a '", "[INST] <<SYS>> </SYS>> x] x]\n\nx"] * 50
    vocabulary.train_from_iterator(texts, trainer)
    bos = ("<s>", vocabulary.token_to_id("<s>"))
    vocabulary.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[bos])
    return PreTrainedTokenizerFast(
        tokenizer_object=vocabulary, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def test_the_seam_is_judged_as_by_the_prompts_own_tokens(tokenizer, llama_like_tokenizer):
    """`verify_rows` looks at the whole alone; here the prompt is tokenized by itself as well."""
    answers = ["", " x", "x", "]", "\n\nx", "  x", "ll", "\u00e9", " \U0001f600", "</SYS>"]
    ends = ["", " ", "\n", "'", "\u00e9", "\U0001f600", "[/INST", "a", "1"]
    for each in (tokenizer, llama_like_tokenizer):
        merged = 0
        for prompt, answer in itertools.product([f"[INST] x{end}" for end in ends], answers):
            alone = each(prompt)["input_ids"]
            whole = prompts.encode(each, prompt, answer)["input_ids"]
            merged += whole[: len(alone)] != alone
            problems = " ".join(problems_of(each, prompt, answer))
            assert ("not a prefix" in problems) == (whole[: len(alone)] != alone), (prompt, answer)
        assert merged > 3
