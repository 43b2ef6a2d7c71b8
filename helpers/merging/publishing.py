"""Uploads to the Hugging Face Hub, under the name of the user who is logged in; a model's card."""

from collections.abc import Iterable, Sequence

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError

from helpers.config import Config
from helpers.data.curation_note import curation_of, system_message
from helpers.model import precision
from helpers.runs import folders
from helpers.runs.inventory import read_metrics
from helpers.runs.scores import score_rows

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
    """`user/<last part of name>` for the user who is logged in.

    Raises NotLoggedIn, before anything is sent, without a token or with one the Hub refuses.
    """
    if huggingface_hub.get_token() is None:
        raise NotLoggedIn(
            "no Hugging Face token was found and nothing was uploaded: run `hf auth login` first"
        )
    try:
        user = huggingface_hub.whoami()["name"]
    except (HfHubHTTPError, OSError) as error:
        raise NotLoggedIn(
            f"the Hub did not accept the login ({type(error).__name__}) and nothing was uploaded: "
            "check the network, or run `hf auth login` again"
        ) from error
    return f"{user}/{name.split('/')[-1]}"


def upload_dataset(repository: str, folder: str) -> None:
    """Upload a folder with rows in `data/` and their card, in one commit: both or neither."""
    api = huggingface_hub.HfApi()
    api.create_repo(repository, repo_type="dataset", exist_ok=True)
    api.upload_folder(
        repo_id=repository,
        repo_type="dataset",
        folder_path=folder,
        delete_patterns="data/*",  # of an earlier upload
        commit_message="Rows and their card",
    )


def model_card(config: Config) -> str:
    """The README.md of the merged model: recipe, numbers of the run, limits and licences."""
    metrics, base = read_metrics(config), folders.public_name(config.model_name)
    longest = curation_of(config, config.merged_dir).get("max_length", config.max_length)
    known = (both for part, both in LICENCES.items() if part in base.lower())
    tag, licence = next(known, UNKNOWN_LICENCE)
    numbers = [
        (name, f"{value:.4g}")
        for lesson in ("04", "05")
        for name, value in metrics.get(lesson, {}).items()
    ]
    return f"""---
license: {tag}
base_model: {base}
language: [en]
pipeline_tag: text-generation
tags: [qlora, code, python]
---
# {config.new_model_name}

{base}, tuned by QLoRA to answer questions about Python step by step, and merged. The prompt is
Llama 2's template (`apply_chat_template` writes it) with the
system message "{system_message(config, config.merged_dir)}"

## Recipe

{_table(("setting", "value"), _recipe(config))}

## Measured

{_table(("what", "value"), numbers)}

{_scores(metrics.get("06", {}))}

## Limits

- It answers in the form of its training data; whether its code is right has to be tested. Run it
  only where it can do no harm: nobody has looked at what it may write.
- One model of one run with one seed: read small differences as chance.
- English questions about Python, in the template above, of up to {longest} tokens with
  their answers; anything else was not tried.

## Licences

- Base model: {licence}.
- Training data: {_data_licence(config)}
"""


def _recipe(config: Config) -> list[tuple]:
    double = ", double quantization" if config.use_nested_quant else ""
    computed = str(precision.compute_dtype(config)).removeprefix("torch.")
    packed = f"{config.bnb_4bit_compute_quant_type}{double}, computed in {computed}"
    steps = "" if config.max_steps == -1 else f", at most {config.max_steps} steps"
    rows = config.per_device_train_batch_size * config.grad_acc_steps
    return [
        ("base in 4 bits", packed),
        ("adapter", f"rank {config.lora_r}, alpha {config.lora_alpha}"),
        ("adapter on", ", ".join(config.target_modules)),
        ("length of training", f"{config.num_epochs} epoch(s){steps}, {rows} rows a step"),
        ("optimizer", f"{config.optim}, {config.learning_rate:g}, {config.scheduler_type}"),
        ("loss on", "answers" if config.completion_only_loss else "questions and answers"),
        ("merged into", config.merge_into),
        ("seed", config.seed),
    ]


def _scores(metrics: dict) -> str:
    """What notebook 06 counted, with intervals; "" before it has run."""
    models = [
        name for name in ("base", "base_chat", "tuned", "merged") if f"stop_rate_{name}" in metrics
    ]
    if not models:
        return ""
    rows = score_rows(metrics, models)
    return f"""{_table(("share of greedy answers that", *models), rows)}

On {metrics["problems"]} problems that are in no training row, of which the merged model answered
{metrics["problems_merged"]}; `base_chat` is the base in its own template. In brackets 95 %
intervals (Wilson)."""


def _data_licence(config: Config) -> str:
    """What the rows that were trained on say of their licence, and how it is met."""
    from datasets import load_from_disk

    noted = curation_of(config, config.merged_dir).get("source")
    source = f"`{noted or folders.public_name(config.data_source)}`"
    if not config.dataset_dir.exists():
        return f"{source}, under the licence of its source."
    rows = load_from_disk(str(config.dataset_dir))["train"]
    posts = "posts of Stack Overflow, " if rows[0]["url"] else ""
    return (
        f"{source}, {posts}{', '.join(rows.unique('licence'))}. Every row of the dataset names its "
        "authors (`question_author`, `answer_author`, `question_id`, `url`): share it too."
    )


def _table(heads: Sequence[str], rows: Iterable[Sequence]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
