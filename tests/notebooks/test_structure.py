"""The budgets of a lesson: short cells, one thought each, outputs that are fresh and clean."""

import ast
import json
import re

import nbformat
import pytest

from helpers.config import PROJECT_DIR, Config
from helpers.runs.lessons import code_hash, notebooks
from setup.colab import TAG

PATHS = notebooks()
NUMBERS = ["01", "02", "03", "04", "05", "06"]
# The calls that a reader comes for, by lesson: they stand in its cells, not in a helper.
CALLS = {
    "01": (
        "AutoTokenizer.from_pretrained(",
        "LoraConfig(",
        "get_peft_model(",
    ),
    "02": (
        "pd.read_csv(",
        ".merge(",
        ".groupby(",
        "ast.parse(",
        'f"[INST] <<SYS>>',
        "tokenizer.apply_chat_template(",
        "chat_template=",
        "load_from_disk(",
        "dataset.push_to_hub(",
        "apply_chat_template(",
    ),
    "03": (
        "BitsAndBytesConfig(",
        "AutoTokenizer.from_pretrained(",
        "AutoModelForCausalLM.from_pretrained(",
    ),
    "04": (
        "BitsAndBytesConfig(",
        "AutoModelForCausalLM.from_pretrained(",
        "LoraConfig(",
        "SFTConfig(",
        "SFTTrainer",
        ".train(resume_from_checkpoint=",
        ".save_model(",
        ".backward()",
        "optimizer.step()",
        ".generate(",
    ),
    "05": (
        "PeftModel.from_pretrained(base, adapter)",
        ".merge_and_unload(safe_merge=True)",
        "AutoModelForCausalLM.from_pretrained(source, use_safetensors=True, **at)",
        "BitsAndBytesConfig(",
        "quantize_4bit(",
        "dequantize_4bit(",
        "merged.save_pretrained(folder)",
        "tokenizer.save_pretrained(folder)",
        "AutoModelForCausalLM.from_pretrained(config.merged_dir, use_safetensors=True, **at)",
        "api.create_commit(name, sent",
        "PeftModel.from_pretrained(",
        ".merge_and_unload(",
        ".save_pretrained(",
        "AutoModelForCausalLM.from_pretrained(",
        "CommitOperationAdd(",
    ),
    "06": (
        "AutoTokenizer.from_pretrained(",
        "AutoModelForCausalLM.from_pretrained(",
        "BitsAndBytesConfig(",
        "PeftModel.from_pretrained(",
        "tokenizer.apply_chat_template(",
        'padding=True, padding_side="left"',
        "base.generate(**inputs, max_new_tokens=",
        "tuned.generate(**inputs, max_new_tokens=",
        "tokenizer.batch_decode(",
        'pipeline("text-generation", model=',
        "binomtest(",
        "apply_chat_template(",
        "padding=True",
        ".generate(",
        ".batch_decode(",
        "pipeline(",
    ),
}


@pytest.fixture(params=PATHS, ids=lambda path: path.stem)
def path(request):
    return request.param


@pytest.fixture
def notebook(path):
    return nbformat.read(path, as_version=4)


@pytest.fixture
def lesson(notebook):
    """The notebook's cells but for Colab's set-up, which is no part of the lesson."""
    return [cell for cell in notebook.cells if TAG not in cell.metadata.get("tags", [])]


def code_cells(notebook):
    cells = getattr(notebook, "cells", notebook)
    return [cell for cell in cells if cell.cell_type == "code"]


def outputs(notebook):
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def test_there_are_six():
    assert [path.name[:2] for path in PATHS] == NUMBERS


def test_is_valid_and_has_no_text_twin(path, notebook):
    nbformat.validate(notebook)
    assert "jupytext" not in notebook.metadata
    assert not path.with_suffix(".py").exists()


def test_opens_with_a_title_an_overview_parameters_and_the_config(lesson):
    title, overview, parameters, config = lesson[:4]
    assert re.fullmatch(r"# \S.*", title.source)
    for promise in ("What you'll do", "What you'll learn", "What you'll need"):
        assert promise in overview.source
    assert parameters.metadata.get("tags") == ["parameters"]
    assert "Config.from_notebook(globals())" in config.source


def test_parameters_are_literals_with_a_comment_and_fields_of_config(lesson):
    source = lesson[2].source
    names = [node.targets[0].id for node in ast.parse(source).body]
    for node in ast.parse(source).body:
        ast.literal_eval(node.value)
    assert names[:2] == ["PROFILE", "RUN_DIR"]
    assert set(names) <= {name.upper() for name in Config.__dataclass_fields__}
    assert all("  # " in line for line in source.splitlines())


def test_cells_are_short(lesson):
    lengths = sorted(len(cell.source.splitlines()) for cell in code_cells(lesson))
    assert 25 <= len(lesson) <= 45
    assert lengths[len(lengths) // 2] <= 6, "median"
    assert lengths[int(0.9 * len(lengths))] <= 20, "90th percentile"
    assert lengths[-1] <= 30, "longest"
    lines = [line for cell in code_cells(lesson) for line in cell.source.splitlines()]
    assert max(map(len, lines)) <= 100
    assert all(cell.source.strip() for cell in lesson)


def test_has_one_to_two_text_cells_for_each_code_cell(lesson):
    code = len(code_cells(lesson))
    assert 1 <= (len(lesson) - code) / code <= 2


def test_has_one_title_and_skips_no_heading_level(notebook):
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    levels = [len(marks) for marks in re.findall(r"^(#+) ", text, flags=re.MULTILINE)]
    assert levels.count(1) == 1 and levels[0] == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))


def global_names(source):
    """Names that a cell gives to the notebook; a function's own names are not among them."""
    pending = list(ast.parse(source).body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
            continue
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        if isinstance(node, ast.alias):
            yield node.asname or node.name
        pending.extend(ast.iter_child_nodes(node))


def test_no_upper_case_name_is_given_beside_the_parameters(notebook):
    """Config.from_notebook would take it for a parameter when its cell is run again."""
    for cell in [c for c in code_cells(notebook) if "parameters" not in c.metadata.get("tags", [])]:
        for name in global_names(cell.source):
            assert not re.fullmatch(r"[A-Z][A-Z0-9_]+", name), name


def test_links_lead_somewhere(path, notebook):
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    for target in re.findall(r"\]\(([^)#:]+\.ipynb)\)", text):
        assert (path.parent / target).exists(), target


@pytest.mark.parametrize(
    ("number", "call"), [(number, call) for number, calls in CALLS.items() for call in calls]
)
def test_the_calls_of_the_lesson_stand_in_it(number, call):
    (path,) = [path for path in PATHS if path.name.startswith(number)]
    cells = code_cells(nbformat.read(path, as_version=4))
    assert any(call in cell.source for cell in cells)


def test_records_its_metrics(path, notebook):
    source = "\n".join(cell.source for cell in code_cells(notebook))
    assert f'record_metrics(config, "{path.name[:2]}"' in source


# -- Committed outputs


def test_outputs_are_of_the_code_that_stands_here(path, notebook):
    recorded = notebook.metadata.get("recorded", {})
    assert recorded.get("code_sha256") == code_hash(path), "code changed: run `make record`"
    assert recorded["profile"] == "demo"
    assert {"date", "hardware", "torch", "transformers"} <= set(recorded)


def test_execution_counts_rise_by_one(notebook):
    counts = [cell.execution_count for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1))


def test_outputs_hold_no_error_stderr_bar_or_widget_state(notebook):
    assert "widgets" not in notebook.metadata
    for output in outputs(notebook):
        assert output.output_type != "error"
        assert output.get("name") != "stderr"
        assert "application/vnd.jupyter.widget-view+json" not in output.get("data", {})
        assert "it/s]" not in json.dumps(output)


def test_outputs_hold_no_path_of_a_machine(notebook):
    text = json.dumps([output for output in outputs(notebook)])
    assert str(PROJECT_DIR) not in text
    for place in ("/tmp/", "/root/", "/home/", "site-packages"):
        assert place not in text, place


def test_every_image_has_alt_text(notebook):
    for output in outputs(notebook):
        for kind in output.get("data", {}):
            if kind.startswith("image/"):
                assert len(output.metadata.get(kind, {}).get("alt", "")) > 20


def test_is_small_enough_to_be_shown(path):
    assert path.stat().st_size < 1_500_000


def test_the_series_prints_no_source_code():
    """What a lesson has to show stands in its cells."""
    cells = [cell for path in PATHS for cell in code_cells(nbformat.read(path, as_version=4))]
    assert not any("inspect.getsource" in cell.source for cell in cells)
