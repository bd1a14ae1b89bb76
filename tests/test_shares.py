"""Images set aside to validate on, fewer to train on, and wrong labels: of every source."""

import json
import re

import jax
import numpy as np
import pytest
from PIL import Image
from plain import config as plain_config

import resflax
from resflax import config as config_lib
from resflax import train, validation
from resflax.data import examples, given, shares, sources
from resflax.errors import UserError

# An image tells its number, and is of the class that this leaves when it is divided by four.
NUMBERS = np.arange(80)
IMAGES = np.broadcast_to(NUMBERS[:, None, None, None], (80, 16, 16, 3)).astype(np.uint8)
LABELS = (NUMBERS % 4).astype(np.int32)


def data_config(**fields):
    config = config_lib.base().data
    config.update({"source": "given", "image_size": 16, "mean": (0.5,) * 3, "std": (0.5,) * 3})
    config.update(fields)
    return config


def load(form, **fields):
    """64 images to train on and 16 to test, as arrays, one by one, or as files."""
    if form == "arrays":
        names = "train_images", "train_labels", "test_images", "test_labels"
        parts = IMAGES[:64], LABELS[:64], IMAGES[64:], LABELS[64:]
        return given.load(data_config(**fields), dict(zip(names, parts, strict=True)))
    make = Image.fromarray if form == "pictures" else np.asarray
    pairs = [(make(image), label) for image, label in zip(IMAGES, LABELS, strict=True)]
    found = {"train": pairs[:64], "test": pairs[64:], "label_names": list("abcd")}
    return given.load(data_config(crop="resized", crop_scale=(1.0, 1.0), **fields), found)


def numbers(source):
    """Of all images of a source, in order; they are drawn in random crops, too."""
    batch = source.train_batch(np.arange(len(source)), np.arange(len(source)))
    return batch["image"][:, 8, 8, 0].tolist(), batch["label"].tolist()


@pytest.mark.parametrize("form", ["arrays", "one by one", "pictures"])
def test_of_each_class_a_share_is_set_aside(form):
    dataset = load(form, val_share=0.25)
    assert isinstance(dataset.train, examples.ArraySource) == (form == "arrays")
    (train_numbers, train_labels), (val, val_labels) = map(numbers, (dataset.train, dataset.val))
    assert sorted(train_numbers + val) == list(range(64))
    assert np.bincount(val_labels).tolist() == [4] * 4
    assert [n % 4 for n in train_numbers] == train_labels
    assert [n % 4 for n in val] == val_labels
    assert train_numbers == sorted(train_numbers)
    assert numbers(dataset.test)[0] == list(range(64, 80))
    assert dataset.evaluated is dataset.val
    assert load(form).evaluated is not None
    assert load(form).val is None
    # It depends on its own seed alone.
    others = {"train_share": 0.5, "train_seed": 4, "label_noise": 0.5, "noise_seed": 5}
    assert numbers(load(form, val_share=0.25, **others).val) == (val, val_labels)
    assert numbers(load(form, val_share=0.25, val_seed=1).val)[0] != val


@pytest.mark.parametrize("form", ["arrays", "pictures"])
def test_a_share_of_each_class_is_trained_on(form):
    found = {share: load(form, val_share=0.25, train_share=share) for share in (0.25, 0.5)}
    kept = {share: numbers(dataset.train) for share, dataset in found.items()}
    assert np.bincount(kept[0.25][1]).tolist() == [3] * 4
    assert np.bincount(kept[0.5][1]).tolist() == [6] * 4
    assert set(kept[0.25][0]) < set(kept[0.5][0])
    for dataset, (own, _) in zip(found.values(), kept.values(), strict=True):
        assert not set(own) & {*numbers(dataset.val)[0], *numbers(dataset.test)[0]}
    other = load(form, val_share=0.25, train_share=0.5, train_seed=1)
    assert numbers(other.train)[0] != kept[0.5][0]
    assert numbers(other.val) == numbers(found[0.5].val)


@pytest.mark.parametrize("form", ["arrays", "one by one", "pictures"])
def test_a_share_of_the_labels_is_wrong_in_training_alone(form):
    dataset = load(form, val_share=0.25, label_noise=0.5)
    own, labels = map(np.array, numbers(dataset.train))
    shifts = (labels - own) % 4
    assert np.count_nonzero(shifts) == 24  # of 48
    assert set(shifts) == {0, 1, 2, 3}
    assert labels.dtype == np.int64
    assert labels.min() >= 0
    for source in (dataset.val, dataset.test):
        clean, right = map(np.array, numbers(source))
        np.testing.assert_array_equal(clean % 4, right)
    again = load(form, val_share=0.25, label_noise=0.5)
    assert numbers(again.train) == numbers(dataset.train)
    other = load(form, val_share=0.25, label_noise=0.5, noise_seed=1)
    assert numbers(other.train)[0] == own.tolist()
    assert numbers(other.train)[1] != labels.tolist()


def test_wrong_labels_are_each_other_class_as_likely():
    labels = np.zeros(30_000, np.int32)
    source = examples.ArraySource(np.zeros((30_000, 1), np.uint8), labels)
    noisy, _ = shares.divided(source, data_config(label_noise=0.9), 4)
    counts = np.bincount(noisy.labels)
    assert counts[0] == 3000
    assert np.abs(counts[1:] - 9000).max() < 400
    assert noisy.images is source.images


def test_what_is_drawn_for_an_unreadable_image_was_not_set_aside():
    pictures = [
        (Image.fromarray(image), label) for image, label in zip(IMAGES, LABELS, strict=True)
    ]
    broken = [
        (b"", label) if i % 2 else (image, label) for i, (image, label) in enumerate(pictures)
    ]
    found = {"train": broken[:64], "test": pictures[64:], "label_names": list("abcd")}
    config = data_config(crop="resized", max_bad=0.9, val_share=0.5)
    dataset = given.load(config, found)
    batch = dataset.test.test_batch(np.arange(16))
    val = dataset.val.test_batch(np.arange(len(dataset.val)))
    val_numbers = set(val["image"][val["mask"] == 1][:, 0, 0, 0].tolist())
    assert batch["mask"].all()
    for seed in range(10):
        rows = np.arange(len(dataset.train))
        drawn = dataset.train.train_batch(rows, rows + 100 * seed)["image"][:, 0, 0, 0]
        assert not val_numbers & set(drawn.tolist())


@pytest.mark.parametrize("source", ["digits", "shapes"])
def test_the_sources_of_the_package_have_shares(source):
    config = plain_config(**{"data.source": source, "data.val_share": 0.25}).data
    config.label_noise = 0.25
    dataset = sources.load(config)
    config.val_share = config.label_noise = 0.0
    whole = sources.load(config)
    assert len(dataset.train) + len(dataset.val) == len(whole.train)
    as_bytes = [{image.tobytes() for image in s.images} for s in (dataset.train, dataset.val)]
    assert not as_bytes[0] & as_bytes[1]
    assert dataset.description.mean != whole.description.mean  # of the images to train on alone


def test_the_set_to_validate_on_is_not_the_test_set_of_a_directory(tmp_path):
    for i, (image, label) in enumerate(zip(IMAGES, LABELS, strict=True)):
        (tmp_path / "abcd"[label]).mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / "abcd"[label] / f"{i:02}.png")
    config = data_config(source="folder", val_share=0.25)
    config.folder.update(path=str(tmp_path), val_share=0.2)
    dataset = sources.load(config)
    parts = [set(numbers(part)[0]) for part in (dataset.train, dataset.val, dataset.test)]
    assert [len(part) for part in parts] == [48, 16, 16]
    assert len(set.union(*parts)) == 80
    # All are evaluated on: there are none to set aside.
    config.folder.val_share = 1.0
    assert [len(s) for s in (sources.load(config).train, sources.load(config).test)] == [0, 80]


@pytest.mark.parametrize(
    ("fields", "right"),
    [
        (
            {"val_share": 0.01},
            "config.data.val_share 0.01 of the 16 training images of class 0 is 0",
        ),
        (
            {"val_share": 0.99},
            "is 16: some of each class must be set aside, and some left to train",
        ),
        (
            {"train_share": 0.01},
            "train_share 0.01 of the 16 training images of class 0 is 0: some ",
        ),
    ],
)
def test_a_share_that_is_none_gets_one_line(fields, right):
    with pytest.raises(UserError, match=re.escape(right)):
        load("arrays", **fields)


@pytest.mark.parametrize(
    ("field", "value", "right"),
    [
        ("val_share", 1.0, "config.data.val_share 1.0 must be at least 0.0 and less than 1.0"),
        ("val_share", float("nan"), "config.data.val_share nan must be at least 0.0"),
        (
            "label_noise",
            -0.1,
            "config.data.label_noise -0.1 must be at least 0.0 and less than 1.0",
        ),
        ("train_share", 0.0, "config.data.train_share 0.0 must be more than 0, at most 1"),
        ("train_share", 1.5, "config.data.train_share 1.5 must be more than 0, at most 1"),
        ("noise_seed", -1, "config.data.noise_seed -1 must be at least 0"),
    ],
)
def test_a_share_out_of_range_is_refused(field, value, right):
    with pytest.raises(config_lib.ConfigError, match=re.escape(right)):
        validation.validate(plain_config(**{f"data.{field}": value}))


def test_a_dataset_is_not_divided_again():
    own = load("arrays")
    for field, value in (("val_share", 0.5), ("train_share", 0.5), ("label_noise", 0.5)):
        with pytest.raises(
            UserError, match=rf"config\.data\.{field} 0\.5: a Dataset is taken as it"
        ):
            given.load(data_config(**{field: value}), own)


SHARES = {"data.val_share": 0.25, "data.train_share": 0.5, "data.label_noise": 0.25}


@pytest.fixture(scope="module")
def validated(tmp_path_factory):
    """A run that validates on images set aside, and its result."""
    workdir = tmp_path_factory.mktemp("validated") / "run"
    config = plain_config(**SHARES, **{"data.shapes.num_train": 160, "train.batch_size": 16})
    return workdir, config, train.train_and_evaluate(config, workdir)


@pytest.mark.long
def test_the_test_set_is_evaluated_at_the_end_alone(validated, capsys):
    workdir, config, result = validated
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert not any(name.startswith("test/") for line in lines for name in line)
    assert json.loads((workdir / "result.json").read_text()) == result
    dataset = sources.load(config.data)
    for source, name in ((dataset.val, "eval/top1"), (dataset.test, "test/top1")):
        assert accuracy(resflax.restore(workdir), source) == pytest.approx(result[name])
    best = resflax.restore(workdir, best=True)
    assert accuracy(best, dataset.test) == pytest.approx(result["best/test_top1"])
    assert accuracy(best, dataset.val) == pytest.approx(result["best/top1"])
    # It goes on, to be evaluated again, and not with other shares.
    again = train.train_and_evaluate(config, workdir)
    assert {**again, "seconds": 0} == {**result, "seconds": 0}
    output = " ".join(capsys.readouterr().out.split())
    assert "60 training, 40 validation and 50 test images" in output
    assert f"top-1 of the validation images {result['eval/top1']:.2%} after the last" in output
    assert f"top-1 of the test images {result['test/top1']:.2%} after the last" in output
    other = plain_config(**{**config_lib.flatten(config), "data.label_noise": 0.5})
    with pytest.raises(UserError, match=r"another config \(data\.label_noise: 0\.25 -> 0\.5\)"):
        train.train_and_evaluate(other, workdir)


def accuracy(run, source):
    logits = run.model.apply(run.variables, run.preprocess(source.images), train=False)
    return float(np.mean(np.argmax(logits, -1) == source.labels))


@pytest.mark.long
def test_the_best_state_is_tested_from_its_checkpoint(validated, monkeypatch, tmp_path):
    _, config, _ = validated
    # Each evaluation is worse than the first: so the best state is not the last.
    shown = iter([0.9, *np.linspace(0.8, 0.1, 20)])
    real = train.evaluator

    def evaluator(apply_fn, dataset, *arguments):
        evaluate = real(apply_fn, dataset, *arguments)

        def worse(variables, source=dataset.test):
            found = evaluate(variables, source)
            return found | {"top1": next(shown)} if source is dataset.val else found

        return worse

    monkeypatch.setattr(train, "evaluator", evaluator)
    result = train.train_and_evaluate(config, tmp_path / "run")
    assert result["best/step"] == 3
    dataset = sources.load(config.data)
    best = resflax.restore(tmp_path / "run", best=True)
    assert best.step == 3
    assert accuracy(best, dataset.test) == pytest.approx(result["best/test_top1"])
    assert result["best/test_loss"] != result["test/loss"]


@pytest.mark.long
def test_it_does_not_matter_where_a_share_lives(validated, tmp_path):
    workdir, config, _ = validated
    host = plain_config(**{**config_lib.flatten(config), "data.placement": "host"})
    train.train_and_evaluate(host, tmp_path / "run")
    a, b = (resflax.restore(path).variables for path in (workdir, tmp_path / "run"))
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.long
def test_training_sees_no_image_that_it_is_evaluated_on(monkeypatch, tmp_path):
    seen = set()
    read = examples.ArraySource.train_batch

    def train_batch(source, indices, seeds):
        batch = read(source, indices, seeds)
        if seeds.max() > 2**32:  # random, and no indices, as where it is evaluated
            seen.update(image.tobytes() for image in batch["image"])
        return batch

    monkeypatch.setattr(examples.ArraySource, "train_batch", train_batch)
    config = plain_config(**SHARES, **{"data.placement": "host", "train.batch_size": 16})
    config.data.shapes.num_train = 160
    train.train_and_evaluate(config, tmp_path / "run")
    dataset = sources.load(config.data)
    evaluated = [i.tobytes() for s in (dataset.val, dataset.test) for i in s.images]
    assert 48 < len(seen) <= 60  # of an epoch, and of all
    assert not seen & set(evaluated)


def test_a_single_class_has_no_other_for_noise():
    one = examples.ArraySource(IMAGES, np.zeros(80, np.int32))
    assert shares.divided(one, data_config(), 1) == (one, None)
    with pytest.raises(UserError, match=r"label_noise 0\.5 must be 0: there is no other class"):
        shares.divided(one, data_config(label_noise=0.5), 1)
