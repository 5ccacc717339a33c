"""What the language model of any family must answer for a row whose visual tokens were reduced, worked out by hand.

Embeddings are spliced, positions and masks are made here, and the language model runs in full for each token: no ``generate``, no
cache, no padding, no batch. Nothing here is shared with the package.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from . import families, zoo
from .family_prompts import IMAGE, INDICATORS, VIDEO

# take one mask for each type of layer
WITH_LAYER_TYPES = ("qwen2", "gemma3_text", "cohere2", "qwen2_vl_text", "qwen2_5_vl_text")
WITH_LAYER_TYPES += ("qwen3_5_text", "qwen3_5_moe_text", "lfm2", "llama4_text", "gemma4_text")
KINDS = {"image": IMAGE, "video": VIDEO}


@dataclass(frozen=True)
class Spliced:
    """One row without padding.

    Attributes
    ----------
    embeddings : [1, T', D].
    positions : [1, T'], or [3, 1, T'] of (time, height, width).
    blocks : [T'] tokens of the same block see each other both ways; -1 = none.
    visual : [V] the columns of visual tokens.
    deep : of Qwen 3, what is added to visual tokens behind each of the first layers, [V, D].
    ids : [1, T'] where layers look up embeddings of their own; those of pictures are of padding.
    """

    embeddings: Tensor
    positions: Tensor
    blocks: Tensor
    visual: Tensor
    deep: list[Tensor] = field(default_factory=list)
    ids: Tensor | None = None


def placeholders(ids: Tensor) -> Tensor:
    return (ids == IMAGE) | (ids == VIDEO)


@torch.no_grad()
def whole_features(model: PreTrainedModel, inputs: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    """All visual tokens of one row [P, D] in the order of its placeholders, and those of Qwen 3's deep layers."""
    ids = inputs["input_ids"][0]
    ids, found, base = ids[placeholders(ids)], {}, model.base_model
    one = model.config.model_type in families.ONE_PLACEHOLDER
    for kind, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        token = IMAGE if one else KINDS[kind]
        if pixels in inputs:
            encode = getattr(base, f"get_{kind}_features")
            known = inspect.signature(encode).parameters
            output = encode(**{name: value for name, value in inputs.items() if name in known}, return_dict=True)
            deep = [torch.cat(list(layer)) for layer in getattr(output, "deepstack_features", None) or []]
            visual = output.pooler_output
            if model.config.model_type == "llama4":  # its forward projects them
                visual = base.multi_modal_projector(output.last_hidden_state)
            found[token] = [torch.cat([part.flatten(0, -2) for part in visual]), *deep]
    width = model.config.get_text_config().hidden_size
    parts = [torch.zeros(len(ids), width) for _ in next(iter(found.values()), [None])]
    for token, values in found.items():
        for part, value in zip(parts, values, strict=True):
            part[ids == token] = value
    return parts[0], parts[1:]


def rope_positions(family: str, inputs: dict[str, Tensor]) -> Tensor:
    """[3, T] (time, height, width) of each token of one row of Qwen or GLM.

    Text counts on. A picture begins where text would go on; its tokens differ in height and width, its frames in time. Behind it
    text goes on as if it had been as long as its longer side.
    """
    grids = {IMAGE: inputs.get("image_grid_thw", []), VIDEO: inputs.get("video_grid_thw", [])}
    shapes = {token: [(int(t), int(h) // 2, int(w) // 2) for t, h, w in rows] for token, rows in grids.items()}
    if family in families.STAMPED:  # the prompt has each frame apart
        shapes[VIDEO] = [(1, h, w) for t, h, w in shapes[VIDEO] for _ in range(t)]
    if family in families.ONE_PLACEHOLDER:
        shapes[IMAGE] += shapes[VIDEO]  # there is one of the two
    step = 1.0
    if family == "qwen2_5_vl" and "second_per_grid_ts" in inputs:  # two positions for each second
        step = 2 * float(inputs["second_per_grid_ts"][0])
    found, ids, at, now = [], inputs["input_ids"][0].tolist(), 0, 0
    while at < len(ids):
        if ids[at] not in (IMAGE, VIDEO):
            found.append((now, now, now))
            at, now = at + 1, now + 1
            continue
        token = ids[at]
        frames, rows, columns = shapes[token].pop(0)
        pace = step if token == VIDEO else 1.0
        places = [(f, r, c) for f in range(frames) for r in range(rows) for c in range(columns)]
        found += [(now + int(f * pace), now + r, now + c) for f, r, c in places]
        at, now = at + len(places), now + max(rows, columns)
    return torch.tensor(found).T


def blocks_of(family: str, ids: Sequence[int]) -> Tensor:
    """[T] of Gemma the pictures, and frames, of a row, of PaliGemma the whole of it; -1 = tokens that see nothing behind them."""
    if family == "paligemma":
        return torch.zeros(len(ids), dtype=torch.long)
    found, number = [], -1
    for at, token in enumerate(ids):
        seen = token in (IMAGE, VIDEO)
        number += seen and ids[at - 1] != token
        found.append(number if seen and family.startswith("gemma") else -1)
    return torch.tensor(found)


def splice(
    family: str,
    model: PreTrainedModel,
    inputs: dict[str, Tensor],
    kept: Sequence[int],
    visual: Tensor,
    *,
    compact: bool,
    deep: Sequence[Tensor] = (),
) -> Spliced:
    """Put reduced visual tokens into one row.

    Parameters
    ----------
    inputs : of the row, without padding.
    kept : which of the row's placeholders stay, ascending.
    visual : [len(kept), D] what they hold.
    compact : number what is left anew; Qwen and GLM keep their positions at all times.
    deep : [len(kept), D] for each of Qwen 3's deep layers.
    """
    ids = inputs["input_ids"][0]
    places = placeholders(ids).nonzero().flatten()
    stays = torch.ones(len(ids), dtype=torch.bool)
    stays[places] = False
    stays[places[list(kept)]] = True
    columns = stays.nonzero().flatten()
    embeddings = model.get_input_embeddings()(ids).detach().clone()
    for number, token in enumerate(INDICATORS if family == "ovis2" and len(places) else ()):
        embeddings[ids == token] = model.base_model.visual_embeddings_table.weight[number - len(INDICATORS)]
    embeddings[places[list(kept)]] = visual
    if families.SPECS[family].types == "mrope":
        positions = rope_positions(family, inputs)[:, None, columns]
    else:
        positions = (torch.arange(len(columns)) if compact else columns)[None] + (family == "paligemma")
    now_visual = placeholders(ids)[columns].nonzero().flatten()
    own = ids.masked_fill(placeholders(ids), zoo.PAD)[None, columns] if own_embeddings(model) else None
    return Spliced(embeddings[None, columns], positions, blocks_of(family, ids.tolist())[columns], now_visual, list(deep), own)


def own_embeddings(model: PreTrainedModel) -> int:
    """The width of what each layer of Gemma 4 looks up by token; 0 = they do not."""
    return getattr(model.config.get_text_config(), "hidden_size_per_layer_input", 0)


def looked_up(model: PreTrainedModel, ids: Tensor | None) -> dict[str, Tensor]:
    """[1, T, layers, width] of these token ids, as the decoder takes it."""
    if ids is None:
        return {}
    return {"per_layer_inputs": model.get_decoder().embed_tokens_per_layer(ids).unflatten(-1, (-1, own_embeddings(model)))}


def masks(model: PreTrainedModel, blocks: Tensor) -> Tensor | dict[str, Tensor]:
    """[1, 1, T, T] bool, what each token sees; windows of sliding layers are counted in columns."""
    config, number = model.config.get_text_config(), torch.arange(len(blocks))
    together = (blocks[:, None] == blocks) & (blocks >= 0)
    seen = (number <= number[:, None]) | together
    window = getattr(config, "sliding_window", None)
    near = seen if window is None else seen & (number > number[:, None] - window)
    if config.model_type in WITH_LAYER_TYPES:
        chunk = getattr(config, "attention_chunk_size", None) or len(number)
        chunked = seen & (number // chunk == number[:, None] // chunk)
        if config.model_type == "gemma4_text":  # elsewhere pictures see themselves in all layers
            seen = number <= number[:, None]
        found = {"full_attention": seen, "sliding_attention": near, "chunked_attention": chunked}
        return {kind: mask[None, None] for kind, mask in found.items()} | {"linear_attention": None, "conv": None}
    return (near if config.model_type == "mistral" else seen)[None, None]


@contextmanager
def _hooked(model: PreTrainedModel, spliced: Spliced, left: dict[int, Sequence[int]]) -> Iterator[None]:
    """Add deep features behind layers, and hide what was dropped as keys from a layer on; a dropped token sees itself."""
    handles, prompt = [], spliced.embeddings.shape[1]

    def hide(number: int):
        start = max((at for at in left if at <= number), default=None)

        def before(_, args, kwargs):
            if start is None:
                return None
            length = kwargs["attention_mask"].shape[-1]
            gone = torch.ones(length, dtype=torch.bool)
            gone[[*left[start], *range(prompt, length)]] = False
            hidden = gone & ~torch.eye(length, dtype=torch.bool)
            return args, {**kwargs, "attention_mask": kwargs["attention_mask"] & ~hidden}

        return before

    def add(number: int):
        def after(_, __, output):
            output = output.clone()
            output[0, spliced.visual] += spliced.deep[number]
            return output

        return after

    try:
        for number, layer in enumerate(families.decoder_of(model).layers):
            handles.append(layer.register_forward_pre_hook(hide(number), with_kwargs=True))
            if number < len(spliced.deep):
                handles.append(layer.register_forward_hook(add(number)))
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def logits(model: PreTrainedModel, spliced: Spliced, tokens: Sequence[int], left: dict[int, Sequence[int]] | None = None) -> Tensor:
    """Logits [len(tokens), V] before each of ``tokens``: one full forward each.

    ``left`` is {layer: columns of the spliced prompt that are left from there on}, of methods that drop tokens inside the decoder.
    """
    decoder, head, table = families.decoder_of(model), model.get_output_embeddings(), model.get_input_embeddings()
    embeddings, positions, blocks, ids, found = spliced.embeddings, spliced.positions, spliced.blocks, spliced.ids, []
    with _hooked(model, spliced, left or {}):
        for token in tokens:
            mask = masks(model, blocks)
            own = looked_up(model, ids)
            output = decoder(inputs_embeds=embeddings, position_ids=positions, attention_mask=mask, use_cache=False, **own)
            found.append(head(output.last_hidden_state[0, -1]))
            embeddings = torch.cat([embeddings, table(torch.tensor([[token]]))], 1)
            positions = torch.cat([positions, positions[..., -1:] + 1], -1)
            blocks = torch.cat([blocks, torch.tensor([-1])])
            ids = None if ids is None else torch.cat([ids, torch.tensor([[token]])], 1)
    return torch.stack(found)
