"""Progress of training: the loss and the time left, without a line per epoch in a log."""

import io

import pytest
from rich.console import Console

from bitquilt.cli import progress
from bitquilt.cli.progress import watching
from bitquilt.core.events import Epoch

EPOCHS = [Epoch("model.layers.0", done, 3, 0.5, loss, 60.0 * (3 - done)) for done, loss in enumerate((0.5, 0.4, 0.3))]
LAST = Epoch("model.layers.0", 3, 3, 0.5, 0.25, 0.0)


@pytest.mark.parametrize("terminal", [False, True])
def test_loss_and_time_left_are_told(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()
    monkeypatch.setattr(progress, "stderr", Console(file=written, width=120, force_terminal=terminal))
    monkeypatch.setattr(progress, "_LOG_EVERY", 0.0)
    with watching(quiet=False) as observe:
        for event in EPOCHS[:2]:
            observe(event)
        if terminal:
            observe.__self__.refresh()  # type: ignore[attr-defined]
    assert "training model.layers.0: 1 of 3 epochs, error 0.5 -> 0.4, about 2 min" in written.getvalue()


def test_a_log_has_the_end_of_a_training_and_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()
    monkeypatch.setattr(progress, "stderr", Console(file=written, width=120))
    with watching(quiet=False) as observe:
        for event in (*EPOCHS, LAST):
            observe(event)
    assert written.getvalue() == "model.layers.0 trained: error 0.5 -> 0.25\n"
