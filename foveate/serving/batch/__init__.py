"""Offline batches: files of questions, answered by an engine."""
