import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resflax.data import mixing
from resflax.data.transforms import AugmentationError


def batch(n=6, side=12, classes=5):
    rng = np.random.default_rng(0)
    images = rng.normal(size=(n, side, side, 3)).astype(np.float32)
    targets = rng.dirichlet(np.ones(classes), n).astype(np.float32)
    return jnp.asarray(images), jnp.asarray(targets)


def mixtures(count=40, **alphas):
    """The images, the targets, and these mixed with many keys."""
    images, targets = batch()
    mix = jax.jit(mixing.mixer(**alphas))
    mixed = [jax.device_get(mix(jax.random.key(i), images, targets)) for i in range(count)]
    return np.asarray(images), np.asarray(targets), mixed


def share_of(values, mixed):
    """Of the reversed batch, by least squares."""
    change = values[::-1] - values
    return np.sum((mixed - values) * change) / np.sum(change * change)


def pixel_shares(images, mixed):
    """Where an image of the result is its partner's; every pixel is one or the other's."""
    own = (mixed == images).all(-1)
    partner = (mixed == images[::-1]).all(-1)
    assert (own ^ partner).all()
    return partner


def test_without_either_nothing_is_copied():
    images, targets = batch()
    same = mixing.mixer(mixup=0.0, cutmix=0.0)(jax.random.key(0), images, targets)
    assert same[0] is images
    assert same[1] is targets


def test_mixup_combines_images_and_targets_alike():
    images, targets, mixed = mixtures(mixup=0.4, cutmix=0.0)
    for mixed_images, mixed_targets in mixed:
        share = share_of(images, mixed_images)
        assert 0 <= share <= 1
        stated = (1 - share) * images + share * images[::-1]
        np.testing.assert_allclose(mixed_images, stated, atol=1e-5)
        stated = (1 - share) * targets + share * targets[::-1]
        np.testing.assert_allclose(mixed_targets, stated, atol=1e-5)
        np.testing.assert_allclose(mixed_targets.sum(-1), 1, atol=1e-6)


@pytest.mark.long
@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_the_shares_of_mixup_are_beta_distributed(alpha):
    mix = mixing.mixer(mixup=alpha, cutmix=0.0)
    ends = jnp.asarray([0.0, 1.0]).reshape(2, 1)
    shares = jax.jit(jax.vmap(lambda key: mix(key, ends.reshape(2, 1, 1, 1), ends)[1][0, 0]))(
        jax.random.split(jax.random.key(0), 4000)
    )
    # Beta(a, a) has the mean 1/2 and the variance 1 / (4 (2a + 1)).
    assert abs(shares.mean() - 0.5) < 0.03
    assert abs(shares.var() * 4 * (2 * alpha + 1) - 1) < 0.1


def test_cutmix_pastes_one_box_and_counts_its_pixels():
    images, targets, mixed = mixtures(mixup=0.0, cutmix=1.0)
    sizes = set()
    for mixed_images, mixed_targets in mixed:
        partner = pixel_shares(images, mixed_images)
        assert (partner == partner[0]).all()
        rows, columns = partner[0].any(1), partner[0].any(0)
        np.testing.assert_array_equal(partner[0], rows[:, None] & columns[None])
        for line in (rows, columns):
            assert np.count_nonzero(np.diff(np.pad(line, 1).astype(int))) <= 2
        share = np.float32(partner[0].mean())
        stated = (1 - share) * targets + share * targets[::-1]
        np.testing.assert_allclose(mixed_targets, stated, rtol=1e-6)
        sizes.add((rows.sum(), columns.sum()))
    assert len(sizes) > 10


def test_the_target_of_cutmix_is_the_share_of_pixels_exactly():
    images, _ = batch(n=2, side=8)
    mix = jax.jit(mixing.mixer(mixup=0.0, cutmix=1.0))
    for i in range(30):
        mixed, targets = mix(jax.random.key(i), images, jnp.eye(2))
        share = pixel_shares(np.asarray(images), np.asarray(mixed))[0].mean()
        # Sixty-fourths are exact.
        np.testing.assert_array_equal(targets, [[1 - share, share], [share, 1 - share]])


@pytest.mark.long
def test_the_boxes_of_cutmix_have_the_drawn_area_and_lie_anywhere():
    side = 32
    images = jnp.zeros((2, side, side, 1)).at[1].set(1.0)
    mix = mixing.mixer(mixup=0.0, cutmix=1.0)
    keys = jax.random.split(jax.random.key(3), 4000)
    masks = jax.jit(jax.vmap(lambda key: mix(key, images, jnp.eye(2))[0][0, ..., 0]))(keys)
    # The expectation of a box of side s = sqrt(u), u uniform, with its centre anywhere in the unit
    # square and what is outside cut off: along one axis s - s^2 / 4 is left.
    expected = np.mean([(s - s * s / 4) ** 2 for s in np.sqrt(np.linspace(0, 1, 10001))])
    assert abs(masks.mean() - expected) < 0.03
    covered = masks.mean(0)
    np.testing.assert_allclose(covered, covered[::-1, ::-1], atol=0.06)
    assert covered[16, 16] > covered[0, 0] > 0.02


@pytest.mark.long
def test_with_both_half_of_the_batches_are_mixed_by_each():
    images, _, mixed = mixtures(count=100, mixup=0.5, cutmix=1.0)
    kinds = []
    for mixed_images, _ in mixed:
        own = (mixed_images == images).all(-1)
        kinds.append(bool((own | (mixed_images == images[::-1]).all(-1)).all()))
    assert 35 < sum(kinds) < 65


@pytest.mark.long
def test_the_key_alone_decides_and_jit_changes_nothing():
    images, targets = batch()
    mix = mixing.mixer(mixup=0.3, cutmix=1.0)
    eager, jitted, again, other = (
        function(jax.random.key(seed), images, targets)
        for function, seed in ((mix, 0), (jax.jit(mix), 0), (jax.jit(mix), 0), (jax.jit(mix), 1))
    )
    for one, two in zip(eager, jitted, strict=True):
        assert one.dtype == two.dtype == jnp.float32
        np.testing.assert_allclose(one, two, atol=1e-6)
    np.testing.assert_array_equal(jitted[0], again[0])
    assert not np.allclose(jitted[0], other[0])


@pytest.mark.parametrize(
    ("alphas", "wrong"),
    [
        ({"mixup": -0.1, "cutmix": 0.0}, "mix.mixup -0.1 is the alpha"),
        ({"mixup": 0.0, "cutmix": float("nan")}, "mix.cutmix nan is the alpha"),
        ({"mixup": float("inf"), "cutmix": 0.0}, "mix.mixup inf is the alpha"),
    ],
)
def test_alphas_are_positive(alphas, wrong):
    with pytest.raises(AugmentationError, match=wrong):
        mixing.mixer(**alphas)
