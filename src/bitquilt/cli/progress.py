"""What a run looks like while it works: a bar on a terminal, plain lines in a log, nothing with --quiet."""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator

from rich.console import RenderableType
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskProgressColumn, TextColumn
from rich.text import Text

from bitquilt.cli.output import print_fact, size_text, stderr, time_text
from bitquilt.core.events import BlockDone, Epoch, LayerDone, Observer, RunEvent, Stage, Started, silent

# Lines of a log while text is scored: one in so many seconds.
_LOG_EVERY = 10.0

Scored = Callable[[int, int, float], None]


@contextlib.contextmanager
def watching(quiet: bool) -> Iterator[Observer]:
    """An observer for `bitquilt.quantize`, as the terminal, the log or --quiet demands."""
    if quiet:
        yield silent
    elif stderr.is_terminal:
        with _Bar() as bar:
            yield bar.observe
    else:
        yield _Lines().observe


@contextlib.contextmanager
def scoring(quiet: bool) -> Iterator[Scored | None]:
    """A progress callback for `bitquilt.evaluate`: windows done, windows in all, perplexity so far."""
    if quiet:
        yield None
    elif stderr.is_terminal:
        columns = ("window {task.completed:.0f}/{task.total:.0f}", "perplexity {task.fields[perplexity]}")
        with Progress(TextColumn(columns[0]), BarColumn(), TextColumn(columns[1]), _Left(),
                      console=stderr, transient=True) as progress:  # fmt: skip
            yield _ScoreBar(progress)
    else:
        yield _ScoreLines()


def print_untouched(started: Started) -> None:
    """What the run leaves as it is, with its share of the bytes: nothing is skipped silently."""
    for item in started.untouched:
        share = 100 * item.nbytes / started.total_bytes
        tensors = "" if item.tensors == 1 else f"{item.tensors} tensors, such as "
        print_fact(stderr, "as is", f"{share:.2g} % of the bytes, {item.reason}: {tensors}{item.example}")


class Clock:
    """How long will it take? From the pace since `begin`, which a stage before the first layer starts again."""

    def __init__(self) -> None:
        self.begin = time.monotonic()
        self.end: float | None = None

    def restart(self) -> None:
        """Only before the first tick counts: reading text says nothing about the pace of layers."""
        if self.end is None:
            self.begin = time.monotonic()

    def tick(self, done: float, left: float) -> None:
        """`done` units since `begin`, `left` to go."""
        now = time.monotonic()
        self.end = now + (now - self.begin) / max(done, 1e-9) * left

    @property
    def left(self) -> float | None:
        """Seconds to go; None before the first tick."""
        return None if self.end is None else max(0.0, self.end - time.monotonic())


class _Lines:
    """One line per block, plus stages: for logs."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.first = 0
        self.said = time.monotonic()

    def observe(self, event: RunEvent) -> None:
        """Print the event, if it is worth a line."""
        match event:
            case Started():
                _print_start(event)
                self.first = event.done
            case Stage():
                self.clock.restart()
                _say(event.text)
            case Epoch() if event.done == event.of or time.monotonic() - self.said > _LOG_EVERY:
                self.said = time.monotonic()
                _say(_epoch_text(event))
            case BlockDone():
                left = event.blocks - event.block - 1
                self.clock.tick(event.block + 1 - self.first, left)
                error = "" if event.error is None else f"output error {event.error:.4f}, "
                eta = f", about {time_text(self.clock.left or 0)} left" if left else ""
                _say(f"block {event.block + 1} of {event.blocks}: {error}{time_text(event.seconds)}{eta}")


class _Left(ProgressColumn):
    """The time left, by the task's own clock."""

    def render(self, task: Task) -> Text:
        clock = task.fields.get("clock")
        left = None if clock is None else clock.left
        return Text("" if left is None else f"{time_text(round(left))} left", style="cyan")


class _Bar(Progress):
    """A line with the current layer or stage, and a bar below it: fits 80 columns."""

    def __init__(self) -> None:
        self.note = ""
        self.clock = Clock()
        self.layers = self.start_at = 0
        self.errors: list[float] = []
        columns = (TextColumn("block {task.fields[block]}"), BarColumn(bar_width=24), TaskProgressColumn())
        super().__init__(*columns, TextColumn("{task.fields[error]}"), _Left(), console=stderr, transient=True)

    def get_renderables(self) -> Iterable[RenderableType]:
        """The note first, cut to the terminal's width, then the bar once there is something to count."""
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
            _say(f"window {done} of {total}: perplexity {perplexity:.3f} so far")


def _print_start(event: Started) -> None:
    stderr.print(f"[bold]{escape(event.model)}[/]")
    what = f"{event.layers} layers in {event.blocks} blocks; the model takes {size_text(event.total_bytes)}"
    print_fact(stderr, "to do", what)
    print_untouched(event)
    if event.done:
        _say(f"continuing after block {event.done} of {event.blocks}")


def _epoch_text(event: Epoch) -> str:
    change = f"{event.unit} {event.start:.4g} -> {event.loss:.4g}"
    if event.done == event.of:
        return f"{event.where} trained: {change}"
    left = f", about {time_text(event.left)} left" if event.done else ""
    return f"training {event.where}: {event.done} of {event.of} epochs, {change}{left}"


def _say(text: str) -> None:
    stderr.print(text, markup=False)
