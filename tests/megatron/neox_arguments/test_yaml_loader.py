# SPDX-License-Identifier: Apache-2.0
"""Reading and merging of config files."""

from __future__ import annotations

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.neox_arguments.yaml_loader import Flat, add_overwrites, config_path, read_files, read_text, scalar


def read(text: str) -> Flat:
    flat = Flat()
    read_text(text, "x.yml", flat)
    return flat


def test_house_style_of_existing_configs():
    flat = read('{\n  "pipe-parallel-size": 1, # stages\n  "no_weight_tying": True,\n  "lr-decay-style": "cosine",\n}')
    assert flat.values == {"pipe_parallel_size": 1, "no_weight_tying": True, "lr_decay_style": "cosine"}
    assert [flat.origins[key].line for key in flat.values] == [2, 3, 4]
    assert not flat.problems


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), ("5e8", 5e8), ("5E+8", 5e8), ("1.0e-4", 1e-4), (".5", 0.5), ("1.", 1.0), ("-3", -3), ("+7", 7), ("1_000", 1000),
        ("0x10", 16), ("012", 12), ("1:30", "1:30"), ("2024-01-01", "2024-01-01"), ("1e", "1e"), ("e5", "e5"), ("-", "-"),
        ("1e-4x", "1e-4x"),
        ('"1e-4"', "1e-4"), ("yes", True), ("off", False), ("~", None), ("null", None), ("none", "none"), ("0.0.1", "0.0.1"),
    ],
)  # fmt: skip
def test_scalars_are_what_people_mean(text, value):
    found = read(f"k: {text}").values["k"] if text != "-" else scalar("'-'")
    assert found == value and type(found) is type(value)


@settings(max_examples=200, deadline=None)
@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_float_reads_back_however_it_is_printed(number):
    for text in (repr(number), f"{number:e}", f"{number:.17g}"):
        assert float(scalar(text)) == pytest.approx(number, rel=1e-6, abs=1e-300)
        assert isinstance(scalar(text), int | float)


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(
        st.from_regex(r"[a-z][a-z_]{0,8}", fullmatch=True).filter(
            lambda s: s not in ("y", "n", "yes", "no", "on", "off", "true", "false", "null")
        ),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text("abc {}[]:#'\"", max_size=8), lambda inner: st.lists(inner, max_size=3)
        ),
        max_size=5,
    )
)
def test_what_yaml_writes_is_read_back(settings_):
    assert read(yaml.safe_dump(settings_)).values == settings_


def test_nested_keys_know_their_lines():
    flat = read("optimizer:\n  type: Adam\n  params:\n    lr: 1e-4\nlist: [{a: 1},\n {a: 2}]")
    assert flat.origins["optimizer.params.lr"].line == 4
    assert flat.origins["list[1].a"].line == 6
    assert flat.values["optimizer"]["params"]["lr"] == 1e-4


def test_anchors_and_merges_inside_blocks():
    flat = read("fp16: &half {enabled: true, loss_scale: 0}\nbf16: {<<: *half, enabled: false}")
    assert flat.values["bf16"] == {"enabled": False, "loss_scale": 0} and not flat.problems


@pytest.mark.parametrize("text", ["", "# only a comment\n", "---\n"])
def test_a_file_without_settings_is_fine(text):
    assert read(text).values == {} and not read(text).problems


def test_tags_that_run_code_are_refused():
    flat = read("save: !!python/object/apply:os.getcwd []")
    assert flat.problems and "save" not in flat.values


def test_config_paths(tmp_path):
    assert str(config_path("125M")) == "125M.yml"
    assert str(config_path("1.3B", "configs")) == "configs/1.3B.yml"
    for name in ("a.yml", "a.json", "a.yaml"):
        assert str(config_path(name)) == name
    assert str(config_path(str(tmp_path / "a.yml"), "configs")) == str(tmp_path / "a.yml")


def test_files_are_merged_and_their_text_kept(tmp_path):
    (tmp_path / "a.yml").write_text("seed: 1\n")
    (tmp_path / "b.json").write_text('{"train-iters": 5}')
    flat = read_files(["a", "b.json"], str(tmp_path))
    assert flat.values == {"seed": 1, "train_iters": 5}
    assert flat.files == {"a.yml": "seed: 1\n", "b.json": '{"train-iters": 5}'}
    add_overwrites(flat, {"train-iters": 7})
    assert flat.values["train_iters"] == 7 and str(flat.origins["train_iters"]) == "--train_iters"
