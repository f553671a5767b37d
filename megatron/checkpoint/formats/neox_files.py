# SPDX-License-Identifier: Apache-2.0
"""The files in a step's folder of a NeoX checkpoint: their names, and the weights in either of their two forms.

FORMAT: pipe_parallel_size 0 keeps all weights in mp_rank_<TT>_model_states.pt under "module" with names
`sequential.<slot>.<parameter>`; a pipeline keeps one layer_<slot>-model_<TT>-model_states.pt per slot with names
`<parameter>`. Without one, mp_rank_<NN>_model_states.pt holds the bookkeeping of a model rank, too; under ZeRO-3 each data rank has one
with zero_pp_rank_<NN>_ before. A spread optimizer has [bf16_]zero_pp_rank_<NN>_mp_rank_<NN>_optim_states.pt.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron.checkpoint.formats.partitions import named_shapes, partitions
from megatron.checkpoint.formats.torch_file import TIED, LazyState, canonical_name, read_plain_first, read_torch_file, summary
from megatron.errors import CheckpointError
from megatron.model.block import unused_stored_prefixes

MODEL = re.compile(r"^(?:zero_pp_rank_(?P<data>\d+)_)?mp_rank_(?P<model>\d+)_model_states\.pt$")
LAYER = re.compile(r"^layer_(?P<slot>\d+)-model_(?P<tensor>\d+)-model_states\.pt$")
PARTITION = re.compile(r"^(?:bf16_)?zero_pp_rank_(?P<data>\d+)_mp_rank_(?P<model>\d+)_optim_states\.pt$")


def layer_name(slot: int, tensor_rank: int) -> str:
    """Of a layer's weights.

    >>> layer_name(2, 1)
    'layer_02-model_01-model_states.pt'
    """
    return f"layer_{slot:02d}-model_{tensor_rank:02d}-model_states.pt"


def matched(folder: Path, pattern: re.Pattern[str]) -> Iterator[tuple[Path, re.Match[str]]]:
    """The files of a folder whose names fit a pattern, with what it found; none where there is no folder."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if match := pattern.match(path.name):
            yield path, match


@dataclass(frozen=True)
class LoadReport:
    """What was read: the folder, the number of tensors and of parameters."""

    path: Path
    tensors: int
    parameters: int


def model_file(folder: Path, rank: int = 0) -> Path:
    """The bookkeeping file of a model rank (and, without a pipeline, its weights).

    >>> model_file(Path(), 3).name
    'mp_rank_03_model_states.pt'
    """
    return folder / f"mp_rank_{rank:02d}_model_states.pt"


def bookkeeping_file(folder: Path, rank: int = 0) -> Path:
    """The file of a model rank that is there, also where no rank has whole weights; that of the plain form where none is."""
    path = model_file(folder, rank)
    # FORMAT: under ZeRO-3 every data rank has such a file of its own.
    spread = folder / f"zero_pp_rank_0_{path.name}"
    return spread if spread.is_file() and not path.is_file() else path


def model_ranks(folder: Path) -> int:
    """How many pipeline stages times tensor ranks wrote a folder."""
    return len({m["model"] for _, m in matched(folder, MODEL) if not int(m["data"] or 0)})


def partition_files(folder: Path, model_rank: int) -> list[Path]:
    """The files over which ZeRO, or the bfloat16 optimizer, has spread a model rank's optimizer, by data rank."""
    found = {int(m["data"]): path for path, m in matched(folder, PARTITION) if int(m["model"]) == model_rank}
    return [path for _, path in sorted(found.items())]


def bookkeeping(folder: Path, *, deepspeed_types: bool = False, rank: int = 0) -> dict[str, Any]:
    """Everything in a model rank's file but the weights; empty when there is no such file."""
    path = bookkeeping_file(folder, rank)
    if not path.is_file():
        return {}
    content = read_torch_file(path, deepspeed_types=deepspeed_types)
    return {key: value for key, value in content.items() if key not in ("module", "optimizer")}


def read_weights(folder: Path, tensor_rank: int = 0) -> Mapping[str, Tensor]:
    """All weights of one tensor rank by canonical name `<slot>.<parameter>`.

    Raises CheckpointError when the folder holds none.
    """
    if not folder.is_dir():
        raise CheckpointError("checkpoint folder is missing", where=str(folder), fix="correct `load` or `iteration`")
    layers = {int(m["slot"]): path for path, m in matched(folder, LAYER) if int(m["tensor"]) == tensor_rank}
    weights: dict[str, Tensor] = {}
    for slot, path in sorted(layers.items()):
        weights.update({f"{slot}.{name}": tensor for name, tensor in read_torch_file(path).items() if isinstance(tensor, Tensor)})
    if weights:
        return weights
    path = model_file(folder, tensor_rank)
    if not path.exists() and zero3_partitioned(folder):
        return _of_partitions(folder, tensor_rank)
    # FORMAT: ZeRO-0 in half precision keeps the optimizer, with DeepSpeed's loss scaler, in the weights' file.
    module = read_plain_first(path).get("module")
    while isinstance(module, Mapping) and isinstance(module.get("module"), Mapping):
        module = module["module"]
    if not isinstance(module, Mapping) or not module:
        raise CheckpointError("no weights in the checkpoint folder", where=str(folder), fix="check that all its files were copied")
    return {name.removeprefix("sequential."): tensor for name, tensor in module.items() if isinstance(tensor, Tensor)}


def _of_partitions(folder: Path, tensor_rank: int) -> Mapping[str, Tensor]:
    """ZeRO-3: the float32 weights, joined on access, and what is whole in each file."""
    files = partition_files(folder, tensor_rank)
    if not files:
        what = "the weights were spread over data-parallel ranks (ZeRO-3), and their files are not there"
        fix = "copy all files of the folder, or choose another step"
        raise CheckpointError(what, where=str(folder / f"zero_pp_rank_*_mp_rank_{tensor_rank:02d}_optim_states.pt"), fix=fix)
    content = read_torch_file(bookkeeping_file(folder, tensor_rank), deepspeed_types=True)
    parts = [read_torch_file(path, deepspeed_types=True)["optimizer_state_dict"] for path in files]
    masters = partitions(parts, named_shapes(content)).masters
    # FORMAT: "module" has empty tensors in place of parameters.
    whole = {canonical_name(name): tensor for name, tensor in content["module"].items() if tensor.numel()}
    return LazyState({name: partial(source.__getitem__, name) for source in (masters, whole) for name in source})


def tensor_ranks(folder: Path) -> int:
    """Over how many tensor parallel ranks the weights of a folder are spread."""
    pieces = {m["tensor"] for _, m in matched(folder, LAYER)}
    # FORMAT: beside layer files there is a bookkeeping file per pipeline and tensor rank, which says nothing here.
    return len(pieces) or model_ranks(folder)


def zero3_partitioned(folder: Path) -> bool:
    """Whether no file of the folder holds a whole weight, as ZeRO-3 writes it."""
    return any(folder.glob("zero_pp_rank_*_model_states.pt"))


def model_dtypes(folder: Path) -> dict[str, torch.dtype]:
    """Of the tensors that the bookkeeping file lists, by canonical name, as the model has them also under ZeRO-3; none with a pipeline."""
    module = read_torch_file(bookkeeping_file(folder), deepspeed_types=True).get("module") or {}
    return {canonical_name(name): tensor.dtype for name, tensor in module.items() if isinstance(tensor, Tensor)}


Gather = Callable[[Any], AbstractContextManager[Any]]
"""(list of parameters) -> within, they are whole where ZeRO-3 has partitioned them; what was written is spread again."""


def copy_weights(
    weights: Mapping[str, Tensor],
    module: nn.Module,
    folder: Path,
    *,
    elsewhere: Collection[int] = (),
    gather: Gather | None = None,
    shapes: Mapping[str, torch.Size] | None = None,
) -> LoadReport:
    """Copy weights by canonical name `<slot>.<parameter>` into `module`.

    Every parameter and persistent buffer must be among them with its shape, and nothing else may be there.

    folder:    where they are from
    elsewhere: slots that other pipeline stages may hold; those of them that `module` lacks are passed over
    shapes:    of the weights, where they are known without reading them
    Raises CheckpointError naming the tensors that do not fit; then nothing was copied.
    """
    held = module.state_dict(keep_vars=True)
    own = {canonical_name(name): tensor for name, tensor in held.items()}
    target = {name: tensor for name, tensor in own.items() if not _DERIVED.search(name)}
    # Of a tied slot a stage may hold a part.
    here = {slot_of(name) for name in own} - (
        {slot_of(canonical_name(name)) for name in held if name.startswith(TIED)} if elsewhere else set()
    )
    wanted = [name for name in weights if name in own or slot_of(name) in here or slot_of(name) not in elsewhere]
    found = {name: weights[name].shape if shapes is None else shapes[name] for name in wanted}
    check_fit(folder, target, found, tuple(canonical_name(prefix) for prefix in unused_stored_prefixes(module)))
    with torch.no_grad():
        for name, tensor in target.items():
            with nullcontext() if gather is None else gather([tensor]):
                tensor.copy_(weights[name].to(tensor.dtype))
    return LoadReport(path=folder, tensors=len(target), parameters=sum(_whole_shape(t).numel() for t in target.values()))


def load_canonical(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy a canonical state that is in no folder into a `Transformer`. Raises CheckpointError as `copy_weights` does."""
    copy_weights(state, module, Path())


def slot_of(name: str) -> int:
    """Number of the layer that a canonical name begins with; -1 where there is none."""
    number = name.partition(".")[0]
    return int(number) if number.isdecimal() else -1


def _whole_shape(tensor: Tensor) -> torch.Size:
    """Also of a parameter that ZeRO-3 has partitioned."""
    return torch.Size(getattr(tensor, "ds_shape", tensor.shape))


# FORMAT: derived tables some versions keep and none needs.
_DERIVED = re.compile(r"\.(rotary_emb\.inv_freq|alibi_embed\.slopes|attention\.norm_factor)$")


def check_fit(folder: Path, target: Mapping[str, Tensor], weights: Mapping[str, torch.Size], unused: tuple[str, ...]) -> None:
    """Raise CheckpointError, naming the tensors, unless the files hold each weight of a model in its shape and nothing else."""
    missing = sorted(set(target) - set(weights))
    surplus = sorted(name for name in set(weights) - set(target) if not (_DERIVED.search(name) or name.startswith(unused)))
    shapes = [
        f"{name}: model {tuple(_whole_shape(target[name]))}, checkpoint {tuple(weights[name])}"
        for name in sorted(set(target) & set(weights))
        if _whole_shape(target[name]) != weights[name]
    ]
    if not (missing or surplus or shapes):
        return
    parts = [
        f"{label}: {summary(names)}"
        for label, names in (("missing in the checkpoint", missing), ("unknown to the model", surplus), ("other shapes", shapes))
        if names
    ]
    fix = "use the configuration the checkpoint was trained with (its copy is in the folder configs/ beside the weights)"
    raise CheckpointError("checkpoint and model differ. " + "; ".join(parts), where=str(folder), fix=fix)
