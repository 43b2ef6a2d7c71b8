"""Damaged, foreign and stale results: refused or warned of by name, and never made worse."""

import dataclasses
import json
import random
import shutil
import subprocess
import warnings
from pathlib import Path

import pytest

from helpers import prompts
from helpers.answers import inference
from helpers.config import SYSTEM_MESSAGE, Config
from helpers.data import curation_note
from helpers.merging import export, merging, publishing
from helpers.model import loading
from helpers.runs import inventory
from helpers.runs.inventory import ArtefactError, ArtefactWarning
from helpers.training import training_rows
from tests.conftest import write_bos_twice
from tests.faults.finished_run import contents, copy_run, make_run
from tests.notebook_code import curate, merge, save_merged

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4665a5\nsize 132\n"
ADAPTER = "adapter/adapter_model.safetensors"
ROWS = "dataset/train/data-00000-of-00001.arrow"


@pytest.fixture(scope="module")
def finished(tiny_model_dir, tokenizer, tmp_path_factory):
    return make_run(tiny_model_dir, tokenizer, tmp_path_factory.mktemp("finished") / "run")


@pytest.fixture
def config(finished, tmp_path):
    return copy_run(finished, tmp_path / "run")


def flip_a_bit(path, seed):
    """Change one bit of a file, anywhere."""
    data = bytearray(path.read_bytes())
    place = random.Random(seed).randrange(8 * len(data))
    data[place // 8] ^= 1 << place % 8
    path.write_bytes(data)


def cut_off(path, size):
    path.write_bytes(path.read_bytes()[:size])


def exchange_two_tokens(folder, _=None):
    """Two words get each other's ids in a folder's tokenizer.json."""
    path = folder / "tokenizer.json"
    described = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = described["model"]["vocab"]
    vocabulary["Ġthe"], vocabulary["Ġand"] = vocabulary["Ġand"], vocabulary["Ġthe"]
    path.write_text(json.dumps(described), encoding="utf-8")


def refuses(config, act, words):
    """`act` raises ArtefactError with the words, and no file changes by it."""
    before = contents(config.run_dir)
    with pytest.raises(ArtefactError, match=words) as caught:
        act(config)
    assert "\n" not in str(caught.value)
    assert contents(config.run_dir) == before


def test_an_undamaged_run_loads_without_a_word(config):
    with warnings.catch_warnings():
        warnings.simplefilter("error", ArtefactWarning)
        merging.load_tuned(config)
        assert len(training_rows.load_dataset(config)["train"]) == 16
        assert "| eval_loss_after | 1.5 |" in publishing.model_card(config)


def test_the_seal_is_what_sha256sum_checks(config):
    for folder in (config.adapter_dir, config.dataset_dir):
        command = ["sha256sum", "--check", "--strict", "--quiet", inventory.SEAL]
        assert subprocess.run(command, cwd=folder).returncode == 0


# -- Adapter.


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_an_adapter_that_is_cut_off_is_refused(config, size):
    cut_off(config.run_dir / ADAPTER, size)
    refuses(config, merging.load_tuned, f"{ADAPTER} is cut off or damaged .* run notebook 04 again")


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", [ADAPTER, "adapter/adapter_config.json", "adapter/tokenizer.json"])
def test_one_flipped_bit_in_the_adapter_is_found(config, name, seed):
    flip_a_bit(config.run_dir / name, seed)
    words = f"{name} is (damaged or changed since it was written|cut off)"
    refuses(config, lambda config: inference.load(config, "tuned"), f"{words}.*run notebook 04")


def test_a_pointer_of_git_lfs_instead_of_the_adapter_is_named(config):
    (config.run_dir / ADAPTER).write_bytes(POINTER)
    refuses(
        config,
        merging.load_tuned,
        "or a Git-LFS pointer: run notebook 04 again, or run `git lfs pull`",
    )


def test_a_file_that_is_gone_is_named(config):
    (config.adapter_dir / "tokenizer.json").unlink()
    refuses(config, merging.load_tuned, "tokenizer.json is gone .* run notebook 04 again")


def test_an_adapter_of_another_base_is_refused(config, tmp_path):
    other = shutil.copytree(config.model_name, tmp_path / "another-llama")
    config = dataclasses.replace(config, model_name=str(other))
    words = "was trained on .*tiny-llama.* MODEL_NAME is .*another-llama: set MODEL_NAME"
    refuses(config, merging.load_tuned, words)


def test_a_base_that_was_moved_is_the_same_base(config, tmp_path):
    moved = shutil.copytree(config.model_name, tmp_path / "moved" / Path(config.model_name).name)
    merging.check_adapter(dataclasses.replace(config, model_name=str(moved)))


def test_an_adapter_of_another_tokenizer_is_refused(config, tmp_path):
    other = shutil.copytree(config.model_name, tmp_path / Path(config.model_name).name)
    exchange_two_tokens(other)
    before, after = map(loading.load_tokenizer, (config.model_name, str(other)))
    assert before("in the end")["input_ids"] != after("in the end")["input_ids"]
    config = dataclasses.replace(config, model_name=str(other))
    refuses(
        config, merging.load_tuned, "was trained with another tokenizer than that of .*04 again"
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora_r": 8}, "LORA_R is 8, the adapter was trained with 4: set LORA_R = 4, or run"),
        ({"lora_alpha": 3}, "LORA_ALPHA is 3, the adapter was trained with 16: set LORA_ALPHA"),
        ({"target_modules": ("q_proj",)}, r"TARGET_MODULES is \['q_proj'\], .* with \['down_proj'"),
        ({"use_nested_quant": False}, "USE_NESTED_QUANT is False, .* with True: set"),
        ({"keep_in_16bit": ("q_proj",)}, r"KEEP_IN_16BIT is \['q_proj'\], .* with \['down_proj', "),
    ],
)
def test_an_adapter_of_other_settings_is_used_with_a_warning(config, changes, words):
    with pytest.warns(ArtefactWarning, match=words + ".*notebook 04 again"):
        merging.load_tuned(dataclasses.replace(config, **changes))


def test_an_adapter_from_elsewhere_has_no_seal_and_loads(config):
    for name in (inventory.SEAL, inventory.TRAINING_LOG):
        (config.adapter_dir / name).unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error", ArtefactWarning)
        merging.load_tuned(config)
    (config.adapter_dir / "adapter_config.json").write_text('{"r": 4,', encoding="utf-8")
    refuses(config, merging.load_tuned, "adapter_config.json cannot be read .* run notebook 04")


# -- Stale.


def test_a_dataset_written_anew_after_training_is_warned_of(config):
    curate(dataclasses.replace(config, seed=7))
    with pytest.warns(ArtefactWarning, match="another dataset than notebook 02 has written since"):
        merging.load_tuned(config)


def test_the_same_dataset_written_anew_is_the_same(config):
    curate(config)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ArtefactWarning)
        merging.load_tuned(config)


# -- What is noted of the rows: their system message, template and tokenizer.

OWN_MESSAGE = "R\u00e9ponds en vers."


@pytest.fixture(scope="module")
def own(tiny_model_dir, tokenizer, tmp_path_factory):
    """A run whose rows have another system message, merged and exported without naming it."""
    run_dir = tmp_path_factory.mktemp("own") / "run"
    make_run(tiny_model_dir, tokenizer, run_dir, system_message=OWN_MESSAGE)
    config = Config.from_profile(
        "smoke", model_name=str(tiny_model_dir), run_dir=run_dir, lora_r=4, data_source="elsewhere"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", ArtefactWarning)
        save_merged(merge(config, "16bit"), tokenizer, config)
        export.export_gguf(config)
    return config


def test_the_model_is_asked_with_the_system_message_of_its_rows(own, monkeypatch, tokenizer):
    rendered = prompts.render_prompt("Why?", OWN_MESSAGE)
    monkeypatch.setattr(inference, "answer_all", lambda model, tokenizer, asked, config: asked)
    for which in ("base", "tuned", "merged"):
        assert inference.answer_alone(own, which, ["Why?"]) == [rendered]
    template = (own.merged_dir / "chat_template.jinja").read_text("utf-8")
    assert template == prompts.chat_template(OWN_MESSAGE)
    assert f'SYSTEM """{OWN_MESSAGE}"""' in (own.gguf_dir / "Modelfile").read_text("utf-8")
    card = publishing.model_card(own)
    assert f'"{OWN_MESSAGE}"' in card and "`sample`" in card and "elsewhere" not in card


@pytest.mark.parametrize("gone", [["dataset"], ["dataset", "adapter"]])
def test_the_note_goes_on_with_adapter_and_merged_model(own, tmp_path, gone):
    config = copy_run(own, tmp_path / "run")
    for name in gone:
        shutil.rmtree(config.run_dir / name)
    assert inference.system_message(config, "merged") == OWN_MESSAGE
    assert OWN_MESSAGE in export.modelfile(config) and OWN_MESSAGE in publishing.model_card(config)
    if "adapter" not in gone:
        assert inference.system_message(config, "tuned") == OWN_MESSAGE


def test_an_adapter_keeps_its_message_when_the_rows_get_another(own, tmp_path):
    config = copy_run(own, tmp_path / "run")
    curate(dataclasses.replace(config, data_source="sample"))
    assert inference.system_message(config, "tuned") == OWN_MESSAGE
    assert curation_note.system_message(config, config.dataset_dir) == SYSTEM_MESSAGE


@pytest.mark.parametrize("given", [SYSTEM_MESSAGE, "Be brief."])
def test_another_message_is_used_where_it_is_named_and_both_are_told(own, given):
    config = dataclasses.replace(own, system_message=given)
    words = f"SYSTEM_MESSAGE is '{given}', and the training rows have '{OWN_MESSAGE}': leave it out"
    for act in (training_rows.load_dataset, export.modelfile, publishing.model_card):
        with pytest.warns(ArtefactWarning, match=words):
            act(config)
    with pytest.warns(ArtefactWarning, match=words):
        assert given in export.modelfile(config)


def test_a_run_from_before_has_no_note_and_works(own, tmp_path):
    config = copy_run(own, tmp_path / "run")
    for folder in (config.dataset_dir, config.adapter_dir, config.merged_dir):
        for name in (curation_note.CURATION, inventory.SEAL):
            (folder / name).unlink()
        inventory.seal(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ArtefactWarning)
        assert inference.system_message(config, "merged") == SYSTEM_MESSAGE
        named = dataclasses.replace(config, system_message=OWN_MESSAGE)
        assert inference.system_message(named, "merged") == OWN_MESSAGE
        assert len(training_rows.load_dataset(config)["train"]) == 16


def test_a_note_that_was_changed_is_found(own, tmp_path):
    config = copy_run(own, tmp_path / "run")
    path = config.dataset_dir / curation_note.CURATION
    path.write_text(path.read_text("utf-8").replace("vers", "prose"), encoding="utf-8")
    refuses(config, load_dataset, "curation.json is damaged or changed .*: run notebook 02 again")


@pytest.mark.parametrize("given", [None, "llama2"])
def test_rows_in_another_template_are_refused(config, monkeypatch, given):
    monkeypatch.setattr(prompts, "TEMPLATE", "{system} {user} {answer}")
    words = (
        "the rows are in the template '.INST.*, and the one here is '{system}.*notebook 02 again"
    )
    refuses(dataclasses.replace(config, template=given), load_dataset, words)


def with_tokenizer(config, folder, change):
    """The Config with a model of another tokenizer; `change` writes it into the model's folder."""
    shutil.copytree(config.model_name, folder)
    change(folder, loading.load_tokenizer(config.model_name))
    return dataclasses.replace(config, model_name=str(folder))


def test_rows_that_fail_with_another_tokenizer_are_refused(config, tmp_path):
    other = with_tokenizer(config, tmp_path / "another-llama", write_bos_twice)
    name = Path(config.model_name).name
    words = f"made with the tokenizer of {name}, .* MODEL_NAME .*another-llama.* 24 of 24 fail, "
    refuses(other, load_dataset, words + "the first for 2 BOS tokens, there .*: run notebook 02")


def test_rows_that_verify_with_another_tokenizer_are_taken(config, tmp_path):
    other = with_tokenizer(config, tmp_path / "another-llama", exchange_two_tokens)
    assert load_dataset(other) == load_dataset(config)


# -- The merged model.


def train_again(config):
    """Another adapter over the one that lies there, as notebook 04 writes it."""
    flip_a_bit(config.run_dir / ADAPTER, 1)
    inventory.seal(config.adapter_dir)


@pytest.fixture
def merged(config, tokenizer):
    save_merged(merge(config, "16bit"), tokenizer, config)
    return config


def test_a_merged_model_is_sealed_and_accepted(merged):
    command = ["sha256sum", "--check", "--strict", "--quiet", inventory.SEAL]
    assert subprocess.run(command, cwd=merged.merged_dir).returncode == 0
    assert merging.check_merged(merged) == merged.merged_dir


@pytest.mark.parametrize(
    "use",
    [
        merging.check_merged,
        lambda config: inference.load(config, "merged"),
        lambda config: inference.load(config, "requantized"),
        publishing.push_model,
        export.export_gguf,
    ],
)
def test_a_merge_of_an_earlier_adapter_is_refused_wherever_it_is_used(merged, use):
    train_again(merged)
    words = "merged was merged from another adapter than notebook 04 has written since: .*05 again"
    refuses(merged, use, words)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "merge.json"])
def test_one_flipped_bit_in_the_merged_model_is_found(merged, name, seed):
    flip_a_bit(merged.merged_dir / name, seed)
    words = f"{name} is damaged or changed since it was written: run notebook 05 again"
    refuses(merged, lambda config: inference.load(config, "merged"), words)


def test_a_merged_model_from_elsewhere_has_no_record_and_loads(merged):
    train_again(merged)
    for name in (inventory.SEAL, merging.MERGE_RECORD):
        (merged.merged_dir / name).unlink()
    inference.load(merged, "merged")


# -- Dataset.


def load_dataset(config):
    return training_rows.load_dataset(config)["train"][:]


@pytest.mark.parametrize("size", [0, 100, -1])
def test_a_dataset_that_is_cut_off_is_refused(config, size):
    cut_off(config.run_dir / ROWS, size)
    refuses(config, load_dataset, f"{ROWS} is damaged or changed .*: run notebook 02 again")


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", [ROWS, "dataset/train/state.json", "dataset/dataset_dict.json"])
def test_one_flipped_bit_in_the_dataset_is_found(config, name, seed):
    flip_a_bit(config.run_dir / name, seed)
    refuses(config, load_dataset, f"{name} is damaged or changed since .*: run notebook 02 again")


def test_a_damaged_dataset_is_not_uploaded(config):
    flip_a_bit(config.run_dir / ROWS, 0)
    refuses(config, publishing.push_dataset, "is damaged or changed .*: run notebook 02 again")


def test_what_a_library_leaves_beside_the_dataset_is_no_damage(config):
    (config.dataset_dir / "train" / "cache-0.arrow").write_bytes(b"x")
    (config.dataset_dir / "README.md").write_text("a card of one's own", encoding="utf-8")
    assert len(load_dataset(config)["prompt"]) == 16


# -- Metrics.


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "metrics/04.json cannot be read .*: run notebook 04 again"),
        (b'{"eval_loss_after": 1.', "metrics/04.json cannot be read"),
        (b"\xff\xfe", "metrics/04.json cannot be read"),
        (b"[1]", "metrics/04.json holds no JSON object: run notebook 04 again"),
        (
            b'{"eval_loss_after": "1.5"}',
            "metrics/04.json says eval_loss_after is '1.5': run notebook",
        ),
        (b"[" * 100_000, "metrics/04.json cannot be read"),
    ],
)
def test_damaged_metrics_are_named_and_the_others_stay(config, data, words):
    (config.metrics_dir / "04.json").write_bytes(data)
    refuses(config, inventory.read_metrics, words)
    refuses(config, publishing.model_card, words)
    assert json.loads((config.metrics_dir / "05.json").read_text("utf-8")) == {
        "eval_loss_merged": 1.6
    }


# -- The base model.


@pytest.fixture
def base(config, tmp_path):
    folder = shutil.copytree(config.model_name, tmp_path / "base")
    return dataclasses.replace(config, model_name=str(folder)), folder / "model.safetensors"


@pytest.mark.parametrize("size", [0, 4, 1000, -1])
def test_weights_that_are_cut_off_are_refused(base, size):
    config, weights = base
    cut_off(weights, size)
    words = "model.safetensors is cut off or damaged .*: get the model again"
    refuses(config, loading.load_model, words)


def test_a_pointer_of_git_lfs_instead_of_weights_is_named(base):
    config, weights = base
    weights.write_bytes(POINTER)
    words = "model.safetensors is cut .* or a Git-LFS pointer: .* run `git lfs pull` there"
    refuses(config, loading.load_model, words)
