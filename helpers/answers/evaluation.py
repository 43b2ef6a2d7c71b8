"""What an answer is worth: does it stop, hold code that parses, go in steps, pass its tests?

Each score is a yes or no for each problem. Intervals and paired tests stand in notebook 06.
"""

import dataclasses
import os
import re
import statistics
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pandas as pd
import torch
from scipy.stats import binomtest

from helpers.answers import inference, sandbox
from helpers.answers.inference import Answer
from helpers.answers.problem_sets import OWN, Problem, held_out
from helpers.config import PROJECT_DIR, Config
from helpers.data.code_kinds import parse_python
from helpers.data.markdown import fenced_blocks
from helpers.merging.comparison import known_answers
from helpers.model import loading, measure
from helpers.prompts import FENCE

NUMBERED_STEP = re.compile(r"^\s*\d+[.)]\s+(\S.*)$", re.MULTILINE)
SEQUENCE_WORD = re.compile(  # at the beginning of a sentence
    r"(?:^|[.!?:])\s*(first|second|third|then|next|after that|finally|lastly)\b", re.MULTILINE
)
GENERAL_FILE = PROJECT_DIR / "data" / "general.txt"  # written for this course; no code in it
PUNCTUATION = ".,;:!?\"'()[]\u2018\u2019\u201c\u201d\u3002\uff0c\u3001"
# The fields of Score under the names that metrics files give them: stop_rate_<which> and so on.
RATES = {"stop": "stops", "parse": "parses", "steps": "steps", "pass": "passes"}


@dataclass(frozen=True)
class Score:
    """Yes or no for one answer. `passes` is None where generated code is not run, or not asked for.

    An answer that does not stop was cut at the limit of tokens: it might have ended later.
    """

    stops: bool
    parses: bool
    steps: bool
    passes: bool | None
    part: str = ""  # to which the problem belongs


def score(answer: Answer, problem: Problem | None, level: str) -> Score:
    """Score one answer. Its code runs only in the sandbox, at one of its levels."""
    code, passes = code_of(answer.text), None
    readable = parses(code)
    if problem and problem.answer:
        passes = same_text(answer.text, problem.answer)
    elif problem and problem.tests and level != "off":
        solution = f"{problem.preamble}\n{code}"
        passes = readable and sandbox.run_tests(solution, problem.tests, level).passed
    steps, part = explains_in_steps(answer.text), problem.part if problem else ""
    return Score(answer.stopped, readable, steps, passes, part)


def score_all(answers: list[Answer], problems: list[Problem], level: str) -> list[Score]:
    """`score` of each answer, on every core. Raises SandboxUnavailable before any work."""
    if level != "off":
        sandbox.method(level)
    # Where the kernel counts the processes of all sandboxes together, more would reach the limit.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(lambda pair: score(*pair, level), zip(answers, problems, strict=True)))


def same_text(one: str, other: str) -> bool:
    """Whether two texts have the same letters, digits and signs, whatever case and spaces.

    Punctuation at the ends of words does not count, as in SQuAD (Rajpurkar et al., 1606.05250);
    within them it does: 1.5 is not 15. A text of nothing else is compared as it is.
    """

    def words_of(text: str) -> list[str]:
        words = unicodedata.normalize("NFKC", text).casefold().split()
        return [bare for word in words if (bare := word.strip(PUNCTUATION))] or words

    return words_of(one) == words_of(other)


def code_of(text: str) -> str | None:
    """The code of an answer's fenced blocks, joined; None when there is no closed block."""
    blocks = [code for _, code in fenced_blocks(text)]
    return "\n".join(blocks) if blocks else None


def parses(code: str | None) -> bool:
    """Whether there is code and Python can read it."""
    return bool(code and code.strip()) and parse_python(code) is not None


def explains_in_steps(text: str) -> bool:
    """Whether the prose has two different numbered lines, or sentences that begin with two
    different words such as "first" and "then". A coarse check: it accepts numbered nonsense.
    """
    prose = FENCE.sub("", text).lower()
    numbered = {" ".join(line.split()) for line in NUMBERED_STEP.findall(prose)}
    return len(numbered) >= 2 or len(set(SEQUENCE_WORD.findall(prose))) >= 2


def rates(scores: list[Score], which: str) -> dict[str, float]:
    """Shares from 0 to 1, named as in the metrics file: stop_rate_<which> and so on, and for each
    part pass_rate_<part>_<which>, or own_match_rate_<which>. What was not judged is left out.
    """
    table = pd.DataFrame(scores)
    judged = table[[*RATES.values()]].astype(float)
    found = {f"{name}_rate_{which}": judged[field].mean() for name, field in RATES.items()}
    found[f"pass_rate_{which}"] = judged.passes[table.part != OWN].mean()
    for part, share in judged.passes.groupby(table.part, sort=False).mean().items():
        name = "own_match_rate" if part == OWN else f"pass_rate_{part}"
        found[f"{name}_{which}"] = share
    return {name: float(value) for name, value in found.items() if pd.notna(value)}


def metrics(answers: dict, scores: dict, seconds: dict, tests: list[dict], losses: dict) -> dict:
    """What notebook 06 records: of each model by its name, of paired tests, and of `losses`."""
    asked = Counter(score.part for score in scores["tuned"])
    found: dict = {"problems": asked.total()}
    found |= {f"problems_{part}": count for part, count in asked.items() if part != OWN}
    for which, judged in scores.items():
        if len(judged) < asked.total():
            found[f"problems_{which}"] = len(judged)
        found |= rates(judged, which)
        tokens = sum(answer.tokens for answer in answers[which])
        found[f"{which}_tokens_per_second"] = tokens / seconds[which]
    against = {test["from"]: test["p"] for test in tests if test["to"] == "tuned"}
    if any(score.passes is not None for score in scores["tuned"]):
        found |= {f"pass_p_value_{which}": value for which, value in against.items()}
    if OWN in asked:
        base, tuned = losses["held-out rows"].values()
        wins = [after < before for before, after in zip(base, tuned, strict=True)]
        by_loss = binomtest(sum(wins), len(wins)).pvalue  # by chance, the sign test
        found |= {
            "own_rows": asked[OWN],
            "own_loss_base": statistics.mean(base),
            "own_loss_tuned": statistics.mean(tuned),
            "own_win_rate": statistics.mean(wins),
            "own_p_value": against["base"] if "own_match_rate_tuned" in found else by_loss,
        }
    before, after = map(statistics.mean, losses["general text"].values())
    return found | {"forgetting_loss_before": before, "forgetting_loss_after": after}


def usable_sandbox(config: Config) -> Config:
    """The Config, with SANDBOX "off" where this machine cannot isolate as wanted; says which."""
    try:
        sandbox.method(config.sandbox)
        print("generated code runs at level:", config.sandbox)
    except sandbox.SandboxUnavailable as error:
        print(f"generated code is not run here, and no answer is tested. {error}")
        return dataclasses.replace(config, sandbox="off")
    return config


def ask_ladder(
    model, tokenizer, config: Config, problems, template: str = "chat", temperature: float = 0.0
) -> list[Score]:
    """A loaded model's answers to problems, scored. Raises as `inference.requests` does.

    template: "chat" or "llama2". For pass@k give each problem k times, and a temperature.
    """
    system = inference.system_message(config, "base")
    asked = inference.requests(tokenizer, [p.prompt for p in problems], system, template)
    answers, _ = inference.answer_all(model, tokenizer, asked, config, temperature)
    return score_all(answers, problems, config.sandbox)


def ask(config: Config, which: str, problems: list[Problem]):
    """(answers, scores, seconds) of one of `inference.MODELS`, loaded for that."""
    texts, rows = [p.prompt for p in problems], [p.row for p in problems]
    answers, seconds = inference.answer_alone(config, which, texts, rows)
    return answers, score_all(answers, problems, config.sandbox), seconds


def answerer(config: Config, which: str) -> Callable[[str], Iterator]:
    """Asks one of MODELS, for `widgets.side_by_side`: gives the answer and then its Score."""

    def answer(question: str):
        (given,), _ = inference.answer_alone(config, which, [question])
        yield from (given.text, score(given, None, "off"))

    return answer


def losses(config: Config) -> dict[str, dict[str, list[float]]]:
    """Losses, in nats per token, of the base (the tuned model with its adapter off) and the tuned
    model, by that name: on up to EVALUATION_PROBLEMS[0] held-out rows, and on GENERAL_FILE.
    """
    tokenizer, model = loading.load_tokenizer(config.model_name), inference.load(config, "tuned")
    rows = held_out(config)[: config.evaluation_problems[0]]
    with model.disable_adapter():
        base = _losses(model, tokenizer, rows)
    tuned = _losses(model, tokenizer, rows)
    del model
    measure.free_memory()
    return {name: {"base": base[name], "tuned": tuned[name]} for name in base}


@torch.no_grad()
def _losses(model, tokenizer, rows: list[dict]) -> dict[str, list[float]]:
    found = {"held-out rows": [known_answers(model, tokenizer, [row])[1] for row in rows]}
    found["general text"] = []
    for paragraph in GENERAL_FILE.read_text("utf-8").strip().split("\n\n"):
        ids = torch.tensor([tokenizer(" ".join(paragraph.split())).input_ids], device=model.device)
        found["general text"].append(model(input_ids=ids, labels=ids).loss.item())
    return found
