# SPDX-License-Identifier: Apache-2.0
"""What a user wants prepared, and where it goes."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from megatron.errors import ConfigError
from megatron.tokenizer import TokenizerBackend

PATH_STARTS = (".", "/", "~")


def is_path(name: str) -> bool:
    """Whether a name that is not here can only have been meant as a path: one on the Hub is ORG/NAME."""
    return name.startswith(PATH_STARTS) or name.count("/") > 1


class As(str, Enum):
    """What the records become: plain text, conversations with labels, their contents as text, preference pairs, judged answers."""

    PRETRAIN = "pretrain"
    CHAT = "chat"
    MIDTRAIN = "midtrain"
    PAIRS = "pairs"
    KTO = "kto"


@dataclass(frozen=True, kw_only=True)
class Data:
    """Which records. dataset: a path here, else a name on the Hub; data_files: files here, else names inside the dataset"""

    dataset: str
    subset: str | None = None
    split: str = "train"
    data_dir: str | None = None
    data_files: tuple[str, ...] = ()
    revision: str | None = None


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Which columns, and what of them.

    wanted:       None = what the columns look like
    text_column:  use this one; a column of turns makes conversations
    join_columns: their texts, a blank line between
    as_written:   turns become the text Python writes for them
    """

    wanted: As | None = None
    text_column: str | None = None
    join_columns: tuple[str, ...] = ()
    as_written: bool = False


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Which ids. tokenizer: file, folder or Hub name; template_of: the same, whose chat template is used; template: a file instead."""

    tokenizer: str | None = None
    template_of: str | None = None
    template: str | None = None
    backend: TokenizerBackend = TokenizerBackend.AUTO
    max_length: int | None = None


@dataclass(frozen=True, kw_only=True)
class PrepareRequest:
    """Everything. count, export, tokenize: the stages wanted; count_only: write nothing at all."""

    data: Data
    columns: Columns = Columns()
    tokens: Tokens = Tokens()
    folder: Path
    count: bool = True
    export: bool = True
    tokenize: bool = True
    count_only: bool = False
    workers: int = 1
    download_workers: int = 1
    batch_rows: int = 10_000
    skip_bad: int = 0

    @property
    def prefix(self) -> Path:
        """Of the streams: `<folder>/<name of the folder>`."""
        return self.folder / self.folder.name


def default_folder(base: Path, data: Data) -> Path:
    """FORMAT: `<base>/<dataset basename>[_<subset>]_<split>`.

    >>> str(default_folder(Path("data"), Data(dataset="org/corpus", subset="en")))
    'data/corpus_en_train'
    """
    name = Path(data.dataset.rstrip("/")).name.split(".")[0] if Path(data.dataset).exists() else data.dataset.rstrip("/").split("/")[-1]
    split = "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in data.split)
    return base / "_".join(part for part in (name, data.subset, split) if part)


def check(request: PrepareRequest) -> None:
    """Raise ConfigError for wishes that contradict each other."""
    columns = request.columns
    if columns.join_columns and (columns.text_column or columns.as_written or columns.wanted not in (None, As.PRETRAIN, As.MIDTRAIN)):
        raise ConfigError("--join-columns makes plain text of other columns", where="command line", fix="give it alone")
    if columns.as_written and columns.wanted not in (None, As.PRETRAIN):
        raise ConfigError(
            "--skip-chat-template makes plain text of Python's own notation, and does not go with another form",
            where="command line",
            fix="leave one of them out",
        )
    if request.count_only and not request.count:
        raise ConfigError("--count-only and --skip-count leave nothing to do", where="command line", fix="leave one of them out")
    if request.tokens.max_length is not None and request.tokens.max_length < 1:
        raise ConfigError("--max-length must be 1 or more", where="command line", fix="give the tokens of a sample")
    if min(request.workers, request.download_workers, request.batch_rows) < 1 or request.skip_bad < 0:
        raise ConfigError("numbers of workers and rows are 1 or more, --skip-bad 0 or more", where="command line", fix="see --help")
