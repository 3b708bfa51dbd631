"""The tables of options in the documentation, made from settings classes and from the comments of config files."""

import importlib
from pathlib import Path

import pytest

from cpm_rcnn.data.settings import DataSettings
from cpm_rcnn.models.rpn import RPNSettings

EXTENSIONS = Path(__file__).parents[1] / "docs" / "extensions"


@pytest.fixture
def extension(monkeypatch):
    monkeypatch.syspath_prepend(EXTENSIONS)
    return importlib.import_module


@pytest.fixture
def written(extension, monkeypatch, tmp_path):
    """The rows of a table made from the text of a config file."""
    yaml_options = extension("yaml_options")
    monkeypatch.setattr(yaml_options, "files", lambda package: tmp_path)

    def rows(text: str, *arguments):
        (tmp_path / "command.yaml").write_text(text)
        return yaml_options.options("command.yaml", *arguments)

    return rows


@pytest.mark.parametrize(
    ("line", "row"),
    [
        ("seed: 0  # random seed", ("``seed``", "an integer", "``0``", "random seed")),
        ("ckpt: ???  # a checkpoint", ("``ckpt``", "see the meaning", "required", "a checkpoint")),
        ("select: best  # best | last: which one", ("``select``", "one of best, last", "``best``", "which one")),
        ("part: 0.9  # a part; null: all", ("``part``", "a number, or null", "``0.9``", "a part; null: all")),
        ("ema: null  # for example 0.9: decay", ("``ema``", "a number, or null", "``null``", "for example 0.9: decay")),
        ("on: false  # with a_b (docs/data.md)", ("``on``", "true or false", "``false``", r"with a\_b (:doc:`/data`)")),
    ],
)
def test_a_line_of_a_config_is_a_row(line, row, written):
    assert written(f"{line}\n", "") == [row]


def test_comments_may_have_several_lines_above_a_key_or_behind_its_value(written):
    text = "# A command.\ndefaults:\n  - _self_\n\n# What above\n# says.\na: 1\nb: 2  # what behind\n      # says\n"
    assert [row[3] for row in written(text, "")] == ["What above says.", "what behind says"]


def test_keys_have_the_names_of_their_nodes_and_can_be_left_out(written):
    text = "a: 1  # one\nnode:\n  b: 2  # two\n  c: 3  # three\n"
    assert [row[0] for row in written(text, "group", ["group.node.c"])] == ["``group.a``", "``group.node.b``"]


def test_an_option_without_a_comment_is_an_error(written):
    with pytest.raises(ValueError, match=r"conf/command\.yaml: seed has no comment"):
        written("seed: 0\n", "")


def test_a_table_of_a_class_says_what_its_checks_accept(extension):
    settings_options = extension("settings_options")
    rows = {row[0]: row for row in settings_options.options(RPNSettings, "detector")}
    assert rows["``detector.anchor_sizes``"][1:3] == ("a list of 5 values", "``[32, 64, 128, 256, 512]``")
    assert rows["``detector.proposals_test``"][1] == "an integer, at least 1"
    rows = {row[0]: row for row in settings_options.options(DataSettings, "data")}
    assert rows["``data.on_error``"][1:3] == ("one of raise, skip", "``raise``")
    assert rows["``data.tile``"][1:3] == ("an integer, at least 64, or null", "``null``")
    assert rows["``data.tile``"][3].endswith("``null`` keeps whole images. *(inference)*")
