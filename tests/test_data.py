import collections
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import config as small_config

from resflax import UserError
from resflax import config as config_lib
from resflax.data import augmentation, examples, gallery, pipeline, sources


def numbered(n):
    """n images of one pixel whose label is their index."""
    images = np.arange(n, dtype=np.uint8).reshape(n, 1, 1, 1)
    return examples.ArraySource(images, np.arange(n, dtype=np.int32))


def train_batches(n=10, batch_size=4, seed=0, threads=1, put=lambda batch, axis: batch):
    return pipeline.TrainBatches(
        n,
        batch_size=batch_size,
        seed=seed,
        read=numbered(n).train_batch,
        put=put,
        threads=threads,
    )


def labels(batches, count):
    # Of endless ones, as many are ahead of those given out as can be.
    taken = itertools.islice(batches.take(itertools.repeat(1)), count)
    return [tuple(batch["label"]) for _, batch in taken]


def test_an_epoch_is_a_permutation_without_its_remainder():
    batches = train_batches()
    assert batches.steps_per_epoch == 2
    epochs = [sum(labels(batches, 2), ()) for _ in range(20)]
    assert all(len(set(epoch)) == 8 for epoch in epochs)
    assert len(set(epochs)) == 20
    # What one epoch leaves out, others hold.
    seen = collections.Counter(sum(epochs, ()))
    assert len(seen) == 10


def test_the_order_depends_on_the_seed_alone():
    assert labels(train_batches(seed=1), 6) == labels(train_batches(seed=1, threads=3), 6)
    assert labels(train_batches(seed=1), 6) != labels(train_batches(seed=2), 6)


def test_the_indices_of_a_step_are_those_of_its_batch():
    batches = train_batches()
    taken = labels(batches, 5)
    assert [tuple(batches.indices(step)) for step in range(1, 6)] == taken


@pytest.mark.parametrize("done", [0, 1, 2, 3, 7])
def test_a_step_leads_to_the_next_batch(done):
    batches = train_batches()
    labels(batches, done)
    assert batches.step == done
    following = labels(batches, 5)
    again = train_batches()
    labels(again, 3)
    again.seek(done)
    assert labels(again, 5) == following


def test_the_batches_of_a_call_are_stacked_and_put_at_once():
    puts = []
    batches = train_batches(put=lambda batch, axis: puts.append(axis) or batch)
    single = [np.asarray(row) for row in labels(train_batches(), 7)]
    steps, calls = [], []
    for count, batch in batches.take((3, 1, 2)):
        calls.append(batch)
        steps.append(batches.step)
        assert batch["image"].dtype == np.uint8
        assert len(batch["image"].shape) == (4 if count == 1 else 5)
    assert puts == [1, 0, 1]
    np.testing.assert_array_equal(calls[0]["label"], np.stack(single[:3]))
    np.testing.assert_array_equal(calls[1]["label"], single[3])
    np.testing.assert_array_equal(calls[2]["label"], np.stack(single[4:6]))
    assert steps == [3, 4, 6]
    for done in steps:
        batches.seek(done)
        assert labels(batches, 1) == [tuple(single[done])]


def test_seeds_are_those_of_an_image_whoever_reads_it():
    def seeds(processes, process):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(jax, "process_count", lambda: processes)
            patch.setattr(jax, "process_index", lambda: process)
            batches = pipeline.TrainBatches(
                10,
                batch_size=4,
                seed=0,
                read=lambda indices, seeds: {"index": indices, "seed": seeds},
                put=lambda batch, axis: batch,
            )
            taken = itertools.islice(batches.take(itertools.repeat(1)), 5)
            return [list(zip(b["index"], b["seed"], strict=True)) for _, b in taken]

    whole = seeds(1, 0)
    halves = zip(seeds(2, 0), seeds(2, 1), strict=True)
    assert whole == [first + second for first, second in halves]
    assert len({seed for batch in whole for _, seed in batch}) == 20


@pytest.mark.parametrize("n", [1, 4, 10, 12])
def test_evaluation_counts_every_image_once(n):
    batches = list(pipeline.eval_batches(numbered(n), 4))
    assert all(batch["label"].shape == (4,) for batch in batches)
    counted = np.concatenate([batch["label"][batch["mask"] == 1] for batch in batches])
    np.testing.assert_array_equal(counted, np.arange(n))


def test_digits_are_split_once_and_for_all():
    config = small_config(**{"data.source": "digits", "data.image_size": 8})
    dataset = sources.load(config.data)
    assert (len(dataset.train), len(dataset.test)) == (1437, 360)
    assert dataset.description.image_shape == (8, 8, 1)
    assert dataset.train.images.max() == 255
    assert abs(np.bincount(dataset.test.labels) - 36).max() <= 2
    together = np.concatenate([dataset.train.images, dataset.test.images]).reshape(1797, -1)
    assert len(np.unique(together, axis=0)) == 1797


def test_normalisation_gives_zero_mean_and_unit_variance():
    dataset = sources.load(small_config().data)
    normalize = augmentation.normalizer(dataset.description.mean, dataset.description.std)
    images = normalize(dataset.train.images)
    assert images.dtype == jnp.float32
    np.testing.assert_allclose(images.mean((0, 1, 2)), 0, atol=1e-4)
    np.testing.assert_allclose(images.std((0, 1, 2)), 1, atol=1e-4)


def augmented(n=64, **settings):
    images = jax.random.randint(jax.random.key(0), (n, 6, 6, 1), 1, 256).astype(jnp.uint8)
    settings = augmentation.Augmentation(**{**config_lib.base().augment, **settings})
    augment = augmentation.augmenter(lambda x: x.astype(jnp.float32), settings)
    keys = jax.random.split(jax.random.key(1), n)
    return np.asarray(images, np.float32), np.asarray(augment(keys, images)), augment, keys


def test_crops_are_shifts_filled_with_the_mean():
    images, result, *_ = augmented(crop_padding=1, flip=False)
    shifts = set()
    for image, crop in zip(images, result, strict=True):
        padded = np.pad(image, ((1, 1), (1, 1), (0, 0)))
        places = [
            (y, x)
            for y in range(3)
            for x in range(3)
            if np.array_equal(padded[y : y + 6, x : x + 6], crop)
        ]
        assert len(places) == 1
        shifts.update(places)
    assert len(shifts) == 9


def test_half_of_the_images_are_mirrored():
    images, result, *_ = augmented(crop_padding=0, flip=True)
    flipped = [np.array_equal(r, i[:, ::-1]) for i, r in zip(images, result, strict=True)]
    kept = [np.array_equal(r, i) for i, r in zip(images, result, strict=True)]
    assert all(f != k for f, k in zip(flipped, kept, strict=True))
    assert 20 < sum(flipped) < 44


def test_an_image_is_augmented_by_its_own_key():
    images, result, augment, keys = augmented(crop_padding=2, flip=True)
    np.testing.assert_array_equal(augment(keys[8:16], images[8:16]), result[8:16])


def test_a_picture_of_two_channels_is_refused(tmp_path):
    arrays = {"train_images": np.zeros((4, 16, 16, 2), np.uint8), "train_labels": [0, 1, 0, 1]}
    arrays |= {"test_images": arrays["train_images"], "test_labels": [0, 1, 0, 1]}
    np.savez(tmp_path / "two.npz", **arrays)
    path = str(tmp_path / "two.npz")
    config = small_config(**{"data.source": "arrays", "data.arrays.path": path})
    with pytest.raises(UserError, match="have 2 channels; a picture shows 1"):
        gallery.draw(config, tmp_path / "a.png")
