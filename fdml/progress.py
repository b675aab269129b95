"""What a person sees while a model trains: a bar with losses, speed and time left."""

import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

# Losses are read from the device this often: on a GPU each reading waits for the work that is under way.
_EVERY_SECONDS = 0.5


class Progress:
    """A bar for one training; silent when the console is quiet, one line an epoch where there is no terminal."""

    def __init__(self, console: Console, role: str, epochs: int, steps: int) -> None:
        self._console, self._role, self._epochs = console, role, epochs
        self._bar = RichProgress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=20),
            TaskProgressColumn(),
            TextColumn("{task.fields[losses]}", style="cyan"),
            TextColumn("{task.fields[speed]}", style="dim"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(role, total=epochs * steps, losses="", speed="")
        self._images = 0
        self._read = time.monotonic()
        self._epoch = 0

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def step(self, epoch: int, images: int, means: Callable[[], dict[str, float]]) -> None:
        """One step of ``images`` done in epoch ``epoch`` (from 0); ``means`` is called now and then only."""
        self._epoch = epoch
        self._images += images
        now = time.monotonic()
        if now - self._read < _EVERY_SECONDS:
            self._bar.advance(self._task)
            return
        speed = self._images / (now - self._read)
        self._read, self._images = now, 0
        losses = " ".join(
            f"{name} {mean:.3f}" for name, mean in means().items() if name not in ("active", "d_ap", "d_an")
        )
        description = f"{self._role} {epoch + 1}/{self._epochs}"
        self._bar.update(self._task, advance=1, description=description, losses=losses, speed=f"{speed:,.0f} img/s")

    def resume(self, steps: int) -> None:
        """Counts steps that an earlier process did."""
        self._bar.update(self._task, completed=steps)

    def validated(self, scores: dict[str, float]) -> None:
        """The scores of the epoch that just ended."""
        if self._bar.disable:
            shown = "  ".join(f"{name} {100 * score:.1f}%" for name, score in scores.items())
            self._console.print(f"{self._role} epoch {self._epoch + 1}/{self._epochs}: validation {shown}")
