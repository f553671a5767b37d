# SPDX-License-Identifier: Apache-2.0
"""The model: layers that map a Stream to a Stream, and the plan that orders them.

Shape letters, used in every docstring of this package:

    b  batch (rows of a micro batch)         n  query heads on this rank
    s  sequence (new tokens of a row)        g  key/value heads on this rank
    t  keys: cached tokens + s               d  size of one head
    h  hidden size                           v  padded vocabulary
    r  rotated features of a head            /tp  divided over the tensor parallel group
"""
