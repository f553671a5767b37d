# SPDX-License-Identifier: Apache-2.0
"""Activations keep their size at any width with muP, and grow without it: the proof that all of its parts are in place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron.errors import ConfigError, TrainingError
from megatron.evaluation.build_coordinates import at_width, coordinate_check
from megatron.evaluation.coordinates import KINDS, Size, slopes, steepest, write_report
from megatron.neox_arguments import NeoXArgs
from support.tiny import tiny

MUP = {"use_mup": True, "mup_base_hidden_size": 32, "init_method": "normal", "output_layer_init_method": "normal"}
# Standard deviations that a wide model starts well with, so that without muP only what is learned can grow.
PLAIN = {"init_method": "small_init", "output_layer_init_method": "small_init"}
WIDTHS = [32, 64, 128, 256]
ADAM = {"optimizer": {"type": "Adam", "params": {"lr": 0.02}}, "weight_decay": 0.0}
SGD = {"optimizer": {"type": "SGD", "params": {"lr": 2.0}}, "weight_decay": 0.0, "gradient_clipping": 0.0}


def last_slopes(style: str, **keys: Any) -> dict[str, float]:
    args = NeoXArgs.from_dict(tiny(style, padded_vocab_size=128, min_lr=0.0, init_method_std=0.15, **keys))
    return {kind: by_step[-1] for kind, by_step in slopes(coordinate_check(args, WIDTHS, steps=6)).items()}


@pytest.mark.parametrize("style", ["llama", "gpt2"], ids=["gated_gqa_untied", "tied"])
def test_adam(style: str) -> None:
    flat, growing = last_slopes(style, **ADAM, **MUP), last_slopes(style, **ADAM, **PLAIN)
    assert max(flat.values()) < 0.2 and min(flat[kind] for kind in ("embedding", "block")) > -0.2, flat
    assert growing["logits"] > 0.25 and growing["block"] > 0.4, growing


def test_sgd() -> None:
    flat, growing = last_slopes("llama", **SGD, **MUP), last_slopes("llama", **SGD, **PLAIN)
    assert max(flat.values()) < 0.2, flat
    assert growing["block"] > 0.4, growing


def test_muon() -> None:
    """Its updates have one spectral norm at every width."""
    flat = last_slopes("llama", optimizer={"type": "Muon", "params": {"lr": 0.02, "muon_lr": 0.05}}, **MUP)
    assert max(flat.values()) < 0.2, flat


def test_a_model_that_diverges_is_an_error() -> None:
    with pytest.raises(TrainingError, match="not finite at hidden_size"):
        last_slopes("llama", **{**SGD, "optimizer": {"type": "SGD", "params": {"lr": 1e6}}}, **PLAIN)


def test_the_mlp_grows_with_the_width() -> None:
    args = NeoXArgs.from_dict(tiny("llama", padded_vocab_size=128, precision="bfloat16", **MUP))
    other = at_width(args, 256)
    assert (other.model.hidden_size, other.model.intermediate_size, other.model.precision) == (256, 512, "fp32")
    with pytest.raises(ConfigError, match="num_attention_heads 4 does not divide hidden_size 30"):
        at_width(args, 30)
    with pytest.raises(ConfigError, match="two different widths"):
        coordinate_check(args, [64, 64], steps=1)
    with pytest.raises(ConfigError, match="one step at least"):
        coordinate_check(args, [64, 128], steps=0)


def test_report(tmp_path: Path) -> None:
    power = {"embedding": 0.0, "attention": -0.5, "mlp": 0.25, "block": 0.1, "logits": 1.0}
    sizes = [Size(width=w, step=s, kind=k, size=w ** (power[k] * s)) for w in WIDTHS for s in (0, 1) for k in KINDS]
    found = slopes(sizes)
    assert all(found[kind] == [0.0, pytest.approx(power[kind])] for kind in KINDS)
    assert steepest(found) == ("logits", pytest.approx(1.0))
    write_report(sizes, tmp_path / "new", max_slope=0.2)
    report = json.loads((tmp_path / "new" / "coordinates.json").read_text())
    assert report["steepest"]["kind"] == "logits" and len(report["sizes"]) == len(sizes)
    assert (tmp_path / "new" / "coordinates.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["coordinates.json", "coordinates.png"]
