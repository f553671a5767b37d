# SPDX-License-Identifier: Apache-2.0
"""Parameter groups, optimizers and learning-rate schedules."""
