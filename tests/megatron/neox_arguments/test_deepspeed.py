# SPDX-License-Identifier: Apache-2.0
"""The DeepSpeed configuration, checked key by key and against DeepSpeed's own reader."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from megatron.errors import ConfigError
from megatron.neox_arguments import NeoXArgs
from megatron.neox_arguments.deepspeed import deepspeed_config
from megatron.neox_arguments.flags import encode_config

BASE: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "seq_length": 32,
    "max_position_embeddings": 32,
    "train_iters": 10,
    "train_batch_size": 16,
    "train_micro_batch_size_per_gpu": 4,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
    "vocab_file": "tokenizer.json",
    "tokenizer_type": "HFTokenizer",
    "data_path": "text_document",
    "global_num_gpus": 2,
}


def config(**more: Any) -> dict[str, Any]:
    return deepspeed_config(NeoXArgs.from_dict(BASE | more))


def test_batch_clipping_and_no_optimizer() -> None:
    made = config()
    assert (made["train_batch_size"], made["train_micro_batch_size_per_gpu"], made["gradient_accumulation_steps"]) == (16, 4, 2)
    assert made["gradient_clipping"] == 1.0
    assert config(gradient_clipping=0.5)["gradient_clipping"] == 0.5
    assert (made["zero_allow_untested_optimizer"], made["zero_force_ds_cpu_optimizer"]) == (True, False)
    assert not {"optimizer", "scheduler", "fp16", "bf16", "data_types", "activation_checkpointing"} & set(made)
    assert made["zero_optimization"]["stage"] == 0


def test_bfloat16_sums_gradients_in_fp32() -> None:
    """Stage 0 has no fp32 sums in DeepSpeed, so it runs as stage 1, unless bf16 sums are asked for."""
    for stage in (0, 1, 2):
        made = config(precision="bfloat16", zero_optimization={"stage": stage})
        assert made["bf16"] == {"enabled": True}
        assert made["data_types"] == {"grad_accum_dtype": "fp32"}
        assert made["zero_optimization"]["stage"] == max(stage, 1)
    kept = config(precision="bfloat16", data_types={"grad_accum_dtype": "bf16"})
    assert kept["data_types"] == {"grad_accum_dtype": "bf16"}
    assert kept["zero_optimization"]["stage"] == 0


def test_fp16_takes_the_loss_scale_keys_and_the_dict_over_them() -> None:
    made = config(precision="fp16", loss_scale=128.0, hysteresis=3, fp16={"enabled": True, "type": "fp16", "initial_scale_power": 12})[
        "fp16"
    ]
    assert made == {
        "enabled": True,
        "loss_scale": 128.0,
        "hysteresis": 3,
        "loss_scale_window": 1000,
        "min_loss_scale": 1.0,
        "initial_scale_power": 12,
    }
    assert config(fp16={"enabled": True, "loss_scale": 0})["fp16"]["loss_scale"] == 0


def test_blocks_are_handed_over() -> None:
    made = config(
        comms_logger={"enabled": True},
        csv_monitor={"enabled": True, "output_path": "x"},
        wandb={"enabled": False},
        fp32_allreduce=True,
        steps_per_print=7,
        wall_clock_breakdown=True,
        prescale_gradients=True,
        deepspeed_extra_args={"memory_breakdown": True, "steps_per_print": 7},
    )
    assert made["comms_logger"] == {"enabled": True}
    assert made["csv_monitor"] == {"enabled": True, "output_path": "x"}
    assert made["communication_data_type"] == "fp32"
    assert (made["steps_per_print"], made["wall_clock_breakdown"], made["memory_breakdown"], made["prescale_gradients"]) == (
        7,
        True,
        True,
        True,
    )


def test_deepspeed_is_told_nothing_of_activation_checkpointing() -> None:
    """Recomputation is the model's: DeepSpeed would only keep the block."""
    made = config(checkpoint_activations=True, partition_activations=True, activation_checkpointing={"cpu_checkpointing": True})
    assert "activation_checkpointing" not in made


@pytest.mark.parametrize("extra", [{"gradient_clipping": 2.0}, {"optimizer": {"type": "Adam"}}, {"zero_optimization": {"stage": 3}}])
def test_extra_args_may_not_contradict_our_keys(extra: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"deepspeed_extra_args.{next(iter(extra))}"):
        config(deepspeed_extra_args=extra)


def test_what_deepspeed_took_out_is_refused_before_a_start() -> None:
    with pytest.raises(ConfigError) as caught:
        config(sparse_gradients=True, elasticity={"enabled": True}, amp={"enabled": False})
    assert "DeepSpeed no longer has sparse_gradients" in caught.value.report()
    assert "DeepSpeed no longer has elasticity" in caught.value.report()
    assert "amp" not in caught.value.report()


def test_one_bit_adam_went_out_of_deepspeed() -> None:
    with pytest.raises(ConfigError, match="DeepSpeed no longer has OneBitAdam"):
        config(optimizer={"type": "OneBitAdam", "params": {"lr": 2e-3, "freeze_step": 5}})
    assert "optimizer" not in config() and "scheduler" not in config()


def test_deepspeed_reads_every_kind_of_it() -> None:
    """DeepSpeed's reader, in a process of its own (it imports torch), takes the values over as meant."""
    kinds = [
        config(),
        config(precision="bfloat16", zero_optimization={"stage": 2}),
        config(precision="fp16", communication_data_type="fp32"),
    ]
    program = (
        "import base64, json, sys\n"
        "from deepspeed.runtime.config import DeepSpeedConfig\n"
        "for made in json.loads(base64.urlsafe_b64decode(sys.argv[1]))['kinds']:\n"
        "    made['train_batch_size'] = made['train_micro_batch_size_per_gpu'] * made['gradient_accumulation_steps']\n"
        "    read = DeepSpeedConfig(made)\n"
        "    print(read.gradient_clipping, read.zero_optimization_stage, read.bfloat16_config.enabled, read.float16_config.enabled,\n"
        "          read.grad_accum_dtype)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, encode_config({"kinds": kinds})], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert [line.split() for line in done.stdout.splitlines() if line[:3] == "1.0"] == [
        ["1.0", "0", "False", "False", "None"],
        ["1.0", "2", "True", "False", "fp32"],
        ["1.0", "0", "False", "True", "None"],
    ]
