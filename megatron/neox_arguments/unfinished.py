# SPDX-License-Identifier: Apache-2.0
"""Keys that ask for what is not built yet, with what to do instead, and keys a user set that do nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from .problems import ConfigProblems, Problem
from .sections import SECTION_OF, SECTIONS
from .sections.run import RunArgs, RuntimeArgs


@dataclass(frozen=True)
class Unfinished:
    """A feature that is not built yet.

    asked:    whether a value of `key` asks for it
    instead:  what the user does instead; "" = remove the key
    training: whether training would use it; False where only another script does
    """

    feature: str
    key: str
    asked: Callable[[Any], bool] = bool
    instead: str = ""
    training: bool = True

    def problem(self, where: str) -> Problem:
        """What is told about a value found at `where`."""
        fix = self.instead or f"remove {self.key}, or use a version that has {self.feature}"
        return Problem(f"{self.key} asks for {self.feature}: not built yet", where=where, fix=fix, keys=(self.key,))


def unfinished(args: Any) -> list[Problem]:
    """What a NeoXArgs asks for that training would need and cannot have yet."""
    return [
        row.problem(str(args.origin(row.key)))
        for row in UNFINISHED
        if row.training and row.asked(getattr(getattr(args, SECTION_OF[row.key]), row.key))
    ]


def refuse_unfinished(args: Any) -> None:
    """Raise ConfigProblems with everything asked for that training cannot have yet."""
    if problems := unfinished(args):
        raise ConfigProblems(problems)


def refuse_value(key: str, value: Any) -> None:
    """Raise ConfigProblems if this value of a key asks for what is not built yet; for whoever would have to build it."""
    if problems := [row.problem(key) for row in UNFINISHED if row.key == key and row.asked(value)]:
        raise ConfigProblems(problems)


def _on(block: Mapping[str, Any] | None) -> bool:
    return bool(block and block.get("enabled"))


def _among(*names: str) -> Callable[[Any], bool]:
    def asked(value: Any) -> bool:
        values: Iterable[Any] = value if isinstance(value, list) else (value,)
        return any(item in names for item in values)

    return asked


def _above(limit: float) -> Callable[[Any], bool]:
    return lambda value: value is not None and value > limit


_ATTENTION: Final = "use the layer types global and flash in attention_config"

# One row per feature; whoever builds a feature deletes its row.
UNFINISHED: Final[tuple[Unfinished, ...]] = (
    Unfinished("Mamba layers", "attention_config", _among("mamba"), _ATTENTION),
    Unfinished("RWKV layers", "attention_config", _among("rwkv"), _ATTENTION),
    Unfinished("gMLP layers", "attention_config", _among("gmlp", "amlp"), _ATTENTION),
    Unfinished(
        "sparse attention", "attention_config", _among("local", "sparse_fixed", "sparse_variable", "bigbird", "bslongformer"), _ATTENTION
    ),
    Unfinished("mixture-of-experts layers", "moe_num_experts", _above(1), "set moe_num_experts: 1"),
    Unfinished("Transformer Engine", "te_columnparallel"),
    Unfinished("Transformer Engine", "te_rowparallel"),
    Unfinished("Transformer Engine", "te_layernorm_mlp"),
    Unfinished("Transformer Engine", "te_mha"),
    Unfinished("Transformer Engine", "te_fp8_mha"),
    Unfinished("Transformer Engine norms", "norm", _among("te_rmsnorm", "te_layernorm"), "set norm: rmsnorm or layernorm"),
    Unfinished("post-norm blocks", "norm_placement", _among("post"), "set norm_placement: pre"),
    Unfinished("soft prompts", "soft_prompt_tuning", _on),
    Unfinished("preference and reward objectives", "train_impl", _among("dpo", "rm", "kto", "reinforce"), "set train_impl: normal"),
    Unfinished("pairwise and online data", "dataset_impl", lambda value: value != "gpt2", "set dataset_impl: gpt2"),
    Unfinished("the cached data format", "data_impl", _among("cached"), "set data_impl: mmap"),
    Unfinished("gradient-ascent unlearning", "ga_dataset"),
    Unfinished("gradient-difference unlearning", "gd_retain_dataset"),
    Unfinished("gradient-difference unlearning", "gd_mode"),
    Unfinished("precomputed reference log-probabilities", "precompute_model_name"),
    Unfinished("the weight server", "serve_model_weights"),
    Unfinished("8-bit optimizers", "use_bnb_optimizer", instead="set use_bnb_optimizer: false"),
    Unfinished("the sequence-length curriculum", "curriculum_learning", _on),
    Unfinished("autotuning", "autotuning", _on),
    Unfinished("elastic training", "elasticity", _on),
    Unfinished("cluster auto-resume", "adlr_autoresume"),
    Unfinished("evaluation tasks", "eval_tasks", instead="remove eval_tasks: eval.py reports the validation and test loss", training=False),
    Unfinished(
        "precomputed log-probabilities",
        "text_gen_type",
        _among("precompute"),
        "set text_gen_type to unconditional, input-file or interactive",
        training=False,
    ),
)


# Single key -> the entry of the activation_checkpointing block that replaces it.
RECOMPUTE_ENTRIES: Final = {"partition_activations": "partition_activations", "checkpoint_in_cpu": "cpu_checkpointing"}
# What only refines checkpoint_activations.
_RECOMPUTE: Final = ("checkpoint_num_layers", "checkpoint_granularity", *RECOMPUTE_ENTRIES)

NO_EFFECT_KEYS: Final[Mapping[str, Any]] = {
    key: info.default
    for section in SECTIONS.values()
    for key, info in section.model_fields.items()
    if isinstance(info.json_schema_extra, dict) and info.json_schema_extra.get("effect") == "none"
}


def idle_keys(given: Mapping[str, Any], run: RunArgs, runtime: RuntimeArgs) -> tuple[str, ...]:
    """Names of keys and of a block's entries, in the user's order.

    Beside those that never do anything: refinements of recomputation where nothing is recomputed, and `sequence_parallel` where there
    are no tensor ranks to share a sequence.
    given: keys the user set, as set; run, runtime: these sections, resolved
    """
    always = [key for key, value in given.items() if key in NO_EFFECT_KEYS and value != NO_EFFECT_KEYS[key]]
    alone = ["sequence_parallel"] if given.get("sequence_parallel") and runtime.model_parallel_size == 1 else []
    return (*always, *alone, *_idle_recompute(given, run))


def _idle_recompute(given: Mapping[str, Any], run: RunArgs) -> Iterator[str]:
    block = given.get("activation_checkpointing")
    used = RECOMPUTE_ENTRIES.values() if run.checkpoint_activations else ()
    yield from (f"activation_checkpointing.{entry}" for entry, value in (block or {}).items() if value and entry not in used)
    for key in _RECOMPUTE:
        if key not in given:
            continue
        replaced = block is not None and key in RECOMPUTE_ENTRIES and given[key] != getattr(run, key)
        if replaced or (not run.checkpoint_activations and getattr(run, key) != RunArgs.model_fields[key].default):
            yield key
