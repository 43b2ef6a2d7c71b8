"""Uploads to the Hugging Face Hub, under the name of the user who is logged in; a model's card."""

import tempfile
from pathlib import Path

import datasets
import huggingface_hub
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError

from helpers.config import Config
from helpers.data.curation_note import curation_of, system_message
from helpers.data.dataset_folder import check_dataset
from helpers.data.report import card_of_part
from helpers.merging.merging import check_merged, merge_record
from helpers.model import precision
from helpers.model.embedded import EMBEDDED_NAME
from helpers.runs import folders
from helpers.runs.inventory import read_metrics
from helpers.runs.scores import models_asked, score_rows

CARD = Path(__file__).with_name("model_card.md")
EMBEDDED_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"  # what the embedded model is on the Hub
SMALL_SET_ROWS = 20_000  # the size of the article's smaller dataset
# Part of a base model's name -> its licence as the Hub calls it, and in words.
LICENCES = {
    "smollm": ("apache-2.0", "Apache-2.0"),
    "tinyllama": ("apache-2.0", "Apache-2.0"),
    "llama-2": (
        "llama2",
        "Llama 2 is licensed under the LLAMA 2 Community License, Copyright (c) Meta Platforms, "
        "Inc. All Rights Reserved (https://ai.meta.com/llama/license)",
    ),
}
UNKNOWN_LICENCE = ("other", "that of the base model: read its page before you use or share this")


class NotLoggedIn(RuntimeError):
    """No usable token was found. Nothing has been uploaded; the message says what to do."""


def own_repository(name: str) -> str:
    """`user/<last part of name>` for the user who is logged in; NotLoggedIn before it is sent."""
    try:
        user = huggingface_hub.whoami()["name"]
    except (HfHubHTTPError, OSError) as error:  # without a token too
        raise NotLoggedIn(
            f"the Hub did not accept the login ({type(error).__name__}) and nothing was uploaded: "
            "check the network, or run `hf auth login`"
        ) from error
    return f"{user}/{name.split('/')[-1]}"


def upload(repository: str, folder: Path | str, kind: str) -> None:
    """Upload a folder in one commit, all of it or nothing; `kind` is "model" or "dataset".

    The rows in `data/` of an earlier upload of a dataset are removed by the same commit.
    """
    api = huggingface_hub.HfApi()
    api.create_repo(repository, repo_type=kind, exist_ok=True)
    earlier = "data/*" if kind == "dataset" else None
    what = {"repo_type": kind, "delete_patterns": earlier, "folder_path": folder}
    api.upload_folder(repo_id=repository, commit_message=f"The {kind} and its card", **what)


def push_dataset(config: Config) -> list[str]:
    """Upload the dataset of a run and its card under the user's own name; the repository ids.

    More than SMALL_SET_ROWS training rows go up twice: the first of them as `new_dataset_name`, all
    as `new_dataset_name_complete`. Raises NotLoggedIn, before anything is sent.
    """
    path = check_dataset(config)
    train, held = (datasets.load_from_disk(str(path / split)) for split in ("train", "validation"))
    sizes = {config.new_dataset_name: min(len(train), SMALL_SET_ROWS)}
    if len(train) > SMALL_SET_ROWS:
        sizes[config.new_dataset_name_complete] = len(train)
    repositories = {own_repository(name): rows for name, rows in sizes.items()}
    folders.need_space(config.run_dir, train.data.nbytes, "uploading the dataset")
    for repository, rows in repositories.items():
        with tempfile.TemporaryDirectory(prefix=".upload-", dir=config.run_dir) as folder:
            for name, split in (("train", train.select(range(rows))), ("validation", held)):
                split.to_parquet(Path(folder) / "data" / f"{name}-00000-of-00001.parquet")
            card = (path / "README.md").read_text("utf-8")
            card = card_of_part(card, rows, len(train), len(held))
            (Path(folder) / "README.md").write_text(card, encoding="utf-8")
            upload(repository, folder, "dataset")
    return list(repositories)


def push_model(config: Config) -> str:
    """Upload the merged model, its tokenizer and a card; the repository's id. NotLoggedIn."""
    folder, name = check_merged(config), own_repository(config.hf_hub_model_name)
    (folder / "README.md").write_text(model_card(config), encoding="utf-8")
    upload(name, folder, "model")
    return name


def model_card(config: Config) -> str:
    """The README.md of the merged model: recipe, numbers of the run, limits and licences."""
    metrics, base = read_metrics(config), folders.public_name(config.model_name)
    base = EMBEDDED_ID if base == EMBEDDED_NAME else base
    known = (both for part, both in LICENCES.items() if part in base.lower())
    tag, licence = next(known, UNKNOWN_LICENCE)
    asked = metrics.get("06", {})
    facts = {"license": tag, "base_model": base, "language": "en"}
    tags = {"tags": ["qlora", "code", "python"], "pipeline_tag": "text-generation"}
    card = ModelCard.from_template(
        ModelCardData(**facts, **tags),
        template_path=str(CARD),
        name=config.new_model_name,
        base=base,
        system_message=system_message(config, config.merged_dir),
        config=config,
        computed=str(precision.compute_dtype(config)).removeprefix("torch."),
        noted=merge_record(config.merged_dir),  # of its adapter: the Config may be another now
        numbers={**metrics.get("04", {}), **metrics.get("05", {})},
        models=models_asked(asked),
        scores=score_rows(asked, models_asked(asked)),
        asked=asked,
        longest=curation_of(config, config.merged_dir).get("max_length", config.max_length),
        licence=licence,
        data_licence=_data_licence(config),
    )
    return card.content + "\n"


def _data_licence(config: Config) -> str:
    """What the rows that were trained on say of their licence, and how it is met."""
    noted = curation_of(config, config.merged_dir).get("source")
    source = f"`{noted or folders.public_name(config.data_source)}`"
    there = config.dataset_dir.exists()
    rows = datasets.load_from_disk(str(config.dataset_dir))["train"] if there else None
    if rows is None or "licence" not in rows.column_names:
        return f"{source}, under the licence of its source."
    posts = "posts of Stack Overflow, " if rows[0]["url"] else ""
    return (
        f"{source}, {posts}{', '.join(rows.unique('licence'))}. Every row of the dataset names its "
        "authors (`question_author`, `answer_author`, `question_id`, `url`): share it too."
    )
