# SPDX-License-Identifier: Apache-2.0
"""muP's coordinate check: how activations grow with the width of a model while it learns. Knows no configuration."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import linear_regression
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from megatron.atomic_io import atomic_path, write_durably
from megatron.errors import TrainingError
from megatron.model.embedding import Embedding
from megatron.model.layer_state import LayerState
from megatron.model.transformer import Transformer

KINDS = ("embedding", "attention", "mlp", "block", "logits")


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model of one width and what trains it; gradients longer than max_norm are cut to it, 0 = none are."""

    model: Transformer
    optimizer: Optimizer
    max_norm: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Size:
    """Mean absolute activation of one kind of layer, over its entries and over the layers of that kind, after `step` updates."""

    width: int
    step: int
    kind: str
    size: float


def measure(make: Callable[[int], Subject], widths: Sequence[int], tokens: Tensor, steps: int) -> list[Size]:
    """Train a model of each width on tokens [b, s + 1] and measure before every update and after the last.

    make: width -> a fresh model with its optimizer
    Raises TrainingError when a model diverges.
    """
    found = []
    for width in widths:
        subject = make(width)
        for step in range(steps + 1):
            sizes = _step(subject, tokens, update=step < steps)
            if not all(math.isfinite(size) for size in sizes.values()):
                what = f"activations are not finite at hidden_size {width} after {step} updates"
                raise TrainingError(what, where="optimizer.params.lr", fix="lower the learning rate, or set use_mup: true")
            found += [Size(width=width, step=step, kind=kind, size=size) for kind, size in sizes.items()]
    return found


def slopes(sizes: Sequence[Size]) -> dict[str, list[float]]:
    """Kind -> for each step the slope of log size over log width (least squares): 0 = the same at all widths, 1 = in proportion.

    >>> slopes([Size(width=w, step=0, kind="mlp", size=3.0 * w**0.5) for w in (4, 16, 64)])
    {'mlp': [0.5]}
    """
    points: dict[str, dict[int, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for one in sizes:
        points[one.kind][one.step].append((math.log(one.width), math.log(max(one.size, 1e-30))))
    return {
        kind: [round(linear_regression(*zip(*rows, strict=True)).slope, 6) for _, rows in sorted(by_step.items())]
        for kind, by_step in points.items()
    }


def steepest(found: dict[str, list[float]]) -> tuple[str, float]:
    """The kind that grows most after the last update, and its slope."""
    return max(((kind, by_step[-1]) for kind, by_step in found.items()), key=lambda item: item[1])


def write_report(sizes: Sequence[Size], folder: Path, *, max_slope: float) -> Path:
    """Write coordinates.json and coordinates.png into `folder`; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    found = slopes(sizes)
    kind, slope = steepest(found)
    report = {"max_slope": max_slope, "steepest": {"kind": kind, "slope": slope}, "slopes": found, "sizes": [asdict(one) for one in sizes]}
    write_durably(folder / "coordinates.json", json.dumps(report, indent=1) + "\n")
    with atomic_path(folder / "coordinates.png") as aside:
        _draw(sizes, found, aside)
    return folder


def _step(subject: Subject, tokens: Tensor, *, update: bool) -> dict[str, float]:
    """One forward pass, and with `update` a training step; the sizes seen in the forward pass, by kind."""
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    everywhere = torch.ones_like(labels, dtype=torch.float32)

    def read(logits: Any) -> Tensor:
        with torch.no_grad():
            seen["logits"].append(_size(logits.full()))
        loss: Tensor = logits.nll(labels, everywhere, float(labels.numel()))
        return loss

    with _watched(subject.model) as seen:
        loss = subject.model(inputs, read=read)
    if update:
        loss.backward()
        if subject.max_norm > 0:
            nn.utils.clip_grad_norm_(subject.model.parameters(), subject.max_norm)
        subject.optimizer.step()
        subject.optimizer.zero_grad(set_to_none=True)
    return {kind: sum(seen[kind]) / len(seen[kind]) for kind in KINDS}


@contextmanager
def _watched(model: Transformer) -> Iterator[dict[str, list[float]]]:
    """While this is open, the sizes of what layers give are noted by kind."""
    seen: dict[str, list[float]] = defaultdict(list)

    def of_stream(kind: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, given: Any, out: Any) -> None:
            if isinstance(out, LayerState):  # a tied embedding, run as the head, gives the loss
                seen[kind].append(_size(out.hidden))

        return hook

    def of_tensor(kind: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda module, given, out: seen[kind].append(_size(out))

    embeddings = [module for module in model.sequential.values() if isinstance(module, Embedding)]
    hooks = [module.register_forward_hook(of_stream("embedding")) for module in embeddings]
    for block in model.blocks:
        hooks.append(block.register_forward_hook(of_stream("block")))
        hooks.append(block.attention.register_forward_hook(of_tensor("attention")))
        hooks.append(block.mlp.register_forward_hook(of_tensor("mlp")))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _size(x: Tensor) -> float:
    return float(x.detach().abs().mean(dtype=torch.float32))


def _draw(sizes: Sequence[Size], found: dict[str, list[float]], path: Path) -> None:
    """One panel per kind: size over width, a line for each step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(found), figsize=(3.2 * len(found), 3.4), layout="constrained")
    widths = sorted({one.width for one in sizes})
    last = max(one.step for one in sizes)
    for panel, (kind, by_step) in zip(panels, found.items(), strict=True):
        for step in range(last + 1):
            points = {one.width: one.size for one in sizes if one.kind == kind and one.step == step}
            colour = pyplot.get_cmap("viridis")(step / max(last, 1) * 0.9)
            panel.plot(widths, [points[width] for width in widths], marker="o", color=colour, label=f"step {step}")
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(widths, [str(width) for width in widths])
        panel.minorticks_off()
        panel.set_title(f"{kind}: slope {by_step[-1]:+.2f}")
        panel.set_xlabel("hidden_size")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("mean |activation|")
    figure.legend(*panels[-1].get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    figure.savefig(path, format="png", dpi=120)
    pyplot.close(figure)
