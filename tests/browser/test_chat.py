"""The page of `make chat`: one question, two answers side by side, each shown as text."""

import threading

import pytest

pytest.importorskip("uvicorn", reason="make serving")

import uvicorn
from transformers import GenerationConfig

from helpers.serving import server
from tests.browser.conftest import HOSTILE, SCREENSHOTS, SECONDS


class Parrot:
    """A model that writes what it is given, behind transformers' real server.

    In whole pieces: cut into tokens, a tag would reach the page in parts, and be harmless anyway.
    """

    device, config = "cpu", GenerationConfig()
    config.model_type = "parrot"

    def __init__(self, tokenizer, pieces: list[str]):
        self.tokenizer, self.pieces = tokenizer, pieces
        self.generation_config = GenerationConfig()

    def conversation(self, messages):
        assert [message["role"] for message in messages] == ["user"]
        if "mark" in messages[0]["content"]:
            raise ValueError(f"a message holds {HOSTILE}")
        return messages

    def generate(self, input_ids, streamer, **options):
        streamer.put(input_ids)
        for piece in self.pieces:
            streamer._enqueue(piece)
        if self.pieces == ["breaks"]:
            raise RuntimeError("no memory left")
        streamer.end()


@pytest.fixture(scope="module")
def url(tokenizer):
    answers = {"base": [HOSTILE], "tuned": [" 1. Steps\n", "\n", HOSTILE], "broken": ["breaks"]}
    models = {name: Parrot(tokenizer, pieces) for name, pieces in answers.items()}
    settings = uvicorn.Config(server.application(models, 50), port=0, log_level="warning")
    running = uvicorn.Server(settings)
    thread = threading.Thread(target=running.run)
    thread.start()
    while not running.started:
        thread.join(0.05)
        assert thread.is_alive()
    host, port = running.servers[0].sockets[0].getsockname()
    yield f"http://{host}:{port}"
    running.should_exit = True
    thread.join(20)


@pytest.fixture
def page(browser, url):
    page = browser.new_page()
    page.set_default_timeout(30 * SECONDS)
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(url)
    yield page
    page.close()
    assert errors == []


def ask(page, question):
    """Type a question and press the button, by keys alone; the answers by name."""
    page.evaluate("document.querySelectorAll('pre').forEach(each => each.textContent = '')")
    page.get_by_label("Question").fill(question)
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.locator("button:enabled").wait_for()
    return {
        name: page.get_by_label(f"answer of {name}").inner_text()
        for name in page.locator("h2").all_inner_texts()
    }


def test_both_answers_are_shown_as_text_side_by_side(page):
    page.locator("h2").nth(2).wait_for()
    answers = ask(page, HOSTILE)
    assert answers["base"] == HOSTILE and answers["tuned"] == f"1. Steps\n\n{HOSTILE}"
    assert page.locator("img").count() == page.locator("pre b").count() == 0
    assert page.title() == "One question, every model"
    left, right = (page.locator("section").nth(place).bounding_box() for place in (0, 1))
    assert left["y"] == right["y"] and left["x"] + left["width"] <= right["x"]
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / "chat.png")


def test_an_error_stands_where_the_answer_would(page):
    page.locator("h2").nth(2).wait_for()
    assert ask(page, "Why?")["broken"] == "breaks\nstopped: no memory left"
    refused = ask(page, "What is a mark?")
    assert refused["base"] == f"no answer: a message holds {HOSTILE}"
    assert page.locator("img").count() == 0
