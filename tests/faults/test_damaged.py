"""Damaged, foreign and stale results: refused or warned of by name, and never made worse."""

import dataclasses
import json
import random
import shutil
import subprocess
import warnings
from pathlib import Path

import pytest

from helpers import curation, export, hub, inference, integrity, merging, models, training
from helpers.integrity import ArtefactError, ArtefactWarning
from tests.faults.finished_run import contents, copy_run, make_run

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


def exchange_two_tokens(text):
    """A tokenizer.json in which two words have each other's ids."""
    tokenizer = json.loads(text)
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["Ġthe"], vocabulary["Ġand"] = vocabulary["Ġand"], vocabulary["Ġthe"]
    return json.dumps(tokenizer)


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
        assert len(training.load_dataset(config)["train"]) == 16
        assert "| eval_loss_after | 1.5 |" in hub.model_card(config)


def test_the_seal_is_what_sha256sum_checks(config):
    for folder in (config.adapter_dir, config.dataset_dir):
        command = ["sha256sum", "--check", "--strict", "--quiet", integrity.SEAL]
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
    refuses(config, merging.load_tuned, "Git-LFS pointer .*git lfs pull` there, or run notebook 04")


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
    integrity.check_adapter(dataclasses.replace(config, model_name=str(moved)))


def test_an_adapter_of_another_tokenizer_is_refused(config, tmp_path):
    other = shutil.copytree(config.model_name, tmp_path / Path(config.model_name).name)
    path = other / "tokenizer.json"
    path.write_text(exchange_two_tokens(path.read_text("utf-8")), encoding="utf-8")
    before, after = map(models.load_tokenizer, (config.model_name, str(other)))
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
    ],
)
def test_an_adapter_of_other_settings_is_used_with_a_warning(config, changes, words):
    with pytest.warns(ArtefactWarning, match=words + ".*notebook 04 again"):
        merging.load_tuned(dataclasses.replace(config, **changes))


def test_an_adapter_of_another_recipe_is_named_by_its_recipe(tiny_model_dir, tokenizer, tmp_path):
    config = make_run(tiny_model_dir, tokenizer, tmp_path / "run", recipe="article")
    same = {"model_name": config.model_name, "run_dir": config.run_dir, "lora_r": 4}
    words = "RECIPE is None, the adapter was trained with 'article'.*: set RECIPE = 'article', or"
    with pytest.warns(ArtefactWarning, match=words):
        merging.load_tuned(type(config).from_profile("smoke", **same))
    with warnings.catch_warnings():
        warnings.simplefilter("error", ArtefactWarning)
        merging.load_tuned(type(config).from_profile("smoke", recipe="article", **same))


def test_an_adapter_from_elsewhere_has_no_seal_and_loads(config):
    for name in (integrity.SEAL, integrity.TRAINING_LOG):
        (config.adapter_dir / name).unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error", ArtefactWarning)
        merging.load_tuned(config)
    (config.adapter_dir / "adapter_config.json").write_text('{"r": 4,', encoding="utf-8")
    refuses(config, merging.load_tuned, "adapter_config.json cannot be read .* run notebook 04")


# -- Stale.


def test_a_dataset_written_anew_after_training_is_warned_of(config):
    curation.curate(dataclasses.replace(config, seed=7))
    with pytest.warns(ArtefactWarning, match="another dataset than notebook 02 has written since"):
        merging.load_tuned(config)


def test_the_same_dataset_written_anew_is_the_same(config):
    curation.curate(config)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ArtefactWarning)
        merging.load_tuned(config)


# -- The merged model.


def train_again(config):
    """Another adapter over the one that lies there, as notebook 04 writes it."""
    flip_a_bit(config.run_dir / ADAPTER, 1)
    integrity.seal(config.adapter_dir)


@pytest.fixture
def merged(config, tokenizer):
    merging.save_merged(merging.merge(config, "16bit"), tokenizer, config)
    return config


def test_a_merged_model_is_sealed_and_accepted(merged, tokenizer):
    command = ["sha256sum", "--check", "--strict", "--quiet", integrity.SEAL]
    assert subprocess.run(command, cwd=merged.merged_dir).returncode == 0
    assert integrity.check_merged(merged) == merged.merged_dir
    merging.merge_by_parts(merged, "16bit", tokenizer)
    assert integrity.check_merged(merged) == merged.merged_dir


@pytest.mark.parametrize(
    "use",
    [
        integrity.check_merged,
        lambda config: inference.load(config, "merged"),
        lambda config: inference.load(config, "requantized"),
        merging.push_model,
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
    for name in (integrity.SEAL, integrity.MERGE_RECORD):
        (merged.merged_dir / name).unlink()
    inference.load(merged, "merged")


# -- Dataset.


def load_dataset(config):
    return training.load_dataset(config)["train"][:]


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
    refuses(config, curation.push_dataset, "is damaged or changed .*: run notebook 02 again")


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
    refuses(config, integrity.read_metrics, words)
    refuses(config, hub.model_card, words)
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
    refuses(config, models.load_model, words)


def test_a_pointer_of_git_lfs_instead_of_weights_is_named(base):
    config, weights = base
    weights.write_bytes(POINTER)
    words = "model.safetensors is a Git-LFS pointer and not the weights: run `git lfs pull` there"
    refuses(config, models.load_model, words)
