"""Methods with weights: how these are made, loaded, checked against the model, trained, and saved."""

from __future__ import annotations

import copy
import dataclasses
import os
import tempfile
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from typing_extensions import Self

from ..errors import InputError, first_line
from ..fingerprint import same_signature
from ..places import user_path
from .host import Host as Host
from .host import ModelShape as ModelShape
from .weights import SHIPPED, Weights, named, state_digest, write

if TYPE_CHECKING:
    from torch import Tensor

    from .base import Method
else:
    Method = object  # at run time a mixin, which leaves the defaults of fields to the class it is mixed into


class _State:
    """The module of a method and where it came from. Copies of the method with other fields share it."""

    def __init__(self, asked: str | None = None, source: Weights | None = None, seed: int | None = None) -> None:
        self.asked, self.source, self.seed = asked, source, seed
        self.module: nn.Module | None = None
        self.shape: ModelShape | None = None
        self.signature: dict[str, list[float]] = {}
        self.run = ""  # names a training run while it lasts
        self.progress = 0.0
        self.warnings: list[str] = []
        self.kept: dict[str, Tensor] | None = None  # of a module that was pickled, until the model is known
        self._digest = (-1, "")

    def name(self) -> str | None:
        """What identifies the weights in settings, without a path; None = there are none."""
        if self.run:
            return f"training:{self.run}:{self._version()}"
        if self.source is not None:
            return f"{self.source.folder.resolve().name}@{self.source.digest}"
        if self.module is None:
            return f"seed@{self.seed}" if self.kept is None and self.seed is not None else self._of_kept()
        if self._digest[0] != self._version():
            self._digest = (self._version(), state_digest(self.module.state_dict()))
        return f"memory@{self._digest[1]}"

    def _of_kept(self) -> str | None:
        return None if self.kept is None else f"memory@{state_digest(self.kept)}"

    def _version(self) -> int:
        """Grows with every step of an optimizer."""
        return 0 if self.module is None else sum(value._version for value in self.module.state_dict(keep_vars=True).values())


@dataclass(kw_only=True)
class Trained(Method):
    """Mixed into a method with weights: ``class Mine(Trained, ProjectorReducer, name="mine")``, with a ``build``.

    The module is no field: it is shared by copies with other settings, and ``settings()`` name it by a digest. It is made or loaded
    when the model is known: at ``attach``, by ``Pictures.reduce`` or ``encode``.

    Parameters
    ----------
    weights : folder or Hub id (``id@revision``) of what ``save_pretrained`` wrote; "pocket" = those shipped for the pocket model;
        None = ``fresh()`` makes random ones.
    """

    weights_of: ClassVar[str] = ""  # the method whose weights it takes, beside its own, where it works with those of another one
    belongs_to_weights: ClassVar[tuple[str, ...]] = ()  # fields that the folder of weights decides
    learns: ClassVar[tuple[str, ...]] = ("module",)  # what ``foveate train`` trains; also "projector" and "lora" of the decoder
    single_turns: ClassVar[bool | None] = None  # every question needs a prompt of its own in training; None = where it is read
    needs_answers: ClassVar[bool] = True  # False: where data have no answers, those of the model with all tokens teach

    weights: str | None = None

    def __post_init__(self) -> None:
        if self.weights is not None and not isinstance(self.weights, str | os.PathLike):
            raise InputError(f"{self.name}: weights={self.weights!r}; expected a folder, or an id of the Hub")
        self.weights = None if self.weights is None else os.fspath(self.weights)
        state: _State | None = getattr(self, "_state", None)
        if state is None or state.asked != self.weights:
            self._state = _State(self.weights, None if self.weights is None else self._opened(self.weights))
        super().__post_init__()

    def _opened(self, name: str) -> Weights:
        source: Weights = vars(self).pop("_given", None) or Weights(named(name, self.weights_of or self.name))
        if source.method not in (self.name, self.weights_of):
            raise InputError(f"{name} holds weights of {source.method!r}, and this is {self.name!r}. Give a folder of its own.")
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for field in self.belongs_to_weights:
            stored = source.fields.get(field, defaults[field])
            stored = tuple(stored) if isinstance(stored, list) else stored
            if getattr(self, field) not in (defaults[field], stored):
                raise InputError(
                    f"{self.name}: {field}={getattr(self, field)!r}, and {name} was trained with {stored!r}. Leave the field out."
                )
            setattr(self, field, stored)
        return source

    # -- what a method says of itself

    def build(self, shape: ModelShape) -> nn.Module:
        """A module with random weights for a model of these sizes."""
        raise TypeError(f"{type(self).__name__} does not implement build(shape)")

    def initialise(self, model: Any, batches: Iterable[dict[str, Tensor]]) -> None:
        """Set first values from training data, once, before the first step; by default they stay random.

        Parameters
        ----------
        model : with this method attached for training.
        batches : of training data, as ``objective`` gets them; only as many as are needed are taken.
        """

    def objective(self, model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        """The loss of one training step, and numbers for the log.

        Parameters
        ----------
        model : with this method attached for training. What it runs within ``with other_method(model):`` is run by the other one.
        batch : arguments of its forward: ``input_ids``, ``attention_mask`` [B, S], ``labels`` [B, S], -100 outside the answers,
            pictures.
        """
        return model(**batch).loss, {}

    def prepare(self, model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor] | None:
        """What is learnt from a batch, where that costs much and does not change in training: it is kept for all epochs.

        Parameters
        ----------
        model, batch : as for ``objective``, with pictures that are encoded already.

        Returns
        -------
        Tensors with a row for each conversation, or each picture; ``objective`` and ``calibrate`` then get batches of these rows.
        None = they get the conversations.
        """
        return None

    def calibrate(self, model: Any, batches: list[dict[str, Tensor]], tolerance: float) -> dict[str, Any]:
        """Fields to be saved with the weights, chosen after training; none by default.

        Parameters
        ----------
        model : with this method attached.
        batches : of validation data, as ``objective`` gets them.
        tolerance : share of the answers that may be lost.
        """
        return {}

    # -- the module

    @property
    def progress(self) -> float:
        """Share of the steps of its training that are done, from 0 to 1, for an ``objective`` that changes with them.

        ``foveate train`` sets it before each step, also in a run that goes on; a loop of your own has to do so itself.
        """
        return self._state.progress

    @progress.setter
    def progress(self, share: float) -> None:
        self._state.progress = share

    @property
    def module(self) -> nn.Module:
        """The trained part.

        Raises
        ------
        InputError : the method has not been attached yet, or has no weights.
        """
        if self._state.module is None:
            raise InputError(f"{self.name}: its weights are made or loaded when it is attached to a model, which has not happened")
        return self._state.module

    def trained(self) -> tuple[Trained, ...]:
        return (self,)

    @property
    def warnings(self) -> list[str]:
        """What every report has to say of how the weights fit the model."""
        return self._state.warnings

    def fresh(self, seed: int = 0) -> Self:
        """The same method with random weights, made from ``seed`` when the model is known. For training."""
        changed = copy.copy(self)
        changed.weights, changed._state = None, _State(seed=seed)
        return changed

    def bind(self, host: Host) -> None:
        """Make or load the module for a model, where that has not happened, and move it to its device.

        It is float32 whatever the model is: a small part, whose sums decide. While it is trained it stays as it is.

        Raises
        ------
        InputError : there are no weights, or they were trained for a model of other sizes.
        """
        state = self._state
        if state.run:
            return
        if state.module is None or state.shape != host.shape:
            state.module = self._made(host).float().eval().requires_grad_(False)
            state.shape, state.kept = host.shape, None
            state.signature = host.signature() if state.source is None else {}
        state.warnings = self._strange(host)  # also where another model has the same sizes
        if any(value.device != host.device for value in state.module.state_dict().values()):
            state.module.to(host.device)

    def _made(self, host: Host) -> nn.Module:
        state = self._state
        if state.source is None and state.kept is None and state.module is None and state.seed is None:
            there = (SHIPPED / (self.weights_of or self.name)).is_dir()
            shipped = ' Shipped for the pocket model: weights="pocket".' if there else ""
            raise InputError(
                f"{self.name} has to be trained and has no weights. Give weights=, a folder or an id of the Hub, or train it with "
                f"'foveate train {self.name}'; fresh() begins with random ones.{shipped}"
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(state.seed or 0)
            module = self.build(host.shape)
        tensors = state.kept if state.source is None else state.source.tensors()
        if tensors is None and state.module is not None:
            tensors = state.module.state_dict()
        if tensors is None:
            return module
        try:
            module.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
        except RuntimeError as error:
            of = "" if state.source is None else f" Trained for: {state.source.config.get('shape')}."
            reason = str(error).partition("\n")[2].strip().partition("\n")[0] or first_line(error)
            raise InputError(
                f"{self.name}: these weights do not fit the model ({reason}).{of} The model is: {dataclasses.asdict(host.shape)}."
            ) from error
        return module

    def _strange(self, host: Host) -> list[str]:
        """Warnings where the weights were trained on another model of the same sizes, or with an adapter that is not there."""
        source, found = self._state.source, []
        if source is None:
            return []
        known = source.config.get("signature") or {}
        if known and not same_signature(known, host.signature()):
            found.append(
                f"{self.name}: its weights were trained on another model than this one; what they choose may be no good here"
            )
        if (source.config.get("training") or {}).get("adapter") and not host.adapted:
            found.append(
                f"{self.name}: its weights were trained together with an adapter of the model, and this one has none. Load the "
                "model with it, unless it is merged already."
            )
        return found

    # -- training

    def begin_training(self, host: Host) -> None:
        """Bind, and let gradients reach the module, which is float32 then."""
        self.bind(host)
        self._state.run = uuid.uuid4().hex
        self.module.train().requires_grad_(True)
        self._state.signature = host.signature()

    def end_training(self) -> None:
        """What was trained is used from now on."""
        self._state.run, self._state.source = "", None
        self.module.eval().requires_grad_(False)

    def load_weights(self, folder: str | Path) -> None:
        """Put the weights of a folder into the module, also while it is trained.

        Raises
        ------
        InputError : there are none, they belong to another method, or are of other sizes.
        """
        source = self._opened(str(folder))
        try:
            self.module.load_state_dict(source.tensors())
        except RuntimeError as error:
            raise InputError(f"{self.name}: the weights of {folder} are of other sizes: {error}") from error
        if not self._state.run:
            self._state.source = None

    # -- on disk

    def save_pretrained(self, folder: str | Path, *, training: dict[str, Any] | None = None) -> None:
        """Write ``config.json`` and ``model.safetensors``.

        Parameters
        ----------
        folder : made if it is new.
        training : a summary of the training, JSON-able: steps, data, seed.

        Raises
        ------
        InputError : the method has no module yet.
        FoveateError : the folder cannot be written.
        """
        from .. import __version__

        module, state = self.module, self._state
        source = {} if state.source is None else state.source.config
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "weights"}
        config = {
            "method": self.name,
            "fields": fields,
            "shape": None if state.shape is None else dataclasses.asdict(state.shape),
            "signature": state.signature or source.get("signature") or {},
            "foveate": __version__,
            "reconstruction": self.reconstruction,
            "training": training or source.get("training") or {},
        }
        write(folder, config, module.state_dict())

    @classmethod
    def from_pretrained(cls, name: str | Path, *, revision: str | None = None, **fields: Any) -> Self:
        """The method with the weights of a folder or Hub id, and the fields that were saved with them.

        Parameters
        ----------
        name : a folder, or an id of the Hub.
        revision : branch, tag or commit on the Hub.
        **fields : to be other than those saved.

        Raises
        ------
        InputError : there are no such weights, or they belong to another method.
        """
        place = str(name) if revision is None else f"{name}@{revision}"
        known = {field.name for field in dataclasses.fields(cls)}
        source, made = Weights(named(place, cls.weights_of or cls.name)), cls.__new__(cls)
        stored = {field: value for field, value in source.fields.items() if field in known and field != "weights"}
        vars(made)["_given"] = source  # so that it is opened once
        made.__init__(**{**stored, **fields, "weights": place})  # type: ignore[misc]
        return made

    def push_to_hub(self, name: str, *, private: bool = True, training: dict[str, Any] | None = None) -> str:
        """Upload the weights with a model card, and return the address. Nothing is uploaded without this call.

        Parameters
        ----------
        name : id of the repository, which is made if it is new.
        private : whether a new one is.
        training : as for ``save_pretrained``.
        """
        from huggingface_hub import HfApi

        api = HfApi()
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, training=training)
            (Path(folder) / "README.md").write_text(self.card(name), encoding="utf-8")
            address = str(api.create_repo(name, private=private, exist_ok=True))
            api.upload_folder(repo_id=name, folder_path=folder)
        return address

    def card(self, name: str) -> str:
        """A model card; ``name`` is the folder or Hub id that the weights are at."""
        lines = ["---", "library_name: foveate", "tags: [visual-tokens, vision-language-models]", "---", f"# {name}", ""]
        lines += [f"Weights of the method `{self.name}` of foveate. Paper: {self.reference or 'none'}.", "", "```python"]
        lines += ["import foveate", "", f'foveate.attach(model, "{self.name}", weights="{name}")', "```", ""]
        return "\n".join(lines)

    # -- settings, and copies in other processes

    def described(self) -> dict[str, Any]:
        if self.weights is None:
            raise InputError(f"{self.name}: its weights are in no folder. Call save_pretrained first, and build it with weights=.")
        folder = user_path(self.weights)
        found = super().described()
        return {**found, "fields": {**found["fields"], "weights": str(folder.absolute()) if folder.is_dir() else self.weights}}

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "weights": self._state.name()}

    def __copy__(self) -> Self:
        made = type(self).__new__(type(self))
        made.__dict__.update(self.__dict__)  # weights and all
        return made

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled: a folder is loaded anew where it arrives, other weights travel along."""
        found, state = dict(self.__dict__), _State(self._state.asked, self._state.source, self._state.seed)
        if state.source is None and self._state.module is not None:
            state.kept = {name: value.detach().cpu().clone() for name, value in self._state.module.state_dict().items()}
        elif state.source is None:
            state.kept = self._state.kept
        return {**found, "_state": state}
