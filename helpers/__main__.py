"""The command line: `python -m helpers run`, `ask`, `verify`, `record` and more.

Each command is one call of a helper, whose module is imported when its command is chosen, so that
`--help` answers at once.
"""

import argparse
import ast
import importlib
import signal
import sys
from pathlib import Path

from helpers.config import LINKED_LIST_PROMPT, PROFILES, Config, ConfigError
from helpers.view.safe_text import visible

PAIRS = {"nargs": 2, "action": "append", "default": [], "metavar": ("NAME", "VALUE")}


def main(arguments: list[str] | None = None) -> int:
    """Run one command; 0 on success, else with a sentence on stderr: 1, or 128 + a signal."""
    options = _parser().parse_args(arguments)
    sys.stdout.reconfigure(errors="backslashreplace")  # not each terminal has each character
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        _execute(options)
    except (ConfigError, OSError, RuntimeError, ValueError) as error:
        print(f"stopped: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 1)
    except KeyboardInterrupt as stop:
        number = stop.args[0] if stop.args else signal.SIGINT
        print(f"stopped by {signal.Signals(number).name}", file=sys.stderr)
        return 128 + number
    return 0


def _interrupt(number, frame) -> None:
    """Let SIGTERM end a command as Ctrl-C does: kernels and drafts are put away."""
    raise KeyboardInterrupt(number)


# Commands that hand their settings to one function: its module, its name, what it does.
CALLS = {
    "record": ("runs.recording", "record", "put a run's outputs into the committed notebooks"),
    "first-look": ("runs.recording", "write_first_look", "write what lesson 01 opens with"),
    "export-gguf": ("merging.export", "export_gguf", "write the model for llama.cpp, Ollama"),
    "push-dataset": ("merging.publishing", "push_dataset", "upload the dataset to the Hub"),
    "push-model": ("merging.publishing", "push_model", "upload the merged model to the Hub"),
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m helpers", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")

    def add(name: str, help_text: str, settings=True):
        """Add a command. What is returned gives it an argument, as add_argument does."""
        command = commands.add_parser(name, help=help_text)
        if settings:
            add_settings(command)
        return command.add_argument

    run = add("run", "execute the notebooks that are not finished yet")
    run("--only", metavar="NN", help="run this notebook alone, finished or not")
    run("--from", dest="first", metavar="NN", help="run from this notebook on")
    run("--timeout", type=float, metavar="SECONDS", help="the longest a cell may run")
    verify = add("verify", "compare a run folder with its manifest", settings=False)
    verify("run_dir", metavar="RUN_DIR")
    ask = add("ask", "print an answer of the base or the tuned model")
    ask("model", help="base_chat, base, tuned or merged")
    ask("question", nargs="?", default=LINKED_LIST_PROMPT)
    serve = add("serve", "answer programs and a page, as OpenAI's server")
    serve("models", nargs="*", help="tuned (default), merged, base, or ask's names")
    also = PAIRS | {"metavar": ("NAME", "RUN_DIR")}
    serve("--also", **also, help="another run's adapter, over the same base")
    serve("--port", type=int, default=8000)
    serve("--page", action="store_true", help="open the page that asks all of them")
    check_data = add("check-data", "what becomes of a file of your own")
    check_data("source", help="a file, a folder, or a dataset of the Hub")
    check_model = add("check-model", "does a model go through all six lessons?")
    check_model("name", help="a model on the Hub, or a folder; its weights are not read")
    add("export-training", "notebook 04 for several GPUs")
    add("fetch-model", "fetch the embedded model, once", settings=False)
    for name, (_, _, help_text) in CALLS.items():
        add(name, help_text)
    return parser


def add_settings(command: argparse.ArgumentParser) -> None:
    """Let a command line be given settings: `parameters_of` has them then."""
    command.add_argument("--profile", default="demo", help=", ".join(PROFILES))
    command.add_argument("--run-dir", help="where artefacts lie (default: runs/<profile>)")
    command.add_argument("-p", **PAIRS, help="a notebook's parameter, such as MAX_STEPS 10")


def parameters_of(options) -> dict:
    """What a command was given, by the names that a notebook's parameters have."""
    place = {"RUN_DIR": options.run_dir} if options.run_dir else {}
    return {"PROFILE": options.profile, **place, **{name: _value(text) for name, text in options.p}}


def _value(text: str):
    """A -p value as Python reads it (8, 1e-3, True, None); any other text stays text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _config(options, **more) -> Config:
    return Config.from_parameters({**parameters_of(options), **more})


def _load(module: str):
    return importlib.import_module(f"helpers.{module}")


def _execute(options) -> None:
    match options.command:
        case "run":
            chosen = (options.profile, None, options.only, options.first)
            config = _load("runs.runner").run(*chosen, parameters_of(options), options.timeout)
            for lesson, label, value in _load("runs.report").headline_rows(config):
                print(f"{lesson}  {label:<44} {value:>10}")
            print(f"report: {config.run_dir / 'report.html'}")
        case "verify":
            count = _load("runs.provenance").verify(Path(options.run_dir))
            print(f"{count} files as the manifest records them")
        case "ask":
            asked = _config(options), options.model, [options.question]
            (answer,), _ = _load("answers.inference").answer_alone(*asked)
            print(visible(answer.text))
        case "check-data":
            config = _config(options, DATA_SOURCE=options.source)
            tokenizer = _load("model.loading").load_tokenizer(config.model_name)
            print(visible(_load("data.own_rows").describe(config, tokenizer)))
        case "export-training":
            path = _load("training.export").export_training(parameters_of(options))
            print(f"accelerate launch --config_file accelerate/ddp.yaml {path}")
        case "fetch-model":
            _load("model.embedded").fetch_embedded_model()
        case "check-model":
            _check_model(options)
        case "serve":
            _serve(options)
        case name:
            module, function, _ = CALLS[name]
            getattr(_load(module), function)(_config(options))


def _check_model(options) -> None:
    check_model = _load("model.check_model")
    text = check_model.report(_config(options, MODEL_NAME=options.name))
    print(visible(text))
    if f" {check_model.STOP} " in text:
        raise RuntimeError(f"{options.name} does not go through, see {check_model.STOP} above")
    print(f"{options.name} goes through all six lessons")


def _serve(options) -> None:
    try:
        run = _load("serving.server").run
    except ModuleNotFoundError as missing:
        raise RuntimeError(f"{missing.name} is not installed: `make serve` installs it") from None
    models = options.models or ["tuned"]
    run(_config(options), models, dict(options.also), options.port, options.page)


if __name__ == "__main__":
    sys.exit(main())
