"""The recipes on the same data, measured alike.

    python -m benchmarks.recipes --max-steps 500 --output recipes.json
    python -m benchmarks.recipes --run-dir runs/mine -p MODEL_NAME path/or/hub-id

The article's trainer counts the question in its validation loss and the others do not, so here one
function measures all of them on the same answers. Each training has a process of its own: its peak
memory is its own, and a crash of one costs the others nothing.

Needs the dataset of notebook 02 in the run folder. Nine trainings of 500 steps of the embedded
model took 63 minutes in all on one H100. Without --output it writes results/recipes.json.
"""

import argparse
import itertools
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks import notebook_04
from helpers.__main__ import add_settings, parameters_of
from helpers.answers import evaluation, problem_sets
from helpers.config import PROJECT_DIR, RECIPES, Config, ConfigError
from helpers.merging import comparison
from helpers.runs import folders
from helpers.runs.environment import environment

RESULTS = PROJECT_DIR / "benchmarks" / "results" / "recipes.json"


def compare(parameters: dict, seeds: Sequence[int], output: Path = RESULTS) -> list[dict]:
    """Train every recipe with every seed on the dataset of a run; `parameters` as a notebook's.

    Writes `output` after each training, and goes on from what it holds. Raises ConfigError when
    that was measured with other settings or elsewhere, and RuntimeError, at the end, for trainings
    that crashed.
    """
    wanted = list(itertools.product(seeds, RECIPES))  # all recipes of a seed, then the next seed
    for seed, recipe in wanted:
        config = _config(parameters, recipe, seed)
        config.require(config.dataset_dir, "02")
    found, failures = _found(output, parameters), []
    done = {(run["seed"], run["recipe"]) for run in found["runs"]}
    for seed, recipe in wanted:
        if (seed, recipe) in done:
            continue
        print(f"-- {recipe}, seed {seed}", flush=True)
        try:
            found["runs"].append(measured_alone({**parameters, "RECIPE": recipe, "SEED": seed}))
        except RuntimeError as error:
            failures.append(f"{recipe} with seed {seed} {error}")
            print(failures[-1], flush=True)
            continue
        folders.write_text(output, json.dumps(found, indent=1) + "\n")
    if failures:
        raise RuntimeError(
            f"{'; '.join(failures)}: run the same command again, the rest is in {output}"
        )
    return found["runs"]


def _config(parameters: dict, recipe: str | None, seed: int) -> Config:
    """Of one training. No early stop: all take the same steps, and the best checkpoint counts."""
    patience = {"EARLY_STOPPING_PATIENCE": 10**7}
    return Config.from_parameters({**patience, **parameters, "RECIPE": recipe, "SEED": seed})


def _found(output: Path, parameters: dict) -> dict:
    """What the file holds, or a beginning; ConfigError for another comparison than this one."""
    settings = {name: value for name, value in parameters.items() if name != "RUN_DIR"}
    facts = {**environment(), "parameters": json.loads(json.dumps(settings))}
    if not output.exists():
        folders.writable(output.parent)
        return {"what": "Recipes trained on the same data", **facts, "runs": []}
    found = json.loads(output.read_text(encoding="utf-8"))
    for name in facts.keys() - {"date"}:
        if found.get(name) != facts[name]:
            raise ConfigError(
                f"{output} was measured with {name} = {found.get(name)}, and now it is "
                f"{facts[name]}: name another file by --output, or remove that one"
            )
    return found


def measured_alone(parameters: dict) -> dict:
    """`measure` in a process of its own; RuntimeError with its exit code and last word."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "run.json"
        command = [sys.executable, "-m", "benchmarks.recipes"]
        command += ["--one", json.dumps(parameters), str(result)]
        said = {"stderr": subprocess.PIPE, "encoding": "utf-8", "errors": "replace"}
        done = subprocess.run(command, cwd=PROJECT_DIR, **said)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise RuntimeError(f"ended with code {done.returncode} ({last})")
        return json.loads(result.read_text(encoding="utf-8"))


def measure(config: Config) -> dict:
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
    shutil.rmtree(trainer.args.output_dir)
    return numbers


def _rates(model, tokenizer, config: Config) -> dict[str, float]:
    """The scores of notebook 06 for the answers to `config.evaluation_problems` problems."""
    problems = problem_sets.load_ladder(config.evaluation_problems)
    scores = evaluation.ask_ladder(model, tokenizer, config, problems, "llama2")
    return evaluation.rates(scores, "tuned")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_settings(parser)
    parser.add_argument("--max-steps", type=int, help="of each training (default: the profile's)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # parameters as JSON, a file
    options = parser.parse_args(arguments)
    if options.one:
        given, result = json.loads(options.one[0]), Path(options.one[1])
        numbers = measure(_config(given, given.get("RECIPE"), given["SEED"]))
        result.write_text(json.dumps(numbers), encoding="utf-8")
        return
    steps = {} if options.max_steps is None else {"MAX_STEPS": options.max_steps}
    parameters = {**steps, **parameters_of(options)}
    for run in compare(parameters, options.seeds, options.output):
        print(f"{run['recipe']:12} seed {run['seed']}  loss {run['answer_loss_after']:.3f}")
    print(f"written to {options.output}")


if __name__ == "__main__":
    try:
        main()
    except (ConfigError, OSError, RuntimeError, ValueError) as error:
        sys.exit(f"stopped: {error}")
