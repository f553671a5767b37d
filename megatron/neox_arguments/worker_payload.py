# SPDX-License-Identifier: Apache-2.0
"""How a configuration travels on a worker's command line: urlsafe base64 of JSON. Knows no keys, and refuses secrets."""

from __future__ import annotations

import base64
import binascii
import json
import zlib
from typing import Any

from megatron.errors import ConfigError
from megatron.secrets import secret_names

# Linux takes at most 128 KiB in one argument; larger texts are compressed.
PLAIN_LIMIT = 96 * 1024
ARGUMENT_LIMIT = 128 * 1024 - 256


def encode(values: dict[str, Any]) -> str:
    """JSON as urlsafe base64; texts too long for one argument are zlib-compressed first.

    Raises ConfigError when a secret is among the values (anyone on the machine can read a command line), or
    when even the compressed text is longer than an argument may be.
    """
    secrets = list(secret_names(values))
    if secrets:
        raise ConfigError(
            f"a secret may not stand in a config: {', '.join(secrets)}",
            where=", ".join(secrets),
            fix="take it out of the YAML and export it in the environment (WANDB_API_KEY, COMET_API_KEY, HF_TOKEN, AWS_SECRET_ACCESS_KEY)",
        )
    raw = json.dumps(values).encode()
    text = base64.urlsafe_b64encode(raw).decode()
    if len(text) > PLAIN_LIMIT:
        text = base64.urlsafe_b64encode(zlib.compress(raw, 9)).decode()
    if len(text) > ARGUMENT_LIMIT:
        raise ConfigError(
            f"the configuration takes {len(text)} bytes, more than one command-line argument holds ({ARGUMENT_LIMIT})",
            fix="start the workers on the YAML files themselves: torchrun --nproc_per_node N train.py CONF...",
        )
    return text


def decode(text: str, flag: str) -> dict[str, Any]:
    """What `encode` made. Raises ConfigError naming `flag` for anything else."""
    try:
        raw = base64.urlsafe_b64decode(text)
        values = json.loads(raw if raw.startswith(b"{") else zlib.decompress(raw))
    except (binascii.Error, zlib.error, ValueError) as error:
        raise ConfigError(f"{flag} is not base64 JSON ({error})", where=flag, fix="leave this flag to deepy.py") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{flag} holds {type(values).__name__}, not a mapping", where=flag, fix="leave this flag to deepy.py")
    return values
