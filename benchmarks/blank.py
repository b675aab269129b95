"""The card of a network that nothing is known of, as a bundle or an export needs one."""

from typing import Any

from fdml.card import Card

SHAPE = (3, 32, 32)


def blank(architecture: str, options: dict[str, Any]) -> Card:
    """For images of CIFAR's size and ten classes."""
    return Card(
        architecture=architecture,
        options=options,
        classes=tuple(f"class {i}" for i in range(10)),
        input=SHAPE,
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
        threat=None,
        role="student",
        recipe={},
        seed=0,
        data={"name": "none", "fingerprint": "none"},
        metrics={},
        versions={},
    )
