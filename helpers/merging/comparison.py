"""What a model thinks of known answers: its logits on their tokens, and its loss."""

import torch

from helpers import prompts


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
