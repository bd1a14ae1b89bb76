"""Command lines and files at random: one line for exit code 2, no traceback, no other number.

The choices are drawn from a seed by the number of the case, so that a case that fails is the same
one next time; each command line is a real process.
"""

import json
import os
import random
import shutil

import forked
import pytest

from resflax import config as config_lib

pytestmark = pytest.mark.slow

SEED = 19
LINES = 200
DAMAGES = 100

# A limit of the memory, so that a size that nothing refuses fails in the test and not the machine.
PROGRAM = """
import os, resource, runpy, sys, warnings
warnings.filterwarnings("ignore", "'resflax.*' found in sys.modules", RuntimeWarning)
resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30))
os.chdir({folder!r})
sys.argv = {argv!r}
sys.path[:0] = [{root!r}, {folder!r}]
runpy.run_module({module!r}, run_name="__main__", alter_sys=True)
"""
SECONDS = 150

CONFIG = str(forked.ROOT / "tests" / "plain.py")
SWEEP = str(forked.ROOT / "configs" / "resnet.py")

NUMBERS = [
    "-5", "-1", "0", "1", "2.5", "2147483648", "9223372036854775808", "1e9", "1e308", "-1e400",
    "nan", "inf", "-inf", "1e-320", "0x10", "1_0",
]  # fmt: skip
WORDS = [
    "",
    " ",
    "x",
    "None",
    "True",
    "()",
    "(1, 2)",
    "('a',)",
    "[",
    "é\u2028",
    "a\nb",
    "{}",
    "*",
    "%s",
]
NAMES = ["", "nothing", "resnet", "é", "x" * 300, "../x", "*", "a\nb", "[", "None"]


def paths(folder):
    """Names of what is no run, no config and no place for a file."""
    return [
        "", ".", "missing", "a/missing/file", "file", "link", "loop", "pipe", "/dev/null",
        "/dev/full", "/dev/zero", "/proc/self", "file/below", "x" * 300, "y/" * 3000, "~no_one/x",
        "é\u2028", "a\nb", "sp ace,=", "~", str(folder), "run",
    ]  # fmt: skip


def furnish(folder):
    """What the paths name."""
    (folder / "file").write_bytes(b"\xff\x00 text\n")
    (folder / "link").symlink_to("file")
    (folder / "loop").symlink_to("loop")
    os.mkfifo(folder / "pipe")


class Draw:
    """Draws a command line."""

    def __init__(self, number, folder):
        self.rng = random.Random(SEED * 1_000_003 + number)
        self.folder = folder

    def value(self, *good):
        """Mostly what cannot be."""
        nasty = [*NUMBERS, *WORDS]
        return (
            self.rng.choice(good) if good and self.rng.random() < 0.25 else self.rng.choice(nasty)
        )

    def number(self, *good):
        return (
            self.rng.choice(good)
            if self.rng.random() < 0.25
            else self.rng.choice([*NUMBERS, "x", ""])
        )

    def path(self, *good):
        if good and self.rng.random() < 0.25:
            return self.rng.choice(good)
        return self.rng.choice(paths(self.folder))

    def name(self, *good):
        return self.rng.choice(good) if self.rng.random() < 0.3 else self.rng.choice(NAMES)

    def some(self, options, most=3):
        """Some of the options, each a function to its words."""
        count = self.rng.randint(1, most)
        return [word for option in self.rng.choices(options, k=count) for word in option()]

    def line(self, base, options, most=3):
        """The words of a command line that is well, and some that may not be."""
        return [*base, *self.some(options, most)]

    def overrides(self):
        fields = sorted(config_lib.flatten(config_lib.base()))
        field = self.rng.choice([*fields, *fields, "nothing", "model", "seed.x", "é"])
        return [f"--config.{field}={self.value('1', '0.5', 'A')}"]


def main_line(draw):
    line = ["--config", CONFIG, "--config.train.epochs=0.5", "--workdir", "new"]
    return "resflax.main", draw.line(
        line,
        [
            draw.overrides,
            draw.overrides,
            draw.overrides,
            lambda: ["--workdir", draw.path("run", "new/one")],
            lambda: ["--config", draw.path(f"{CONFIG}:x", f"{SWEEP}:shapes")],
            lambda: [f"--config.data.folder.path={draw.path()}", "--config.data.source=folder"],
            lambda: [f"--config.data.arrays.path={draw.path()}", "--config.data.source=arrays"],
            lambda: [f"--config.init_from={draw.path()}"],
            lambda: ["--replay"],
            lambda: ["--processes", draw.name("auto", "off", "manual")],
            lambda: [f"--num_processes={draw.number('2')}", "--start_seconds=1"],
            lambda: [f"--process_id={draw.number('1')}", "--start_seconds=1"],
            lambda: [f"--coordinator={draw.value('127.0.0.1:1')}", "--start_seconds=1"],
            lambda: [f"--expect_devices={draw.number('1')}"],
            lambda: [f"--start_seconds={draw.number('1')}"],
            lambda: [draw.value("--nothing", "--config.", "--config.seed", "-h", "--helpfull")],
        ],
    )


def evaluate_line(draw):
    return "resflax.evaluate", draw.line(
        ["--workdir", "run"],
        [
            lambda: ["--workdir", draw.path("run")],
            lambda: ["--step", draw.number("2", "1")],
            lambda: ["--best"],
            lambda: [draw.value("--nothing", "--step=", "-h")],
        ],
    )


def analyze_line(draw):
    rng = draw.rng
    what = rng.choice(
        ["signal", "units", "responses", "excitation", "lesion", "landscape", "cam", "complexity"]
    )
    model = ["--model", "cifar_resnet20", "--set", "depth=8", "--set", "num_filters=4"]
    base = rng.choice([["--workdir", "run"], model])
    base += ["--images", "4", "--out", "out"]
    return "resflax.analyze", draw.line(
        [what, *base],
        [
            lambda: ["--workdir", draw.path("run")],
            lambda: ["--model", draw.name("cifar_resnet20", "vgg11")],
            lambda: ["--set", f"{draw.name('depth', 'act', 'se_reduction')}={draw.value('A,B')}"],
            lambda: [
                "--data",
                f"{draw.name('source', 'image_size', 'mean')}={draw.value('digits')}",
            ],
            lambda: ["--step", draw.number("2")],
            lambda: ["--images", draw.number("3")],
            lambda: ["--size", draw.number("24")],
            lambda: ["--seed", draw.number("3")],
            lambda: ["--out", draw.path("out/put")],
            lambda: [
                f"--{draw.name('points', 'block', 'class', 'steps', 'batch')}",
                draw.value("2"),
            ],
        ],
    )


def report_line(draw):
    return "resflax.report", draw.line(
        ["run"],
        [
            lambda: [draw.path("run", "new")],
            lambda: [f"--{draw.name('csv', 'html', 'markdown')}", draw.path("out/table")],
            lambda: ["--plots", draw.path("out/plots")],
            lambda: [draw.value("-h")],
        ],
    )


def checkpoint_line(draw):
    task = draw.rng.choice(["list", "verify", "prune", "", "x"])
    return "resflax.checkpoint", draw.line(
        [task, "run"],
        [
            lambda: [draw.path("run")],
            lambda: ["--keep", draw.number("1")],
            lambda: [draw.value("-h")],
        ],
    )


def data_line(draw):
    task = draw.rng.choice(["prepare", "verify", "show", "show", ""])
    if task == "prepare":
        base = [draw.name("fashion_mnist", "no/thing", "x:1.0.0")]
        options = [
            lambda: ["--from", draw.path()],
            lambda: ["--data-dir", draw.path("out/data")],
            lambda: ["--config", CONFIG],
        ]
    else:
        base = ["--config", CONFIG]
        options = [
            draw.overrides,
            lambda: ["--config", draw.path()],
            lambda: ["--output", draw.path("out.png", "out.x", "out")],
            lambda: [f"--config.data.source={draw.name('digits', 'tfds')}"],
            lambda: [f"--config.data.{draw.name('image_size', 'mean', 'std')}={draw.value()}"],
            lambda: [
                f"--config.augment.{draw.name('crop_padding', 'cutout', 'lighting')}={draw.value()}"
            ],
            lambda: [f"--config.data.folder.path={draw.path()}", "--config.data.source=folder"],
        ]
    return "resflax.data", [task, *base, *draw.some(options)]


def models_line(draw):
    return "resflax.models", draw.line(
        [draw.name("cifar_resnet20", "*resnet1*")],
        [
            lambda: ["--table"],
            lambda: ["--markdown"],
            lambda: ["--batch", draw.number("3")],
            lambda: [draw.value("-h")],
        ],
    )


def bench_line(draw):
    base = ["--model", "cifar_resnet20", "--set", "depth=8", "--set", "num_filters=4"]
    base += ["--batch", "2", "--size", "16", "--repeats", "3", "--mode", "inference"]
    return "resflax.bench", draw.line(
        base,
        [
            lambda: ["--model", draw.name("vgg11")],
            lambda: ["--set", f"{draw.name('depth', 'act', 'num_filters')}={draw.value('A')}"],
            lambda: ["--set", draw.value()],
            lambda: ["--size", draw.number("8")],
            lambda: ["--batch", draw.number("3")],
            lambda: ["--dtype", draw.name("bfloat16")],
            lambda: ["--peer", draw.name("torch", "flax")],
            lambda: ["--repeats", draw.number("3")],
            lambda: ["--steps", draw.number("1")],
            lambda: ["--max-seconds", draw.number("1")],
            lambda: ["--json", draw.path("out/bench.json")],
            lambda: ["--markdown"],
        ],
        most=2,
    )


def sweep_line(draw):
    executor = draw.rng.choice(["print", "print", "print", "slurm", "kubernetes", "x"])
    base = ["--config", SWEEP, "--workdir", "sweep", "--executor", executor]
    return "launch.sweep", draw.line(
        base,
        [
            lambda: ["--config", draw.path(CONFIG, f"{SWEEP}:shapes", f"{SWEEP}:x")],
            lambda: ["--workdir", draw.path("run")],
            lambda: ["--filter", f"{draw.name('model.depth', 'depth')}={draw.value('20')}"],
            lambda: ["--filter", draw.value()],
            lambda: ["--seeds", draw.value("0,1")],
            lambda: [
                "--override",
                f"{draw.name('train.epochs', 'model.depth', 'seed')}={draw.value('2')}",
            ],
            lambda: ["--parallel", draw.number("1")],
        ],
    )


COMMANDS = [
    main_line, evaluate_line, data_line, sweep_line, main_line, report_line, models_line, data_line,
    main_line, checkpoint_line, sweep_line, evaluate_line, main_line, analyze_line, report_line,
    main_line, checkpoint_line, analyze_line, data_line, bench_line,
]  # fmt: skip


def run(folder, module, *arguments):
    program = PROGRAM.format(
        folder=str(folder), argv=[module, *arguments], root=str(forked.ROOT), module=module
    )
    home = {"HOME": str(folder), "JAX_PLATFORMS": "cpu", "COLUMNS": "200"}
    return forked.Process("-c", program, environment=home).finish(SECONDS)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    result = run(
        folder, "resflax.main", "--config", CONFIG, "--config.train.epochs=1", "--workdir", "run"
    )
    assert result.code == 0, result
    return folder / "run"


def assert_documented(result):
    assert result.code in (0, 1, 2), result
    assert "Traceback" not in result.errors + result.output, result
    if result.code == 2:
        lines = result.errors.splitlines()
        assert sum(line.startswith("error: ") for line in lines) == 1, result
        assert result.errors.rstrip("\n").count("\n") == 0, result


@pytest.mark.parametrize("number", range(LINES))
def test_a_command_line(number, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    furnish(tmp_path)
    draw = Draw(number, tmp_path)
    module, line = COMMANDS[number % len(COMMANDS)](draw)
    print(module, line)
    result = run(tmp_path, module, *line)
    print(result.code, (result.output[-300:], result.errors[-1500:]))
    assert_documented(result)


FILES = ("config.json", "metrics.jsonl", "manifest.json", "result.json", "dataset.json")
VALUES = [
    None, True, False, "", "x", "é", "nan", "<b>\n", [], {}, [[]], [None], [1, "a"], {"a": {}},
    0, -1, 1, 0.5, -5.0, 3, 1e9, 1e308, 2**31, 2**63, 10**400, float("nan"),
    float("inf"), -float("inf"),
]  # fmt: skip


HOWS = (
    "cut", "empty", "flip", "flip", "bytes", "line", "deep", "top", "field", "field", "value",
    "value", "value", "key",
)  # fmt: skip


class Damage:
    """Damages a text."""

    def __init__(self, number):
        self.rng = random.Random(SEED * 7_000_003 + number)

    def __call__(self, data):
        """Another content of a file, and how it came about."""
        how = self.rng.choice(HOWS)
        return how, getattr(self, f"_{how}")(data)

    def _cut(self, data):
        return data[: self.rng.randrange(len(data))]

    def _empty(self, data):
        return b""

    def _flip(self, data):
        data = bytearray(data)
        for _ in range(self.rng.randint(1, 3)):
            data[self.rng.randrange(len(data))] ^= 1 << self.rng.randrange(8)
        return bytes(data)

    def _bytes(self, data):
        place = self.rng.randrange(len(data))
        noise = self.rng.choice(
            [b"\xff\xfe", b"\x00", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\r", b"\n", b"garbage"]
        )
        return data[:place] + noise + data[place:]

    def _line(self, data):
        lines = data.splitlines(keepends=True)
        place = self.rng.randrange(len(lines))
        return b"".join(
            self.rng.choice(
                [
                    lines[:place] + lines[place + 1 :],
                    lines[: place + 1] + lines[place:],
                    lines[::-1],
                ]
            )
        )

    def _deep(self, data):
        return self.rng.choice([b"[" * 100_000, b'{"a":' * 100_000, b"[" * 500 + b"]" * 500])

    def _top(self, data):
        return json.dumps(self.rng.choice(VALUES)).encode()

    def _field(self, data):
        def remove(owner, key):
            del owner[key]

        return self._edited(data, remove)

    def _key(self, data):
        def rename(owner, key):
            owner[f"{key}x" if isinstance(owner, dict) else key] = (
                owner.pop(key) if isinstance(owner, dict) else owner[key]
            )

        return self._edited(data, rename)

    def _value(self, data):
        def change(owner, key):
            owner[key] = self.rng.choice(VALUES)

        return self._edited(data, change)

    def _edited(self, data, edit):
        """With an edit of one of the values in it, at any depth."""
        lines = data.decode().splitlines()
        try:
            number, tree = -1, json.loads(data)
        except ValueError:  # of many lines, each a JSON of its own
            number = self.rng.randrange(len(lines))
            tree = json.loads(lines[number])
        owner, key = self.rng.choice(list(places(tree)))
        edit(owner, key)
        if number < 0:
            return json.dumps(tree, indent=2).encode()
        lines[number] = json.dumps(tree)
        return ("\n".join(lines) + "\n").encode()


def places(tree):
    for key, value in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
        yield tree, key
        if isinstance(value, dict | list):
            yield from places(value)


RESTORE = """
import sys, warnings, numpy, resflax
try:
    with warnings.catch_warnings(record=True) as said:
        run = resflax.restore("run")
except resflax.UserError as error:
    sys.exit(f"error: {error}")
images = run.preprocess(numpy.full((1, *run.dataset.image_shape), 100, numpy.uint8))
print(run.step, run.model.apply(run.variables, images, train=False).tolist())
print(*(one.message for one in said), file=sys.stderr)
"""


def results(folder):
    """What each command says of the run in a folder: its result, and the numbers."""
    (folder / "restore.py").write_text(RESTORE)
    (folder / "table.csv").unlink(missing_ok=True)
    report = run(folder, "resflax.report", "run", "--csv", "table.csv")
    table = (folder / "table.csv").read_text() if report.code == 0 else ""
    evaluated = run(folder, "resflax.evaluate", "--workdir", "run")
    verified = run(folder, "resflax.checkpoint", "verify", "run")
    restored = run(folder, "restore", "")
    resumed = run(
        folder, "resflax.main", "--config", CONFIG, "--config.train.epochs=2", "--workdir", "run"
    )
    longer = run(folder, "restore", "") if resumed.code == 0 else resumed
    return {
        "report": (report, [row.split(",")[:7] for row in table.splitlines()]),
        "evaluate": (evaluated, evaluated.output),
        "verify": (verified, verified.output.replace(str(folder), "")),
        "restore": (restored, restored.output),
        "resume": (resumed, longer.output),
    }


@pytest.fixture(scope="module")
def undamaged(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undamaged")
    shutil.copytree(trained, folder / "run")
    return {name: numbers for name, (_, numbers) in results(folder).items()}


@pytest.mark.parametrize("number", range(DAMAGES))
def test_a_damaged_file(number, trained, undamaged, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    name = FILES[number % len(FILES)]
    file = max((tmp_path / "run").rglob(name))
    damage, old = Damage(number), file.read_bytes()
    how, new = damage(old)
    while new == old:
        how, new = damage(old)
    print(name, how, new[:2000])
    file.write_bytes(new)
    for command, (result, numbers) in results(tmp_path).items():
        if command != "restore" or result.code == 0:
            assert_documented(result)
        assert "Traceback" not in result.errors, result
        if result.code == 0 and numbers != undamaged[command]:
            assert name in result.output + result.errors, (command, result, numbers)
