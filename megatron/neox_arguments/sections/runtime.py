# SPDX-License-Identifier: Apache-2.0
"""Keys for processes and how they are started: parallel sizes, launcher, hosts."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from .base import DERIVED, NO_EFFECT, RUNTIME, Section, Whole


class RuntimeArgs(Section):
    """Which processes take part in a run, how they are started and how they share the work."""

    pipe_parallel_size: Whole = Field(
        0, ge=0, description="Number of pipeline stages; 0 trains one plain module, from 1 on the pipeline engine is used."
    )
    model_parallel_size: Whole = Field(1, ge=1, description="Number of devices that share every weight matrix (tensor parallelism).")
    context_parallel_size: Whole = Field(
        1,
        ge=1,
        description="Number of devices that share every sequence, for long ones: all-to-all over heads (arXiv 2309.14509) where it divides"
        " their number, else a ring (arXiv 2310.01889).",
    )
    pipe_partition_method: str = Field(
        "type:transformer|mlp",
        description="How layers are assigned to pipeline stages: parameters, uniform, or type:<regex on class names>.",
    )
    world_size: Whole | None = Field(
        None, ge=1, description="Number of processes in the run, equal to global_num_gpus.", json_schema_extra=DERIVED
    )
    is_pipe_parallel: bool = Field(
        False, description="Whether the pipeline engine is used, that is pipe_parallel_size >= 1.", json_schema_extra=DERIVED
    )
    sequence_parallel: bool = Field(
        False, description="Split norm and residual activations along the sequence over the tensor-parallel group (arXiv 2205.05198)."
    )
    distributed_backend: str = Field("nccl", description="Name of the torch.distributed backend: nccl on GPUs, gloo on CPUs.")
    local_rank: Whole | None = Field(
        None, ge=0, description="Number of this process on its host; the launcher sets it.", json_schema_extra=RUNTIME
    )
    rank: Whole | None = Field(
        None, ge=0, description="Number of this process in the whole run; the launcher sets it.", json_schema_extra=RUNTIME
    )
    lazy_mpu_init: bool = Field(
        False, description="Leave the set-up of process groups to an outer program and initialise weights on the CPU."
    )
    deepspeed_mpi: bool = Field(False, description="Let MPI tell each process its rank.")
    deepspeed_slurm: bool = Field(False, description="Let SLURM variables tell each process its rank; implies force_multi.")
    user_script: str | None = Field(None, description="Script that every process runs; taken from the command line of deepy.py.")
    global_num_gpus: Whole | None = Field(
        None,
        ge=1,
        description="Number of ranks of the run; if unset the hostfile's slots, else WORLD_SIZE, else the visible GPUs, else 1.",
    )
    hostfile: str | None = Field(None, description="File with one line 'host slots=N' per machine.")
    include: str | None = Field(None, description="Hosts and slots to use, written host1@host2:0,2; excludes `exclude`.")
    exclude: str | None = Field(None, description="Hosts and slots to leave out, written host1@host2:0,2; excludes `include`.")
    num_nodes: Whole = Field(-1, ge=-1, description="Use the first so many hosts of the hostfile; -1 uses every host.")
    num_gpus: Whole | None = Field(None, ge=1, description="Use the first so many devices of every host.")
    master_port: Whole = Field(29500, ge=1, le=65535, description="TCP port at which the processes find each other.")
    master_addr: str | None = Field(None, description="Host name or address at which the processes find each other.")
    launcher: Literal["pdsh", "openmpi", "mvapich", "slurm", "mpich", "impi", "local"] = Field(
        "pdsh", description="Program that reaches the other machines of a run; local means this machine only, whatever hostfile there is."
    )
    force_multi: bool = Field(False, description="Go through the multi-machine launcher even when there is one host.")
    autotuning_run: Literal["tune", "run"] | None = Field(
        None, description="What DeepSpeed's autotuner is asked to do, from --autotuning of deepy.py."
    )
    no_ssh_check: bool = Field(False, description="Do not try an ssh connection to every host before the launch.")
    comment: str | None = Field(None, description="Comment that SLURM attaches to the job step.")
    account: str | None = Field(None, description="SLURM account that is charged for the job step.")
    deepscale: bool = Field(False, description="Kept so that old configs load.", json_schema_extra=NO_EFFECT)
    deepscale_config: str | None = Field(None, description="Kept so that old configs load.", json_schema_extra=NO_EFFECT)
    use_shared_fs: bool = Field(
        True, description="Whether all hosts see the same files; if not, one process per host builds the index maps, else one in all."
    )
    fused_kernels_build_path: str | None = Field(None, description="Folder for compiled kernels; unset keeps them beside the package.")
    adlr_autoresume: bool = Field(False, description="Ask a cluster's auto-resume service whether to stop.")
    adlr_autoresume_object: None = Field(None, description="Handle of the auto-resume service of a running job.", json_schema_extra=RUNTIME)
    adlr_autoresume_interval: Whole = Field(
        1000, ge=1, description="Iterations between two questions to the auto-resume service.", json_schema_extra=NO_EFFECT
    )
    deepspeed: bool = Field(True, description="Train with DeepSpeed; there is no other engine, so this stays true.")
