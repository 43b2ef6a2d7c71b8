"""The rows that train: those of notebook 02, checked against this model's tokenizer and MAX_LENGTH.

A row that is too long is left out whole. trl would cut it, and a row without its end teaches a
model not to stop.
"""

import itertools

from datasets import DatasetDict, load_from_disk

from helpers import prompts
from helpers.config import Config, ConfigError
from helpers.data import curation_note, dataset_folder
from helpers.model import loading
from helpers.runs.inventory import ArtefactError


def load_dataset(config: Config, tokenizer=None) -> DatasetDict:
    """The train and validation rows that notebook 02 wrote, with only the columns that train.

    With the tokenizer of a training: those that fit, see `rows_that_fit`. Raises ArtefactError for
    rows in another template, and for rows of another tokenizer that fail with that of MODEL_NAME.
    Warns, ArtefactWarning, of another SYSTEM_MESSAGE.
    """
    dataset = load_from_disk(str(dataset_folder.check_dataset(config)))
    dataset = dataset.select_columns(["prompt", "completion"])
    curation_note.system_message(config, config.dataset_dir)
    if note := curation_note.curation_of(config, config.dataset_dir):
        own = tokenizer or loading.load_tokenizer(config.model_name)
        if problem := _problem(config, dataset, own, note):
            raise ArtefactError(f"the rows {problem}: run notebook 02 again")
    if tokenizer is None:
        return dataset
    return with_masks(tokenizer, rows_that_fit(config, tokenizer, dataset))


def _problem(config: Config, dataset: DatasetDict, tokenizer, note: dict) -> str:
    """What keeps rows that were made as the note says from training this model; "" for nothing."""
    known = {name: prompts.template_text(tokenizer, name == "model") for name in prompts.TEMPLATES}
    wanted = [known[config.template]] if config.template else [*known.values()]
    if note["template"] not in wanted:
        return f"are in the template {note['template']!r}, and the one here is {wanted[0]!r}"
    if curation_note.tokenizer_note(tokenizer).items() <= note["tokenizer"].items():
        return ""
    rows = [row for split in dataset.values() for row in zip(*split[:].values(), strict=True)]
    failing = [found for _, found in prompts.verify_rows(tokenizer, rows) if found]
    if not failing:
        return ""
    return (
        f"were made with the tokenizer of {note['tokenizer']['name']}, and with that of MODEL_NAME "
        f"({config.model_name}) {len(failing)} of {len(rows)} fail, the first for {failing[0][0]}"
    )


def with_masks(tokenizer, dataset: DatasetDict) -> DatasetDict:
    """Rows with several turns as tokens with trl's `completion_mask`: it hides later requests too.

    Rows of one turn are left to trl, which masks their prompt.
    """
    pairs = (zip(rows["prompt"], rows["completion"], strict=True) for rows in dataset.values())
    if all(len(prompts.learned_parts(tokenizer, *pair)) == 1 for pair in itertools.chain(*pairs)):
        return dataset

    def masked(row: dict) -> dict:
        encoded = prompts.encode(tokenizer, row["prompt"], row["completion"])
        mask = [int(label != prompts.IGNORED_LABEL) for label in encoded["labels"]]
        return {"input_ids": encoded["input_ids"], "completion_mask": mask}

    return dataset.map(masked)


def rows_that_fit(config: Config, tokenizer, dataset: DatasetDict) -> DatasetDict:
    """The rows of up to MAX_TRAIN_LENGTH or MAX_LENGTH tokens; how many are longer is printed.

    Raises ConfigError when no training row fits, or no validation row.
    """
    limits = {"MAX_LENGTH": config.max_length, "MAX_TRAIN_LENGTH": config.max_train_length}
    most, name = min((limit, name) for name, limit in limits.items() if limit is not None)
    lengths = row_lengths(tokenizer, dataset)
    fitting = {
        split: [place for place, length in enumerate(found) if length <= most]
        for split, found in lengths.items()
    }
    lost = {split: len(found) - len(fitting[split]) for split, found in lengths.items()}
    if not any(lost.values()):
        return dataset
    longer = " and ".join(f"{lost[s]} of {len(lengths[s])} {s} rows" for s in lost) + " are longer"
    if not all(fitting.values()):
        longest = max(map(max, lengths.values()))
        raise ConfigError(
            f"{name} is {most}, and {longer}: raise it (the longest has {longest} tokens), or have "
            "shorter rows written by notebook 02"
        )
    print(f"{name} = {most}: {longer} and left out", flush=True)
    return DatasetDict({split: rows.select(fitting[split]) for split, rows in dataset.items()})


def row_lengths(tokenizer, dataset: DatasetDict) -> dict[str, list[int]]:
    """The tokens of each row by split, as trl counts them before it cuts any."""

    def lengths(rows) -> list[int]:
        if "input_ids" in rows.column_names:  # tokens already
            return list(map(len, rows["input_ids"]))
        pairs = zip(rows["prompt"], rows["completion"], strict=True)
        return [length for length, _ in prompts.verify_rows(tokenizer, pairs)]

    return {name: lengths(rows) for name, rows in dataset.items()}
