# SPDX-License-Identifier: Apache-2.0
"""From a dataset of the Hugging Face Hub, or local files, to `.bin/.idx`. The only room that imports `datasets` and `huggingface_hub`."""
