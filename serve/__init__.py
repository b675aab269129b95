"""``fdml.serve``: the inference server. docs/serving.md shows how to use it; it runs where torch is not installed."""
