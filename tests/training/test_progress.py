"""The progress bar moves with time, and reads values from the device only when they are due."""

from types import SimpleNamespace

import pytest

from cpm_rcnn.training import progress
from cpm_rcnn.training.progress import LossProgressBar


class Bar:
    """What of tqdm's bar is used."""

    disable = False
    total = 100

    def __init__(self):
        self.n, self.shown, self.read = 0, [], []

    def refresh(self):
        self.shown.append(self.n)

    def set_postfix(self, values):
        self.read.append(self.n)


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: now.seconds)
    return now


def test_the_bar_does_not_stand_still_between_logged_steps(clock, monkeypatch):
    monkeypatch.setattr(progress.sys.stdout, "isatty", lambda: True)
    callback, bar = LossProgressBar(log_every_n_steps=20), Bar()
    callback._train_progress_bar = bar
    monkeypatch.setattr(callback, "get_metrics", lambda *arguments: {})
    for batch in range(40):
        clock.seconds += 0.2
        callback.on_train_batch_end(None, None, None, None, batch)
    assert bar.read == [20, 40]
    # Every half second, that is, every third step of 0.2 s.
    assert max(b - a for a, b in zip(bar.shown, bar.shown[1:])) == 3


def test_a_fast_run_refreshes_no_more_often_than_the_clock_says(clock, monkeypatch):
    monkeypatch.setattr(progress.sys.stdout, "isatty", lambda: True)
    callback, bar = LossProgressBar(log_every_n_steps=1000), Bar()
    callback._train_progress_bar = bar
    for batch in range(99):
        clock.seconds += 0.01
        callback.on_train_batch_end(None, None, None, None, batch)
    assert len(bar.shown) == 2
