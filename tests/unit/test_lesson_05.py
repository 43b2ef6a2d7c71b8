"""Notebook 05: its calls, the sum by hand, the rounding, the rule; and cells without helpers."""

import dataclasses
import subprocess
import sys

import pandas as pd
import pytest
import torch
from peft import LoraConfig, get_peft_model

from helpers.model import loading
from tests.conftest import fill_adapters
from tests.notebook_code import (
    cell_source,
    definitions_from,
    lesson_05,
)


def with_adapter(config, std=0.02, **settings):
    """A random adapter with other settings than the Config's; the base's weights by name."""
    settings = {"r": 8, "lora_alpha": 12, "target_modules": ["q_proj", "down_proj"], **settings}
    base = loading.load_model(config, quantized=False)
    weights = {name: p.detach().clone() for name, p in base.named_parameters()}
    tuned = get_peft_model(base, LoraConfig(**settings))
    fill_adapters(tuned, std)
    tuned.save_pretrained(config.adapter_dir)
    return weights


def run_cells(lesson, *identifiers):
    """Cells of notebook 05 in a namespace, as a kernel would run them."""
    for identifier in identifiers:
        exec(cell_source("05", identifier), lesson)
    return lesson


ADAPTERS = [{}, {"target_modules": ["v_proj"]}, {"r": 2, "lora_alpha": 40}]


@pytest.mark.filterwarnings("ignore::helpers.runs.inventory.ArtefactWarning")
@pytest.mark.parametrize("settings", ADAPTERS, ids=str)
def test_the_sum_by_hand_is_pefts_and_each_other_matrix_stays(tiny_config, settings, capsys):
    before = with_adapter(tiny_config, **settings)
    lesson = lesson_05(tiny_config)
    run_cells(lesson, "64769e60", "ffe31465", "merge-16bit", "by-peft")
    assert lesson["difference"] == 0 and lesson["update"].abs().max() > 0
    changed = {n for n, p in lesson["merged"].named_parameters() if not torch.equal(p, before[n])}
    kinds = settings.get("target_modules", ["q_proj", "down_proj"])
    assert {name.split(".")[-2] for name in changed} == set(kinds) and len(changed) == 2 * len(
        kinds
    )
    scale = settings.get("lora_alpha", 12) / settings.get("r", 8)
    assert f"scale {scale}" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore::helpers.runs.inventory.ArtefactWarning")
@pytest.mark.parametrize("std", [0.02, 0.002])  # 0.002: as small, next to the weights, as in `demo`
def test_packing_rounds_more_away_than_16_bits_do(tiny_config, std):
    with_adapter(tiny_config, std, lora_alpha=8)
    lesson = lesson_05(tiny_config)
    run_cells(lesson, "64769e60", "ffe31465", "merge-16bit", "by-peft", "arrived")
    rounding = lesson["rounding"]
    assert max(rounding["16bit"], rounding["dequantized"]) < 0.9 < rounding["4bit"]


def test_kl_divergence_is_that_of_known_distributions():
    kl_divergence = definitions_from("05")["kl_divergence"]
    p = torch.tensor([[0.5, 0.5]]).log()
    q = torch.tensor([[0.25, 0.75]]).log()
    expected = 0.5 * torch.log(torch.tensor(2.0)) + 0.5 * torch.log(torch.tensor(2 / 3))
    assert kl_divergence(p, q).item() == pytest.approx(expected.item(), rel=1e-5)
    assert kl_divergence(p, p).item() == 0
    assert kl_divergence(p, q + 7).item() == pytest.approx(expected.item(), rel=1e-5)  # logits


# Which merge the rule takes: its KL, its share of stops, its passes of 12; and MERGE_INTO.
CLOSE, FAR = {"KL to trained": 0.001, "stops": 0.9}, {"KL to trained": 0.2, "stops": 0.9}
RULED = {
    "the closest": ({}, 4, 4, "auto", "dequantized"),
    "a lead of two is chance": ({}, 4, 6, "auto", "dequantized"),
    "a lead of seven is none": ({}, 2, 9, "auto", "16bit"),
    "but it has to stop": ({"stops": 0.1}, 2, 9, "auto", "dequantized"),
    "no problem was asked": ({"stops": float("nan")}, 0, 0, "auto", "dequantized"),
    "as it is told": ({}, 4, 4, "16bit", "16bit"),
}


@pytest.mark.parametrize(("change", "passed", "more", "said", "taken"), RULED.values(), ids=RULED)
def test_the_rule_takes_what_it_says(tiny_config, change, passed, more, said, taken):
    table = pd.DataFrame({"16bit": FAR | change, "dequantized": CLOSE, "4bit": FAR}).T
    passes = {name: [n < passed for n in range(12)] for name in ("dequantized", "4bit")}
    made = []
    model = loading.load_model(tiny_config)
    lesson = definitions_from("05") | {
        "config": dataclasses.replace(tiny_config, merge_into=said),
        "table": table,
        "passes": {**passes, "16bit": [n < more for n in range(12)]},
        "place": tiny_config.device_map,
        "at": {},
        "merged": model,
        "merge": lambda into: made.append(into) or model,
    }
    run_cells(lesson, "8940a47c")
    assert lesson["take"] == taken
    assert made == ([] if taken == "dequantized" else [taken])


MERGING_CELLS = (
    *("64769e60", "ffe31465", "load-tuned", "merge-4bit", "merge-16bit", "by-peft"),
    *("through-4-bits", "merge-dequantized", "arrived", "29b6969a"),
)
# What a reader puts in place of what the course's helpers give: plain values.
PLAIN = {
    "loading.find_model(config)": "MODEL",
    "precision.compute_dtype(config)": "torch.float32",
    "loading.choose_padding(tokenizer, source)": "",
    "loading.guard_cpu_weights(base)": "",
    "with merging.saving(merged, take, config) as folder:": "for folder in [config.merged_dir]:",
}


def test_the_cells_that_merge_run_in_a_script_without_helpers(tiny_config, tmp_path):
    with_adapter(tiny_config)
    source = "\n".join(cell_source("05", identifier) for identifier in MERGING_CELLS)
    for ours, plain in PLAIN.items():
        assert ours in source
        source = source.replace(ours, plain)
    (tmp_path / "script.py").write_text(
        "import gc, sys, torch\nfrom pathlib import Path\n"
        "at = {'dtype': torch.float32, 'device_map': 'cpu'}\nclass config:\n"
        "    keep_in_16bit, device, device_map = (), 'cpu', 'cpu'\n"
        "    bnb_4bit_compute_quant_type, use_nested_quant = 'nf4', True\n"
        f"    merged_dir = Path('merged')\nMODEL = {tiny_config.model_name!r}\n"
        f"adapter, place, take = Path({str(tiny_config.adapter_dir)!r}), 'cpu', 'dequantized'\n"
        "def measured(into, merged): print(into, type(merged).__name__)\n"
        f"import pandas as pd\n{source}\nassert 'helpers' not in sys.modules\n"
        "AutoModelForCausalLM.from_pretrained('merged')\n",
        encoding="utf-8",
    )
    command = [sys.executable, "-I", "script.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr[-2000:]
    assert [
        f"{into} LlamaForCausalLM" in done.stdout for into in ("4bit", "16bit", "dequantized")
    ] == [True] * 3
