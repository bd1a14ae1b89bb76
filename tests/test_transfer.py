"""Starting from other weights, and training parts of a network."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image
from plain import config as plain_config

import resflax
from resflax import build, train, transfer
from resflax import config as config_lib
from resflax.data import augmentation, shapes, sources
from resflax.parallel import data_parallel

PLAIN = {"model.shortcut": "B"}


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("pretrained") / "run"
    train.train_and_evaluate(plain_config(**PLAIN, **{"train.epochs": 1.0}), workdir)
    return workdir


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three classes of colour, 16 images each."""
    root = tmp_path_factory.mktemp("folder")
    rng = np.random.default_rng(0)
    for channel, name in enumerate(("red", "green", "blue")):
        (root / name).mkdir()
        for i in range(16):
            pixels = rng.integers(0, 80, (20, 24, 3), dtype=np.uint8)
            pixels[..., channel] += 120
            Image.fromarray(pixels).save(root / name / f"{i}.jpg")
    return root


def finetuned(folder, pretrained, workdir, **overrides):
    config = plain_config(
        **{
            **PLAIN,
            "data.source": "folder",
            "data.folder.path": str(folder),
            "init_from": str(pretrained),
            "train.batch_size": 16,
            "train.epochs": 2.0,
            **overrides,
        }
    )
    result = train.train_and_evaluate(config, workdir)
    return result, resflax.restore(workdir).variables


def changed(a, b):
    """The parts of two trees whose values differ, by collection."""
    return {
        collection: {
            part
            for part in a[collection]
            if any(
                x.shape != y.shape or np.any(x != y)
                for x, y in zip(
                    jax.tree.leaves(a[collection][part]),
                    jax.tree.leaves(b[collection][part]),
                    strict=True,
                )
            )
        }
        for collection in a
    }


@pytest.mark.long
def test_the_head_alone_is_new_and_trained(folder, pretrained, tmp_path, capsys):
    before = resflax.restore(pretrained).variables
    _, after = finetuned(folder, pretrained, tmp_path / "run", **{"train.trainable": "head"})
    assert after["params"]["head"]["kernel"].shape[-1] == 3
    assert changed(before, after) == {"params": {"head"}, "batch_stats": set()}
    output = capsys.readouterr().out
    assert f"weights loaded from step 2 of {pretrained}; new: head\n" in output
    total = resflax.count(resflax.restore(pretrained).model, (16, 16, 3)).params - 7 * (16 + 1)
    assert f"51 of {total:,} parameters are trained (config.train.trainable 'head')" in output
    # 39 of the 48 images are to train on.
    assert "batches of 16 (an epoch leaves out 7 images)" in output


@pytest.mark.long
def test_a_stage_is_trained_with_its_statistics(folder, pretrained, tmp_path):
    before = resflax.restore(pretrained).variables
    _, after = finetuned(folder, pretrained, tmp_path / "run", **{"train.trainable": "stage4|head"})
    assert changed(before, after) == {
        "params": {"stage4_block1", "head"},
        "batch_stats": {"stage4_block1"},
    }


@pytest.mark.long
@pytest.mark.devices(8)
@pytest.mark.parametrize("mode", ["shard_map", pytest.param("pmap", marks=pytest.mark.slow)])
def test_everything_is_trained_by_default(folder, pretrained, tmp_path, mode):
    before = resflax.restore(pretrained).variables
    overrides = {"parallel.mode": mode, "train.ema_decay": 0.5, "train.epochs": 12.0}
    result, after = finetuned(folder, pretrained, tmp_path / "run", **overrides)
    moved = changed(before, after)
    assert moved["params"] == set(before["params"])
    assert moved["batch_stats"] == set(before["batch_stats"])
    assert result["best/top1"] > 0.5


@pytest.mark.long
def test_without_a_step_the_weights_are_those_given(pretrained):
    config = plain_config(**PLAIN, init_from=str(pretrained))
    model = config_lib.build_model(config, 10)
    state = build.create_state(config, model, _Described(), optax.sgd(0.1), data_parallel("jit"))
    said = []
    started = transfer.start(state, config, shapes.LABEL_NAMES, said.append)
    before = resflax.restore(pretrained).variables
    jax.tree.map(np.testing.assert_array_equal, started.eval_variables, before)
    assert said[0] == f"weights loaded from step 2 of {pretrained}; new: nothing"
    # As many classes, of other names: the classifier is new.
    started = transfer.start(state, config, [*shapes.LABEL_NAMES[1:], "other"], said.append)
    assert changed(before, started.eval_variables) == {"params": {"head"}, "batch_stats": set()}
    assert said[2] == f"weights loaded from step 2 of {pretrained}; new: head"
    # Without names in either data set, there are none to compare.
    started = transfer.start(state, config, list(map(str, range(10))))
    jax.tree.map(np.testing.assert_array_equal, started.eval_variables, before)


class _Described:
    class description:  # noqa: N801
        image_shape = (16, 16, 3)


@pytest.mark.long
def test_a_resumed_run_goes_on_from_its_own_state(folder, pretrained, tmp_path):
    _, after = finetuned(folder, pretrained, tmp_path / "run")
    _, again = finetuned(folder, pretrained, tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, after, again)


@pytest.mark.long
def test_frozen_norms_use_their_running_statistics():
    model = resflax.create_model("cifar_resnet20", depth=8, num_filters=4, scan=0)
    images = 3.0 + jax.random.normal(jax.random.key(1), (4, 8, 8, 3))
    variables = model.init(jax.random.key(0), images, train=False)

    def apply(pattern):
        apply_fn = transfer.freeze(model.apply, pattern)
        return apply_fn(variables, images, train=True, mutable=["batch_stats"])

    evaluated = model.apply(variables, images, train=False)
    np.testing.assert_allclose(apply("head")[0], evaluated, rtol=1e-5, atol=1e-6)
    trained, _ = model.apply(variables, images, train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(apply(".*")[0], trained, rtol=1e-5, atol=1e-6)
    assert np.abs(apply("stage4|head")[0] - evaluated).max() > 1e-3
    stats = apply("stage4|head")[1]["batch_stats"]
    assert changed({"s": stats}, {"s": variables["batch_stats"]}) == {"s": {"stage4_block1"}}


def test_frozen_parameters_have_no_gradient():
    model = resflax.create_model("cifar_resnet20", depth=8, num_filters=4, scan=0)
    images = jnp.ones((2, 8, 8, 3))
    variables = model.init(jax.random.key(0), images, train=False)
    apply_fn = transfer.freeze(model.apply, "head")
    grads = jax.grad(lambda p: apply_fn({**variables, "params": p}, images, train=False).sum())(
        variables["params"]
    )
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(grads["stage4_block1"]))
    assert np.any(grads["head"]["bias"] != 0)


@pytest.mark.long
@pytest.mark.parametrize(
    ("overrides", "right"),
    [
        ({"init_from": "/nowhere"}, "/nowhere does not exist"),
        ({"model.shortcut": "A"}, r"config.model.shortcut is 'A', of the weights 'B'"),
        ({"model.num_filters": 16}, "num_filters is 16, of the weights 4"),
        ({"train.trainable": "tail"}, "'tail' begins no parameter of .*head"),
        ({"train.trainable": "("}, "no regular expression"),
    ],
)
def test_weights_that_do_not_fit_are_told_why(folder, pretrained, tmp_path, overrides, right):
    with pytest.raises(ValueError, match=right):
        finetuned(folder, pretrained, tmp_path / "run", **overrides)
    assert not (tmp_path / "run/checkpoints/1").exists()


def imagenet_config(weights, **overrides):
    unset = ("depth", "num_filters", "cardinality", "base_width", "se_reduction")
    changes = {f"model.{field}": None for field in unset} | {"model.name": "resnet18", **overrides}
    return plain_config(init_from=str(weights), **changes)


def test_a_classifier_that_the_weights_lack_is_the_fresh_one(tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    pytest.importorskip("torch")
    config = imagenet_config(
        tmp_path / "w.safetensors", **{"model.num_filters": 8, "model.any_size": True}
    )
    model = config_lib.build_model(config, 10)
    given = model.init(jax.random.key(3), jnp.ones((1, 32, 32, 3)), train=False)
    arrays = {k: v.numpy() for k, v in resflax.to_torch(model, given, "timm").items()}
    for wrapped, left_out in (("", "fc."), ("module.", "fc."), ("", "fc.bias"), ("", "bn1.bias")):
        kept = {wrapped + k: v for k, v in arrays.items() if not k.startswith(left_out)}
        safetensors.save_file(kept, tmp_path / "w.safetensors")
        state = build.create_state(
            config, model, _Described(), optax.sgd(0.1), data_parallel("jit")
        )
        if left_out != "fc.":
            with pytest.raises(ValueError, match=f"1 missing: {left_out}"):
                transfer.start(state, config, list(map(str, range(10))))
            continue
        started = transfer.start(state, config, list(map(str, range(10)))).eval_variables
        assert changed(given, started) == {"params": {"head"}, "batch_stats": set()}
        jax.tree.map(np.testing.assert_array_equal, started["params"]["head"], state.params["head"])


@pytest.mark.parametrize("name", ["model.pth", "model.pth.tar", "model.ckpt"])
def test_a_pickle_is_told_how_to_convert_it(name, tmp_path):
    (tmp_path / name).write_bytes(b"never read")
    config = imagenet_config(tmp_path / name)
    with pytest.raises(resflax.UserError, match=r"is a pickle.*python -c 'from safetensors"):
        transfer.start(None, config, list(map(str, range(10))))


def test_weights_of_torchvision_start_a_run(folder, tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    pytest.importorskip("torch")
    model = resflax.create_model("resnet18", num_classes=7, num_filters=8)
    variables = model.init(jax.random.key(3), jnp.ones((1, 64, 64, 3)), train=False)
    arrays = {k: v.numpy() for k, v in resflax.to_torch(model, variables).items()}
    safetensors.save_file(arrays, tmp_path / "weights.safetensors")
    config = plain_config(
        **{
            "model.name": "resnet18",
            "model.depth": None,
            "model.num_filters": 8,
            "model.cardinality": None,
            "model.base_width": None,
            "model.se_reduction": None,
            "data.source": "folder",
            "data.folder.path": str(folder),
            "data.image_size": 64,
            "data.mean": (0.485, 0.456, 0.406),
            "data.std": (0.229, 0.224, 0.225),
            "init_from": str(tmp_path / "weights.safetensors"),
            "train.trainable": "head",
            "train.batch_size": 16,
            "train.epochs": 1.0,
        }
    )
    train.train_and_evaluate(config, tmp_path / "run")
    run = resflax.restore(tmp_path / "run")
    assert changed(variables, run.variables) == {"params": {"head"}, "batch_stats": set()}
    assert run.dataset.mean == (0.485, 0.456, 0.406)


class Pixels(nn.Module):
    """Logits of the mean pixel."""

    @nn.compact
    def __call__(self, images, *, train):
        return nn.Dense(3)(images.mean((1, 2)))


COLOURS = sources.Description("own", (4, 4, 3), ("r", "g", "b"), (0.5, 0.4, 0.3), (0.2, 0.1, 0.4))


@pytest.fixture
def trained(monkeypatch, tmp_path):
    """A run's directory, whose network is Pixels."""
    images = jnp.ones((1, 4, 4, 3))
    variables = Pixels().init(jax.random.key(0), images, train=False)
    weights = transfer._Weights(Pixels(), variables, "a run", COLOURS)
    monkeypatch.setattr(transfer, "_load", lambda field, name, network: weights)
    return str(tmp_path)


def test_a_teacher_sees_images_as_its_own_run_normalised_them(trained):
    student = dataclasses.replace(COLOURS, mean=(0.1, 0.2, 0.3), std=(0.3, 0.3, 0.3))
    apply, variables = transfer.teacher(student, trained, "")
    pixels = np.random.default_rng(0).integers(256, size=(2, 4, 4, 3), dtype=np.uint8)
    seen, own = (augmentation.normalizer(d.mean, d.std)(pixels) for d in (student, COLOURS))
    expected = Pixels().apply(variables, own, train=False)
    np.testing.assert_allclose(apply(variables, seen), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("student", "network", "right"),
    [
        ({"label_names": ("r", "g")}, "", "teacher .* differ in the number of classes: 2 and 3"),
        ({"label_names": ("b", "g", "r")}, "", "teacher .* was trained on differ in their classes"),
        ({"image_shape": (4, 4, 1)}, "", "number of channels: 1 and 3"),
        ({}, "resnet50", "its network 'resnet50' must be ''"),
    ],
)
def test_a_teacher_of_other_classes_or_images_is_refused(trained, student, network, right):
    with pytest.raises(resflax.UserError, match=right) as error:
        transfer.teacher(dataclasses.replace(COLOURS, **student), trained, network)
    assert "\n" not in str(error.value)


def test_a_teacher_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(resflax.UserError, match=r"nothing does not exist: a run's"):
        transfer.teacher(COLOURS, str(tmp_path / "nothing"), "")
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"")
    with pytest.raises(resflax.UserError, match="network '' must be the name of the network"):
        transfer.teacher(COLOURS, str(path), "")


def test_a_file_of_weights_for_other_classes_teaches_nobody(monkeypatch, tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"")
    variables = Pixels().init(jax.random.key(0), jnp.ones((1, 4, 4, 3)), train=False)
    weights = transfer._Weights(Pixels(), variables, "a file")
    monkeypatch.setattr(transfer, "_load", lambda field, name, network: weights)
    apply, _ = transfer.teacher(COLOURS, str(path), "pixels")
    assert apply(variables, jnp.ones((2, 4, 4, 3))).shape == (2, 3)
    for changes, right in (
        ({"label_names": ("r", "g")}, "has 3 classes, the data set 2"),
        ({"image_shape": (4, 4, 1)}, "does not take images of 4 x 4 x 1: .*kernel"),
    ):
        with pytest.raises(resflax.UserError, match=right) as error:
            transfer.teacher(dataclasses.replace(COLOURS, **changes), str(path), "pixels")
        assert "\n" not in str(error.value)
