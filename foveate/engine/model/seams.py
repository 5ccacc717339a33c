"""The parts of transformers that foveate relies on and that are not documented as stable, all in this file.

``tests/engine/model/test_seams.py`` names the seam when a new release moves it.
"""

from __future__ import annotations

import copy
import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, get_layer_types_and_kwargs
from transformers.models.llama.modeling_llama import LlamaModel

from ...errors import CacheError, InputError, UnsupportedModelError
from .inputs import RAW_INPUTS, is_none, without_empty

if TYPE_CHECKING:
    from ..vision.encoding import Encodings

PER_TOKEN_INPUTS = ("token_type_ids", "mm_token_type_ids")
PACKED_INPUTS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")  # where packed sequences begin
LAYERED_INPUTS = "per_layer_inputs"  # embeddings for each layer, which Gemma 4 looks up by token ids
PRE_ENCODED = "mm_encoder_outputs"
# whether rows of prefix_allowed_tokens_fn are sequences where a prompt has several (before 5.24), or prompts, as with beams
ROWS_ARE_SEQUENCES = Version(transformers.__version__) < Version("5.24.dev0")
OLD_CACHE = "past_key_values"
# what transformers calls the key-value cache: from 5.24 on by a new name, and callers may use the old one
CACHE = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else OLD_CACHE
# whether ``crop`` of a cache takes a length, too (before 5.24), and not only the tokens to remove as a negative number
CROPS_TO_LENGTH = Version(transformers.__version__) < Version("5.24.dev0")
ASSISTANT_MASKS = "_adjust_assistant_masks_indices"  # what finds the tokens of answers in processors, from 5.24 on
MERGE_CALLBACKS = "_merge_criteria_processor_list"  # of transformers' generate
REPLICATE = "_replicate_for_data_parallel"  # of torch
WRAPPED_FORWARD = "_old_forward"  # where accelerate's hooks keep the forward they wrap, and start from when they are put on anew
_REDUCED = "_foveate_reduced"
_ENCODINGS = "_foveate_encodings"


def check_pre_encoded_input(model: PreTrainedModel) -> None:
    """Raise unless ``forward`` takes already encoded pictures (transformers >= 5.18)."""
    if PRE_ENCODED not in inspect.signature(model.base_model.forward).parameters:
        raise UnsupportedModelError(
            f"{type(model).__name__} takes no pre-encoded pictures ({PRE_ENCODED}). foveate needs transformers >= 5.18."
        )


def has_pixels(kwargs: dict[str, Any]) -> bool:
    return any(not is_none(kwargs.get(name)) for name in RAW_INPUTS)


def brings_pictures(kwargs: dict[str, Any]) -> bool:
    """Whether a call brings pictures that are not reduced yet: as pixels, or as ``foveate.Pictures`` encoded them."""
    return has_pixels(kwargs) or encodings_in(kwargs) is not None


def encodings_in(kwargs: dict[str, Any]) -> Encodings | None:
    """What ``foveate.Pictures`` has put among the arguments of a call, None if nothing."""
    outputs = kwargs.get(PRE_ENCODED) or {}
    found = (getattr(output, "__dict__", {}).get(_ENCODINGS) for output in outputs.values())
    return next((encodings for encodings in found if encodings is not None), None)


def with_encodings(output: Any, encodings: Encodings) -> Any:
    """A copy of an encoder output that also leads to everything that methods may read of its pictures."""
    changed = copy.copy(output)
    changed.__dict__.pop(_REDUCED, None)
    changed.__dict__[_ENCODINGS] = encodings
    return changed


def modalities(kwargs: dict[str, Any]) -> list[str]:
    """Which of "image" and "video" a call brings."""
    here = {"image": ("pixel_values", "pixel_values_images", "image_patches"), "video": ("pixel_values_videos",)}
    return [modality for modality, names in here.items() if any(not is_none(kwargs.get(name)) for name in names)]


def named_arguments(original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call by name, in a dictionary of our own; the older name of an input is the newer one from here on.

    Inputs of no picture are left out.
    """
    found = {**dict(zip(list(inspect.signature(original).parameters), args, strict=False)), **kwargs}
    if CACHE != OLD_CACHE and OLD_CACHE in found:
        found.setdefault(CACHE, found.pop(OLD_CACHE))
    if found.get("pixel_values_images") is not None:
        found["pixel_values"] = found.pop("pixel_values_images")
    return without_empty(found)


def cached_rows(cache: Any) -> int:
    """Rows of a cache that holds something; 0 where its layers show none."""
    keys = getattr(cache.layers[0], "keys", None) if getattr(cache, "layers", None) else None
    return 0 if keys is None else int(keys.shape[0])


def with_hidden_states(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """What a backbone returned, with each of its hidden states [B, S, D] changed."""
    if isinstance(output, tuple):
        return (change(output[0]), *output[1:])
    changed = copy.copy(output)
    changed["last_hidden_state"] = change(output.last_hidden_state)
    if output.get("hidden_states") is not None:
        changed["hidden_states"] = tuple(change(states) for states in output.hidden_states)
    return changed


def cache_in(kwargs: dict[str, Any]) -> Any:
    """The key-value cache among the arguments of a call, by its older or its newer name."""
    cache = kwargs.get(CACHE)
    return kwargs.get(OLD_CACHE) if cache is None else cache


def of_modality(base: Any, modality: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Those of ``kwargs`` that the model's own ``get_image_features``, or ``get_video_features``, takes."""
    names = inspect.signature(getattr(base, f"get_{modality}_features")).parameters
    return {name: kwargs[name] for name in names if name != "kwargs" and kwargs.get(name) is not None}


def encode_visuals(base: Any, modality: str, kwargs: dict[str, Any]) -> Any:
    """What the model's own ``get_image_features``, or ``get_video_features``, returns."""
    return getattr(base, f"get_{modality}_features")(**kwargs, return_dict=True)


class PerItem(list[Tensor]):
    """Projected features of several pictures, one tensor [m_i, D] each, for models that expect one tensor [items, n, D] of all.

    As a list it can have other counts per picture; asked for anything that a tensor has, it is [1, sum of m_i, D].
    """

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copy and pickle look for these
            raise AttributeError(name)
        return getattr(torch.cat(list(self))[None], name)


_PER_ITEM: dict[type, type] = {}  # classes made by ``_per_item_output``


def _per_item_output(cls: type) -> type:
    """An encoder output whose ``pooler_output`` stays ``PerItem``: beam search makes a list of it, chunked prefill a new output."""

    def set_item(self: Any, name: str, value: Any) -> None:
        if name == "pooler_output" and isinstance(value, list | tuple):
            value = PerItem(value)
        super(made, self).__setattr__(name, value)

    if cls not in _PER_ITEM:
        _PER_ITEM[cls] = type(f"{cls.__name__}PerItem", (cls,), {"__setattr__": set_item})
    made: type[Any] = _PER_ITEM[cls]
    return made


def with_features(output: Any, features: list[Tensor], levels: list[list[Tensor]] | None = None) -> Any:
    """The encoder output with other projected features, one tensor [m_i, D] per item, and with other ``deepstack`` levels."""
    changed = copy.copy(output)
    if isinstance(output.pooler_output, Tensor):
        changed.__class__ = _per_item_output(type(output))
    changed.pooler_output = features
    if levels is not None:
        changed.deepstack_features = levels
    return marked(changed)


def marked(output: Any) -> Any:
    """The encoder output, known as one of ours."""
    output.__dict__[_REDUCED] = True
    return output


def deepstack(output: Any) -> list[list[Tensor]] | None:
    """[levels][items] features that the decoder adds after its first layers, None where it does not (deepstack)."""
    found: list[list[Tensor]] | None = getattr(output, "deepstack_features", None)
    return found


@dataclass(frozen=True)
class Packing:
    """A model's own layout of tiles: [R, n, C] of all tiles -> a list of [n_i, C], with a newline [C] after each row."""

    call: Callable[..., Any]
    tiles: list[int]
    tokens: int

    def __call__(self, values: Tensor, newline: Tensor) -> list[Tensor]:
        return list(self.call(list(values.split(self.tiles)), image_newline=newline)[0])


class _PackingRecorder:
    """In the place of a model's ``pack_image_features``, for all threads that encode with it."""

    def __init__(self, base: Any) -> None:
        self.before, self.original = base.__dict__.get(_PACK), getattr(base, _PACK)
        self.names = list(inspect.signature(self.original).parameters)
        self.found: dict[int, list[Packing]] = {}  # by thread
        self.users = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        mine = self.found.get(threading.get_ident())
        if mine is not None:
            given = {**dict(zip(self.names, args, strict=False)), **kwargs}
            tiles, _ = given.pop("image_features"), given.pop("image_newline", None)
            mine.append(Packing(functools.partial(self.original, **given), [len(each) for each in tiles], tiles[0].shape[1]))
        return self.original(*args, **kwargs)


_PACK = "pack_image_features"
_PACKING = threading.Lock()


@contextmanager
def recorded_packing(base: Any) -> Iterator[list[Packing]]:
    """Note how ``pack_image_features`` was called by this thread, so that other values can be laid out in the same way."""
    found: list[Packing] = []
    if getattr(base, _PACK, None) is None:
        yield found
        return
    with _PACKING:
        recorder = base.__dict__.get(_PACK)
        if not isinstance(recorder, _PackingRecorder):
            recorder = base.__dict__[_PACK] = _PackingRecorder(base)
        recorder.users += 1
        recorder.found[threading.get_ident()] = found
    try:
        yield found
    finally:
        with _PACKING:
            recorder.users -= 1
            del recorder.found[threading.get_ident()]
            if recorder.users == 0 and recorder.before is None:
                del base.__dict__[_PACK]
            elif recorder.users == 0:
                base.__dict__[_PACK] = recorder.before


def window_order(tower: Any, grid_thw: Tensor) -> Tensor:
    """[F] in which order a tower with attention windows keeps its tokens."""
    from transformers.vision_utils import get_vision_window_index

    window, merge = tower.window_size, tower.spatial_merge_size
    order: Tensor = get_vision_window_index(grid_thw, spatial_merge_size=merge, window_size=window, patch_size=tower.patch_size)[0]
    return order


def full_positions(model: Any, ids: Tensor, mask: Tensor, past: int, kwargs: dict[str, Any]) -> Tensor:
    """[4, B, T] or [1, B, T] positions (all, t, h, w) of a prompt before anything is removed, of models with M-RoPE."""
    given: dict[str, Any] = {
        name: value for name, value in kwargs.items() if isinstance(value, Tensor | list) and name != "position_ids"
    }
    given |= {"attention_mask": mask, CACHE: _Past(past) if past else None}
    try:
        found: Tensor = model._prepare_position_ids_for_generation(ids, given)
    except (IndexError, RuntimeError, StopIteration, ValueError) as error:
        if not past:
            raise
        raise InputError(
            "the pictures of a further turn cannot be numbered: give the whole prompt, with the grids (image_grid_thw) of all of "
            "its pictures, or start a new cache."
        ) from error
    return found


@contextmanager
def unturned(base: Any) -> Iterator[None]:
    """A model with M-RoPE remembers the offset of its last prompt for the next turn; after this, the one it had before."""
    before = getattr(base, "rope_deltas", None)
    try:
        yield
    finally:
        if hasattr(base, "rope_deltas"):
            base.rope_deltas = before


class _Past(NamedTuple):
    """As much of a cache as positions are computed from."""

    length: int

    def get_seq_length(self, layer: int = 0) -> int:
        return self.length


def is_ours(pre_encoded: Any) -> bool:
    """Whether encoded pictures come from another session of ours, as the assistant of assisted generation gets them."""
    return bool(pre_encoded) and all(_REDUCED in getattr(output, "__dict__", {}) for output in pre_encoded.values())


def find_cache(output: Any) -> Cache | None:
    """The key-value cache in what ``forward`` or ``generate`` returned."""
    cache = getattr(output, CACHE, None)
    if cache is None and isinstance(output, tuple):
        cache = next((part for part in output if isinstance(part, Cache)), None)
    return cache if isinstance(cache, Cache) else None


def layer_windows(config: Any) -> list[int | None]:
    """How far back each decoder layer sees, None = everything."""
    kinds, options = get_layer_types_and_kwargs(config)
    each = [options] * len(kinds) if isinstance(options, dict) else options  # one dict for all layers before transformers 5.23
    return [option.get("sliding_window") if "sliding" in kind else None for kind, option in zip(kinds, each, strict=True)]


def layer_kinds(config: Any) -> list[str]:
    """Name of the kind of each decoder layer, such as "full_attention"."""
    return list(get_layer_types_and_kwargs(config)[0])


def reads_positions(layer: Any) -> bool:
    """Whether the attention of a decoder layer computes with position ids (Ministral 3, Mistral 4), beside its rotary embeddings.

    Elsewhere they only tell flash attention where packed sequences begin.
    """
    attention = getattr(layer, "self_attn", None)
    parameter = inspect.signature(type(attention).forward).parameters.get("position_ids") if attention is not None else None
    return parameter is not None and parameter.default is inspect.Parameter.empty


def attention_of(layer: nn.Module) -> nn.Module:
    """The attention module of a decoder layer."""
    attention = getattr(layer, "self_attn", None)
    if not isinstance(attention, nn.Module) or not hasattr(attention, "config"):
        raise UnsupportedModelError(f"{type(layer).__name__} has no attention module at 'self_attn' whose queries can be read.")
    return attention


def values_of(attention: Any) -> tuple[nn.Module, int, int, int]:
    """The module that makes the values of an attention module: where they begin in its output, in how many heads of which width."""
    # layers of one decoder may have other numbers of heads (Gemma 4)
    groups, width = int(attention.config.num_attention_heads) // int(attention.num_key_value_groups), int(attention.head_dim)
    if getattr(attention, "v_proj", None) is not None:
        return attention.v_proj, 0, groups, width
    if hasattr(attention, "qkv_proj"):  # queries, keys and values in one (Phi-3)
        return attention.qkv_proj, (int(attention.config.num_attention_heads) + groups) * width, groups, width
    raise UnsupportedModelError(f"{type(attention).__name__} has no projection of values that could be found.")


def output_of(attention: Any) -> nn.Module:
    """The output projection of an attention module."""
    for name in ("o_proj", "dense"):
        if isinstance(getattr(attention, name, None), nn.Module):
            found: nn.Module = getattr(attention, name)
            return found
    raise UnsupportedModelError(f"{type(attention).__name__} has no output projection that could be found.")


class MlpParts(NamedTuple):
    """The MLP of a decoder layer; ``gate``, ``up`` and ``activation`` only where its weights can be cut into slices."""

    module: nn.Module
    down: Any
    gate: Any
    up: Any
    activation: Any
    sliceable: bool


def mlp_of(layer: Any) -> MlpParts:
    """The MLP of a decoder layer, gated or not."""
    module = getattr(layer, "mlp", None)
    down = next((getattr(module, name) for name in ("down_proj", "fc2") if hasattr(module, name)), None)
    if module is None or down is None:
        raise UnsupportedModelError(f"{type(layer).__name__} has no MLP that could be found.")
    gate, up, act = (getattr(module, name, None) for name in ("gate_proj", "up_proj", "act_fn"))
    # torchao keeps nn.Linear and packs its weight; accelerate leaves a weight on meta until the part runs
    linear = all(type(part) is nn.Linear and type(part.weight) is nn.Parameter for part in (gate, up, down))
    plain = act is not None and linear and not any(hasattr(part, "_hf_hook") for part in (module, gate, up, down))
    return MlpParts(module, down, gate, up, act, plain)


def rotary(decoder: Any, hidden: Tensor, positions: Tensor, kind: str) -> Any:
    """Rotary embeddings of a layer of this kind at ``positions`` [B, M]."""
    takes_kind = "layer_type" in inspect.signature(decoder.rotary_emb.forward).parameters
    return decoder.rotary_emb(hidden, positions, kind) if takes_kind else decoder.rotary_emb(hidden, positions)


def cached_keys(cache: Any, layer: int) -> Tensor | None:
    """[B, G, n, d] keys that a cache holds of a layer, None if none.

    Raises
    ------
    CacheError : they are stored in another form, as in quantised caches.
    """
    if cache is None or layer >= len(cache.layers) or int(cache.get_seq_length(layer)) == 0:
        return None
    keys = cache.layers[layer].keys
    if not isinstance(keys, torch.Tensor) or keys.shape[-2] != cache.get_mask_sizes(0, layer)[0]:
        raise CacheError("this cache does not show its keys, which the method reads for a further picture. Use a dynamic cache.")
    return keys
