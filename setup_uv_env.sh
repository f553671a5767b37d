#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Creates or updates the Python environment .venv beside this file. Running it again costs a second.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

usage() {
    cat <<'TXT'
usage: bash setup_uv_env.sh [options]

Creates .venv beside this script (or brings it up to date) with everything the project needs.
Nothing outside this folder is changed. Where uv is missing it is fetched with pip into .bootstrap/.

  --python PYTHON   interpreter, 3.10 to 3.13 (default: the first that runs of python3.11 3.12 3.10 3.13 python3)
  --extra NAME      also install an extra of pyproject.toml: clean comet fast flash s3 wandb (may be repeated)
  --no-dev          leave out the test tools
  --cpu, --cuda     what to install for, instead of what is found on this machine
  --latest          ignore requirements/constraints.txt, but for torch: take the newest versions that pyproject.toml allows
  --oldest          into .venv-oldest, the oldest versions that are supported: requirements/constraints-oldest.txt
  --prebuild-ops    compile DeepSpeed's CPU operators now (minutes; not needed: this project does not use them by default)
  --force           reinstall even if nothing changed
  -h, --help        this text

On a machine without a GPU no CUDA package is installed: the CPU build of torch comes from the folders that pip is
preset to (PIP_FIND_LINKS or `pip config`), else from https://download.pytorch.org/whl/cpu. With a GPU, on x86_64 and
aarch64 alike, torch comes from the ordinary package index. Environment: VENV_DIR (default .venv), UV_* as uv knows them.
TXT
}

say() { printf 'setup: %s\n' "$*" >&2; }
die() { printf 'setup: error: %s\n' "$1" >&2; shift; for line in "$@"; do printf '  fix: %s\n' "$line" >&2; done; exit 1; }

python="" device="" dev=1 latest=0 prebuild=0 force=0 folder=.venv constraints=requirements/constraints.txt
extras=()
while [ $# -gt 0 ]; do
    case "$1" in
        --python) [ $# -ge 2 ] || die "--python needs a value"; python=$2; shift ;;
        --extra) [ $# -ge 2 ] || die "--extra needs a value"; extras+=("$2"); shift ;;
        --no-dev) dev=0 ;;
        --cpu | --cuda) device=${1#--} ;;
        --latest) latest=1 ;;
        --oldest) constraints=requirements/constraints-oldest.txt folder=.venv-oldest ;;
        --prebuild-ops) prebuild=1 ;;
        --force) force=1 ;;
        -h | --help) usage; exit 0 ;;
        *) usage >&2; die "unknown option $1" ;;
    esac
    shift
done
venv=${VENV_DIR:-$folder}

# --- what this machine is ---------------------------------------------------------------------------------------------
has_nvidia() { [ -e /proc/driver/nvidia/version ] || { command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q '^GPU'; }; }
if [ -z "$device" ]; then
    if has_nvidia; then device=cuda; else device=cpu; fi
fi
if [ "$device" = cpu ]; then
    for extra in ${extras[@]+"${extras[@]}"}; do
        case "$extra" in flash) die "the extra $extra needs a GPU and none is visible here" "leave it out, or say --cuda" ;; esac
    done
fi

# --- an interpreter that really runs (a pyenv shim may only exist) -------------------------------------------------------
resolve_python() { "$1" -c 'import sys; assert (3, 10) <= sys.version_info[:2] < (3, 14); print(sys.executable)' 2>/dev/null; }
base=""
if [ -n "$python" ]; then
    base=$(resolve_python "$python") || die "$python does not run, or is not Python 3.10 to 3.13" "name another with --python"
else
    for name in python3.11 python3.12 python3.10 python3.13 python3; do
        if base=$(resolve_python "$name"); then break; fi
    done
fi

# --- nothing to do? -----------------------------------------------------------------------------------------------------
digest() { if command -v sha256sum >/dev/null; then sha256sum; else shasum -a 256; fi; }
stamp=$(
    {
        cat pyproject.toml "$constraints" setup_uv_env.sh
        echo "$PWD $base $device $dev $latest ${extras[*]:-}"
    } | digest | cut -c1-64
)
export TORCH_EXTENSIONS_DIR="$PWD/$venv/torch_extensions"
case "$venv" in /*) TORCH_EXTENSIONS_DIR="$venv/torch_extensions" ;; esac
# A compile that was killed leaves a lock for which every later process would wait for ever.
[ ! -d "$TORCH_EXTENSIONS_DIR" ] || find "$TORCH_EXTENSIONS_DIR" -maxdepth 3 -name lock -delete

healthy() { "$venv/bin/python" -c 'from importlib.metadata import version as v; v("torch"); v("deepspeed"); v("megatron-neox"); import yaml, pydantic' 2>/dev/null; }

install() {
    # The interpreter may be absent: uv can fetch one.
    [ -n "$base" ] || { base=3.11; say "no Python 3.10 to 3.13 found here, asking uv for 3.11"; }

    # uv: as found, else into .bootstrap (a folder of our own, so no system Python is touched)
    uv=""
    for candidate in "${UV:-uv}" .bootstrap/bin/uv "$HOME/.local/bin/uv"; do
        if "$candidate" --version >/dev/null 2>&1; then uv=$candidate; break; fi
    done
    if [ -z "$uv" ]; then
        say "fetching uv into .bootstrap/"
        PIP_ROOT_USER_ACTION=ignore "$base" -m pip install --quiet --target .bootstrap uv >&2 ||
            { "$base" -m venv .bootstrap && .bootstrap/bin/pip install --quiet uv; } >&2 ||
            die "uv could not be installed with $base" "install it as https://docs.astral.sh/uv says, then run this again"
        uv=.bootstrap/bin/uv
    fi

    # uv does not read pip's settings: hand over what this machine's pip is preset to.
    preset() { "$base" -m pip config get "global.$1" 2>/dev/null || true; }
    if [ -z "${UV_FIND_LINKS:-}" ]; then
        links=${PIP_FIND_LINKS:-$(preset find-links)}
        links=$(printf '%s' "$links" | tr -s ' \n\t' ',' | sed 's/^,//; s/,$//')
        [ -z "$links" ] || export UV_FIND_LINKS="$links"
    fi
    if [ -z "${UV_DEFAULT_INDEX:-}${UV_INDEX_URL:-}" ]; then
        index=${PIP_INDEX_URL:-$(preset index-url)}
        [ -z "$index" ] || export UV_DEFAULT_INDEX="$index"
    fi
    export UV_HTTP_TIMEOUT="${UV_HTTP_TIMEOUT:-180}" UV_HTTP_RETRIES="${UV_HTTP_RETRIES:-5}" UV_NO_PROGRESS=1 UV_LINK_MODE="${UV_LINK_MODE:-hardlink}"

    args=(--compile-bytecode)
    if [ "$device" = cpu ] && [ "$(uname -s)" = Linux ] && ! has_local_torch; then
        say "no torch wheel for this Python in ${UV_FIND_LINKS:-any find-links folder}, using https://download.pytorch.org/whl/cpu"
        args+=(--torch-backend cpu)
    fi

    if [ "$force" = 1 ] || ! "$venv/bin/python" -c '' 2>/dev/null || ! same_version; then
        "$uv" venv --quiet --clear -p "$base" "$venv" >&2 || die "the environment $venv could not be created with $base" "try another --python"
    fi
    if [ "$latest" = 1 ]; then
        grep '^torch==' "$constraints" >"$venv/.neox-torch" && constraints=$venv/.neox-torch
    fi
    args+=(-c "$constraints")
    names=(${extras[@]+"${extras[@]}"})
    [ "$dev" = 0 ] || names+=(dev)
    case "$(uname -s)-$(uname -m)" in Linux-x86_64 | Linux-aarch64 | Darwin-arm64) names+=(fast) ;; esac # elsewhere it has no wheel
    list=$(IFS=,; echo "${names[*]:-}")
    for attempt in 1 2 3; do
        if "$uv" pip install -p "$venv/bin/python" "${args[@]}" -e ".${list:+[$list]}" >&2; then break; fi
        [ "$attempt" -lt 3 ] || die "the packages could not be installed (see uv's message above)" \
            "check the network, a proxy (HTTPS_PROXY) or the package index (UV_DEFAULT_INDEX, UV_FIND_LINKS), then run this again"
        say "attempt $attempt failed, trying again"
        sleep $((attempt * 3))
    done
}

# Whether a folder handed to uv holds a wheel of our torch version for this interpreter and machine.
has_local_torch() {
    tag=$("$base" -c 'import sys; print("cp%d%d" % sys.version_info[:2])' 2>/dev/null || echo cp311)
    want=$(sed -n 's/^torch==//p' "$constraints")
    IFS=, read -ra folders <<<"${UV_FIND_LINKS:-}"
    for folder in ${folders[@]+"${folders[@]}"}; do
        case "$folder" in http://* | https://*) return 0 ;; esac # a page of links: uv looks itself, the check at the end judges
        folder=${folder#file://}
        for wheel in "$folder"/torch-"$want"*-"$tag"-*"$(uname -m)".whl; do
            [ ! -e "$wheel" ] || return 0
        done
    done
    return 1
}

same_version() { [ "$("$venv/bin/python" -c 'import sys; print(sys.version)')" = "$("$base" -c 'import sys; print(sys.version)' 2>/dev/null)" ]; }

# What must hold afterwards.
check() {
    "$venv/bin/python" - "$device" <<'PY' >&2 || die "the environment is not usable (see above)" "bash setup_uv_env.sh --force"
import importlib.metadata as metadata
import sys

if sys.argv[1] == "cpu":
    cuda = sorted(d.name for d in metadata.distributions() if d.name.lower().startswith(("nvidia-", "cuda-toolkit", "triton")))
    if cuda:
        sys.exit("setup: error: CUDA packages were installed on a machine without a GPU: " + " ".join(cuda)
                 + "\n  fix: set UV_FIND_LINKS to a folder with a CPU wheel of torch, or say --cuda if they are wanted")
import torch

if sys.argv[1] == "cuda" and torch.version.cuda is None:
    sys.exit(f"setup: error: torch {torch.__version__} has no CUDA support\n  fix: look for a CPU wheel in UV_FIND_LINKS or PIP_FIND_LINKS, or say --cpu")
where = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
print(f"setup: Python {sys.version.split()[0]}, torch {torch.__version__} ({where})")
PY
}

started=$SECONDS
if [ "$force" = 0 ] && [ "$(cat "$venv/.neox-setup" 2>/dev/null)" = "$stamp" ] && healthy; then
    say "$venv is up to date"
else
    say "installing into $venv for $device on $(uname -m)"
    rm -f "$venv/.neox-setup"
    install
    check
    echo "$stamp" >"$venv/.neox-setup.tmp.$$" && mv "$venv/.neox-setup.tmp.$$" "$venv/.neox-setup"
    say "$venv is ready after $((SECONDS - started)) s"
fi

if [ "$prebuild" = 1 ]; then
    say "compiling DeepSpeed's operators into $TORCH_EXTENSIONS_DIR (one to four minutes)"
    PATH="$PWD/$venv/bin:$PATH" "$venv/bin/python" - <<'PY' >&2 || die "an operator did not compile (see above)" "a C++ compiler is needed; without it leave --prebuild-ops out"
from deepspeed.accelerator import get_accelerator

accelerator = get_accelerator()
for name in ("ShareMemCommBuilder", "FusedAdamBuilder", "CPUAdamBuilder"):
    builder = accelerator.create_op_builder(name)
    if builder is not None and builder.is_compatible():
        builder.load(verbose=False)
        print(f"setup: {name} is built")
PY
fi
