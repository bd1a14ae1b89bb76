import jax
import numpy as np
import pytest
from small import config as small_config

from resflax import config as config_lib
from resflax import evaluate, metrics
from resflax.data import augmentation, sources
from resflax.parallel import DataParallel


@pytest.fixture(scope="module")
def network():
    """A network with a data set, and its metrics on all test images in one batch."""
    config = small_config()
    dataset = sources.load(config.data)
    images, labels = dataset.test.images, dataset.test.labels
    model = config_lib.build_model(config, 10)
    normalize = augmentation.normalizer(dataset.description.mean, dataset.description.std)

    @jax.jit
    def init_and_evaluate(key):
        variables = model.init(key, normalize(images[:1]), train=False)
        logits = model.apply(variables, normalize(images), train=False)
        return variables, metrics.summed(logits, labels, np.ones(len(images)))

    variables, sums = init_and_evaluate(jax.random.key(0, impl="rbg"))
    return model, dataset, variables, sums


@pytest.mark.parametrize(("mode", "num_devices"), [("jit", 1), ("shard_map", 8), ("pmap", 2)])
def test_an_evaluation_in_padded_batches_is_that_of_all_images_at_once(network, mode, num_devices):
    model, dataset, variables, sums = network
    assert len(dataset.test) % 16
    parallel = DataParallel.over(mode, jax.devices()[:num_devices])
    single = jax.device_put(variables, parallel.replicated)
    result = evaluate.evaluator(model.apply, dataset, 16, parallel)(parallel.spread(single))
    for name in ("loss", "top1", "top5"):
        assert result[name] == pytest.approx(float(sums[name]) / 50, rel=1e-5)


def test_a_workdir_without_a_run_gets_one_line(tmp_path, capsys):
    assert evaluate.main(["--workdir", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error == f"error: {tmp_path} holds no run: config.json: No such file or directory.\n"
