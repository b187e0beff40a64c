"""Progress of a run: `watching` and `scoring` show a bar on a terminal, lines in a log and nothing with --quiet."""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator

from rich.console import RenderableType
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskProgressColumn, TextColumn
from rich.text import Text

from bitquilt.cli.output import print_fact, print_line, print_untouched, stderr
from bitquilt.core.events import BlockDone, Epoch, LayerDone, Observer, RunEvent, Stage, Started, silent
from bitquilt.core.units import size_text, time_text

# Seconds between two lines of a log while a text is scored or a block is trained.
_LOG_EVERY = 10.0

Scored = Callable[[int, int, float], None]


@contextlib.contextmanager
def watching(quiet: bool) -> Iterator[Observer]:
    """Yield an observer for `bitquilt.quantize` that suits the terminal, the log or --quiet."""
    if quiet:
        yield silent
    elif stderr.is_terminal:
        with _Bar() as bar:
            yield bar.observe
    else:
        yield _Lines().observe


@contextlib.contextmanager
def scoring(quiet: bool) -> Iterator[Scored | None]:
    """Yield a callback for `bitquilt.evaluate` that takes windows done, all windows, and the perplexity so far."""
    if quiet:
        yield None
    elif stderr.is_terminal:
        windows = TextColumn("window {task.completed:.0f}/{task.total:.0f}")
        columns = (windows, BarColumn(), TextColumn("perplexity {task.fields[perplexity]}"), _Left())
        with Progress(*columns, console=stderr, transient=True) as progress:
            yield _ScoreBar(progress)
    else:
        yield _ScoreLines()


class Clock:
    """Time left, estimated from the pace since `begin`."""

    def __init__(self) -> None:
        self.begin = time.monotonic()
        self.end: float | None = None

    def restart(self) -> None:
        """Start again at a stage before the first tick: reading text tells nothing about the pace of layers."""
        if self.end is None:
            self.begin = time.monotonic()

    def tick(self, done: float, left: float) -> None:
        """Note that `done` units are done since `begin` and `left` remain."""
        now = time.monotonic()
        self.end = now + (now - self.begin) / max(done, 1e-9) * left

    @property
    def left(self) -> float | None:
        """Seconds left; None before the first tick."""
        return None if self.end is None else max(0.0, self.end - time.monotonic())


class _Lines:
    """One line per block and stage, for logs."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.first = 0
        self.said = time.monotonic()

    def observe(self, event: RunEvent) -> None:
        """Print the event if it is worth a line."""
        match event:
            case Started():
                _print_start(event)
                self.first = event.done
            case Stage():
                self.clock.restart()
                print_line(stderr, event.text)
            case Epoch() if event.done == event.of or time.monotonic() - self.said > _LOG_EVERY:
                self.said = time.monotonic()
                print_line(stderr, _epoch_text(event))
            case BlockDone():
                left = event.blocks - event.block - 1
                self.clock.tick(event.block + 1 - self.first, left)
                error = "" if event.error is None else f"output error {event.error:.4f}, "
                eta = f", about {time_text(self.clock.left or 0)} left" if left else ""
                print_line(stderr, f"block {event.block + 1} of {event.blocks}: {error}{time_text(event.seconds)}{eta}")


class _Left(ProgressColumn):
    """The time left by the task's own clock."""

    def render(self, task: Task) -> Text:
        clock = task.fields.get("clock")
        left = None if clock is None else clock.left
        return Text("" if left is None else f"{time_text(round(left))} left", style="cyan")


class _Bar(Progress):
    """A line with the current layer or stage above a bar, in 80 columns."""

    def __init__(self) -> None:
        self.note = ""
        self.clock = Clock()
        self.layers = self.start_at = 0
        self.errors: list[float] = []
        columns = (TextColumn("block {task.fields[block]}"), BarColumn(bar_width=24), TaskProgressColumn())
        super().__init__(*columns, TextColumn("{task.fields[error]}"), _Left(), console=stderr, transient=True)

    def get_renderables(self) -> Iterable[RenderableType]:
        """Return the note, cut to the terminal's width, and the bar once there is something to count."""
        if self.note:
            yield Text(self.note, no_wrap=True, overflow="ellipsis", style="dim")
        if self.tasks:
            yield self.make_tasks_table(self.tasks)

    def observe(self, event: RunEvent) -> None:
        """Move the bar."""
        match event:
            case Started():
                _print_start(event)
                self.layers = event.layers
                self.start_at = event.layers * event.done // event.blocks
                block = f"{min(event.done + 1, event.blocks)}/{event.blocks}"
                self.add_task("", total=event.layers, completed=self.start_at, block=block, error="", clock=self.clock)
            case Stage():
                self.clock.restart()
                self.note = event.text
            case Epoch():
                self.note = _epoch_text(event)
            case LayerDone():
                self._layer(event)
            case BlockDone():
                following = min(event.block + 2, event.blocks)
                self.update(self.task_ids[0], block=f"{following}/{event.blocks}")
                self.note = f"block {following}: collecting statistics" if event.block + 1 < event.blocks else ""

    def _layer(self, event: LayerDone) -> None:
        task = self.tasks[0]
        self.advance(task.id)
        self.clock.tick(task.completed - self.start_at, self.layers - task.completed)
        if event.output_error is not None:
            self.errors.append(event.output_error)
            self.update(task.id, error=f"error {sum(self.errors) / len(self.errors):.4f}")
        self.note = f"{event.layer}: {event.bpw:.2f} bits per weight, {time_text(event.seconds)}"


class _ScoreBar:
    def __init__(self, progress: Progress) -> None:
        self.progress, self.clock = progress, Clock()
        self.task = progress.add_task("", total=None, perplexity="", clock=self.clock, visible=False)

    def __call__(self, done: int, total: int, perplexity: float) -> None:
        self.clock.tick(done, total - done)
        self.progress.update(self.task, completed=done, total=total, perplexity=f"{perplexity:.3f}", visible=True)


class _ScoreLines:
    def __init__(self) -> None:
        self.said = time.monotonic()

    def __call__(self, done: int, total: int, perplexity: float) -> None:
        if time.monotonic() - self.said > _LOG_EVERY:
            self.said = time.monotonic()
            print_line(stderr, f"window {done} of {total}: perplexity {perplexity:.3f} so far")


def _print_start(event: Started) -> None:
    stderr.print(f"[bold]{escape(event.model)}[/]")
    what = f"{event.layers} layers in {event.blocks} blocks; the model takes {size_text(event.total_bytes)}"
    print_fact(stderr, "to quantize", what)
    print_untouched(stderr, event.untouched, event.total_bytes)
    if event.done:
        print_line(stderr, f"continuing after block {event.done} of {event.blocks}")


def _epoch_text(event: Epoch) -> str:
    change = f"{event.unit} {event.start:.4g} -> {event.loss:.4g}"
    if event.done == event.of:
        return f"{event.where} trained: {change}"
    left = f", about {time_text(event.left)} left" if event.done else ""
    return f"training {event.where}: {event.done} of {event.of} epochs, {change}{left}"
