"""Chat templates that write a word for embeddings where those of a processor write a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

from ..errors import InputError

PICTURES = ((224, 224), (1600, 900))  # sizes of small and large ones
PLACEHOLDER = "<prompt_embeds>"  # the word by which vLLM marks embeddings in a prompt
# vLLM shows a template embeddings as a text of this word; the template of a model expects a picture there
_PICTURES = (
    "{%- set renamed = namespace(messages=[]) -%}"
    "{%- for message in messages -%}"
    "{%- if message['content'] is string or not message['content'] -%}"
    "{%- set renamed.messages = renamed.messages + [message] -%}"
    "{%- else -%}"
    "{%- set inner = namespace(parts=[]) -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'text' and part['text'] == '" + PLACEHOLDER + "' -%}"
    "{%- set inner.parts = inner.parts + [{'type': 'image'}] -%}"
    "{%- else -%}"
    "{%- set inner.parts = inner.parts + [part] -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- set renamed.messages = renamed.messages + [dict(message, content=inner.parts)] -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- set messages = renamed.messages %}"
)
# of LLaVA-1.5, for processors that bring none: all pictures, then the texts
_PLAIN = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}ASSISTANT: {% elif message['role'] == 'user' %}USER: {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}IMAGE\n{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}"
    "{{ ' ' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def source_template(processor: Any) -> str:
    """The chat template of a processor, or that of LLaVA-1.5 where it brings none.

    Raises
    ------
    InputError : it brings several.
    """
    found = getattr(processor, "chat_template", None)
    if isinstance(found, dict):
        found = found.get("default")
        if found is None:
            raise InputError("the processor has several chat templates and none is the default one. Save it with one.")
    return found or _PLAIN.replace("IMAGE", processor.image_token)


def chat_template(processor: Any) -> str:
    """The chat template of a text-only model that reads pictures as embeddings in the prompt.

    It also writes the first token of prompts, where the processor's tokenizer adds it: vLLM adds none to conversations.

    Raises
    ------
    InputError : the template does not write the placeholder of pictures in so many words, or a picture is more than one span.
    """
    source, mark = source_template(processor), processor.image_token
    if mark not in source:
        raise InputError(f"the chat template does not write {mark!r}, so that embeddings cannot be put in its place.")
    begin, end = around(processor)
    written = source.replace(mark, f"{begin}{PLACEHOLDER}{end}")
    return _first(processor, source) + _PICTURES + written


def _first(processor: Any, source: str) -> str:
    tokenizer = processor.tokenizer
    bos = tokenizer.bos_token
    plain = tokenizer("a").input_ids
    if bos is None or not plain or plain[0] != tokenizer.bos_token_id:
        return ""  # the tokenizer adds none
    shown = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "text", "text": "a"}]}], chat_template=source, add_generation_prompt=True
    )
    return "" if shown.startswith(bos) else "{{- bos_token -}}"


def placeholder(processor: Any) -> str:
    """The token of which a processor writes one for each visual token; templates may write another one for a picture."""
    number = getattr(processor, "image_token_id", None)
    return str(processor.image_token if number is None else processor.tokenizer.convert_ids_to_tokens(number))


def around(processor: Any) -> tuple[str, str]:
    """The words that the processor puts around the visual tokens of a picture, such as marks of its begin and end.

    Raises
    ------
    InputError : it writes text between the visual tokens of a picture, or other words around large ones.
    """
    tokenizer = processor.tokenizer
    number = tokenizer.convert_tokens_to_ids(placeholder(processor))
    found = set()
    for size in PICTURES:
        picture = Image.new("RGB", size)
        ids = _first_row(processor(text=str(processor.image_token), images=[picture], add_special_tokens=False))
        first, last = ids.index(number), len(ids) - ids[::-1].index(number)
        if any(each != number for each in ids[first:last]):
            raise InputError(
                "this model writes text between the visual tokens of a picture, and in a conversation one span of embeddings takes "
                "the place of a picture. 'foveate batch' can run it."
            )
        found.add((tokenizer.decode(ids[:first]), tokenizer.decode(ids[last:])))
    if len(found) > 1:
        raise InputError("this model writes other words around large pictures than around small ones. 'foveate batch' can run it.")
    return found.pop()


def check_marks(processor: Any) -> None:
    """Refuse a chat template that does not write exactly one placeholder for each picture.

    Raises
    ------
    InputError : it does not.
    """
    mark = processor.image_token
    content = [{"type": "image"}, {"type": "text", "text": "a"}, {"type": "image"}]
    messages = [{"role": "user", "content": content}]
    written = processor.tokenizer.apply_chat_template(messages, chat_template=source_template(processor), tokenize=False)
    if written.count(mark) != 2:
        raise InputError(
            f"the chat template writes {mark!r} {written.count(mark)} times for two pictures; once for each is needed."
        )


def written_alike(processor: Any) -> bool:
    """Whether a chat template writes a video as it writes a picture, but for the placeholder."""
    template, tokenizer = source_template(processor), processor.tokenizer
    both = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": [{"type": kind}, {"type": "text", "text": "a"}]}], chat_template=template, tokenize=False
        )
        for kind in ("image", "video")
    ]
    return both[1].count(processor.video_token) == 1 and both[0] == both[1].replace(processor.video_token, processor.image_token)


def collapsed(processor: Any, messages: Sequence[dict[str, Any]]) -> list[int]:
    """Ids that a processor makes of a conversation whose pictures have one size, with one placeholder for each picture."""
    number, found = processor.tokenizer.convert_tokens_to_ids(placeholder(processor)), []
    pictures = sum(part["type"] == "image" for message in messages for part in message["content"])
    template = source_template(processor)
    if getattr(processor, "chat_template", None):
        ids = _first_row(processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True))
    else:
        text = processor.apply_chat_template(messages, chat_template=template, add_generation_prompt=True)
        images = [part["image"] for message in messages for part in message["content"] if part["type"] == "image"]
        ids = _first_row(processor(text=text, images=images or None))
    each_has, seen = ids.count(number) // max(pictures, 1), 0
    for each in ids:
        seen += each == number
        if each != number or seen % each_has == 1 or each_has == 1:
            found.append(int(each))
    return found


def _first_row(inputs: Any) -> list[int]:
    """The ids of the first prompt, which some processors give as a tensor without being asked to."""
    return [int(each) for each in inputs["input_ids"][0]]
