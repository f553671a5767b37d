# SPDX-License-Identifier: Apache-2.0
"""prepare_hf_dataset.py as a user runs it, against a Hub on this machine."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron.data.indexed_dataset import IndexedDataset
from prepare_hf_dataset import parser
from tests.support.chat import chat_folder, turns
from tests.support.hub_server import Fault, Hub, serve

REPO = Path(__file__).parents[1]
FLAGS = """--dataset --subset --split --data-dir --data-files --output-dir --output-base --text-column --vocab-file --hf-tokenizer
--skip-count --skip-tokenize --count-only --skip-chat-template --midtrain-chat-messages --join-columns --num-proc --batch-size
--tokenize-workers --download-workers""".split()


def parquet(records: list[dict[str, object]]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(records), sink)
    return sink.getvalue()


def run(*words: str, hub: Hub, home: Path, offline: bool = False) -> subprocess.CompletedProcess[str]:
    """The face in a process of its own, with nothing cached but what is in `home`."""
    env = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home / "hf"),
        "HF_TOKEN": "hf_secret",
        "HF_HUB_OFFLINE": str(int(offline)),
        "HF_DATASETS_OFFLINE": str(int(offline)),
        "HF_HUB_DISABLE_XET": "1",
    }
    command = [sys.executable, str(REPO / "prepare_hf_dataset.py"), "--output-base", str(home), "--num-proc", "1", *words]
    return subprocess.run(command, cwd=home, env=env, capture_output=True, text=True, timeout=100)


RECORDS: list[dict[str, object]] = [{"id": number, "messages": turns("question?", f"answer {number}")} for number in range(300)]
ASKED = ("--dataset", "org/chats", "--tokenizer", "org/tokenizer")


def small_hub(folder: Path) -> Hub:
    """A Hub with the dataset org/chats, in two parts, and the tokenizer org/tokenizer."""
    shards = {f"data/train-0000{n}-of-00002.parquet": parquet(RECORDS[150 * n : 150 * (n + 1)]) for n in range(2)}
    tokenizer = {path.name: path.read_bytes() for path in chat_folder(folder / "tokenizer", "chatml").iterdir()}
    return Hub({("datasets", "org/chats"): {"README.md": b"# chats\n", **shards}, ("models", "org/tokenizer"): tokenizer})


def test_from_the_hub_with_too_many_requests_and_again(tmp_path: Path) -> None:
    hub = small_hub(tmp_path)
    hub.faults += [Fault("GET /api/datasets", 429, {"Retry-After": "0"}, 2), Fault("GET .*train-00001", 429, {"Retry-After": "0"})]
    with serve(hub):
        first = run(*ASKED, hub=hub, home=tmp_path)
        assert first.returncode == 0, first.stderr
        folder = tmp_path / "chats_train"
        assert f'"train_label_data_paths": ["{folder}/chats_train_messages_label_document"],' in first.stdout
        said = first.stdout + first.stderr
        # For a file, some versions of huggingface-hub wait themselves.
        assert first.stdout.count("too many requests") + said.count("[Retry ") == 3 and "hf_secret" not in said
        assert hub.tokens == {"Bearer hf_secret"}
        results = json.loads((folder / "pipeline_results.json").read_text(encoding="utf-8"))
        assert (results["num_documents"], results["rows"], results["status"]) == (300, 300, "completed")
        assert results["commit"] == hub.commit("datasets", "org/chats")
        assert len(IndexedDataset(f"{folder}/chats_train_messages_document")) == 300
        exported = (folder / "dataset.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in exported] == [{"messages": record["messages"]} for record in RECORDS]
        hub.log.clear()
        second = run(*ASKED, hub=hub, home=tmp_path)
        assert second.returncode == 0 and "nothing to do" in second.stdout
        assert len(hub.log) == 2, "one question each for the commits of dataset and tokenizer"


@pytest.mark.full
def test_offline_what_was_read_before_is_known(tmp_path: Path) -> None:
    with serve(small_hub(tmp_path)) as hub:
        assert run(*ASKED, hub=hub, home=tmp_path).returncode == 0
    (tmp_path / "chats_train" / "dataset.jsonl").unlink()
    offline = run(*ASKED, hub=hub, home=tmp_path, offline=True)
    assert offline.returncode == 0, offline.stderr
    assert "EXPORT: done before" not in offline.stdout and "TOKENIZE: done before" in offline.stdout
    assert len((tmp_path / "chats_train" / "dataset.jsonl").read_text(encoding="utf-8").splitlines()) == 300


@pytest.mark.full
def test_killed_at_any_moment_it_goes_on_with_the_same_bytes(tmp_path: Path) -> None:
    chat_folder(tmp_path / "tokenizer", "chatml")
    words = (REPO / "README.md").read_text(encoding="utf-8")
    records = [{"messages": turns("question?", words[number % 500 :])} for number in range(800)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")

    def command(name: str) -> list[str]:
        words = f"--dataset {tmp_path}/in.jsonl --tokenizer {tmp_path}/tokenizer --output-dir {tmp_path}/{name}/data --num-proc 1"
        return [sys.executable, str(REPO / "prepare_hf_dataset.py"), *words.split()]

    started = time.monotonic()
    subprocess.run(command("whole"), check=True, capture_output=True, timeout=100)
    took = time.monotonic() - started
    for moment in range(1, 8):
        process = subprocess.Popen(command("killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(took * moment / 8)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    subprocess.run(command("killed"), check=True, capture_output=True, timeout=100)
    whole, killed = (sorted((tmp_path / name / "data").iterdir()) for name in ("whole", "killed"))
    assert [path.name for path in whole] == [path.name for path in killed]
    for one, other in zip(whole, killed, strict=True):
        assert one.suffix == ".json" or one.read_bytes() == other.read_bytes(), one.name


@pytest.mark.full
def test_what_is_not_on_the_hub(tmp_path: Path) -> None:
    with serve(Hub()) as hub:
        missing = run("--dataset", "org/none", "--tokenizer", "org/tokenizer", hub=hub, home=tmp_path)
    assert missing.returncode == 77 and "org/none" in missing.stderr and "Traceback" not in missing.stderr
    assert json.loads((tmp_path / "none_train" / "pipeline_results.json").read_text(encoding="utf-8"))["status"] == "failed"


def test_every_flag_of_the_reference_is_taken() -> None:
    known = {word for action in parser()._actions for word in action.option_strings}
    assert set(FLAGS) <= known
