"""Tests of `python -m resflax.bench`: what is measured, never how fast it was."""

import functools
import importlib.util
import json
import math
import os

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import resflax
from resflax.bench import __main__ as command
from resflax.bench import capacity, ours, peers, report, roofline, rounds, stock
from resflax.bench.case import Case
from resflax.bench.rounds import Costs, Entry, Result
from resflax.process import runtime

HAS_TORCH = importlib.util.find_spec("torch") is not None
needs_torch = pytest.mark.skipif(not HAS_TORCH, reason="torch is not installed")

SMALL = ("--model", "cifar_resnet20", "--batch", "2", "--set", "depth=8", "--set", "num_filters=4")


def small(mode="train", name="cifar_resnext29_8x64d", batch=2, **overrides):
    narrow = {"depth": 11, "num_filters": 4, "cardinality": 2, "base_width": 32}
    if name == "cifar_resnet20":
        narrow = {"depth": 8, "num_filters": 4}
    model = resflax.create_model(name, **(narrow | overrides))
    return Case(name, model, 16, batch, mode)


@pytest.fixture(autouse=True)
def configured(monkeypatch):
    """What the command sets for its own process is undone after a test, or left out and noted."""
    calls = []
    monkeypatch.setattr(runtime, "configure", lambda: calls.append("configure"))
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    monkeypatch.setattr(command, "_peak_sizes", lambda: (64, 2**16))
    monkeypatch.setattr(report, "load", lambda: 0.0)
    cached = jax.config.jax_enable_compilation_cache
    yield calls
    jax.config.update("jax_enable_compilation_cache", cached)


# --- rounds --------------------------------------------------------------------------------------


class Recorded:
    """A contender that notes its turns."""

    def __init__(self, name, turns):
        self.name, self.turns = name, turns

    def run(self, steps):
        self.turns.append((self.name, steps))

    def costs(self):
        return Costs(memory={"peak": len(self.turns)})


def contest(names, turns, **settings):
    entries = [Entry(name, "", functools.partial(Recorded, name, turns)) for name in names]
    defaults = {"repeats": 3, "steps": 5, "max_seconds": math.inf, "tell": lambda text: None}
    return rounds.measure(entries, **(defaults | settings))


def test_contenders_take_turns_after_a_warm_up_each():
    turns = []
    results = contest("ab", turns)
    warm_ups = [(name, steps) for name in "ab" for steps in (1, rounds.WARM_UP)]
    assert turns == warm_ups + 3 * [("a", 5), ("b", 5)]
    assert [len(result.seconds) for result in results] == [3, 3]
    assert not any(result.single or result.failure for result in results)


def test_costs_are_asked_for_before_the_next_contender_is_built():
    first, second = contest("ab", [])
    assert (first.costs.memory["peak"], second.costs.memory["peak"]) == (2, 4)


def test_a_slow_contender_is_measured_once():
    turns = []
    (result,) = contest("a", turns, max_seconds=-1.0)
    assert turns == [("a", 1)]
    assert result.single
    assert len(result.seconds) == 1


def test_a_contender_that_fails_does_not_stop_the_others():
    def build():
        raise RuntimeError("out of memory\nin line 2")

    entries = [Entry("a", "", build), Entry("b", "", lambda: Recorded("b", []))]
    failed, ran = rounds.measure(
        entries, repeats=3, steps=1, max_seconds=math.inf, tell=lambda text: None
    )
    assert failed.failure == "out of memory"
    assert not failed.seconds
    assert len(ran.seconds) == 3


def test_ratio_is_of_the_rounds_not_of_the_medians():
    ours_, theirs = Result("a", "", [1.0, 2.0, 4.0]), Result("b", "", [4.0, 2.0, 12.0])
    assert rounds.ratio(ours_, theirs) == (3.0, 2.0, 3.5)


def test_ratio_of_a_single_measurement_has_no_spread():
    theirs = Result("b", "", [6.0], single=True)
    assert rounds.ratio(Result("a", "", [1.0, 2.0, 4.0]), theirs) == (3.0, None, None)


# --- roofline ------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("name", ["resnet18", "se_resnext50_32x4d", "densenet121", "vgg11"])
def test_roofline_has_the_multiply_adds_of_the_count(name):
    model = resflax.create_model(name)
    macs = resflax.count(model, (224, 224, 3)).macs
    passes = roofline.passes(Case(name, model, 224, 1, "inference"))
    assert sum(one.macs for one in passes) == macs
    training = [one.macs for one in roofline.passes(Case(name, model, 224, 1, "train")) if one.macs]
    # Three times each, but for the gradient of the images.
    assert sum(training) == 3 * macs - training[0]


def test_roofline_of_a_network_by_hand():
    case = small(name="cifar_resnet20", batch=3)
    a, b, c, d = 16 * 16 * 3, 16 * 16 * 4, 8 * 8 * 8, 4 * 4 * 16
    convolutions = [(a, b), (b, b), (b, b), (b, c), (c, c), (c, d), (d, d), (16, 10)]
    outputs, sums = [b, b, b, c, c, d, d], [b, c, d]
    forward = sum(read + written for read, written in convolutions)
    numbers = 3 * forward - (a + b) + 8 * sum(outputs) + 3 * sum(sums)
    params = resflax.count(case.model, case.image_shape).params
    kernels = params - 2 * (3 * 4 + 2 * 8 + 2 * 16) - 10
    weights = 3 * kernels - 3 * 3 * 3 * 4
    num_bytes = 4 * (3 * numbers + weights + 5 * params)
    only_memory = roofline.Peaks(flops=math.inf, bandwidth=1.0)
    assert roofline.bound(case, only_memory) == num_bytes


class Strided(nn.Module):
    """A shortcut with a layer of flax: option B without norms."""

    filters: int
    stride: int

    @nn.compact
    def __call__(self, x):
        step = (self.stride, self.stride)
        return nn.Conv(self.filters, (1, 1), step, use_bias=False, name="conv")(x)


def test_roofline_has_layers_of_flax():
    ours, theirs = (
        roofline.passes(small(name="cifar_resnet20", norm="none", shortcut=shortcut))
        for shortcut in ("B", Strided)
    )
    assert ours == theirs


@pytest.mark.long
def test_roofline_of_published_bottlenecks():
    """ResNet-50 in bfloat16: 333 MB an image, and 24.3 GFLOP where memory costs nothing."""
    case = Case("resnet50", resflax.create_model("resnet50", dtype=jnp.bfloat16), 224, 1, "train")
    num_bytes = sum(2 * one.activations for one in roofline.passes(case))
    assert num_bytes == pytest.approx(333e6, rel=0.003)
    only_arithmetic = roofline.Peaks(flops=1e9, bandwidth=math.inf)
    assert roofline.bound(case, only_arithmetic) == pytest.approx(24.3, rel=0.003)


@pytest.mark.long
def test_loops_and_recomputation_do_not_change_the_roofline():
    peaks = roofline.Peaks(1e9, 1e9)
    bounds = {
        roofline.bound(small(name="cifar_resnet20", depth=20, scan=scan, remat=remat), peaks)
        for scan, remat in ((0, False), (2, False), (0, True))
    }
    assert len(bounds) == 1


def test_peaks_are_measured():
    peaks = roofline.measure_peaks(jnp.dtype(jnp.float32), 64, 2**16)
    assert all(0 < value < math.inf for value in peaks)


# --- our step ------------------------------------------------------------------------------------

# A contender shows its times alone; what it did is in its state.


@pytest.mark.long
def test_the_training_step_trains_and_has_costs():
    contender = ours.Contender(small(name="cifar_resnet20"))
    before = jax.device_get(contender._state.params)
    contender.run(2)
    after = jax.device_get(contender._state.params)
    assert contender._state.step == 2
    changed = jax.tree.map(lambda x, y: bool(np.any(x != y)), before, after)
    assert all(jax.tree.leaves(changed))
    costs = contender.costs()
    # Parameters and momentum are arguments.
    assert costs.memory[ours.ANALYSIS] > 2 * sum(x.nbytes for x in jax.tree.leaves(after))
    assert costs.trace_seconds > 0
    assert costs.compile_seconds > 0


@pytest.mark.long
def test_the_inference_step_gives_out_logits_and_keeps_its_variables():
    case = small("inference", name="cifar_resnet20")
    contender = ours.Contender(case)
    contender.run(2)
    logits = contender._step(contender._state, contender._batch)
    assert logits.shape == (case.batch, case.model.num_classes)
    assert contender._state.step == 0


def test_images_are_random_and_the_same_for_all():
    first, second = small().examples(), small().examples()
    np.testing.assert_array_equal(first.images, second.images)
    np.testing.assert_array_equal(first.labels, second.labels)
    assert 0.8 < first.images.std() < 1.2


# --- the largest batch ---------------------------------------------------------------------------


@pytest.mark.parametrize("start", [1, 3, 16, 256])
def test_search_finds_the_largest_batch_to_a_sixteenth(start):
    for largest in (0, 1, 2, 5, 16, 31, 100, 255, 256, 257, 1000):
        tried = []

        def fits(batch, tried=tried, largest=largest):
            tried.append(batch)
            return batch <= largest

        found = capacity.search(fits, start)
        assert found <= largest <= found + found // 16
        assert len(tried) == len(set(tried))


@pytest.mark.long
def test_batches_of_a_cpu_are_compared_with_what_is_available(monkeypatch):
    case = small(name="cifar_resnet20", batch=1)
    step = ours.step_function(case).lower(*ours.abstract_arguments(case)).compile()
    monkeypatch.setattr(capacity, "available_bytes", lambda: ours.analysed_bytes(step))
    said = []
    assert capacity.largest_batch(case, said.append) == 1
    assert said[0].startswith("batch 1: ")
    assert said[0].endswith(", fits")
    assert said[1].endswith(", does not fit")


def test_batches_of_an_accelerator_are_tried(monkeypatch):
    class Limited:
        def __init__(self, case):
            if case.batch > 20:
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

        def run(self, steps):
            pass

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(ours, "Contender", Limited)
    said = []
    assert capacity.largest_batch(small(batch=8), said.append) == 20
    assert said[:3] == ["batch 8: runs", "batch 16: runs", "batch 32: does not fit"]


def test_other_errors_of_an_accelerator_are_raised(monkeypatch):
    def broken(case):
        raise jax.errors.JaxRuntimeError("INTERNAL: a kernel failed")

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(ours, "Contender", broken)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        capacity.largest_batch(small(), lambda text: None)


@pytest.mark.first(1)
@pytest.mark.parametrize(("after", "expected"), [(900, 800), (500, None)])
def test_peak_of_a_device_is_ours_only_if_it_is_the_highest(monkeypatch, after, expected):
    stats = iter([(100, 500), (100, after)])
    monkeypatch.setattr(ours, "_memory_stats", lambda: next(stats))
    contender = ours.Contender(small("inference", name="cifar_resnet20"))
    contender.run(1)
    assert contender.costs().memory.get(ours.PEAK) == expected


@pytest.mark.skipif(not os.path.exists("/proc/meminfo"), reason="needs Linux")
def test_available_memory():
    assert 2**20 < capacity.available_bytes() < 2**50


# --- peers ---------------------------------------------------------------------------------------


@pytest.mark.long
def test_stock_flax_computes_the_same():
    case = small(se_reduction=2, form="b", batch=4)
    init = jax.jit(functools.partial(case.plain.init, train=False))
    variables = init(jax.random.key(0), jnp.zeros((1, *case.image_shape)))
    images = jnp.asarray(case.examples().images)
    seen = []

    def note(call, args, kwargs, context):
        seen.append(type(context.module))
        return call(*args, **kwargs)

    def outputs(apply, params):
        logits, mutated = apply(
            {**variables, "params": params}, images, train=True, mutable=["batch_stats"]
        )
        return jnp.sum(jnp.sin(logits)), mutated

    stock_apply = stock.apply_fn(case.plain)
    found = []
    for apply in (case.plain.apply, stock_apply):
        step = jax.value_and_grad(functools.partial(outputs, apply), has_aux=True)
        found.append(jax.jit(step)(variables["params"]))
    with nn.intercept_methods(note):
        jax.eval_shape(functools.partial(stock_apply, train=False), variables, images)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-3, atol=2e-4), *found)
    assert seen.count(nn.Conv) == 1 + 3 * 3 + 3
    assert seen.count(nn.BatchNorm) == seen.count(nn.Conv)


@pytest.mark.long
def test_stock_flax_has_the_max_pool_of_lax():
    case = Case("resnet18", resflax.create_model("resnet18"), 64, 1, "train")
    stock_apply = stock.apply_fn(case.plain)

    def loss(apply, images, variables):
        logits, _ = apply(variables, images, train=True, mutable=["batch_stats"])
        return jnp.sum(logits)

    images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    trace = jax.make_jaxpr(jax.grad(functools.partial(loss, stock_apply)))
    assert "select_and_scatter_add" in str(trace(images, case.variables))


@needs_torch
@pytest.mark.parametrize(
    "case",
    [
        small(name="cifar_resnet20"),
        small(name="cifar_resnet20", shortcut="none"),
        small(name="cifar_resnet20", shortcut="B", se_reduction=2),
        small(se_reduction=2, stride_in="1x1"),
    ],
    ids=["A", "plain", "B-SE", "bottleneck"],
)
def test_twin_computes_the_same(case):
    import torch

    from resflax.bench.twin import Twin

    random = np.random.default_rng(1)
    variables = jax.tree.map(
        lambda leaf: random.uniform(0.1, 0.3, leaf.shape).astype(np.float32), case.variables
    )
    twin = Twin(case.model).eval()
    twin.load_state_dict(_torch_arrays(variables), strict=False)
    images = case.examples().images
    logits = jax.jit(functools.partial(case.plain.apply, train=False))(variables, images)
    with torch.no_grad():
        theirs = twin(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
    np.testing.assert_allclose(theirs, logits, rtol=1e-3, atol=1e-3 * np.abs(logits).max())


def _torch_arrays(variables):
    import torch

    names = {"kernel": "weight", "scale": "weight", "bias": "bias"}
    names |= {"mean": "running_mean", "var": "running_var"}
    arrays = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        *modules, name = (entry.key for entry in path[1:])
        array = np.asarray(leaf)
        if name == "kernel":
            array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
        arrays[".".join((*modules, names[name]))] = torch.from_numpy(array.copy())
    return arrays


@needs_torch
@pytest.mark.parametrize(
    ("peer", "name", "overrides", "message"),
    [
        ("torch", "cifar_preact_resnet110", {}, "unit='full_preact'"),
        ("torch", "cifar_resnet20", {"act": "silu"}, "act='silu'"),
        ("torch", "inception_v4", {}, "torchvision has no inception_v4"),
        ("timm", "cifar_resnet20", {}, "timm has no cifar_resnet20"),
        ("timm", "se_resnet18", {}, r"fc1.bias is \(4,\) here and \(8,\)"),
        ("timm", "resnet18", {"act": "silu"}, "act 'silu'"),
    ],
)
def test_peers_that_compute_something_else_are_refused(peer, name, overrides, message):
    case = Case(name, resflax.create_model(name, **overrides), *_usual(name))
    with pytest.raises(ValueError, match=message):
        peers.entries(case, peer, compiled=False)


def _usual(name):
    size = 32 if name.startswith("cifar") else 299 if "inception" in name else 224
    return size, 1, "train"


@needs_torch
@pytest.mark.parametrize(
    ("peer", "name"), [("timm", "resnet18"), ("torch", "resnet18"), ("torch", "cifar_resnet20")]
)
def test_peers_train(peer, name):
    case = Case(
        name,
        resflax.create_model(name, num_classes=7),
        64 if "cifar" not in name else 32,
        2,
        "train",
    )
    entries = peers.entries(case, peer, compiled=False)
    assert [entry.form for entry in entries] == ["channels_last", "contiguous"]
    contender = entries[0].build()
    before = [p.detach().clone() for p in contender._network.parameters()]
    contender.run(1)
    after = list(contender._network.parameters())
    assert sum(p.numel() for p in after) == resflax.count(case.model, case.image_shape).params
    assert after[-1].shape == (7,)
    assert all((b != a).any() for b, a in zip(before, after, strict=True))


# --- reports -------------------------------------------------------------------------------------


def measurement():
    results = [
        Result("resflax", "", [0.1, 0.2, 0.1], costs=Costs(1.0, 2.0, {"analysis": 2**20})),
        Result("timm", "contiguous", [0.4, 0.4, 0.4]),
        Result("timm", "channels_last", [0.2, 0.4, 0.2], costs=Costs(memory={"peak": 2**22})),
        Result("timm", "torch.compile", failure="no compiler"),
        Result("flax", "", [5.0], single=True),
    ]
    return report.Measurement(small(batch=10), 0.05, results)


def test_markdown_quotes_the_fastest_form():
    heading, _, row = report.markdown([measurement()])
    cells = dict(zip(heading.split(" | "), row.split(" | "), strict=True))
    assert cells["timm, images/s"] == "50.0 (channels_last)"
    assert cells["timm's time / ours"] == "2.00 [2.00, 2.00]"
    assert cells["flax's time / ours |"] == "50.00 (once) |"
    assert cells["images/s"] == "100.0"
    assert cells["of roofline"] == "50%"
    assert cells["memory"] == "1 MiB (analysis)"


def test_table_and_verdicts(capsys):
    report.Screen().table(measurement())
    printed = capsys.readouterr().out
    lines = [line.rstrip() for line in printed.splitlines()]
    assert any("timm channels_last" in line and "4 MiB (peak)" in line for line in lines)
    assert "timm torch.compile failed: no compiler" in lines
    assert "timm (channels_last) takes 2.00 [2.00, 2.00] times as long as resflax" in lines
    assert "flax takes 50.00 (once) times as long as resflax" in lines


@pytest.mark.long
def test_main_measures_and_writes(capsys, tmp_path):
    path = tmp_path / "results" / "x.json"
    arguments = [*SMALL, "--repeats", "3", "--peer", "flax", "--json", str(path), "--markdown"]
    arguments += ["--peer", "torch", "--no-compile"] if HAS_TORCH else []
    assert command.main(arguments) == 0
    printed = capsys.readouterr()
    assert [line.split(" | ")[1] for line in printed.out.splitlines()[2:]] == ["inference", "train"]
    written = json.loads(path.read_text())
    assert written["command"].startswith("python -m resflax.bench --model cifar_resnet20 ")
    assert written["settings"]["batch"] == 2
    assert written["versions"]["jax"] == jax.__version__
    assert written["xla_flags"] == os.environ["XLA_FLAGS"]
    assert written["machine"]["cores"] >= 1
    assert written["machine"]["load_before"] >= 0
    assert set(written["peaks"]) == {"float32"}
    forms = [("resflax", ""), ("flax", "")]
    forms += [("torch", "channels_last"), ("torch", "contiguous")] if HAS_TORCH else []
    for found in written["measurements"]:
        assert [(row["peer"], row["form"]) for row in found["contenders"]] == forms
        for row in found["contenders"]:
            assert len(row["seconds"]) == 3
            assert row["median_seconds"] == sorted(row["seconds"])[1]
            assert (row["ratio"] is None) == (row["peer"] == "resflax")


@pytest.mark.long
def test_main_in_bfloat16(capsys):
    assert (
        command.main([*SMALL, "--repeats", "3", "--dtype", "bfloat16", "--mode", "inference"]) == 0
    )
    assert "cifar_resnet20, inference, 2 images of 32 x 32, bfloat16" in capsys.readouterr().out


@pytest.mark.parametrize("stock_process", [False, True])
def test_main_finds_a_batch(capsys, monkeypatch, configured, stock_process):
    monkeypatch.setattr(capacity, "search", lambda fits, start: 10 * start)
    arguments = [*SMALL, "--find-batch"]
    assert command.main(arguments + ["--stock-process"] * stock_process) == 0
    assert configured == ([] if stock_process else ["configure"])
    assert not jax.config.jax_enable_compilation_cache
    assert capsys.readouterr().out == "cifar_resnet20, images of 32 x 32, float32: 20\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nope"], "There is no network 'nope'"),
        (["--model", "resnet18", "--size", "7"], "images of 7 x 7 pixels"),
        (["--model", "resnet18", "--set", "depth"], "argument --set: 'depth' must be NAME=VALUE"),
        (["--model", "resnet18", "--set", "se_reduction=x"], "must be of type int"),
        (["--model", "resnet18", "--set", "what=3"], "has no argument 'what'"),
        (["--model", "resnet18", "--repeats", "2"], "--repeats 2 must be at least 3"),
        (["--model", "resnet18", "--batch", "0"], "--batch 0 must be at least 1"),
        (["--model", "resnet18", "--peer", "what"], "argument --peer: invalid choice: 'what'"),
        (["--model", "resnet18", "--peer", "timm"], "--peer timm needs timm, which is not"),
    ],
)
def test_bad_input_is_one_line(capsys, monkeypatch, arguments, message):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: find_spec(name) if name != "timm" else None
    )
    monkeypatch.setitem(peers.PACKAGES, "timm", ("timm",))
    with pytest.raises(SystemExit) as exit_:
        command.main(arguments)
    assert exit_.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert message in lines[0]
