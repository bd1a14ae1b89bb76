"""What a network costs for one image, stage by stage, and what other blocks would cost."""

import argparse
import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import Any

from resflax.analysis import accuracy, bars, blocks, gates
from resflax.analysis.result import Result
from resflax.analysis.subject import Subject
from resflax.models import Count, count
from resflax.models.resnet import ResNet


@dataclasses.dataclass(frozen=True)
class Stage:
    """What a stage costs for one image, or all of them together: see resflax.count.

    Attributes:
      stage: its name; 'total': all.
      blocks: parts of the network in it.
      params: trainable parameters.
      macs: multiply-adds of the convolutions and dense layers.
      activations: numbers that these give out.
      se_params, se_macs: the shares of the gates in `params` and `macs`: of squeeze-excite, or of
        another class (see models.gates.Gate).
    """

    stage: str
    blocks: int
    params: int
    macs: int
    activations: int
    se_params: float
    se_macs: float


def measure(counted: Count) -> list[Stage]:
    """The stages of a network that have parameters, in order, and the total."""
    stages: dict[str, list[Count]] = {}
    for name, part in counted.parts.items():
        if part.params:
            stages.setdefault(gates.stage(name), []).append(part)
    rows = [summed(name, parts) for name, parts in stages.items()]
    return [*rows, summed("total", [part for parts in stages.values() for part in parts])]


def summed(name: str, parts: Sequence[Count]) -> Stage:
    """What some parts cost together, under a name."""
    params, macs, activations = (
        sum(getattr(part, field) for part in parts) for field in ("params", "macs", "activations")
    )
    gates = [gate for part in parts for gate in _gates(part)]
    return Stage(
        name,
        len(parts),
        params,
        macs,
        activations,
        se_params=sum(gate.params for gate in gates) / max(params, 1),
        se_macs=sum(gate.macs for gate in gates) / max(macs, 1),
    )


def run(subjects: Sequence[Subject], options: argparse.Namespace) -> Result:
    """Counts each subject; no variables are needed.

    A single residual network is compared with what it would be of other blocks, and finished runs
    by their accuracy.

    Raises:
      UserError: if the result of a run cannot be read.
    """
    names = _names(subjects, options.workdir)
    tables = [measure(count(s.model, s.image_shape)) for s in subjects]
    # The runs are the last subjects: see resflax.analyze.
    untrained = [None] * (len(subjects) - len(options.workdir))
    top1 = [*untrained, *map(accuracy.read, options.workdir)]
    found = list(zip(names, tables, top1, strict=True))
    rows = [row for name, stages, share in found for row in _rows(name, stages, share)]
    remarks = [f"{name}: {verdict(stages)}" for name, stages, _ in found]
    drawn = {"": bars.draw(_costs(names, tables))}
    other = {}
    if len(subjects) == 1 and isinstance(subjects[0].model, ResNet):
        choices = blocks.measure(subjects[0].model, subjects[0].image_shape)
        other["blocks"] = _compared(choices)
        kinds = [choice.name for choice in choices]
        drawn["blocks"] = bars.draw(_costs(kinds, [measure(c.network) for c in choices]))
        text = "; ".join(f"{c.block.params:,}, {c.name}" for c in choices)
        remarks.append(f"parameters of {choices[0].block_name}: {text}")
    points = [
        accuracy.Point(name, stages[-1].macs, stages[-1].params, share)
        for name, stages, share in found
        if share is not None
    ]
    if points:
        drawn["accuracy"] = accuracy.draw(points)
    rows, columns = _kept(rows)
    return Result("complexity", rows, remarks, drawn, columns, other)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds those of this analysis: there are none."""


def verdict(stages: Sequence[Stage]) -> str:
    """In words: the total, where most of it is, and the share of the gates."""
    *parts, total = stages
    most = max(parts, key=lambda s: s.macs)
    text = (
        f"{_words(total.params)} parameters, {_words(total.macs)} multiply-adds, "
        f"{most.macs / total.macs:.0%} of them in {most.stage}"
    )
    if total.se_params:
        text += f"; gates have {total.se_params:.1%} and {total.se_macs:.2%} of them"
    return text


def _words(number: int) -> str:
    size, word = bars.unit(number)
    return f"{number / size:.3g} {word}".rstrip()


def _rows(network: str, stages: Sequence[Stage], top1: float | None) -> list[dict[str, Any]]:
    """A row for each stage; the accuracy is in that of the total."""
    return [
        {
            "network": network,
            **dataclasses.asdict(stage),
            "top1": top1 if stage is stages[-1] else None,
        }
        for stage in stages
    ]


def _kept(rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows without accuracies if there are none, and the columns for which there is room."""
    if all(row["top1"] is None for row in rows):
        rows = [{k: v for k, v in row.items() if k != "top1"} for row in rows]
    hidden = {"se_macs"}
    if len({row["network"] for row in rows}) > 1:
        hidden |= {"blocks", "activations"}
    if not any(row["se_params"] for row in rows):
        hidden.add("se_params")
    return rows, [column for column in rows[0] if column not in hidden]


def _compared(choices: Sequence[blocks.Choice]) -> list[dict[str, Any]]:
    """Of each kind of blocks, a row for one block, and one for each stage and the total."""
    return [
        {"network": choice.name, **dataclasses.asdict(stage)}
        for choice in choices
        for stage in (summed(choice.block_name, [choice.block]), *measure(choice.network))
    ]


def _costs(names: Sequence[str], tables: Sequence[Sequence[Stage]]) -> bars.Costs:
    """Multiply-adds and parameters by stage, of those that have any multiply-adds."""
    return [
        (name, {s.stage: (s.macs, s.params) for s in stages[:-1] if s.macs})
        for name, stages in zip(names, tables, strict=True)
    ]


def _gates(counted: Count) -> Iterator[Count]:
    for part in counted.parts.values():
        if part.gate:
            yield part
        else:
            yield from _gates(part)


def _names(subjects: Sequence[Subject], workdirs: Sequence[str]) -> list[str]:
    """Those of the subjects; of runs in folders of one name, the paths from where they part."""
    names = [subject.name for subject in subjects]
    if not workdirs or len(set(names)) == len(names):
        return names
    paths = [os.path.abspath(workdir) for workdir in workdirs]
    above = os.path.commonpath([os.path.dirname(path) for path in paths])
    return [*names[: -len(paths)], *(os.path.relpath(path, above) for path in paths)]
