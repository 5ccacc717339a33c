"""Accuracy on the field's benchmarks, by lmms-eval 0.7 (extra ``eval``): our model for it, our tasks, and rows with their cost."""

from __future__ import annotations

from pathlib import Path

TASKS = Path(__file__).with_name("tasks")  # for --include_path
