"""The labs of all exhibits. Importing this imports no torch."""

import threading
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from fdml import pictures
from fdml.demo.exhibit import Exhibit
from fdml.errors import InputError

if TYPE_CHECKING:
    from fdml.demo.lab import Lab


class Labs:
    """The labs of the exhibits by name. They need torch, and are made in the background while the page is served."""

    def __init__(self, exhibits: Sequence[Exhibit]) -> None:
        self.exhibits = {exhibit.name: exhibit for exhibit in exhibits}
        self._lock = threading.Lock()

    @cached_property
    def _made(self) -> "dict[str, Lab]":
        import torch

        from fdml.demo.lab import Lab

        # Two models are attacked at once, and often for several visitors: more threads each would be in their own way.
        torch.set_num_threads(max(1, pictures.cpus() // 2))
        return {name: Lab(exhibit) for name, exhibit in self.exhibits.items()}

    def __getitem__(self, name: str) -> "Lab":
        if name not in self.exhibits:
            raise InputError(f"unknown models {name!r}: one of {', '.join(self.exhibits)}")
        with self._lock:
            lab = self._made[name]
            _ = lab.models  # loaded here, by one visitor for all
        return lab

    def warm(self) -> None:
        """Makes all of them."""
        for name in self.exhibits:
            self[name]
