"""What a model thinks of known answers: its logits on their tokens, and its loss."""

import torch
from torch.nn.functional import cross_entropy

from helpers import prompts


@torch.no_grad()
def known_answers(model, tokenizer, rows) -> tuple[list[torch.Tensor], float]:
    """For rows with prompt and completion: each completion's logits, and the loss on all of them.

    Logits are [tokens, vocabulary]. The loss is the mean over tokens of -log p, in nats.
    """
    logits, losses = [], []
    for row in rows:
        encoded = prompts.encode(tokenizer, row["prompt"], row["completion"])
        labels = torch.tensor(encoded["labels"])[1:]  # position t predicts the token at t + 1
        answered = labels != prompts.IGNORED_LABEL
        # A model whose weights travel to the GPU takes its input there by itself.
        device = "cpu" if model.device.type == "meta" else model.device
        ids = torch.tensor([encoded["input_ids"]], device=device)
        logits.append(model(input_ids=ids).logits[0, :-1].cpu()[answered].float())
        losses.append(cross_entropy(logits[-1], labels[answered], reduction="none"))
    return logits, torch.cat(losses).double().mean().item()
