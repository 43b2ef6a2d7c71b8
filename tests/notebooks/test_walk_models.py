"""Models that are no Llama, and tokenizers with habits of their own, walk notebooks 02 to 06.

`check-model` must have said before that they can.
"""

import shutil

import pytest
from safetensors import safe_open

from helpers.config import Config, ConfigError
from helpers.model import check_model, loading
from helpers.runs import inventory
from tests.notebooks.test_smoke import NAMES
from tests.walking import (
    HABITS,
    SHORT,
    CellFailed,
    bare_tokenizer,
    first_tokens,
    save_random_model,
    tokenizer_like,
    walk,
    write_corpus,
)

# Architecture, its tokenizer's habits, and TEMPLATE. `make test` walks the first three, whose
# layers and tokens differ most from Llama's, `make test-slow` the rest.
WALKS = [
    ("Qwen2", "bare", "llama2"),
    ("Gemma3Text", "gemma", "model"),
    ("Phi3", "phi3", "model"),
]
SLOW = [
    ("Llama", "llama2", "llama2"),
    ("Llama", "llama3", "model"),
    ("Mistral", "mistral", "llama2"),
    ("Qwen2", "qwen", "model"),
    ("Qwen3", "qwen", "model"),
    ("SmolLM3", "llama3", "model"),
    ("Gemma3Text", "bare", "llama2"),
    ("Phi3", "llama3", "llama2"),
]
WALKS += [pytest.param(*names, marks=pytest.mark.slow) for names in SLOW]
SHAPES = {"Gemma3Text": {"head_dim": 16}, "Qwen3": {"head_dim": 16}}
SHAPES |= {"SmolLM3": {"no_rope_layers": [1, 0]}}  # the second layer has no positions


@pytest.fixture(scope="module")
def curated(tmp_path_factory, tokenizer):
    """A function: tokenizer, template -> (tokenizer, parameters whose RUN_DIR has a dataset)."""
    corpus, made = tmp_path_factory.mktemp("corpus"), {}
    write_corpus(corpus)

    def curate(habits: str, template: str = "llama2"):
        if (habits, template) not in made:
            folder, run = (tmp_path_factory.mktemp(habits) for _ in range(2))
            short = tokenizer_of(habits, tokenizer, folder)
            save_random_model("LlamaConfig", short, folder)
            parameters = {"DATA_SOURCE": str(corpus), "RUN_DIR": str(run), **SHORT}
            made[habits, template] = short, {**parameters, "TEMPLATE": template}
            walk("02", **parameters, TEMPLATE=template, MODEL_NAME=str(folder))
        return made[habits, template]

    return curate


def tokenizer_of(habits: str, tokenizer, folder):
    if habits in HABITS:
        return tokenizer_like(habits, tokenizer, folder)
    short = first_tokens(tokenizer, 2000, folder)
    return bare_tokenizer(folder) if habits == "bare" else short


@pytest.mark.parametrize(("architecture", "habits", "template"), WALKS)
def test_a_model_walks_all_notebooks(curated, tmp_path, architecture, habits, template):
    tokenizer, parameters = curated(habits, template)
    shutil.copytree(parameters["RUN_DIR"], tmp_path / "run")
    folder, shape = tmp_path / "model", SHAPES.get(architecture, {})
    save_random_model(f"{architecture}Config", tokenizer, folder, **shape)
    parameters = {**parameters, "RUN_DIR": str(tmp_path / "run"), "MODEL_NAME": str(folder)}
    config = Config.from_notebook(parameters)
    assert check_model.STOP not in {answer for _, _, answer, _ in check_model.check(config)}
    found = walk("03", **parameters)
    assert found["predicted"] == found["measured"]
    walk("04", **parameters, MAX_STEPS=2)
    walk("05", **parameters)
    walk("06", **parameters)
    metrics = inventory.read_metrics(config)
    assert metrics["04"]["trainable_parameters"] == lora_parameters(folder)
    assert metrics["05"]["reload_max_abs_diff"] == 0
    missing = set(NAMES["06"].split()) - set(metrics["06"])
    assert not missing or (not tokenizer.chat_template and all("base_chat" in n for n in missing))


def lora_parameters(folder) -> int:
    """Rank 64 on the linear matrices of each layer, counted from the file."""
    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            matrices = [name for name in opened.keys() if name.endswith("_proj.weight")]
            total += sum(64 * sum(opened.get_slice(name).get_shape()) for name in matrices)
    return total


# -- What cannot go through is refused before it is loaded; tests/unit/test_check_model.py has more.


@pytest.mark.parametrize("notebook", ["03", "04"])
def test_a_model_with_other_layers_is_refused_where_it_would_be_loaded(curated, tmp_path, notebook):
    tokenizer, parameters = curated("usual")
    save_random_model("PhiConfig", tokenizer, tmp_path)
    first = {"03": "cell 7", "04": "cell 6"}[notebook]
    wanted = f"{first} .*ConfigError: MODEL_NAME is .*'phi' model without o_proj"
    with pytest.raises(CellFailed, match=wanted):
        walk(notebook, **parameters, MODEL_NAME=str(tmp_path))


def test_a_tokenizer_whose_only_special_token_is_eos_is_refused(curated, tmp_path, tokenizer):
    _, parameters = curated("usual")
    folder = tmp_path / "model"
    first_tokens(tokenizer, 2000, folder)
    bare_tokenizer(folder, special=1)
    with pytest.raises(ConfigError, match=r"for padding but '<\|im_end\|>'.*`pad_token`"):
        loading.load_tokenizer(str(folder))
    with pytest.raises(
        CellFailed, match="02_dataset_curation, cell 18 .*no special token for padding"
    ):
        walk("02", **{**parameters, "RUN_DIR": str(tmp_path / "run")}, MODEL_NAME=str(folder))
