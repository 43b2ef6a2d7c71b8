"""Three ways to fold an adapter into its base, how far each is from the unmerged model, and saving.

    into "16bit":        the 16-bit base + the update
    into "dequantized":  the 4-bit base, unpacked to 16 bits, + the update
    into "4bit":         the same, packed to 4 bits again

The adapter was trained on the 4-bit base, so only the last two start from the weights it knows.
"""

from pathlib import Path

import huggingface_hub
import torch
from peft import PeftModel

from helpers import artefacts, hub, models, prompts
from helpers.config import Config
from helpers.integrity import check_adapter, read_metrics

MERGES = ("16bit", "dequantized", "4bit")


def load_tuned(config: Config, base=None) -> PeftModel:
    """The 4-bit base (or the given one) with the trained adapter on top, in eval mode.

    The adapter keeps the dtype it was saved in: cast to float32, it would slow every layer down.
    Raises ValueError for a base that carries an adapter already.
    """
    adapter = check_adapter(config)
    base = models.without_adapter(base if base is not None else models.load_model(config))
    return PeftModel.from_pretrained(base, adapter, autocast_adapter_dtype=False).eval()


def merge(config: Config, into: str):
    """The merged model as a plain transformers model. `into` is one of MERGES, else ValueError."""
    if into not in MERGES:
        raise ValueError(f"cannot merge into {into!r}: choose one of {', '.join(MERGES)}")
    base = models.load_model(config, quantized=into != "16bit")
    if into == "dequantized":
        base = base.dequantize()
    return load_tuned(config, base).merge_and_unload().eval()


def save_merged(model, tokenizer, config: Config) -> Path:
    """Write a merged 16-bit model to run_dir/merged as safetensors, whole or not at all.

    Never over the adapter, as the article does: the adapter is what a later merge starts from.
    Raises DiskFull and InUse.
    """
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    with artefacts.whole_folder(config.merged_dir, size) as draft:
        model.save_pretrained(draft)
        tokenizer.save_pretrained(draft)
    return config.merged_dir


@torch.no_grad()
def answer_logits(model, tokenizer, rows) -> list[torch.Tensor]:
    """For each row with prompt and completion: logits of the completion, [tokens, vocabulary]."""
    logits = []
    for row in rows:
        encoded = prompts.encode(tokenizer, row["prompt"], row["completion"])
        labels = torch.tensor(encoded["labels"])
        ids = torch.tensor([encoded["input_ids"]], device=model.device)
        # Position t predicts the token at t + 1.
        predicts_answer = labels[1:] != prompts.IGNORED_LABEL
        logits.append(model(input_ids=ids).logits[0, :-1].cpu()[predicts_answer].float())
    return logits


def kl_divergence(reference: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    """Mean KL(reference || other) in nats per token, over lists of logits [tokens, vocabulary]."""
    total = tokens = 0
    for p_logits, q_logits in zip(reference, other, strict=True):
        p, q = p_logits.log_softmax(-1), q_logits.log_softmax(-1)
        total += (p.exp() * (p - q)).sum().item()
        tokens += len(p)
    return total / tokens


def top_token_agreement(reference: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    """Share of positions on which both models find the same token the most likely."""
    same = [(p.argmax(-1) == q.argmax(-1)) for p, q in zip(reference, other, strict=True)]
    return torch.cat(same).float().mean().item()


def answer_loss(logits: list[torch.Tensor], tokenizer, rows) -> float:
    """Mean negative log-likelihood of the completions in nats per token, from `answer_logits`."""
    total = tokens = 0
    for row_logits, row in zip(logits, rows, strict=True):
        labels = torch.tensor(prompts.encode(tokenizer, row["prompt"], row["completion"])["labels"])
        targets = labels[labels != prompts.IGNORED_LABEL]
        total += torch.nn.functional.cross_entropy(row_logits, targets, reduction="sum").item()
        tokens += len(targets)
    return total / tokens


def push_model(config: Config) -> str:
    """Upload the merged model, its tokenizer and a card; returns the repository's id.

    In one commit, so that nothing is left half-uploaded. Raises NotLoggedIn without a login.
    """
    folder = config.require(config.merged_dir, "05")
    name = hub.own_repository(config.hf_hub_model_name)
    (folder / "README.md").write_text(model_card(config), encoding="utf-8")
    api = huggingface_hub.HfApi()
    api.create_repo(name, exist_ok=True)
    api.upload_folder(repo_id=name, folder_path=folder, commit_message="Merged model and tokenizer")
    return name


def model_card(config: Config) -> str:
    """The README.md of the merged model, filled in from the metrics of the run."""
    numbers = {
        name: value
        for lesson, metrics in read_metrics(config).items()
        for name, value in metrics.items()
        if lesson >= "04"
    }
    rows = "\n".join(f"| {name} | {value:.4g} |" for name, value in numbers.items())
    return f"""---
base_model: {config.model_name}
tags: [qlora, code, python]
---
# {config.new_model_name}

{config.model_name}, tuned by QLoRA (rank {config.lora_r} on {", ".join(config.target_modules)}) on
`{config.data_source}` and merged ({config.merge_into}).
System message: "{config.system_message}"

| measured | value |
|---|---|
{rows}

It answers in the form of its training data. Whether its code is right has to be tested.
"""
