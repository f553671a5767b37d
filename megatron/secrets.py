# SPDX-License-Identifier: Apache-2.0
"""Which names are those of secrets, and texts and configurations without the values of secrets."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

MASK = "***"
"""In place of a secret in what is shown."""

HIDDEN = "(hidden)"
"""In place of a secret in what is kept. FORMAT: manifests of checkpoints hold it."""

SHORTEST = 6
"""Values below this length are too likely to be part of other text."""

_SECRET = re.compile(r"(^|_|-)(api_?key|access_?key|secret(_?key)?|password|passwd|credentials?|(access|auth|hf|api)?_?token)(_id)?$", re.I)


def is_secret(name: str) -> bool:
    """Whether a key or a variable of the environment is named as secrets are.

    >>> [is_secret(name) for name in ("HF_TOKEN", "wandb_api_key", "AWS_ACCESS_KEY_ID", "HUGGING_FACE_HUB_TOKEN", "tokenizer_type")]
    [True, True, True, True, False]
    """
    return _SECRET.search(name) is not None


def mask(name: str, value: str) -> str:
    """`value` as it may be shown to others.

    >>> mask("COMET_API_KEY", "k1"), mask("HOME", "/root")
    ('***', '/root')
    """
    return MASK if is_secret(name) else value


def redact(text: str, environ: Mapping[str, str] | None = None, *, shown: str = MASK) -> str:
    """`text` without the values of secret variables, and without what an address may carry before its host.

    >>> redact("Bearer hf_1234567 at https://user:pw@host/x", {"HF_TOKEN": "hf_1234567"})
    'Bearer *** at https://***@host/x'
    """
    for name, value in (os.environ if environ is None else environ).items():
        if len(value) >= SHORTEST and is_secret(name):
            text = text.replace(value, shown)
    return re.sub(r"//[^/@\s]*@", f"//{shown}@", text)


def redact_mapping(config: Mapping[str, Any], environ: Mapping[str, str] | None = None) -> dict[str, Any]:
    """A configuration in which neither a key that names a secret, nor a secret of the environment, shows its value.

    >>> redact_mapping({"tokenizer_type": "HF", "env": {"HF_TOKEN": "hf_1234567"}, "note": "use hf_1234567"}, {"HF_TOKEN": "hf_1234567"})
    {'tokenizer_type': 'HF', 'env': {'HF_TOKEN': '(hidden)'}, 'note': 'use (hidden)'}
    """
    return {str(key): _redacted(str(key), value, environ) for key, value in config.items()}


def secret_names(values: object, prefix: str = "") -> Iterator[str]:
    """Dotted names of all values, nested ones included, whose name says that they are secret and that are not empty."""
    if isinstance(values, dict):
        for key, value in values.items():
            name = f"{prefix}.{key}" if prefix else str(key)
            if isinstance(value, str) and value and is_secret(str(key)):
                yield name
            else:
                yield from secret_names(value, name)
    elif isinstance(values, list):
        for index, value in enumerate(values):
            yield from secret_names(value, f"{prefix}[{index}]")


def _redacted(key: str, value: Any, environ: Mapping[str, str] | None) -> Any:
    if isinstance(value, str):
        return HIDDEN if is_secret(key) else redact(value, environ, shown=HIDDEN)
    if isinstance(value, Mapping):
        return redact_mapping(value, environ)
    if isinstance(value, (list, tuple)):
        return [_redacted(key, item, environ) for item in value]
    return value
