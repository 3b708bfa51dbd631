"""Plots of losses and average precision from metrics.csv."""

import numpy as np
import pytest
from PIL import Image

from cpm_rcnn.errors import UserError
from cpm_rcnn.reporting import curves
from cpm_rcnn.reporting.curves import plot_curves

HEADER = "epoch,step,train/loss,train/loss_cls,val/AP,val/AP50,val/AP75\n"


def _write(path, *rows, header=HEADER):
    path.write_text(header + "".join(f"{row}\n" for row in rows))
    return path


def test_a_run_with_losses_and_validations_gives_both_pictures(tmp_path):
    rows = [f"0,{k},{1 / (k + 1)},{0.5 / (k + 1)},,," for k in range(0, 300, 10)]
    rows += ["0,100,,,0.1,0.2,0.05", "1,200,,,0.3,0.5,0.2"]
    written = plot_curves(_write(tmp_path / "metrics.csv", *rows), tmp_path / "new" / "plots")
    assert [path.name for path in written] == ["loss.png", "ap.png"]
    for path in written:
        with Image.open(path) as image:
            assert image.width > 600


def test_a_run_without_validation_has_no_ap_picture(tmp_path):
    path = _write(tmp_path / "metrics.csv", "0,1,0.5,0.2,,,")
    assert [p.name for p in plot_curves(path, tmp_path)] == ["loss.png"]


def test_a_run_without_logged_values_has_no_pictures(tmp_path):
    assert plot_curves(_write(tmp_path / "metrics.csv"), tmp_path) == []


def test_sparse_and_unordered_rows_are_sorted_by_step_and_undefined_values_are_skipped(tmp_path):
    path = _write(
        tmp_path / "metrics.csv", "0,20,2.0,,,,", "0,10,1.0,nan,,,", "0,30,inf,,-1.0,,", "0,40,,,0.5,,", "0,5"
    )
    read = curves._read(path)
    assert {name: [column.tolist() for column in curve] for name, curve in read.items() if "/" in name} == {
        "train/loss": [[10, 20], [1, 2]],
        "val/AP": [[40], [0.5]],
    }


@pytest.mark.parametrize("count", [1, 2, 7, 500])
def test_smoothing_does_not_change_a_constant_or_the_length(count):
    assert curves._smoothed(np.full(count, 3.0)) == pytest.approx([3.0] * count)


def test_smoothing_reduces_noise():
    noise = np.random.default_rng(0).normal(size=1000)
    assert curves._smoothed(noise).std() < 0.3 * noise.std()


def test_a_missing_file_and_a_file_of_another_program_are_refused_by_name(tmp_path):
    with pytest.raises(UserError, match=r"none\.csv: cannot be read"):
        plot_curves(tmp_path / "none.csv", tmp_path)
    with pytest.raises(UserError, match=r"other\.csv: .*no column 'step'"):
        plot_curves(_write(tmp_path / "other.csv", header="a,b\n"), tmp_path)


def test_plotting_creates_no_global_figure(tmp_path):
    import matplotlib.pyplot as plt

    plot_curves(_write(tmp_path / "metrics.csv", "0,1,0.5,0.2,0.1,0.2,0.3"), tmp_path)
    assert plt.get_fignums() == []


def test_the_metrics_of_a_resumed_run_are_joined_and_the_later_part_counts_where_parts_overlap(tmp_path):
    _write(tmp_path / "metrics.csv", "0,10,4.0,,,,", "0,20,3.0,,,,", "0,30,9.0,,,,")
    curves.keep_metrics(tmp_path, resuming=True)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics_001.csv"]
    _write(tmp_path / "metrics.csv", "0,30,2.0,,,,", "0,40,1.0,,,,")
    joined = curves._joined([curves._read(tmp_path / name) for name in ("metrics_001.csv", "metrics.csv")])
    assert [column.tolist() for column in joined["train/loss"]] == [[10, 20, 30, 40], [4, 3, 2, 1]]
    assert [path.name for path in plot_curves(tmp_path / "metrics.csv", tmp_path)] == ["loss.png"]


def test_a_new_run_in_the_same_folder_removes_the_earlier_parts(tmp_path):
    _write(tmp_path / "metrics_001.csv", "0,10,4.0,,,,")
    _write(tmp_path / "metrics_of_mine.csv", "0,10,4.0,,,,")
    curves.keep_metrics(tmp_path, resuming=False)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics_of_mine.csv"]


def test_a_part_that_a_full_disk_left_empty_is_skipped(tmp_path, caplog):
    (tmp_path / "metrics_001.csv").write_bytes(b"")
    rows = [f"0,{k},{1 / (k + 1)},,,," for k in range(3)]
    assert [path.name for path in plot_curves(_write(tmp_path / "metrics.csv", *rows), tmp_path)] == ["loss.png"]
    assert "metrics_001.csv" in caplog.text
