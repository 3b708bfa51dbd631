"""Training speed and the time spent waiting for data."""

import time
from types import SimpleNamespace

import pytest
import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import Callback
from torch.utils.data import DataLoader, Dataset

from cpm_rcnn.training.throughput import Throughput


class _Images(Dataset):
    def __init__(self, count, wait=0.0):
        self.count, self.wait = count, wait

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        time.sleep(self.wait)
        return torch.zeros(3, 2, 2), {}


class _Module(LightningModule):
    def __init__(self, step_time=0.0, validation_time=0.0):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.step_time, self.validation_time = step_time, validation_time

    def training_step(self, batch):
        time.sleep(self.step_time)
        return self.weight * 1.0

    def validation_step(self, batch):
        time.sleep(self.validation_time)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class _Logged(Callback):
    """Stores what a logger would receive, by step."""

    def __init__(self):
        self.rows = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        found = {k: v.item() for k, v in trainer.logged_metrics.items() if k.startswith("train/")}
        if found and found not in self.rows.values():
            self.rows[trainer.global_step] = found


def _fit(tmp_path, module, data, validation=None, batch_size=4, **options):
    logged = _Logged()
    trainer = Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Throughput(), logged],
        **options,
    )

    def loader(images):
        return DataLoader(images, batch_size=batch_size, collate_fn=lambda batch: tuple(map(list, zip(*batch))))

    trainer.fit(module, loader(data), loader(validation) if validation else None)
    return logged.rows


@pytest.fixture(autouse=True)
def _quiet(caplog):
    caplog.set_level("ERROR", logger="pytorch_lightning")


def test_speed_is_the_number_of_images_of_all_processes_divided_by_the_time_of_the_window(monkeypatch):
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    trainer = SimpleNamespace(world_size=8, global_step=0, log_every_n_steps=2)
    logged = []
    module = SimpleNamespace(log_dict=lambda metrics, **options: logged.append(metrics))
    throughput = Throughput()
    throughput.on_train_start(trainer, module)
    for wait, step, images in ((50, 3, 2), (1, 4, 2), (2, 6, 2), (0, 8, 1)):
        now += wait
        throughput.on_train_batch_start(trainer, module, None, 0)
        now += step
        trainer.global_step += 1
        throughput.on_train_batch_end(trainer, module, None, ([None] * images, [None] * images), 0)
    assert logged == [
        {"train/images_per_s": 8 * 4 / 8, "train/data_wait_s": 0.5},
        {"train/images_per_s": 8 * 3 / 16, "train/data_wait_s": 1.0},
    ]


def test_wait_and_speed_match_a_slow_loader_and_a_slow_step(tmp_path):
    rows = _fit(tmp_path, _Module(step_time=0.03), _Images(48, wait=0.005), max_epochs=1, log_every_n_steps=5)
    assert sorted(rows) == [5, 10]
    for metrics in rows.values():
        # A sleep is never shorter than requested, but on a busy machine it can be much longer.
        # The wait for the first batch of the run is excluded, hence 4 of 5.
        assert 0.99 * 0.02 * 4 / 5 < metrics["train/data_wait_s"] < 0.2
        assert 10 < metrics["train/images_per_s"] < 1.02 * 20 / (5 * 0.03 + 4 * 0.02)


def test_validation_is_excluded_from_speed_and_wait(tmp_path):
    rows = _fit(
        tmp_path,
        _Module(step_time=0.01, validation_time=0.5),
        _Images(44),
        validation=_Images(4),
        max_epochs=1,
        val_check_interval=3,
        log_every_n_steps=5,
    )
    for metrics in rows.values():
        # With one pause of 0.5 s in five steps these would be at least 0.1 and at most 40.
        assert metrics["train/data_wait_s"] < 0.09
        assert metrics["train/images_per_s"] > 45


def test_all_accumulated_batches_are_counted_and_logged_once_per_window(tmp_path):
    rows = _fit(
        tmp_path,
        _Module(step_time=0.02),
        _Images(68),
        max_epochs=1,
        accumulate_grad_batches=4,
        log_every_n_steps=2,
    )
    assert sorted(rows) == [2, 4]
    for metrics in rows.values():
        # If only the last batch of each step were counted, this would be at most 50.
        assert 60 < metrics["train/images_per_s"] < 1.02 * 4 / 0.02


def test_nothing_is_logged_with_log_every_n_steps_0(tmp_path):
    assert _fit(tmp_path, _Module(), _Images(8), max_epochs=1, log_every_n_steps=0) == {}
