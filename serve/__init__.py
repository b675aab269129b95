"""``fdml.serve``: the inference server. Its first command comes with a later release."""
