# SPDX-License-Identifier: Apache-2.0
"""Keys for data, tokenizer and objective: which files, in which mixture, cut into samples how, and what is learned from them."""

from __future__ import annotations

from typing import Literal

from .base import NO_EFFECT, RUNTIME, Section, Whole, key

Paths = list[str] | None
Weights = list[float] | None


class DataPathKeys(Section):
    """Prefixes of token files (.bin/.idx without the ending), per split and role."""

    data_path: str | None = key(None, "One prefix that `split` divides into training, validation and test data.")
    train_data_paths: Paths = key(None, "Prefixes of the training data.")
    train_label_data_paths: Paths = key(
        None, "Prefixes of labels, one per training prefix: the token to learn at each place, -100 for none."
    )
    train_reward_data_paths: Paths = key(None, "Prefixes of rewards, one per training prefix.")
    test_data_paths: Paths = key(None, "Prefixes of the test data.")
    test_label_data_paths: Paths = key(None, "Prefixes of labels, one per test prefix.")
    test_reward_data_paths: Paths = key(None, "Prefixes of rewards, one per test prefix.")
    valid_data_paths: Paths = key(None, "Prefixes of the validation data.")
    valid_label_data_paths: Paths = key(None, "Prefixes of labels, one per validation prefix.")
    valid_reward_data_paths: Paths = key(None, "Prefixes of rewards, one per validation prefix.")
    pos_train_data_paths: Paths = key(None, "Prefixes of the chosen halves of training pairs.")
    neg_train_data_paths: Paths = key(None, "Prefixes of the rejected halves of training pairs.")
    pos_train_label_data_paths: Paths = key(None, "Prefixes of labels, one per chosen training prefix.")
    neg_train_label_data_paths: Paths = key(None, "Prefixes of labels, one per rejected training prefix.")
    pos_valid_data_paths: Paths = key(None, "Prefixes of the chosen halves of validation pairs.")
    neg_valid_data_paths: Paths = key(None, "Prefixes of the rejected halves of validation pairs.")
    pos_valid_label_data_paths: Paths = key(None, "Prefixes of labels, one per chosen validation prefix.")
    neg_valid_label_data_paths: Paths = key(None, "Prefixes of labels, one per rejected validation prefix.")
    pos_test_data_paths: Paths = key(None, "Prefixes of the chosen halves of test pairs.")
    neg_test_data_paths: Paths = key(None, "Prefixes of the rejected halves of test pairs.")
    pos_test_label_data_paths: Paths = key(None, "Prefixes of labels, one per chosen test prefix.")
    neg_test_label_data_paths: Paths = key(None, "Prefixes of labels, one per rejected test prefix.")


class DataArgs(DataPathKeys):
    """The data, its mixture, and the tokenizer that made it."""

    train_data_weights: Weights = key(None, "Share of each training prefix in the mixture; unset weighs all the same.")
    valid_data_weights: Weights = key(None, "Share of each validation prefix in the mixture.")
    test_data_weights: Weights = key(None, "Share of each test prefix in the mixture.")
    weight_by_num_documents: bool = key(False, "Compute the shares from the number of documents behind each prefix.")
    weighted_sampler_alpha: float = key(1.0, "Exponent of weight_by_num_documents (arXiv 1911.02116): towards 0 small sets gain.", ge=0)
    data_impl: Literal["infer", "mmap", "cached"] = key(
        "infer", "Format of the token files; infer reads it from the file, which today means mmap."
    )
    pack_impl: Literal["packed", "pack_until_overflow", "unpacked"] = key(
        "packed", "Documents in a sample: joined and cut anywhere, whole ones while they fit, or one each with padding."
    )
    dataset_impl: Literal["gpt2", "pairwise", "online"] = key(
        "gpt2", "Kind of data: token streams, preference pairs, or samples from a rollout server."
    )
    allow_chopped: bool = key(True, "Keep documents longer than a sample, cut to its length; not for pack_impl packed.")
    allow_data_change: bool = key(False, "Resume although the data or its order is not what it was: a warning, not an error.")
    mmap_warmup: bool = key(False, "Read the token files through once when they are opened.")
    index_map_dir: str | None = key(None, "Folder for cached index maps; unset keeps them beside the data.")
    split: str = key("969, 30, 1", "Shares of training, validation and test documents in data_path, in any unit.")
    num_workers: Whole = key(2, "Processes that load data, per rank and split; 0 loads in the training process.", ge=0)
    eod_mask_loss: bool = key(False, "Do not learn what follows an end-of-document token.")
    short_seq_prob: float = key(0.1, "Kept so that old configs load.", NO_EFFECT, ge=0, le=1)
    tokenizer_type: Literal[
        "GPT2BPETokenizer", "HFTokenizer", "HFGPT2Tokenizer", "SPMTokenizer", "CharLevelTokenizer", "TiktokenTokenizer"
    ] = key("GPT2BPETokenizer", "Which kind of tokenizer reads vocab_file (and merge_file).")
    tokenizer: None = key(None, "The tokenizer of a running job.", RUNTIME)
    vocab_file: str | None = key(
        None, "The tokenizer's file or folder: tokenizer.json, vocab.json, a SentencePiece model, or a tiktoken name."
    )
    merge_file: str | None = key(None, "File with the merges of a GPT2BPETokenizer.")
    online_dataserver_ips: str | list[str] = key("localhost", "Host or hosts that serve samples for dataset_impl online.")
    online_dataserver_ports: Whole | list[Whole] = key(10000, "TCP port or ports of those hosts.")


class ObjectiveArgs(Section):
    """What is minimised."""

    train_impl: Literal["normal", "dpo", "rm", "kto", "reinforce"] = key(
        "normal", "Objective: language modelling, DPO (arXiv 2305.18290), reward model, KTO (arXiv 2402.01306) or REINFORCE."
    )
    dpo_fp32: bool = key(True, "Form DPO's log-probabilities in fp32.")
    dpo_reference_free: bool = key(False, "Leave the reference model out of DPO's margin.")
    dpo_beta: float = key(0.1, "Strength with which DPO holds the policy near the reference.", gt=0)
    kto_fp32: bool = key(True, "Form KTO's log-probabilities in fp32.")
    kto_desirable_weight: float = key(1.0, "Weight of KTO samples with a positive reward.", ge=0)
    kto_undesirable_weight: float = key(1.0, "Weight of KTO samples with a negative reward.", ge=0)
    z_loss: float = key(0.0, "Weight of the squared scores in the loss of a reward model.", ge=0)
    kto_beta: float = key(0.1, "Strength with which KTO holds the policy near the reference.", gt=0)
    fp32_reinforce: bool = key(True, "Form REINFORCE's log-probabilities in fp32.")
    kl_impl: Literal["abs", "mse", "kl", "full"] = key(
        "mse", "Estimator of the distance to the reference in REINFORCE: per token (abs, mse, kl) or over the vocabulary (full)."
    )
    kl_div_beta: float = key(0.1, "Weight of that distance; above 0 a reference model is needed.", ge=0)
    reinforce_leave_one_out: bool = key(False, "Subtract from a reward the mean reward of the prompt's other samples.")
    ga_dataset: str | None = key(None, "Prefix of the data to unlearn; giving it turns gradient ascent on.")
    ga_dataset_impl: Literal["infer", "mmap"] = key("mmap", "Reader of the data to unlearn.")
    ga_interval: Whole | None = key(None, "Steps between two bursts of ascent, in ga_mode interval.", ge=1)
    ga_iters: Whole | None = key(None, "Ascent steps per burst, in ga_mode interval.", ge=1)
    ga_lr_scale: float = key(1.0, "Factor on the learning rate of ascent steps.", gt=0)
    ga_mode: Literal["interval", "interleaved"] = key("interval", "Ascent in bursts, or after every few descent steps.")
    ga_interleave_ratio: Whole = key(1, "Descent steps per ascent step, in ga_mode interleaved.", ge=1)
    ga_loss_threshold: float | None = key(None, "No ascent step is taken while the loss on the data to unlearn is at or below this.")
    ga_threshold_check_mode: Literal["per_step", "per_burst", "ema"] = key(
        "per_step", "What is compared with the threshold: each step's loss, the burst's first, or a moving average."
    )
    ga_threshold_skip_forward: bool = key(False, "Spare the forward pass too while the moving average is beyond the threshold.")
    gd_mode: bool = key(False, "Take gradient-difference steps: ascent on the forget data and weighted descent on the retain data.")
    gd_retain_dataset: str | None = key(None, "Prefix of the data to retain in gradient-difference steps.")
    gd_retain_dataset_impl: Literal["infer", "mmap"] = key("mmap", "Reader of the data to retain.")
    gd_retain_weight: float = key(40.0, "Weight of the retain loss against the forget loss.", ge=0)
    gd_log_separate_losses: bool = key(True, "Report forget, retain and summed loss apart.")
    serve_model_weights: bool = key(False, "Offer the current weights to rollout workers on this machine.")
    weight_server_port: Whole | list[Whole] = key(
        6000, "TCP port at which rank 0 serves weights, the others counting up from it; or one port per rank."
    )
    precompute_model_name: str | None = key(
        None, "Name in the file names of stored reference log-probabilities, which then replace the reference model."
    )
