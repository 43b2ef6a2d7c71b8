"""The model's own chat template: conversations in it, and where in a text each answer stands.

A template is a program (Jinja) and says nothing of its parts. Two short conversations that are
known word by word show them: what follows a request, and what ends an answer. trl marks the answers
in templates of some twenty model families; this works for one that trl does not know, too.
"""

import contextlib
from dataclasses import dataclass

SYSTEM, USER, ANSWER = "S1st", "U2nd", "A3rd"  # no template writes these itself

Messages = list[dict[str, str]]  # each with `role` (system, user, assistant) and `content`


class TemplateError(ValueError):
    """A text cannot be put into the template, or is not in it. The message says where."""


@dataclass(frozen=True)
class Frame:
    """What a template writes around requests and answers."""

    closing: str  # behind a request; an answer follows
    before: str | None  # an answer, such as a space; None: more turns change those before
    ending: str  # behind an answer, up to the token that ends it
    special: frozenset[str]  # the tokenizer's control tokens, which no text may spell


def chat_text(tokenizer, messages: Messages) -> str:
    """The messages in the tokenizer's own chat template, up to where an answer begins.

    BOS is left out where the tokenizer writes it again. A template that has no place for a system
    message (Gemma 2's) gets it at the head of the first request.
    """
    # Here: who needs no chat template need not wait for these.
    from jinja2 import TemplateError as Refused
    from transformers.utils.chat_template_utils import render_jinja_template as render

    forms, system = [messages], messages[0]["content"]
    if messages[0]["role"] == "system":
        joined = f"{system}\n\n{messages[1]['content']}"
        forms.append([{"role": "user", "content": joined}, *messages[2:]])
    options = {"chat_template": template_of(tokenizer), **tokenizer.special_tokens_map}
    for form in forms:
        with contextlib.suppress(Refused):
            (text,), _ = render([form], add_generation_prompt=True, **options)
            if system.strip() in text:
                bos = tokenizer.bos_token if begins_with_bos(tokenizer) else ""
                return text.removeprefix(bos)
    raise TemplateError("the model's own chat template refuses the conversation")


def begins_with_bos(tokenizer) -> bool:
    """Whether a tokenizer writes BOS in front of a text; Qwen 2's, for one, does not."""
    return tokenizer(["x"]).encodings[0].ids[0] == tokenizer.bos_token_id


def template_of(tokenizer) -> str:
    """The Jinja of a tokenizer, "" where it has none; some have several under names."""
    template = getattr(tokenizer, "chat_template", None) or ""
    return template if isinstance(template, str) else template["default"]


def frame_of(tokenizer) -> Frame:
    """The Frame of a tokenizer's own chat template, which it must have."""
    added = tokenizer.added_tokens_decoder.values()
    special = frozenset(token.content for token in added if token.special)
    asked = chat_text(tokenizer, messages_of(SYSTEM, [(USER, None)]))
    again = chat_text(tokenizer, messages_of(SYSTEM, [(USER, ANSWER), (USER, None)]))
    head, _, tail = again.partition(ANSWER)
    ends = [tail.index(text) + len(text) for text in special if text in tail]
    before = head.removeprefix(asked) if head.startswith(asked) else None
    return Frame(asked.partition(USER)[2], before, tail[: min(ends, default=0)], special)


def messages_of(system: str, turns) -> Messages:
    """Messages of a system message ("" for none) and turns of (user, answer or None)."""
    messages = [{"role": "system", "content": system}] if system else []
    for user, answer in turns:
        messages.append({"role": "user", "content": user})
        messages += [{"role": "assistant", "content": answer}] if answer is not None else []
    return messages


def chat_row(tokenizer, system: str, turns) -> tuple[str, str]:
    """(prompt, completion) of answered turns, as `prompts.render_row` gives them.

    Each answer follows what the model is given when it is asked for it. Raises TemplateError for a
    text that the template cannot hold, ValueError where the template cannot hold any.
    """
    if not template_of(tokenizer):
        raise ValueError('the model has no chat template: set TEMPLATE to "llama2"')
    frame = frame_of(tokenizer)
    if len(turns) > 1 and (frame.before is None or not frame.ending):
        raise ValueError(
            "the model's own chat template writes a turn otherwise when more follow, and a row has "
            f'{len(turns)} turns: set TEMPLATE to "llama2"'
        )
    before = frame.before or ""
    texts = [system, *(text for turn in turns for text in turn)]
    for mark in sorted({*frame.special, frame.closing.strip()} - {""}):
        if any(mark in text for text in texts):
            raise TemplateError(f"a text holds {mark!r}, which the model's template uses itself")
    asked = [
        chat_text(tokenizer, messages_of(system, [*turns[:place], (turns[place][0], None)]))
        for place in range(len(turns))
    ]
    text = asked[0]
    for (_, answer), shown, following in zip(turns, asked, asked[1:], strict=False):
        head, _, rest = following.removeprefix(shown).partition(answer.strip())
        if head.strip():
            raise TemplateError(f"the model's template changes the answer {answer[:60]!r}")
        text += before + answer + rest
    text += before + turns[-1][1] + frame.ending.removesuffix(tokenizer.eos_token)
    return asked[0], text[len(asked[0]) :]
