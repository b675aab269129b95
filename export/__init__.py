"""``fdml.export``: from a student to the files that are deployed. Its first command comes with a later release."""
