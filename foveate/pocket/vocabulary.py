"""The words of the pocket world, and the tokenizer made from them."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

COLORS = {
    "red": (215, 35, 40),
    "green": (40, 160, 60),
    "blue": (40, 75, 215),
    "yellow": (240, 215, 40),
    "purple": (140, 50, 170),
    "orange": (245, 135, 25),
    "white": (248, 248, 248),
    "black": (18, 18, 18),
}
SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross", "ring", "moon")

# Nearly every word has a neighbour that differs in one letter, so a single discriminating letter is never enough to read it.
WORDS = (
    "bank tank bark park dark mark gold cold bold fold lake cake bake wake boat coat goat fish dish king wing line lime time "
    "mine tea sea pea road read lead milk silk home hole pole bus bun sun run cafe safe news open oven exit edit wine"
).split()
DIGITS = tuple("0123456789")
CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "center", "right")
LETTERS = ("(a)", "(b)", "(c)", "(d)")

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
FUNCTION_WORDS = (
    "user: assistant: is there a an in the image ? , yes no what color shape how many objects object are where of above below "
    "sign that says say does word written number digit handwritten to picture which one it"
).split()
COUNTS = tuple(str(n) for n in range(13))

VOCABULARY: tuple[str, ...] = tuple(
    dict.fromkeys((*SPECIAL, *FUNCTION_WORDS, *LETTERS, *COUNTS, *COLORS, *SHAPES, *WORDS, *ROWS, *COLUMNS))
)
TOKEN_ID = {token: i for i, token in enumerate(VOCABULARY)}
PAD, BOS, EOS, UNKNOWN, IMAGE = range(5)

PROMPT_PREFIX = "<s> user: "  # then the visual tokens, the question and " assistant:"

# what the assistant says stands between marks, of which transformers makes the mask of what trainers teach
CHAT_TEMPLATE = (
    "{% macro said(content) %}{% if content is string %}{{ content }} {% else %}"
    "{% for part in content %}{% if part['type'] == 'image' %}<image> {% endif %}{% endfor %}"
    "{% for part in content %}{% if part['type'] == 'text' %}{{ part['text'] }} {% endif %}{% endfor %}"
    "{% endif %}{% endmacro %}"
    "<s> {% for message in messages %}{% if message['role'] == 'user' %}user: {{ said(message['content']) }}"
    "{% else %}assistant: {% generation %}{{ said(message['content']) }}</s> {% endgeneration %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


def unknown_words(text: str, known: Container[str] = TOKEN_ID) -> list[str]:
    """The words of ``text`` that a pocket model has never seen, in order, without repetition; ``known`` are its words."""
    words = text.lower().replace("?", " ? ").replace(",", " , ").split()
    return list(dict.fromkeys(word for word in words if word not in known))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of the first pocket model."""
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "additional_special_tokens": ["<image>"]}
    return word_tokenizer(TOKEN_ID, model_max_length=4096, **special)


def word_tokenizer(ids: dict[str, int], **options: Any) -> PreTrainedTokenizerFast:
    """A word-level tokenizer: one token per word, lower case, ``?`` and ``,`` split off; padding on the left.

    Parameters
    ----------
    ids : of the words; "<unk>" is what others become.
    **options : special tokens, and how long a text may be.
    """
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace("?", " ? "), normalizers.Replace(",", " , ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)  # joins the words with single blanks
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", padding_side="left", **options)
