"""Views with a control to move, made of what ipywidgets 7.7 and 8.1 share.

Each has a static twin that its notebook shows too, for a page without a kernel shows no widget. A
picture is an `<img>` with alt text in an `HTML` widget, since an `Image` has no alt text. Whatever
comes from data or a model is escaped.
"""

import base64
import html
from collections.abc import Callable, Iterable, Sequence
from io import BytesIO

import ipywidgets
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from helpers.view import plots
from helpers.view.text_views import dataset_page, escaped, verdicts

GIB = 2**30


def figure_png(figure: Figure) -> bytes:
    """The figure as PNG bytes; closes it."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    plt.close(figure)
    return buffer.getvalue()


def image_html(png: bytes, alt: str) -> str:
    """An HTML image that carries its own data and its alternative text."""
    data = base64.b64encode(png).decode()
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}">'


def followed(draw: Callable[..., str], *controls) -> ipywidgets.VBox:
    """The controls above the HTML that `draw` makes of their values, anew when one is moved."""
    page = ipywidgets.HTML()

    def redraw(change=None):
        page.value = draw(*(control.value for control in controls))

    for control in controls:
        control.observe(redraw, names="value")
    redraw()
    return ipywidgets.VBox([*controls, page])


def rank_figure(matrix: np.ndarray, truncate: Callable, ranks: Sequence[int]) -> Figure:
    """A picture (height, width) cut to some ranks, above its singular values and its errors.

    `truncate(matrix, rank)` gives the matrix of that rank; the marks are its measured errors, the
    line is what the singular values predict.
    """
    figure = plt.figure(figsize=(7, 4))
    above, below = figure.subfigures(2, 1, height_ratios=(1, 1.5))
    pictures = {"original": matrix, **{f"rank {rank}": truncate(matrix, rank) for rank in ranks}}
    axes = above.subplots(1, len(pictures))
    for axis, (title, picture) in zip(axes, pictures.items(), strict=True):
        axis.imshow(picture, cmap="gray", vmin=matrix.min(), vmax=matrix.max())
        axis.set(title=title, xticks=[], yticks=[])
    values, (left, right) = np.linalg.svd(matrix, compute_uv=False), below.subplots(1, 2)
    percent = 100 / np.linalg.norm(matrix)
    tails = percent * np.sqrt(np.cumsum(values[::-1] ** 2)[::-1])
    left.semilogy(range(1, len(values) + 1), values)
    left.plot(ranks, values[np.array(ranks) - 1], "o", color=plots.RED)
    left.set(title="The singular values fall", xlabel="place in the order", ylabel="singular value")
    right.plot(range(len(values)), tails)
    lost = [percent * np.linalg.norm(matrix - pictures[f"rank {rank}"]) for rank in ranks]
    right.plot(ranks, lost, "o", color=plots.RED)
    right.set(title="So a low rank loses little", xlabel="rank", ylabel="error (% of the norm)")
    return figure


def rank_slider(matrix: np.ndarray, truncate: Callable, start: int = 8) -> ipywidgets.VBox:
    """A slider for the rank to which a picture is cut; its twin is `rank_figure`."""
    slider = ipywidgets.IntSlider(
        value=start, min=1, max=min(matrix.shape), description="rank", continuous_update=False
    )

    def draw(rank: int) -> str:
        cut, buffer = truncate(matrix, rank), BytesIO()
        large = np.kron(cut, np.ones((3, 3)))  # each number as 3 x 3 pixels
        plt.imsave(buffer, large, format="png", cmap="gray", vmin=matrix.min(), vmax=matrix.max())
        lost = 100 * np.linalg.norm(matrix - cut) / np.linalg.norm(matrix)
        said = f"The picture cut to rank {rank}, which loses {lost:.1f} % of the norm."
        return f"<p>{said}</p>{image_html(buffer.getvalue(), said)}"

    return followed(draw, slider)


def plan_figure(name: str, parts: dict[str, int], card: int) -> Figure:
    """The parts of a step (name -> bytes), each with its size, beside the card's room in bytes."""
    sizes = pd.Series(parts) / GIB
    title = f"{name}: {sizes.sum():.1f} of {card / GIB:.0f} GiB"
    figure, axis = plt.subplots()
    sizes.plot.barh(ax=axis, title=title, xlabel="memory (GiB)", ylabel="part of the step")
    axis.bar_label(axis.containers[0], fmt="%.2f", padding=3)
    axis.invert_yaxis()
    return figure


def will_it_fit(models: dict, cards: dict[str, int], plan: Callable) -> ipywidgets.VBox:
    """Sliders for a model (name -> its shape) and a card (name -> bytes), and the plan for both.

    `plan(shape, bytes)` says whether the model `fits`, its `advice`, and its `estimate` in `parts`,
    which are drawn. Its twin is the table of plans in notebook 03.
    """
    # Not menus: JupyterLab takes the arrow keys of a menu to move between cells. The choice stands
    # in the sentence, for beside a slider it would be cut off.
    style = {"continuous_update": False, "readout": False}
    model, card = (
        ipywidgets.SelectionSlider(options=list(names), description=what, **style)
        for what, names in (("model", models), ("card", cards))
    )

    def draw(name: str, size: str) -> str:
        found = plan(models[name], cards[size])
        advice = f"{'fits' if found.fits else 'does not fit'}: {found.advice}"
        png = figure_png(plan_figure(f"{name} on {size}", found.estimate.parts, cards[size]))
        image = image_html(png, f"Predicted memory of {name}, {advice}")
        return f"<p>{html.escape(f'{name} on {size} {advice}')}</p>{image}"

    return followed(draw, model, card)


def side_by_side(
    answerers: dict[str, Callable[[str], Iterable]], question: str = ""
) -> ipywidgets.VBox:
    """A field for a question and a button; every answerer, in turn, has a column of its own.

    It takes the question and yields its answer, whole or in pieces, and last, if it can, its
    `evaluation.Score`. Its twin is `show_side_by_side`.
    """
    # 100 % and the margin would be wider than the cell, which would cut the field's right border.
    fitted, wide = ipywidgets.Layout(width="auto"), ipywidgets.Layout(width="100%")
    field = ipywidgets.Textarea(value=question, description="question", rows=3, layout=fitted)
    button = ipywidgets.Button(description="Answer", tooltip="Send the question to each model")
    columns = {name: ipywidgets.HTML(layout=wide) for name in answerers}

    def answer(clicked=None):
        button.disabled = True
        try:
            for name, stream in answerers.items():
                text = f"{name}\n\n"
                columns[name].value = escaped(f"{text}(the model is being loaded)")
                for piece in stream(field.value):
                    text += piece if isinstance(piece, str) else f"\n\n{verdicts(piece)}"
                    columns[name].value = escaped(text)
        except Exception as error:  # raised again, but in a callback it would reach a log only
            columns[name].value = escaped(f"{name} gave no answer: {error}")
            raise
        finally:
            button.disabled = False

    button.on_click(answer)
    return ipywidgets.VBox([field, button, ipywidgets.HBox(list(columns.values()))])


def dataset_browser(rows, sources: Sequence[str], tokenizer) -> ipywidgets.VBox:
    """A slider that pages through rows, each shown by `dataset_page`, which is also its twin.

    `sources` holds the raw HTML of each row's answer, "" where there is none.
    """
    slider = ipywidgets.IntSlider(max=len(rows) - 1, description="row", continuous_update=False)
    return followed(lambda place: dataset_page(rows[place], sources[place], tokenizer), slider)
