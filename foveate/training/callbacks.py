"""A method in somebody's own training loop: a callback for the Trainer of transformers and for those of TRL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..engine.session import Session
from ..errors import InputError
from ..methods.base import Method
from ..methods.registry import get
from .trainer import METHOD


class MethodCallback(TrainerCallback):
    """Attaches a method while a Trainer trains, and keeps its weights in every checkpoint.

    Attributes
    ----------
    session : the attached method; None outside of training.
    """

    def __init__(self, method: Method) -> None:
        self.method = method
        self.session: Session | None = None

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Attach before the optimizer is made, so that it finds the weights of the method."""
        self.session = Session(model, self.method).attach(train=bool(self.method.trained()))

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Attach where an earlier training has detached; a run that goes on gets the weights that it had."""
        if self.session is None:
            self.session = Session(model, self.method).attach()
        if state.global_step and self.method.trained():
            self._load(Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Save the weights of the method beside those of the model."""
        if self.session is not None and self.method.trained() and args.should_save:
            self.session.save_weights(Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}" / METHOD)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Take the best weights where the Trainer does, save them to ``output_dir``, and detach."""
        if self.session is None:
            return
        if self.method.trained():
            best = state.best_model_checkpoint
            if args.load_best_model_at_end and best is not None:
                self._load(Path(best))
            if args.should_save:
                self.session.save_weights(Path(args.output_dir) / METHOD, training={"steps": state.global_step})
        self.session.detach()
        self.session = None

    def _load(self, checkpoint: Path) -> None:
        if not (checkpoint / METHOD).is_dir():
            raise InputError(
                f"{checkpoint} holds no weights of {self.method.name}; it was saved without this callback. Begin anew, or go on "
                "from another checkpoint."
            )
        if self.session is not None:
            self.session.load_weights(checkpoint / METHOD)


def callback(method: str | Method, **fields: Any) -> MethodCallback:
    """A callback that attaches a method for the time of training; with weights, these are trained, too.

    Parameters
    ----------
    method : a name as in ``foveate.methods()``, or an instance; of a trained one ``fresh()`` begins with random weights.
    **fields : hyper-parameters, where ``method`` is a name.

    Returns
    -------
    What goes into ``callbacks=[...]`` of a Trainer. Checkpoints then have a folder ``foveate`` with the weights of the method, and
    so has the output folder after training.

    Examples
    --------
    >>> trainer = trl.SFTTrainer(model, args, train_dataset=data, callbacks=[foveate.training.callback("prumerge+", budget=144)])
    >>> trainer.train()
    """
    return MethodCallback(get(method, **fields) if isinstance(method, str) else method)
