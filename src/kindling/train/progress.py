"""A progress bar for a training: a reader of events, nothing more."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn

from kindling.train.events import Event


class TrainingBar:
    """Epoch, loss, rows per second and time left, on stderr. Feed it events with `on_event`."""

    def __init__(self, epochs: int, *, shown: bool = True) -> None:
        self._epochs = epochs
        self._console = Console(stderr=True)
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not shown,
            transient=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("packing", total=None, figures="")
        self._shown = shown
        self._began = time.monotonic()
        self._rows_before = 0
        self._first_attempt: int | None = None

    def __enter__(self) -> TrainingBar:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def on_event(self, event: Event) -> None:
        """Show what an event says."""
        data = event.data
        if event.kind == "spooled" and event.rank == 0:
            self._bar.update(self._task, description="meeting")
        elif event.kind == "met" and event.rank == 0:
            self._began = time.monotonic()
            if self._first_attempt is None:
                self._first_attempt = event.attempt
            if event.attempt > self._first_attempt:
                self._say(f"attempt {event.attempt + 1}: a worker was lost, the workers start again")
        elif event.kind == "resumed" and event.rank == 0:
            self._say(f"resumed after step {event.step:,}")
        elif event.kind == "warning":
            self._say(f"worker {event.rank}: {data['text']}")
        elif event.kind == "step":
            rows = (event.epoch - 1) * data["of"] + data["rows"]
            if not self._rows_before or rows < self._rows_before:
                self._began, self._rows_before = time.monotonic(), rows
            seconds = max(time.monotonic() - self._began, 1e-9)
            speed = (rows - self._rows_before) / seconds
            figures = f"loss {data['loss']:.4f}" + (f"  {speed:,.0f} rows/s" if speed else "")
            self._bar.update(
                self._task,
                description=f"epoch {event.epoch}/{self._epochs}",
                completed=rows,
                total=self._epochs * data["of"],
                figures=figures,
            )
        elif event.kind == "epoch" and event.rank == 0:
            figures = f"epoch {event.epoch}/{self._epochs}: loss {data['loss']:.4f}"
            checked = data.get("validation")
            if checked:
                figures += f", validation loss {checked['loss']:.4f}"
                if "accuracy" in checked:
                    figures += f", accuracy {checked['accuracy']:.2%}"
            self._say(f"{figures}, {data['rows_per_s']:,.0f} rows/s")

    def _say(self, text: str) -> None:
        if self._shown:
            self._console.print(text, highlight=False)
