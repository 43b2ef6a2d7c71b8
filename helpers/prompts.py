r"""Llama 2's prompt template: render it, parse it, verify that a tokenizer reads it as meant.

    <s>[INST] <<SYS>>\n{system}\n<</SYS>>\n\n{user} [/INST] {answer} </s>

`<s>` and `</s>` are never written as text here: the tokenizer adds the first, trl the second. The
space that follows `[/INST]` belongs to the completion, so that the prompt's tokens are a prefix of
the whole text's tokens. Texts lose the blank lines around them and nothing else: in code, the
spaces of the first line have a meaning. Source: `chat_completion` in Meta's llama repository,
generation.py.
"""

import itertools
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from helpers import own_template
from helpers.own_template import Frame, TemplateError, begins_with_bos, template_of

OPEN_SYSTEM, CLOSE_SYSTEM = "<<SYS>>", "<</SYS>>"
OPEN_USER, CLOSE_USER = "[INST]", "[/INST]"
OPENING = f"{OPEN_USER} {OPEN_SYSTEM}"  # of each prompt in this template
MARKERS = (OPEN_SYSTEM, CLOSE_SYSTEM, OPEN_USER, CLOSE_USER)
IGNORED_LABEL = -100  # the label that PyTorch's cross entropy leaves out

SYSTEM = re.compile(r"<<SYS>>\n(?P<system>.*?)\n<</SYS>>\n\n(?P<user>.*)", re.DOTALL)
# A block of code in an answer's Markdown: its fence, its language, its code.
FENCE = re.compile(r"^ {0,3}(`{3,})(\w*)\n(.*?)^ {0,3}\1[ \t]*$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Conversation:
    """A system message and turns of (user, answer), the last None when it is asked for."""

    system: str
    turns: tuple[tuple[str, str | None], ...]


def render_prompt(user: str, system: str, own=None) -> str:
    """The text that a model is given: everything up to and including `[/INST]`, without BOS.

    With a tokenizer as `own`, in the chat template that it brings instead (TEMPLATE = "model").
    """
    if own is not None:
        user, system = without_blank_lines(user), without_blank_lines(system)
        return own_template.chat_text(own, own_template.messages_of(system, [(user, None)]))
    user, system = _clean("user text", user), _clean("system message", system)
    return f"{OPEN_USER} {OPEN_SYSTEM}\n{system}\n{CLOSE_SYSTEM}\n\n{user} {CLOSE_USER}"


def render_completion(answer: str) -> str:
    """The text that a model is to produce: a space, the answer, a space, without EOS."""
    return f" {_clean('answer', answer)} "


def read_completion(text: str) -> str:
    """The answer in what a model produced: `render_completion` undone."""
    return without_blank_lines(text.removeprefix(" ").removesuffix(" "))


def without_blank_lines(text: str) -> str:
    """The text without the line feeds around it; the first line keeps its indentation."""
    return text.strip("\n")


def render(conversation: Conversation, bos: str = "", eos: str = "") -> str:
    """A whole conversation of one or more turns.

    Each answered turn ends in `eos`, the next begins with `bos`. Raises TemplateError for a text
    that holds one of them.
    """
    texts = [text for turn in conversation.turns for text in turn if text is not None]
    for special in filter(None, (bos, eos)):
        if any(special in text for text in [conversation.system, *texts]):
            raise TemplateError(f"a text holds {special} itself: remove or reword it")
    parts = []
    for number, (user, answer) in enumerate(conversation.turns):
        first = number == 0
        prompt = render_prompt(user, conversation.system) if first else _render_turn(user)
        parts.append(bos + prompt + (render_completion(answer) + eos if answer is not None else ""))
    return "".join(parts)


def render_row(conversation: Conversation, tokenizer, own: bool = False) -> tuple[str, str]:
    """(prompt, completion) of a training row: all up to the first answer, and all from there on.

    The completion holds the later turns too, each with its BOS and EOS as text; it ends without
    EOS, which trl adds. In the tokenizer's own chat template with `own`. Raises TemplateError.
    """
    if own:
        return own_template.chat_row(
            tokenizer, without_blank_lines(conversation.system), conversation.turns
        )
    user, answer = conversation.turns[0]
    prompt = render_prompt(user, conversation.system)
    if len(conversation.turns) == 1:
        return prompt, render_completion(str(answer))
    bos, eos = _ends(tokenizer)
    return prompt, render(conversation, bos, eos)[len(bos + prompt) :].removesuffix(eos)


def _ends(tokenizer) -> tuple[str, str]:
    """BOS ("" where the tokenizer writes none) and EOS as text."""
    return tokenizer.bos_token if begins_with_bos(tokenizer) else "", tokenizer.eos_token


def chat_template(system: str) -> str:
    """`render` in Jinja, as `apply_chat_template` and llama.cpp read it, for messages with roles.

    `system` is the system message of a conversation that brings none.
    """
    content = r"{{ message['content'].strip('\n') }}"  # as `without_blank_lines` does
    first, later = render_prompt(content, r"{{ system.strip('\n') }}"), _render_turn(content)
    answer = render_completion(content)
    # A text between quotes is written in Jinja as in JSON, but for \u: there, half a character.
    spelled = json.dumps(system, ensure_ascii=False)
    return (
        "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
        "{% set turns = messages[1:] %}{% else %}"
        f"{{% set system = {spelled} %}}{{% set turns = messages %}}{{% endif %}}"
        "{% for message in turns %}{% if message['role'] == 'user' %}{{ bos_token }}"
        f"{{% if loop.first %}}{first}{{% else %}}{later}{{% endif %}}"
        f"{{% else %}}{answer}{{{{ eos_token }}}}{{% endif %}}{{% endfor %}}"
    )


def parse(text: str, bos: str = "", eos: str = "") -> Conversation:
    """The conversation that `render` wrote; TemplateError with the first place that differs."""
    bare = text
    for special in filter(None, (bos, eos)):
        bare = bare.replace(special, "")
    turns = []
    for turn in bare.split(f"{OPEN_USER} ")[1:]:
        user, _, answer = turn.partition(f" {CLOSE_USER}")
        turns.append((user, answer[1:-1] if answer else None))
    opened = SYSTEM.fullmatch(turns[0][0]) if turns else None
    if opened is None:
        raise TemplateError(f"no {OPEN_USER} {OPEN_SYSTEM} ... {CLOSE_SYSTEM} in {text[:30]!r}")
    turns[0] = (opened["user"], turns[0][1])
    conversation = Conversation(opened["system"], tuple(turns))
    if render(conversation, bos, eos) != text:
        raise TemplateError(f"text before, between or after the turns in {text[:30]!r}")
    return conversation


def frame_for(tokenizer, prompt: str) -> Frame:
    """What stands around the texts of a row: Llama 2's template, or the model's own."""
    first = prompt.removeprefix(tokenizer.bos_token or "")
    if not first or first.startswith(OPEN_USER) or not template_of(tokenizer):
        return Frame(CLOSE_USER, " ", tokenizer.eos_token, frozenset())
    return own_template.frame_of(tokenizer)


def first_answer(tokenizer, prompt: str, completion: str) -> str:
    """The first answer of a training row, without what ends it."""
    start, end = learned_parts(tokenizer, prompt, completion)[0]
    text = (prompt + completion + tokenizer.eos_token)[start:end].removesuffix(tokenizer.eos_token)
    return read_completion(text.removesuffix(frame_for(tokenizer, prompt).ending))


def question_in(prompt: str) -> str:
    """What a rendered prompt asks; in a model's own template, the whole prompt."""
    return parse(prompt).turns[0][0] if prompt.startswith(OPENING) else prompt


def learned_parts(tokenizer, prompt: str, completion: str) -> list[tuple[int, int]]:
    """Where the answers stand in prompt + completion + EOS: (start, end) in characters.

    Each with the token that ends it. Between them stand the later requests of a conversation.
    """
    frame, eos = frame_for(tokenizer, prompt), tokenizer.eos_token
    text, start = prompt + completion + eos, len(prompt)
    parts: list[tuple[int, int]] = []
    while True:
        end = text.find(frame.ending or eos, start)
        request = text.find(frame.closing, end) if end >= 0 else -1
        if request < 0:
            return [*parts, (start, len(text))]
        parts.append((start, end + len(frame.ending or eos)))
        start = request + len(frame.closing)


def encode(tokenizer, prompt: str, completion: str) -> dict[str, list[int]]:
    """`input_ids` of a training row, and `labels` of the same length.

    A label is IGNORED_LABEL on all that is read: for one turn the prompt, as trl does it, for more
    the later requests too.
    """
    text = prompt + completion + tokenizer.eos_token
    input_ids = tokenizer(text)["input_ids"]
    labels = [IGNORED_LABEL] * len(input_ids)
    for ends in learned_parts(tokenizer, prompt, completion):
        start, end = (len(tokenizer(text[:end])["input_ids"]) for end in ends)
        labels[start:end] = input_ids[start:end]
    return {"input_ids": input_ids, "labels": labels}


def encode_prompt(tokenizer, prompt: str) -> list[int]:
    """Token ids of a rendered prompt, BOS first if the tokenizer writes one.

    The training template is plain text, so what spells a control token in it was typed, and stays
    text. Any other prompt is in a chat template, whose control tokens are its own.
    """
    typed = prompt.startswith(OPENING)
    return tokenizer(prompt, split_special_tokens=typed)["input_ids"]


def verify_rows(
    tokenizer, rows: Iterable[tuple[str, str]], batch_size: int = 512
) -> Iterator[tuple[int, list[str]]]:
    """For each (prompt, completion), in order, its length in tokens and what is wrong with it.

    The length includes BOS and EOS. What is wrong is said in one sentence each, with none where the
    row is well formed: the tags, exactly one BOS (none where the tokenizer writes none) and one EOS
    and no other special token, the prompt's tokens before all others, and the loss on the answer
    and the EOS that ends it. The tokenizer, a fast one, is given `batch_size` rows at a time.
    """
    rows = iter(rows)
    while batch := list(itertools.islice(rows, batch_size)):
        wholes = tokenizer([p + c + tokenizer.eos_token for p, c in batch]).encodings
        for row, whole in zip(batch, wholes, strict=True):
            yield len(whole), _problems(tokenizer, *row, whole)


def _problems(tokenizer, prompt: str, completion: str, whole) -> list[str]:
    """What is wrong with a row, of which `whole` is the `tokenizers.Encoding`."""
    frame, parts = frame_for(tokenizer, prompt), learned_parts(tokenizer, prompt, completion)
    text, problems = prompt + completion, []
    if not prompt.endswith(frame.closing):
        tail = f"{prompt[-10:]!r} and not in {frame.closing}"
        problems.append(f"template: the prompt ends in {tail}")
    if frame.closing == CLOSE_USER:
        problems += _llama2_problems(tokenizer, text, whole.ids, len(parts))
    for start, end in parts:
        answer = text[start:end].removesuffix(tokenizer.eos_token).removesuffix(frame.ending)
        held = sorted(mark for mark in frame.special if mark in answer)
        problems += [f"the special token {mark} stands in the text" for mark in held]
    return problems + _seam_problems(tokenizer, text, parts, whole)


def _llama2_problems(tokenizer, text: str, ids: list[int], turns: int) -> list[str]:
    """What is wrong with a row in Llama 2's template: its tags, a BOS and an EOS for each turn."""
    problems, (bos, eos) = [], _ends(tokenizer)
    try:
        parse(bos + text + eos, bos, eos)
    except TemplateError as error:
        problems.append(f"template: {error}")
    wanted = "exactly one" if turns == 1 else f"one for each of {turns} turns"
    bos_id, eos_id = tokenizer.bos_token_id if bos else None, tokenizer.eos_token_id
    for name, token, place in (("BOS", bos_id, 0), ("EOS", eos_id, -1)):
        if token is not None and (ids.count(token) != turns or ids[place] != token):
            problems.append(f"{ids.count(token)} {name} tokens, there must be {wanted}")
    added = tokenizer.added_tokens_decoder
    others = [added[token] for token in sorted({*ids} & {*added})]
    held = [other.content for other in others if other.special and other.content not in (bos, eos)]
    return problems + [f"the special token {mark} stands in the text" for mark in held]


def _seam_problems(tokenizer, text: str, parts, whole) -> list[str]:
    """What is wrong where an answer begins, and where it ends.

    What stands before need not be tokenized by itself: where one token ends at the seam and the
    next begins there, nothing was merged across it, and each side has the tokens that it has alone.
    Some tokenizers do not say where a space lies; then it is tokenized.
    """
    merged, unlearned = False, whole.ids[-1] != tokenizer.eos_token_id
    for start, end in parts:
        last, first = whole.char_to_token(start - 1), whole.char_to_token(start)
        if last is None or first is None:
            alone = tokenizer([text[:start]]).encodings[0].ids
            merged, first = merged or whole.ids[: len(alone)] != alone, len(alone)
        merged = merged or last == first
        # The labels are the tokens of the answer: without its end no model would learn to stop.
        unlearned = unlearned or whole.char_to_token(end - 1) <= first
    seam = "the prompt's tokens are not a prefix of the whole: a token merges across the seam"
    labels = "the answer and the final EOS are not both among the labels"
    return [seam] * merged + [labels] * unlearned


def _render_turn(user: str) -> str:
    return f"{OPEN_USER} {_clean('user text', user)} {CLOSE_USER}"


def _clean(what: str, text: str) -> str:
    """The text to put in; TemplateError when it holds one of the template's own markers."""
    for marker in MARKERS:
        if marker in text:
            raise TemplateError(
                f"{what} holds the template's own marker {marker}: remove or reword it"
            )
    return without_blank_lines(text)


def template_text(tokenizer, own: bool = False) -> str:
    """The template as a dataset's note holds it: Llama 2's, or with `own` the model's."""
    return template_of(tokenizer) if own else TEMPLATE


TEMPLATES = ("llama2", "model")  # what TEMPLATE can be
# What stands in a dataset's note, by which rows in another template are known.
TEMPLATE = render_prompt("{user}", "{system}") + render_completion("{answer}")
