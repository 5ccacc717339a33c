"""One model: which family it is, where its parts are, and what is used of transformers beyond its documented surface."""
