"""The words of the pocket world, and the tokenizer made from them."""

from __future__ import annotations

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


def encode(text: str) -> list[int]:
    """Token ids of a text that uses only the vocabulary, as the tokenizer gives them (no special tokens added)."""
    return [TOKEN_ID[word] for word in text.split()]


def unknown_words(text: str) -> list[str]:
    """The words of ``text`` that the pocket model has never seen, in order, without repetition."""
    words = text.lower().replace("?", " ? ").replace(",", " , ").split()
    return list(dict.fromkeys(word for word in words if word not in TOKEN_ID))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer: one token per word, lower case, ``?`` and ``,`` split off."""
    tokenizer = Tokenizer(models.WordLevel(TOKEN_ID, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace("?", " ? "), normalizers.Replace(",", " , ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)  # joins the words with single blanks
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<image>"],
        padding_side="left",
        model_max_length=4096,
    )
