# SPDX-License-Identifier: Apache-2.0
"""Rules: which keys do not go together."""

from .all import RULES, broken_rules
from .rule import Rule

__all__ = ["RULES", "Rule", "broken_rules"]
