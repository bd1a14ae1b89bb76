"""Weights of torchvision's and timm's networks: equal logits, losses, statistics; refusals."""

import argparse
import contextlib
import csv
import functools
import importlib.util
import pathlib
import pickle
import re
import shlex
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import resflax

# The continuous integration installs torch; then a missing torchvision or timm is an error.
if importlib.util.find_spec("torch") is None:
    pytest.skip("torch is not installed", allow_module_level=True)

import safetensors.torch
import torch

from benchmarks import parity
from resflax.interop import peers, state_dict
from resflax.models import layers
from resflax.models.gates import GatherExcite
from resflax.models.shortcuts import PooledProjection

models = peers.load("torchvision").models
timm = peers.load("timm")

# Two blocks a stage are seen in the slow tests; one of each is enough to see every kind of layer.
SHALLOW = (1, 1, 1, 1)


def torchvision_resnext():
    return models.resnet.ResNet(
        models.resnet.Bottleneck, SHALLOW, num_classes=5, groups=32, width_per_group=4
    )


def torchvision_basic():
    return models.resnet.ResNet(models.resnet.BasicBlock, SHALLOW, num_classes=5)


def shallow_timm(name):
    return timm.create_model(name, layers=SHALLOW, num_classes=5, drop_rate=0.0)


def narrow_classifier(network, features):
    """Makes a network lighter: 32 units instead of 4096 in the hidden dense layers."""
    dense = [m for m in network.classifier if isinstance(m, torch.nn.Linear)]
    for layer, (fan_in, units) in zip(dense, [(features, 32), (32, 32), (32, 5)], strict=True):
        layer.weight = torch.nn.Parameter(torch.zeros(units, fan_in))
        layer.bias = torch.nn.Parameter(torch.zeros(units))
    return network


NARROW_VGG = [8, "M", 16, "M", 32, 32, "M", 64, 64, "M", 64, 64, "M"]


def torchvision_vgg():
    features = models.vgg.make_layers(NARROW_VGG, batch_norm=True)
    return narrow_classifier(models.vgg.VGG(features, num_classes=5, dropout=0.0), 64 * 49)


def timm_vgg():
    return timm.models.vgg.VGG(NARROW_VGG, num_classes=5)


def torchvision_alexnet():
    return narrow_classifier(models.alexnet(num_classes=5), 256 * 36)


def torchvision_googlenet():
    return models.googlenet(num_classes=5, init_weights=False, dropout=0.0, dropout_aux=0.0)


def timm_inception_v4():
    network = timm.create_model("inception_v4", num_classes=5)
    kept = [*range(7), 10, 11, 18, 19]
    network.features = torch.nn.Sequential(*(network.features[i] for i in kept))
    return network


def timm_inception_resnet_v2():
    network = timm.create_model("inception_resnet_v2", num_classes=5)
    for name in ("repeat", "repeat_1", "repeat_2"):
        setattr(network, name, getattr(network, name)[:1])
    return network


# By a name: the library's network, ours, its arguments, and image sizes. fc6 of the VGGs sees maps
# of 3x3 and 8x8 positions.
NETWORKS = {
    "torchvision resnext": (torchvision_resnext, "resnext50_32x4d", {"depth": 14}, (64, 97)),
    "torchvision basic": (torchvision_basic, "resnet18", {"depth": 10}, (64, 97)),
    "timm se": (lambda: shallow_timm("seresnet18"), "se_resnet18", {"depth": 10}, (64, 97)),
    "timm gn": (lambda: shallow_timm("resnet50_gn"), "resnet50", {"depth": 14}, (64, 97)),
    "timm deep": (lambda: shallow_timm("senet154"), "senet154", {"depth": 14}, (97,)),
    "legacy": (lambda: shallow_timm("legacy_seresnet50"), "se_resnet50", {"depth": 14}, (64, 97)),
    "legacy basic": (
        lambda: shallow_timm("legacy_seresnet18"),
        "se_resnet18",
        {"depth": 10},
        (64, 97),
    ),
    "legacy grouped": (
        lambda: shallow_timm("legacy_seresnext50_32x4d"),
        "se_resnext50_32x4d",
        {"depth": 14},
        (97,),
    ),
    "legacy deep": (lambda: shallow_timm("legacy_senet154"), "senet154", {"depth": 14}, (64,)),
    "v2": (lambda: shallow_timm("resnetv2_50"), "preact_resnet50", {"depth": 14}, (64, 97)),
    "densenet": (lambda: models.densenet121(num_classes=5), "densenet121", {}, (65,)),
    "torchvision vgg": (
        torchvision_vgg,
        "vgg11_bn",
        {"num_filters": 8, "fc_units": 32},
        (96, 257),
    ),
    "timm vgg": (timm_vgg, "vgg11", {"num_filters": 8}, (96, 257)),
    "alexnet": (torchvision_alexnet, "alexnet_owt", {"fc_units": 32}, (96, 225)),
    "googlenet": (torchvision_googlenet, "googlenet_bn", {}, (64, 97)),
    "inception v3": (
        lambda: timm.create_model("inception_v3", num_classes=5),
        "inception_v3",
        {},
        (107,),
    ),
    "inception v4": (timm_inception_v4, "inception_v4", {"stage_sizes": (1, 1, 1)}, (96, 107)),
    "inception resnet v2": (
        timm_inception_resnet_v2,
        "inception_resnet_v2",
        {"stage_sizes": (1, 1, 2)},
        (96, 107),
    ),
}


# Few are kept at a time: some are large.
@functools.lru_cache(maxsize=3)
def converted(network):
    """The library's network with random weights, and ours with the same."""
    build, name, overrides, _ = NETWORKS[network]
    peer = peers.fill(build())
    return peer, *resflax.from_torch(name, peer.state_dict(), **overrides)


def state_of(network):
    """A copy of the library's weights, to change."""
    return {k: v.clone() for k, v in converted(network)[0].state_dict().items()}


def equal(tree, other):
    """Whether two trees of arrays are the same bit for bit."""
    return jax.tree.all(jax.tree.map(np.array_equal, tree, other))


# Layouts that others are of too.
SLOW = {"timm deep", "legacy grouped", "legacy deep"}


def slow_if(slow, *values):
    return pytest.param(*values, marks=[pytest.mark.slow] if slow else [])


@pytest.fixture(scope="module", params=[slow_if(name in SLOW, name) for name in NETWORKS])
def network(request):
    """A name; the tests of one network follow one another, so that it is built once."""
    return request.param


def test_logits(network):
    peer, model, variables = converted(network)
    assert model.num_classes == 5  # as in the weights
    for image_size in NETWORKS[network][3]:
        assert parity.difference(model, variables, peer, image_size) < 3e-5, image_size


def test_logits_differ_from_image_to_image(network):
    """Else equal logits would say little: those of a network that gives out its last bias."""
    size = NETWORKS[network][3][0]
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        first, second = converted(network)[0](images)
    assert (first - second).abs().max() > 0.03 * first.abs().max()


def test_round_trip_is_bit_exact(network):
    peer, model, variables = converted(network)
    _, name, overrides, _ = NETWORKS[network]
    state = resflax.to_torch(model, variables)
    peer.load_state_dict(state)  # strict: raises where a name or shape differs
    for key, value in peer.state_dict().items():
        assert state[key].dtype == value.dtype
        assert torch.equal(state[key], value)
    again, read = resflax.from_torch(name, state, **overrides)
    assert again == model
    assert equal(read, variables)


def torch_step(peer, images, labels):
    """Loss, gradients, statistics after a step, and what the auxiliary classifiers give out.

    The running variances are those of a network that averages biased variances, sum / n, as ours
    does: the share that this batch has in them is taken times (n - 1) / n, n of each layer.
    """
    pixels = {}
    hooks = [
        module.register_forward_hook(
            lambda m, inputs, _, name=name: pixels.update({name: inputs[0][:, 0].numel()})
        )
        for name, module in peer.named_modules()
        if isinstance(module, torch.nn.BatchNorm2d)
    ]
    before = {k: v.clone() for k, v in peer.state_dict().items()}
    outputs = peer.train()(images)
    logits = outputs if isinstance(outputs, torch.Tensor) else outputs.logits
    aux = [] if logits is outputs else [outputs.aux_logits1, outputs.aux_logits2]
    loss = torch.nn.functional.cross_entropy(logits, labels)
    loss.backward()
    after = {k: v.clone() for k, v in peer.state_dict().items()}
    for name, n in pixels.items():
        key = f"{name}.running_var"
        old = 0.9 * before[key]
        after[key] = old + (after[key] - old) * (n - 1) / n
    gradients = {k: p.grad for k, p in peer.named_parameters() if p.grad is not None}
    peer.load_state_dict(before)
    peer.zero_grad(set_to_none=True)
    peer.eval()
    for hook in hooks:
        hook.remove()
    return loss.item(), gradients, after, [a.detach().numpy() for a in aux]


def our_step(model, variables, images, labels):
    def loss_fn(params):
        logits, updates = model.apply(
            {**variables, "params": params},
            images,
            train=True,
            mutable=["batch_stats", "intermediates"],
        )
        log_probabilities = jax.nn.log_softmax(logits)
        picked = jnp.take_along_axis(log_probabilities, labels.reshape(-1, 1), axis=1)
        return -picked.mean(), updates

    gradient = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
    (loss, updates), gradients = gradient(variables["params"])
    return loss, gradients, updates


@pytest.mark.parametrize(
    ("network", "image_size", "kinks"),
    [
        ("torchvision basic", 97, 0.02),
        slow_if(True, "timm se", 97, 0.02),
        slow_if(True, "legacy", 97, 0.02),
        ("v2", 97, 0.02),
        ("torchvision vgg", 97, 0.02),
        ("googlenet", 97, 0.02),
        slow_if(True, "inception resnet v2", 139, 0.04),
    ],
)
def test_a_step_of_training(network, image_size, kinks):
    """Where rounding decides on which side of a ReLU's kink an activation lies, a gradient jumps.

    Torch's own gradients of the Inception-ResNet in single and in double precision differ by up to
    0.032 of a parameter's, over five draws of the images.
    """
    peer, model, variables = converted(network)
    model = model.clone(dropout=0.0)
    rng = np.random.default_rng(0)
    images = rng.normal(size=(4, image_size, image_size, 3)).astype(np.float32)
    labels = np.array([0, 1, 4, 2])
    loss, gradients, statistics, aux = torch_step(
        peer, torch.from_numpy(images.transpose(0, 3, 1, 2).copy()), torch.from_numpy(labels)
    )
    if aux:
        model = model.clone(aux_dropout=0.0)
    our_loss, our_gradients, updates = our_step(model, variables, images, labels)

    assert our_loss == pytest.approx(loss, rel=1e-5)
    ours = resflax.to_torch(model, {**variables, "batch_stats": updates["batch_stats"]})
    running = [key for key in statistics if "running" in key]
    assert running
    for key in running:
        wanted = statistics[key].numpy()
        # Heads that only training has are not in the loss, but their statistics move.
        assert np.abs(ours[key].numpy() - wanted).max() < 1e-4 * np.abs(wanted).max(), key
    in_torch = resflax.to_torch(model, {**variables, "params": our_gradients})
    most = max(gradient.norm() for gradient in gradients.values())
    for key, wanted in gradients.items():
        assert (in_torch[key] - wanted).norm() < kinks * wanted.norm() + 1e-5 * most, key
    if aux:
        found = updates["intermediates"]["aux_logits"]
        for ours_aux, theirs in zip(found, aux, strict=True):
            np.testing.assert_allclose(ours_aux, theirs, rtol=0, atol=5e-5 * np.abs(theirs).max())


def test_what_the_library_does_otherwise():
    """The arguments that the weights of each layout bring along."""
    fields = {
        network: {
            field: getattr(converted(network)[1], field)
            for field in ("stem_pool", "stride_in", "se_divisor", "unit", "norm", "first_act")
        }
        for network in ("timm se", "timm gn", "legacy", "legacy basic", "v2")
    }
    common = {
        "stem_pool": "symmetric",
        "stride_in": "3x3",
        "se_divisor": 1,
        "unit": "original",
        "norm": "batch",
        "first_act": "stem",
    }
    differences = {
        network: {k: v for k, v in chosen.items() if v != common[k]}
        for network, chosen in fields.items()
    }
    assert differences == {
        "timm se": {"se_divisor": 8},
        "timm gn": {"norm": "group"},
        "legacy": {"stem_pool": "ceil", "stride_in": "1x1"},
        "legacy basic": {"stem_pool": "ceil", "unit": "relu_around_addition"},
        "v2": {"unit": "full_preact", "first_act": "block"},
    }


def test_arguments_given_win():
    state = state_of("torchvision basic")
    model, _ = resflax.from_torch("resnet18", state, depth=10, stem_pool="ceil", dtype=jnp.bfloat16)
    assert (model.stem_pool, model.dtype) == ("ceil", jnp.bfloat16)


def test_names_of_published_densenets():
    """The files on torchvision's server are older than its names."""
    state = state_of("densenet")
    old = {
        key.replace("norm1.", "norm.1.")
        .replace("norm2.", "norm.2.")
        .replace("conv1.", "conv.1.")
        .replace("conv2.", "conv.2.")
        if "denselayer" in key
        else key: value
        for key, value in state.items()
    }
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    _, variables = resflax.from_torch("densenet121", old)
    assert equal(variables, converted("densenet")[2])


def test_gray_images():
    peer = peers.build("timm", "resnet18", layers=SHALLOW, num_classes=5, in_chans=1)
    model, variables = resflax.from_torch("resnet18", peer.state_dict(), depth=10)
    assert variables["params"]["stem"]["conv"]["kernel"].shape == (7, 7, 1, 64)
    assert set(resflax.to_torch(model, variables)) == set(peer.state_dict())


def test_arrays_are_copied_and_float32():
    state = {k: v.half() if v.is_floating_point() else v for k, v in state_of("timm se").items()}
    _, variables = resflax.from_torch("se_resnet18", state, depth=10)
    bias = variables["params"]["head"]["bias"]
    before = np.array(bias)
    state["fc.bias"] += 1
    assert bias.dtype == jnp.float32
    np.testing.assert_array_equal(bias, before)


@pytest.fixture
def state():
    return state_of("timm se")


def read(source, **arguments):
    return resflax.from_torch("se_resnet18", source, depth=10, **arguments)


def test_files(state, tmp_path):
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    torch.save(state, tmp_path / "model.pth")
    for source, arguments in [
        (tmp_path / "model.safetensors", {}),
        (str(tmp_path / "model.safetensors"), {}),
        (tmp_path / "model.pth", {"allow_pickle": True}),
        ({k: v.numpy() for k, v in state.items()}, {}),
    ]:
        _, variables = read(source, **arguments)
        assert equal(variables, converted("timm se")[2])


def test_safetensors_need_no_torch(state, tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(state, path)
    code = (
        "import sys, resflax; assert 'resflax.interop' not in sys.modules; "
        f"resflax.from_torch('se_resnet18', {str(path)!r}, depth=10); "
        "assert not {'torch', 'torchvision', 'timm'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_refuses_arrays_that_do_not_fit(state):
    del state["layer1.0.bn1.bias"], state["layer2.0.bn1.bias"]
    state["layer9.0.bn1.bias"] = torch.zeros(3)
    state["fc.weight"] = state["fc.weight"].T.contiguous()
    with pytest.raises(ValueError, match="do not fit") as error:
        read(state, num_classes=5)
    message = str(error.value)
    assert "\n" not in message
    assert "2 missing: layer1.0.bn1.bias [64], layer2.0.bn1.bias [128]" in message
    assert "1 unexpected: layer9.0.bn1.bias [3]" in message
    assert "1 of another shape: fc.weight [512, 5] where [5, 512] is expected" in message


def test_refuses_another_number_of_classes(state):
    with pytest.raises(ValueError, match=r"fc.weight \[5, 512\] where \[1000, 512\]"):
        read(state, num_classes=1000)


def test_refuses_weights_of_another_network(state):
    with pytest.raises(ValueError, match=r"unexpected: layer1.0.se.fc1.weight"):
        resflax.from_torch("resnet18", state, depth=10)
    with pytest.raises(ValueError, match="no layout known for vgg11"):
        resflax.from_torch("vgg11", state)
    with pytest.raises(ValueError, match="BNInception has no weights of PyTorch's"):
        resflax.from_torch("bn_inception", state)
    # A ResNet v1 is not read as a v2, nor as a plain net.
    with pytest.raises(ValueError, match="no place for"):
        resflax.from_torch("preact_resnet18", state_of("torchvision basic"), depth=10)
    with pytest.raises(ValueError, match=r"unexpected: layer2.0.downsample"):
        resflax.from_torch("plain18", state_of("torchvision basic"), depth=10)


def test_refuses_a_mapping_of_other_things(state):
    with pytest.raises(ValueError, match="'weights' is a dict, not an array"):
        read({"weights": state, "epoch": 3})


def wrappings(state):
    """What training saves around a state_dict."""
    other = {key: torch.zeros_like(value) for key, value in state.items()}
    module = {f"module.{key}": value for key, value in state.items()}
    return {
        "DistributedDataParallel": module,
        "torch.compile inside of it": {f"module._orig_mod.{k}": v for k, v in state.items()},
        "timm": {
            "epoch": 3,
            "arch": "resnet18",
            "args": argparse.Namespace(lr=0.1),
            "state_dict": module,
            "optimizer": {"state": {0: {"step": 1}}, "param_groups": [{"params": [0]}]},
        },
        "torchvision": {"model": state, "model_ema": None, "epoch": 3, "args": {}},
        "Lightning": {"state_dict": {f"model.{k}": v for k, v in state.items()}, "epoch": 3},
        "timm with an average": {"state_dict": other, "state_dict_ema": state},
        "torchvision with an average": {
            "model": other,
            "model_ema": {"n_averaged": torch.tensor(5), **module},
        },
        "names": {f"state_dict.{key}": value for key, value in state.items()},
        "names of an average": {
            **{f"model.{key}": value for key, value in other.items()},
            **{f"model_ema.{key}": value for key, value in state.items()},
        },
    }


@pytest.mark.parametrize("kind", list(wrappings({})))
def test_weights_are_taken_out_of_what_training_saves(state, kind, tmp_path):
    torch.save(wrappings(state)[kind], tmp_path / "model.pth.tar")
    averaged = pytest.warns(UserWarning, match=r"are there as '(\w+_ema)' and as .*: '\1' is read")
    with averaged if "average" in kind else contextlib.nullcontext():
        found = state_dict.arrays(tmp_path / "model.pth.tar", allow_pickle=True)
    assert found.keys() == state.keys()
    assert all(np.array_equal(found[key], value) for key, value in state.items())


def test_words_that_are_not_before_all_names_stay(state):
    state["module.other"] = torch.zeros(2)
    with pytest.raises(ValueError, match=r"1 unexpected: module.other \[2\]"):
        read(state)


HEADLESS = {
    "timm": (lambda: shallow_timm("resnet18"), "resnet18", {"depth": 10}, ("fc",)),
    "legacy": (
        lambda: shallow_timm("legacy_seresnet18"),
        "se_resnet18",
        {"depth": 10},
        ("last_linear",),
    ),
    "v2": (lambda: shallow_timm("resnetv2_50"), "preact_resnet50", {"depth": 14}, ("head.fc",)),
    "densenet": (
        lambda: timm.create_model("densenet121", num_classes=5),
        "densenet121",
        {},
        ("classifier",),
    ),
}


@pytest.mark.parametrize("kind", [slow_if(kind != "timm", kind) for kind in HEADLESS])
def test_weights_without_a_classifier_get_a_new_one_on_demand(kind):
    build, name, overrides, (head,) = HEADLESS[kind]
    network = build()
    whole = network.state_dict()
    network.reset_classifier(0)  # as num_classes=0
    backbone = network.state_dict()
    assert whole.keys() - backbone.keys() == {f"{head}.weight", f"{head}.bias"}
    with pytest.raises(ValueError, match=r"the mapping has no classifier .* with num_classes,"):
        resflax.from_torch(name, backbone, **overrides)
    model, variables = resflax.from_torch(name, backbone, 3, **overrides)
    assert model.num_classes == 3
    _, expected = resflax.from_torch(name, whole, **overrides)
    new, old = variables["params"].pop("head"), expected["params"].pop("head")
    assert equal(variables, expected)
    assert new["kernel"].shape == (old["kernel"].shape[0], 3)
    assert 0 < np.abs(new["kernel"]).max() <= old["kernel"].shape[0] ** -0.5
    # What else is wrong is not hidden by it.
    del backbone[next(key for key in backbone if key.endswith("running_var"))]
    with pytest.raises(ValueError, match=rf"3 missing: .*{head}.bias"):
        resflax.from_torch(name, backbone, **overrides)


def without(package, code):
    """The errors of a process in which a package is not installed."""
    code = f"import sys; sys.modules[{package!r}] = None; import resflax; {code}"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return run.stderr.splitlines()[-1]


@pytest.mark.long
def test_without_torch_a_line_says_how_to_get_it(state, tmp_path):
    torch.save(state, tmp_path / "model.pth")
    read = f"resflax.from_torch('resnet18', {str(tmp_path / 'model.pth')!r}, allow_pickle=True)"
    assert without("torch", read).endswith("is read by torch: pip install 'resflax[torch]'.")
    write = "resflax.to_torch(resflax.create_model('resnet18'), {})"
    assert without("torch", write) == (
        "resflax.errors.UserError: to_torch gives tensors of torch, which is not installed: "
        "pip install 'resflax[torch]'."
    )


@pytest.mark.long
def test_the_command_that_a_refusal_names_converts_the_file(state, tmp_path):
    path = tmp_path / "it's a model.pth.tar"
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 3}, path)
    with pytest.raises(ValueError, match="is a pickle") as error:
        read(path)
    command = re.search(r": (python -c .*) \(or pass", str(error.value))[1]
    program, *arguments = shlex.split(command)
    assert program == "python"
    subprocess.run([sys.executable, *arguments], check=True)
    _, variables = read(tmp_path / "it's a model.pth.safetensors")
    assert equal(variables, converted("timm se")[2])


def test_refuses_files(state, tmp_path):
    whole = tmp_path / "whole.safetensors"
    safetensors.torch.save_file(state, whole)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(whole.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"no whole .safetensors file"):
        read(cut)

    torch.save(state, tmp_path / "model.pth")
    with pytest.raises(ValueError, match=r"is a pickle.*allow_pickle=True"):
        read(tmp_path / "model.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "model.pth").read_bytes()[:-1000])
    with pytest.raises(ValueError, match="no whole file of weights"):
        read(tmp_path / "cut.pth", allow_pickle=True)

    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    with pytest.raises(ValueError, match="holds a Tensor, not a mapping"):
        read(tmp_path / "tensor.pth", allow_pickle=True)

    with pytest.raises(ValueError, match="must be a file"):
        read(tmp_path / "model.h5")
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "absent.pth", allow_pickle=True)


class Malice:
    """Touches a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


@pytest.mark.parametrize("save", [torch.save, lambda obj, p: p.write_bytes(pickle.dumps(obj, 2))])
def test_refuses_pickles_that_run_code(save, state, tmp_path):
    touched, path = tmp_path / "touched", tmp_path / "model.pth"
    save({**state, "fc.bias": Malice(touched)}, path)
    with pytest.raises(ValueError, match="no whole file of weights alone"):
        read(path, allow_pickle=True)
    assert not touched.exists()


def test_refuses_pickles_with_an_old_torch(state, tmp_path, monkeypatch):
    torch.save(state, tmp_path / "model.pth")
    monkeypatch.setattr(torch, "__version__", "2.5.1+cpu")
    with pytest.raises(ValueError, match=r"torch 2.5.1.*install 2.6 or later"):
        read(tmp_path / "model.pth", allow_pickle=True)


def test_refuses_to_write_what_the_library_does_not_compute():
    _, model, variables = converted("legacy")
    with pytest.raises(ValueError, match=r"timm: stem_pool 'ceil' is 'symmetric' there, stride_in"):
        resflax.to_torch(model, variables, "timm")
    with pytest.raises(ValueError, match="se_reduction 16 is 0 there"):
        resflax.to_torch(model, variables, "torchvision")
    with pytest.raises(ValueError, match="library 'keras' is not one of 'torchvision', 'timm'"):
        resflax.to_torch(model, variables, "keras")
    with pytest.raises(ValueError, match="act 'tanh' is 'relu' there"):
        resflax.to_torch(model.clone(act="tanh"), variables)
    with pytest.raises(ValueError, match=r"bn_epsilon 0.001 is 1e-05 there"):
        resflax.to_torch(model.clone(bn_epsilon=1e-3), variables)


def test_refuses_to_write_variables_of_another_network():
    _, model, _ = converted("legacy")
    with pytest.raises(ValueError, match="the variables do not fit the network"):
        resflax.to_torch(model, converted("timm se")[2])


def test_writes_the_layout_asked_for():
    """timm's VGG computes the same as torchvision's only with dense evaluation."""
    _, model, variables = converted("torchvision vgg")
    with pytest.raises(ValueError, match="dense_evaluation False is True there"):
        resflax.to_torch(model, variables, "timm")
    state = resflax.to_torch(model.clone(dense_evaluation=True), variables, "timm")
    assert state["pre_logits.fc1.weight"].shape == (32, 64, 7, 7)
    _, read = resflax.from_torch("vgg11_bn", state, num_filters=8, fc_units=32)
    assert equal(read, variables)


@pytest.mark.parametrize("extent", [0, 2, 4])
def test_gather_excite_is_that_of_timm(extent):
    peer = timm.layers.GatherExcite(8, extent=extent, use_mlp=False)
    x = np.random.default_rng(0).normal(size=(2, 5, 6, 8)).astype(np.float32)
    gate = GatherExcite(layers.Conv, layers.BatchNorm, jax.nn.relu, extent)
    expected = peer(torch.from_numpy(x.transpose(0, 3, 1, 2))).numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(gate.apply({}, x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stride", [1, 2])
def test_shortcut_d_is_that_of_timm(stride):
    _, conv, norm = peer = timm.models.resnet.downsample_avg(4, 8, 1, stride=stride).eval()
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5, 6, 4)).astype(np.float32)
    kernel = rng.normal(size=(1, 1, 4, 8)).astype(np.float32)
    scale, bias, mean, var = rng.uniform(0.5, 1.5, (4, 8)).astype(np.float32)
    with torch.no_grad():
        conv.weight.copy_(torch.from_numpy(kernel.transpose(3, 2, 0, 1)))
        state = {"weight": scale, "bias": bias, "running_mean": mean, "running_var": var}
        norm.load_state_dict({k: torch.from_numpy(v) for k, v in state.items()}, strict=False)
        expected = peer(torch.from_numpy(x.transpose(0, 3, 1, 2))).numpy().transpose(0, 2, 3, 1)
    evaluated = functools.partial(layers.BatchNorm, use_running_average=True, computed=True)
    shortcut = PooledProjection(8, 1, stride, layers.Conv, evaluated)
    variables = {
        "params": {"conv": {"kernel": kernel}, "norm": {"scale": scale, "bias": bias}},
        "batch_stats": {"norm": {"mean": mean, "var": var}},
    }
    np.testing.assert_allclose(shortcut.apply(variables, x), expected, rtol=1e-4, atol=1e-5)


def test_parity_table(tmp_path, monkeypatch, capsys):
    case = parity.Case(
        "timm", "resnet18", "resnet18", {"depth": 10}, {"layers": SHALLOW}, image_sizes=(64,)
    )
    monkeypatch.setattr(parity, "cases", lambda: [case])
    path = tmp_path / "results" / "parity.csv"
    assert parity.main(["resnet*", "--output", str(path)]) == 0
    assert "1e-04 is tolerated" in capsys.readouterr().out
    parity.main(["vgg*", "--output", str(path)])  # nothing to do, and nothing lost
    parity.main(["resnet18", "--output", str(path)])  # once more, in the same row
    (row,) = csv.DictReader(path.read_text().splitlines())
    assert row["overrides"] == '{"depth": 10}'
    assert (row["model"], row["library"], row["image_size"]) == ("resnet18", "timm", "64")
    assert float(row["difference"]) < 1e-5


def test_parity_fails_where_the_logits_differ(monkeypatch):
    wrong = parity.Case("timm", "resnet18", "resnet18", {"depth": 10, "stem_pool": "ceil"},
                        {"layers": SHALLOW}, image_sizes=(64,))  # fmt: skip
    monkeypatch.setattr(parity, "cases", lambda: [wrong])
    assert parity.main([]) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", list(parity.cases()), ids=lambda c: f"{c.library}-{c.peer}-{len(c.arguments)}"
)
def test_parity_of_every_network(case):
    for row in parity.compare(case):
        assert float(row["difference"]) < parity.TOLERANCE, row
