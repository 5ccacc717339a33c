"""Serving: pictures are encoded and reduced here, and vLLM reads their embeddings in the prompt."""
