"""The gateway: OpenAI's chat API in front of vLLM, with fewer visual tokens."""
