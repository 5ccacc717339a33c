"""Canaries: each names the part of vLLM that a release has moved and that the plugin, the gateway or batches stand on."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from foveate.serving.handover import HANDOVERS
from foveate.serving.plugin import MODELS

PLUGIN = ("llava", "qwen", "qwen3")
OURS, THEIRS = "foveate.", "vllm."


def ours() -> Iterator[type]:
    """Classes of the plugin that are also classes of vLLM."""
    for name in PLUGIN:
        module = importlib.import_module(f"foveate.serving.plugin.{name}")
        for cls in vars(module).values():
            mine = inspect.isclass(cls) and cls.__module__ == module.__name__
            if mine and any(base.__module__.startswith(THEIRS) for base in cls.__mro__):
                yield cls


def replaced() -> list[tuple[str, Any, Any]]:
    """Each method of vLLM that the plugin replaces: its name, ours, theirs."""
    found = []
    for cls in ours():
        for number, base in enumerate(cls.__mro__):
            if not base.__module__.startswith(OURS):
                continue
            for name, function in vars(base).items():
                stock = next((vars(other)[name] for other in cls.__mro__[number + 1 :] if name in vars(other)), None)
                if inspect.isfunction(function) and inspect.isfunction(stock) and stock.__module__.startswith(THEIRS):
                    found.append((f"{cls.__name__}.{name}", function, stock))
    return found


def test_the_methods_that_are_replaced_are_asked_in_the_same_way():
    found = replaced()
    for name, mine, stock in found:
        if name.endswith("__init__"):
            continue
        want, have = (list(inspect.signature(function).parameters) for function in (stock, mine))
        same = [part for part in want if part in have] == want or have == want or "kwargs" in have
        assert same, f"vLLM calls {name}({', '.join(want)}) now; the plugin expects ({', '.join(have)})"
    replaced_names = {name.rpartition(".")[2] for name, _, _ in found}
    for name in ("_call_hf_processor", "_get_mm_fields_config", "_get_prompt_updates", "_parse_image_data"):
        assert name in replaced_names, f"vLLM has no {name} any more that the plugin could replace: nobody calls ours"
    for name in ("get_data_parser", "embed_multimodal", "get_mrope_input_positions", "_image_pixels_to_features"):
        assert name in replaced_names, f"vLLM has no {name} any more that the plugin could replace: nobody calls ours"


@pytest.mark.parametrize(
    ("place", "names"),
    [
        ("FoveateInfo", ("get_hf_config", "get_vision_encoder_info", "_get_expected_hidden_size", "allow_missing_mm_embeddings")),
        ("FoveateLlava", ("_parse_and_validate_image_input", "supports_tower_connector_lora")),
        ("PlacingInfo", ("get_hf_config", "_get_expected_hidden_size", "allow_missing_mm_embeddings")),
        ("PlacingParser", ("embedding_field_sets", "embedding_fields")),
        ("FoveateQwen2VL", ("iter_mm_grid_thw",)),
        ("FoveateQwen25VL", ("iter_mm_grid_thw",)),
    ],
)
def test_what_the_plugin_asks_of_vllm_is_there(place, names):
    (cls,) = {cls for cls in ours() if cls.__name__ == place}
    for name in names:
        assert hasattr(cls, name), f"vLLM's part of {place} has no {name} any more"


def test_fields_of_requests_are_laid_out_as_before():
    from vllm.multimodal.inputs import MultiModalFieldConfig

    for name, wanted in {"batched": {"modality", "keep_on_cpu"}, "flat_from_sizes": {"modality", "keep_on_cpu"}}.items():
        have = set(inspect.signature(getattr(MultiModalFieldConfig, name)).parameters)
        assert wanted <= have, f"MultiModalFieldConfig.{name} lost {', '.join(wanted - have)}"


def test_features_of_deeper_layers_are_kept_where_the_plugin_puts_them():
    from vllm.model_executor.models.qwen3_vl import Qwen3VLForConditionalGeneration

    source = inspect.getsource(Qwen3VLForConditionalGeneration)
    for name in (
        "deepstack_num_level",
        "deepstack_input_embeds",
        "deepstack_input_embeds_num_tokens",
        "visual_dim",
        "multiscale_dim",
    ):
        assert f"self.{name}" in source, f"Qwen3VLForConditionalGeneration has no {name} any more"


def test_the_registry_knows_the_architectures_that_are_replaced():
    from vllm import ModelRegistry

    for architecture in MODELS:
        assert architecture in ModelRegistry.get_supported_archs(), f"vLLM has no {architecture} any more"


def test_the_server_takes_the_options_that_we_start_it_with():
    """By the way of starting it that ``foveate serve --launch`` goes."""
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--help=all"]
    told = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert told.returncode == 0, f"vLLM has no such server any more:\n{told.stderr[-2000:]}"
    known = set(re.findall(r"--[a-z][a-z-]+", told.stdout))
    asked = {part for handover in HANDOVERS.values() for part in handover.arguments if part.startswith("--")}
    asked |= {"--host", "--port", "--dtype", "--model", "--chat-template-content-format", "--trust-request-mm-kwargs"}
    asked |= {"--hf-overrides", "--video-pruning-rate", "--gpu-memory-utilization", "--ec-transfer-config"}
    assert asked <= known, f"vLLM's server has no {', '.join(sorted(asked - known))} any more"


def test_the_stock_connector_of_encoded_pictures_reads_the_files_that_we_write():
    from vllm.config import ECTransferConfig
    from vllm.distributed.ec_transfer.ec_connector.example_connector import ECExampleConnector

    fields = {field.name for field in dataclasses.fields(ECTransferConfig)}
    for name in ("ec_connector", "ec_role", "ec_connector_extra_config"):
        assert name in fields, f"ECTransferConfig has no {name} any more"
    source = inspect.getsource(ECExampleConnector)
    for name in ("encoder_cache.safetensors", "shared_storage_path", "ec_cache"):
        assert name in source, f"ECExampleConnector does not speak of {name} any more"
