"""The second pocket model: a Qwen2.5-VL in small, with pictures at their own size, and clips."""
