"""Spellings that the command line accepts, options that it refuses, and its help."""

import subprocess
import sys

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from runs import refused
from small_run import SMALL

from cpm_rcnn.cli.arguments import normalize, positional_as_option
from cpm_rcnn.errors import UserError

RUN = [*SMALL, "schedule.max_steps=1", "sheet_images=0"]


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("cmm=true", "cmm=on"),
        ("ism=False", "ism=off"),
        ("rsm=true,false", "rsm=on,off"),
        ("multi_scale=yes", "multi_scale=on"),
        ("cmm=two_stage", "cmm=two_stage"),
        ("logger=null", "logger=none"),
        ("detector.rsm=false", "detector.rsm=false"),
        ("--multirun", "--multirun"),
    ],
)
def test_switches_accept_true_and_false(given, meant):
    assert normalize([given]) == [meant]


@pytest.mark.parametrize(
    "paths", [["a/b", "c"], ["it's", "c, d"], ["x\\", "y\\'z"], ["[1]", "2017", "null", "{a: 1}"], ["a b", "~/c"]]
)
def test_positional_paths_reach_hydra_unchanged(paths):
    arguments = positional_as_option([paths[0], "samples=3", *paths[1:]], "compare")
    assert arguments[1:] == ["samples=3"]
    (override,) = OverridesParser.create().parse_overrides(arguments[:1])
    assert (override.key_or_group, [str(value) for value in override.value()]) == ("runs", paths)


@pytest.mark.parametrize("name", ["ü.jpg", "x[1].jpg", "a, b.jpg", "it's.jpg", "x=1.jpg", "{a}\\"])
def test_the_path_of_a_file_needs_no_quotes_for_hydra(tmp_path, name):
    (tmp_path / name).write_text("text")
    (override,) = OverridesParser.create().parse_overrides(normalize([f"source={tmp_path / name}"]))
    assert override.value() == str(tmp_path / name)


def test_a_url_needs_no_quotes_for_hydra_unless_it_may_be_a_sweep():
    assert normalize(["source=https://host/a.jpg?x=1"]) == ["source='https://host/a.jpg?x=1'"]
    kept = ["init=https://host/a=1,https://host/b=2", "source=[a.jpg,https://host/b]", "source=none[1].jpg"]
    assert normalize(kept) == kept


def test_options_and_flags_with_their_values_are_not_positional(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=1").mkdir()
    kept = ["--cfg", "job", "-m", "seed=1", "+x=1", "~seed", "runs=[a,b]", "nosuch=1"]
    assert positional_as_option(kept, "compare") == kept
    assert positional_as_option(["lr=1", "a", "seed=1"], "compare") == ["runs=['lr=1','a']", "seed=1"]
    assert positional_as_option(["a", "b"], "eval") == ["a", "b"]


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "'a/../../x'"])
def test_a_name_outside_the_folder_of_outputs_is_refused(name):
    with pytest.raises(UserError, match=r"^name=.*inside outputs/"):
        normalize([f"name={name}"])
    with pytest.raises(UserError, match=r"^sweep=.*inside outputs/"):
        normalize([f"sweep={name}"])
    assert normalize(["name=a/b", "sweep=a/b"]) == ["name=a/b", "sweep=a/b"]


def test_a_sweep_has_one_name():
    with pytest.raises(UserError, match=r"^sweep=a,b: must be one name"):
        normalize(["sweep=a,b"])


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("+epochs=10", "epochs: unknown option; the config has"),
        ("+schedule.epochs=3", "schedule.epochs: unknown option; schedule has base_lr"),
        ("+cmm.levels=2", "cmm.levels: unknown option; cmm has stages"),
        ("+detector.levels=2", "detector.levels: the head cpm has no such option"),
        ("+data.levels=2", "data.levels: unknown option"),
        ("schedule.max_size=10", "schedule.max_size=10: must be at least short_sides"),
    ],
)
def test_options_that_nothing_reads_are_refused(command, argument, message):
    assert message in refused(command("train", *RUN, argument))


def test_a_new_run_does_not_replace_an_earlier_one(command, trained):
    arguments = [argument for argument in RUN if argument != "overwrite=true"]
    assert command("train", *arguments, "overwrite=false", "name=kept").status == 0
    line = refused(command("train", *arguments, "overwrite=false", "name=kept"))
    assert "name=kept" in line
    assert "overwrite=true replaces it" in line
    assert command("train", *arguments, "overwrite=true", "name=kept").status == 0


def test_a_run_without_logger_ends_with_its_metrics(command):
    answer = command("train", *RUN, "logger=null", "name=unlogged")
    assert answer.status == 0, answer.err
    assert (answer.folder / "metrics.json").is_file()
    assert not (answer.folder / "loss.png").exists()


def test_the_folder_of_a_run_stands_for_its_best_checkpoint(command, trained, checkpoint):
    of_folder = command("eval", f"ckpt={trained.folder}", "trainer=cpu")
    assert of_folder.status == 0, of_folder.err
    assert "best.ckpt" in of_folder.err + of_folder.out
    of_file = command("eval", f"ckpt={checkpoint}", "trainer=cpu")
    names = ("metrics.json", "detections.json")
    assert all((of_folder.folder / name).read_text() == (of_file.folder / name).read_text() for name in names)
    assert "is a folder without checkpoints/best.ckpt" in refused(command("eval", "ckpt=data"))


@pytest.mark.parametrize("arguments", [["source=2024"], ["source=0"]])
def test_a_source_that_looks_like_a_number_is_a_path(command, checkpoint, arguments):
    assert "no such file or folder" in refused(command("predict", f"ckpt={checkpoint}", *arguments))


def test_help_lists_the_command_s_own_groups_and_does_not_import_torch():
    code = (
        "import sys; from cpm_rcnn.cli.help import help_text; print(help_text('train')); print('torch' in sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "backbone: r101 | r101_caffe" in shown
    assert "multi_scale" not in shown
    assert "overrides" not in shown
    assert "checkpoint_interval: 1000  # " in shown
    assert shown.splitlines()[-1] == "False"
