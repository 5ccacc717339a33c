"""A plugin of vLLM, found by its entry point ``vllm.general_plugins``: visual tokens are reduced inside the engine, or come as
embeddings of any number. Nothing of vLLM is imported before it serves a model that the plugin knows.
"""

from __future__ import annotations

from ...families import FAMILIES
from .connector import stored_request
from .requests import qwen_request

__all__ = ["qwen_request", "register", "stored_request"]

MODELS = dict(family.vllm for family in FAMILIES.values() if family.vllm)


def register() -> None:
    """Tell vLLM where the classes of these models are; it calls this in each of its processes, whatever it serves."""
    from vllm import ModelRegistry

    for architecture, place in MODELS.items():
        ModelRegistry.register_model(architecture, f"{__name__}.{place}")
