# SPDX-License-Identifier: Apache-2.0
"""Where a checkpoint came from: a commit read from git's files, a configuration without secrets."""

from __future__ import annotations

import doctest
import subprocess
from pathlib import Path

from megatron import secrets
from megatron.provenance import code_version, git_commit
from megatron.secrets import HIDDEN, redact_mapping


def git(folder: Path, *arguments: str) -> str:
    names = ["-c", "user.name=n", "-c", "user.email=e@example.com"]
    return subprocess.run(["git", "-C", str(folder), *names, *arguments], check=True, capture_output=True, text=True).stdout.strip()


def test_the_commit_is_the_one_git_tells(tmp_path: Path) -> None:
    main, linked = tmp_path / "main", tmp_path / "linked"
    main.mkdir()
    assert git_commit(main) is None
    git(main, "init", "-q")
    assert git_commit(main) is None  # no commit yet
    git(main, "commit", "-q", "--allow-empty", "-m", "one")
    assert git_commit(main) == git(main, "rev-parse", "HEAD")
    git(main, "worktree", "add", "-q", str(linked), "-b", "other")
    git(linked, "commit", "-q", "--allow-empty", "-m", "two")
    assert git_commit(linked) == git(linked, "rev-parse", "HEAD") != git_commit(main)
    git(main, "pack-refs", "--all")
    assert git_commit(main) == git(main, "rev-parse", "HEAD")
    git(main, "checkout", "-q", "--detach")
    assert git_commit(main) == git(main, "rev-parse", "HEAD")
    assert code_version().partition("+")[0]


def test_no_secret_is_kept() -> None:
    assert doctest.testmod(secrets).failed == 0
    environ = {"WANDB_API_KEY": "0123456789abcdef", "HOME": "/srv/somebody", "HF_TOKEN": "abc"}
    config = {
        "wandb_api_key": "k" * 40,
        "hf_token": "x",
        "tokenizer_type": "HFTokenizer",
        "eod_token": 0,
        "save": "/srv/somebody/run",
        "command": ["run", "--key=0123456789abcdef"],
        "deepspeed_config": {"secret": "s", "depth": {"password": "p"}},
    }
    clean = redact_mapping(config, environ)
    assert clean == {
        **config,
        "wandb_api_key": HIDDEN,
        "hf_token": HIDDEN,
        "command": ["run", f"--key={HIDDEN}"],
        "deepspeed_config": {"secret": HIDDEN, "depth": {"password": HIDDEN}},
    }
