"""What notebook 05 writes for llama.cpp and Ollama, and the room that it takes on the disk."""

import shutil
from pathlib import Path

import gguf
import torch
from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from helpers import prompts
from helpers.config import Config
from helpers.data.curation_note import in_own_template, system_message
from helpers.merging import gguf_writer
from helpers.merging.merging import check_adapter, check_merged
from helpers.model import loading, predict
from helpers.model.check_model import why_not_gguf
from helpers.model.steps import Run
from helpers.runs import folders
from helpers.runs.inventory import ArtefactError, again

ADAPTER_FILE = "adapter.gguf"
# Bytes a weight at most; q4_0 has 18 bytes for 32 weights, and 34 where it stays in 8 bits.
WIDTHS = {"f16": 2, "q8_0": 34 / 32, "q4_0": 0.75}
SMALL_FILES_BYTES = 20_000_000  # tokenizer, settings and headers, once for each form of a model


def disk_needed(config: Config) -> dict[str, int]:
    """About how many bytes notebook 05 writes, file by file, from the shape of the model alone."""
    shape = loading.load_shape(config.model_name)
    with torch.device("meta"):
        parameters = AutoModelForCausalLM.from_config(shape).num_parameters()
    packed, apart = config.merge_into == "4bit", config.gguf_adapter_apart
    widths = {"merged/": 2.0}
    if (apart or not packed) and not why_not_gguf(shape):
        widths |= {f"gguf/{file_name(config, name)}": WIDTHS[name] for name in config.gguf_types}
    sizes = {name: round(width * parameters) for name, width in widths.items()}
    if packed:
        sizes["merged/"] = predict.estimate(shape, Run.from_config(config)).weights
    return {name: size + SMALL_FILES_BYTES for name, size in sizes.items()}


def need_disk(config: Config) -> str:
    """`disk_needed`, a line for each file, and what is free; DiskFull where that is too little."""
    files, replaced = disk_needed(config), (config.merged_dir, config.gguf_dir)
    earlier = sum(file.stat().st_size for folder in replaced for file in folder.glob("*"))
    needed = max(files["merged/"], sum(files.values()) - earlier)  # those make room
    folders.need_space(config.run_dir, needed, "notebook 05")
    free = shutil.disk_usage(config.run_dir).free
    files |= {"in all": sum(files.values()), "free on the disk": free}
    return "\n".join(f"{size / 1e9:8.2f} GB {name}" for name, size in files.items())


def gguf_report(config: Config) -> str:
    """Write run_dir/gguf, and say what lies there; or why this model is not written as GGUF."""
    try:
        files = sorted(export_gguf(config).iterdir())
    except gguf_writer.NoGGUF as reason:
        return f"No GGUF is written: {reason}"
    return "\n".join(f"{path.stat().st_size / 1e6:8.1f} MB gguf/{path.name}" for path in files)


def export_gguf(config: Config) -> Path:
    """Write run_dir/gguf, whole or not at all: a model in every type of GGUF_TYPES, a Modelfile.

    The model is the merged one, or with GGUF_ADAPTER_APART the base, and the adapter beside it.
    Raises FileNotFoundError, ArtefactError for what is damaged or stale, NoGGUF, DiskFull.
    """
    adapter = check_adapter(config) if config.gguf_adapter_apart else None
    source = base_folder(config) if adapter else check_merged(config)
    with folders.whole_folder(config.gguf_dir) as draft:
        for name in config.gguf_types:
            path = draft / file_name(config, name)
            # The adapter's tokenizer brings the template of the training, the base's does not.
            gguf_writer.write_gguf(source, path, name, adapter or source)
            check_written(path, source)
        if adapter:
            gguf_writer.write_adapter(adapter, source, draft / ADAPTER_FILE)
        asked = "q8_0" if "q8_0" in config.gguf_types else config.gguf_types[0]
        text = modelfile(config, file_name(config, asked))
        (draft / "Modelfile").write_text(text, encoding="utf-8")
    return config.gguf_dir


def base_folder(config: Config) -> Path:
    """Where the base lies: its folder, or the copy of the Hub's that notebook 04 loaded."""
    found = loading.find_model(config)
    return Path(found if Path(found).is_dir() else snapshot_download(found, local_files_only=True))


def file_name(config: Config, type_name: str) -> str:
    return f"{'base' if config.gguf_adapter_apart else 'model'}.{type_name}.gguf"


def check_written(path: Path, source: Path) -> None:
    """Raise ArtefactError for a GGUF file whose numbers are not those that gguf makes of the model.

    Compares all tensors outside the layers and those of the first and the last layer.
    """
    shape = AutoConfig.from_pretrained(source)
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    chosen = ("blk.0.", f"blk.{shape.num_hidden_layers - 1}.")
    for name, rows in gguf_writer.tensors_of(source, shape):
        if not name.startswith("blk.") or name.startswith(chosen):
            wanted = rows.to_eager(gguf_writer.quantized(rows, found[name].tensor_type))
            if wanted.tobytes() != found[name].data.tobytes():
                raise ArtefactError(
                    f"{path.name} holds another {name} than {source}: {again('05')}"
                )


def modelfile(config: Config, weights: str = "model.q8_0.gguf") -> str:
    """Ollama's description of the model, greedy, with the template of training, byte for byte.

    Ollama fills in `.System` and `.Prompt`, with blank lines around a request that
    `prompts.render_prompt` would take off; BOS comes from the file's own flag.
    """
    folder = config.adapter_dir if config.gguf_adapter_apart else config.merged_dir
    system = prompts.without_blank_lines(system_message(config, folder))
    if '"""' in system:
        raise ValueError('SYSTEM_MESSAGE holds """, which ends a text in a Modelfile: reword it')
    tokenizer = AutoTokenizer.from_pretrained(folder) if in_own_template(config, folder) else None
    template = prompts.render_prompt("{{ .Prompt }}", "{{ .System }}", tokenizer)
    adapter = f"ADAPTER ./{ADAPTER_FILE}\n" * config.gguf_adapter_apart
    return (
        f'FROM ./{weights}\n{adapter}TEMPLATE """{template}"""\nSYSTEM """{system}"""\n'
        f"PARAMETER temperature 0\nPARAMETER num_predict {config.max_new_tokens}\n"
    )
