"""``foveate cost``: operations, bytes and the least time of a run, by operator, on any processor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..analysis.hardware import HARDWARE, Hardware
from ..analysis.roofline import PARTS, Cost, Part
from ..errors import InputError, first_line
from ..jsonl import parsed
from .common import POCKET, Fields, err, method_of, out, starting, wide
from .document import JsonFile, ready_json, tell, telling
from .html import HtmlFile, lines_part, picture_part, table_part, write_html

CLOSE = 3.5  # percent
LAYERS = 10_000  # of a decoder
WIDTH = 132  # of tables that go to a file or a pipe
EPILOG = (
    "Examples:  foveate cost --visual 576,144 --hardware h100  |  foveate cost llava-hf/llava-v1.6-mistral-7b-hf --pictures 5  |  "
    "foveate cost --layers 2x576,30x288  |  foveate cost model --report report.json --text 40 --save roofline.png  |  "
    "foveate cost --table 2"
)


def cost_command(
    model: Annotated[
        str, typer.Argument(help="Hub id, folder, config file or pocket; llava-1.5-7b and -13b need no network.")
    ] = "llava-1.5-7b",
    hardware: Annotated[str, typer.Option(help=f"One of {', '.join(HARDWARE)}.")] = "a100",
    bandwidth: Annotated[float | None, typer.Option(help="GB/s of other hardware; needs --peak.")] = None,
    peak: Annotated[float | None, typer.Option(help="TFLOPS of other hardware; needs --bandwidth.")] = None,
    visual: Annotated[str | None, typer.Option(help="Visual tokens of a prompt: a count, or several to compare: 576,144.")] = None,
    layers: Annotated[str | None, typer.Option(help="Visual tokens of the decoder layers, one run more: 2x576,30x288.")] = None,
    report: Annotated[Path | None, typer.Option(help="JSON of a session.report: prices that run; needs --text.")] = None,
    text: Annotated[int | None, typer.Option(help="Other tokens of a prompt. Default: 40.")] = None,
    batch: Annotated[int | None, typer.Option(help="Prompts. Default: 1.")] = None,
    new_tokens: Annotated[int, typer.Option(help="Tokens generated for each; 1 is the prefill alone.")] = 64,
    question: Annotated[int | None, typer.Option(help="Text tokens that the decoder reads alone first, as for quecc.")] = None,
    method: Annotated[str | None, typer.Option(help="Counts what a method itself does, too, and the tokens it leaves.")] = None,
    budget: Annotated[str | None, typer.Option(help="Of --method: visual tokens to keep, a count or a share.")] = None,
    fields: Fields = None,
    exits: Annotated[
        str | None, typer.Option(help="Shares of prompts whose visual tokens leave before a layer, as for dyvte: 2:0.4,5:0.3.")
    ] = None,
    pictures: Annotated[int | None, typer.Option(help="Pictures, tiles or frames of a prompt. Default: 1.")] = None,
    patches: Annotated[int | None, typer.Option(help="Patches of a picture, for encoders that take any size.")] = None,
    dtype: Annotated[str, typer.Option(help="float16, bfloat16 or float32.")] = "float16",
    weight_bits: Annotated[float | None, typer.Option(help="Of the decoder's matrices. Default: those of --dtype.")] = None,
    activation_bits: Annotated[float | None, typer.Option(help="Of the decoder's activations.")] = None,
    kv_bits: Annotated[float | None, typer.Option(help="Of the key-value cache.")] = None,
    flash: Annotated[bool, typer.Option("--flash/--no-flash", help="Fused attention.")] = True,
    convention: Annotated[str, typer.Option(help="foveate, or llm-viewer for the formulas of that tool.")] = "foveate",
    operators: Annotated[bool, typer.Option("--operators/--no-operators", help="List every operator of each run.")] = True,
    save: Annotated[Path | None, typer.Option(help="Write the roofline as a PNG.")] = None,
    html: HtmlFile = None,
    table: Annotated[int | None, typer.Option(help="Table 2 of the LLaVA-PruMerge paper beside ours, instead.")] = None,
    json_file: JsonFile = None,
) -> None:
    """What a run costs at least, from the config alone: FLOPs, bytes and time of every operator."""
    if table is not None:
        given = (bandwidth, peak, visual, layers, report, text, batch, question, method, budget, fields, exits, pictures, patches)
        if any(each is not None for each in (*given, weight_bits, activation_bits, kv_bits, save, html)):
            raise InputError("--table brings its own numbers, and is printed, or written by --json. Leave out the other options.")
        _paper_table(table, json_file, out)
        return
    with starting():
        from ..analysis.configs import read_architecture
        from ..analysis.cost import cost
        from ..loading import quiet_loading, source_of
        from ..measuring.ledger import command
        from ..viz.overlay import picture_file

    save = save and picture_file(save)
    ready_json(json_file, save, html, reads=[model, method, report])
    options: dict[str, Any] = {
        "hardware": _hardware(hardware, bandwidth, peak),
        "text": text,
        "new_tokens": new_tokens,
        "dtype": dtype,
        "weight_bits": weight_bits,
        "activation_bits": activation_bits,
        "kv_bits": kv_bits,
        "flash": flash,
        "convention": convention,
    }
    if question is not None:
        options["question"] = question
    acting = None if method is None else method_of(method, budget, fields)
    if acting is None and (budget is not None or fields):
        raise InputError("--budget and --set belong to --method. Name one.")
    runs = _asked(visual, layers) if report is None else _reported(report, visual, layers)
    with err.status(escape(f"reading the config of {model}")), quiet_loading(bars=False):
        shape = read_architecture(source_of(model) if model.startswith(POCKET) else model)
    options |= {"batch": batch, "pictures": pictures, "patches": patches}
    costs = {name: cost(shape, **{**options, **numbers}) for name, numbers in runs.items()}
    more: dict[str, Any] = {} if acting is None else {"method": acting}
    more |= {} if exits is None else {"exits": parse_exits(exits)}
    if more and report is not None:
        raise InputError("a report is about one run of one method. Leave out --method and --exits.")
    if more:
        name = "exits" if acting is None else acting.name
        counted = [] if visual is None else [numbers["visual"] for numbers in runs.values() if isinstance(numbers["visual"], int)]
        if not counted:
            costs[name] = cost(shape, **{**options, **more})
        for count in counted:
            costs[f"{name}, {count}"] = cost(shape, **{**options, **more, "visual": count})
    document = {"runs": {name: each.to_dict() for name, each in costs.items()}, "picture": str(save) if save else None}
    with telling(document, json_file, lambda: show(costs, wide(out, WIDTH), operators)) as keep:
        if save:
            from ..viz.roofline_chart import save_roofline

            if keep(save_roofline, costs, save):
                err.print(f"picture: {save}", soft_wrap=True, markup=False)
        if html:
            keep(write_html, html, headline(costs), page_parts(costs), command())


def _hardware(name: str, bandwidth: float | None, peak: float | None) -> str | Hardware:
    """A row of the table, or what the user describes."""
    if bandwidth is None and peak is None:
        return name
    if bandwidth is None or peak is None:
        raise InputError("other hardware needs both --bandwidth (GB/s) and --peak (TFLOPS)")
    return Hardware("custom", 1e9 * bandwidth, 1e12 * peak, 1e12 * peak)


def _asked(visual: str | None, layers: str | None) -> dict[str, dict[str, Any]]:
    """Runs by the numbers of visual tokens, by name."""
    runs: dict[str, dict[str, Any]] = {}
    for part in visual.split(",") if visual is not None else []:
        if not part.strip().isdecimal():
            raise InputError(f"--visual {visual!r} is no count of tokens. Give a whole number, or several such as 576,144.")
        runs[f"{int(part)} visual tokens"] = {"visual": int(part)}
    if layers is not None:
        runs[f"layers {layers}"] = {"visual": parse_layers(layers)}
    return runs or {"all visual tokens": {}}


def parse_layers(text: str) -> list[int]:
    """The numbers that "2x576,30x288" stands for.

    Raises
    ------
    InputError : the text is no such list.
    """
    counts: list[int] = []
    for part in text.replace(" ", "").split(","):
        times, cross, number = part.rpartition("x")
        if not number.isdecimal() or (cross and not times.isdecimal()):
            raise InputError(f"--layers {text!r} is no list of visual tokens. Write layers x tokens, such as 2x576,30x288.")
        if cross and len(counts) + int(times) > LAYERS:
            raise InputError(f"--layers {text!r} are more than {LAYERS} decoder layers, which no model has.")
        counts += [int(number)] * (int(times) if cross else 1)
    return counts


def parse_exits(text: str) -> dict[int, float]:
    """The shares that "2:0.4,5:0.3" stands for.

    Raises
    ------
    InputError : the text is no such list.
    """
    found: dict[int, float] = {}
    for part in text.replace(" ", "").split(","):
        layer, _, share = part.partition(":")
        try:
            read = int(layer), float(share)
        except ValueError as error:
            raise InputError(f"--exits {text!r} is no list of exits. Write layer:share, such as 2:0.4,5:0.3.") from error
        if read[0] in found:
            raise InputError(f"--exits {text!r} names layer {read[0]} twice. Give the sum of both shares.")
        found[read[0]] = read[1]
    return found


def _reported(path: Path, visual: str | None, layers: str | None) -> dict[str, dict[str, Any]]:
    """The run of a report, and the same one with all of its visual tokens."""
    from ..analysis.workload import unreduced

    if visual is not None or layers is not None:
        raise InputError("a report brings its own visual tokens. Leave out --visual and --layers.")
    try:
        document = parsed(path.read_text())
        runs = {
            "all visual tokens": {"report": unreduced(document), "patches": None},
            document["method"]["name"]: {"report": document},
        }
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise InputError(f"{path} is no report of a session ({reason}). Write one with session.report.to_json().") from error
    return runs


def show(costs: Mapping[str, Cost], console: Console, operators: bool = True) -> None:
    """Print what the runs cost side by side, and the operators of each."""
    console.print(headline(costs), style="bold", markup=False, soft_wrap=True)
    console.print(summary(costs))
    console.print(remark(costs), style="dim", soft_wrap=True)
    for name, each in costs.items() if operators else ():
        console.print(operator_table(name, each))


def headline(costs: Mapping[str, Cost]) -> str:
    """The model, the processor and the prompt."""
    first = next(iter(costs.values()))
    work, hardware = first.work, first.hardware
    about = (
        f"{first.model} on {hardware.name} ({hardware.bandwidth / 1e9:,.5g} GB/s, {hardware.fp16 / 1e12:,.4g} TFLOPS in 16 bits)"
    )
    return f"{about}: batch {work.run.batch}, {work.text} text tokens, {work.new_tokens} new"


def page_parts(costs: Mapping[str, Cost]) -> list[str]:
    """What stands on a page: the summary, the roofline where it can hold all runs, every operator."""
    from ..viz.roofline_chart import COLORS, roofline_figure

    drawn = [picture_part(lambda: roofline_figure(costs), "roofline")] if len(costs) <= len(COLORS) else []
    operators = [table_part(operator_table(name, each)) for name, each in costs.items()]
    return [table_part(summary(costs)), *lines_part([remark(costs)]), *drawn, *operators]


def remark(costs: Mapping[str, Cost]) -> str:
    """How the numbers are to be read."""
    below = (
        "LLM-Viewer's formulas: decoder only."
        if next(iter(costs.values())).work.convention == "llm-viewer"
        else "The least time of operators that run one by one."
    )
    counted = any(each.work.own for each in costs.values())
    rest = f"Launching kernels, and choosing tokens{' inside encoder and decoder' if counted else ''},"
    return f"{below} {rest} comes on top."


def operator_table(name: str, each: Cost) -> Table:
    """Every operator of a run, by phase and part; those of the decode summed over its steps."""
    table = Table(title=escape(name), title_justify="left", box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=0)
    for head in ("operator", "GFLOPs", "weights\nMB", "activ.\nMB", "cache\nMB", "FLOPs\n/byte", "ms", "bound by"):
        table.add_column(head, justify="left" if head in ("operator", "bound by") else "right", no_wrap=True)
    for phase in ("prefill", "decode"):
        steps = f" x{each.work.new_tokens - 1}" if phase == "decode" else ""
        for part in PARTS:
            lines = each.select(phase, part)
            if not lines:
                continue
            table.add_section()
            total = f"[bold]{_time(each.total('seconds', phase, part))}[/bold]"
            table.add_row(
                f"[bold]{phase}{steps}: {part}[/bold]",
                f"[bold]{_short(each.total('flops', phase, part) / 1e9)}[/bold]",
                *[""] * 4,
                total,
            )
            for line in lines:
                moved = (line.weights, line.loads + line.stores, line.cache_loads + line.cache_stores)
                sizes = [_short(size / 1e6) if size else "" for size in moved]
                numbers = (_short(line.flops / 1e9), *sizes, _short(line.intensity), _time(line.seconds), line.bound)
                table.add_row(f"  {line.name}", *numbers)
    return table


def _short(value: float) -> str:
    """In eight characters at most, with three digits that say something."""
    if value >= 1e6:
        return f"{value:.3g}"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 100 else f"{value:.2f}"


def _time(seconds: float) -> str:
    """In ms."""
    return f"{1e3 * seconds:.3f}" if seconds < 1 else _short(1e3 * seconds)


def summary(costs: Mapping[str, Cost]) -> Table:
    """Runs side by side; what differs from the first one, with the factor."""
    table = Table(title="side by side" if len(costs) > 1 else None, title_justify="left")
    table.add_column("")
    for name in costs:
        table.add_column(escape(name), justify="right")
    first = next(iter(costs.values()))
    runs = list(costs.values())

    def add(label: str, values: list[float], digits: int = 3) -> None:
        shown = (f"{value:,.{digits}f}" if not value or value >= 0.1 else f"{value:.3g}" for value in values)
        table.add_row(label, *(text + _factor(values[0], value) for text, value in zip(shown, values, strict=True)))

    shown: list[Part] = [part for part in PARTS if any(run.select("prefill", part) for run in runs)]
    add("visual tokens, mean over layers", [sum(run.work.run.visual) / len(run.work.run.visual) for run in runs], 1)
    for name, label, scale in (("flops", "TFLOPs", 1e12), ("bytes", "GB moved", 1e9), ("seconds", "ms", 1e-3)):
        table.add_section()
        for part in shown:
            add(f"prefill {label}: {part}", [run.total(name, "prefill", part) / scale for run in runs])
        if len(shown) > 1:
            add(f"prefill {label}", [run.total(name, "prefill") / scale for run in runs])
    if first.work.new_tokens > 1:
        add("ms per new token", [1e3 * run.token_seconds for run in runs])
        add(f"ms for {first.work.new_tokens} new tokens", [1e3 * (run.prefill_seconds + run.decode_seconds) for run in runs], 1)
    table.add_section()
    add("memory GB: weights", [sum(run.weights.values()) / 1e9 for run in runs])
    add("memory GB: KV cache", [run.kv_cache / 1e9 for run in runs])
    add("memory GB: activations", [run.activations / 1e9 for run in runs])
    add("memory GB", [run.footprint / 1e9 for run in runs])
    return table


def _factor(first: float, value: float) -> str:
    """How much less, or more, than the first."""
    if not first or not value or 0.995 < value / first < 1.005:
        return ""
    return f" ({first / value:.3g}x less)" if value < first else f" ({value / first:.3g}x more)"


def _paper_table(number: int, json_file: Path | None, console: Console) -> None:
    """Table 2 of the paper beside ours."""
    from ..analysis.table2 import table2

    if number != 2:
        raise InputError(f"there is no cost table {number} in the paper; --table 2 is the one. foveate compare --table has others.")
    ready_json(json_file)
    document = table2()
    tell(document, json_file, lambda: _show_paper_table(document, console))


def _show_paper_table(document: dict[str, Any], console: Console) -> None:
    from ..analysis.table2 import COLUMNS, ROWS

    table = Table(title="LLaVA-PruMerge, Table 2: paper / ours", title_justify="left")
    for head in ("method", "LLM", "bits", "tokens", *COLUMNS.values()):
        table.add_column(head, justify="left" if head in ("method", "LLM", "bits") else "right")
    for row, found in zip(ROWS, document["rows"], strict=True):
        cells = []
        for printed, name in zip(row.printed, COLUMNS, strict=True):
            digits, off = len(printed.partition(".")[2]) + 1, abs(found["difference_percent"][name]) > CLOSE
            cells.append(f"{printed} / {found['ours'][name]:.{digits}f}{' *' if off else ''}")
        table.add_row(row.method, f"Vicuna-{row.backbone}", row.quantization, str(row.tokens), *cells)
    console = wide(console, WIDTH)
    console.print(table)
    console.print(f"* more than {CLOSE} % apart", style="dim")
    console.print(document["explanation"])
