"""The live chart: it follows the log, is not drawn too often, and leaves no figure."""

import matplotlib.pyplot as plt
import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from helpers.view import live_chart
from tests.faults.train_tiny import build, write_dataset
from tests.notebook_code import fine_tune

PNG_AS_DATA = 'src="data:image/png;base64,iVBORw0KGgo'


def history(last: int) -> list[dict]:
    """An entry for every step, a log line each 5 steps, an evaluation each 10."""
    entries = step_log(last)
    for step in range(5, last + 1, 5):
        line = {"learning_rate": 1e-3, "grad_norm": 1.0}
        entries.append({"step": step, "loss": 2 - step / 1000, **line})
        entries += [{"step": step, "eval_loss": 2.5}] if step % 10 == 0 else []
    return entries


def step_log(last: int) -> list[dict]:
    return [
        {"step": n, "seconds": 0.5, "tokens": 100, "memory_bytes": 2**30}
        for n in range(1, last + 1)
    ]


@pytest.fixture
def call(tmp_path):
    chart = live_chart.LiveChart()
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, bf16=False)

    def call(event: str, step: int):
        state = TrainerState(global_step=step, max_steps=400, log_history=history(step))
        getattr(chart, event)(arguments, state, TrainerControl())
        return chart.view.value

    return call


def test_it_draws_the_log_and_says_it_in_words(call, monkeypatch):
    monkeypatch.setattr(live_chart, "SECONDS_BETWEEN_PICTURES", 0)
    open_before = plt.get_fignums()
    first, second = call("on_log", 20), call("on_log", 40)
    assert PNG_AS_DATA in first and PNG_AS_DATA in second
    assert first.split("base64,")[1] != second.split("base64,")[1]
    for words in (
        "step 40 of 400",
        "training loss 1.96 nats per",
        "rate 0.001,",
        "speed 200 ",
        "; 180 s of steps left.",
    ):
        assert words in second.split('alt="')[1].split('"')[0], words
    assert "; 0 s of steps left." in call("on_train_end", 400)
    assert plt.get_fignums() == open_before


def test_it_is_drawn_now_and_then_and_at_the_end(call):
    first = call("on_log", 20)
    assert call("on_log", 25) == first
    assert call("on_train_end", 25) != first


def test_training_feeds_the_chart_and_still_prints_its_lines(tiny_config, tokenizer, capsys):
    write_dataset(tiny_config, rows=8, held_out=2)
    trainer = build(tiny_config)
    view = live_chart.chart(trainer)
    assert "img" not in view.value
    fine_tune(trainer)
    assert "step 2 of 2" in view.value and "speed" in view.value
    assert "step    2/2   loss" in capsys.readouterr().out
