"""Three ways to fold an adapter into its base, how far each is from the unmerged model, and saving.

    into "16bit":        the 16-bit base + the update
    into "dequantized":  the 4-bit base, unpacked to 16 bits, + the update
    into "4bit":         the same, packed to 4 bits again

The adapter was trained on the 4-bit base, so only the last two start from the weights it knows.
"""

import dataclasses
import json
from pathlib import Path

import huggingface_hub
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from helpers import artefacts, hub, memory, models, precision, prompts
from helpers.config import ALL_LINEAR_TARGETS, PROJECT_DIR, Config
from helpers.integrity import (
    ADAPTER_WEIGHTS,
    check_adapter,
    check_merged,
    seal_merged,
    system_message,
)

MERGES = ("16bit", "dequantized", "4bit")
GENERAL_TEXT = PROJECT_DIR / "data" / "general.txt"


def load_tuned(config: Config, base=None) -> PeftModel:
    """The 4-bit base (or the given one) with the trained adapter on top, in eval mode.

    The adapter keeps the dtype it was saved in: cast to float32, it would slow every layer down.
    Raises ValueError for a base that carries an adapter already.
    """
    adapter = check_adapter(config)
    base = models.without_adapter(base if base is not None else models.load_model(config))
    return PeftModel.from_pretrained(base, adapter, autocast_adapter_dtype=False).eval()


def merge(config: Config, into: str):
    """The merged model as a plain transformers model. `into` is one of MERGES, else ValueError.

    A model that the GPU cannot hold in 16 bits is merged on the CPU, and stays there.
    """
    if into not in MERGES:
        raise ValueError(f"cannot merge into {into!r}: choose one of {', '.join(MERGES)}")
    if into != "4bit":
        config = with_room(config, bytes_needed(config, into))
    base = models.load_model(config, quantized=into != "16bit")
    if into == "dequantized":
        base = base.dequantize()
    merged = load_tuned(config, base).merge_and_unload().eval()
    # Rounded to what is saved, in the format that the machine computes in.
    precision.cast(merged.parameters(), precision.storage_dtype(config))
    precision.cast(merged.parameters(), precision.compute_dtype(config))
    return merged


def with_room(config: Config, needed: int) -> Config:
    """The Config, moved to the CPU when its GPU has less than `needed` bytes free."""
    if config.device == "cpu" or torch.cuda.mem_get_info(config.device)[0] >= needed:
        return config
    return dataclasses.replace(config, device_map={"": "cpu"})


def bytes_needed(config: Config, into: str) -> int:
    """What a merge into 16 bits holds: all weights unpacked, the adapter, the 4-bit base if used.

    On a CPU it may be less, for pages of a mapped file that nobody reads are not in memory.
    """
    shape = models.load_shape(config.model_name)
    run = memory.Run.from_config(config)
    whole = memory.weight_bytes(shape, dataclasses.replace(run, quantization="16bit"))
    packed = memory.weight_bytes(shape, run) if into == "dequantized" else 0
    adapter = config.require(config.adapter_dir, "04") / ADAPTER_WEIGHTS
    return whole + packed + adapter.stat().st_size


def save_merged(model, tokenizer, config: Config) -> Path:
    """Write a merged 16-bit model to run_dir/merged as safetensors, whole or not at all.

    Never over the adapter, as the article does: the adapter is what a later merge starts from. The
    chat template that goes with it is the one of training, not the base model's own. Raises
    DiskFull and InUse.
    """
    stored = precision.storage_dtype(config)
    size = sum(p.numel() * min(p.element_size(), stored.itemsize) for p in model.parameters())
    with artefacts.whole_folder(config.merged_dir, size) as draft:
        precision.cast(model.parameters(), stored)
        model.save_pretrained(draft)
        precision.cast(model.parameters(), precision.compute_dtype(config))
        _finish(draft, tokenizer, config)
    return config.merged_dir


def _finish(folder: Path, tokenizer, config: Config) -> None:
    """Add what belongs to the weights of a merged model: tokenizer, chat template, seal."""
    tokenizer.save_pretrained(folder)
    template = prompts.chat_template(system_message(config, config.adapter_dir))
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    seal_merged(folder, config)


def merge_by_parts(config: Config, into: str, tokenizer, part_bytes: int = 10**9) -> Path:
    """`merge` and `save_merged` without the model: one matrix at a time, in files of `part_bytes`.

    For a model that fits neither the GPU nor the memory in 16 bits. On a CPU the weights are bit
    for bit those of `merge`. Raises ValueError for `into` = "4bit", which needs no room to begin
    with.
    """
    if into not in ("16bit", "dequantized"):
        raise ValueError(f"cannot merge into {into!r} by parts: choose 16bit or dequantized")
    adapter = load_file(check_adapter(config) / ADAPTER_WEIGHTS)
    base = models.local_folder(config.model_name)
    with artefacts.whole_folder(config.merged_dir) as draft:
        part, places = {}, {}
        for name, tensor in models.stored_tensors(base):
            part[name] = _merged_weight(name, tensor[:], adapter, config, into)
            if sum(weight.nbytes for weight in part.values()) >= part_bytes:
                places |= _save_part(part, draft, len(set(places.values())))
                part = {}
        places |= _save_part(part, draft, len(set(places.values())))
        index = {"metadata": {}, "weight_map": places}
        (draft / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
        shape = AutoConfig.from_pretrained(base)
        shape.dtype = precision.storage_dtype(config)
        shape.save_pretrained(draft)
        _finish(draft, tokenizer, config)
    return config.merged_dir


def _save_part(part: dict[str, torch.Tensor], folder: Path, number: int) -> dict[str, str]:
    """Write the tensors as one file; returns where each of them lies."""
    file = f"model-{number + 1:05}.safetensors"
    save_file(part, folder / file, metadata={"format": "pt"})
    return dict.fromkeys(part, file)


def _merged_weight(name: str, W: torch.Tensor, adapter: dict, config: Config, into: str):
    """One tensor of the base, through 4 bits if wanted, plus its update if it has one."""
    layer = name.removesuffix(".weight")
    stored = precision.storage_dtype(config)
    W = W.to(precision.compute_dtype(config))
    if into == "dequantized" and layer.endswith(ALL_LINEAR_TARGETS):
        W = through_4_bits(W, config)
    if not layer.endswith(config.target_modules):
        return W.to(stored)
    update = update_of(layer, adapter, config).to(W.dtype)  # rounded, then added, as in peft
    return (W + update).to(stored)


def through_4_bits(W: torch.Tensor, config: Config) -> torch.Tensor:
    """A weight matrix as the 4-bit base holds it: packed, and unpacked again."""
    kind, double = config.bnb_4bit_compute_quant_type, config.use_nested_quant
    packed, state = quantize_4bit(W, quant_type=kind, compress_statistics=double)
    return dequantize_4bit(packed, state)


def update_of(layer: str, adapter: dict, config: Config) -> torch.Tensor:
    """(alpha / rank) B A of a layer in float32, from the tensors of the adapter's file."""
    A, B = (adapter[f"base_model.model.{layer}.lora_{part}.weight"].float() for part in "AB")
    return (B @ A) * (config.lora_alpha / config.lora_r)


def general_rows() -> list[dict]:
    """Plain prose, a row for each paragraph, for `answer_logits`: nothing to do with the task."""
    paragraphs = GENERAL_TEXT.read_text(encoding="utf-8").split("\n\n")
    return [{"prompt": "", "completion": paragraph.strip()} for paragraph in paragraphs]


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


def text_loss(model, tokenizer, rows) -> float:
    """`answer_loss` of a model, for rows whose logits nobody else needs."""
    return answer_loss(answer_logits(model, tokenizer, rows), tokenizer, rows)


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
    folder = check_merged(config)
    name = hub.own_repository(config.hf_hub_model_name)
    (folder / "README.md").write_text(hub.model_card(config), encoding="utf-8")
    api = huggingface_hub.HfApi()
    api.create_repo(name, exist_ok=True)
    api.upload_folder(repo_id=name, folder_path=folder, commit_message="Merged model and tokenizer")
    return name
