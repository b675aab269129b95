"""``fdml.demo``: the live demo. Its first command comes with a later release."""
