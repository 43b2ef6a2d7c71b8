"""A model under a name: how it is asked, and by which adapter it answers."""

import dataclasses
from threading import Lock

from transformers import GenerationConfig

from helpers import prompts
from helpers.answers import inference
from helpers.config import Config
from helpers.merging.merging import check_adapter
from helpers.model import loading


class Served:
    """One of `inference.MODELS`, or `model` by its adapter of a name; with its template and EOS."""

    def __init__(self, config: Config, which: str, turn: Lock, model=None, adapter=None):
        self.model = model or inference.load(config, which)
        self.adapter, self.device, self.config = adapter, self.model.device, self.model.config
        self.turn, self.system = turn, inference.system_message(config, which)
        self.tokenizer = tokenizer = loading.load_tokenizer(config.model_name)
        self.marks = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
        if inference.template_of(config, which) == "llama2":
            tokenizer.chat_template = prompts.chat_template(self.system)
            self.marks |= {*prompts.MARKERS}
        eos, pad = inference.end_tokens(self.model, tokenizer), tokenizer.pad_token_id
        self.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=pad)

    def generate(self, generation_config: GenerationConfig, **inputs):
        """The model's own `generate`: greedy, unless the request has a temperature above 0."""
        generation_config.do_sample = (generation_config.temperature or 0) > 0
        chosen = {"adapter_names": [self.adapter]} if self.adapter else {}
        with self.turn:
            return self.model.generate(generation_config=generation_config, **inputs, **chosen)

    def conversation(self, messages: list[dict]) -> list[dict]:
        """The messages, a system message at their head; ValueError for what cannot be asked."""
        roles = [message.get("role") for message in messages]
        if roles[-1:] != ["user"] or {*roles} - {"system", "user", "assistant"}:
            raise ValueError(f"the roles are {roles}: use system, user, assistant; end with user")
        if held := [mark for mark in self.marks if mark in str(messages)]:
            raise ValueError(f"a message holds the template's own {held[0]}: reword it")
        first = {"role": "system", "content": self.system}
        return messages if roles[0] == "system" else [first, *messages]


def load(config: Config, names: list[str], also: dict[str, str]) -> dict[str, Served]:
    """Models by name: of `inference.MODELS`; `base`, at its best; the adapters of other runs.

    Raises what `inference.load` and `check_adapter` do, ValueError for an adapter's bad name.
    """
    at_best = "base_chat" if loading.load_tokenizer(config.model_name).chat_template else "base"
    turn = Lock()
    models = {name: Served(config, at_best if name == "base" else name, turn) for name in names}
    for name, run_dir in also.items():
        if not name.isidentifier() or name in (*models, "tuned", "default"):
            raise ValueError(f"an adapter cannot be called {name!r}: take another name, of letters")
        other = dataclasses.replace(config, run_dir=run_dir)
        folder, tuned = check_adapter(other), models.get("tuned") or Served(config, "tuned", turn)
        tuned.model.load_adapter(str(folder), name, autocast_adapter_dtype=False)
        tuned.adapter = "default"  # as peft calls the first
        models |= {"tuned": tuned, name: Served(other, "tuned", turn, tuned.model, name)}
    return models
