"""How far a model is from the one that was trained: logits, KL divergence, agreement, losses."""

import torch

from helpers import prompts
from helpers.config import PROJECT_DIR

GENERAL_TEXT = PROJECT_DIR / "data" / "general.txt"


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
        # A model whose weights travel to the GPU takes its input there by itself.
        device = "cpu" if model.device.type == "meta" else model.device
        ids = torch.tensor([encoded["input_ids"]], device=device)
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
        # Nothing predicts a first token; where there is a BOS, that is never a label.
        targets = labels[1:][labels[1:] != prompts.IGNORED_LABEL]
        total += torch.nn.functional.cross_entropy(row_logits, targets, reduction="sum").item()
        tokens += len(targets)
    return total / tokens
