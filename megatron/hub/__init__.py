# SPDX-License-Identifier: Apache-2.0
"""What talks to servers: the Hugging Face Hub, waits when it is busy, S3, and work done beside the training."""
