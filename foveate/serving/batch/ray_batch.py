"""An offline batch on many machines: actors that encode pictures, then actors with vLLM, on Ray Data."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import LINE, FoveateError, InputError, MissingExtraError, cut, first_line
from ..encoding import method_of
from ..export import ready_export
from .base import BatchEngine, EngineError, Job, document
from .offline import batches
from .rows import AnswerSettings, RowPlace, Source
from .vllm_engine import ENCODED, Ready, RowEncoder, TextEngine


@dataclass(frozen=True)
class Cluster:
    """Where actors run, and how many.

    Attributes
    ----------
    encoders, engines : how many encode pictures, and how many answer.
    address : of a running cluster; None starts one on this machine, and ends it.
    """

    encoders: int = 1
    engines: int = 1
    address: str | None = None


class EncoderActor:
    """Reads rows and encodes their pictures."""

    def __init__(self, path: Path, model: str, wanted: AnswerSettings) -> None:
        self.source, self.wanted = Source(path), wanted
        self.encoder = RowEncoder(model, wanted)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        columns = (batch["number"].tolist(), batch["id"], batch["start"].tolist(), batch["line"])
        lines = [RowPlace(n, json.loads(i), s, str(line)) for n, i, s, line in zip(*columns, strict=True)]
        ids: list[str] = []
        digests: list[str] = []
        prompts: list[bytes] = []
        errors: list[str] = []
        for rows, broken in batches(self.source, lines, self.wanted, len(lines)):
            outcomes: list[tuple[str | int, str, Ready | Exception]]
            outcomes = [(line.id, self.source.digest(line), error) for line, error in broken]
            known = [(row.id, row.digest) for row in rows]
            outcomes += [(*pair, outcome) for pair, outcome in zip(known, self.encoder.encode(rows), strict=True)]
            for own, row, outcome in outcomes:
                ids.append(json.dumps(own))
                digests.append(row)
                prompts.append(outcome.packed() if isinstance(outcome, Ready) else b"")
                errors.append("" if isinstance(outcome, Ready) else json.dumps(document(own, row, outcome)))
        return {"id": ids, "row": digests, "prompt": _objects(prompts), "error": errors}


class EngineActor:
    """Answers prompts whose pictures are encoded."""

    def __init__(self, folder: Path) -> None:
        self.engine = TextEngine(folder)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        places = [place for place, data in enumerate(batch["prompt"]) if data]
        found = self.engine.answer([Ready.unpacked(batch["prompt"][place]) for place in places])
        rows = batch["error"].tolist()
        for place, outcome in zip(places, found, strict=True):
            rows[place] = json.dumps(document(json.loads(batch["id"][place]), str(batch["row"][place]), outcome))
        return {"row": rows}


def _objects(values: Sequence[bytes]) -> Any:
    """An array of bytes as they are: NumPy's own type cuts zeros off their end."""
    found = np.empty(len(values), dtype=object)
    found[:] = values
    return found


def answered_by_ray(
    source: Source, lines: Sequence[RowPlace], wanted: AnswerSettings, model: str, folder: Path, size: int, cluster: Cluster
) -> Iterator[list[dict[str, Any]]]:
    """Rows of the output, as they come.

    Parameters
    ----------
    model, folder : a model and its export, where every machine finds them.
    size : prompts that an actor with vLLM gets at once.

    Raises
    ------
    MissingExtraError : Ray is not installed.
    InputError : there is no cluster at the address, or it has too few CPUs or GPUs.
    EngineError : an actor does not start or has stopped.
    """
    ray = _started(cluster)
    try:
        encoder_gpus, engine_gpus = shares(ray.cluster_resources(), cluster)
        places = [{"number": row.number, "id": json.dumps(row.id), "start": row.start, "line": row.line} for row in lines]
        data = ray.data.from_items(places, override_num_blocks=math.ceil(len(places) / ENCODED))
        encoded = data.map_batches(
            EncoderActor,
            fn_constructor_args=(source.path, model, wanted),
            batch_size=ENCODED,
            compute=ray.data.ActorPoolStrategy(size=cluster.encoders),
            num_gpus=encoder_gpus,
        )
        rows = encoded.map_batches(
            EngineActor,
            fn_constructor_args=(folder,),
            batch_size=size,
            compute=ray.data.ActorPoolStrategy(size=cluster.engines),
            num_gpus=engine_gpus,
        )
        for batch in rows.iter_batches(batch_size=None, batch_format="numpy"):
            yield [json.loads(row) for row in batch["row"]]
    except FoveateError:
        raise
    except Exception as error:  # what an actor raised, below where it was raised, or what became of a machine
        why = (str(error).strip().splitlines() or [type(error).__name__])[-1].rstrip(".")
        raise EngineError(f"Ray has stopped: {cut(why, LINE)}. The same command goes on from there.") from error
    finally:
        ray.shutdown()


def _started(cluster: Cluster) -> Any:
    """Ray, connected."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a batch tells nobody
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise MissingExtraError("Ray", "ray") from error
    options: dict[str, Any] = {"address": cluster.address}
    if cluster.address is None:
        actors = cluster.encoders + cluster.engines
        options = {"address": "local", "num_cpus": max(os.cpu_count() or 1, actors + 1), "include_dashboard": False}
    try:
        ray.init(log_to_driver=False, logging_level="ERROR", **options)
    except Exception as error:  # whatever keeps a cluster from being reached or started
        raise InputError(f"Ray cannot be used at {cluster.address or 'this machine'}: {first_line(error)}") from error
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    return ray


def shares(resources: dict[str, float], cluster: Cluster) -> tuple[float, float]:
    """GPUs of each actor that encodes, and of each that answers; without GPUs all run on CPUs.

    Raises
    ------
    InputError : the cluster has too few CPUs or GPUs.
    """
    cpus, gpus = resources.get("CPU", 0), resources.get("GPU", 0)
    actors = cluster.encoders + cluster.engines
    if cpus < actors:
        raise InputError(f"the cluster has {cpus:g} CPUs, and {actors} actors need one each. Lower --encoders or --engines.")
    if gpus == 0:
        return 0.0, 0.0
    if gpus < cluster.engines:
        raise InputError(f"the cluster has {gpus:g} GPUs, and {cluster.engines} engines need one each. Lower --engines.")
    left = int(gpus) - cluster.engines
    return (1 / math.ceil(cluster.encoders / left) if left else 0.0), 1.0


class Ray(BatchEngine, name="ray", rows=64, answers="vllm", options=("export", "encoders", "engines", "address")):
    """vLLM on many machines, and encoders beside it."""

    def check(self, wanted: AnswerSettings) -> None:
        method_of(wanted.method, wanted.budget, wanted.config)

    def start(self, job: Job) -> Iterator[list[dict[str, Any]]]:
        given = {name: value for name, value in job.options.items() if value is not None}
        folder = ready_export(job.model, job.export).absolute()
        return answered_by_ray(job.source, job.lines, job.wanted, job.model, folder, job.size, Cluster(**given))
