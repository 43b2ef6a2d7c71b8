"""May a folder be loaded as a model? Only whole safetensors files, and no code of its own."""

from pathlib import Path

from safetensors import SafetensorError, safe_open

from helpers.runs.inventory import ArtefactError, read_json

POINTER = b"version https://git-lfs"


def check_weights(path: Path, advice: str) -> None:
    """Raise ArtefactError for a file that is no whole safetensors file. Reads its header alone."""
    with path.open("rb") as file:
        if file.read(len(POINTER)) == POINTER:
            raise ArtefactError(
                f"{path} is a Git-LFS pointer and not the weights: run `git lfs pull` there, or "
                f"{advice}"
            )
    try:
        with safe_open(path, "numpy"):
            pass
    except SafetensorError as error:
        raise ArtefactError(f"{path} is cut off or damaged ({error}): {advice}") from error


def check_code(model: str) -> str:
    """The name of a model, unless it is a folder that brings code of its own: ArtefactError."""
    for name in ("config.json", "tokenizer_config.json"):
        path = Path(model) / name
        if path.is_file() and "auto_map" in read_json(path, "get the model again"):
            raise ArtefactError(
                f"{path} names code to be run (auto_map), and code of a model is never run here: "
                "remove that entry, or choose a model that transformers knows by itself"
            )
    return model


def check_model(model: str) -> str:
    """The name of a model, unless it is a folder without whole safetensors, or with code."""
    check_code(model)
    weights = sorted(Path(model).glob("*.safetensors"))
    if Path(model).is_dir() and not weights:
        raise ArtefactError(
            f"{model} holds no .safetensors file, and no other form of weights is read: convert "
            "the model, or choose one that has them"
        )
    for path in weights:
        check_weights(path, "get the model again")
    return model
