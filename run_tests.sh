#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Sets up .venv and runs every test; beside them ruff, mypy and import-linter.
set -euo pipefail
here=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")"

usage() {
    cat <<'TXT'
usage: bash run_tests.sh [options] [pytest arguments]

Runs the tests under tests/ (or those named) with pytest, three at a time, on the CPU. A run of all tests also checks
lint, layout, types and import rules beside them, reports these last and fails when one of them fails.

  --full        also the tests marked full (slow)
  --oldest      with the oldest versions of the libraries, in .venv-oldest: the tests that read and write what
                transformers, tokenizers, datasets and the Hub do, or those named
  --checks      lint, layout, types and import rules also when tests are named
  --no-setup    use .venv (.venv-oldest) as it is
  -h, --help    this text

Everything else goes to pytest:  bash run_tests.sh tests/megatron/model -k rotary -x
  -m cpu selects what needs no GPU; -n 0 runs one test at a time.
TXT
}

# What --oldest runs: whatever meets transformers, tokenizers, datasets, huggingface-hub or datatrove.
on_libraries=(tests/parity tests/megatron/checkpoint tests/megatron/data tests/megatron/tokenizer tests/megatron/generation
    tests/megatron/model/test_positions.py tests/megatron/model/attention tests/megatron/engine/test_start_from_hf.py
    tests/tools tests/test_prepare_hf_dataset.py)

setup=1 oldest=0 checks=0
# One more than two cores: many tests wait for a limit, a signal or another rank.
arguments=() named=0 workers=3
previous=""
for argument in "$@"; do
    case "$argument" in
        -h | --help) usage; exit 0 ;;
        --no-setup) setup=0 ;;
        --oldest) oldest=1 ;;
        --checks) checks=1 ;;
        *)
            case "$argument" in
                # One at a time where the order matters to the person, or the workers are chosen already.
                -x | --exitfirst | --pdb | -s | --capture=no | --sw | --stepwise) workers=0 ;;
                -n | -n[0-9]* | --numprocesses*) workers="" ;;
            esac
            if [[ $argument != -* && ! $previous =~ ^-[kmpnWco]$ ]] && { [ -e "${argument%%::*}" ] || [ -e "$here/${argument%%::*}" ]; }; then
                named=1
                [ -e "${argument%%::*}" ] || argument="$here/$argument"
            fi
            arguments+=("$argument")
            ;;
    esac
    previous=$argument
done
setup_arguments=() venv=${VENV_DIR:-.venv} targets=(tests)
if [ "$oldest" = 1 ]; then
    setup_arguments=(--oldest) venv=${VENV_DIR:-.venv-oldest} targets=("${on_libraries[@]}")
fi
[ "$named" = 1 ] || arguments+=("${targets[@]}")
[ "$named$oldest" != 00 ] || checks=1

[ "$setup" = 0 ] || bash setup_uv_env.sh ${setup_arguments[@]+"${setup_arguments[@]}"}
python=$PWD/$venv/bin/python
[ -x "$python" ] || { echo "run_tests: there is no $venv: run bash setup_uv_env.sh ${setup_arguments[*]:-}" >&2; exit 1; }

# One thread per process (a fork of a threaded process can hang), no network, nothing written outside this folder.
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TRANSFORMERS_OFFLINE=1 WANDB_MODE=offline TQDM_DISABLE=1 MPLBACKEND=Agg
export TORCH_EXTENSIONS_DIR=${python%/bin/python}/torch_extensions
export PATH=${python%/python}:$PATH
# Kept away from the tests: an outer job's ranks, and a user's own settings.
unset RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT DLTS_HOSTFILE PYTHONPATH

parallel=()
if [ -n "$workers" ] && [ "$workers" != 0 ] && "$python" -c 'import xdist' 2>/dev/null; then
    # worksteal: the long tests do not all end up with one worker.
    parallel=(-n "$workers" --dist worksteal)
fi
# Started before pytest and told of behind it: they wait for nothing and have no limit of time, so a busy machine fails none.
names=() pids=() outputs=""
check() {
    nice -n 5 "${@:2}" >"$outputs/$1" 2>&1 </dev/null &
    names+=("$1") pids+=("$!")
}
end_checks() {
    [ ${#pids[@]} = 0 ] || kill "${pids[@]}" 2>/dev/null || true
    rm -rf "$outputs"
}
if [ "$checks" = 1 ]; then
    outputs=$(mktemp -d)
    trap end_checks EXIT
    check "ruff check" "$python" -m ruff check --quiet .
    check "ruff format" "$python" -m ruff format --check --quiet .
    check mypy "$python" -m mypy --no-error-summary
    check lint-imports "${python%/python}/lint-imports"
fi

code=0
"$python" -m pytest ${parallel[@]+"${parallel[@]}"} "${arguments[@]}" || code=$?
for i in ${!names[@]}; do
    if wait "${pids[$i]}"; then
        echo "${names[$i]}: passed"
    else
        cat "$outputs/${names[$i]}"
        echo "${names[$i]}: FAILED"
        [ "$code" != 0 ] || code=1
    fi
done
pids=()
exit "$code"
