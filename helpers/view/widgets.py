"""Views with a control to move, made of what ipywidgets 7.7 and 8.1 share.

Each view has a static twin: the same figure, drawn by the same function for a few fixed settings.
A notebook shows both, for a page without a kernel shows no widget. A view holds its picture as an
`<img>` with alt text in an `HTML` widget (`Image` has no alt text), so moving the control adds
nothing to the notebook's output. Whatever comes from data or a model is escaped. No lesson lives
here.
"""

import base64
import html
from collections.abc import Callable, Iterable, Sequence
from io import BytesIO

import ipywidgets
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.artist import Artist
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from helpers.view import plots
from helpers.view.text_views import answer_html, badges_html, dataset_page, escaped

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


def rank_figure(matrix: np.ndarray, truncate: Callable, ranks: Sequence[int]) -> Figure:
    """A picture (height, width) cut to some ranks, above its singular values and its errors.

    `truncate(matrix, rank)` gives the matrix of that rank; the marks are its measured errors, the
    line is what the singular values predict. ValueError for a rank outside 1..min(height, width).
    """
    if not all(1 <= rank <= min(matrix.shape) for rank in ranks):
        raise ValueError(
            f"ranks {list(ranks)} must lie in 1..{min(matrix.shape)} for shape {matrix.shape}"
        )
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
    """A slider that redraws `rank_figure` for one rank; its twin is `rank_figure` for four."""
    slider = ipywidgets.IntSlider(
        value=start, min=1, max=min(matrix.shape), description="rank", continuous_update=False
    )
    figure, image = rank_figure(matrix, truncate, [start]), ipywidgets.HTML()
    _, picture, spectrum, error = figure.axes
    point, mark = spectrum.lines[-1], error.lines[-1]
    draw_over = _background(figure, [picture, point, mark])
    singular_values = np.linalg.svd(matrix, compute_uv=False)

    def redraw(change=None):
        rank, cut = slider.value, truncate(matrix, slider.value)
        lost = 100 * np.linalg.norm(matrix - cut) / np.linalg.norm(matrix)
        picture.images[0].set_data(cut)
        picture.set_title(f"rank {rank}")
        point.set_data([rank], [singular_values[rank - 1]])
        mark.set_data([rank], [lost])
        alt = f"The picture beside its cut to rank {rank}, which loses {lost:.1f} % of the norm."
        image.value = image_html(draw_over(), alt)

    slider.observe(redraw, names="value")
    redraw()
    return ipywidgets.VBox([slider, image])


def _background(figure: Figure, moving: Sequence[Artist]) -> Callable[[], bytes]:
    """Draw all of a figure but its moving artists once; the function returned adds them, as PNG.

    A step takes 10 ms so, and 170 ms with a new figure. pyplot forgets the figure.
    """
    plt.close(figure)
    canvas = FigureCanvasAgg(figure)
    for artist in moving:
        artist.set_animated(True)  # that is, not drawn with the rest
    canvas.draw()
    background = canvas.copy_from_bbox(figure.bbox)

    def draw_over() -> bytes:
        canvas.restore_region(background)
        for artist in moving:
            figure.draw_artist(artist)
        buffer = BytesIO()
        pixels = np.asarray(canvas.buffer_rgba())[..., :3]
        # Not by imsave, which adds an alpha channel and takes longer.
        Image.fromarray(pixels).save(buffer, "png", compress_level=1)
        return buffer.getvalue()

    return draw_over


def fit_figure(steps: dict[str, dict[str, int]], cards: Sequence[int], title="") -> Figure:
    """For each step (name -> part -> bytes) its parts, laid end to end, and its card, in bytes."""
    figure, axes = plt.subplots(1, len(steps), figsize=(7, 3.2), sharey=True, squeeze=False)
    for axis, (name, parts), card in zip(axes[0], steps.items(), cards, strict=True):
        sizes = np.array(list(parts.values())) / GIB
        ends = np.cumsum(sizes)
        axis.barh(list(parts), sizes, left=ends - sizes, color=plots.BLUE)
        for place, (size, end) in enumerate(zip(sizes, ends, strict=True)):
            axis.annotate(f" {size:.2f}", (end, place), va="center", fontsize=9)
        axis.axvline(card / GIB, color=plots.RED, linestyle="--")
        axis.set(title=f"{name}: {ends[-1]:.1f} GiB", xlabel="memory (GiB); dashed: the card")
        axis.set_xlim(0, 1.25 * max(card / GIB, ends[-1]))
    figure.suptitle(title, fontsize=11)
    axes[0][0].set_ylabel("part of the step")
    axes[0][0].invert_yaxis()
    return figure


def will_it_fit(models: dict, cards: dict[str, int], plan: Callable) -> ipywidgets.VBox:
    """Sliders for a model (name -> its shape) and a card (name -> bytes), and the plan for both.

    `plan(shape, bytes)` says whether the model `fits`, its `advice`, and its `estimate` in `parts`,
    which are drawn. Its twin is `fit_figure`.
    """
    # Not menus: JupyterLab takes the arrow keys of a menu to move between cells. The choice stands
    # in the sentence, for beside a slider it would be cut off.
    style = {"continuous_update": False, "readout": False}
    model, card = (
        ipywidgets.SelectionSlider(options=list(names), description=what, **style)
        for what, names in (("model", models), ("card", cards))
    )
    image, sentence = ipywidgets.HTML(), ipywidgets.HTML()

    def redraw(change=None):
        found = plan(models[model.value], cards[card.value])
        advice = ("fits: " if found.fits else "does not fit: ") + found.advice
        name = f"{model.value} on {card.value}"
        png = figure_png(fit_figure({name: found.estimate.parts}, [cards[card.value]]))
        image.value = image_html(png, f"Predicted memory of {model.value}, {advice}")
        sentence.value = html.escape(f"{name} {advice}")

    for slider in (model, card):
        slider.observe(redraw, names="value")
    redraw()
    return ipywidgets.VBox([ipywidgets.HBox([model, card]), sentence, image])


def side_by_side(
    answerers: dict[str, Callable[[str], Iterable]], question: str = ""
) -> ipywidgets.VBox:
    """A field for a question and a button; every answerer streams into a column of its own.

    An answerer takes the question and yields its answer piece by piece, and last, if it can, its
    `evaluation.Score`. One after the other, so that they do not compete for the processor. Its twin
    is `show_side_by_side`.
    """
    # 100 % and the margin would be wider than the cell, which would cut the field's right border.
    fitted, wide = ipywidgets.Layout(width="auto"), ipywidgets.Layout(width="100%")
    field = ipywidgets.Textarea(value=question, description="question", rows=3, layout=fitted)
    button = ipywidgets.Button(description="Answer", tooltip="Send the question to each model")
    columns = {name: ipywidgets.HTML(layout=wide) for name in answerers}

    def answer(clicked=None):
        button.disabled = True
        try:
            for column in columns.values():
                column.value = ""
            for name, stream in answerers.items():
                text, marks = f"{name}\n\n", ""
                columns[name].value = escaped(f"{text}(the model is being loaded)")
                for piece in stream(field.value):
                    if isinstance(piece, str):
                        text += piece
                    else:
                        marks = badges_html(piece)
                    columns[name].value = answer_html(text) + marks
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
    slider = ipywidgets.IntSlider(
        value=0, min=0, max=len(rows) - 1, description="row", continuous_update=False
    )
    page = ipywidgets.HTML()

    def redraw(change=None):
        page.value = dataset_page(rows[slider.value], sources[slider.value], tokenizer)

    slider.observe(redraw, names="value")
    redraw()
    return ipywidgets.VBox([slider, page])
