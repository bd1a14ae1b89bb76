"""Tests of how a config file is loaded, and of the one line about what is wrong with it."""

import pathlib
import sys

import pytest
from absl import flags
from absl.testing import flagsaver

from resflax.errors import UserError
from resflax.process import command
from resflax.process.arguments import path as path_of
from resflax.process.arguments import path_option

# Of how ml_collections imports a config file.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

CONFIG = """
from resflax.config import base

def get_config(dataset="digits"):
    config = base()
    config.data.source = dataset
    return config
"""


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "experiment.py"
    file.write_text(CONFIG)
    return file


@pytest.fixture
def parse(monkeypatch):
    """Parses a command line as a program does, and gives the process its flags back."""

    def call(*arguments):
        argv = ["program", *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", argv)
        return command.parse(argv)

    with flagsaver.flagsaver():
        known = set(flags.FLAGS)
        yield call
        for name in set(flags.FLAGS) - known:
            delattr(flags.FLAGS, name)


def load_error(path, text, *overrides):
    path.write_text(text)
    with pytest.raises(ValueError) as error:  # noqa: PT011 - its callers look at the message
        command.load(str(path), overrides)
    return str(error.value)


def exit_line(capsys, call, *arguments):
    with pytest.raises(SystemExit) as stop:
        call(*arguments)
    assert stop.value.code == 2
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.endswith("\n")
    assert errors.count("\n") == 1
    return errors.rstrip("\n")


def test_a_config_has_its_data_set_and_the_overrides_with_their_types(path):
    config = command.load(
        f"{path}:shapes",
        [
            "--config.model.depth=50",
            "--config.model.se_stages=(3, 4)",
            "--config.train.epochs=2",
            "--config.optim.nesterov=false",
            "--config.init_from=1",
        ],
    )
    assert config.data.source == "shapes"
    assert (config.model.depth, config.model.se_stages) == (50, (3, 4))
    assert isinstance(config.train.epochs, float)
    assert config.optim.nesterov is False
    assert config.init_from == "1"
    assert config.is_locked


def test_configs_that_are_loaded_one_after_another_have_nothing_in_common(path):
    changed = command.load(f"{path}:shapes", ["--config.seed=3"])
    plain = command.load(str(path))
    assert (plain.data.source, plain.seed) == ("digits", 0)
    plain.seed = 5
    assert changed.seed == 3


def test_the_flags_of_the_process_are_left_alone(path, parse):
    parse("--config", path, "--config.seed=7")
    argv, before = list(sys.argv), flags.FLAGS.flag_values_dict()
    command.load(f"{path}:shapes", ["--config.seed=3"])
    assert (command.CONFIG.value.seed, command.CONFIG.value.data.source) == (7, "digits")
    assert flags.FLAGS.flag_values_dict() == before
    assert sys.argv == argv


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("def get_config():\n    return 1 / 0\n", "{}:2: ZeroDivisionError: division by zero"),
        ("import nothing_of_this_name\n", "{}:1: ModuleNotFoundError: No module named"),
        ("def get_config(:\n", "{}: SyntaxError: invalid syntax"),
        ("def get_config():\n    raise ValueError('Take less.')\n", "Take less."),
    ],
)
def test_a_config_that_fails_is_said_with_its_line_unless_it_says_what_is_wrong(path, text, right):
    assert load_error(path, text).startswith(right.format(path))


@pytest.mark.parametrize(
    ("override", "right"),
    [
        ("--config.modle.depth=8", "the config has no field 'modle'; did you mean model?"),
        ("--config.zzzzzzzz=8", "the config has no field 'zzzzzzzz'."),
        ("--config.optim.nesterov=maybe", "flag --config.optim.nesterov=maybe: "),
        ("--other=1", "Unknown command line flag 'other'"),
    ],
)
def test_an_override_that_cannot_be_is_said(path, override, right):
    assert right in load_error(path, CONFIG, override)


def test_a_file_that_is_not_there_is_said(path):
    missing = path.with_name("nothing.py")
    with pytest.raises(ValueError, match=rf"--config: there is no file {missing}\.$"):
        command.load(f"{missing}:digits", ["--config.seed=1"])


def test_a_command_line_gives_its_config_the_file_s_name_and_what_is_no_flag(path, parse):
    rest = parse("stray", "--config", f"{path}:shapes", "--config.train.epochs=2", "--", "--last")
    assert rest == ["program", "stray", "--last"]
    assert command.CONFIG.value.data.source == "shapes"
    assert command.CONFIG.value.train.epochs == 2.0
    assert command.config_name() == "experiment"


def test_a_command_line_that_cannot_be_ends_with_one_line(path, parse, capsys):
    missing = path.with_name("nothing.py")
    for arguments, right in (
        ((), "error: --config FILE.py is required"),
        (("--config", missing), f"error: --config: there is no file {missing}."),
        (("--config", path, "--config.model.dpth=8"), "did you mean depth?"),
    ):
        assert right in exit_line(capsys, parse, *arguments)


def test_a_failure_is_one_line_and_exit_code_2(capsys):
    said = exit_line(capsys, command.fail, "  the first\n  and\tthe second line.\n")
    assert said == "error: the first and the second line."


def test_a_parser_says_in_one_line_what_is_wrong(capsys):
    parser = command.Parser(prog="program")
    parser.add_argument("--images", type=int, required=True)
    assert parser.parse_args(["--images", "3"]).images == 3
    for arguments, right in (
        ([], "error: the following arguments are required: --images"),
        (["--images", "few"], "error: argument --images: invalid int value: 'few'"),
    ):
        assert exit_line(capsys, parser.parse_args, arguments) == right


def test_a_path_behind_an_equals_sign_has_its_home(capsys, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    parser = command.Parser(prog="program")
    parser.add_argument("--output", type=path_option)
    assert str(parser.parse_args(["--output=~/x"]).output) == "/home/me/x"
    right = "error: argument --output: '~nobody_at_all/x' is in no known home directory."
    assert exit_line(capsys, parser.parse_args, ["--output=~nobody_at_all/x"]) == right


def test_every_path_option_knows_home():
    root = pathlib.Path(command.__file__).parents[1]
    options = [
        (file.name, line.strip())
        for folder in ("resflax", "launch")
        for file in (root / folder).rglob("*.py")
        for line in file.read_text().splitlines()
        if "type=pathlib.Path" in line and file.name != "lowerings.py"
    ]
    assert options == []


def test_a_name_that_cannot_be_one_of_a_file_is_said():
    for name, right in (("~no_one/x", "in no known home directory"), ("x" * 300, "255 bytes")):
        with pytest.raises(UserError, match=right):
            path_of(name)
    assert path_of("~") == pathlib.Path.home()


def test_a_config_file_of_its_own_mistakes_is_named_with_their_line(path):
    for body, right in (
        ("return {}['depth']", f"{path}:5: KeyError: 'depth'"),
        ("config.train.epoch = 3.0", f"{path}:5: the config has no field 'epoch'; did you mean"),
        ("return None", f"{path}: get_config() gives NoneType; it must return a config"),
        ("raise RuntimeError('one\\ntwo')", f"{path}:5: RuntimeError: one two"),
    ):
        text = "from resflax.config import base\n\ndef get_config():\n    config = base()\n"
        text += f"    {body}\n"
        assert load_error(path, text).startswith(right)


def test_a_config_file_has_no_names_of_the_one_before(path):
    command.load(str(path))
    assert load_error(path, "depth = 3\n") == f"{path} has no get_config()."


HELPER = """
def half(width):
    return width // 0
"""


def test_a_config_file_finds_the_files_beside_it(path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    path.with_name("beside_it.py").write_text("WIDTH = 3\n")
    path.write_text(
        "from beside_it import WIDTH\n"
        + CONFIG.replace("return", "config.seed = WIDTH\n    return")
    )
    assert command.load(str(path)).seed == 3


def test_a_failure_notes_the_lines_of_the_user_s_files_that_led_to_it(path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", list(sys.path))
    path.with_name("halves.py").write_text(HELPER)
    path.write_text("import halves\n\ndef get_config():\n    return halves.half(3)\n")
    with pytest.raises(UserError) as error:
        command.load(str(path))
    beside = path.with_name("halves.py")
    assert str(error.value).startswith(f"{beside}:3: ZeroDivisionError: integer division")
    with pytest.raises(SystemExit):
        command.fail(error.value)
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if line.startswith("  File")] == [
        f'  File "{path}", line 4, in get_config',
        f'  File "{beside}", line 3, in half',
    ]
    assert said[-1].startswith(f"error: {beside}:3: ZeroDivisionError")


def test_a_field_can_be_set_to_none_where_it_is_none_by_default(path):
    fields = ("depth=20", "depth=None", "se_stages=None")
    config = command.load(str(path), [f"--config.model.{field}" for field in fields])
    assert "depth" not in config.model
    assert "se_stages" not in config.model
    with pytest.raises(UserError, match=r"config\.seed None must be of type int"):
        command.load(str(path), ["--config.seed=None"])


@pytest.mark.parametrize(
    ("flags_", "right"),
    [
        (("name=vgg11", "fc_units=8"), {"name": "vgg11", "fc_units": 8}),
        (("fc_units=8", "name=vgg11"), {"name": "vgg11", "fc_units": 8}),
        (("dropout=1", "remat=true", "act=silu"), {"dropout": 1.0, "remat": True, "act": "silu"}),
        (("name=wrn28_10", "shortcut=None", "growth_rate=None"), {"name": "wrn28_10"}),
        (("name=bn_inception", "conv_bias=True"), {"name": "bn_inception", "conv_bias": True}),
        (("name=alexnet", "dropped=('fc6',)"), {"name": "alexnet", "dropped": ("fc6",)}),
    ],
)
def test_an_argument_of_the_network_is_parsed_by_its_type_wherever_its_name_is(path, flags_, right):
    model = command.load(str(path), [f"--config.model.{field}" for field in flags_]).model
    found = {field: value for field, value in model.items() if field in right}
    assert found == right
    assert [type(value) for value in found.values()] == [type(right[field]) for field in found]
    assert set(model) == {"name", "dtype", "bn_axis", *right}


def test_what_a_file_sets_can_be_changed_and_unset(path):
    text = CONFIG.replace("return", "config.model.update(dropout=0, shortcut='B')\n    return")
    path.write_text(text)
    model = command.load(str(path), ["--config.model.dropout=.5"]).model
    assert (model.dropout, model.shortcut) == (0.5, "B")
    model = command.load(str(path), ["--config.model.name=vgg11", "--config.model.shortcut=None"])
    assert "shortcut" not in model.model


@pytest.mark.parametrize("override", [".=1", ".seed.x=1", ".train..epochs=3", ".model={}"])
def test_an_override_of_no_field_is_said(path, override):
    path.write_text(CONFIG)
    with pytest.raises(UserError, match=r"^(the config|config\.model)"):
        command.load(str(path), [f"--config{override}"])
