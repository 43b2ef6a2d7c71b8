"""Generation: batches agree with single prompts, and an answer ends at its EOS."""

import pytest
import torch

from helpers import inference, models
from helpers.config import Config


@pytest.fixture(scope="module")
def config(tiny_model_dir):
    return Config.from_profile(
        "smoke", model_name=str(tiny_model_dir), max_new_tokens=8, generation_batch_size=2
    )


@pytest.fixture(scope="module")
def model(config):
    return models.load_model(config, quantized=False).float()


def test_a_batch_gives_the_answers_of_single_prompts_in_the_order_given(model, tokenizer, config):
    texts = ["a much longer prompt than the others are", "short", "of middling length"]
    together, seconds = inference.answer_all(model, tokenizer, texts, config)
    alone = [inference.answer_all(model, tokenizer, [text], config)[0][0] for text in texts]
    assert [answer.prompt for answer in together] == texts
    assert together == alone
    assert seconds > 0


def test_a_streamed_answer_is_the_same_text(model, tokenizer, config):
    (whole,), _ = inference.answer_all(model, tokenizer, ["hello there"], config)
    pieces = list(inference.stream(model, tokenizer, "hello there", config))
    assert "".join(pieces).strip() == whole.text


def test_an_answer_ends_at_eos_and_says_whether_it_did(tokenizer):
    ids = tokenizer("done", add_special_tokens=False)["input_ids"]
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    stopped = inference._answer("q", [*ids, end, pad, pad], tokenizer)
    assert (stopped.text, stopped.tokens, stopped.stopped) == ("done", len(ids), True)
    assert inference._answer("q", ids, tokenizer).stopped is False


def test_an_unknown_model_name_is_named(config):
    with pytest.raises(ValueError, match="'gpt'.*base, llama2, tuned, new_model"):
        inference.load(config, "gpt")


def test_the_tuned_model_needs_the_adapter(config, tmp_path):
    import dataclasses

    with pytest.raises(FileNotFoundError, match="run notebook 04"):
        inference.load(dataclasses.replace(config, run_dir=tmp_path), "tuned")


def test_answers_are_greedy(model, tokenizer, config):
    torch.manual_seed(1)
    first = inference.answer_all(model, tokenizer, ["hello"], config)[0]
    torch.manual_seed(2)
    assert inference.answer_all(model, tokenizer, ["hello"], config)[0] == first
