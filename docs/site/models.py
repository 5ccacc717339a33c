"""A page for each of the models that most people use: what is the same for all stands once, here."""

from __future__ import annotations

from dataclasses import dataclass

from foveate.api import ModelInfo
from foveate.api import models as families

GATEWAY = """```bash
foveate export {example} text-model   # once: the language model, checked
vllm serve text-model --enable-prompt-embeds --chat-template-content-format openai \\
  --host 127.0.0.1 --port 8001
foveate serve --model {example} \\
  --method {method} --budget {budget} --vllm-url http://127.0.0.1:8001
```

Clients speak OpenAI's API and may choose method and budget per request: [serving](../serving.md). For files of questions:
`foveate batch questions.jsonl answers.jsonl --model {example} --engine vllm` ([batch](../batch.md))."""
INSIDE = """

With one count for all pictures, [the plugin](../plugin.md) works inside vLLM, without a gateway:

```bash
vllm serve {example} --trust-request-mm-kwargs \\
  --hf-overrides '{{"foveate": {{"method": "{method}", "budget": 144}}}}'
```"""
PLACED = """foveate and vLLM share the work. vLLM has foveate's plugin and loads no vision encoder:

```bash
vllm/bin/pip install foveate   # into the environment of vLLM, which finds the plugin by itself
vllm serve {example} --enable-mm-embeds \\
  --limit-mm-per-prompt '{{"image": 0, "video": 0}}' \\
  --chat-template-content-format openai --host 127.0.0.1 --port 8001
foveate serve --model {example} \\
  --method {method} --budget {budget} --vllm-url http://127.0.0.1:8001
```

Tokens that stay keep their (t, h, w) positions: [serving](../serving.md#qwen2-vl-qwen25-vl-and-qwen3-vl).
Without a server, [the plugin](../plugin.md#embeddings-for-qwen2-vl-qwen25-vl-and-qwen3-vl) takes encoded pictures:

```python
import vllm
from foveate.serving.plugin import qwen_request

encoded = foveate.encode(model, "{method}", budget={budget}, **inputs)
llm = vllm.LLM("{example}", enable_mm_embeds=True)
# text: the prompt as the chat template writes it
llm.generate({{"prompt": text, "multi_modal_data": qwen_request(encoded)}})
```"""
VLLM = (GATEWAY, GATEWAY + INSIDE, PLACED)  # others give the reason
NONE = "Not yet: {reason}. Use transformers, or `foveate batch` with its own engine ([batch](../batch.md))."
TEXT = """# {name}

| | |
|---|---|
| one of its models | `{example}` (`config.model_type` is `{kind}`) |
| a picture is | {picture} |
| videos | {videos} |
| tokens merge | {merging} |
| methods inside the vision encoder | {encoder} |
| [CLS] | {cls} |
| positions | {positions} |
| transformers | {since} or newer |

## Use it

```python
import foveate
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

name = "{example}"
model = AutoModelForImageTextToText.from_pretrained(name, dtype="auto", device_map="auto")  # needs accelerate
processor = AutoProcessor.from_pretrained(name)
content = [
    {{"type": "image", "image": Image.open("photo.jpg")}},
    {{"type": "text", "text": "What is on the table?"}},
]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": content}}],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
).to(model.device)

with foveate.get("{method}", budget={budget})(model) as session:
    out = model.generate(**inputs, max_new_tokens=64)
print(processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
print(session.report)
```

From the terminal:

```bash
foveate ask photo.jpg "What is on the table?" --model {example} \\
  --method {method} --budget {budget} --save kept.png
foveate tune --model {example} --data examples.jsonl --tolerance 1
```

## Budgets

{budgets}

## With vLLM

{vllm}

## Limits

{limits}

No weights of this model were loaded for these pages. The engine is tested on small random models of this family
(`pytest tests/engine/model/test_families.py -k {kind}`). What a method does to your answers, `foveate tune` and
`foveate compare --data` measure.
"""
WHOLE = "An int is a count for each picture, a float a share. Without a budget, `prumerge+` counts anew in each picture."
TILES = "A budget is of the whole picture: `budget=640` with five tiles is 128 for each, in proportion to what is no padding."
ANY = "Pictures have different counts, so a share (`budget=0.25`) is mostly what you want; an int is a count for each picture."
THW = 'Tokens keep their (t, h, w) positions, so `positions="compact"` has no effect; a note says so.'
SUBSTITUTE = "No [CLS]: methods that score by it take the mean attention that each token receives. The report names it."
AFTER = "Tokens exist only after the projector, and merging methods average them there, not what enters it as in their papers."


@dataclass(frozen=True)
class ModelPage:
    """What is said of a model beside its row in the table of families; ``vllm`` is a text, or why there is none."""

    kind: str
    picture: str
    method: str
    budget: str
    budgets: str
    vllm: str
    limits: tuple[str, ...]


PAGES = {
    "llava-1.5": ModelPage(
        "llava",
        "576 tokens, whatever its size",
        "prumerge+",
        "144",
        WHOLE,
        GATEWAY + INSIDE,
        ("Small signs are hard at 336 pixels with all tokens already. Reading suffers first: see [choosing](../choosing.md).",),
    ),
    "llava-next": ModelPage(
        "llava_next",
        "a small copy and tiles, 576 tokens each at most, and a newline token after each row of tiles",
        "prumerge+",
        "640",
        f"{TILES} A newline token stays while any token of its row stays.",
        GATEWAY,
        ("Methods inside the vision encoder are refused: not every patch is a visual token, padding of tiles leaves.",),
    ),
    "llava-onevision": ModelPage(
        "llava_onevision",
        "a small copy and tiles; several pictures come without tiles",
        "fovea",
        "0.25",
        f"{TILES} Where the model shrinks its map of tiles, the map counts as one grid.",
        GATEWAY,
        (SUBSTITUTE, AFTER),
    ),
    "qwen2-vl": ModelPage(
        "qwen2_vl",
        "one token for each 28 x 28 pixels",
        "fovea",
        "0.25",
        ANY,
        PLACED,
        (SUBSTITUTE, AFTER, THW, "The video processor needs torchvision; foveate brings a stand-in ([videos](../videos.md))."),
    ),
    "qwen2.5-vl": ModelPage(
        "qwen2_5_vl",
        "one token for each 28 x 28 pixels",
        "fovea",
        "0.25",
        f"{ANY} The second pocket model is a small one of this family: [its results](../results/pocket-qwen.md).",
        PLACED,
        (SUBSTITUTE, AFTER, THW, "`pixelprune` leaves equal cells out before the encoder: documents and screens, not photos."),
    ),
    "qwen3-vl": ModelPage(
        "qwen3_vl",
        "one token for each 32 x 32 pixels",
        "fovea",
        "0.25",
        ANY,
        PLACED,
        (
            SUBSTITUTE,
            AFTER,
            THW,
            "With vLLM: pictures, no videos. It was compared with transformers in vLLM without HTTP, and not over HTTP.",
            "Features of the encoder enter the first decoder layers. Methods inside the decoder can cut after these: "
            "`foveate.FastV(budget=0.5, layer=3)`; an earlier layer is refused.",
        ),
    ),
    "internvl": ModelPage(
        "internvl",
        "a small copy and tiles of 448 x 448 pixels, 256 tokens each",
        "prumerge+",
        "0.25",
        f"{TILES} Adaptive rules count anew in each tile.",
        GATEWAY,
        (AFTER, "Frames of a video come as pictures, each with a budget of its own."),
    ),
    "gemma-3": ModelPage(
        "gemma3",
        "256 tokens, whatever its size",
        "fovea",
        "64",
        WHOLE,
        "tokens of a picture see each other in the decoder, which vLLM does not do with embeddings in the prompt",
        (SUBSTITUTE, AFTER, "What is left of a picture still sees itself both ways, also after cuts inside the decoder."),
    ),
}


def model_page(slug: str) -> str:
    """The page of a model as Markdown."""
    page = PAGES[slug]
    info = row_of(page.kind)
    names = {"example": info.example, "method": page.method, "budget": page.budget, "reason": page.vllm}
    known = page.vllm in VLLM
    return TEXT.format(
        name=info.name,
        kind=page.kind,
        picture=page.picture,
        videos="yes" if info.videos else "no, or as pictures",
        merging=info.merging,
        encoder="yes" if info.in_encoder else "no",
        cls="yes" if info.reads_cls else "no",
        positions=info.positions,
        since=since(page.kind),
        budgets=page.budgets,
        vllm=(page.vllm if known else NONE).format(**names),
        limits="\n".join(f"- {limit}" for limit in page.limits),
        **{name: names[name] for name in ("example", "method", "budget")},
    )


def row_of(kind: str) -> ModelInfo:
    """Its row in the table of models."""
    return next(info for info in families() if info.model_type == kind)


def since(kind: str) -> str:
    """The first version of transformers that works with it."""
    from foveate.families import FAMILIES

    return FAMILIES[kind].since
