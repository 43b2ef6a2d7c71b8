"""The ladder as a judge: what four bits cost the base, and which settings move what is trained.

    python -m benchmarks.ladder base       forms of the base, to results/layers_in_16bit.json
    python -m benchmarks.ladder train      trainings, three seeds each, to results/ladder.json

Needs the dataset of notebook 02 in runs/demo and a GPU: on an H200, 14 forms take 10 minutes one
after the other, 30 trainings 35. Every number is computed in float32, as profile `demo` does on
most CPUs. Without --output the files of the project are written anew.
"""

import argparse
import json
from pathlib import Path

from benchmarks.recipes import measured_alone
from helpers.answers import evaluation, problem_sets
from helpers.config import PROJECT_DIR, Config
from helpers.merging import comparison
from helpers.model import loading, measure
from helpers.profiles import ALL_LINEAR_TARGETS
from helpers.runs import folders
from helpers.runs.environment import environment
from helpers.training import training_rows

RESULTS = PROJECT_DIR / "benchmarks" / "results"
ON_GPU = {"PROFILE": "demo", "DEVICE_MAP": {"": 0}, "BNB_4BIT_COMPUTE_DTYPE": "float32"}
ASKED = {"EVALUATION_PROBLEMS": [78, 0, 72, 0], "GENERATION_BATCH_SIZE": 256}
THREE = ("v_proj", "o_proj", "down_proj")
# What is kept in 16 bits, and the template that asks; None keeps all.
FORMS = [((kind,), "chat") for kind in ALL_LINEAR_TARGETS]
FORMS += [(kept, "chat") for kept in ((), ("v_proj", "down_proj"), THREE, None)]
FORMS += [(kept, "llama2") for kept in ((), THREE, None)]
ALL_ROWS = {"MAX_TRAIN_LENGTH": None, "KEEP_IN_16BIT": THREE}
TRAININGS = [
    {},
    ALL_ROWS,
    {**ALL_ROWS, "KEEP_IN_16BIT": ()},
    {**ALL_ROWS, "KEEP_IN_16BIT": ("down_proj",)},
    {**ALL_ROWS, "KEEP_IN_16BIT": ("v_proj", "down_proj")},
    {**ALL_ROWS, "USE_4BIT": False},
    {**ALL_ROWS, "MAX_TRAIN_LENGTH": 200},
    {**ALL_ROWS, "LEARNING_RATE": 2e-3},
    {**ALL_ROWS, "MAX_STEPS": 40},
    {**ALL_ROWS, "MAX_STEPS": -1},
]


def ask_form(kept: tuple[str, ...] | None, template: str) -> dict:
    """The scores, the loss and the bytes of the base with some kinds of layers in 16 bits."""
    parameters = {**ON_GPU, **ASKED, "KEEP_IN_16BIT": kept or (), "USE_4BIT": kept is not None}
    config = Config.from_parameters(parameters)
    tokenizer = loading.load_tokenizer(config.model_name)
    rows = training_rows.load_dataset(config)["validation"]
    model = loading.load_model(config)
    problems = problem_sets.load_ladder(config.evaluation_problems)
    scores = evaluation.ask_ladder(model, tokenizer, config, problems, template)
    counts = {f"passes_{part}": 0 for part in ("level1", "level2")}
    for found in scores:
        counts[f"passes_{found.part}"] += bool(found.passes)
    shares = {name: sum(getattr(s, name) for s in scores) for name in ("stops", "parses")}
    return {
        "kept": "all" if kept is None else "+".join(kept),
        "template": template,
        "problems": config.evaluation_problems[0],
        "passes": counts["passes_level1"],
        "problems_level2": config.evaluation_problems[2],
        "passes_level2": counts["passes_level2"],
        **{name: round(found / len(scores), 3) for name, found in shares.items()},
        "loss": round(comparison.known_answers(model, tokenizer, rows)[1], 4),
        "bytes": sum(map(stored_bytes, model.parameters())),
    }


def stored_bytes(parameter) -> int:
    """What a weight takes: packed with its scales, else two bytes for each number."""
    if not hasattr(parameter, "quant_state"):
        return 2 * parameter.numel()
    state = parameter.quant_state
    return (
        parameter.nbytes + state.absmax.nbytes + (state.state2.absmax.nbytes if state.nested else 0)
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("base", "train"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.what == "base":
        rows = []
        for kept, template in FORMS:
            rows.append(ask_form(kept, template))
            print(rows[-1], flush=True)
            measure.free_memory()
        found, path = {"rows": rows}, options.output or RESULTS / "layers_in_16bit.json"
    else:
        runs = []
        for settings in TRAININGS:
            for seed in options.seeds:
                alone = measured_alone({**ON_GPU, **ASKED, **settings, "SEED": seed})
                runs.append({"settings": settings, **alone})
                print(runs[-1], flush=True)
        found, path = {"runs": runs}, options.output or RESULTS / "ladder.json"
    folders.write_text(path, json.dumps({**environment(), **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
