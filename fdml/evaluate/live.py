"""What a person sees while models are evaluated: a table that grows, a bar, and the time left."""

from types import TracebackType

from rich.console import Console, Group
from rich.live import Live as RichLive
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text


class Live:
    """Watches an evaluation on a terminal; says nothing where there is none."""

    def __init__(self, console: Console, models: list[str], images: int) -> None:
        self._shares: dict[str, dict[str, float]] = {}
        self._models, self._images = models, images
        self._bar = Progress(
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TextColumn("{task.fields[job]}", style="cyan"),
            TimeElapsedColumn(),
            TextColumn("left", style="dim"),
            TimeRemainingColumn(),
        )
        self._task = self._bar.add_task("", total=1.0, job="")
        self._live = RichLive(console=console, transient=True, refresh_per_second=4) if console.is_terminal else None

    def __enter__(self) -> "Live":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def begins(self, victim: str, job: str, share: float) -> None:
        """A unit of work begins; ``share`` of all work is done."""
        self._bar.update(self._task, completed=share, job=f"{victim}: {job}")
        self._show()

    def ends(self, victim: str, job: str, accuracy: float | None) -> None:
        """A job is done on every image."""
        if accuracy is not None:
            self._shares.setdefault(job, {})[victim] = accuracy
        self._show()

    def _show(self) -> None:
        if self._live is not None:
            self._live.update(Group(self._table(), self._bar))

    def _table(self) -> Table:
        table = Table(box=None, title_justify="left", title=f"standing, of {self._images} images", title_style="bold")
        table.add_column("attack")
        for name in self._models:
            table.add_column(Text(name), justify="right")
        for job, shares in self._shares.items():
            cells = [f"{100 * shares[name]:.1f}%" if name in shares else "" for name in self._models]
            table.add_row(job, *cells)
        return table
