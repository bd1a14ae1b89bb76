"""Parts of a run that are the user's own.

Beside get_config and sweep, a config file may define

- get_model(config, num_classes): a flax.linen module, (images [N, H, W, C], train=...) -> logits
  [N, num_classes];
- get_loss(config): a function from logits [N, K] and targets, classes [N] or, where images are
  mixed, probabilities [N, K], to [N];
- get_optimizer(config, schedule): an optax.GradientTransformation; the schedule is of the config's
  learning rate, by steps;
- get_dataset(config): a mapping of images and labels, or a Dataset: see resflax.data.given.

A run's directory keeps no more of them than that they were there: see run.workdir.open_parts.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import optax

from resflax import config as config_lib
from resflax import losses
from resflax.data import given, sources
from resflax.errors import UserError
from resflax.losses import Distillation, Loss
from resflax.process import program

# Of the option --config_file.
CONFIG_FILE_HELP = "that the run was made with, if it has get_model or get_dataset"

Function = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Parts:
    """Functions that make the user's own parts of a run; None: the part is as the config says.

    Attributes:
      model: from the config and the number of classes.
      loss: from the config.
      optimizer: from the config and the schedule of its learning rate.
      dataset: from the config.
      file: where they are defined, for a person.
    """

    model: Function | None = None
    loss: Function | None = None
    optimizer: Function | None = None
    dataset: Function | None = None
    file: str = "train_and_evaluate"

    @classmethod
    def defined(cls, file: str, names: Mapping[str, Any]) -> "Parts":
        """Those of the names that a config file defines.

        Raises:
          UserError: if one of them is no function.
        """
        found = [names.get(f"get_{part}") for part in NAMES]
        for part, function in zip(NAMES, found, strict=True):
            if function is not None and not callable(function):
                raise UserError(f"{file}: get_{part} must be a function.")
        model, loss, optimizer, dataset = found
        return cls(model, loss, optimizer, dataset, file)

    @classmethod
    def of_file(cls, config_file: str) -> "Parts":
        """Those of FILE.py; ':DATASET' behind it has nothing to say here.

        Raises:
          UserError: if there is no such file, or it fails.
        """
        file = config_file.partition(":")[0]
        return cls.defined(file, program.run(file))

    @classmethod
    def of_objects(
        cls,
        model: nn.Module | None = None,
        loss: Loss | Distillation | None = None,
        optimizer: optax.GradientTransformation | None = None,
        dataset: Any = None,
    ) -> "Parts":
        """Parts that are there already."""
        return cls(_always(model), _always(loss), _always(optimizer), _always(dataset))

    @property
    def own(self) -> list[str]:
        """The names of the parts that are the user's own."""
        return [name for name in NAMES if getattr(self, name) is not None]

    def named(self, model: nn.Module, dataset: sources.Dataset) -> dict[str, str]:
        """A note of each of the user's own parts, by name: of which kind, and where it is."""
        kinds = {"model": type(model).__name__, "dataset": dataset.description.name}
        return {name: f"{kinds.get(name, 'defined')} in {self.file}" for name in self.own}

    def build_model(
        self, config: ml_collections.ConfigDict, num_classes: int, axis_name: str | None = None
    ) -> nn.Module:
        """The network of a run: see config.build_model.

        Raises:
          UserError: if get_model fails, or gives something else.
        """
        if self.model is None:
            return config_lib.build_model(config, num_classes, axis_name)
        model = program.call(self.file, self.model, config, num_classes)
        if not isinstance(model, nn.Module):
            raise self._wrong("model", model, "a flax.linen module")
        call = inspect.getattr_static(model, "__call__", None)
        arguments = inspect.signature(call).parameters if callable(call) else {}
        open_ended = any(p.kind is p.VAR_KEYWORD for p in arguments.values())
        if "train" not in arguments and not open_ended:
            raise UserError(
                f"{self.file}: {type(model).__name__}.__call__ has no argument 'train'; it must be "
                "__call__(self, images, *, train: bool), from [N, H, W, C] to logits [N, K]."
            )
        return config_lib.for_training(config, model, axis_name)

    def build_loss(self, config: ml_collections.ConfigDict) -> Loss | Distillation | None:
        """The loss of a run; None: the config's.

        Raises:
          UserError: if get_loss fails, or gives something else.
        """
        if self.loss is None:
            return None
        loss = program.call(self.file, self.loss, config)
        if not callable(loss):
            raise self._wrong("loss", loss, "a function: logits [N, K], targets -> [N]")
        return loss  # type: ignore[no-any-return]

    def build_optimizer(
        self, config: ml_collections.ConfigDict, schedule: optax.Schedule
    ) -> optax.GradientTransformation | None:
        """The optimizer of a run; None: the config's.

        Raises:
          UserError: if get_optimizer fails, or gives something else.
        """
        if self.optimizer is None:
            return None
        made = program.call(self.file, self.optimizer, config, schedule)
        if not isinstance(made, optax.GradientTransformation):
            raise self._wrong("optimizer", made, "an optax.GradientTransformation")
        return made

    def load_dataset(
        self, config: ml_collections.ConfigDict, report: Callable[[str], None] | None = None
    ) -> sources.Dataset:
        """The data set of a run: see sources.load.

        Raises:
          UserError: if get_dataset fails, or gives something else.
        """
        if self.dataset is None:
            return given.load(config.data, None, report)
        made = program.call(self.file, self.dataset, config)
        if not isinstance(made, sources.Dataset | Mapping):
            raise self._wrong("dataset", made, "images as resflax.data.given takes them")
        return given.load(config.data, made, report)

    def try_out(
        self,
        config: ml_collections.ConfigDict,
        model: nn.Module,
        loss: Loss | Distillation,
        description: sources.Description,
    ) -> None:
        """Traces the user's own network and loss on two images; nothing is computed.

        Raises:
          UserError: if they fail, or what they give has another shape than a run needs.
        """
        count, classes = 2, description.num_classes
        logits = jax.ShapeDtypeStruct((count, classes), jnp.float32)
        images = jax.ShapeDtypeStruct((count, *description.image_shape), jnp.float32)
        if self.model is not None:
            found = program.call(self.file, jax.eval_shape, _network(model), images)
            self._require_shape(found, logits.shape, f"{type(model).__name__} gives", images.shape)
        if self.loss is not None:
            mixed = any(config.mix.values())
            targets = logits if mixed else jax.ShapeDtypeStruct((count,), jnp.int32)
            found = program.call(
                self.file, jax.eval_shape, _of_images(loss), images, logits, targets
            )
            self._require_shape(found, (count,), "the loss of get_loss() gives", logits.shape)

    def _require_shape(
        self, found: Any, right: tuple[int, ...], giver: str, given: tuple[int, ...]
    ) -> None:
        shape = found.shape if isinstance(found, jax.ShapeDtypeStruct) else type(found).__name__
        if shape != right:
            raise UserError(f"{self.file}: {giver} {shape} for {given}; it must give {right}.")

    def _wrong(self, part: str, made: Any, right: str) -> UserError:
        kind = made.__name__ if isinstance(made, type) else type(made).__name__
        return UserError(f"{self.file}: get_{part}() gives {kind}; it must return {right}.")


NAMES = ("model", "loss", "optimizer", "dataset")  # in the order of the fields
NONE = Parts()


def _always(part: Any) -> Function | None:
    return None if part is None else lambda *_: part


def _of_images(loss: Loss | Distillation) -> Callable[..., Any]:
    return lambda images, logits, targets: losses.on(loss, images)(logits, targets)


def unmapped(model: nn.Module) -> nn.Module:
    """A network as it can be called where no axis of devices is mapped."""
    return model.clone(axis_name=None) if getattr(model, "axis_name", None) else model


def _network(model: nn.Module) -> Callable[[jax.Array], Any]:
    """What the network makes of images, as it is initialised."""
    init = functools.partial(unmapped(model).init_with_output, train=False)
    return lambda images: init(jax.random.key(0), images)[0]
