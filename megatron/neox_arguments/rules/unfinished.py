# SPDX-License-Identifier: Apache-2.0
"""Features that configs may ask for and that are still to be built. Knows no relation between keys."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from ..problems import ConfigProblems, Problem
from ..sections import SECTION_OF


@dataclass(frozen=True)
class Unfinished:
    """A feature that configs may ask for and that is still to be built."""

    feature: str
    key: str
    asked: Callable[[Any], bool] = bool

    def problem(self, args: Any) -> Problem | None:
        """The problem when `args` asks for the feature."""
        value = getattr(getattr(args, SECTION_OF[self.key]), self.key)
        if not self.asked(value):
            return None
        return Problem(
            f"{self.key} asks for {self.feature}, which this version does not have yet",
            where=str(args.origin(self.key)),
            fix=f"remove {self.key}, or use a version that has {self.feature}",
            keys=(self.key,),
        )


def unfinished(args: Any) -> list[Problem]:
    """Features a NeoXArgs asks for that cannot run yet; the caller refuses to train when there are any."""
    found = (row.problem(args) for row in UNFINISHED)
    return [problem for problem in found if problem is not None]


def refuse_unfinished(args: Any) -> None:
    """Raise ConfigProblems with every feature asked for that cannot run yet."""
    problems = unfinished(args)
    if problems:
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


# One row per feature; whoever builds a feature deletes its row.
UNFINISHED: Final[tuple[Unfinished, ...]] = (
    Unfinished("Mamba layers", "attention_config", _among("mamba")),
    Unfinished("RWKV layers", "attention_config", _among("rwkv")),
    Unfinished("gMLP layers", "attention_config", _among("gmlp", "amlp")),
    Unfinished("sparse attention", "attention_config", _among("local", "sparse_fixed", "sparse_variable", "bigbird", "bslongformer")),
    Unfinished("mixture-of-experts layers", "moe_num_experts", _above(1)),
    Unfinished("Transformer Engine", "te_columnparallel"),
    Unfinished("Transformer Engine", "te_rowparallel"),
    Unfinished("Transformer Engine", "te_layernorm_mlp"),
    Unfinished("Transformer Engine", "te_mha"),
    Unfinished("Transformer Engine", "te_fp8_mha"),
    Unfinished("Transformer Engine norms", "norm", _among("te_rmsnorm", "te_layernorm")),
    Unfinished("post-norm blocks", "norm_placement", _among("post")),
    Unfinished("soft prompts", "soft_prompt_tuning", _on),
    Unfinished("preference and reward objectives", "train_impl", lambda value: value != "normal"),
    Unfinished("pairwise and online data", "dataset_impl", lambda value: value != "gpt2"),
    Unfinished("the cached data format", "data_impl", _among("cached")),
    Unfinished("gradient-ascent unlearning", "ga_dataset"),
    Unfinished("gradient-difference unlearning", "gd_mode"),
    Unfinished("precomputed reference log-probabilities", "precompute_model_name"),
    Unfinished("the weight server", "serve_model_weights"),
    Unfinished("8-bit optimizers", "use_bnb_optimizer"),
    Unfinished("the sequence-length curriculum", "curriculum_learning", _on),
    Unfinished("autotuning", "autotuning", _on),
    Unfinished("elastic training", "elasticity", _on),
    Unfinished("cluster auto-resume", "adlr_autoresume"),
)
