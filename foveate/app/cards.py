"""What the playground shows of a comparison: a card for each way of answering, and charts below them."""

from __future__ import annotations

import math

from PIL import Image

from ..report import ImageReport
from ..viz.charts import layers_figure, scores_figure
from ..viz.frames import by_frame
from ..viz.overlay import panels_of
from ..viz.page import figure, picture, text
from ..viz.views import MEANINGS, NO_SCORES, VIEWS, kept
from .comparison import Comparison, Outcome, Shown

SIDE, FRAME_SIDE = 480, 240  # pixels of the longer side of a picture, and of a frame
VIEW_NAMES = tuple(VIEWS)
STYLE = """
.fv-cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 12.2rem), 1fr)); gap: 1rem; }
.fv-card { border: 1px solid var(--border-color-primary, #ccc); border-radius: .6rem; padding: .7rem; min-width: 0; }
.fv-card h3 { margin: 0 0 .3rem; font-size: 1rem; overflow-wrap: anywhere; }
.fv-answer { font-size: 1.25rem; font-weight: 650; margin: .2rem 0 .6rem; overflow-wrap: anywhere; }
.fv-same { color: #2f8f46; } .fv-other { color: #c05621; } .fv-problem { color: #c53030; overflow-wrap: anywhere; }
.fv-card img, .fv-charts img, .fv-shown img { width: 100%; height: auto; border-radius: .3rem; display: block; }
.fv-card figure, .fv-shown figure { margin: 0 0 .5rem; } .fv-card figcaption, .fv-dim { font-size: .82rem; opacity: .75; }
.fv-card dl { display: grid; grid-template-columns: auto auto; gap: .1rem .3rem; margin: .4rem 0 0; font-size: .82rem; }
.fv-card dt { white-space: nowrap; } .fv-card dd { margin: 0; text-align: right; font-variant-numeric: tabular-nums; }
.fv-strip { display: grid; grid-template-columns: repeat(auto-fill, minmax(5.5rem, 1fr)); gap: .3rem; }
.fv-charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 17rem), 1fr)); gap: 1rem; margin-top: 1rem; }
.fv-charts img { background: #fff; max-width: 34rem; } .fv-alert { border-left: 4px solid #c53030; padding: .5rem .8rem; }
"""


def alert(message: str) -> str:
    """An error in words, which screen readers say at once."""
    return f'<div role="alert" class="fv-alert">{text(message)}</div>'


def shown_html(shown: Shown) -> str:
    """The picture, or the frames of the clip, that is asked about."""
    if isinstance(shown, Image.Image):
        small = shown.copy()
        small.thumbnail((2 * SIDE, 2 * SIDE))
        return f'<div class="fv-shown">{picture(small, "the picture", "PNG" if small.width < SIDE else "JPEG")}</div>'
    panels = []
    for frame, second in zip(shown.frames, shown.seconds, strict=True):
        small = frame.copy()
        small.thumbnail((FRAME_SIDE, FRAME_SIDE))
        panels.append(_panel(small, f"{second:.2f} s"))
    return f'<div class="fv-shown fv-strip">{"".join(panels)}</div>'


def cards_html(found: Comparison, view: str) -> str:
    """The cards, each with its answer, what was kept as a ``view`` shows it, and what it cost."""
    cards = [_card(found, number, view) for number in range(len(found.outcomes))]
    notes = "".join(f'<p class="fv-dim">Note: {text(note)}.</p>' for note in found.notes)
    return f'{notes}<div class="fv-cards">{"".join(cards)}</div><p class="fv-dim">{text(view.capitalize())}: {MEANINGS[view]}.</p>'


def charts_html(found: Comparison) -> str:
    """Visual tokens by decoder layer where a method changes them there, and the sorted scores of each method that has some."""
    answers = {each.label: each.answer for each in found.outcomes if each.answer}
    charts = []
    if any(len(set(answer.layers)) > 1 for answer in answers.values()):
        charts.append(figure(layers_figure({name: answer.layers for name, answer in answers.items()}), "visual tokens by layer"))
    for name, answer in answers.items():
        scored = _scored(answer.report.images) if answer.report else None
        if scored is not None:
            charts.append(figure(scores_figure(name, scored), f"sorted scores of {name}"))
    return f'<div class="fv-charts">{"".join(f"<div>{chart}</div>" for chart in charts)}</div>' if charts else ""


def _scored(images: list[ImageReport]) -> ImageReport | None:
    """What a method scored first: before the decoder, or at its first cut inside it."""
    views = (view for image in images[:1] for view in (image, *panels_of("", image).values()))
    return next((view for view in views if view.scores is not None), None)


def _card(found: Comparison, number: int, view: str) -> str:
    outcome, full = found.outcomes[number], found.outcomes[0]
    head = f"<h3>{text(outcome.label)}</h3>"
    if outcome.answer is None:
        return f'<section class="fv-card">{head}<p class="fv-problem" role="alert">{text(outcome.problem)}</p></section>'
    same = full.answer is not None and outcome.answer.text == full.answer.text
    kind = "" if outcome is full else "fv-same" if same else "fv-other"
    hint = "" if outcome is full else ' title="as with all tokens"' if same else ' title="not as with all tokens"'
    answer = f'<p class="fv-answer {kind}"{hint}>{text(outcome.answer.text or "(no word)")}</p>'
    return f'<section class="fv-card">{head}{answer}{_pictures(found, number, view)}{_numbers(outcome, full)}</section>'


def _numbers(outcome: Outcome, full: Outcome) -> str:
    """What an answer cost, and which part of all tokens' that is."""
    answer = outcome.answer
    if answer is None:
        return ""
    whole = answer if full.answer is None else full.answer

    def with_part(shown: str, value: float | None, of: float | None) -> str:
        return shown if answer is whole or not value or not of else f"{shown} ({value / of:.0%})"

    tokens, mean = answer.visual_tokens, answer.mean_tokens
    rows = [("visual tokens", with_part(str(tokens), tokens, whole.visual_tokens))]
    if len(set(answer.layers)) > 1:
        rows += [("layer mean", with_part(f"{mean:.0f}", mean, whole.mean_tokens)), ("by layer", _steps(answer.layers))]
    cache = "not known" if answer.cache is None else _size(answer.cache)
    rows += [
        ("prefill", with_part(f"{1000 * answer.prefill:.1f} ms", answer.prefill, whole.prefill)),
        ("end to end", with_part(f"{1000 * answer.seconds:.0f} ms", answer.seconds, whole.seconds)),
        ("KV cache", with_part(cache, answer.cache, whole.cache)),
    ]
    return "<dl>" + "".join(f"<dt>{name}</dt><dd>{text(value)}</dd>" for name, value in rows) + "</dl>"


def _steps(layers: list[int]) -> str:
    """Where the number of visual tokens changes: "576, 144 from 2"."""
    steps = [f"{count} from {layer}" for layer, count in enumerate(layers) if layer and count != layers[layer - 1]]
    return ", ".join([str(layers[0]), *steps])


def _size(count: int) -> str:
    """Bytes as people read them."""
    power = min(int(math.log(max(count, 1), 1000)), 3)
    return f"{count / 1000**power:.3g} {('bytes', 'kB', 'MB', 'GB')[power]}"


def _pictures(found: Comparison, number: int, view: str) -> str:
    """What an answer kept: of a picture its stages, of a clip its frames."""
    answer = found.outcomes[number].answer
    if answer is None or answer.report is None:
        if not found.seconds:
            return _panel(_sized(found.frames[0]), "the picture as the model sees it")
        panels = [_panel(_sized(f, FRAME_SIDE), f"{s:.2f} s") for f, s in zip(found.frames, found.seconds, strict=True)]
        return f'<div class="fv-strip">{"".join(panels)}</div>'
    images = answer.report.images
    if found.seconds:
        return _strip(found, images, view)
    stages = panels_of("", images[0])
    panels = [_panel(_viewed(found.frames[0], image, view, SIDE), _caption(label, image, view)) for label, image in stages.items()]
    more = f'<p class="fv-dim">the first of {len(images)} parts of the picture</p>' if len(images) > 1 else ""
    return "".join(panels) + more


def _caption(label: str, image: ImageReport, view: str) -> str:
    """Of a panel of ``panels_of``."""
    words = label.removeprefix(": ").removeprefix(", ")
    words = words if "layer" not in words else f"from {words.partition(':')[0]} on: {image.after} tokens"
    return f"{words}; {NO_SCORES}" if _scoreless(image, view) else words


def _scoreless(image: ImageReport, view: str) -> bool:
    return image.scores is None and "scores" in view


def _viewed(frame: Image.Image, image: ImageReport, view: str, side: int) -> Image.Image:
    return (kept if _scoreless(image, view) else VIEWS[view])(frame, image, side)


def _strip(found: Comparison, images: list[ImageReport], view: str) -> str:
    """The frames of a clip, or the first of those that the encoder put together, with what stays in the last layer."""
    grids = by_frame(images, len(found.frames))
    every = -(-len(found.frames) // len(grids))
    panels = []
    for frame, second, group in zip(found.frames[::every], found.seconds[::every], grids, strict=False):
        left = [[*panels_of("", image).values()][-1] for image in group]
        seen = _sized(frame, FRAME_SIDE) if len(group) > 1 else _viewed(frame, left[0], view, FRAME_SIDE)
        panels.append(_panel(seen, f"{second:.2f} s: {sum(v.after for v in left)} of {sum(i.before for i in group)}"))
    return f'<div class="fv-strip">{"".join(panels)}</div>'


def _sized(image: Image.Image, side: int = SIDE) -> Image.Image:
    scale = side / max(image.size)
    return image.resize((max(1, round(scale * image.width)), max(1, round(scale * image.height))), Image.Resampling.LANCZOS)


def _panel(image: Image.Image, caption: str) -> str:
    return f"<figure>{picture(image, caption)}<figcaption>{text(caption)}</figcaption></figure>"
