"""The engine: everything between a model and a method. Methods know nothing of it."""
