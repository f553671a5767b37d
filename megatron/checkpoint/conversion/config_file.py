# SPDX-License-Identifier: Apache-2.0
"""The text of a neox_config.yml: a model that was converted, ready to be trained on. Knows no configuration object."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

NAME = "neox_config.yml"
USE = f"python deepy.py train.py {NAME} --data_path DATA --save FOLDER"

# A start for fine-tuning; everything that a run cannot do without is there.
TRAINING: dict[str, Any] = {
    "train_iters": 1000,
    "train_micro_batch_size_per_gpu": 1,
    "optimizer": {"type": "AdamW", "params": {"lr": 1.0e-5, "betas": [0.9, 0.95], "eps": 1.0e-8}},
    "lr_decay_style": "cosine",
    "warmup": 0.03,
    "weight_decay": 0.1,
    "gradient_clipping": 1.0,
    "checkpoint_factor": 1000,
    "eval_interval": 1000,
    "eval_iters": 10,
    "log_interval": 10,
}


def render(source: str, sections: Mapping[str, Mapping[str, Any]]) -> str:
    """YAML with a heading over each section; tuples become lists.

    >>> print(render("a model", {"Model": {"num_layers": 2}}).splitlines()[-1])
    num_layers: 2
    """
    head = f"# SPDX-License-Identifier: Apache-2.0\n# Made of {source}.\n# Use: {USE}\n"
    texts = {title: "".join(f"{key}: {_value(value)}\n" for key, value in keys.items()) for title, keys in sections.items() if keys}
    return head + "".join(f"\n# {title}\n{text}" for title, text in texts.items())


def _value(value: Any) -> str:
    text: str = yaml.safe_dump(_plain(value), sort_keys=False, default_flow_style=True, width=10**6)
    return text.removesuffix("...\n").strip()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return value
