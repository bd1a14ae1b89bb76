"""Damage to a checkpoint's files: whatever it is, it is seen, and named."""

import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resflax import checkpoint
from resflax.checkpoint import leaves, manifest
from resflax.checkpoint.manifest import DamageError, Leaf, Manifest


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint that orbax wrote, with its manifest."""
    from test_checkpoint import create, parallel_of

    workdir = tmp_path_factory.mktemp("saved")
    parallel = parallel_of("jit", 1)
    saver = checkpoint.Checkpointer(workdir, keep=1, facts=checkpoint.facts("{}"))
    saver.save(create(parallel, seed=0), {"top1": 0.5})
    saver.close()
    return workdir / "checkpoints" / "0"


def files(folder):
    return sorted(
        path.relative_to(folder)
        for path in folder.rglob("*")
        if path.is_file() and path.name != "commit_success.txt"
    )


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << (place % 8)
    path.write_bytes(data)


def places(path):
    size = path.stat().st_size
    return sorted({0, size // 3, size // 2, size - 1})


DAMAGES = {
    "flipped": lambda path: [lambda p=place: flip(path, p) for place in places(path)],
    "cut": lambda path: [
        lambda n=n: path.write_bytes(path.read_bytes()[:n])
        for n in {0, path.stat().st_size // 2, path.stat().st_size - 1}
    ],
    "longer": lambda path: [lambda: path.write_bytes(path.read_bytes() + b"\0")],
    "missing": lambda path: [path.unlink],
}


@pytest.mark.first(2)
@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_to_every_file_is_seen_and_named(saved, tmp_path, damage):
    assert Manifest.verify(saved).metrics == {"top1": 0.5}
    copy = tmp_path / "copy"
    shutil.copytree(saved, copy)
    names = files(saved)
    assert len(names) > 15
    for name in names:
        original = (copy / name).read_bytes()
        for do in DAMAGES[damage](copy / name):
            do()
            with pytest.raises(DamageError) as error:
                Manifest.verify(copy)
            assert str(copy / name) in str(error.value)
            (copy / name).write_bytes(original)
    Manifest.verify(copy)


@pytest.mark.slow
def test_every_flipped_byte_is_seen(saved, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(saved, copy)
    for name in files(saved):
        stamp = b'"commit_timestamp_nsecs": '
        start = (copy / name).read_bytes().find(stamp) + len(stamp)
        for place in range((copy / name).stat().st_size):
            if name.name == "_CHECKPOINT_METADATA" and start <= place < start + 19:
                continue  # the time at which orbax finished, which it writes afterwards
            flip(copy / name, place)
            with pytest.raises(DamageError):
                Manifest.verify(copy)
            flip(copy / name, place)
    Manifest.verify(copy)


def test_a_file_that_was_not_saved_is_seen(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "copy")
    (tmp_path / "copy" / "variables" / "new").write_text("")
    with pytest.raises(DamageError, match="new was not there when it was saved"):
        Manifest.verify(tmp_path / "copy")


def test_a_file_that_another_orbax_leaves_beside_the_items_is_no_damage(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "copy")
    (tmp_path / "copy" / "descriptor").mkdir()
    for name in ("commit_of_tomorrow.txt", "descriptor/pb"):
        (tmp_path / "copy" / name).write_text("")
    assert Manifest.verify(tmp_path / "copy").step == Manifest.read(saved).step


def test_a_manifest_says_what_made_the_checkpoint(saved):
    facts = Manifest.read(saved).facts
    assert facts["versions"]["jax"] == jax.__version__
    assert facts["topology"]["devices"] == jax.device_count()
    assert len(facts["config_sha256"]) == 64


def test_the_commit_is_noted(monkeypatch):
    here = pathlib.Path(manifest.__file__).parents[2]
    revision = manifest.facts("")["revision"]
    if (here / ".git").exists():
        assert len(revision.removesuffix("-dirty")) == 40
    else:
        assert revision is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint32", "uint8", "bool"])
def test_checksums_on_the_device_are_those_on_the_host(dtype):
    values = np.random.default_rng(0).integers(0, 2**16, (5, 7))
    array = jnp.asarray(values).astype(dtype)
    sums = leaves.checksums({"a": array, "key": jax.random.key(3)}, ())
    assert tuple(map(int, sums["a"])) == leaves.checksum(np.asarray(array))
    # Two that changed places, and one that is another, even where it is another zero.
    swapped = array.at[0, 0].set(array[1, 1]).at[1, 1].set(array[0, 0])
    if dtype != "bool":
        assert leaves.checksum(np.asarray(swapped)) != leaves.checksum(np.asarray(array))
    if dtype == "float32":
        zeros = np.zeros(3, np.float32)
        assert leaves.checksum(-zeros) != leaves.checksum(zeros)


def test_blocks_in_a_loop_have_checksums_of_their_own():
    blocks = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
    sums = leaves.checksums(
        {"params": {"b1..b3": {"kernel": jnp.asarray(blocks)}}}, (("b1", "b2", "b3"),)
    )
    found = [tuple(map(int, row)) for row in sums["params"]["b1..b3"]["kernel"]]
    assert found == [leaves.checksum(block) for block in blocks]


@pytest.mark.parametrize(
    ("wanted", "right"),
    [
        ({"a": jnp.zeros((2, 3))}, "step 4 has no a, which this run has"),
        ({}, "step 4 has b, which this run has not"),
        (
            {"b": jnp.zeros((2, 4))},
            r"step 4 has b as float32 \[2, 3\]; in this run it is float32 \[2, 4\]",
        ),
        ({"b": jnp.zeros((2, 3), jnp.bfloat16)}, r"in this run it is bfloat16 \[2, 3\]"),
    ],
)
def test_other_arrays_are_refused_by_name(wanted, right):
    saved = {"b": Leaf((2, 3), "float32", (0, 0))}
    with pytest.raises(checkpoint.CheckpointError, match=right):
        leaves.require_same(saved, wanted, "step 4")


def test_another_value_is_refused_by_name():
    saved = {"x/b": Leaf((2,), "float32", leaves.checksum(np.ones(2, np.float32)))}
    leaves.require_checksums(saved, leaves.checksums({"x": {"b": jnp.ones(2)}}, ()), "step 4")
    with pytest.raises(checkpoint.CheckpointError, match="step 4 is damaged: x/b is not what was"):
        leaves.require_checksums(saved, leaves.checksums({"x": {"b": jnp.zeros(2)}}, ()), "step 4")
