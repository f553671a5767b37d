#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Tokenizes a list of files with many processes on many machines: each takes its part of the list and writes a pair of its own.
#
# As a Slurm array of 32 jobs, which need not run at the same time:
#
#   sbatch --array=0-31 --cpus-per-task=16 --wrap "bash tools/datasets/multinode_prepare_data.sh files.txt \
#       --tokenizer-type HFTokenizer --vocab-file tokenizer.json --append-eod --workers 16 --output-prefix data/set"
#
# A failed one again, such as number 7: RANK=7 WORLD_SIZE=32 sbatch --wrap "bash tools/..." (or scontrol requeue JOB_7).
# As one job of many tasks: the same command behind `srun` (or `mpirun`) in place of --array.
# Afterwards: python tools/datasets/merge_datasets.py --input data --output-prefix merged/set_text_document
set -euo pipefail

usage() {
    cat <<'TXT'
usage: bash tools/datasets/multinode_prepare_data.sh FILE_LIST [flags of preprocess_data.py]

Tokenizes this process's part of the files named in FILE_LIST, one path a line (empty lines are skipped).
The parts are contiguous and differ by one file at most. Flags go to preprocess_data.py as they are, except

  --output-prefix P   becomes P_rank<rank> (without it: rank<rank>)
  --input             is made from FILE_LIST

Which process this is, the first of these that is set:
  RANK, WORLD_SIZE
  SLURM_ARRAY_TASK_ID, SLURM_ARRAY_TASK_COUNT   (times SLURM_NTASKS, where srun starts several in each job of the array)
  SLURM_PROCID, SLURM_NTASKS
  OMPI_COMM_WORLD_RANK, OMPI_COMM_WORLD_SIZE
  else it is the only one

  PYTHON   interpreter (default: python)
  TOOL     another tool with --input and --output-prefix (default: preprocess_data.py beside this script)
TXT
}

fail() {
    echo "multinode_prepare_data: $1" >&2
    exit 1
}

# Sets rank and world.
find_place() {
    rank=0 world=1
    if [ -n "${RANK:-}" ]; then
        rank=$RANK world=${WORLD_SIZE:-}
    elif [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
        # An array may begin anywhere and count in steps: --array=10-40:10.
        rank=$(((SLURM_ARRAY_TASK_ID - ${SLURM_ARRAY_TASK_MIN:-0}) / ${SLURM_ARRAY_TASK_STEP:-1}))
        world=${SLURM_ARRAY_TASK_COUNT:-}
        # Of --array=7, sent to repeat one part, Slurm tells nothing about the others.
        if [ "$world" = 1 ] && [ "$SLURM_ARRAY_TASK_ID" != 0 ]; then
            fail "an array of job $SLURM_ARRAY_TASK_ID alone does not tell of how many parts it is one: set RANK and WORLD_SIZE"
        fi
        # Without srun the script runs once per job, whatever --ntasks says.
        if [ -n "${SLURM_STEP_ID:-}" ] && [ -n "$world" ]; then
            rank=$((rank * ${SLURM_NTASKS:-1} + ${SLURM_PROCID:-0}))
            world=$((world * ${SLURM_NTASKS:-1}))
        fi
    elif [ -n "${SLURM_PROCID:-}" ]; then
        rank=$SLURM_PROCID world=${SLURM_NTASKS:-}
    elif [ -n "${OMPI_COMM_WORLD_RANK:-}" ]; then
        rank=$OMPI_COMM_WORLD_RANK world=${OMPI_COMM_WORLD_SIZE:-}
    fi
    if ! [[ $rank =~ ^[0-9]+$ && $world =~ ^[0-9]+$ ]] || [ "$rank" -ge "$world" ]; then
        fail "rank '$rank' of '$world' processes makes no sense: set RANK and WORLD_SIZE, or see --help"
    fi
}

# Sets files: this rank's part of the list.
take_part() {
    local list=$1 line
    local -a all=()
    [ -r "$list" ] && [ ! -d "$list" ] || fail "cannot read the list $list"
    while IFS= read -r line || [ -n "$line" ]; do
        line=${line%$'\r'}
        [[ $line =~ [^[:space:]] ]] || continue
        [[ $line != *,* ]] || fail "a comma would part the name '$line': rename the file, or link to it"
        all+=("$line")
    done <"$list"
    total=${#all[@]}
    [ "$total" -gt 0 ] || fail "$list names no file"
    local share=$((total / world)) more=$((total % world))
    local first=$((rank * share + (rank < more ? rank : more)))
    files=("${all[@]:first:share + (rank < more ? 1 : 0)}")
}

main() {
    case "${1:-}" in
        -h | --help) usage; exit 0 ;;
        "") usage >&2; exit 1 ;;
        -*) fail "the list of files comes first (see --help)" ;;
    esac
    local list=$1 prefix="" argument joined
    shift
    local -a flags=() files=()
    local rank world total
    while [ $# -gt 0 ]; do
        argument=$1
        shift
        case "$argument" in
            # The tools take flags cut short, too.
            --ou*=*) prefix=${argument#*=} ;;
            --ou*)
                [ $# -gt 0 ] || fail "$argument needs a value"
                prefix=$1
                shift
                ;;
            --in*) fail "--input is made from $list: leave it out" ;;
            *) flags+=("$argument") ;;
        esac
    done
    find_place
    take_part "$list"
    if [ ${#files[@]} -eq 0 ]; then
        echo "rank $rank of $world: nothing to do ($total files)"
        exit 0
    fi
    joined=$(IFS=,; printf '%s' "${files[*]}")
    # Linux allows one argument 128 KiB.
    [ ${#joined} -lt 130000 ] || fail "the names of ${#files[@]} files are too long for one command: use more processes or shorter paths"
    echo "rank $rank of $world: ${#files[@]} of $total files"
    # Each process works alone: the tool must not take itself for one of a group.
    unset RANK LOCAL_RANK WORLD_SIZE
    local here
    here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
    exec "${PYTHON:-python}" "${TOOL:-$here/preprocess_data.py}" --input "$joined" --output-prefix "${prefix:+${prefix}_}rank$rank" \
        ${flags[@]+"${flags[@]}"}
}

main "$@"
