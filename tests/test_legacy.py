"""A run of version 0.1, which every later version restores, evaluates and goes on with.

data/run_of_0.1 was made by `python -m resflax.main --config tests/plain.py` with the flags of FLAGS
and one epoch; what is only looked at, curves.png and tensorboard/, is left out.
"""

import pathlib
import shutil
import warnings

import forked
import numpy as np
import pytest

import resflax
from resflax import evaluate

RUN = pathlib.Path(__file__).parent / "data" / "run_of_0.1"
FLAGS = (
    "--config.checkpoint.keep=1",
    "--config.data.source=digits",
    "--config.train.batch_size=128",
)

# Of that version, for LOOK.
LOOK = np.linspace(-2, 2, 2 * 16 * 16, dtype=np.float32).reshape(2, 16, 16, 1)
FIRST = [-0.06421421, 0.09231288, -0.03419423, 0.04514110, -0.05967353]
FIRST += [0.10009037, 0.03899055, 0.00441554, -0.05599621, -0.01864328]
SECOND = [-0.19000119, 0.28987449, -0.12009351, -0.33983761, 0.04493405]
SECOND += [0.09267138, -0.12517239, -0.02151532, 0.01381905, -0.13387799]
LOGITS = np.float32([FIRST, SECOND])


@pytest.fixture
def run(tmp_path):
    return pathlib.Path(shutil.copytree(RUN, tmp_path / "run"))


def test_it_is_restored(run):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        restored = resflax.restore(run)
    assert restored.step == 11
    assert dict(restored.config.model) == {
        "name": "cifar_resnet20",
        "dtype": "float32",
        "bn_axis": "device",
        "depth": 8,
        "num_filters": 4,
    }
    logits = restored.model.apply(restored.variables, LOOK, train=False)
    np.testing.assert_allclose(logits, LOGITS, rtol=1e-3, atol=1e-4)


@pytest.mark.long
def test_it_is_evaluated(run, capsys):
    assert evaluate.main(["--workdir", str(run)]) == 0
    output, errors = capsys.readouterr()
    assert output == "step 11  eval loss 2.2948  top-1 11.11%  top-5 55.28%\n"
    assert errors == ""


@pytest.mark.long
@pytest.mark.parametrize("lost", [False, True])
def test_it_goes_on(run, lost):
    if lost:  # then the digest of its config, as it was written, is all that tells whose it is
        (run / "config.json").unlink()
    flags = (*FLAGS, "--config.train.epochs=2" if not lost else "--config.train.epochs=1")
    result = forked.run("resflax.main", "--config", "tests/plain.py", *flags, "--workdir", str(run))
    assert (result.code, result.errors) == (0, "")
    assert ("resumed after step 11 of 22" in result.output) is not lost
    assert "another" not in result.output
    assert resflax.restore(run).step == (11 if lost else 22)
    assert "null" not in (run / "config.json").read_text()
