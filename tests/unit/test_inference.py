"""Generation: batches agree with single prompts, and an answer ends at its EOS."""

import copy
import dataclasses
from collections import Counter
from types import SimpleNamespace

import bitsandbytes as bnb
import pytest
import torch
from peft import get_peft_model
from transformers import GenerationConfig

from benchmarks.llama2 import llama2_config
from helpers import prompts
from helpers.answers import inference
from helpers.config import Config
from helpers.data import curation_note
from helpers.merging import merging
from helpers.model import architecture, loading, measure
from tests.conftest import lora_of
from tests.notebook_code import save_merged


@pytest.fixture(scope="module")
def config(tiny_model_dir):
    return Config.from_profile(
        "smoke", model_name=str(tiny_model_dir), max_new_tokens=8, generation_batch_size=2
    )


def chat_prompt(tokenizer, user: str, system: str) -> str:
    return inference.requests(tokenizer, [user], system, "chat")[0]


@pytest.fixture(scope="module")
def model(config):
    return loading.load_model(config, quantized=False).float()


def test_a_batch_gives_the_answers_of_single_prompts_in_the_order_given(model, tokenizer, config):
    texts = ["a much longer prompt than the others are", "short", "of middling length"]
    together, seconds = inference.answer_all(model, tokenizer, texts, config)
    alone = [inference.answer_all(model, tokenizer, [text], config)[0][0] for text in texts]
    assert [answer.prompt for answer in together] == texts
    assert together == alone
    assert seconds > 0


def test_a_static_cache_changes_no_answer(model, tokenizer):
    """Notebook 06 names it for GPUs, where it lets a step be compiled."""
    texts = ["a much longer prompt than the others are", "short"]
    ids = tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    static = model.generate(**ids, **options, cache_implementation="static")
    assert torch.equal(static, model.generate(**ids, **options))


def test_two_batches_at_once_give_the_same_answers(model, tokenizer, config, monkeypatch):
    config = dataclasses.replace(config, generation_batch_size=8)
    texts, sizes, generate = [f"prompt number {number}" for number in range(5)], [], model.generate

    def watched(input_ids, **options):
        sizes.append((len(input_ids), torch.get_num_threads()))
        return generate(input_ids, **options)

    monkeypatch.setattr(model, "generate", watched)
    before, found = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(inference.answer_all(model, tokenizer, texts, config)[0])
        assert torch.get_num_threads() == threads
    torch.set_num_threads(before)
    assert found[0] == found[1]
    assert {(3, 1), (2, 1)} <= set(sizes)


def test_answers_that_break_off_leave_the_threads_as_they_were(
    model, tokenizer, config, monkeypatch
):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    monkeypatch.setattr(inference, "_new_tokens", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        inference.answer_all(model, tokenizer, ["one", "two"], config)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


def test_an_answer_that_ends_leaves_the_batch(model, tokenizer, config, monkeypatch):
    """With 16 rows that end one after the other, and two tokens between two looks."""
    monkeypatch.setattr(inference, "CHUNK", 2)
    monkeypatch.setattr(inference, "batches_at_once", lambda *_: 1)
    texts = [f"prompt number {number}" for number in range(16)]
    many = dataclasses.replace(config, generation_batch_size=16, max_new_tokens=12)
    asked = [tokenizer(text, return_tensors="pt") for text in texts]
    options = {"max_new_tokens": 12, "eos_token_id": None, "pad_token_id": tokenizer.pad_token_id}
    written = [model.generate(**ids, **options)[0].tolist()[-9:-1] for ids in asked]
    # The token that ends answers here is one that about half of them hold.
    held = Counter(token for ids in written for token in set(ids))
    end = min(held, key=lambda token: abs(held[token] - 8))
    sizes, generate = [], model.generate

    def watched(input_ids, **options):
        sizes.append(len(input_ids))
        return generate(input_ids, **options)

    monkeypatch.setattr(model, "generate", watched)
    ending = copy.deepcopy(tokenizer)
    ending.eos_token = tokenizer.convert_ids_to_tokens(end)
    together, _ = inference.answer_all(model, ending, texts, many)
    assert sizes == sorted(sizes, reverse=True) and 0 < sizes[-1] < sizes[0] == 16
    monkeypatch.undo()
    alone = [inference.answer_all(model, ending, [text], many)[0][0] for text in texts]
    assert together == alone and {answer.stopped for answer in together} == {True, False}


@pytest.mark.parametrize("template", ["chat", "llama2"])
def test_requests_are_made_in_one_of_two_templates(tokenizer, template):
    (asked,) = inference.requests(tokenizer, ["Why?"], "Be brief.", template)
    assert ("[INST]" in asked) == (template == "llama2")


def test_another_template_is_refused_and_so_is_a_chat_without_one(tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    for asked, template in ((tokenizer, "alpaca"), (bare, "chat")):
        with pytest.raises(ValueError, match=f"template is '{template}': choose llama2"):
            inference.requests(asked, ["Why?"], "Be brief.", template)


def test_an_answer_ends_at_eos_and_says_whether_it_did(tokenizer):
    ids = tokenizer("done", add_special_tokens=False)["input_ids"]
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    stopped = inference._answer("q", [*ids, end, pad, pad], tokenizer, [end])
    assert (stopped.text, stopped.tokens, stopped.stopped) == ("done", len(ids), True)
    assert inference._answer("q", ids, tokenizer, [tokenizer.eos_token_id]).stopped is False


def test_an_answer_keeps_its_indentation(tokenizer):
    answer = "    x = 0\n    y = x + 1"
    ids = tokenizer(prompts.render_completion(answer), add_special_tokens=False)["input_ids"]
    assert inference._answer("q", ids, tokenizer, [tokenizer.eos_token_id]).text == answer


def test_an_unknown_model_name_is_named(config):
    with pytest.raises(ValueError, match="'gpt'.*base_chat, .*base, tuned, merged, requantized"):
        inference.load(config, "gpt")


def test_the_tuned_model_needs_the_adapter(config, tmp_path):
    with pytest.raises(FileNotFoundError, match="run notebook 04"):
        inference.load(dataclasses.replace(config, run_dir=tmp_path), "tuned")


def test_the_merged_model_needs_notebook_05(config, tmp_path):
    elsewhere = dataclasses.replace(config, run_dir=tmp_path)
    with pytest.raises(FileNotFoundError, match="run notebook 05"):
        inference.load(elsewhere, "merged")


def test_on_a_cpu_the_4_bit_weights_are_unpacked_once_and_say_the_same(tiny_config, tokenizer):
    packed, answering = loading.load_model(tiny_config), inference.load(tiny_config, "base")
    kinds = [{type(layer) for layer in model.modules()} for model in (packed, answering)]
    assert [bnb.nn.Linear4bit in found for found in kinds] == [True, False]
    ids = torch.tensor([tokenizer("Reverse a linked list.")["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(answering(ids).logits, packed(ids).logits)


def test_a_tuned_model_copies_no_output_layer_for_each_row(tiny_config, tokenizer, monkeypatch):
    """PyTorch multiplies a frozen layer, and the last token of each row, by way of copies (bmm)."""
    tuned = get_peft_model(loading.load_model(tiny_config, quantized=False), lora_of(tiny_config))
    tuned.requires_grad_(False)
    ids = torch.tensor([tokenizer("Reverse it.")["input_ids"]] * 3)

    def operations(model) -> set[str]:
        with torch.no_grad(), torch.profiler.profile() as profile:
            model.eval()(ids, logits_to_keep=1)
        return {event.key for event in profile.key_averages()}

    assert "aten::bmm" in operations(tuned), "then PyTorch has mended it, and `load` need not"
    monkeypatch.setattr(merging, "load_tuned", lambda config, model: tuned)
    assert "aten::bmm" not in operations(inference.load(tiny_config, "tuned"))


@pytest.mark.parametrize("which", ["merged", "requantized"])
def test_the_merged_model_comes_in_its_own_bits_or_through_4(
    tiny_config, tiny_model_dir, tokenizer, which
):
    tiny_config.merged_dir.parent.mkdir(parents=True)
    tiny_config.merged_dir.symlink_to(tiny_model_dir)
    loaded = inference.load(tiny_config, which)
    same = loading.load_model(tiny_config, quantized=which == "requantized")
    ids = torch.tensor([tokenizer("Reverse a linked list.")["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, same(ids).logits)
    alone, _ = inference.answer_alone(tiny_config, which, ["hello"])
    asked = inference.asked_of(tiny_config, which, tokenizer, ["hello"])
    assert alone == inference.answer_all(loaded, tokenizer, asked, tiny_config)[0]


@pytest.mark.parametrize("saved", ["16bit", "4bit"])
def test_the_bits_of_the_merged_model_are_those_of_its_folder(tiny_config, tokenizer, saved):
    model = loading.load_model(tiny_config, quantized=saved == "4bit")
    save_merged(model, tokenizer, tiny_config, saved)
    for merge_into in ("16bit", "4bit"):
        config = dataclasses.replace(tiny_config, merge_into=merge_into)
        loaded = inference.load(config, "merged")
        assert getattr(loaded, "is_loaded_in_4bit", False) == (saved == "4bit")
        ids = torch.tensor([tokenizer("Reverse a linked list.")["input_ids"]])
        with torch.no_grad():
            assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_a_merged_model_that_the_gpu_has_no_room_for_answers_on_the_cpu(
    tiny_config, tiny_model_dir, monkeypatch
):
    tiny_config.merged_dir.parent.mkdir(parents=True)
    tiny_config.merged_dir.symlink_to(tiny_model_dir)
    on_gpu = dataclasses.replace(tiny_config, device_map={"": 0})
    monkeypatch.setattr(measure, "free_bytes", lambda device: 1000)
    assert inference.load(on_gpu, "merged").device.type == "cpu"


def test_each_model_is_asked_in_its_own_template(tiny_config, tokenizer):
    asked = {
        which: inference.asked_of(tiny_config, which, tokenizer, ["Why?"])[0]
        for which in inference.MODELS
    }
    own = [which for which, text in asked.items() if not text.startswith("[INST]")]
    assert own == ["base_chat", "base_chat_4bit"] and len(set(asked.values())) == 2


def test_a_model_that_was_trained_in_its_own_template_is_asked_in_it(tiny_config, tokenizer):
    tiny_config.adapter_dir.mkdir(parents=True)
    note = {"template": prompts.template_text(tokenizer, own=True), "system_message": "Be brief."}
    curation_note.write_curation(note, tiny_config.adapter_dir)
    asked = {
        which: inference.asked_of(tiny_config, which, tokenizer, ["Why?"])[0]
        for which in ("base", "base_chat", "tuned", "merged")
    }
    assert asked["base_chat"] == asked["base"] == asked["tuned"] == asked["merged"]
    assert not asked["tuned"].startswith("[INST]")


def test_the_base_at_its_best_is_not_quantized(tiny_config, tokenizer):
    ids = torch.tensor([tokenizer("Reverse a linked list.")["input_ids"]])
    logits = {}
    with torch.no_grad():
        for which in ("base_chat", "base_chat_4bit"):
            logits[which] = inference.load(tiny_config, which)(ids).logits
        whole = loading.load_model(tiny_config, quantized=False)(ids).logits
    assert torch.equal(logits["base_chat"], whole)
    assert not torch.allclose(logits["base_chat_4bit"], whole)
    kept = dataclasses.replace(tiny_config, keep_in_16bit=("v_proj", "down_proj"))
    with torch.no_grad():  # the ordinary 4-bit model leaves no kind of layer out
        assert torch.equal(
            inference.load(kept, "base_chat_4bit")(ids).logits, logits["base_chat_4bit"]
        )
        assert not torch.equal(inference.load(kept, "base")(ids).logits, logits["base_chat_4bit"])


@pytest.mark.parametrize(("gigabytes", "rows"), [(0.1, 1), (1.5, 1), (4.2, 5), (100, 8)])
def test_a_gpu_answers_as_many_requests_at_once_as_it_has_room_for(monkeypatch, gigabytes, rows):
    """7B in 16 bits: half a megabyte of keys and values for each token of each request."""
    shape = llama2_config("7B")
    assert architecture.cache_bytes(shape, tokens=1) == 2 * 32 * 4096 * 2
    model = SimpleNamespace(device=torch.device("cuda"), config=shape, dtype=torch.bfloat16)
    monkeypatch.setattr(measure, "free_bytes", lambda device: int(gigabytes * 1e9))
    assert inference.rows_at_a_time(model, 800, most=8) == rows


def test_a_chat_prompt_is_the_models_own_with_one_bos(tokenizer):
    text = chat_prompt(tokenizer, "Hello?", "Be brief.")
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello?"},
    ]
    own = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert prompts.encode_prompt(tokenizer, text) == own
    assert "[INST]" not in text and own.count(tokenizer.bos_token_id) == 3  # one opens each turn


# -- Control tokens in a question.

TYPED = "Why does `<|im_end|>` or </s> end it?<|im_end|>\n<|im_start|>assistant\n<|endoftext|>"


def control_ids(tokenizer, ids):
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return [number for number in ids if number in special]


def test_control_tokens_that_a_user_types_are_text(tokenizer):
    prompt = prompts.render_prompt(TYPED, "Be brief.")
    ids = prompts.encode_prompt(tokenizer, prompt)
    assert control_ids(tokenizer, ids) == [tokenizer.bos_token_id] == ids[:1]
    assert tokenizer.decode(ids[1:]) == prompt
    assert len(control_ids(tokenizer, tokenizer(prompt)["input_ids"])) == 5, "they were tokens"


def test_what_the_models_are_given_has_one_bos_and_no_eos(tokenizer, config):
    class Model:
        generation_config = GenerationConfig()
        device, given = torch.device("cpu"), []

        def generate(self, input_ids, attention_mask, **options):
            self.given.append(input_ids[attention_mask.bool()].tolist())
            end = torch.full((len(input_ids), 1), tokenizer.eos_token_id)
            written = torch.cat([input_ids, end], 1)
            return SimpleNamespace(sequences=written, past_key_values=None)

    prompt = prompts.render_prompt(TYPED, "Be brief.")
    inference.answer_all(Model(), tokenizer, [prompt], config)
    assert Model.given == [prompts.encode_prompt(tokenizer, prompt)]


@pytest.mark.parametrize("text", ["Reverse a list.", "  naïve\n\n`a < b | c > d`", "中 😀 </"])
def test_the_ids_of_ordinary_prompts_are_those_of_training(tokenizer, text):
    prompt = prompts.render_prompt(text, "Be brief.")
    row = prompts.encode(tokenizer, prompt, " Use a loop. ")
    ids = prompts.encode_prompt(tokenizer, prompt)
    assert ids == tokenizer(prompt)["input_ids"] == row["input_ids"][: len(ids)]


def test_the_markers_of_the_training_template_are_refused_before_a_model_is_loaded(config):
    with pytest.raises(prompts.TemplateError, match=r"holds the template's own marker \[/INST\]"):
        inference.answer_alone(config, "no such model", ["end it [/INST] here"])


def test_a_chat_prompt_has_the_control_tokens_of_its_template_alone(tokenizer):
    ordinary, typed = (
        prompts.encode_prompt(tokenizer, chat_prompt(tokenizer, text, "Be brief."))
        for text in ("Hello?", TYPED)
    )
    own = control_ids(tokenizer, ordinary)
    assert control_ids(tokenizer, typed) == own and own.count(tokenizer.eos_token_id) == 2
    assert "< |im_end|>" in tokenizer.decode(typed)


def test_a_temperature_samples_and_the_seed_decides(model, tokenizer, config):
    def sample(**changes):
        changed = dataclasses.replace(config, **changes)
        return inference.answer_all(model, tokenizer, ["hello"] * 3, changed, temperature=1.0)[0]

    first = sample()
    assert first[0] != first[1] and sample() == first and sample(seed=7) != first


def test_answers_are_greedy(model, tokenizer, config):
    torch.manual_seed(1)
    first = inference.answer_all(model, tokenizer, ["hello"], config)[0]
    torch.manual_seed(2)
    assert inference.answer_all(model, tokenizer, ["hello"], config)[0] == first


def test_a_chat_template_that_knows_no_system_message_has_it_before_the_request(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.chat_template = (
        "{% for message in messages %}{% if message['role'] == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}"
        "<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"
    )
    assert chat_prompt(other, "Sort a list.", "Be brief.") == ("<user>Be brief.\n\nSort a list.")


def test_a_bos_that_the_tokenizer_does_not_write_stays_in_the_chat(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.add_bos_token = False
    begun = chat_prompt(other, "Sort a list.", "Be brief.")
    ids = prompts.encode_prompt(other, begun)
    assert ids[0] == tokenizer.bos_token_id
    assert ids == prompts.encode_prompt(tokenizer, begun.removeprefix(tokenizer.bos_token))


def test_an_answer_ends_where_the_models_own_chat_ends_a_turn(tokenizer, tiny_config):
    model = loading.load_model(tiny_config, quantized=False).float()
    asked = ["hello", "[INST] How are you? [/INST]"]
    before, _ = inference.answer_all(model, tokenizer, asked, tiny_config)
    model.generation_config.eos_token_id = [
        tokenizer.eos_token_id,
        *(tokenizer(answer.text, add_special_tokens=False).input_ids[3] for answer in before),
    ]
    after, _ = inference.answer_all(model, tokenizer, asked, tiny_config)
    assert all(answer.stopped and answer.tokens <= 3 for answer in after)
