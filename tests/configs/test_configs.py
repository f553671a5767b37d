# SPDX-License-Identifier: Apache-2.0
"""Every shipped config loads beside local_setup.yml and is the model it says it is, by its published number of parameters."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron.neox_arguments import NeoXArgs
from megatron.neox_arguments.deepspeed import deepspeed_config

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
TOGETHER = ["local_setup.yml", "text_generation.yml"]
COMPLETE = ["quickstart.yml"]

# Model file -> (tokens of its tokenizer, published total of parameters). Sources: Pythia: the model cards of EleutherAI/pythia-*
# and arXiv 2304.01373, table 1; GPT-2, Llama, Mistral: number of elements in the published safetensors of openai-community/gpt2*,
# meta-llama/Llama-2-*-hf, Meta-Llama-3-*, Llama-3.2-1B, mistralai/Mistral-7B-v0.1.
PUBLISHED = {
    "pythia/14M.yml": (50277, 14_067_712),
    "pythia/31M.yml": (50277, 30_494_720),
    "pythia/70M.yml": (50277, 70_426_624),
    "pythia/160M.yml": (50277, 162_322_944),
    "pythia/410M.yml": (50277, 405_334_016),
    "pythia/1B.yml": (50277, 1_011_781_632),
    "pythia/1.4B.yml": (50277, 1_414_647_808),
    "pythia/2.8B.yml": (50277, 2_775_208_960),
    "pythia/6.9B.yml": (50277, 6_857_302_016),
    "pythia/12B.yml": (50277, 11_846_072_320),
    "gpt2/small.yml": (50257, 124_439_808),
    "gpt2/medium.yml": (50257, 354_823_168),
    "gpt2/large.yml": (50257, 774_030_080),
    "gpt2/xl.yml": (50257, 1_557_611_200),
    "llama2/7B.yml": (32000, 6_738_415_616),
    "llama2/13B.yml": (32000, 13_015_864_320),
    "llama2/70B.yml": (32000, 68_976_648_192),
    "llama3/8B.yml": (128256, 8_030_261_248),
    "llama3/70B.yml": (128256, 70_553_706_496),
    "llama3.2/1B.yml": (128256, 1_235_814_400),
    "mistral/7B.yml": (32000, 7_241_732_096),
}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "DLTS_HOSTFILE"):
        monkeypatch.delenv(name, raising=False)


def load(*names: str, **overwrites: int) -> NeoXArgs:
    return NeoXArgs.from_ymls([str(CONFIGS / name) for name in names], overwrites=overwrites)


def test_every_file_is_covered_here() -> None:
    models = {path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.yml")}
    assert {name for name in models if not name.startswith("sites/")} == {*PUBLISHED, *TOGETHER, *COMPLETE}


def test_every_model_loads_on_eight_ranks_and_for_deepspeed() -> None:
    for name in PUBLISHED:
        args = load(name, "local_setup.yml", global_num_gpus=8)
        made = deepspeed_config(args)
        assert made["train_batch_size"] == args.run.train_batch_size, name
        assert made["gradient_clipping"] == 1.0 and made["bf16"]["enabled"], name
        assert args.ignored_keys() == (), name
        assert args.optim.optimizer_type == "adamw", name
        # One tenth of the peak is where a cosine ends, as published for all these families.
        assert args.optim.min_lr == pytest.approx(args.optim.lr / 10), name


def test_every_model_has_the_published_number_of_parameters() -> None:
    from megatron.model.build_spec import build_spec
    from megatron.model.slots import parameter_count

    found = {}
    for name, (tokens, _) in PUBLISHED.items():
        args = load(name, "local_setup.yml", global_num_gpus=8)
        multiple = args.model.make_vocab_size_divisible_by * args.runtime.model_parallel_size
        found[name] = parameter_count(build_spec(args.replace(padded_vocab_size=-(-tokens // multiple) * multiple)))
    assert found == {name: count for name, (_, count) in PUBLISHED.items()}


def test_quickstart_is_a_small_model_for_one_to_eight_ranks() -> None:
    from megatron.model.build_spec import build_spec
    from megatron.model.slots import parameter_count

    for ranks in (1, 2, 4, 8):
        args = load("quickstart.yml", global_num_gpus=ranks)
        assert args.run.train_batch_size == 8
        assert args.run.gradient_accumulation_steps == 1
    assert args.checkpoint.save == args.checkpoint.load == "checkpoints/quickstart"
    assert 3_000_000 < parameter_count(build_spec(args.replace(padded_vocab_size=4096))) < 4_000_000
    load("quickstart.yml", "text_generation.yml")
