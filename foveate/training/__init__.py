"""Training with a method attached."""
