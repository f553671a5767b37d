# SPDX-License-Identifier: Apache-2.0
"""Configuration: YAML files -> one frozen, checked NeoXArgs. Imports no torch."""

from megatron.neox_arguments.neox_args import NeoXArgs
from megatron.neox_arguments.problems import ConfigProblems, Origin, Problem

__all__ = ["ConfigProblems", "NeoXArgs", "Origin", "Problem"]
