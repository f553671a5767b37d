# SPDX-License-Identifier: Apache-2.0
"""Files of weights and optimizers as named tensors."""
