"""How notebook 02 made the rows: a note that goes on with the adapter and the merged model.

It holds the system message, the template, the length, and which tokenizer counted.
"""

import hashlib
import json
import warnings
from pathlib import Path

from helpers import prompts
from helpers.config import SYSTEM_MESSAGE, Config
from helpers.runs.inventory import ArtefactWarning, again, read_json

CURATION = "curation.json"


def curation_of(config: Config, folder: Path) -> dict:
    """What notebook 02 noted of the rows behind the dataset, adapter or merged model in `folder`.

    One without a note was made by what comes before it in the run; {} where nothing is noted.
    """
    results = [config.merged_dir, config.adapter_dir, config.dataset_dir]
    notes = [result / CURATION for result in results[results.index(folder) :]]
    return next((read_json(note, again("02")) for note in notes if note.is_file()), {})


def write_curation(note: dict, folder: Path) -> None:
    """Put what `curation_of` gives beside the result that is made from those rows."""
    if note:
        text = json.dumps(note, indent=1, ensure_ascii=False) + "\n"
        (folder / CURATION).write_text(text, encoding="utf-8")


def system_message(config: Config, folder: Path) -> str:
    """The one to ask the model with: SYSTEM_MESSAGE, or that of the rows behind `folder`.

    Warns, ArtefactWarning, when they are two: the model was trained on the latter.
    """
    given, trained = config.system_message, curation_of(config, folder).get("system_message")
    if None not in (given, trained) and given != trained:
        warnings.warn(
            f"SYSTEM_MESSAGE is {given!r}, and the training rows have {trained!r}: leave it out "
            "to ask as in training, or run notebook 02 again with it",
            ArtefactWarning,
            stacklevel=1,  # one place, so that it is shown once
        )
    return next(text for text in (given, trained, SYSTEM_MESSAGE) if text is not None)


def in_own_template(config: Config, folder: Path) -> bool:
    """Whether the rows behind `folder` are in the model's own chat template, and not Llama 2's."""
    return curation_of(config, folder).get("template", prompts.TEMPLATE) != prompts.TEMPLATE


def tokenizer_note(tokenizer) -> dict:
    """By what two tokenizers are known as the same, in a note of the curation."""
    rules = json.dumps(tokenizer_rules(tokenizer), sort_keys=True)
    return {
        "rules_sha256": hashlib.sha256(rules.encode()).hexdigest(),
        "bos_token": tokenizer.bos_token,
        "eos_token": tokenizer.eos_token,
    }


def tokenizer_rules(tokenizer) -> dict:
    """What turns text into tokens, of a loaded tokenizer."""
    return lasting_rules(json.loads(tokenizer.backend_tokenizer.to_str()))


def lasting_rules(described: dict) -> dict:
    """The rules of a tokenizer.json, without what a library sets there for one batch."""
    return {key: described[key] for key in described if key not in ("padding", "truncation")}
