"""What a training run tells while it lasts, and how it is interrupted."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ..jsonl import append, parsed, whole_lines

Step = Callable[[int, int], None]  # steps done, of how many
SHOWN = {"loss": "loss", "eval_loss": "loss on validation data"}


class Log(TrainerCallback):
    """Losses as lines for people, and everything that is logged as JSON lines in a file."""

    def __init__(self, path: Path, tell: Callable[[str], None]) -> None:
        self.path, self.tell = path, tell

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Leave out lines of steps that are done again."""
        if args.should_save:
            lines = [line for _, _, line in whole_lines(self.path) if parsed(line).get("step", 0) <= state.global_step]
            self.path.write_bytes(b"".join(lines))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        """Write a line."""
        if not args.should_save:
            return
        with self.path.open("ab") as file:
            append(file, [{"step": state.global_step, **(logs or {})}])
        for name, what in SHOWN.items():
            if name in (logs or {}):
                self.tell(f"step {state.global_step}/{state.max_steps}: {what} {(logs or {})[name]:.4f}")


class Steps(TrainerCallback):
    """Tells how many steps are done, and of how many."""

    def __init__(self, step: Step) -> None:
        self.step = step

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Of a run that goes on, some are."""
        self.step(state.global_step, state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """One more is."""
        self.step(state.global_step, state.max_steps)


class Stopping(TrainerCallback):
    """Lets the first Ctrl-C end a run after a step whose state is saved; a second one ends it at once."""

    def __init__(self) -> None:
        self.asked = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within this, Ctrl-C is taken so."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.getsignal(signal.SIGINT)

        def ask(*_: Any) -> None:
            self.asked = True
            signal.signal(signal.SIGINT, before)

        if callable(before):  # not where Ctrl-C is ignored
            signal.signal(signal.SIGINT, ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Save and stop."""
        if self.asked:
            control.should_save = control.should_training_stop = True
