import forked
import pytest

SMALL = ("--config", "tests/small.py")


def run(*arguments, devices=1):
    environment = {"XLA_FLAGS": forked.xla_flags(devices)}
    return forked.run("resflax.main", *arguments, environment=environment)


@pytest.mark.parametrize(
    ("arguments", "right"),
    [
        ((), "--config FILE.py is required"),
        (("--config", "configs/nothing.py"), "there is no file configs/nothing.py"),
        ((*SMALL, "--config.model.shrtcut=A"), "no field 'shrtcut'; did you mean shortcut?"),
        ((*SMALL, "--config.nothing=1"), "no field 'nothing'"),
        ((*SMALL, "--config.train.epochs=many"), "--config.train.epochs=many"),
        ((*SMALL, "--wrkdir=here"), "Did you mean: workdir"),
        ((*SMALL, "stray"), "unexpected argument 'stray'"),
        (("--config.seed=1", *SMALL), "before a value for --config"),
        (("--config", "configs/resnet.py:cifar1000"), "digits, shapes"),
        ((*SMALL, "--config.model.shortcut=Z"), "'A', 'B', 'C', 'D', 'none'"),
        (
            ("--config", "configs/se_resnext.py", "--config.model.depth=51"),
            "10, 14, 18, 26, 34, 50, 101, 152, 200",
        ),
        (("--config", "configs/resnet.py", "--config.model.depth=51"), "8, 14, 20, 26, 32"),
        ((*SMALL, "--config.model.cardinality=3"), "1, 2, 4, 8, 16, 32"),
        ((*SMALL, "--config.model.name=resnet5O"), "resnet50"),
        ((*SMALL, "--workdir", "pyproject.toml"), "is a file"),
        ((*SMALL, "--workdir", "/proc/run"), "cannot be made"),
    ],
)
def test_bad_input_gets_one_line_and_exit_code_2(arguments, right):
    result = run(*arguments)
    assert result.code == 2
    assert result.errors.count("\n") == 1
    assert result.errors.startswith("error: ")
    assert right in result.errors


def test_a_batch_that_the_devices_cannot_share_is_refused(tmp_path):
    result = run(*SMALL, "--config.train.batch_size=30", "--workdir", str(tmp_path), devices=4)
    assert result.code == 2
    assert result.errors == (
        "error: config.train.batch_size 30 is not divisible by 4 devices; 28 or 32 would be.\n"
    )
    assert not list(tmp_path.iterdir())


def test_a_config_file_that_fails_is_named_with_its_line(tmp_path):
    config = tmp_path / "broken.py"
    config.write_text("def get_config():\n    return 1 / 0\n")
    result = run("--config", str(config))
    assert result.code == 2
    assert result.errors == f"error: {config}:2: ZeroDivisionError: division by zero\n"
