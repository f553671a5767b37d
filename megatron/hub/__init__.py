# SPDX-License-Identifier: Apache-2.0
"""What talks to servers: the Hugging Face Hub, waits when one is busy, and work done beside the training."""
