"""``fdml.demo``: the live demo, a page to attack, compare and certify models by hand. docs/demo.md shows it."""
