"""The words of the second pocket model, and the tokenizer made from them: those of the first, and some for clips and pages."""

from __future__ import annotations

from transformers import PreTrainedTokenizerFast

from ..vocabulary import COLORS, COLUMNS, FUNCTION_WORDS, LETTERS, ROWS, SHAPES, WORDS, word_tokenizer

SPECIAL = (
    "<|endoftext|>",
    "<unk>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
DIRECTIONS = ("left", "right", "up", "down")
MORE_WORDS = (
    "user assistant video first second start end comes before moves move appears appear vanishes vanish changes change or next "
    "last page nothing up down words at"
).split()

VOCABULARY: tuple[str, ...] = tuple(
    dict.fromkeys(
        (
            *SPECIAL,
            *(word for word in FUNCTION_WORDS if not word.endswith(":")),
            *MORE_WORDS,
            *LETTERS,
            *(str(n) for n in range(16)),
            *COLORS,
            *SHAPES,
            *WORDS,
            *ROWS,
            *COLUMNS,
        )
    )
)
TOKEN_ID = {token: i for i, token in enumerate(VOCABULARY)}
PAD, UNKNOWN, START, END, VISION_START, VISION_END, IMAGE, VIDEO = range(len(SPECIAL))

# what the assistant says stands between marks, of which transformers makes the mask of what trainers teach
CHAT_TEMPLATE = (
    "{% macro said(content) %}{% if content is string %}{{ content }} {% else %}"
    "{% for part in content %}{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|> "
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|> {% endif %}{% endfor %}"
    "{% for part in content %}{% if part['type'] == 'text' %}{{ part['text'] }} {% endif %}{% endfor %}"
    "{% endif %}{% endmacro %}"
    "{% for message in messages %}<|im_start|> {% if message['role'] == 'user' %}user {{ said(message['content']) }}<|im_end|> "
    "{% else %}assistant {% generation %}{{ said(message['content']) }}<|im_end|> {% endgeneration %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|> assistant{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of the second pocket model."""
    others = [token for token in SPECIAL if token.startswith("<|") and token not in ("<|endoftext|>", "<|im_end|>")]
    special = {"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>", "additional_special_tokens": others}
    return word_tokenizer(TOKEN_ID, model_max_length=8192, **special)
