"""What lmms-eval finds by its entry point ``lmms_eval.models``: ``lmms-eval --model foveate --model_args pretrained=...``."""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """The model "foveate", for the registry of lmms-eval."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="foveate", chat_class_path="foveate.evaluation.model.FoveateModel")
