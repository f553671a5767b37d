# SPDX-License-Identifier: Apache-2.0
"""Model parallel units: groups, collectives, sharding, and the layers that are split over a tensor parallel group.

Shape letters as in `megatron.model`.
"""
