"""``foveate bench``: what methods save on this machine, beside the unreduced model in the same rounds."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..errors import InputError
from .common import DEFAULT, POCKET, Configs, Fields, Imports, PlanFile, err, methods_of, out, sayer, wide
from .document import JsonFile, ready_json, telling
from .html import HtmlFile, lines_part, table_part, write_html

if TYPE_CHECKING:
    from ..loading import Loaded
    from ..measuring.bench import Measured, Variant
    from ..methods.base import Method

DTYPES = ("float32", "bfloat16", "float16")
QUESTION = "Describe the picture."
LEVEL, SEED = 1, 7  # of the scene that stands in for a picture
EPILOG = (
    "Examples:  foveate bench  |  foveate bench --model llava-hf/llava-1.5-7b-hf --method prumerge+ --method fastv --budget 144 "
    "--batch 1,4 --image photo.jpg --json bench.json"
)


@dataclass(frozen=True)
class BenchOptions:
    """What was asked for."""

    model: str
    methods: Mapping[str, Method]
    sizes: list[int]
    image: Path | None
    prompt: str | None
    new_tokens: int
    rounds: int
    dtype: str | None
    device: str | None
    attn: str | None
    seed: int


def bench_command(
    model: Annotated[str, typer.Option(help="Hub id, folder, pocket or pocket-qwen.")] = POCKET,
    method: Annotated[
        list[str] | None,
        typer.Option("--method", "--methods", help="Names, separated by commas; may be given again. Default: prumerge+."),
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="Visual tokens to keep, of all methods: a count (144) or a fraction (0.25).")
    ] = None,
    fields: Fields = None,
    config: Configs = None,
    plan: PlanFile = None,
    imports: Imports = None,
    batch: Annotated[str, typer.Option(help="Batch sizes: 1,4. The prompt is repeated.")] = "1",
    image: Annotated[Path | None, typer.Option(help="Picture or video; a scene of the pocket model by default.")] = None,
    prompt: Annotated[str | None, typer.Option(help="What to ask about it.")] = None,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens generated for each prompt, whatever the model says.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds; 6 or more give intervals.")] = 7,
    dtype: Annotated[str | None, typer.Option(help=f"{', '.join(DTYPES)}; as the model was saved by default.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; the GPU where there is one.")] = None,
    attn: Annotated[str | None, typer.Option("--attn", "--attention", help="eager, sdpa, flash_attention_2, ...")] = None,
    seed: Annotated[int, typer.Option(help="Of the order within rounds.")] = 0,
    json_file: JsonFile = None,
    html: HtmlFile = None,
) -> None:
    """Time, memory and the share of the possible speed-up, with and without methods, on this machine."""
    sizes = parse_sizes(batch)
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"--dtype {dtype!r}; choose one of {', '.join(DTYPES)}")
    ready_json(json_file, html, reads=[image, *(method or []), *(config or []), plan])
    methods = methods_of(method or ([] if config or plan else [DEFAULT]), budget, fields, config, plan=plan)
    options = BenchOptions(model, methods, sizes, image, prompt, new_tokens, rounds, dtype, device, attn, seed)
    with err.status("starting") as status:
        document, measured = run_bench(options, lambda what: status.update(escape(what)))
    with telling(document, json_file, lambda: show(document, measured, out)) as save:
        if html is not None:
            tables = [table_part(made) for each in measured for made in (times_table(each), ratios_table(each))]
            notes = [f"note: {line}" for line in document["notes"]]
            lines = lines_part([*remarks(document, measured), *notes])
            save(write_html, html, headline(document), [*tables, *lines], document["command"])


def parse_sizes(text: str) -> list[int]:
    """Batch sizes in the order given.

    Raises
    ------
    InputError : the text is no list of them.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts) or len(set(map(int, parts))) < len(parts):
        raise InputError(f"--batch {text!r} is no list of different batch sizes. Write whole numbers of 1 or more, such as 1,4.")
    return [int(part) for part in parts]


def load_asked(options: BenchOptions) -> Loaded:
    """The model as asked for.

    Raises
    ------
    InputError : it cannot be loaded, or there is no such device, data type or attention here.
    """
    from ..loading import load, usable_device

    device = options.device
    if device is not None and usable_device(device).type not in ("cpu", "cuda"):
        raise InputError(f"--device {device!r}: time is taken on cpu and on cuda")
    return load(options.model, dtype=options.dtype, device=device, attention=options.attn)


def shown_picture(image: Path | None, prompt: str | None) -> tuple[Any, str, str, list[str]]:
    """What is asked about, the question, what to call the picture, and notes on it."""
    from PIL import Image

    from ..answering import open_shown
    from ..pocket.questions import example

    if image is not None:
        shown, notes = open_shown(image, None)
        return shown, prompt or QUESTION, str(image), notes
    scene, question = example(LEVEL, SEED)
    return Image.fromarray(scene.image), prompt or question.text, f"scene of level {LEVEL}, seed {SEED}", []


def run_bench(options: BenchOptions, tell: Callable[[str], None]) -> tuple[dict[str, Any], list[Measured]]:
    """The ledger, and what was measured of each batch size."""
    import torch

    from ..chat import make_inputs
    from ..loading import quiet_loading
    from ..measuring import ledger
    from ..measuring.bench import WARM_UP, measure
    from ..measuring.ideal import this_machine
    from ..measuring.noise import COVERAGE
    from ..measuring.runs import check_one_device, repeated

    load_before = ledger.load_average()
    shown, question, picture, notes = shown_picture(options.image, options.prompt)
    tell("loading the model")
    loaded = load_asked(options)
    model = loaded.model
    device = check_one_device(model)
    inputs, note = make_inputs(loaded.processor, model, shown, question)
    notes += [line for line in (note, ledger.busy(load_before)) if line]
    tell("measuring the machine")
    hardware = this_machine(device, model.dtype)
    measured: list[Measured] = []
    for size in options.sizes:

        def said(what: str, done: int, total: int, size: int = size) -> None:
            tell(f"batch {size}: {what} ({done} of {total} runs)")

        try:
            with quiet_loading():  # generate has much to say about settings
                found = measure(
                    model,
                    repeated(inputs, size),
                    options.methods,
                    hardware=hardware,
                    rounds=options.rounds,
                    new_tokens=options.new_tokens,
                    seed=options.seed,
                    tell=said,
                )
        except torch.OutOfMemoryError as error:
            raise InputError(
                f"a batch of {size} does not fit into the memory of {device}. Give smaller ones with --batch."
            ) from error
        measured.append(found)
    document = {
        "benchmark": "bench",
        "command": ledger.command(),
        "date": time.strftime("%Y-%m-%d %H:%M:%S%z"),
        "versions": ledger.versions(),
        "machine": ledger.machine(device),
        "load_average": {"before": load_before, "after": ledger.load_average()},
        "hardware_measured": vars(hardware),
        "model": {
            "name": options.model,
            "type": model.config.model_type,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "dtype": str(model.dtype).removeprefix("torch."),
            "attention": model.config._attn_implementation,
        },
        "settings": {
            "picture": picture,
            "prompt": question,
            "new_tokens": options.new_tokens,
            "rounds": options.rounds,
            "warm_up": WARM_UP,
            "seed": options.seed,
            "interval": f"sign test, at least {COVERAGE:.0%}",
        },
        "batches": [each.to_dict() for each in measured],
        "notes": notes,
    }
    return document, measured


def show(document: dict[str, Any], measured: list[Measured], console: Console) -> None:
    """Print what was measured, what can be said about it, and where it comes from."""
    console = wide(console)
    say = sayer(console)
    say(headline(document), "bold")
    for each in measured:
        console.print(times_table(each))
        console.print(ratios_table(each))
    for line in remarks(document, measured):
        say(line, "dim")
    for line in document["notes"]:
        say(f"note: {line}", "yellow")


def headline(document: dict[str, Any]) -> str:
    """The model and the machine."""
    model, machine = document["model"], document["machine"]
    return (
        f"{model['name']} ({model['parameters'] / 1e6:,.4g} M parameters, {model['dtype']}, {model['attention']}) on "
        f"{machine['processor']}, {machine['threads']} threads"
    )


def remarks(document: dict[str, Any], measured: list[Measured]) -> list[str]:
    """How the tables are to be read."""
    model, machine, hardware = document["model"], document["machine"], document["hardware_measured"]
    reasons = {
        f"{v.name}: ideal by {v.ideal.by}: {v.ideal.reason}" for m in measured for v in m.methods if v.ideal and v.ideal.reason
    }
    peak = hardware["fp32"] if model["dtype"] == "float32" else hardware["fp16"]
    return [
        *sorted(reasons),
        "median [quartiles] of rounds; ratios are medians of paired rounds [interval of at least 95 %, by the sign test].",
        f"ideal: roofline of this machine, measured at {peak / 1e9:,.4g} GFLOPS and {hardware['bandwidth'] / 1e9:,.4g} GB/s; "
        "realised: speed-up / ideal speed-up, where something was gained.",
        *(
            []
            if machine["device"].startswith("cuda")
            else ["peak memory is measured on CUDA only; the KV cache is counted exactly."]
        ),
    ]


def _milliseconds(times: list[float]) -> str:
    from ..measuring.noise import quartiles

    low, middle, high = (1000 * value for value in quartiles(times))
    digits = 1 if middle >= 10 else 2
    return f"{middle:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def times_table(each: Measured) -> Table:
    """Times and memory of every way of running, side by side."""
    from ..measuring.runs import PARTS

    base = each.base
    table = Table(title=f"batch {each.batch}, {base.prompt} tokens per prompt", title_justify="left")
    table.add_column("ms")
    for variant in each.variants:
        table.add_column(escape(variant.name), justify="right", no_wrap=True)
    table.add_row("visual tokens", *(_tokens(variant, each.batch) for variant in each.variants))
    for part in PARTS:
        cells = [_milliseconds(variant.seconds(part)) if part in variant.parts else "" for variant in each.variants]
        table.add_row(f"{part}, a token" if part == "decode" else part, *cells)
    table.add_section()
    table.add_row("KV cache, MB", *(f"{variant.cache / 1e6:.3f}" for variant in each.variants))
    if base.peak is not None:
        table.add_row("peak memory, GB", *(f"{(variant.peak or 0) / 1e9:.3f}" for variant in each.variants))
    return table


def _tokens(variant: Variant, batch: int) -> str:
    """Of a prompt; the mean over decoder layers where these differ."""
    first, mean = variant.visual[0] / batch, sum(variant.visual) / len(variant.visual) / batch
    return f"{first:g}" if first == mean else f"{first:g}, mean {mean:.1f}"


def ratios_table(each: Measured) -> Table:
    """What of the times differs from the unreduced model, and how much of what is possible that is."""
    table = Table(title="beside the unreduced model", title_justify="left")
    for head in ("", "part", "time ratio", "verdict", "ideal speed-up", "realised"):
        table.add_column(head, justify="right" if head in ("time ratio", "ideal speed-up", "realised") else "left", no_wrap=True)
    for variant in each.methods:
        ideal = variant.ideal
        for number, (part, ratio) in enumerate(variant.against(each.base).items()):
            possible = None if ideal is None else ideal.ratios.get(part)
            reached = ratio.realised(possible)
            spread = "" if ratio.interval is None else " [{:.3f}, {:.3f}]".format(*ratio.interval)
            table.add_row(
                "" if number else escape(variant.name),
                part,
                f"{ratio.median:.3f}{spread}",
                _said(ratio.verdict, ratio.median),
                "" if possible is None else f"{1 / possible:.2f}x",
                "" if reached is None else "{:.0%} [{:.0%}, {:.0%}]".format(*reached),
            )
        share = variant.cache / each.base.cache
        table.add_row(
            "", "KV cache", f"{share:.3f}", "the same" if share == 1 else f"{_factor(share, 'smaller', 'larger')}, counted"
        )
        table.add_section()
    return table


def _said(verdict: str, ratio: float) -> str:
    """The verdict, with a factor only where there is a difference."""
    return _factor(ratio, "faster", "slower") if verdict in ("faster", "slower") else verdict


def _factor(ratio: float, less: str, more: str) -> str:
    """How many times less, or more."""
    return f"{1 / ratio:.2f}x {less}" if ratio < 1 else f"{ratio:.2f}x {more}"
