import json

import jax
import numpy as np
import pytest
from PIL import Image
from plain import config as plain_config

from resflax import config as config_lib
from resflax import evaluate, metrics, train
from resflax.data import augmentation, sources, transforms
from resflax.errors import UserError
from resflax.parallel import data_parallel


@pytest.fixture(scope="module")
def network():
    """A network with a data set, and its metrics on all test images in one batch."""
    config = plain_config()
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


@pytest.mark.parametrize(
    ("mode", "num_devices"),
    [
        ("jit", 1),
        pytest.param("shard_map", 8, marks=pytest.mark.devices(8)),
        pytest.param("pmap", 2, marks=[pytest.mark.devices(8), pytest.mark.long]),
    ],
)
def test_an_evaluation_in_padded_batches_is_that_of_all_images_at_once(network, mode, num_devices):
    model, dataset, variables, sums = network
    assert len(dataset.test) % 16
    parallel = data_parallel(mode, jax.devices()[:num_devices])
    single = jax.device_put(variables, parallel.replicated)
    result = evaluate.evaluator(model.apply, dataset, 16, parallel)(parallel.spread(single))
    for name in ("loss", "top1", "top5"):
        assert result[name] == pytest.approx(float(sums[name]) / 50, rel=1e-5)


@pytest.mark.long
def test_ten_crops_have_one_prediction(network):
    model, _, variables, _ = network
    size = 12
    images = jax.random.uniform(jax.random.key(0), (6, 16, 16, 3))
    crops = np.asarray(transforms.ten_crop(images, size))
    each = [jax.nn.softmax(model.apply(variables, crop, train=False)) for crop in crops]
    logits = evaluate.ten_crop(model.apply, size)(variables, images, train=False)
    assert np.std(each, axis=0).max() > 1e-4
    np.testing.assert_allclose(jax.nn.softmax(logits), np.mean(each, axis=0), rtol=1e-5, atol=1e-6)


@pytest.mark.long
def test_a_config_has_ten_crops_evaluated(network, tmp_path):
    model, _, variables, _ = network
    colours = np.linspace(0, 255, 120, dtype=np.uint8)
    for name, angle in (("a", 0), ("b", 90)):
        for part, count in (("train", 1), ("val", 3)):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(count):
                ramp = np.roll(np.tile(colours, (90, 1)), 17 * i, 1)
                image = Image.fromarray(ramp).convert("RGB").rotate(angle)
                image.save(tmp_path / part / name / f"{i}.png")
    config = plain_config(**{"data.source": "folder", "data.eval_resize": 20})
    config.data.folder.path = str(tmp_path)
    parallel = data_parallel("jit", jax.devices()[:1])
    losses = []
    for crops in (1, 10):
        config.data.test_crops = crops
        dataset = sources.load(config.data)
        assert dataset.train.images.shape[1:] == dataset.description.image_shape == (16, 16, 3)
        losses.append(evaluate.evaluator(model.apply, dataset, 4, parallel)(variables)["loss"])
    normalize = augmentation.normalizer(dataset.description.mean, dataset.description.std)
    images = normalize(dataset.test.images)
    assert images.shape[1:] == (20, 20, 3)
    logits = evaluate.ten_crop(model.apply, 16)(variables, images, train=False)
    assert losses[1] == pytest.approx(
        float(metrics.cross_entropy(logits, dataset.test.labels).mean()), rel=1e-5
    )
    assert losses[0] != pytest.approx(losses[1], rel=1e-4)


def test_ten_crops_are_of_image_files():
    config = plain_config(**{"data.test_crops": 10, "data.eval_resize": 20})
    with pytest.raises(ValueError, match="images of 'shapes' have a size of their own"):
        sources.load(config.data)


def test_a_workdir_without_a_run_gets_one_line(tmp_path, capsys):
    assert evaluate.main(["--workdir", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error == f"error: {tmp_path} holds no run: config.json: No such file or directory.\n"


@pytest.mark.parametrize(
    ("found", "difference"),
    [
        (("a", "b", "c"), None),
        (("0", "1", "2"), None),  # of a data set without names
        (("a", "c", "b"), "their classes: number 1 is 'c' and 'b'"),
        (("a", "b"), "the number of classes: 2 and 3"),
    ],
)
def test_images_of_other_classes_are_refused_by_name(found, difference):
    trained = sources.Description("mine", (4, 4, 1), ("a", "b", "c"), (0.5,), (0.5,))
    other = sources.Description("theirs", (8, 8, 1), found, (0.1,), (0.1,))
    if difference is None:
        sources.require_like(other, trained, " in runs/x")
    else:
        with pytest.raises(UserError, match=f"'theirs' .* network in runs/x .* in {difference}"):
            sources.require_like(other, trained, " in runs/x")


def colours(folder, names):
    """16 images of noise for each class of a data set: a colour each."""
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        for channel, name in enumerate(names):
            (folder / part / name).mkdir(parents=True)
            for i in range(8):
                pixels = rng.integers(0, 80, (16, 16, 3), dtype=np.uint8)
                pixels[..., channel] += 120
                Image.fromarray(pixels).save(folder / part / name / f"{i}.png")


@pytest.mark.long
def test_a_run_is_evaluated_on_its_own_classes_with_its_own_statistics(tmp_path, capsys):
    colours(tmp_path / "images", ("blue", "green", "red"))
    overrides = {"data.source": "folder", "data.folder.path": str(tmp_path / "images")}
    overrides |= {"train.batch_size": 8, "train.epochs": 1.0, "eval.batch_size": 8}
    result = train.train_and_evaluate(plain_config(**overrides), tmp_path / "run")
    assert "top-5" not in capsys.readouterr().out
    evaluated = evaluate.evaluate_run(tmp_path / "run")
    assert evaluated["loss"] == pytest.approx(result["eval/loss"], rel=1e-6)
    # Other training images have other statistics.
    for path in (tmp_path / "images/train/red").iterdir():
        Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(path)
    again = evaluate.evaluate_run(tmp_path / "run")
    assert again == evaluated
    for part in ("train", "val"):
        (tmp_path / "images" / part / "red").rename(tmp_path / "images" / part / "a_red")
    assert evaluate.main(["--workdir", str(tmp_path / "run")]) == 2
    assert "their classes: number 0 is 'a_red' and 'blue'" in capsys.readouterr().err


def folder(root, colours):
    """Pictures of each class in one colour, in train/ and val/."""
    for split in ("train", "val"):
        for name, colour in colours.items():
            (root / split / name).mkdir(parents=True)
            for i in range(8):
                Image.new("RGB", (16, 16), (colour, 10 * i, 255 - colour)).save(
                    root / split / name / f"{i}.png"
                )
    return root


@pytest.mark.long
def test_data_that_moved_are_evaluated_and_trained_on_where_they_are(tmp_path, capsys):
    old = folder(tmp_path / "old", {"cat": 0, "dog": 200})
    fields = {"data.source": "folder", "train.batch_size": 8, "eval.batch_size": 16}
    place = "data.folder.path"
    run = tmp_path / "run"
    result = train.train_and_evaluate(
        plain_config(**fields, **{place: str(old), "train.epochs": 1.0}), run
    )
    new = old.rename(tmp_path / "new")
    assert evaluate.main(["--workdir", str(run)]) == 2
    assert f"{str(old)!r} is not a directory" in capsys.readouterr().err
    found = evaluate.evaluate_run(run, data={"folder.path": str(new)})
    assert found["loss"] == pytest.approx(result["eval/loss"], rel=1e-5)
    assert evaluate.main(["--workdir", str(run), "--data", f"folder.path={new}/"]) == 0
    # The run takes the new place, and keeps it.
    longer = plain_config(**fields, **{place: f"{new}/", "train.epochs": 2.0, "data.threads": 1})
    train.train_and_evaluate(longer, run)
    assert evaluate.evaluate_run(run)["step"] == 4
    other = folder(tmp_path / "other", {"ant": 0, "bee": 200})
    with pytest.raises(UserError, match="differ in their classes: number 0 is 'ant' and 'cat'"):
        evaluate.evaluate_run(run, data={"folder.path": str(other)})
    with pytest.raises(UserError, match="no field 'nothing'; it has arrays"):
        evaluate.evaluate_run(run, data={"nothing": 1})


@pytest.mark.parametrize(
    ("field", "value", "right"),
    [
        ("eval.batch_size", -5, "config.eval.batch_size -5 must be at least 1"),
        ("data.source", "nothing", "config.data.source 'nothing' is not one of"),
        ("data.image_size", 10**9, "config.data.image_size 1000000000 must be at most 16,384"),
        ("train.label_smoothing", "x", "label_smoothing"),
    ],
)
def test_a_config_of_a_run_is_validated_as_training_does(tmp_path, capsys, field, value, right):
    fields = plain_config().to_dict()
    group, name = field.split(".")
    fields[group][name] = value
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert evaluate.main(["--workdir", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path / 'config.json'}: ")
    assert right in error
    assert error.count("\n") == 1
