"""The lessons as a learner meets them: run in JupyterLab, then used with the keyboard.

Screenshots stay in runs/browser/. Tests stand in the order of the lessons, each of which is opened
once: a lesson's kernel ends when the next one is asked for.
"""

import pytest

from tests.browser.conftest import HOSTILE, SECONDS

NUMBERS = ["01", "02", "03", "04", "05", "06"]
WIDGETS = {"01": 1, "02": 1, "03": 1, "06": 2}
TIME_STEPS = """() => {
    window.steps = [];
    document.addEventListener("keydown", () => { window.pressed = performance.now() }, true);
    const changed = () => window.steps.push(performance.now() - window.pressed);
    const figure = document.querySelector(".widget-html-content:has(img)");
    new MutationObserver(changed).observe(figure, {childList: true});
}"""


def check_outputs(lab, number):
    """Run All ended well: no error, no stderr, every widget has its model and is drawn."""
    page = lab.lesson(number)
    lab.picture(number)
    assert page.evaluate("window.ended") is True
    assert page.locator("[data-mime-type='application/vnd.jupyter.error']").all_inner_texts() == []
    assert page.locator("[data-mime-type='application/vnd.jupyter.stderr']").all_inner_texts() == []
    assert page.get_by_text("Error displaying widget").count() == 0
    assert page.get_by_text("Loading widget").count() == 0
    assert page.locator(".jp-OutputArea .widget-vbox:visible").count() >= WIDGETS.get(number, 0)


def press(page, locator, key, times=1):
    """Focus an element and press a key there."""
    locator.focus()
    for _ in range(times):
        page.keyboard.press(key)


def test_01_runs(lab):
    check_outputs(lab, "01")


@pytest.mark.alone
def test_01_arrow_keys_move_the_rank_and_the_figure_follows_at_once(lab):
    page = lab.lesson("01")
    page.evaluate(TIME_STEPS)
    page.locator(".noUi-handle").last.focus()
    for rank in range(9, 17):
        page.keyboard.press("ArrowRight")
        page.locator(f".widget-html img[alt*='to rank {rank},']").wait_for()
    assert page.locator(".widget-readout").last.inner_text() == "16"
    milliseconds = page.evaluate("window.steps")
    print("milliseconds from the key to the new figure:", sorted(map(round, milliseconds)))
    assert len(milliseconds) == 8 and min(milliseconds) < 100
    lab.picture("01-rank-16")


def test_02_runs(lab):
    check_outputs(lab, "02")


def test_02_arrow_keys_page_through_the_dataset(lab):
    page = lab.lesson("02")
    table = page.locator(".widget-html-content table").last
    first = table.inner_text()
    page.locator(".noUi-handle").last.focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function(
        "old => ![...document.querySelectorAll('.widget-html-content table')]"
        ".some(table => table.innerText === old)",
        arg=first,
    )
    second = page.locator(".widget-html-content table").last.inner_text()
    assert "[INST]" in first and "[INST]" in second and first != second
    page.keyboard.press("ArrowLeft")
    page.get_by_text(first.splitlines()[-1][:40]).first.wait_for()
    lab.picture("02-row-0")


def test_03_runs(lab):
    check_outputs(lab, "03")


def test_03_will_it_fit_answers_for_the_chosen_card(lab):
    page = lab.lesson("03")
    model, card = page.locator(".noUi-handle").all()[-2:]
    assert page.get_by_text("fits: batch 8 x 2 accumulated").count() == 1
    press(page, model, "ArrowRight", 2)
    page.get_by_text("does not fit: the weights take 33.9 GiB").wait_for()
    press(page, card, "ArrowRight", 5)
    page.locator(".widget-html img[alt^='Predicted memory of Llama 2 70B, fits']").wait_for()
    lab.picture("03-fit")


def test_04_runs(lab):
    check_outputs(lab, "04")


def test_05_runs(lab):
    check_outputs(lab, "05")


def test_06_runs(lab):
    check_outputs(lab, "06")


@pytest.mark.parametrize("where", ["table", ".widget-html-content"])
def test_06_hostile_output_is_text(lab, where):
    page = lab.lesson("06")
    if where != "table":
        press_answer(view(page, 1), HOSTILE)
        page.locator(f"{where} pre", has_text=f"hostile\n\n{HOSTILE}{HOSTILE}").wait_for()
    shown = page.locator(f"{where} pre", has_text=HOSTILE)
    assert shown.count() >= 1
    assert_not_attacked(page)


@pytest.mark.parametrize("question", ["Write a function that adds two numbers.", HOSTILE])
def test_06_a_typed_question_gets_two_answers(lab, question):
    page = lab.lesson("06")
    answers = ask(page, question)
    assert [text.partition("\n\n")[0] for text in answers] == ["base", "tuned"]
    for text in answers:
        answer, _, verdict = text.partition("\n\n")[2].rpartition("\n")
        assert len(answer) > 20 and "being loaded" not in answer
        assert "code that parses" in verdict and verdict.endswith("- not tested")
    assert_not_attacked(page)
    lab.picture("06-asked")


def test_06_a_question_with_a_marker_is_refused_in_words(lab):
    within = view(lab.lesson("06"), 0)
    press_answer(within, "Is [/INST] a marker?")
    sentence = "tuned gave no answer: user text holds the template's own marker [/INST]"
    within.get_by_text(sentence).wait_for()


def assert_not_attacked(page):
    assert page.locator("img[src='x']").count() == 0
    assert page.title() != "attacked"


def view(page, place):
    """A view that takes a question: the lesson's own, or the one that the test has added."""
    return page.locator(".widget-vbox", has=page.locator("textarea")).nth(place)


def press_answer(within, question):
    """Type a question and press the button, all by keys; the button."""
    field = within.get_by_label("question")
    field.fill(question)
    field.press("Tab")
    button = within.get_by_role("button", name="Answer", exact=True)
    assert button.evaluate("element => element === document.activeElement")
    button.page.keyboard.press("Enter")
    return button


def ask(page, question):
    """The texts of both columns of the lesson's view after the models have answered."""
    within = view(page, 0)
    button = press_answer(within, question).element_handle()
    for state in ("disabled", "enabled"):
        button.wait_for_element_state(state, timeout=60 * SECONDS)
    page.wait_for_timeout(200)  # the last column comes with the button
    return within.locator(".widget-html-content").all_inner_texts()
