"""The page of the playground in Gradio: what can be chosen, and what happens then."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr

from ..errors import FoveateError, first_line
from ..lab.examples import examples
from ..methods.registry import methods
from ..pocket.worlds import world_of
from ..viz.page import text
from .cards import VIEW_NAMES, alert, cards_html, charts_html, shown_html
from .comparison import LONGEST, MOST, Choice, Comparison, Playground, Shown, open_upload

NONE = "none"
DEFAULTS = (("prumerge+", 0), ("fovea", 10), (NONE, 25))  # methods and percent at the start
SESSIONS = 32  # whose pictures and answers are remembered
FORGOTTEN = 1800  # seconds until those are forgotten
WAITING = 32  # questions in the queue
ABOUT = (
    "# foveate playground\n"
    "One question, answered with **all** visual tokens and with **fewer**. Load a picture or a clip, or draw a scene. Each method "
    "keeps the share that its slider says; 0 is the method's own rule. Times are measured now, on this machine."
)
HINTS = {
    "pocket": "This model knows drawn scenes only. Ask in its words: what color is the star ?",
    "native": "This model knows drawn pictures and clips only. Ask in its words: what color is the ring ?",
}
DRAWN = "Drawn scenes are what the pocket models know, and not this model; its answer may still be right."


def build(playground: Playground) -> gr.Blocks:
    """The page.

    Parameters
    ----------
    playground : the models, and what answers.
    """
    names = [info.name for info in methods() if not info.problem]
    models = [*playground.models]
    with gr.Blocks(
        title="foveate playground", analytics_enabled=False, fill_width=True, delete_cache=(FORGOTTEN // 2, FORGOTTEN)
    ) as blocks:
        shown = gr.State(None, time_to_live=FORGOTTEN)
        found = gr.State(None, time_to_live=FORGOTTEN)
        gr.Markdown(ABOUT)
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                model = gr.Dropdown(models, value=models[0], label="Model", visible=len(models) > 1, elem_id="model")
                file = gr.File(
                    label="Picture or clip: click, or drop a file",
                    file_types=["image", "video"],
                    height=160,
                    elem_id="file",
                )
                surprise = gr.Button("Surprise me: draw a scene", elem_id="surprise")
                preview = gr.HTML(elem_id="preview")
                question = gr.Textbox(label="Question", max_length=LONGEST, lines=1, elem_id="question")
                ask = gr.Button("Ask", variant="primary", elem_id="ask")
                told = gr.HTML(elem_id="told")
            with gr.Column(scale=4, min_width=300):
                with gr.Row():
                    chosen = [_method_box(number, names) for number in range(MOST)]
                view = gr.Radio([*VIEW_NAMES], value=VIEW_NAMES[0], label="Kept tokens, shown as", elem_id="view")
                cards = gr.HTML(elem_id="cards")
                charts = gr.HTML(elem_id="charts")
        fields = [field for pair in chosen for field in pair]
        answered, drawn = [found, cards, charts, told], [shown, preview, question, file]

        def answer(name: str, picture: Shown | None, asked: str, look: str, *given: Any) -> tuple[Any, ...]:
            def run() -> tuple[Any, ...]:
                pairs = zip(given[::2], given[1::2], strict=True)
                choices = [Choice(method, share / 100 if share else None) for method, share in pairs if method and method != NONE]
                result = playground.compare(name, picture, asked, choices)
                return result, cards_html(result, look), charts_html(result), ""

            return _told(run, lambda words: (None, "", "", alert(words)))

        def draw(name: str) -> tuple[Any, ...]:
            loaded = playground.loaded(name)
            _, picture, asked = secrets.choice(examples(loaded, secrets.randbelow(2**31)))
            world = world_of(loaded.processor)
            note = HINTS[world] if world else DRAWN
            return picture, shown_html(picture) + f'<p class="fv-dim">{note}</p>', asked.text, None

        def load(path: str) -> tuple[Any, ...]:
            def run() -> tuple[Any, ...]:
                picture, notes = open_upload(Path(path))
                told = "".join(f'<p class="fv-dim">{text(note)}.</p>' for note in notes)
                return picture, shown_html(picture) + told, None, "", "", ""

            return _told(run, lambda words: (None, "", None, "", "", alert(words)))

        def answer_loaded(name: str, picture: Shown | None, asked: str, *others: Any) -> Any:
            """Where a picture was loaded and there is a question already."""
            return answer(name, picture, asked, *others) if picture is not None and asked.strip() else [gr.skip()] * len(answered)

        def look_again(result: Comparison | None, look: str) -> Any:
            return gr.skip() if result is None else cards_html(result, look)

        inputs = [model, shown, question, view, *fields]
        private: dict[str, Any] = {"api_visibility": "private"}
        asking: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1, "show_progress_on": cards, **private}
        triggers = [ask.click, question.submit]
        gr.on(triggers, answer, inputs, answered, **asking)
        gr.on([field.change for field in fields], answer, inputs, answered, trigger_mode="always_last", **asking)
        for trigger in (surprise.click, model.change, blocks.load):
            trigger(draw, model, drawn, **private).then(answer, inputs, answered, **asking)
        file.upload(load, file, [shown, preview, *answered], **private).then(answer_loaded, inputs, answered, **asking)
        view.change(look_again, [found, view], cards, trigger_mode="always_last", **private)
    blocks.queue(max_size=WAITING, api_open=False)
    blocks.state_session_capacity = SESSIONS
    return blocks


def _method_box(number: int, names: list[str]) -> tuple[gr.Dropdown, gr.Slider]:
    """Where one method and its budget are chosen."""
    name, percent = DEFAULTS[number]
    with gr.Column(min_width=200):
        choices = names if number == 0 else [NONE, *names]
        method = gr.Dropdown(choices, value=name, label=f"Method {number + 1}", elem_id=f"method-{number + 1}")
        share = gr.Slider(0, 100, percent, step=1, label="Tokens kept, % (0: own rule)", elem_id=f"share-{number + 1}")
    return method, share


def _told(run: Callable[[], tuple[Any, ...]], otherwise: Callable[[str], tuple[Any, ...]]) -> tuple[Any, ...]:
    """What ``run`` returns, or its error in words."""
    try:
        return run()
    except FoveateError as error:
        return otherwise(str(error))
    except MemoryError:
        return otherwise("there is not enough memory for this. Take a smaller picture.")
    except Exception as error:  # whatever a model makes of an odd picture
        return otherwise(f"{type(error).__name__}: {first_line(error)}")
