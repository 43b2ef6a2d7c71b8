"""Answers in places, against `generate` one by one, on a tiny random Llama in float32."""

import json
import random
import sys

import pytest
import torch
import torch.nn.functional as F

from benchmarks import generation_gpu, places
from tests.conftest import tiny_llama


@pytest.fixture(scope="module")
def model():
    model = tiny_llama(vocab_size=300, num_hidden_layers=3).eval().requires_grad_(False)
    model.generation_config.eos_token_id = None
    places.fuse(model)
    return model


@pytest.fixture(scope="module")
def work() -> generation_gpu.Work:
    """More prompts than places, and a first answer of one token."""
    chance = random.Random(0)
    prompts = [chance.choices(range(3, 300), k=chance.randint(4, 60)) for _ in range(11)]
    return generation_gpu.Work(prompts, [1, *(chance.randint(2, 30) for _ in prompts[1:])], 4)


@pytest.fixture(scope="module")
def alone(model, work) -> list[list[int]]:
    return generation_gpu.by_generate(model, generation_gpu.Work(work.prompts, work.limits, 1))


@pytest.fixture(autouse=True)
def flash_on_a_cpu(monkeypatch):
    """What PyTorch's flash attention computes, one row after the other; prompts in small groups."""

    def flash(query, key, value, ends, starts, *sizes, scale, seqused_k, block_table=None):
        if block_table is not None:
            assert key.shape[1] == places.PAGE
            key, value = (each[block_table.flatten()].flatten(0, 1) for each in (key, value))
        rows = []
        for row, start, used in zip(query, starts.tolist(), seqused_k.tolist(), strict=False):
            kept = [each[start : start + used].transpose(0, 1)[None] for each in (key, value)]
            given = {"scale": scale, "enable_gqa": True}
            rows.append(F.scaled_dot_product_attention(row[None, :, None], *kept, **given))
        return (torch.cat(rows).squeeze(2),)

    monkeypatch.setattr(places, "flash_attention", flash)
    monkeypatch.setattr(places, "TOGETHER", 128)


@pytest.mark.parametrize("kind", places.KINDS)
@pytest.mark.parametrize("fused", [False, True])
def test_answers_are_those_one_by_one(model, work, alone, kind, fused):
    room = places.Places(model, work.rows, work.room, kind, fused=fused)
    assert room.answer(work.prompts, work.limits) == alone
    assert room.answer(work.prompts[5:7], work.limits[5:7]) == alone[5:7]  # places are free again
    assert model.config._attn_implementation == "sdpa"


def test_a_token_that_ends_an_answer_is_its_last(model, work, alone):
    token = alone[3][len(alone[3]) // 2]
    expected = [a[: a.index(token) + 1] if token in a else a for a in alone]
    assert expected != alone
    room = places.Places(model, work.rows, work.room)
    assert room.answer(work.prompts, work.limits, ends=[token]) == expected


def test_a_prompt_that_waits_takes_a_place_that_is_free(model, work, monkeypatch):
    """Fewer steps than if every four answers waited for the longest of them."""
    monkeypatch.setattr(places, "LOOK", 1)
    room = places.Places(model, work.rows, work.room)
    steps, step = [], room.step
    monkeypatch.setattr(room, "step", lambda: steps.append(step()))
    room.answer(work.prompts, work.limits)
    by_length = sorted(zip(work.prompts, work.limits, strict=True), key=lambda p: -len(p[0]))
    limits = [limit for _, limit in by_length]
    waiting = sum(max(limits[i : i + 4]) - 1 for i in range(0, len(limits), 4))
    assert len(steps) < waiting


def test_generate_ends_each_row_at_its_length_and_answers_the_same(model, work, alone):
    assert generation_gpu.by_generate(model, work) == alone


def test_the_loop_of_a_cell_answers_the_same(model, work, alone):
    assert generation_gpu.by_loop(model, work) == alone


def test_the_loop_of_a_cell_stops_when_all_have_ended(model, work, alone):
    ids, mask = generation_gpu.padded(work.prompts[1:2])
    written = generation_gpu.answer_together(model, ids, mask, 200, end=alone[1][2])
    assert written.shape == (1, 8) and written[0].tolist() == alone[1][:8]


def test_a_part_that_fails_or_takes_too_long_stops_no_other(tmp_path, monkeypatch):
    def fails(bench, found):
        found["before"] = 1
        raise ValueError("no")

    def lasts(bench, found):
        while True:
            pass

    parts = {"fails": (fails, 5), "lasts": (lasts, 3), "works": (lambda *_: None, 5)}
    monkeypatch.setattr(generation_gpu, "PARTS", parts)
    bench = generation_gpu.Bench.__new__(generation_gpu.Bench)
    bench.parts, bench.end, bench.weights, bench.work = {}, float("inf"), 1, {}
    bench.output = tmp_path / "found.json"
    for name in parts:
        bench.run(name)
    assert bench.parts["fails"]["before"] == 1 and "no" in bench.parts["fails"]["stopped"]
    assert "OutOfTime" in bench.parts["lasts"]["stopped"]
    assert "stopped" not in bench.parts["works"]
    assert '"works"' in bench.output.read_text(encoding="utf-8")


def test_the_command_builds_its_model_and_writes_what_a_part_found(tmp_path, monkeypatch):
    output = tmp_path / "found.json"
    given = ["--tiny", "--parts", "products", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["generation_gpu", *given])
    generation_gpu.main()
    found = json.loads(output.read_text("utf-8"))
    assert {"date", "hardware", "course", "weights_bytes"} <= set(found)
    assert found["parts"]["products"]["qkv 12"]["microseconds"] > 0
    assert "stopped" not in found["parts"]["products"]
