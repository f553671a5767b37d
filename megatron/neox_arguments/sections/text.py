# SPDX-License-Identifier: Apache-2.0
"""Keys for generating text and for evaluation tasks. Knows no tokenizer."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from .base import Section, Whole


class TextArgs(Section):
    """What is generated, by what sampling, and which tasks are evaluated."""

    text_gen_type: Literal["unconditional", "input-file", "interactive", "precompute"] | None = Field(
        None, description="Where prompts come from; unset is input-file when sample_input_file is given, else unconditional."
    )
    temperature: float = Field(0.0, ge=0, description="Divisor of the logits before sampling; 0 takes the most likely token.")
    top_p: float = Field(0.0, ge=0, le=1, description="Sample from the likeliest tokens that together reach this probability; 0 is off.")
    top_k: Whole = Field(0, ge=0, description="Sample from so many of the likeliest tokens; 0 is off.")
    return_logits: bool = Field(False, description="Write the logits beside each generated text.")
    maximum_tokens: Whole = Field(64, ge=1, description="Largest number of tokens to generate per prompt.")
    prompt_end: str = Field("\n", description="String that ends a prompt, in the input file and in interactive mode.")
    sample_input_file: str | None = Field(None, description="File to read prompts from.")
    sample_output_file: str | None = Field("samples.txt", description="File to write generated texts to, one JSON object per line.")
    num_samples: Whole = Field(1, ge=1, description="Number of texts to generate in unconditional mode.")
    recompute: bool = Field(False, description="Run the whole context anew for every token instead of keeping keys and values.")
    eval_results_prefix: str = Field("", description="Start of the name of the file with evaluation results.")
    eval_tasks: list[str] | None = Field(None, description="Names of LM Evaluation Harness tasks, for eval.py and at every validation.")
