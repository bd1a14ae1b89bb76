import csv

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resflax import analyze
from resflax.analysis import cam, class_maps, overlays, subject, taps
from resflax.analysis.class_maps import Maps
from resflax.analysis.result import NothingError
from resflax.models import create_model

pytestmark = pytest.mark.devices(1, 8, long=8)

CLASSES = 5

DENSE_VGG = {"num_filters": 2, "fc_units": 8, "dense_evaluation": True}
SMALL = {
    "resnet": ("cifar_resnet20", {"depth": 8, "num_filters": 4}),
    "preact": ("cifar_resnet20", {"depth": 8, "num_filters": 4, "unit": "full_preact"}),
    "relu_only": ("cifar_resnet20", {"depth": 8, "num_filters": 4, "unit": "relu_only_preact"}),
    "tanh": (
        "cifar_resnet20",
        {"depth": 8, "num_filters": 4, "unit": "full_preact", "act": "tanh"},
    ),
    "resnext": ("cifar_resnext29_8x64d", {"depth": 11, "num_filters": 8, "se_reduction": 4}),
    "densenet": ("cifar_densenet40_k12", {"depth": 10, "growth_rate": 4}),
    "nin": ("cifar_nin", {"widths": ((8, 6), (6, 6), (6,))}),
    "vgg": ("vgg11", DENSE_VGG),
}


def network(name, overrides, size=16, seed=0):
    """With biases in the classifier, which are zero at first."""
    model = taps.written_out(create_model(name, num_classes=CLASSES, **overrides))
    images = 2 * jax.random.normal(jax.random.key(seed + 1), (6, size, size, 3))
    variables = jax.jit(lambda k, x: model.init(k, x, train=False))(jax.random.key(seed), images)
    head = variables["params"]["head"]
    head = head.get("conv", head)
    head["bias"] = 1 + jax.random.normal(jax.random.key(seed + 2), (CLASSES,))
    return model, variables, images


def batches(images, size=6):
    return [(images[i : i + size], None) for i in range(0, len(images), size)]


def logits(model, variables, images):
    return np.asarray(jax.jit(lambda v, x: model.apply(v, x, train=False))(variables, images))


@pytest.mark.first(1)
@pytest.mark.parametrize("name", SMALL)
def test_a_map_averages_to_the_logit(name):
    model, variables, images = network(*SMALL[name], size=64 if name == "vgg" else 16)
    wanted = logits(model, variables, images)
    maps = class_maps.measure(model, variables, batches(images, size=4))
    np.testing.assert_allclose(maps.logits, wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(maps.classes, wanted.argmax(axis=1))
    assert maps.activation.ndim == 3
    np.testing.assert_allclose(maps.activation.mean(axis=(1, 2)), wanted.max(axis=1), rtol=1e-5)
    if name != "vgg":  # whose map has a single position here
        assert (maps.activation.std(axis=(1, 2)) > 0).all()


@pytest.mark.long
def test_a_map_of_half_precision_averages_to_the_logit():
    name, overrides = SMALL["preact"]
    model, variables, images = network(name, {**overrides, "dtype": jnp.bfloat16})
    maps = class_maps.measure(model, variables, batches(images))
    np.testing.assert_allclose(
        maps.activation.mean(axis=(1, 2)), maps.logits.max(axis=1), rtol=1e-2
    )


@pytest.mark.long
def test_grad_cam_of_the_last_map_is_the_positive_part_of_the_class_activation_map():
    model, variables, images = network(*SMALL["resnet"])
    maps = class_maps.measure(model, variables, batches(images))
    bias = variables["params"]["head"]["bias"][maps.classes][:, None, None]
    expected = np.maximum(maps.activation - bias, 0) / maps.activation[0].size
    np.testing.assert_allclose(maps.gradient, expected, atol=1e-6)
    assert (expected > 0).any()
    same = class_maps.measure(model, variables, batches(images), "stage4")
    np.testing.assert_array_equal(same.gradient, maps.gradient)


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "stage", "behind"),
    [
        ("resnet", "stage3", "stage4_block1"),
        ("preact", "stage4", "norm"),
        ("densenet", "block2", "transition2"),
    ],
)
@pytest.mark.parametrize("chosen", [False, True])
def test_grad_cam_of_a_stage(name, stage, behind, chosen):
    """The map comes from the network's features, the gradient of what is put in its place."""
    model, variables, images = network(*SMALL[name])
    apply = jax.jit(lambda v, x: model.apply(v, x, train=False, features=True))
    features = apply(variables, images)[stage]
    found = logits(model, variables, images)
    label = int(found.mean(axis=0).argmin()) if chosen else None
    classes = np.full(len(found), label) if chosen else found.argmax(axis=1)

    @jax.jit
    def gradient(features):
        def score(features):
            call = taps.edited(
                lambda v, x: model.apply(v, x, train=False),
                lambda module, method: (
                    behind if method == "__call__" and module.path == (behind,) else None
                ),
                lambda _, method, __, *rest: method(features, *rest),
            )
            return jnp.sum(call(variables, images)[jnp.arange(len(classes)), classes])

        return jax.grad(score)(features)

    weights = np.asarray(gradient(features)).mean(axis=(1, 2))
    expected = np.maximum(np.einsum("nhwc,nc->nhw", features, weights), 0)
    assert expected.max() > 0
    maps = class_maps.measure(model, variables, batches(images), stage, label)
    np.testing.assert_allclose(maps.gradient, expected, rtol=1e-3, atol=1e-3 * expected.max())


@pytest.mark.long
def test_the_maps_of_another_class():
    """Of the last map, both are sums weighted by that class's column."""
    model, variables, images = network(*SMALL["resnet"])
    all_logits = logits(model, variables, images)
    label = int(all_logits.mean(axis=0).argmin())
    assert label not in all_logits.argmax(axis=1)
    wanted = all_logits[:, label]
    maps = class_maps.measure(model, variables, batches(images), label=label)
    assert set(maps.classes) == {label}
    np.testing.assert_allclose(maps.activation.mean(axis=(1, 2)), wanted, rtol=1e-4, atol=1e-5)
    head = variables["params"]["head"]
    features = model.apply(variables, images, train=False, features=True)["stage4"]
    expected = np.einsum("nhwc,c->nhw", features, head["kernel"][:, label]) / 16
    np.testing.assert_allclose(maps.gradient, np.maximum(expected, 0), rtol=1e-4, atol=1e-5)


def test_a_class_goes_by_name_or_number():
    one = subject.untrained("cifar_resnet20", {}, images=2, size=16)
    names = one.description.label_names
    # A figure has the name of its class in no form that could be read.
    assert cam._label(None, one) is None
    assert cam._label(names[4], one) == cam._label("4", one) == 4
    for text in ("10", "-1", "nothing"):
        with pytest.raises(ValueError, match=f"--label '{text}' is not one of {names[0]}, "):
            cam._label(text, one)


@pytest.mark.long
@pytest.mark.parametrize("fc_units", [8, 16])
def test_a_network_without_global_pooling_is_refused(fc_units):
    """Also where the last map has as many channels, 16, as are classified."""
    overrides = {"num_filters": 2, "fc_units": fc_units}
    model, variables, images = network("vgg11", overrides, size=32)
    with pytest.raises(NothingError, match=r"no global average pooling.*resnet"):
        class_maps.measure(model, variables, batches(images))


@pytest.mark.long
def test_an_unknown_stage_is_answered_with_the_stages():
    model, variables, images = network(*SMALL["nin"])
    with pytest.raises(ValueError, match="stage3 is not one of block1, block2, block3"):
        class_maps.measure(model, variables, batches(images), "stage3")


def test_a_row_has_the_probability_and_the_peak_in_pixels():
    one = subject.untrained("cifar_resnet20", {}, images=2, size=16)
    first = np.zeros((2, 2, 2), np.float32)
    first[0, 0, 1] = first[1, 1, 0] = 3.0
    maps = Maps(np.log([[1.0, 3.0], [4.0, 1.0]]), np.array([1, 0]), first, first)
    rows = cam.summary(one, maps)
    assert [row["probability"] for row in rows] == pytest.approx([0.75, 0.8])
    assert [row["mean"] for row in rows] == [0.75, 0.75]
    assert [(row["row"], row["column"]) for row in rows] == [(4, 12), (12, 4)]
    names = one.description.label_names
    assert [row["label"] for row in rows] == [names[label] for label in one.labels]
    assert [row["predicted"] for row in rows] == [names[1], names[0]]
    other = cam.summary(one, maps._replace(classes=np.array([0, 0])))
    assert [row["probability"] for row in other] == pytest.approx([0.25, 0.8])
    assert [row["predicted"] for row in other] == [names[1], names[0]]
    assert {row["class"] for row in other} == {names[0]}


@pytest.mark.parametrize(("number", "channels"), [(1, 3), (3, 1)])
def test_the_figure_shows_each_image_and_its_maps(number, channels):
    images = np.arange(number * 64 * channels, dtype=np.uint8).reshape(number, 8, 8, channels)
    maps = {"a": np.ones((number, 2, 2)), "b": np.arange(4.0 * number).reshape(number, 2, 2)}
    figure = overlays.draw(images, maps, [f"title {i}" for i in range(number)])
    panels = [axes for axes in figure.axes if axes.images]
    assert len(panels) == 3 * number
    assert [len(axes.images) for axes in panels[:3]] == [1, 2, 2]
    assert {axes.get_title() for axes in panels} == {"", *(f"title {i}" for i in range(number))}
    np.testing.assert_array_equal(panels[2].images[1].get_array(), maps["b"][0])


@pytest.mark.long
def test_the_command_maps_images_of_another_size(tmp_path, capsys):
    command = ["cam", "--model", "cifar_resnet20", "--set", "depth=8", "--set", "num_filters=4"]
    command += ["--size", "16", "--images", "3", "--out", str(tmp_path)]
    assert analyze.main([*command, "--scale", "1.5", "--stage", "stage2"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "class activation maps of 6 x 6" in text
    assert "Grad-CAM of 24 x 24, at stage2" in text
    rows = list(csv.DictReader((tmp_path / "cam.csv").read_text().splitlines()))
    assert len(rows) == 3
    for row in rows:
        assert float(row["mean"]) == pytest.approx(float(row["logit"]), rel=1e-5)
    assert (tmp_path / "cam.png").stat().st_size > 10_000


@pytest.mark.long
def test_the_command_names_networks_that_have_maps(capsys):
    command = ["cam", "--model", "vgg11", "--set", "num_filters=2", "--set", "fc_units=8"]
    with pytest.raises(SystemExit) as stopped:
        analyze.main([*command, "--size", "32", "--images", "2"])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: vgg11 num_filters=2, fc_units=8 has no global average pooling")
    assert error.count("\n") == 1
    assert "densenet" in error
