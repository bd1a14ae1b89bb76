"""Encoded images as a source: crops, unreadable files, memory or the host, and the command line."""

import itertools
import json
import os
import pathlib

import forked
import numpy as np
import pytest
from PIL import Image
from plain import config as plain_config

from resflax import train, validation
from resflax.data import augmentation, examples, pipeline, resident, sources
from resflax.data.bad import BadImagesError
from resflax.run import workdir

SIZE = 16


@pytest.fixture
def photos(tmp_path):
    """24 JPEGs of two classes, larger than what is cut from them."""
    rng = np.random.default_rng(0)
    for name, channel in (("cats", 0), ("dogs", 2)):
        (tmp_path / name).mkdir()
        for i in range(12):
            pixels = rng.integers(0, 60, (40, 50, 3), np.uint8)
            pixels[..., channel] += 150
            Image.fromarray(pixels).save(tmp_path / name / f"{i:02}.jpg", quality=95)
    return tmp_path


def folder_config(path, **fields):
    config = plain_config(**{"data.source": "folder", "data.image_size": SIZE})
    config.data.folder.update(path=str(path), val_share=0.25)
    config.data.update(fields)
    return config


def batch(source, indices, seed=0):
    return source.train_batch(np.asarray(indices), np.arange(seed, seed + len(indices)))


def test_files_whose_center_is_wanted_are_kept_in_memory(photos):
    dataset = sources.load(folder_config(photos).data)
    assert isinstance(dataset.train, examples.ArraySource)
    assert dataset.train.images.shape == (18, SIZE, SIZE, 3)
    assert dataset.description.image_shape == (SIZE, SIZE, 3)
    red = dataset.train.images[dataset.train.labels == 0]
    assert red[..., 0].mean() > 140 > red[..., 2].mean()
    assert resident.wanted("auto", dataset.train)


@pytest.mark.parametrize("crop", ["resized", "scale"])
def test_random_crops_are_those_of_their_seeds(photos, crop):
    config = folder_config(photos, crop=crop, crop_shorter=(20, 40))
    dataset = sources.load(config.data)
    assert not resident.wanted("auto", dataset.train)
    with pytest.raises(ValueError, match="'device' is for images in memory"):
        resident.wanted("device", dataset.train)
    first, again, other = (batch(dataset.train, [3, 4, 3], seed) for seed in (0, 0, 9))
    assert first["image"].shape == (3, SIZE, SIZE, 3)
    np.testing.assert_array_equal(first["image"], again["image"])
    assert (first["image"] != other["image"]).any(axis=(1, 2, 3)).all()
    # The same image, with two seeds.
    assert (first["image"][0] != first["image"][2]).any()
    whole = batch(dataset.train, range(len(dataset.train)))
    assert ((whole["image"][..., 0].mean((1, 2)) < 140) == whole["label"]).all()


def spoil(photos, count):
    for path in sorted((photos / "cats").iterdir())[:count]:
        path.write_bytes(path.read_bytes()[:300])


def test_another_image_is_drawn_for_one_that_cannot_be_read(photos):
    spoil(photos, 2)
    dataset = sources.load(folder_config(photos, crop="resized", max_bad=0.1).data)
    everything = batch(dataset.train, range(len(dataset.train)))
    assert (everything["image"].mean((1, 2, 3)) > 50).all()
    np.testing.assert_array_equal(
        everything["image"], batch(dataset.train, range(len(dataset.train)))["image"]
    )
    tested = dataset.test.test_batch(np.arange(len(dataset.test) + 2))
    unreadable = int((tested["mask"][: len(dataset.test)] == 0).sum())
    assert tested["mask"][-2:].tolist() == [0, 0]
    lines = list(dataset.bad)
    assert len(lines) == len(dataset.bad) == 2
    assert 0 <= unreadable <= 2
    assert {pathlib.Path(line.split(": ")[0]).name for line in lines} == {"00.jpg", "01.jpg"}


def test_too_many_of_them_stop_the_run(photos):
    spoil(photos, 3)
    dataset = sources.load(
        folder_config(photos, crop="resized", max_bad=0.1, mean=(0.5,) * 3, std=(0.5,) * 3).data
    )
    with pytest.raises(BadImagesError, match=r"number 3 of such images, and .*max_bad allows 2"):
        [source.test_batch(np.arange(len(source))) for source in (dataset.train, dataset.test)]
    with pytest.raises(BadImagesError):
        sources.load(folder_config(photos).data)


@pytest.mark.parametrize("threads", [1, 3])
def test_a_position_in_the_middle_of_an_epoch_leads_to_the_next_crops(photos, threads):
    dataset = sources.load(folder_config(photos, crop="resized").data)

    def batches(threads):
        return pipeline.TrainBatches(
            len(dataset.train),
            batch_size=4,
            seed=0,
            read=dataset.train.train_batch,
            put=lambda batch, axis: batch,
            threads=threads,
        )

    def images(batches, count):
        taken = itertools.islice(batches.take(itertools.repeat(1)), count)
        return [batch["image"] for _, batch in taken]

    whole, stopped, resumed = batches(1), batches(threads), batches(threads)
    expected = images(whole, 9)
    images(stopped, 6)  # of four in an epoch
    resumed.seek(stopped.step)
    np.testing.assert_array_equal(images(resumed, 3), expected[6:])


@pytest.mark.parametrize("channels", [1, 3])
def test_statistics_are_those_of_all_pixels(channels, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (300, 5, 4, channels), np.uint8)
    labels = np.arange(300) % 2
    named = {"train_labels": labels, "test_images": images[:2], "test_labels": labels[:2]}
    np.savez(tmp_path / "set.npz", train_images=images, **named)
    config = plain_config(
        **{"data.source": "arrays", "data.arrays.path": str(tmp_path / "set.npz")}
    )
    description = sources.load(config.data).description
    np.testing.assert_allclose(description.mean, images.mean((0, 1, 2)) / 255, rtol=1e-12)
    np.testing.assert_allclose(description.std, images.std((0, 1, 2)) / 255, rtol=1e-12)


@pytest.mark.parametrize("value", [0, 26, 255])
def test_a_channel_that_never_varies_is_only_centred(value, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (300, 5, 4, 3), np.uint8)
    images[..., 1] = value
    labels = np.arange(300) % 2
    named = {"train_labels": labels, "test_images": images[:2], "test_labels": labels[:2]}
    np.savez(tmp_path / "set.npz", train_images=images, **named)
    config = plain_config(
        **{"data.source": "arrays", "data.arrays.path": str(tmp_path / "set.npz")}
    )
    description = sources.load(config.data).description
    assert description.std[1] == 1.0
    np.testing.assert_allclose(description.std[::2], images[..., ::2].std((0, 1, 2)) / 255)
    normalized = augmentation.normalizer(description.mean, description.std)(images)
    np.testing.assert_allclose(normalized[..., 1], 0.0, atol=1e-6)


def command(*arguments, module="resflax.data"):
    return forked.run(module, *arguments)


def test_verify_names_what_cannot_be_read(photos):
    spoil(photos, 2)
    flags = "--config", "configs/finetune.py", f"--config.data.folder.path={photos}"
    result = command("verify", *flags)
    assert result.code == 1, result.errors
    assert "00.jpg: " in result.output
    assert "01.jpg: " in result.output
    assert "2 of 24 cannot be read" in result.output


@pytest.mark.long
def test_show_draws_a_picture(photos, tmp_path):
    path = tmp_path / "shown.png"
    result = command("show", "--config", "tests/plain.py", "--output", str(path))
    assert result.code == 0, result.errors
    with Image.open(path) as image:
        assert image.size[0] > 1000
        # More than the greys of the labels.
        colours = np.asarray(image.convert("RGB")).reshape(-1, 3)
        assert len(np.unique(colours, axis=0)) > 1000


@pytest.mark.parametrize(
    ("arguments", "right"),
    [
        (("show",), "--config FILE.py is required"),
        (("prepare", "mnist", "--from", "here"), "--from is for fashion_mnist, not 'mnist'"),
        (("prepare", "mnist", "stray"), "unexpected argument 'stray'"),
        (
            ("verify", "--config", "configs/fashion_mnist.py", "--config.data.arrays.path=nothing"),
            "nothing",
        ),
    ],
)
def test_what_cannot_be_gets_one_line(arguments, right):
    result = command(*arguments)
    assert result.code == 2
    assert result.errors.count("\n") == 1
    assert right in result.errors


@pytest.mark.long
def test_a_run_from_files_notes_those_that_cannot_be_read(photos, tmp_path):
    spoil(photos, 1)
    (photos / "cats" / "notes.txt").write_text("not an image")
    flags = {
        "data.source": "folder",
        "data.folder.path": photos,
        "data.folder.val_share": 0.25,
        "data.crop": "resized",
        "data.max_bad": 0.1,
        "train.batch_size": 8,
        "eval.batch_size": 8,
    }
    result = command(
        *("--config", "tests/plain.py", "--workdir", str(tmp_path / "run")),
        *(f"--config.{name}={value}" for name, value in flags.items()),
        module="resflax.main",
    )
    assert result.code == 0, result.errors
    assert f"left out of {photos}: 1 not .jpg, " in result.output
    assert "00.jpg: " in (tmp_path / "run" / "bad_files.txt").read_text()
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert any(line.get("data/bad_images") == 1 for line in lines)
    assert all(0 <= line["train/data_wait"] <= 1 for line in lines if "train/loss" in line)


def test_too_many_that_cannot_be_read_stop_the_run_and_are_noted(photos, tmp_path):
    # With a mean of its own: else the images that it is measured on stop the run before it starts.
    config = folder_config(photos, crop="resized", max_bad=1 / 24, mean=(0.5,) * 3, std=(0.2,) * 3)
    config.train.batch_size = config.eval.batch_size = 8
    spoil(photos, 6)
    with pytest.raises(BadImagesError, match="max_bad allows 1"):
        train.train_and_evaluate(config, tmp_path / "run")
    noted = (tmp_path / "run" / "bad_files.txt").read_text().splitlines()
    assert 2 <= len(noted) <= 6
    assert all(f"{photos}/cats/" in line for line in noted)


def test_each_process_notes_its_own(tmp_path):
    for process, lines in ((0, ["a: b"]), (1, ["c: d"]), (2, [])):
        workdir.write_bad_files(tmp_path, lines, process)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "bad_files.txt": "a: b\n",
        "bad_files.1.txt": "c: d\n",
    }


def test_a_file_that_is_gone_counts_as_unreadable(photos):
    dataset = sources.load(folder_config(photos, crop="resized", max_bad=0.1).data)
    (photos / "cats" / "00.jpg").unlink()
    for source in (dataset.train, dataset.test):
        source.test_batch(np.arange(len(source)))
    assert list(dataset.bad) == [
        f"{photos}/cats/00.jpg: it cannot be opened: No such file or directory"
    ]


def test_what_is_left_out_of_a_directory_is_said_and_not_read(photos):
    (photos / "cats" / "._00.jpg").write_bytes(bytes.fromhex("00051607") + bytes(100))
    lines = []
    dataset = sources.load(folder_config(photos).data, lines.append)
    expected = f"Files or directories left out of {photos}: 1 hidden (such as cats/._00.jpg)."
    assert lines == [expected]
    assert len(dataset.bad) == 0
    with pytest.warns(UserWarning, match="left out of") as warned:
        sources.load(folder_config(photos).data)
    assert warned[0].filename == __file__
    result = command(
        "verify", "--config", "configs/finetune.py", f"--config.data.folder.path={photos}"
    )
    assert (result.code, result.output.splitlines()[0]) == (0, expected)


@pytest.mark.parametrize("crop", ["center", "resized"])
def test_a_directory_can_be_all_to_evaluate_on_but_not_to_train(photos, crop):
    config = folder_config(photos, crop=crop)
    config.data.folder.val_share = 1.0
    validation.validate_data(config)
    dataset = sources.load(config.data)
    assert (len(dataset.train), len(dataset.test)) == (0, 24)
    assert len(dataset.description.mean) == 3
    assert dataset.test.test_batch(np.arange(24))["label"].tolist() == [0] * 12 + [1] * 12
    with pytest.raises(ValueError, match=r"val_share 1.0 must be at least 0.0 and less than 1.0"):
        validation.validate(config, 1)


@pytest.mark.slow
def test_fashion_mnist_is_learned_in_three_epochs(tmp_path):
    data = pathlib.Path(os.environ.get("RESFLAX_DATA_DIR", "~/.local/share/resflax")).expanduser()
    if not (data / "fashion_mnist").is_dir():
        pytest.skip(
            "apt-get install dataset-fashion-mnist; python -m resflax.data prepare fashion_mnist "
            "--from /usr/share/datasets/fashion-mnist"
        )
    run = tmp_path / "run"
    flags = "--config", "configs/fashion_mnist.py", "--config.train.epochs=3"
    flags += ("--config.optim.schedule=cosine",)
    result = forked.Process("resflax.main", *flags, "--workdir", run).finish(1800)
    assert result.code == 0, result.errors
    assert json.loads((run / "result.json").read_text())["eval/top1"] > 0.89
