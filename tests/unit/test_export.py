"""GGUF: what is written is read back as the same model and tokenizer; the templates agree."""

import dataclasses
import json
import shutil

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, LlamaTokenizer

from benchmarks.llama2 import llama2_config
from helpers import prompts
from helpers.config import SYSTEM_MESSAGE, Config
from helpers.merging import export, gguf_writer
from helpers.model import embedded, loading
from helpers.profiles import ALL_LINEAR_TARGETS
from helpers.runs import folders, inventory
from tests import notebook_code
from tests.conftest import fill_adapters

SYSTEM, QUESTION = "Be brief.\nAnswer in Python.", 'How do I reverse "abc"?'
TEXT = "def f(x):\n    return  x + 123  # the 7 cats' é ▁\n\t[INST] <<SYS>>"


def save_llama(folder, tokenizer, layers=2, **shape):
    """A random Llama whose rotary base, epsilon and head counts are not the usual ones."""
    torch.manual_seed(1)
    config = LlamaConfig(
        **{"vocab_size": len(tokenizer), "num_key_value_heads": 2, **shape},
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=777,
        initializer_range=0.3,
        rms_norm_eps=0.02,
        rope_parameters={"rope_type": "default", "rope_theta": 50.0},
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, 1.0, 0.5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def short_tokenizer(tokenizer, tmp_path_factory):
    """The embedded model's first 1,200 tokens: to read all 49,152 back takes 10 s or more."""
    folder = tmp_path_factory.mktemp("short")
    tokenizer.save_pretrained(folder)
    described = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    pairs, names = described["model"]["merges"], described["model"]["vocab"]
    kept = {name: place for name, place in names.items() if place < 1200}
    merges = [pair for pair in pairs if "".join(pair) in kept]
    described["model"] |= {"vocab": kept, "merges": merges}
    (folder / "tokenizer.json").write_text(json.dumps(described), encoding="utf-8")
    return AutoTokenizer.from_pretrained(folder)


def save_merged(config, tokenizer):
    """Put a random merged model into the run folder; the Config and the model."""
    model = save_llama(config.run_dir / "random", tokenizer)
    notebook_code.save_merged(model, tokenizer, config)
    return config, model


@pytest.fixture
def merged(tiny_config, short_tokenizer):
    """A Config whose run folder holds a merged model, and the model."""
    return save_merged(tiny_config, short_tokenizer)


def read_back(config, name):
    return embedded.load_gguf(config.gguf_dir / f"model.{name}.gguf", torch.float32)


@torch.no_grad()
def logits(model, seed=0):
    ids = torch.randint(0, 1000, (4, 64), generator=torch.Generator().manual_seed(seed))
    return model(input_ids=ids).logits


def test_a_model_comes_back_from_f16_and_q8_0(merged):
    config, model = merged
    export.export_gguf(config)
    reference = logits(model.float())  # a CPU with AMX computes in bfloat16 else
    for name, agreement, error in (("f16", 1.0, 0.01), ("q8_0", 0.85, 0.1)):
        again = logits(read_back(config, name))
        assert (again.argmax(-1) == reference.argmax(-1)).float().mean() >= agreement
        assert (again - reference).abs().mean() < error * reference.std()


def test_every_number_of_the_shape_is_written(merged):
    config, model = merged
    export.export_gguf(config)
    read = read_back(config, "f16").config
    for name in (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
        "num_key_value_heads max_position_embeddings head_dim bos_token_id eos_token_id"
    ).split():
        assert getattr(read, name) == getattr(model.config, name), name
    assert read.rms_norm_eps == pytest.approx(0.02)
    assert read.rope_parameters["rope_theta"] == 50.0


def fields_and_tensors(path):
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {tensor.name: tensor for tensor in reader.tensors}


def test_norms_stay_in_32_bits_and_matrices_are_of_the_type(merged):
    config, _ = merged
    export.export_gguf(config)
    fields, tensors = fields_and_tensors(config.gguf_dir / "model.q8_0.gguf")
    assert fields["general.file_type"] == 7
    for name, tensor in tensors.items():
        assert tensor.tensor_type.name == ("F32" if "norm" in name else "Q8_0"), name


@pytest.mark.parametrize("tied", [True, False])
def test_the_output_matrix_is_left_out_when_it_is_the_embedding(tiny_config, short_tokenizer, tied):
    folder = tiny_config.run_dir / "random"
    model = save_llama(folder, short_tokenizer, tie_word_embeddings=tied)
    stored = load_file(folder / "model.safetensors")
    stored["lm_head.weight"] = model.lm_head.weight.detach()  # some files hold a tied one too
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    gguf_writer.write_gguf(folder, tiny_config.run_dir / "model.gguf", "f16", folder)
    _, tensors = fields_and_tensors(tiny_config.run_dir / "model.gguf")
    assert ("output.weight" in tensors) != tied
    again = embedded.load_gguf(tiny_config.run_dir / "model.gguf", torch.float32)
    assert (logits(again).argmax(-1) == logits(model).argmax(-1)).float().mean() > 0.97


def test_a_file_is_read_back_and_a_wrong_number_is_seen(merged):
    config, _ = merged
    folder = export.export_gguf(config)
    for name in ("f16", "q8_0"):
        path = folder / f"model.{name}.gguf"
        export.check_written(path, config.merged_dir)
        tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path, "r+").tensors}
        rows = tensors["blk.1.ffn_up.weight"].data
        rows[3, 5] = rows[3, 5] ^ 4 if name == "q8_0" else 0
        words = f"{path.name} holds another blk.1.ffn_up.weight than .*merged: run notebook 05"
        with pytest.raises(inventory.ArtefactError, match=words):
            export.check_written(path, config.merged_dir)


def test_a_file_that_is_written_wrong_gets_no_name(merged, monkeypatch):
    config, _ = merged
    right = gguf.GGUFWriter.add_tensor

    def wrong(self, name, rows, **kind):
        right(self, name, rows + 1, **kind)

    monkeypatch.setattr(gguf.GGUFWriter, "add_tensor", wrong)
    only = dataclasses.replace(config, gguf_types=("f16",))
    with pytest.raises(inventory.ArtefactError, match="model.f16.gguf holds another"):
        export.export_gguf(only)
    assert not config.gguf_dir.exists()


def test_the_report_names_the_files_or_says_why_there_is_none(merged):
    config, _ = merged
    lines = export.gguf_report(config).splitlines()
    names = [line.split()[-1] for line in lines]
    assert names == ["gguf/Modelfile", "gguf/model.f16.gguf", "gguf/model.q8_0.gguf"]
    (config.merged_dir / inventory.SEAL).unlink()
    described = json.loads((config.merged_dir / "config.json").read_text("utf-8"))
    changed = json.dumps({**described, "model_type": "qwen2"})
    (config.merged_dir / "config.json").write_text(changed, encoding="utf-8")
    assert export.gguf_report(config).startswith("No GGUF is written: only Llama models")


def test_the_disk_that_is_needed_is_what_is_written(merged):
    config, _ = merged
    config = dataclasses.replace(config, model_name=str(config.merged_dir))
    needed, said = export.disk_needed(config), export.need_disk(config).splitlines()
    assert [line.split("GB ")[1] for line in said] == [*needed, "in all", "free on the disk"]
    export.export_gguf(config)
    assert list(needed) == ["merged/", "gguf/model.f16.gguf", "gguf/model.q8_0.gguf"]
    for name, size in needed.items():
        path = config.run_dir / name
        files = path.glob("*") if path.is_dir() else [path]
        written = sum(file.stat().st_size for file in files)
        assert written <= size < written + export.SMALL_FILES_BYTES, name


def test_the_disk_of_llama_2_is_known_without_its_weights(monkeypatch, tmp_path):
    monkeypatch.setattr(loading, "load_shape", lambda name: llama2_config("7B"))
    config = Config.from_profile("llama2_7b", run_dir=tmp_path)
    sizes = [round(size / 1e9, 1) for size in export.disk_needed(config).values()]
    assert sizes == [13.5, 7.2]
    both = dataclasses.replace(config, gguf_types=("f16", "q8_0"))
    assert round(sum(export.disk_needed(both).values()) / 1e9, 1) == 34.2
    packed = export.disk_needed(dataclasses.replace(config, merge_into="4bit"))
    assert list(packed) == ["merged/"] and packed["merged/"] < 4e9


def test_an_earlier_merge_makes_room_for_a_new_one(merged, monkeypatch):
    config, _ = merged
    config = dataclasses.replace(config, model_name=str(config.merged_dir))
    asked = []
    monkeypatch.setattr(folders, "need_space", lambda folder, needed, what: asked.append(needed))
    files = export.disk_needed(config)
    export.need_disk(config)
    earlier = sum(file.stat().st_size for file in config.merged_dir.iterdir())
    assert asked == [sum(files.values()) - earlier]


def test_only_the_types_that_are_asked_for_are_written(merged):
    config, _ = merged
    folder = export.export_gguf(dataclasses.replace(config, gguf_types=("f16",)))
    assert {path.name for path in folder.iterdir()} == {"model.f16.gguf", "Modelfile"}
    assert (folder / "Modelfile").read_text("utf-8").startswith("FROM ./model.f16.gguf\n")


@pytest.mark.parametrize(
    ("name", "size", "kind", "stored"),
    [
        ("blk.0.attn_q.weight", [8, 64], Kind.Q8_0, Kind.Q8_0),
        ("blk.0.attn_q.weight", [8, 65], Kind.Q8_0, Kind.F16),  # no whole number of blocks
        ("blk.0.attn_q.weight", [8, 64], Kind.Q4_0, Kind.Q4_0),
        ("blk.0.ffn_down.weight", [8, 64], Kind.Q4_0, Kind.Q8_0),
        ("blk.0.attn_v.weight", [8, 64], Kind.Q4_0, Kind.Q8_0),
        ("blk.0.attn_output.weight", [8, 64], Kind.Q4_0, Kind.Q4_0),
        ("token_embd.weight", [8, 64], Kind.Q4_0, Kind.Q8_0),
        ("output.weight", [8, 65], Kind.Q4_0, Kind.F16),
        ("output_norm.weight", [64], Kind.Q4_0, Kind.F32),
    ],
)
def test_each_tensor_is_stored_as_its_kind_of_layer_bears(name, size, kind, stored):
    assert gguf_writer.stored_as(name, size, kind) == stored


def test_rotary_pairs_become_neighbours():
    rows = np.arange(2 * 6)[:, None]  # two heads of width 6: 0 turns with 3, 1 with 4, 2 with 5
    assert gguf_writer.to_neighbours(rows, 2).ravel().tolist() == [
        *(0, 3, 1, 4, 2, 5),
        *(6, 9, 7, 10, 8, 11),
    ]


def test_the_tokenizer_comes_back(tiny_config, tokenizer):
    hostile = dataclasses.replace(tiny_config, system_message=HOSTILE)
    config, _ = save_merged(hostile, tokenizer)
    export.export_gguf(config)
    again = AutoTokenizer.from_pretrained(config.gguf_dir, gguf_file="model.f16.gguf")
    prompt = prompts.render_prompt(QUESTION, SYSTEM)
    for text in (TEXT, prompt, prompt + " Use [::-1]. " + tokenizer.eos_token):
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.bos_token_id == tokenizer.bos_token_id
    assert again.chat_template == prompts.chat_template(config.system_message)
    fields, _ = fields_and_tensors(config.gguf_dir / "model.f16.gguf")
    assert fields["tokenizer.ggml.pre"] == "gpt-2"
    assert fields["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    assert fields["tokenizer.ggml.add_bos_token"] is True


@pytest.fixture(params=[True, False], ids=["bos", "no bos"])
def pieces(request):
    """A SentencePiece-like tokenizer whose merges do not come in the order of their ids."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    names += [*"▁lower", "lo", "er", "▁l", "ow", "▁lo", "low"]
    merges = [("o", "w"), ("e", "r"), ("▁", "l"), ("l", "o"), ("▁l", "o"), ("l", "ow")]
    vocabulary = {name: place for place, name in enumerate(names)}
    tokenizer = LlamaTokenizer(vocab=vocabulary, merges=merges)
    tokenizer.add_bos_token = request.param
    return tokenizer


def test_scores_keep_the_order_of_the_merges(pieces, tmp_path):
    save_llama(tmp_path / "random", pieces, vocab_size=len(pieces) + 3)
    folder = tmp_path / "random"
    gguf_writer.write_gguf(folder, tmp_path / "model.gguf", "f16", folder)
    again = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    for text in ("lower low", "owlow", "lowlowé"):
        assert again(text)["input_ids"] == pieces(text)["input_ids"]
    fields, _ = fields_and_tensors(tmp_path / "model.gguf")
    assert fields["tokenizer.ggml.model"] == "llama"
    kinds = fields["tokenizer.ggml.token_type"]
    assert kinds[:4] == [2, 3, 3, 6] and kinds[259] == 1 and kinds[-3:] == [5, 5, 5]
    score = dict(zip(fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.scores"], strict=True))
    assert score["ow"] > score["er"] > score["lo"] > score["low"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "qwen2"}, "this one is 'qwen2'"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "positions 'linear'"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "stored in the 4 bits"),
    ],
)
def test_what_cannot_be_written_is_refused_before_anything_is(merged, change, message):
    config, _ = merged
    (config.merged_dir / inventory.SEAL).unlink()  # as of a model from elsewhere
    described = json.loads((config.merged_dir / "config.json").read_text("utf-8"))
    (config.merged_dir / "config.json").write_text(
        json.dumps({**described, **change}), encoding="utf-8"
    )
    with pytest.raises(gguf_writer.NoGGUF, match=message):
        export.export_gguf(config)
    assert not config.gguf_dir.exists()


def test_an_export_that_fails_leaves_the_former_one(merged, monkeypatch):
    config, _ = merged
    export.export_gguf(config)
    before = {path.name: path.read_bytes()[:64] for path in config.gguf_dir.iterdir()}
    assert set(before) == {"model.f16.gguf", "model.q8_0.gguf", "Modelfile"}
    shutil.copy(config.merged_dir / "model.safetensors", config.merged_dir / "second.safetensors")
    with pytest.raises(ValueError, match="Duplicated tensor"):
        export.export_gguf(config)
    assert {p.name: p.read_bytes()[:64] for p in config.gguf_dir.iterdir()} == before


def test_a_new_merge_takes_away_what_was_written_of_the_one_before(merged, short_tokenizer):
    config, model = merged
    export.export_gguf(config)
    notebook_code.save_merged(model, short_tokenizer, config, "4bit")  # of which none is written
    assert config.merged_dir.exists() and not config.gguf_dir.exists()


def test_without_a_merged_model_the_notebook_is_named(tiny_config):
    with pytest.raises(FileNotFoundError, match="run notebook 05"):
        export.export_gguf(tiny_config)


# -- The base, and the adapter beside it


@pytest.fixture
def apart(tiny_config, short_tokenizer):
    """A Config whose run folder holds an adapter for a random base, and both merged in 16 bits."""
    base = save_llama(tiny_config.run_dir / "base", short_tokenizer)
    settings = LoraConfig(r=4, lora_alpha=6, target_modules=list(ALL_LINEAR_TARGETS))
    tuned = get_peft_model(base, settings)
    fill_adapters(tuned, std=0.3)
    tuned.save_pretrained(tiny_config.adapter_dir)
    short_tokenizer.save_pretrained(tiny_config.adapter_dir)
    config = dataclasses.replace(
        tiny_config, model_name=str(tiny_config.run_dir / "base"), gguf_types=("f16",)
    )
    merged = tuned.merge_and_unload()
    notebook_code.save_merged(merged, short_tokenizer, config)
    return dataclasses.replace(config, gguf_adapter_apart=True)


@pytest.mark.filterwarnings("ignore::helpers.runs.inventory.ArtefactWarning")
def test_base_and_adapter_add_up_to_the_merged_model(apart):
    export.export_gguf(dataclasses.replace(apart, gguf_adapter_apart=False))
    _, merged = fields_and_tensors(apart.gguf_dir / "model.f16.gguf")
    merged = {name: tensor.data.astype(np.float32) for name, tensor in merged.items()}
    folder = export.export_gguf(apart)
    assert {path.name for path in folder.iterdir()} == {
        "base.f16.gguf",
        "adapter.gguf",
        "Modelfile",
    }
    fields, updates = fields_and_tensors(folder / "adapter.gguf")
    assert (fields["general.type"], fields["adapter.type"]) == ("adapter", "lora")
    scale, found = fields["adapter.lora.alpha"] / 4, {}
    _, base = fields_and_tensors(folder / "base.f16.gguf")
    for name, tensor in base.items():
        found[name] = tensor.data.astype(np.float32)
        if f"{name}.lora_a" in updates:
            A, B = (updates[f"{name}.lora_{part}"].data.astype(np.float32) for part in "ab")
            found[name] += scale * B @ A
    assert len(updates) == 2 * 2 * 7  # A and B, of two layers with seven matrices each
    assert found.keys() == merged.keys()
    for name, rows in found.items():
        np.testing.assert_allclose(rows, merged[name], atol=2e-2, err_msg=name)
    text = (folder / "Modelfile").read_text("utf-8")
    assert text.startswith("FROM ./base.f16.gguf\nADAPTER ./adapter.gguf\nTEMPLATE ")


@pytest.mark.filterwarnings("ignore::helpers.runs.inventory.ArtefactWarning")
def test_the_base_beside_an_adapter_has_the_template_of_the_training(apart):
    template = prompts.chat_template(SYSTEM)
    (apart.adapter_dir / "chat_template.jinja").write_text(template, encoding="utf-8")
    export.export_gguf(apart)
    fields, _ = fields_and_tensors(apart.gguf_dir / "base.f16.gguf")
    assert fields["tokenizer.chat_template"] == template


def test_an_adapter_of_another_kind_is_refused(apart, tmp_path):
    weights = load_file(apart.adapter_dir / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_magnitude_vector"
    save_file(weights | {name: torch.ones(96)}, apart.adapter_dir / "adapter_model.safetensors")
    with pytest.raises(gguf_writer.NoGGUF, match="lora_magnitude_vector, which no Llama in GGUF"):
        gguf_writer.write_adapter(apart.adapter_dir, apart.model_name, tmp_path / "adapter.gguf")


# -- Templates


def test_ollamas_template_is_that_of_training(tiny_config):
    text = export.modelfile(tiny_config)
    before, template, middle, system, after = text.split('"""')
    assert before == "FROM ./model.q8_0.gguf\nTEMPLATE " and middle == "\nSYSTEM "
    assert "PARAMETER temperature 0\n" in after
    framed = dataclasses.replace(tiny_config, system_message=f"\n    {system}\n\n")
    assert export.modelfile(framed) == text.replace(system, f"    {system}")
    filled = template.replace("{{ .System }}", system).replace("{{ .Prompt }}", QUESTION)
    assert filled == prompts.render_prompt(QUESTION, SYSTEM_MESSAGE)


def test_a_system_message_that_ends_the_text_is_refused(tiny_config):
    quoted = dataclasses.replace(tiny_config, system_message='Say """ twice.')
    with pytest.raises(ValueError, match="SYSTEM_MESSAGE holds"):
        export.modelfile(quoted)


# What Jinja, JSON or Python might read as something else than text.
HOSTILE = (
    "\n'Say' \"yes\" or \\no\\n \\u0041, \u00e9 \U0001f600\u2028\x7f\t"
    "{{ x }} {% raw %} {# c #} -%}\r\n "
)


@pytest.mark.parametrize("system", [SYSTEM, 'Say "yes" or \\no, é.', HOSTILE, "    Indented.", ""])
@pytest.mark.parametrize("saved", [False, True], ids=["in memory", "saved"])
def test_the_chat_template_renders_what_training_rendered(
    tokenizer, short_tokenizer, tiny_config, system, saved
):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    tokenizer.chat_template = prompts.chat_template(system)
    if saved:
        config = dataclasses.replace(tiny_config, system_message=system)
        save_merged(config, short_tokenizer)
        tokenizer = AutoTokenizer.from_pretrained(config.merged_dir)
    code = "\n    x = 0\n    y = {{ x }} \U0001f600 \n"
    turns = (("one", "two"), (code, code), (QUESTION, None))
    asked = prompts.render(
        prompts.Conversation(system, turns), tokenizer.bos_token, tokenizer.eos_token
    )
    messages = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": code},
        {"role": "assistant", "content": code},
        {"role": "user", "content": QUESTION},
    ]
    given = [{"role": "system", "content": system}, *messages]
    for conversation in (messages, given):
        assert tokenizer.apply_chat_template(conversation, tokenize=False) == asked
