"""The command line: `python -m helpers run`, `ask`, `verify`, `record` and more.

Each command is one call of a helper.
"""

import argparse
import ast
import importlib
import signal
import sys
from pathlib import Path

from helpers.config import LINKED_LIST_PROMPT, PROFILES, Config, ConfigError
from helpers.view.safe_text import visible


def main(arguments: list[str] | None = None) -> int:
    """Run one command; 0 on success, else with a sentence on stderr: 1, or 128 + a signal."""
    options = _parser().parse_args(arguments)
    sys.stdout.reconfigure(errors="backslashreplace")  # not each terminal has each character
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        options.command(options)
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m helpers", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = _command(commands, "run", _run, "execute the notebooks that are not finished yet")
    run.add_argument("--only", metavar="NN", help="run this notebook alone, finished or not")
    run.add_argument("--from", dest="first", metavar="NN", help="run from this notebook on")
    run.add_argument("--timeout", type=float, metavar="SECONDS", help="the longest a cell may run")

    verify = commands.add_parser("verify", help="compare a run folder with its manifest")
    verify.add_argument("run_dir", metavar="RUN_DIR")
    verify.set_defaults(command=_verify)

    ask = _command(commands, "ask", _ask, "stream an answer of the base or the tuned model")
    ask.add_argument("model", help="base_chat, base (or llama2), tuned (or new_model), merged")
    ask.add_argument("question", nargs="?", default=LINKED_LIST_PROMPT)

    serve = _command(commands, "serve", _serve, "answer programs and a page, as OpenAI's server")
    serve.add_argument("models", nargs="*", help="tuned (default), merged, base, or ask's names")
    run_of = {"nargs": 2, "action": "append", "default": [], "metavar": ("NAME", "RUN_DIR")}
    serve.add_argument("--also", **run_of, help="another run's adapter, over the same base")
    serve.add_argument("--port", type=int, default=8000)
    serve.add_argument("--page", action="store_true", help="open the page that asks all of them")

    check = _command(commands, "check-data", _check_data, "what becomes of a file of your own")
    check.add_argument("source", help="a file, a folder, or a dataset of the Hub")

    _command(commands, "export-training", _export_training, "notebook 04 for several GPUs")

    _command(commands, "record", _record, "put a run's outputs into the committed notebooks")
    _command(commands, "first-look", _first_look, "write what lesson 01 opens with, from a run")
    fetch = commands.add_parser("fetch-model", help="fetch the embedded model, once")
    fetch.set_defaults(command=_fetch_model)
    _command(commands, "export-gguf", _export_gguf, "write the merged model for llama.cpp, Ollama")
    _command(commands, "push-dataset", _push_dataset, "upload the dataset to the Hub")
    _command(commands, "push-model", _push_model, "upload the merged model to the Hub")
    return parser


def _command(commands, name: str, function, help_text: str) -> argparse.ArgumentParser:
    """A command that needs settings."""
    command = commands.add_parser(name, help=help_text)
    add_settings(command)
    command.set_defaults(command=function)
    return command


def add_settings(command: argparse.ArgumentParser) -> None:
    """Let a command line be given settings: `parameters_of` has them then."""
    command.add_argument("--profile", default="demo", help=", ".join(PROFILES))
    command.add_argument("--run-dir", help="where artefacts lie (default: runs/<profile>)")
    pair = {"nargs": 2, "action": "append", "default": [], "metavar": ("NAME", "VALUE")}
    command.add_argument("-p", **pair, help="a notebook's parameter, such as MAX_STEPS 10")


def parameters_of(options) -> dict:
    """What a command was given, by the names that a notebook's parameters have."""
    place = {"RUN_DIR": options.run_dir} if options.run_dir else {}
    return {"PROFILE": options.profile, **place, **{name: _value(text) for name, text in options.p}}


def _config(options) -> Config:
    return Config.from_parameters(parameters_of(options))


def _load(module: str):
    """A module, imported when its command is chosen, so that `--help` answers at once."""
    return importlib.import_module(module)


def _run(options) -> None:
    parameters = parameters_of(options)
    config = _load("helpers.runs.runner").run(
        options.profile, None, options.only, options.first, parameters, options.timeout
    )
    for lesson, label, value in _load("helpers.runs.report").headline_rows(config):
        print(f"{lesson}  {label:<44} {value:>10}")
    print(f"report: {config.run_dir / 'report.html'}")


def _verify(options) -> None:
    count = _load("helpers.runs.manifest").verify(Path(options.run_dir))
    print(f"{count} files as the manifest records them")


def _value(text: str):
    """A -p value as Python reads it (8, 1e-3, True, None); any other text stays text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _ask(options) -> None:
    pieces = _load("helpers.answers.inference").ask(
        _config(options), options.model, options.question
    )
    for piece in pieces:
        print(visible(piece), end="", flush=True)
    print()


def _serve(options) -> None:
    models, also = options.models or ["tuned"], dict(options.also)
    try:
        run = _load("helpers.serving.server").run
    except ModuleNotFoundError as missing:
        raise RuntimeError(
            f"{missing.name} is not installed: `make serve` installs it, or "
            "`pip install -r requirements-serving.txt -c constraints.txt`"
        ) from None
    run(_config(options), models, also, options.port, options.page)


def _check_data(options) -> None:
    config = Config.from_parameters({**parameters_of(options), "DATA_SOURCE": options.source})
    tokenizer = _load("helpers.model.loading").load_tokenizer(config.model_name)
    print(visible(_load("helpers.data.own_rows").describe(config, tokenizer)))


def _export_training(options) -> None:
    path = _load("helpers.training.export").export_training(parameters_of(options))
    print(f"accelerate launch --config_file accelerate/ddp.yaml {path}")


def _record(options) -> None:
    _load("helpers.runs.recording").record(_config(options))


def _first_look(options) -> None:
    print(_load("helpers.runs.recording").write_first_look(_config(options)))


def _fetch_model(options) -> None:
    _load("helpers.model.embedded").fetch_embedded_model()


def _export_gguf(options) -> None:
    for path in sorted(_load("helpers.merging.export").export_gguf(_config(options)).iterdir()):
        print(path)


def _push_dataset(options) -> None:
    _load("helpers.merging.publishing").push_dataset(_config(options))


def _push_model(options) -> None:
    _load("helpers.merging.publishing").push_model(_config(options))


if __name__ == "__main__":
    sys.exit(main())
