# SPDX-License-Identifier: Apache-2.0
"""From a dataset of the Hugging Face Hub, a named corpus, or local files, to `.bin/.idx`."""
