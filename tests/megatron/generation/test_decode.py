# SPDX-License-Identifier: Apache-2.0
"""Decoding: where a text ends, the cache, and equality with Hugging Face."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import given, settings
from hypothesis import strategies as st

from support.scorers import Counting
from support.tiny import tiny

GOLDEN = Path(__file__).parents[2] / "golden"


def run(prompts: list[list[int]], longest: int = 32, **options: Any) -> tuple[Any, Counting]:
    import torch

    from megatron.generation.decode import DecodeSettings, decode

    scorer = Counting(longest=longest)
    return decode(scorer, torch.tensor(prompts), DecodeSettings(**options), [torch.Generator()] * len(prompts)), scorer


@settings(max_examples=60, deadline=None)
@given(length=st.integers(1, 12), limit=st.integers(1, 12), longest=st.integers(2, 16), start=st.integers(1, 15), recompute=st.booleans())
def test_a_text_ends_at_eod_or_at_its_limit_and_not_a_token_earlier(
    length: int, limit: int, longest: int, start: int, recompute: bool
) -> None:
    prompt = [(start - length + index + 1) % 16 for index in range(length)]
    [completion], scorer = run([prompt], longest=longest, eod=0, maximum_tokens=limit, recompute=recompute)
    room = max(0, min(limit, longest - length))
    until_eod = (16 - start - 1) % 16
    assert completion.ids == [(start + 1 + index) % 16 for index in range(min(room, until_eod))]
    assert completion.finished == (until_eod < room)
    widths = [shape[1] for shape in scorer.seen]
    assert widths == ([length + step for step in range(len(widths))] if recompute else [length, *[1] * (len(widths) - 1)][: len(widths)])


def test_stop_sequences_are_left_out_and_rows_end_apart() -> None:
    heard: list[tuple[int, int]] = []
    import torch

    from megatron.generation.decode import DecodeSettings, decode

    rules = DecodeSettings(eod=0, maximum_tokens=None, stop=((6, 7), (12,)), keep_logits=True)
    done = decode(Counting(), torch.tensor([[2, 3], [9, 10], [13, 14]]), rules, [], lambda row, token: heard.append((row, token)))
    assert [completion.ids for completion in done] == [[4, 5], [11], [15]]
    assert all(completion.finished for completion in done)
    assert [len(completion.logits) for completion in done] == [2, 1, 1]
    assert [token for row, token in heard if row == 2] == [15]


def loaded(style: str, **overrides: Any) -> Any:
    """A recorded checkpoint as a scorer: weights that are not symmetric, unlike fresh ones."""
    from megatron.generation.build import load_model
    from megatron.generation.decode import ModelScorer
    from megatron.neox_arguments import NeoXArgs

    folder = GOLDEN / "train" / f"{style}_pp0" / "ckpt"
    args = NeoXArgs.from_dict(
        tiny(style, load=str(folder), padded_vocab_size=512, vocab_file=str(GOLDEN / "tokenizer" / "tokenizer.json"), **overrides)
    )
    return ModelScorer(load_model(args).model, longest=64, vocab_size=512)


def test_cache_changes_nothing_and_neighbours_neither() -> None:
    import torch

    from megatron.generation.decode import DecodeSettings, Sampling, decode

    prompts = torch.randint(2, 512, (3, 9), generator=torch.Generator().manual_seed(0))

    def texts(scorer: Any, rows: torch.Tensor, first: int = 0, **options: Any) -> list[Any]:
        seeds = [torch.Generator().manual_seed(first + row) for row in range(len(rows))]
        return decode(scorer, rows, DecodeSettings(eod=0, keep_logits=True, maximum_tokens=None, **options), seeds)

    for style in ("neox", "gpt2", "llama"):
        scorer = loaded(style)
        for sampling in (Sampling(), Sampling(temperature=0.9, top_k=50, top_p=0.95)):
            cached = texts(scorer, prompts, sampling=sampling)
            uncached = texts(scorer, prompts, sampling=sampling, recompute=True)
            assert [one.ids for one in cached] == [one.ids for one in uncached], style
            for one, other in zip(cached, uncached, strict=True):
                torch.testing.assert_close(torch.stack(one.logits), torch.stack(other.logits), rtol=0, atol=2e-5)
            assert max(len(one.ids) for one in cached) == 64 - 9
            alone = [texts(scorer, prompts[row : row + 1], first=row, sampling=sampling)[0] for row in range(3)]
            assert [one.ids for one in alone] == [one.ids for one in cached], style
    logits = scorer.next_logits(torch.tensor([[5, 6]]), None)
    scorer.vocab_size = 300
    assert torch.equal(scorer.next_logits(torch.tensor([[5, 6]]), None), logits[:, :300]), "rows that pad the embedding are never drawn"


def test_greedy_equals_hugging_face() -> None:
    import torch
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    from megatron.generation.decode import DecodeSettings, decode

    scorer = loaded("neox")
    config = GPTNeoXConfig(
        vocab_size=512, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256, rotary_pct=0.25,
        max_position_embeddings=64, use_parallel_residual=True, hidden_act="gelu", layer_norm_eps=1e-5, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    theirs = GPTNeoXForCausalLM(config).eval()
    names = {
        "input_layernorm": "input_layernorm",
        "post_attention_layernorm": "post_attention_layernorm",
        "attention.query_key_value": "attention.query_key_value",
    }
    names |= {"attention.dense": "attention.dense", "mlp.linear1": "mlp.dense_h_to_4h", "mlp.linear2": "mlp.dense_4h_to_h"}
    head = next(name for name in theirs.state_dict() if name in ("lm_head.weight", "embed_out.weight"))  # transformers 5 and 4
    weights = {}
    for name, tensor in scorer.model.state_dict().items():
        _, slot, inner = name.split(".", 2)
        if slot == "0":
            weights["gpt_neox.embed_in.weight"] = tensor
        elif slot == "5":
            weights["gpt_neox.final_layer_norm." + inner.split(".")[-1]] = tensor
        elif slot == "6":
            weights[head] = tensor
        else:
            part, kind = inner.rsplit(".", 1)
            weights[f"gpt_neox.layers.{int(slot) - 2}.{names[part]}.{kind}"] = tensor
    missing, surplus = theirs.load_state_dict(weights, strict=False)
    assert not surplus and all("rotary" in name or "attention.bias" in name or "masked_bias" in name for name in missing)
    prompts = torch.randint(2, 512, (2, 7), generator=torch.Generator().manual_seed(3))
    reference = theirs.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=40, do_sample=False, pad_token_id=1)
    for row, completion in enumerate(decode(scorer, prompts, DecodeSettings(eod=0, maximum_tokens=40), [])):
        new = reference[row, 7:].tolist()
        assert completion.ids == (new[: new.index(0)] if 0 in new else new)


def expected(logits: npt.NDArray[np.float64], temperature: float, top_k: int, top_p: float) -> npt.NDArray[np.float64]:
    """Probabilities of one row, written with loops."""
    logits = logits / temperature if temperature > 0 else logits
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    if top_k > 0:
        order = [token for token in order if logits[token] >= logits[order[min(top_k, len(order)) - 1]]]
    weights = {token: np.exp(logits[token] - logits[order[0]]) for token in order}
    if top_p > 0:
        total, before, kept = sum(weights.values()), 0.0, []
        for token in order:
            if before / total <= top_p:
                kept.append(token)
            before += weights[token]
        order = kept
    total = sum(weights[token] for token in order)
    return np.array([weights[token] / total if token in order else 0.0 for token in range(len(logits))])


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**31),
    st.sampled_from([0.0, 0.5, 1.0, 3.0]),
    st.sampled_from([0, 1, 3, 7, 100]),
    st.sampled_from([0.0, 0.01, 0.5, 0.93, 1.0]),
)
def test_probabilities_equal_numpy(seed: int, temperature: float, top_k: int, top_p: float) -> None:
    import torch

    from megatron.generation.decode import Sampling, choose, probabilities

    rows = np.random.default_rng(seed).normal(size=(3, 11)) * 3
    got = probabilities(torch.tensor(rows), Sampling(temperature, top_k, top_p))
    for row in range(3):
        np.testing.assert_allclose(got[row].numpy(), expected(rows[row], temperature, top_k, top_p), atol=2e-6)
    if top_k == 1:
        assert choose(torch.tensor(rows), Sampling(temperature, 1, top_p), torch.rand(3)).tolist() == rows.argmax(1).tolist()


def test_ties_draws_greedy_and_rows_apart() -> None:
    import torch

    from megatron.generation.decode import Sampling, choose, keep_top_k, pick

    kept = keep_top_k(torch.tensor([[1.0, 3.0, 2.0, 2.0]]), 2)
    assert torch.isfinite(kept).tolist() == [[False, True, True, True]], "ties with the last kept token stay"

    chances = torch.tensor([0.0, 0.1, 0.0, 0.6, 0.3, 0.0])
    uniform = (torch.arange(10_000) + 0.5) / 10_000
    counts = torch.bincount(pick(chances.expand(10_000, 6), uniform), minlength=6) / 10_000
    assert torch.allclose(counts, chances, atol=2e-4)
    edge = torch.tensor([0.0, 1.0 - 2.0**-24])
    assert pick(chances.expand(2, 6), edge).tolist() == [1, 4], "an impossible token is never drawn"

    logits = torch.tensor([[0.0, 2.0, 1.0]])
    assert choose(logits, Sampling()).tolist() == [1]
    assert Sampling().greedy and not Sampling(top_p=0.9).greedy and not Sampling(top_k=2).greedy
    assert choose(logits, Sampling(temperature=1.0), torch.tensor([0.999])).tolist() == [2]

    rows = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    drawn = torch.rand(4, generator=torch.Generator().manual_seed(0))
    together = choose(rows, Sampling(0.8, 20, 0.9), drawn)
    alone = [choose(rows[row : row + 1], Sampling(0.8, 20, 0.9), drawn[row : row + 1]).item() for row in range(4)]
    assert together.tolist() == alone
