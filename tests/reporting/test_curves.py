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


def test_a_run_gives_both_pictures(tmp_path):
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


def test_a_run_that_logged_nothing_gives_no_picture(tmp_path):
    assert plot_curves(_write(tmp_path / "metrics.csv"), tmp_path) == []


def test_sparse_and_unordered_rows_are_read_by_step_and_undefined_values_left_out(tmp_path):
    path = _write(
        tmp_path / "metrics.csv", "0,20,2.0,,,,", "0,10,1.0,nan,,,", "0,30,inf,,-1.0,,", "0,40,,,0.5,,", "0,5"
    )
    read = curves._read(path)
    assert {name: [column.tolist() for column in curve] for name, curve in read.items() if "/" in name} == {
        "train/loss": [[10, 20], [1, 2]],
        "val/AP": [[40], [0.5]],
    }


@pytest.mark.parametrize("count", [1, 2, 7, 500])
def test_smoothing_keeps_a_constant_and_the_length(count):
    assert curves._smoothed(np.full(count, 3.0)) == pytest.approx([3.0] * count)


def test_smoothing_quietens_noise():
    noise = np.random.default_rng(0).normal(size=1000)
    assert curves._smoothed(noise).std() < 0.3 * noise.std()


def test_a_missing_or_foreign_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.csv: cannot be read"):
        plot_curves(tmp_path / "none.csv", tmp_path)
    with pytest.raises(UserError, match=r"other\.csv: .*no column 'step'"):
        plot_curves(_write(tmp_path / "other.csv", header="a,b\n"), tmp_path)


def test_plotting_leaves_no_global_figure_behind(tmp_path):
    import matplotlib.pyplot as plt

    plot_curves(_write(tmp_path / "metrics.csv", "0,1,0.5,0.2,0.1,0.2,0.3"), tmp_path)
    assert plt.get_fignums() == []
