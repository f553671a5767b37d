# SPDX-License-Identifier: Apache-2.0
"""Keys for the length and grain of a run (iterations, batch sizes, recomputation), and for text generation and evaluation."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from .base import DERIVED, NO_EFFECT, RUNTIME, Section, Whole


class RunArgs(Section):
    """How long training lasts, in what portions, and what is recomputed to save memory."""

    seed: Whole = Field(1234, ge=0, description="Seed of Python, numpy, torch and of the order of the data.")
    train_iters: Whole | None = Field(None, ge=0, description="Number of optimizer steps; excludes train_epochs.")
    train_epochs: Whole | None = Field(
        None, ge=1, description="Number of passes over the training data; excludes train_iters and needs pack_impl packed."
    )
    eval_iters: Whole = Field(100, ge=0, description="Batches per validation or test pass; 0 turns both off.")
    eval_interval: Whole = Field(1000, ge=1, description="Training steps between two validation passes.")
    do_train: bool | None = Field(None, description="Whether there is training to do; unset follows from data and iterations.")
    do_valid: bool | None = Field(None, description="Whether to validate; unset follows from data and eval_iters.")
    do_test: bool | None = Field(None, description="Whether to test after training; unset follows from data and eval_iters.")
    exit_interval: Whole | None = Field(None, ge=1, description="End the run at the first step that is a multiple of this.")
    exit_duration_in_mins: float | None = Field(
        None, gt=0, description="End the run, with a checkpoint, at the first step that ends after so many minutes of training."
    )
    exit_margin_in_secs: float = Field(
        60.0,
        ge=0,
        description="Time to keep free before Slurm ends the job, besides what steps and checkpoints are seen to take.",
    )
    grace_in_secs: float | None = Field(
        None,
        gt=0,
        description="Seconds from a request to stop to the SIGKILL at this site; a stop that takes longer is warned of.",
    )
    replica_check_interval: Whole | None = Field(
        None,
        ge=1,
        description="Compare the weights of ranks that should hold the same, bit for bit, at the start and after every so many steps;"
        " where they differ, end the run and name rank and tensor. With ZeRO 1 and 2 and with bfloat16 it sees only what went wrong"
        " since the last update, which hands out all weights anew; with ZeRO 3 nothing is held twice.",
    )
    batch_size: Whole | None = Field(None, ge=1, description="Another name of train_micro_batch_size_per_gpu.", json_schema_extra=DERIVED)
    train_batch_size: Whole | None = Field(
        None, ge=1, description="Samples per optimizer step over all ranks = micro batch * accumulation steps * data-parallel ranks."
    )
    train_micro_batch_size_per_gpu: Whole | None = Field(None, ge=1, description="Samples per rank in one forward pass.")
    gradient_accumulation_steps: Whole | None = Field(
        None, ge=1, description="Forward and backward passes per optimizer step; unset follows from the batch sizes, else 1."
    )
    checkpoint_activations: bool = Field(False, description="Keep few activations and recompute the others in the backward pass.")
    checkpoint_num_layers: Whole = Field(1, ge=1, description="Layers per recomputed span, counted from a pipeline stage's first one.")
    checkpoint_granularity: Literal["full", "selective"] = Field(
        "full",
        description="What is recomputed: full, all of a span but its input; selective, what is cheap (norms, activation functions, rotary"
        " embedding, dropout), while results of weight products and fused attention are kept (arXiv 2205.05198).",
    )
    checkpoint_in_cpu: bool = Field(False, description="Let the inputs of recomputed spans wait in host memory.")
    partition_activations: bool = Field(
        False, description="Let each tensor-parallel rank keep its part only of the inputs of recomputed spans."
    )
    activation_checkpointing: dict[str, Any] | None = Field(
        None,
        description="DeepSpeed's block: partition_activations and cpu_checkpointing replace the single keys partition_activations and"
        " checkpoint_in_cpu; its other entries have no effect, as the keys of the same meaning.",
    )
    deepspeed_activation_checkpointing: bool = Field(
        True, description="Has no effect: recomputation is PyTorch's, whose options include DeepSpeed's.", json_schema_extra=NO_EFFECT
    )
    contiguous_checkpointing: bool = Field(
        False, description="Has no effect: PyTorch's allocator needs no buffer against fragmentation.", json_schema_extra=NO_EFFECT
    )
    synchronize_each_layer: bool = Field(
        False,
        description="Has no effect: recomputation is ordered by the device's stream and needs no waiting.",
        json_schema_extra=NO_EFFECT,
    )
    profile_backward: bool = Field(
        False, description="Has no effect: the profiler (profile: true) shows recomputation.", json_schema_extra=NO_EFFECT
    )
    curriculum_learning: dict[str, Any] | None = Field(
        None,
        description="Schedule of growing sequence lengths: enabled, curriculum_type, min_difficulty, max_difficulty, schedule_type, ...",
    )
    curriculum_seqlen: Whole = Field(0, ge=0, description="Sequence length of the curriculum at this step.", json_schema_extra=RUNTIME)
    char_level_ppl: bool = Field(
        False, description="Report validation perplexity per character of the decoded text beside perplexity per token."
    )
    torch_compile: bool = Field(False, description="Compile the blocks with torch.compile.")
    nonfinite_policy: Literal["stop", "skip", "rollback"] = Field(
        "stop",
        description="What follows where a loss or gradient is not finite, which is seen before the update: stop, end with status 78; skip,"
        " go on without the update; rollback, go back to the newest checkpoint and leave the step's samples out. fp16's loss scale is"
        " another matter.",
    )
    nonfinite_limit: Whole = Field(10, ge=1, description="Steps in a row that nonfinite_policy skip may skip; one more ends the run.")
    rollback_limit: Whole = Field(3, ge=1, description="How often a run, its resumes included, may go back; once more ends it.")
    loss_spike_factor: float | None = Field(
        None, gt=1, description="A loss above this many times the median of the losses before is a spike; unset does not look."
    )
    loss_spike_window: Whole = Field(50, ge=1, description="Number of ordinary losses whose median a loss is compared with.")
    loss_spike_patience: Whole = Field(3, ge=1, description="Steps in a row that must be spikes before loss_spike_policy acts.")
    loss_spike_policy: Literal["warn", "stop", "rollback"] = Field(
        "warn",
        description="What follows a spike: warn, a line in the log; stop, end with status 78; rollback, go back to a checkpoint from before"
        " its first step and leave its samples out.",
    )


class TextArgs(Section):
    """What is generated, by what sampling, and which tasks are evaluated."""

    text_gen_type: Literal["unconditional", "input-file", "interactive", "precompute"] | None = Field(
        None, description="Where prompts come from; unset is input-file when sample_input_file is given, else unconditional."
    )
    temperature: float = Field(0.0, ge=0, description="Divisor of the logits before sampling; 0 takes the most likely token.")
    top_p: float = Field(0.0, ge=0, le=1, description="Sample from the likeliest tokens that together reach this probability; 0 is off.")
    top_k: Whole = Field(0, ge=0, description="Sample from so many of the likeliest tokens; 0 is off.")
    return_logits: bool = Field(False, description="Write the logits beside each generated text.")
    maximum_tokens: Whole = Field(64, ge=1, description="Largest number of tokens to generate per prompt.")
    prompt_end: str = Field("\n", description="String that ends a prompt, in the input file and in interactive mode.")
    sample_input_file: str | None = Field(None, description="File to read prompts from.")
    sample_output_file: str | None = Field("samples.txt", description="File to write generated texts to, one JSON object per line.")
    num_samples: Whole = Field(1, ge=1, description="Number of texts to generate in unconditional mode.")
    recompute: bool = Field(False, description="Run the whole context anew for every token instead of keeping keys and values.")
    eval_results_prefix: str = Field("", description="Start of the name of the file with evaluation results.")
    eval_tasks: list[str] | None = Field(None, description="Names of LM Evaluation Harness tasks, for eval.py and at every validation.")
