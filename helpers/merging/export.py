"""What notebook 05 writes for llama.cpp and Ollama, and the room that it takes on the disk."""

import shutil
from math import prod
from pathlib import Path

import gguf
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from helpers import prompts
from helpers.config import Config
from helpers.data.curation_note import in_own_template, system_message
from helpers.merging import gguf_writer
from helpers.merging.merged_folder import check_merged
from helpers.model import loading, predict
from helpers.model.steps import Run
from helpers.runs import folders
from helpers.runs.inventory import ArtefactError, again

# Tokenizer, settings and headers, once for each of the three forms of a model: 20 MB at most.
SMALL_FILES_BYTES = 20_000_000


def disk_needed(config: Config) -> dict[str, int]:
    """Bytes of what notebook 05 writes, file by file, from the shape of the model alone."""
    shape = loading.load_shape(config.model_name)
    with torch.device("meta"):
        sizes = [list(p.shape) for p in AutoModelForCausalLM.from_config(shape).parameters()]
    if config.merge_into == "4bit":
        merged = predict.estimate(shape, Run.from_config(config)).weights
    else:
        merged = 2 * sum(map(prod, sizes))
    files = {"merged/": merged}
    if config.merge_into != "4bit" and not gguf_writer.why_not(shape):
        for name in config.gguf_types:
            kind, _ = gguf_writer.TYPES[name]
            stored = (gguf_writer.stored_bytes(size, kind) for size in sizes)
            files[f"gguf/model.{name}.gguf"] = sum(stored)
    return {name: size + SMALL_FILES_BYTES for name, size in files.items()}


def need_disk(config: Config) -> str:
    """`disk_needed`, a line for each file, and what is free. DiskFull where that is too little.

    An earlier merge makes room when it is replaced, and its GGUF files with it. A last line says
    why no GGUF will be written, where that is so.
    """
    files = disk_needed(config)
    folders_replaced = (config.merged_dir, config.gguf_dir)
    earlier = sum(file.stat().st_size for old in folders_replaced for file in old.glob("*"))
    needed = max(files["merged/"], sum(files.values()) - earlier)
    folders.need_space(config.run_dir, needed, "notebook 05")
    free = shutil.disk_usage(config.run_dir).free
    files |= {"in all": sum(files.values()), "free on the disk": free}
    lines = [f"{size / 1e9:8.2f} GB {name}" for name, size in files.items()]
    shape, tokenizer = (f(config.model_name) for f in (loading.load_shape, loading.load_tokenizer))
    if reason := gguf_writer.why_not(shape, tokenizer):
        lines.append(f"no GGUF will be written: {reason}")
    return "\n".join(lines)


def gguf_report(config: Config) -> str:
    """Write run_dir/gguf, and say what lies there; or why this model is not written as GGUF."""
    try:
        files = sorted(export_gguf(config).iterdir())
    except gguf_writer.NoGGUF as reason:
        return f"No GGUF is written: {reason}"
    return "\n".join(f"{path.stat().st_size / 1e6:8.1f} MB gguf/{path.name}" for path in files)


def export_gguf(config: Config) -> Path:
    """Write run_dir/gguf, whole or not at all: the merged model in every type, and a Modelfile.

    The types are those of GGUF_TYPES. Each file is read back and compared before the folder has its
    name. Returns the folder. Raises FileNotFoundError without a merged model, ArtefactError for one
    that is damaged or stale, NoGGUF for one that cannot be written, DiskFull.
    """
    source = check_merged(config)
    names = {name: f"model.{name}.gguf" for name in config.gguf_types}
    device = config.device if torch.cuda.is_available() else "cpu"
    with folders.whole_folder(config.gguf_dir) as draft:
        paths = {name: draft / file for name, file in names.items()}
        gguf_writer.write_gguf(source, paths, device)
        for path in paths.values():
            check_written(path, source)
        text = modelfile(config, names.get("q8_0", names[config.gguf_types[0]]))
        (draft / "Modelfile").write_text(text, encoding="utf-8")
    return config.gguf_dir


def check_written(path: Path, source: Path) -> None:
    """Raise ArtefactError for a GGUF file whose numbers are not those that gguf makes of the model.

    Compares, bit for bit, all tensors outside the layers and those of the first, middle and last
    layer of the safetensors in `source`.
    """
    shape = AutoConfig.from_pretrained(source)
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    last = shape.num_hidden_layers - 1
    chosen = tuple(f"blk.{layer}." for layer in (0, last // 2, last))
    for name, tensor in gguf_writer.tensors_of(source, shape):
        if name.startswith("blk.") and not name.startswith(chosen):
            continue
        rows = gguf_writer.in_ggml_order(name, tensor[:].float(), shape).numpy()
        wanted = gguf.quantize(rows, found[name].tensor_type)
        if wanted.tobytes() != found[name].data.tobytes():
            raise ArtefactError(f"{path.name} holds another {name} than {source}: {again('05')}")


def modelfile(config: Config, weights: str = "model.q8_0.gguf") -> str:
    """Ollama's description of the model. Its template is the one of training, byte for byte.

    Ollama fills in `.System` and `.Prompt`; BOS comes from the file's own flag. Temperature 0 is
    greedy, as everywhere in this course. Ollama cannot take off the blank lines around a
    request, as `prompts.render_prompt` does.
    """
    system = prompts.without_blank_lines(system_message(config, config.merged_dir))
    if '"""' in system:
        raise ValueError('SYSTEM_MESSAGE holds """, which ends a text in a Modelfile: reword it')
    own = in_own_template(config, config.merged_dir)
    tokenizer = AutoTokenizer.from_pretrained(config.merged_dir) if own else None
    template = prompts.render_prompt("{{ .Prompt }}", "{{ .System }}", tokenizer)
    return (
        f'FROM ./{weights}\nTEMPLATE """{template}"""\nSYSTEM """{system}"""\n'
        f"PARAMETER temperature 0\nPARAMETER num_predict {config.max_new_tokens}\n"
    )
