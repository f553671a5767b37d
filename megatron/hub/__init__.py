# SPDX-License-Identifier: Apache-2.0
"""What talks to servers: the Hugging Face Hub, with waits when it is busy, and S3."""
