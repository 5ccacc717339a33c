"""Visual tokens that one process encodes, and vLLM in another takes from the folder of its encoder-cache connector."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import foveate
from foveate.serving.plugin import connector, qwen_request, stored_request
from tests.vllm import plugin_engine as engine
from tests.vllm.test_plugin_qwen import FAMILIES, ROWS, Bench, with_processor

CHECKS = ("placed tokens, different numbers in a batch", "again, from the caches")


def stored(bench: Bench, store: Path) -> dict[str, Any]:
    """Prompts without embeddings, and what transformers says to them."""
    prompts, true = [], []
    for number, (media, budget) in enumerate(ROWS):
        inputs = bench.inputs(number, media)
        encoded = foveate.encode(bench.model, "divprune", budget=budget, **inputs)
        with foveate.DivPrune(budget=budget)(bench.model):
            true.append(engine.reference(bench.model, inputs))
        request = stored_request(encoded, store)
        prompts.append(bench.prompt(inputs, request["multi_modal_data"]) | {"multi_modal_uuids": request["multi_modal_uuids"]})
    return {"prompts": prompts, "true": true}


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    """This process encodes, and ends up with nothing but files; another one runs vLLM on them."""
    folder = tmp_path_factory.mktemp("connector")
    for family in FAMILIES:
        bench = Bench(family, with_processor(family, folder / family))
        torch.save(stored(bench, folder / f"{family}-store"), folder / f"{family}.pt")
    return engine.run(__name__, folder)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_from_another_process(checked, family, check):
    assert checked[f"{family}: {check}"] == "", checked[f"{family}: {check}"]


def test_what_is_written(tmp_path, monkeypatch):
    bench = Bench("qwen2_5_vl", with_processor("qwen2_5_vl", tmp_path / "model"))
    inputs = bench.inputs(4, ROWS[4][0])
    encoded = foveate.encode(bench.model, "divprune", budget=3, **inputs)
    request = stored_request(encoded, tmp_path / "store")
    keys, whole = request["multi_modal_uuids"]["image"], qwen_request(encoded)["image"]
    found = [load_file(tmp_path / "store" / key / "encoder_cache.safetensors")["ec_cache"] for key in keys]
    assert torch.equal(torch.cat(found), whole.pop("image_embeds"))
    fields = request["multi_modal_data"]["image"]
    assert fields.keys() == whole.keys()
    assert all(torch.equal(fields[name], whole[name]) for name in whole)
    times = [path.stat().st_mtime_ns for path in sorted((tmp_path / "store").rglob("*.safetensors"))]
    assert stored_request(encoded, tmp_path / "store")["multi_modal_uuids"]["image"] == keys
    assert [path.stat().st_mtime_ns for path in sorted((tmp_path / "store").rglob("*.safetensors"))] == times, "written once"
    file = tmp_path / "store" / keys[0] / "encoder_cache.safetensors"
    whole_file = file.read_bytes()
    file.write_bytes(whole_file[:100])  # as a copy that was interrupted leaves it
    stored_request(encoded, tmp_path / "store")
    assert file.read_bytes() == whole_file
    other = foveate.encode(bench.model, "divprune", budget=4, **inputs)
    assert not set(stored_request(other, tmp_path / "store")["multi_modal_uuids"]["image"]) & set(keys)
    moved = {**qwen_request(encoded)["image"], "image_extents": whole["image_extents"] + 1}
    monkeypatch.setattr(connector, "qwen_request", lambda *_, **__: {"image": dict(moved)})
    assert not set(stored_request(encoded, tmp_path / "store")["multi_modal_uuids"]["image"]) & set(keys), "places count"
    (tmp_path / "file").write_text("")
    with pytest.raises(foveate.InputError, match="cannot be written"):
        stored_request(encoded, tmp_path / "file")


def main(check: engine.Checks, folder: Path, family: str) -> None:
    from vllm.config import ECTransferConfig

    found = torch.load(folder / f"{family}.pt", weights_only=False)
    place = {"shared_storage_path": str(folder / f"{family}-store")}
    transfer = ECTransferConfig(ec_connector="ECExampleConnector", ec_role="ec_consumer", ec_connector_extra_config=place)
    llm = engine.engine(folder / family, ec_transfer_config=transfer, limit_mm_per_prompt={"image": 4})

    def answered() -> None:
        engine.same(engine.answers(llm, found["prompts"]), found["true"])

    for name, run in zip(CHECKS, (answered, answered), strict=True):
        check(f"{family}: {name}", run)
    engine.stop(llm)


if __name__ == "__main__":
    results = engine.Checks(Path(sys.argv[1]))
    for each in FAMILIES:
        main(results, Path(sys.argv[1]), each)
