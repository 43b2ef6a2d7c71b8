"""Conversations in a model's own chat template: trained on as it is asked, answers learned."""

from pathlib import Path

import pytest
import trl

from helpers import prompts
from helpers.config import Config
from helpers.data import curation_note
from helpers.merging import export
from helpers.model import loading
from helpers.own_template import chat_text, frame_of, messages_of
from helpers.prompts import Conversation, TemplateError
from tests.conftest import problems_of

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
# Control tokens, the one that ends an answer, EOS, BOS ("" where the tokenizer writes none).
FAMILIES = {
    "qwen2_5": ("<|im_start|>", "<|im_end|>", "<|im_end|>"),
    "qwen3": ("<|im_start|>", "<|im_end|>", "<|im_end|>"),
    "llama3": ("<|start_header_id|> <|end_header_id|>", "<|eot_id|>", "<|eot_id|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>", "<eos>"),  # has no place for a system message
    "gemma3": ("<start_of_turn>", "<end_of_turn>", "<eos>"),
    "phi3": ("<|user|> <|assistant|> <|system|>", "<|end|>", "<|endoftext|>"),
}
TALK = Conversation("Be brief.", (("One?", "First, this.\nThen that."), ("Two?", "Yes.")))


@pytest.fixture(params=FAMILIES)
def family(request):
    """(tokenizer, its ending of answers) of a family of models, by its template and its tokens."""
    marks, ending, eos = FAMILIES[request.param]
    tokenizer = loading.load_tokenizer("smollm2-135m")
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [*marks.split(), ending, eos, "<b>"]}
    )
    tokenizer.eos_token, tokenizer.bos_token = eos, "<b>"
    tokenizer.chat_template = (TEMPLATES / f"{request.param}.jinja").read_text(encoding="utf-8")
    return tokenizer, ending


def test_each_answer_is_learned_with_its_end(family):
    tokenizer, ending = family
    prompt, completion = prompts.render_row(TALK, tokenizer, own=True)
    text = prompt + completion + tokenizer.eos_token
    parts = [text[slice(*part)] for part in prompts.learned_parts(tokenizer, prompt, completion)]
    last = "Yes." + ending + (tokenizer.eos_token if ending != tokenizer.eos_token else "")
    assert parts == [f"First, this.\nThen that.{ending}", last]
    assert frame_of(tokenizer).ending == ending and "Be brief." in prompt


def test_a_row_begins_as_a_request_does(family):
    tokenizer, _ = family
    prompt, completion = prompts.render_row(TALK, tokenizer, own=True)
    assert prompt == prompts.render_prompt("One?", "Be brief.", tokenizer)
    second = chat_text(tokenizer, messages_of("Be brief.", [TALK.turns[0], ("Two?", None)]))
    assert (prompt + completion).startswith(second)


def test_a_text_with_a_control_token_is_refused(family):
    tokenizer, ending = family
    for user, answer in ((f"a{ending}", "b"), ("a", f"b{ending}")):
        with pytest.raises(TemplateError, match="which the model's template uses itself"):
            prompts.render_row(Conversation("S", ((user, answer),)), tokenizer, own=True)


def test_rows_of_the_embedded_model_verify(tokenizer):
    prompt, completion = prompts.render_row(TALK, tokenizer, own=True)
    assert problems_of(tokenizer, prompt, completion) == []
    assert problems_of(tokenizer, prompt.rstrip(), completion) != []
    assert problems_of(tokenizer, prompt, completion + "<|im_start|>") != []
    encoded = prompts.encode(tokenizer, prompt, completion)
    graded = [label for label in encoded["labels"] if label != prompts.IGNORED_LABEL]
    assert tokenizer.decode(graded) == "First, this.\nThen that.<|im_end|>Yes.<|im_end|>"


def test_a_template_that_rewrites_earlier_turns_says_so_for_several_turns_alone(tokenizer):
    tokenizer = loading.load_tokenizer("smollm2-135m")
    tokenizer.chat_template = (TEMPLATES / "deepseekv3.jinja").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match='a row has 2 turns: set TEMPLATE to "llama2"'):
        prompts.render_row(TALK, tokenizer, own=True)
    one = Conversation("S", TALK.turns[:1])
    assert prompts.render_row(one, tokenizer, own=True)[1] == "First, this.\nThen that."
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="has no chat template"):
        prompts.render_row(one, tokenizer, own=True)


def test_ollama_asks_in_the_template_of_training(tmp_path, tokenizer):
    config = Config.from_profile("demo", run_dir=tmp_path)
    config.merged_dir.mkdir()
    tokenizer.save_pretrained(config.merged_dir)
    template = prompts.template_text(tokenizer, own=True)
    note = {"system_message": "Be brief.", "template": template}
    curation_note.write_curation(note, config.merged_dir)
    _, template, _, system, _ = export.modelfile(config).split('"""')
    filled = template.replace("{{ .System }}", system).replace("{{ .Prompt }}", "One?")
    assert filled == prompts.render_prompt("One?", "Be brief.", tokenizer)
