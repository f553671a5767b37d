# SPDX-License-Identifier: Apache-2.0
"""Keys for processes and their launch, for the length and portions of a run, and for text generation and evaluation."""

from __future__ import annotations

from typing import Literal

from .base import DERIVED, NO_EFFECT, RUNTIME, Block, Section, Whole, key


class RunArgs(Section):
    """How long training lasts, in what portions, and what is recomputed to save memory."""

    seed: Whole = key(1234, "Seed of Python, numpy, torch and of the order of the data.", ge=0)
    train_iters: Whole | None = key(None, "Number of optimizer steps; excludes train_epochs.", ge=0)
    train_epochs: Whole | None = key(
        None, "Number of passes over the training data; excludes train_iters and needs pack_impl packed.", ge=1
    )
    eval_iters: Whole = key(100, "Batches per validation or test pass; 0 turns both off.", ge=0)
    eval_interval: Whole = key(1000, "Training steps between two validation passes.", ge=1)
    do_train: bool | None = key(None, "Whether there is training to do; unset follows from data and iterations.")
    do_valid: bool | None = key(None, "Whether to validate; unset follows from data and eval_iters.")
    do_test: bool | None = key(None, "Whether to test after training; unset follows from data and eval_iters.")
    exit_interval: Whole | None = key(None, "End the run at the first step that is a multiple of this.", ge=1)
    exit_duration_in_mins: float | None = key(
        None, "End the run, with a checkpoint, at the first step that ends after so many minutes of training.", gt=0
    )
    exit_margin_in_secs: float = key(
        60.0, "Time to keep free before Slurm ends the job, besides what steps and checkpoints are seen to take.", ge=0
    )
    grace_in_secs: float | None = key(
        None, "Seconds from a request to stop to the SIGKILL at this site; a stop that takes longer is warned of.", gt=0
    )
    replica_check_interval: Whole | None = key(
        None,
        "Compare the weights of ranks that should hold the same, bit for bit, at the start and after every so many steps; where they "
        "differ, end the run and name rank and tensor. With ZeRO 1 and 2 and with bfloat16 it sees only what went wrong since the last "
        "update, which hands out all weights anew; with ZeRO 3 nothing is held twice.",
        ge=1,
    )
    batch_size: Whole | None = key(None, "Another name of train_micro_batch_size_per_gpu.", DERIVED, ge=1)
    train_batch_size: Whole | None = key(
        None, "Samples per optimizer step over all ranks = micro batch * accumulation steps * data-parallel ranks.", ge=1
    )
    train_micro_batch_size_per_gpu: Whole | None = key(None, "Samples per rank in one forward pass.", ge=1)
    gradient_accumulation_steps: Whole | None = key(
        None, "Forward and backward passes per optimizer step; unset follows from the batch sizes, else 1.", ge=1
    )
    checkpoint_activations: bool = key(False, "Keep few activations and recompute the others in the backward pass.")
    checkpoint_num_layers: Whole = key(1, "Layers per recomputed span, counted from a pipeline stage's first one.", ge=1)
    checkpoint_granularity: Literal["full", "selective"] = key(
        "full",
        "What is recomputed: full, all of a span but its input; selective, what is cheap (norms, activation functions, rotary embedding, "
        "dropout), while results of weight products and fused attention are kept (arXiv 2205.05198).",
    )
    checkpoint_in_cpu: bool = key(False, "Let the inputs of recomputed spans wait in host memory.")
    partition_activations: bool = key(False, "Let each tensor-parallel rank keep its part only of the inputs of recomputed spans.")
    activation_checkpointing: Block = key(
        None,
        "DeepSpeed's block: partition_activations and cpu_checkpointing replace the single keys partition_activations and "
        "checkpoint_in_cpu; its other entries have no effect, as the keys of the same meaning.",
    )
    deepspeed_activation_checkpointing: bool = key(
        True, "Has no effect: recomputation is PyTorch's, whose options include DeepSpeed's.", NO_EFFECT
    )
    contiguous_checkpointing: bool = key(False, "Has no effect: PyTorch's allocator needs no buffer against fragmentation.", NO_EFFECT)
    synchronize_each_layer: bool = key(
        False, "Has no effect: recomputation is ordered by the device's stream and needs no waiting.", NO_EFFECT
    )
    profile_backward: bool = key(False, "Has no effect: the profiler (profile: true) shows recomputation.", NO_EFFECT)
    curriculum_learning: Block = key(
        None, "Schedule of growing sequence lengths: enabled, curriculum_type, min_difficulty, max_difficulty, schedule_type, ..."
    )
    curriculum_seqlen: Whole = key(0, "Sequence length of the curriculum at this step.", RUNTIME, ge=0)
    char_level_ppl: bool = key(False, "Report validation perplexity per character of the decoded text beside perplexity per token.")
    torch_compile: bool = key(False, "Compile the blocks with torch.compile.")
    nonfinite_policy: Literal["stop", "skip", "rollback"] = key(
        "stop",
        "What follows where a loss or gradient is not finite, which is seen before the update: stop, end with status 78; skip, go on "
        "without the update; rollback, go back to the newest checkpoint and leave the step's samples out. fp16's loss scale is another "
        "matter.",
    )
    nonfinite_limit: Whole = key(10, "Steps in a row that nonfinite_policy skip may skip; one more ends the run.", ge=1)
    rollback_limit: Whole = key(3, "How often a run, its resumes included, may go back; once more ends it.", ge=1)
    loss_spike_factor: float | None = key(
        None, "A loss above this many times the median of the losses before is a spike; unset does not look.", gt=1
    )
    loss_spike_window: Whole = key(50, "Number of ordinary losses whose median a loss is compared with.", ge=1)
    loss_spike_patience: Whole = key(3, "Steps in a row that must be spikes before loss_spike_policy acts.", ge=1)
    loss_spike_policy: Literal["warn", "stop", "rollback"] = key(
        "warn",
        "What follows a spike: warn, a line in the log; stop, end with status 78; rollback, go back to a checkpoint from before its first "
        "step and leave its samples out.",
    )


class TextArgs(Section):
    """What is generated, by what sampling, and which tasks are evaluated."""

    text_gen_type: Literal["unconditional", "input-file", "interactive", "precompute"] | None = key(
        None, "Where prompts come from; unset is input-file when sample_input_file is given, else unconditional."
    )
    temperature: float = key(0.0, "Divisor of the logits before sampling; 0 takes the most likely token.", ge=0)
    top_p: float = key(0.0, "Sample from the likeliest tokens that together reach this probability; 0 is off.", ge=0, le=1)
    top_k: Whole = key(0, "Sample from so many of the likeliest tokens; 0 is off.", ge=0)
    return_logits: bool = key(False, "Write the logits beside each generated text.")
    maximum_tokens: Whole = key(64, "Largest number of tokens to generate per prompt.", ge=1)
    prompt_end: str = key("\n", "String that ends a prompt, in the input file and in interactive mode.")
    sample_input_file: str | None = key(None, "File to read prompts from.")
    sample_output_file: str | None = key("samples.txt", "File to write generated texts to, one JSON object per line.")
    num_samples: Whole = key(1, "Number of texts to generate in unconditional mode.", ge=1)
    recompute: bool = key(False, "Run the whole context anew for every token instead of keeping keys and values.")
    eval_results_prefix: str = key("", "Start of the name of the file with evaluation results.")
    eval_tasks: list[str] | None = key(None, "Names of LM Evaluation Harness tasks, for eval.py and at every validation.")


class RuntimeArgs(Section):
    """Which processes take part in a run, how they are started and how they share the work."""

    pipe_parallel_size: Whole = key(0, "Number of pipeline stages; 0 trains one plain module, from 1 on the pipeline engine is used.", ge=0)
    model_parallel_size: Whole = key(1, "Number of devices that share every weight matrix (tensor parallelism).", ge=1)
    context_parallel_size: Whole = key(
        1,
        "Number of devices that share every sequence, for long ones: all-to-all over heads (arXiv 2309.14509) where it divides their "
        "number, else a ring (arXiv 2310.01889).",
        ge=1,
    )
    pipe_partition_method: str = key(
        "type:transformer|mlp", "How layers are assigned to pipeline stages: parameters, uniform, or type:<regex on class names>."
    )
    world_size: Whole | None = key(None, "Number of processes in the run, equal to global_num_gpus.", DERIVED, ge=1)
    is_pipe_parallel: bool = key(False, "Whether the pipeline engine is used, that is pipe_parallel_size >= 1.", DERIVED)
    sequence_parallel: bool = key(
        False, "Split norm and residual activations along the sequence over the tensor-parallel group (arXiv 2205.05198)."
    )
    distributed_backend: str = key("nccl", "Name of the torch.distributed backend: nccl on GPUs, gloo on CPUs.")
    local_rank: Whole | None = key(None, "Number of this process on its host; the launcher sets it.", RUNTIME, ge=0)
    rank: Whole | None = key(None, "Number of this process in the whole run; the launcher sets it.", RUNTIME, ge=0)
    lazy_mpu_init: bool = key(False, "Leave the set-up of process groups to an outer program and initialise weights on the CPU.")
    deepspeed_mpi: bool = key(False, "Let MPI tell each process its rank.")
    deepspeed_slurm: bool = key(False, "Let SLURM variables tell each process its rank; implies force_multi.")
    user_script: str | None = key(None, "Script that every process runs; taken from the command line of deepy.py.")
    global_num_gpus: Whole | None = key(
        None, "Number of ranks of the run; if unset the hostfile's slots, else WORLD_SIZE, else the visible GPUs, else 1.", ge=1
    )
    hostfile: str | None = key(None, "File with one line 'host slots=N' per machine.")
    include: str | None = key(None, "Hosts and slots to use, written host1@host2:0,2; excludes `exclude`.")
    exclude: str | None = key(None, "Hosts and slots to leave out, written host1@host2:0,2; excludes `include`.")
    num_nodes: Whole = key(-1, "Use the first so many hosts of the hostfile; -1 uses every host.", ge=-1)
    num_gpus: Whole | None = key(None, "Use the first so many devices of every host.", ge=1)
    master_port: Whole = key(29500, "TCP port at which the processes find each other.", ge=1, le=65535)
    master_addr: str | None = key(None, "Host name or address at which the processes find each other.")
    launcher: Literal["pdsh", "openmpi", "mvapich", "slurm", "mpich", "impi", "local"] = key(
        "pdsh", "Program that reaches the other machines of a run; local means this machine only, whatever hostfile there is."
    )
    force_multi: bool = key(False, "Go through the multi-machine launcher even when there is one host.")
    autotuning_run: Literal["tune", "run"] | None = key(None, "What DeepSpeed's autotuner is asked to do, from --autotuning of deepy.py.")
    no_ssh_check: bool = key(False, "Do not try an ssh connection to every host before the launch.")
    comment: str | None = key(None, "Comment that SLURM attaches to the job step.")
    account: str | None = key(None, "SLURM account that is charged for the job step.")
    deepscale: bool = key(False, "Kept so that old configs load.", NO_EFFECT)
    deepscale_config: str | None = key(None, "Kept so that old configs load.", NO_EFFECT)
    use_shared_fs: bool = key(
        True, "Whether all hosts see the same files; if not, one process per host builds the index maps, else one in all."
    )
    fused_kernels_build_path: str | None = key(None, "Folder for compiled kernels; unset keeps them beside the package.")
    adlr_autoresume: bool = key(False, "Ask a cluster's auto-resume service whether to stop.")
    adlr_autoresume_object: None = key(None, "Handle of the auto-resume service of a running job.", RUNTIME)
    adlr_autoresume_interval: Whole = key(1000, "Iterations between two questions to the auto-resume service.", NO_EFFECT, ge=1)
    deepspeed: bool = key(True, "Train with DeepSpeed; there is no other engine, so this stays true.")
