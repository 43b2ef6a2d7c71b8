"""The fast path: its collator, plans and loss everywhere, its kernels and its graph on a GPU."""

import json
from itertools import pairwise
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset, DatasetDict
from peft import get_peft_model
from transformers import Qwen2Config, TrainerState

from benchmarks.llama2 import llama2_config
from benchmarks.notebook_04 import run_cells
from helpers.config import PROBLEMS_FILE, Config, ConfigError
from helpers.data.sources import SAMPLE_DIR
from helpers.model import loading, measure, precision, predict
from helpers.model.steps import Run
from helpers.training import machine, planning, safety
from helpers.training.fast import fast_path, kernels
from tests.conftest import fill_adapters, lora_of, relative_error

ROWS = [[5 + row] * (8 + 3 * row) for row in range(6)]


def examples(rows=ROWS):
    """One packed batch, as trl hands it to the collator."""
    return [
        {
            "input_ids": sum(rows, []),
            "labels": sum(([-100, *row[1:]] for row in rows), []),
            "seq_lengths": [len(row) for row in rows],
        }
    ]


def collator(tokens=128, longest=32, rows=6):
    return fast_path.FixedCollator(0, padding_free=True, tokens=tokens, longest=longest, rows=rows)


def test_a_batch_is_filled_up_with_rows_that_count_for_nothing():
    batch, used = collator(tokens=512)(examples()), sum(map(len, ROWS))
    assert batch["input_ids"].shape == batch["labels"].shape == batch["position_ids"].shape
    assert batch["input_ids"].shape == (1, 512) and batch["used_tokens"] == used
    assert (batch["labels"][0, used:] == -100).all()
    bounds = batch["cu_seq_lens_q"]
    assert bounds[0] == 0 and bounds[-1] == 512 and (bounds.diff() >= 0).all()
    assert bounds.diff().max() <= batch["max_length_q"]
    starts = (batch["position_ids"][0] == 0).nonzero().flatten()
    assert starts.tolist() == bounds.unique()[:-1].tolist()


def test_batches_of_other_rows_have_the_same_shapes():
    first, second = (collator(512)(examples(rows)) for rows in (ROWS, ROWS[:2]))
    for name, value in first.items():
        if torch.is_tensor(value):
            assert value.shape == second[name].shape, name


def test_batches_have_room_for_any_packed_row_of_the_dataset(tmp_path, tokenizer):
    """One full to the brim with the shortest of rows, and one that has more filling than rows."""
    config = tiny_config(tmp_path)
    full, short = [[7] * 4] * 64, [[7] * 4] * 2
    splits = [Dataset.from_list(examples(rows)) for rows in (full, short)]
    collate = fast_path.fixed_collator(config, tokenizer, splits)
    for split, rows in zip(splits, (full, short), strict=True):
        bounds = collate([split[0]])["cu_seq_lens_q"]
        assert bounds[: len(rows) + 1].tolist() == [*range(0, 4 * len(rows) + 1, 4)]
        assert bounds[-1] == 256 and len(bounds) == 1 + 64 + 4


def test_a_dataset_that_the_trainer_was_not_built_with_is_told():
    with pytest.raises(ValueError, match="in 6 rows and there is room for 64 in 5: build the"):
        collator(tokens=64, rows=5)(examples([[7] * 8] * 6))


def tiny_config(tmp_path, **changes):
    settings = {
        "packing": True,
        "max_length": 64,
        "per_device_train_batch_size": 4,
        "grad_acc_steps": 1,
        "max_steps": 4,
        "log_steps": 1,
        "warmup_ratio": 0.0,
        "keep_in_16bit": (),  # as the kernels need it
        "max_train_length": None,
        "run_dir": tmp_path,
        **changes,
    }
    return Config.from_profile("demo", **settings)


def build(config, texts=None):
    torch.manual_seed(0)
    tokenizer = loading.load_tokenizer(config.model_name)
    if texts is None:
        lines = PROBLEMS_FILE.read_text("utf-8").splitlines()[:110]
        texts = [json.loads(line)["prompt"] for line in lines]
    rows = [tokenizer(text)["input_ids"][: config.max_length] for text in texts]
    data = Dataset.from_dict({"input_ids": rows, "labels": [[-100, *row[1:]] for row in rows]})
    splits = {"train": data, "validation": data.select(range(8))}
    one = Dataset.from_list([{"prompt": "1", "completion": " 2"}])  # in whose place come these
    DatasetDict(train=one, validation=one).save_to_disk(config.dataset_dir)
    trainer = run_cells(config, "trainer", dataset=splits)["trainer"]
    fill_adapters(trainer.model)
    return trainer


@pytest.mark.parametrize("last", [False, True], ids=["accumulating", "last of a step"])
def test_processes_add_up_their_gradients_once_a_step(monkeypatch, last):
    """On stand-ins for the graph and for DDP: two GPUs at a time are not to be had in a test."""
    summed, graph = [], Mock(return_value=torch.tensor(1.5), gradient=torch.ones(3))
    monkeypatch.setattr(torch.distributed, "all_reduce", summed.append)
    monkeypatch.setattr(fast_path, "gather_object", lambda own: own + [20])
    trainer = Mock(graph=graph, state=TrainerState(num_input_tokens_seen=100))
    trainer._prepare_inputs = dict
    trainer.accelerator = Mock(num_processes=2, sync_gradients=last)
    loss = fast_path.FastTrainer.training_step(trainer, Mock(training=True), {"used_tokens": 5}, 8)
    assert summed == ([graph.gradient] if last else [])
    assert loss.item() == 3.0  # the trainer takes the mean over processes of what are shares
    assert trainer.state.num_input_tokens_seen == 125  # of all processes


GPU = {"device_map": {"": 0}}
STEPS = 200


def one_step(tmp_path, fast: bool, **changes):
    """(loss, gradients) of one batch."""
    trainer = build(tiny_config(tmp_path, fast_path=fast, **GPU, **changes))
    batch = next(iter(trainer.get_train_dataloader()))
    count = (batch["labels"][..., 1:] != -100).sum()
    with safety.kernels(trainer):
        loss = trainer.training_step(trainer.model, dict(batch), count)
        if fast:  # the first call recorded; a replay is what trains
            trainer.model.zero_grad()
            loss = trainer.training_step(trainer.model, dict(batch), count)
    named = trainer.model.named_parameters()
    return loss.item(), {n: p.grad.float().clone() for n, p in named if p.grad is not None}


def planned(tmp_path, monkeypatch, gib, host_gib=0, **changes):
    """`planning.planned` of a Llama 2 7B with `gib` of a GPU; loading a weight is an error."""
    free = Mock(available=host_gib * predict.GIB)
    monkeypatch.setattr(planning.psutil, "virtual_memory", lambda: free)
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: True)
    monkeypatch.setattr(measure, "torch_bytes", lambda device: round(gib * predict.GIB))
    monkeypatch.setattr(loading, "load_model", None)
    llama2_config("7B").save_pretrained(tmp_path)
    settings = {"model_name": str(tmp_path), "run_dir": tmp_path / "run", **changes}
    return planning.planned(Config.from_profile("llama2_7b", **settings))


def test_beside_ddp_which_keeps_gradients_too_fewer_layers_keep_theirs(tmp_path, monkeypatch):
    alone = planned(tmp_path, monkeypatch, 10)
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert 0 < planned(tmp_path, monkeypatch, 10).kept_layers < alone.kept_layers


def test_the_fast_path_is_planned_to_the_card_and_says_so(tmp_path, monkeypatch, capsys):
    small, large = (planned(tmp_path, monkeypatch, gib) for gib in (10, 80))
    assert (
        "planned for 10.0 GiB: batch 4 x 4 accumulated, with checkpointing but for 25 layers"
        in capsys.readouterr().out
    )
    for config in (small, large):  # a step's rows stay what the profile says
        assert config.per_device_train_batch_size * config.grad_acc_steps == 16
    assert 0 < small.kept_layers < 32 and small.activation_checkpointing
    assert not large.activation_checkpointing and large.optim == "adamw_torch_fused"
    assert planning.planned(small) == small


def test_half_of_the_hosts_memory_takes_activations_and_the_plan_says_so(
    tmp_path, monkeypatch, capsys
):
    without, offloaded = (planned(tmp_path, monkeypatch, 8, gib) for gib in (0.5, 12))
    assert not without.activation_offloading and offloaded.activation_offloading
    assert "every second of the others offloaded to the host" in capsys.readouterr().out
    step = Run.from_config(offloaded)
    assert 4 * predict.GIB < predict.Step.of(llama2_config("7B"), step).host < 6 * predict.GIB
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # each of two processes has a quarter
    step = Run.from_config(planned(tmp_path, monkeypatch, 8, 12))
    assert 0 < predict.Step.of(llama2_config("7B"), step).host < 3 * predict.GIB


def test_a_card_that_is_too_small_is_refused_before_the_weights(tmp_path, monkeypatch):
    with pytest.raises(
        ConfigError, match="in 5.9 GiB with rows of 2048 tokens: set MAX_LENGTH = 1024"
    ):
        planned(tmp_path, monkeypatch, 5.9, max_length=2048)
    with pytest.raises(ConfigError, match="in 3.0 GiB .* smaller model or a larger card"):
        planned(tmp_path, monkeypatch, 3)


def test_a_model_that_is_no_llama_leaves_the_fast_path(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: True)
    Qwen2Config().save_pretrained(tmp_path)
    config = Config.from_profile("llama2_7b", model_name=str(tmp_path), run_dir=tmp_path / "run")
    assert not planning.planned(config).fast_path
    assert "without the fast path, which knows no 'qwen2' model" in capsys.readouterr().out


def test_layers_in_16_bits_leave_the_fast_path(tmp_path, monkeypatch, capsys):
    found = planned(tmp_path, monkeypatch, 80, keep_in_16bit=("down_proj",))
    assert not found.fast_path and found.packing  # the same batches, by trl's own step
    said = "trained without the fast path, whose kernels know layers in 4 bits alone (KEEP_IN_16BIT"
    assert said in capsys.readouterr().out


def test_a_cpu_leaves_the_fast_path(tmp_path, monkeypatch, capsys):
    found = planned(tmp_path, monkeypatch, 80, device_map={"": "cpu"})
    assert not found.fast_path
    assert "without the fast path, which needs a GPU from Ampere on" in capsys.readouterr().out


def test_what_is_given_is_not_planned(tmp_path, monkeypatch):
    assert planned(tmp_path, monkeypatch, 3, kept_layers=0).kept_layers == 0
    assert planned(tmp_path, monkeypatch, 3, fast_path=False).kept_layers is None


def test_the_loss_of_a_packed_row_is_that_of_the_model(tmp_path, tiny_model_dir, monkeypatch):
    monkeypatch.setattr(kernels, "compiled", lambda function: function)
    monkeypatch.setattr(kernels, "LOSS_CHUNK", 5)
    config = tiny_config(tmp_path, model_name=str(tiny_model_dir))
    model = get_peft_model(loading.load_model(config), lora_of(config)).eval()
    ids = torch.arange(5, 28)[None]
    labels = torch.where(ids % 4 > 0, ids, -100)
    with torch.no_grad():
        count = (labels[0, 1:] != -100).sum()
        loss = fast_path.packed_loss(model, {"input_ids": ids}, labels, count)
        mean = model(input_ids=ids, labels=labels).loss
    assert loss.item() == pytest.approx(mean.item(), rel=1e-3)


def attention_by_definition(query, key, value, bounds, *_, window_size):
    """What flash attention computes, row by row: it has no float32 and no CPU."""
    assert window_size == (-1, 0)
    rows = [
        F.scaled_dot_product_attention(
            *(states[start:end].transpose(0, 1) for states in (query, key, value)), is_causal=True
        )
        for start, end in pairwise(bounds.tolist())
        if end > start
    ]
    return torch.cat(rows, dim=1).transpose(0, 1)


def test_packed_rows_have_the_logits_that_they_have_alone(tmp_path, monkeypatch):
    """In float32, through everything of ours: collator, positions, bounds, kernels, adapters."""
    monkeypatch.setattr(kernels, "varlen_attn", attention_by_definition)
    monkeypatch.setattr(kernels, "compiled", lambda function: function)
    config = tiny_config(tmp_path, bnb_4bit_compute_dtype="float32", bf16=False)
    model = build(config).model.eval().float()
    batch = collator(tokens=256, longest=64)(examples())
    inputs = {k: v for k, v in batch.items() if k not in ("used_tokens", "labels")}
    with torch.no_grad():
        with kernels.fused_kernels(model):
            packed = model(**inputs).logits[0, : batch["used_tokens"]]
        alone = torch.cat([model(input_ids=torch.tensor([row])).logits[0] for row in ROWS])
    error = relative_error(packed, alone)
    print(f"relative difference of the logits: {error:.1e}")
    assert error < 1e-5


@pytest.fixture
def packed(tmp_path, tiny_model_dir, monkeypatch):
    """(a tiny Llama with adapters in float32, rows, arguments of the loss of their batch)."""
    monkeypatch.setattr(kernels, "varlen_attn", attention_by_definition)
    monkeypatch.setattr(kernels, "compiled", lambda function: function)
    config = tiny_config(
        tmp_path, model_name=str(tiny_model_dir), bnb_4bit_compute_dtype="float32", bf16=False
    )
    model = get_peft_model(loading.load_model(config), lora_of(config)).float()
    fill_adapters(model)
    rows = [torch.randint(5, 100, (len(row),)).tolist() for row in ROWS]
    batch = collator(tokens=256, longest=64)(examples(rows))
    batch.pop("used_tokens")
    labels = batch.pop("labels")
    return model.train(), rows, (batch, labels, (labels[0, 1:] != -100).sum())


def checkpointed(model):
    getattr(model, f"{machine.CHECKPOINTING}_enable")({"use_reentrant": False})


@pytest.mark.parametrize("kept_layers", [None, 0, 1, 2], ids="{} kept".format)
@pytest.mark.parametrize("keep_weights", [False, True])
def test_gradients_are_those_of_the_rows_alone(packed, kept_layers, keep_weights):
    model, rows, arguments = packed
    trained, count = [p for p in model.parameters() if p.requires_grad], arguments[-1]
    for row in map(torch.tensor, rows):
        mean = model(input_ids=row[None], labels=row[None]).loss
        (mean * (len(row) - 1) / count).backward()
    alone = [p.grad.clone() for p in trained]
    model.zero_grad()
    if kept_layers is not None:
        checkpointed(model)
        layers = model.get_base_model().model.layers
        fast_path.choose_checkpoints(layers, kept_layers, keep_weights)
    with kernels.fused_kernels(model):
        fast_path.packed_loss(model, *arguments).backward()
    errors = [relative_error(p.grad, grad) for p, grad in zip(trained, alone, strict=True)]
    assert max(errors) < 1e-4


def test_a_kept_layer_makes_the_inputs_of_its_adapters_again(packed):
    model, _, arguments = packed
    model.enable_input_require_grads()  # checkpoints make it so: then the first layer is like all
    shape, layers = model.config, model.get_base_model().model.layers
    found = []
    for kept_layers in (0, len(layers)):
        if kept_layers:
            checkpointed(model)
            fast_path.choose_checkpoints(layers, kept_layers, keep_weights=False)
        saved = {}

        def note(tensor, saved=saved):
            saved[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with (
            kernels.fused_kernels(model),
            torch.autograd.graph.saved_tensors_hooks(note, kernels.as_it_is),
        ):
            loss = fast_path.packed_loss(model, *arguments)
        loss.backward()
        found.append(sum(saved.values()))
    step = Run(batch=4, length=64, compute_bytes=4, adapter_bytes=4, fast=True)
    taken = predict.Step.of(shape, step)
    assert found[0] - found[1] == len(layers) * (taken.layer - taken.kept_layer) > 0


@pytest.mark.needs_gpu
@pytest.mark.parametrize(
    "way",
    [
        {"activation_checkpointing": False},
        {"activation_checkpointing": True},
        {"kept_layers": 6, "activation_offloading": True},
    ],
    ids=["none run twice", "all run twice", "offloaded"],
)
def test_one_step_is_as_near_to_float32_as_trls_own(tmp_path, way):
    float32 = {"bnb_4bit_compute_dtype": "float32", "bf16": False}
    exact_loss, exact = one_step(tmp_path, fast=False, **float32)
    errors = {}
    for fast in (True, False):
        loss, found = one_step(tmp_path, fast, **way)
        assert loss == pytest.approx(exact_loss, rel=0.01)
        errors[fast] = np.mean([relative_error(found[name], exact[name]) for name in exact])
    print(f"mean error of the gradients: {errors[True]:.3f}, of trl's own step {errors[False]:.3f}")
    assert errors[True] < 1.2 * errors[False]


@pytest.mark.needs_gpu
def test_rows_of_a_packed_batch_do_not_see_each_other(tmp_path):
    trainer = build(tiny_config(tmp_path, fast_path=True, **GPU))
    hidden = {}
    with safety.kernels(trainer), torch.no_grad():
        for name, rows in (("alone", ROWS[-1:]), ("after others", [*ROWS])):
            batch = collator(tokens=512, longest=64)(examples(rows))
            batch.pop("used_tokens"), batch.pop("labels")
            batch = {k: v.cuda() if torch.is_tensor(v) else v for k, v in batch.items()}
            used = sum(map(len, rows))
            states = trainer.model.get_base_model().model(**batch).last_hidden_state[0]
            hidden[name] = states[used - len(ROWS[-1]) : used]
    assert relative_error(hidden["after others"], hidden["alone"]) < 1e-2


@pytest.mark.needs_gpu
def test_training_goes_as_with_trls_own_step(tmp_path):
    """On rows enough that none is seen often: what is learnt by heart has losses near 0."""
    answers = pd.read_csv(SAMPLE_DIR / "Answers.csv", encoding="ISO-8859-1")
    losses, texts = {}, answers["Body"].dropna()
    for fast in (True, False):
        settings = {"learning_rate": 1e-3, "max_steps": STEPS, "max_length": 256, **GPU}
        trainer = build(tiny_config(tmp_path, fast_path=fast, **settings), texts)
        with safety.kernels(trainer):
            trainer.train()
        losses[fast] = [e["loss"] for e in trainer.state.log_history if "loss" in e]
    ours, trls = (np.array(losses[fast]).reshape(-1, 10).mean(axis=1) for fast in (True, False))
    print("relative difference of the loss, every ten steps:", (ours / trls - 1).round(4).tolist())
    assert ours[-1] < 0.9 * ours[0]
    assert ours == pytest.approx(trls, rel=0.01)
