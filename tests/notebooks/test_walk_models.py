"""Models that are no Llama, and tokenizers that name few tokens, walk notebooks 02 to 06."""

import shutil

import pytest

from helpers.config import Config, ConfigError
from helpers.model import hub, loading
from helpers.runs import inventory
from tests.notebooks.test_smoke import NAMES
from tests.walking import (
    SHORT,
    CellFailed,
    bare_tokenizer,
    first_tokens,
    save_random_model,
    walk,
    write_corpus,
)

SHAPES = {"Qwen2": {}, "Gemma3Text": {"head_dim": 16}, "Qwen3": {"head_dim": 16}, "Mistral": {}}
# `make test` walks the first two, whose layers differ most from Llama's, `make test-slow` the rest.
WALKS = [("Qwen2", "bare"), ("Gemma3Text", "usual")]
WALKS += [
    pytest.param(name, tokens, marks=pytest.mark.slow)
    for name in SHAPES
    for tokens in ("usual", "bare")
    if (name, tokens) not in WALKS
]


@pytest.fixture(scope="module")
def curated(tmp_path_factory, tokenizer):
    """A function: name of a tokenizer -> (tokenizer, parameters whose RUN_DIR has a dataset)."""
    corpus, made = tmp_path_factory.mktemp("corpus"), {}
    write_corpus(corpus)

    def curate(name: str):
        if name not in made:
            folder, run = (tmp_path_factory.mktemp(name) for _ in range(2))
            short = first_tokens(tokenizer, 2000, folder)
            if name == "bare":
                short = bare_tokenizer(folder)
            save_random_model("LlamaConfig", short, folder)
            made[name] = short, {"DATA_SOURCE": str(corpus), "RUN_DIR": str(run), **SHORT}
            walk("02", **made[name][1], MODEL_NAME=str(folder))
        return made[name]

    return curate


@pytest.mark.parametrize(("architecture", "tokens"), WALKS)
def test_a_model_walks_all_notebooks(curated, tmp_path, architecture, tokens):
    tokenizer, parameters = curated(tokens)
    shutil.copytree(parameters["RUN_DIR"], tmp_path / "run")
    shape = SHAPES[architecture]
    save_random_model(f"{architecture}Config", tokenizer, tmp_path / "model", **shape)
    parameters = {**parameters, "RUN_DIR": str(tmp_path / "run")}
    parameters |= {"MODEL_NAME": str(tmp_path / "model")}
    found = walk("03", **parameters)
    assert found["predicted"] == found["measured"]
    walk("04", **parameters, MAX_STEPS=2)
    walk("05", **parameters)
    walk("06", **parameters)
    metrics = inventory.read_metrics(Config.from_notebook(parameters))
    trained = metrics["04"]["trainable_parameters"]
    assert trained == lora_parameters(tmp_path / "model")
    assert set(NAMES["06"].split()) - set(metrics["06"]) <= {
        name for name in NAMES["06"].split() if "base_chat" in name and tokens == "bare"
    }


def lora_parameters(folder) -> int:
    """Rank 64 on the seven matrices of each layer, counted from the file."""
    sizes = [
        64 * sum(tensor.get_shape())
        for name, tensor in hub.stored_tensors(folder)
        if name.removesuffix("_proj.weight") != name
    ]
    return sum(sizes)


@pytest.mark.parametrize("notebook", ["03", "04"])
def test_a_model_with_other_layers_is_refused_where_it_would_be_loaded(curated, tmp_path, notebook):
    tokenizer, parameters = curated("usual")
    save_random_model("Phi3Config", tokenizer, tmp_path)
    first = {"03": "cell 4", "04": "cell 6"}[notebook]
    wanted = f"{first} .*ConfigError: MODEL_NAME is .*'phi3' model without self_attn.q_proj"
    with pytest.raises(CellFailed, match=wanted):
        walk(notebook, **parameters, MODEL_NAME=str(tmp_path))


def test_a_tokenizer_whose_only_special_token_is_eos_is_refused(curated, tmp_path, tokenizer):
    _, parameters = curated("usual")
    folder = tmp_path / "model"
    first_tokens(tokenizer, 2000, folder)
    bare_tokenizer(folder, special=1)
    with pytest.raises(ConfigError, match="only special token is '<|im_end|>'.*`pad_token`"):
        loading.load_tokenizer(str(folder))
    with pytest.raises(CellFailed, match="02_dataset_curation, cell 18 .*only special token"):
        walk("02", **{**parameters, "RUN_DIR": str(tmp_path / "run")}, MODEL_NAME=str(folder))
