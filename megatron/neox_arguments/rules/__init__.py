# SPDX-License-Identifier: Apache-2.0
"""Rules: what does not go together, and what is not built yet."""

from .all import RULES, broken_rules
from .rule import Rule
from .unfinished import UNFINISHED, Unfinished, refuse_unfinished, unfinished

__all__ = ["RULES", "UNFINISHED", "Rule", "Unfinished", "broken_rules", "refuse_unfinished", "unfinished"]
