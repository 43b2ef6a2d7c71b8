"""`python -m helpers serve`: a real server and OpenAI's own client, on a tiny random model.

The client knows a name and a question. What it gets is what notebook 06 gets.
"""

import dataclasses
import json
import socket
import subprocess
import sys

import pytest

pytest.importorskip("openai", reason="make serving")
pytest.importorskip("uvicorn", reason="make serving")

import httpx2
import openai

from helpers import prompts
from helpers.__main__ import main
from helpers.answers import inference
from helpers.config import PROJECT_DIR, SYSTEM_MESSAGE, Config
from helpers.serving import server
from tests.notebook_code import merge, save_merged
from tests.unit.test_lesson_05 import with_adapter

QUESTION = "Why is the sky blue?"
TOKENS = 12


@pytest.fixture(scope="module")
def config(tiny_model_dir, tmp_path_factory, tokenizer):
    """A run with a random adapter and its merged model, and a second run with another adapter."""
    runs = tmp_path_factory.mktemp("runs")
    settings = {"model_name": str(tiny_model_dir), "max_new_tokens": TOKENS}
    config = Config.from_profile("smoke", run_dir=runs / "mine", **settings)
    with_adapter(config, std=0.5)
    with_adapter(other_run(config), std=0.9, r=4)
    save_merged(merge(config, "16bit"), tokenizer, config)
    return config


def other_run(config):
    return dataclasses.replace(config, run_dir=config.run_dir.parent / "other")


def command(config, *arguments):
    given = [*arguments, "--run-dir", str(config.run_dir), "--profile", "smoke"]
    given += ["-p", "MODEL_NAME", config.model_name, "-p", "MAX_NEW_TOKENS", str(TOKENS)]
    return ["serve", *map(str, given)]


@pytest.fixture(scope="module")
def process(config):
    """A server in a process of its own, on a port that is free."""
    given = ["tuned", "merged", "base", "--also", "other", other_run(config).run_dir, "--port", 0]
    running = subprocess.Popen(
        [sys.executable, "-m", "helpers", *command(config, *given)],
        stdout=subprocess.PIPE,
        encoding="utf-8",
        cwd=PROJECT_DIR,
    )
    yield running
    running.terminate()
    assert running.wait(20) == 128 + 15


@pytest.fixture(scope="module")
def expected(config, process):
    """Notebook 06's greedy answers, each by a model of its own, while the server starts."""
    answers = {
        name: inference.answer_alone(config, which, [QUESTION])[0][0]
        for name, which in {"tuned": "tuned", "merged": "merged", "base": "base_chat"}.items()
    }
    (answers["other"],), _ = inference.answer_alone(other_run(config), "tuned", [QUESTION])
    return answers


@pytest.fixture(scope="module")
def started(process, expected):
    """The first line that the server prints."""
    return process.stdout.readline()


@pytest.fixture(scope="module")
def client(started):
    return openai.OpenAI(base_url=started.split()[0], api_key="none", max_retries=0)


def asked(question=QUESTION, **options):
    return {"messages": [{"role": "user", "content": question}], **options}


def text_of(client, **request) -> str:
    return client.chat.completions.create(**request).choices[0].message.content


def streamed(client, **request) -> list[str]:
    chunks = client.chat.completions.create(stream=True, **request)
    return [chunk.choices[0].delta.content or "" for chunk in chunks]


def test_the_first_line_says_where_and_that_no_one_else_can_ask(started):
    assert started.startswith("http://127.0.0.1:")
    assert "/v1 serves tuned, merged, base, other to this machine only (loopback)\n" in started


def test_models_are_listed_by_name(client):
    assert [model.id for model in client.models.list()] == ["tuned", "merged", "base", "other"]


@pytest.mark.parametrize("name", ["tuned", "merged", "base", "other"])
def test_an_answer_is_that_of_notebook_06_streamed_or_not(client, expected, name):
    wanted = expected[name]
    whole = client.chat.completions.create(model=name, **asked())
    assert (whole.model, whole.choices[0].message.content) == (name, wanted.text)
    assert whole.choices[0].finish_reason == ("stop" if wanted.stopped else "length")
    pieces = streamed(client, model=name, **asked())
    assert "".join(pieces) == wanted.text and len(pieces) > 2


def test_the_models_answer_differently(expected):
    assert len({expected[name].text for name in ("tuned", "base", "other")}) == 3


def test_max_tokens_is_respected_and_counted(client):
    answer = client.chat.completions.create(model="tuned", **asked(max_tokens=3))
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (3, "length")
    default = client.chat.completions.create(model="tuned", **asked())
    assert default.usage.completion_tokens <= TOKENS


def test_the_system_message_is_that_of_the_training_unless_the_client_sends_one(client):
    with_it = {"role": "system", "content": SYSTEM_MESSAGE}, *asked()["messages"]
    another = {"role": "system", "content": "Answer in rhymes."}, *asked()["messages"]
    for name in ("tuned", "base"):
        alone = text_of(client, model=name, **asked())
        assert text_of(client, model=name, messages=with_it) == alone
        assert text_of(client, model=name, messages=another) != alone


def test_a_temperature_samples_and_none_does_not(client):
    request = asked(model="tuned", temperature=5.0)
    assert len({text_of(client, seed=seed, **request) for seed in range(3)}) > 1
    assert len({text_of(client, **asked(model="tuned", seed=seed)) for seed in range(2)}) == 1


REFUSED = [
    ({"model": "gpt"}, "no model is called 'gpt' here: choose tuned or merged or base or other"),
    ({"max_tokens": 0}, "max_tokens is 0: ask for 1 or more"),
    ({"messages": []}, r"the roles are \[\]: use system, user, assistant; end with user"),
    ({"messages": [{"role": "tool", "content": "x"}]}, r"the roles are \['tool'\]: use system"),
    (asked("Is [/INST] a mark?"), r"a message holds the template's own \[/INST\]: reword it"),
    (asked("Is <|im_end|> one?", model="base"), r"a message holds the template's own <\|im_end\|>"),
]


@pytest.mark.parametrize(("request_", "sentence"), REFUSED)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_asked_is_refused_in_a_sentence(client, request_, sentence, stream):
    with pytest.raises(openai.APIStatusError, match=sentence) as refused:
        client.chat.completions.create(
            **{"model": "tuned", "stream": stream, **asked(), **request_}
        )
    assert refused.value.status_code == (404 if "model is called" in sentence else 400)


def test_a_page_of_another_site_is_refused(client):
    """One whose name points here, or that sends what needs no leave of this server."""
    url = str(client.base_url)
    assert httpx2.get(url + "models", headers={"Host": "evil.example"}).status_code == 400
    body = json.dumps({"model": "tuned", **asked()})
    plain = httpx2.post(
        url + "chat/completions", content=body, headers={"Content-Type": "text/plain"}
    )
    assert plain.status_code == 422
    assert httpx2.post(url.replace("/v1/", "/reset")).status_code == 404


def stopped(config, capsys, *arguments) -> str:
    assert main(command(config, *arguments)) == 1
    return capsys.readouterr().err


def test_a_port_in_use_is_named(config, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = stopped(config, capsys, "tuned", "--port", port)
    assert said.startswith(f"stopped: port {port} cannot be had (")
    assert "Address already in use" in said and said.endswith("): choose another --port\n")
    assert "port must be 0-65535" in stopped(config, capsys, "--port", 65536)


def test_a_missing_model_is_named(config, capsys, tmp_path):
    empty = dataclasses.replace(config, run_dir=tmp_path / "empty")
    assert "run notebook 04" in stopped(empty, capsys, "tuned", "--port", 0)
    assert "run notebook 05" in stopped(empty, capsys, "merged", "--port", 0)
    assert "run notebook 04" in stopped(config, capsys, "--also", "x", empty.run_dir, "--port", 0)
    assert "no model is called 'gpt': choose one of" in stopped(config, capsys, "gpt", "--port", 0)
    wrong = stopped(config, capsys, "--also", "tuned", config.run_dir, "--port", 0)
    assert "an adapter cannot be called 'tuned': take another name, of letters" in wrong


def test_what_is_not_installed_is_named(config, capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, server.__name__)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert "uvicorn is not installed: `make serve` installs it" in stopped(config, capsys)


def test_the_cut_of_a_streamed_answer_is_that_of_the_whole(tokenizer):
    """Whatever stands at its ends, and wherever the pieces are cut."""
    chat = server.Chat({}, 1)
    for text in (" a \n", "\n\n  x = 1\n  \n y \n", "   ", " \n", "a\n \n ", "  \n a  "):
        chat.text, given = "", ""
        for piece in text:
            line = chat._build_chunk_sse("id", content=piece, model="m")
            given += json.loads(line.removeprefix("data: "))["choices"][0]["delta"]["content"]
        assert given == prompts.read_completion(text)
