# SPDX-License-Identifier: Apache-2.0
"""Rules: which keys do not go together."""

from typing import Final

from .data import DATA_RULES
from .model import MODEL_RULES
from .optimizers import OPTIMIZER_RULES, REPORT_RULES
from .rule import Rule
from .run import RUN_RULES

RULES: Final[tuple[Rule, ...]] = (*MODEL_RULES, *RUN_RULES, *OPTIMIZER_RULES, *DATA_RULES, *REPORT_RULES)
