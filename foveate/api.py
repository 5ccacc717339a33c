"""The front door: attach a method to a model, and the table of models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig

from .engine.session import Session
from .families import FAMILIES, TOWERS
from .methods.base import Method
from .pictures import built


def attach(model: Any, method: str | Method, *, train: bool = False, **fields: Any) -> Session:
    """Attach a method to a model until ``detach()``.

    Parameters
    ----------
    model : a Hugging Face vision-language model, also inside PEFT, ``torch.compile`` or accelerate wrappers. It stays the same
        object; its ``generate`` and ``forward`` are called as before.
    method : a name as in ``foveate.methods()``, or an instance.
    train : whether the weights of a trained method are to be trained. They become the submodule ``foveate`` of the model until
        ``detach()``, so that optimizers and trainers find them; ``handle.save_weights(folder)`` saves them.
    **fields : hyper-parameters, where ``method`` is a name.

    Returns
    -------
    The handle: ``handle.report`` tells what the last call did, ``handle.detach()`` restores the model.

    Raises
    ------
    InputError : unknown method or field, or a method is attached already.
    UnsupportedModelError : the model, or what the method needs of it, is not supported. The model is unchanged then.
    """
    return Session(model, built(method, fields)).attach(train=train)


@dataclass(frozen=True)
class ModelInfo:
    """One row of the table of models: a family, and what works on it.

    Attributes
    ----------
    name, model_type, example : the family, ``config.model_type``, and the Hub id of one of its models.
    images, videos : whether its pictures, and its videos, can be reduced.
    merging : where methods merge tokens, before the projector or after it.
    in_encoder : whether methods can act inside the vision encoder.
    reads_cls : whether the encoder has a [CLS] token; elsewhere methods take the substitute that the report names.
    positions : "1-D", or "(t, h, w)".
    notes : what is different from what one may expect.
    test : what proves it.
    """

    name: str
    model_type: str
    example: str
    images: bool
    videos: bool
    merging: str
    in_encoder: bool
    reads_cls: bool
    positions: str
    notes: str
    test: str


def models() -> list[ModelInfo]:
    """All families of models, and what works on each. Unless its notes say otherwise, every method before the projector and inside
    the decoder works on it.
    """
    found = []
    for kind, family in FAMILIES.items():
        config = AutoConfig.for_model(kind)
        if config.vision_config is None:  # some have vision only where that is asked for
            config = AutoConfig.for_model(kind, vision_config={})
        one_layer = isinstance(getattr(config, "vision_feature_layer", -1), int)
        notes = [family.notes] if family.notes else []
        deepstack = getattr(config.vision_config, "deepstack_visual_indexes", None)
        notes += ["cuts from the layer after the deepstack layers on"] if deepstack else []
        notes += (
            ["methods before the decoder only: some of its layers hold a state, not keys and values"] if family.recurrent else []
        )
        notes += [f"methods before the decoder only: {family.uncut}"] if family.uncut else []
        found.append(
            ModelInfo(
                name=family.name,
                model_type=kind,
                example=family.example,
                images=True,
                videos=family.videos is not None,
                merging="after the projector" if family.projector is None else "before the projector",
                in_encoder=family.shrinkable and one_layer,
                reads_cls=TOWERS[config.vision_config.model_type].has_cls,
                positions="(t, h, w)" if family.mrope else "1-D",
                notes="; ".join(notes),
                test=f"tests/engine/model/test_families.py -k '{kind}- or {kind}]'",
            )
        )
    return found
