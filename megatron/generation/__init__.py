# SPDX-License-Identifier: Apache-2.0
"""Text from a trained model. `b` rows decoded together, `s` tokens, `v` vocabulary without the padding rows."""
