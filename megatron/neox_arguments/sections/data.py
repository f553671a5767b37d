# SPDX-License-Identifier: Apache-2.0
"""Keys for data and tokenizer: which files, in which mixture, cut into samples how."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from .base import RUNTIME, Section, Whole

Paths = list[str] | None
Weights = list[float] | None


class DataPathKeys(Section):
    """Prefixes of token files (.bin/.idx without the ending), per split and role."""

    data_path: str | None = Field(None, description="One prefix that `split` divides into training, validation and test data.")
    train_data_paths: Paths = Field(None, description="Prefixes of the training data.")
    train_label_data_paths: Paths = Field(
        None, description="Prefixes of labels, one per training prefix: the token to learn at each place, -100 for none."
    )
    train_reward_data_paths: Paths = Field(None, description="Prefixes of rewards, one per training prefix.")
    test_data_paths: Paths = Field(None, description="Prefixes of the test data.")
    test_label_data_paths: Paths = Field(None, description="Prefixes of labels, one per test prefix.")
    test_reward_data_paths: Paths = Field(None, description="Prefixes of rewards, one per test prefix.")
    valid_data_paths: Paths = Field(None, description="Prefixes of the validation data.")
    valid_label_data_paths: Paths = Field(None, description="Prefixes of labels, one per validation prefix.")
    valid_reward_data_paths: Paths = Field(None, description="Prefixes of rewards, one per validation prefix.")
    pos_train_data_paths: Paths = Field(None, description="Prefixes of the chosen halves of training pairs.")
    neg_train_data_paths: Paths = Field(None, description="Prefixes of the rejected halves of training pairs.")
    pos_train_label_data_paths: Paths = Field(None, description="Prefixes of labels, one per chosen training prefix.")
    neg_train_label_data_paths: Paths = Field(None, description="Prefixes of labels, one per rejected training prefix.")
    pos_valid_data_paths: Paths = Field(None, description="Prefixes of the chosen halves of validation pairs.")
    neg_valid_data_paths: Paths = Field(None, description="Prefixes of the rejected halves of validation pairs.")
    pos_valid_label_data_paths: Paths = Field(None, description="Prefixes of labels, one per chosen validation prefix.")
    neg_valid_label_data_paths: Paths = Field(None, description="Prefixes of labels, one per rejected validation prefix.")
    pos_test_data_paths: Paths = Field(None, description="Prefixes of the chosen halves of test pairs.")
    neg_test_data_paths: Paths = Field(None, description="Prefixes of the rejected halves of test pairs.")
    pos_test_label_data_paths: Paths = Field(None, description="Prefixes of labels, one per chosen test prefix.")
    neg_test_label_data_paths: Paths = Field(None, description="Prefixes of labels, one per rejected test prefix.")


class DataArgs(DataPathKeys):
    """The data, its mixture, and the tokenizer that made it."""

    train_data_weights: Weights = Field(None, description="Share of each training prefix in the mixture; unset weighs all the same.")
    valid_data_weights: Weights = Field(None, description="Share of each validation prefix in the mixture.")
    test_data_weights: Weights = Field(None, description="Share of each test prefix in the mixture.")
    weight_by_num_documents: bool = Field(False, description="Compute the shares from the number of documents behind each prefix.")
    weighted_sampler_alpha: float = Field(
        1.0, ge=0, description="Exponent of weight_by_num_documents (arXiv 1911.02116): towards 0 small sets gain."
    )
    data_impl: Literal["infer", "mmap", "cached"] = Field(
        "infer", description="Format of the token files; infer reads it from the file, which today means mmap."
    )
    pack_impl: Literal["packed", "pack_until_overflow", "unpacked"] = Field(
        "packed", description="Documents in a sample: joined and cut anywhere, whole ones while they fit, or one each with padding."
    )
    dataset_impl: Literal["gpt2", "pairwise", "online"] = Field(
        "gpt2", description="Kind of data: token streams, preference pairs, or samples from a rollout server."
    )
    allow_chopped: bool = Field(True, description="Keep documents longer than a sample, cut to its length; not for pack_impl packed.")
    allow_data_change: bool = Field(False, description="Resume although the data or its order is not what it was: a warning, not an error.")
    mmap_warmup: bool = Field(False, description="Read the token files through once when they are opened.")
    index_map_dir: str | None = Field(None, description="Folder for cached index maps; unset keeps them beside the data.")
    split: str = Field("969, 30, 1", description="Shares of training, validation and test documents in data_path, in any unit.")
    num_workers: Whole = Field(2, ge=0, description="Processes that load data, per rank and split; 0 loads in the training process.")
    eod_mask_loss: bool = Field(False, description="Do not learn what follows an end-of-document token.")
    short_seq_prob: float = Field(0.1, ge=0, le=1, description="Kept so that old configs load.", json_schema_extra={"effect": "none"})
    tokenizer_type: Literal[
        "GPT2BPETokenizer", "HFTokenizer", "HFGPT2Tokenizer", "SPMTokenizer", "CharLevelTokenizer", "TiktokenTokenizer"
    ] = Field("GPT2BPETokenizer", description="Which kind of tokenizer reads vocab_file (and merge_file).")
    tokenizer: None = Field(None, description="The tokenizer of a running job.", json_schema_extra=RUNTIME)
    vocab_file: str | None = Field(
        None, description="The tokenizer's file or folder: tokenizer.json, vocab.json, a SentencePiece model, or a tiktoken name."
    )
    merge_file: str | None = Field(None, description="File with the merges of a GPT2BPETokenizer.")
    online_dataserver_ips: str | list[str] = Field("localhost", description="Host or hosts that serve samples for dataset_impl online.")
    online_dataserver_ports: Whole | list[Whole] = Field(10000, description="TCP port or ports of those hosts.")
