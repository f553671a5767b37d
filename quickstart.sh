#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# From a bare machine to a trained language model: environment, data, training, a sample of its text, a picture of its loss.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

usage() {
    cat <<'TXT'
usage: bash quickstart.sh [--clean] [--no-setup]

Installs what is needed into .venv, makes a small corpus of the documentation that ships with Python, trains the
model of configs/quickstart.yml on it (minutes on two CPU cores), and writes a sample and loss.png.
A second call resumes where the first stopped, or says that it is done.

  --clean       delete this model and its data first
  --no-setup    use .venv as it is
  -h, --help    this text
TXT
}

clean=0 setup=1
for argument in "$@"; do
    case "$argument" in
        --clean) clean=1 ;;
        --no-setup) setup=0 ;;
        -h | --help) usage; exit 0 ;;
        *) usage >&2; echo "quickstart: unknown option $argument" >&2; exit 2 ;;
    esac
done

config=configs/quickstart.yml
data=data/pydoc
run=checkpoints/quickstart

step() { printf '\n== %s\n' "$*"; }
code=0
trap 'code=$?; [ $code = 0 ] || printf "\nquickstart: stopped in step \"%s\" (exit %d). Call it again to go on from there; --clean starts over.\n" "${now:-setup}" $code >&2' EXIT

if [ "$clean" = 1 ]; then
    rm -rf "$data" "$run"
    echo "quickstart: deleted $data and $run"
fi

now="environment"
if [ "$setup" = 1 ]; then
    step "1/5 environment"
    bash setup_uv_env.sh
fi
venv=$PWD/${VENV_DIR:-.venv}
python=$venv/bin/python
[ -x "$python" ] || { echo "quickstart: there is no ${VENV_DIR:-.venv}: run bash setup_uv_env.sh" >&2; exit 1; }
export PATH="$venv/bin:$PATH" TORCH_EXTENSIONS_DIR="$venv/torch_extensions"

now="data"
step "2/5 data"
"$python" prepare_data.py pydoc --data-dir "$(dirname "$data")"

# What the last checkpoint and the configuration say.
trained() { sed -n 's/^global_step\([0-9]*\)$/\1/p' "$run/latest" 2>/dev/null || true; }
target=$(sed -n 's/^train_iters: *\([0-9]*\).*/\1/p' $config)

now="training"
have=$(trained)
if [ "${have:-0}" -ge "$target" ]; then
    step "3/5 training: done already, $have of $target steps"
else
    step "3/5 training: ${have:-0} of $target steps are done"
    "$python" deepy.py train.py $config
    # A run that was asked to stop (Ctrl-C) saves, and ends well.
    have=$(trained)
    [ "${have:-0}" -ge "$target" ] || { printf '\n== stopped and saved at step %s of %s\n' "${have:-0}" "$target"; exit 130; }
fi

now="sample"
step "4/5 sample"
sample=$run/sample.jsonl
[ "$sample" -nt "$run/latest" ] || "$python" deepy.py generate.py $config --text_gen_type unconditional --num_samples 1 --maximum_tokens 120 \
    --temperature 0.8 --top_k 40 --sample_output_file "$sample" >"$run/generate.log" 2>&1 ||
    { tail -n 20 "$run/generate.log" >&2; exit 1; }

now="picture"
step "5/5 picture"
"$python" tools/plot_metrics.py "$run/metrics.jsonl" --output "$run/loss.png"

printf '\n== a sample of its text\n'
"$python" -c 'import json, sys; print(json.loads(open(sys.argv[1]).readline())["text"])' "$sample"
printf '\n== where things are\n'
printf '  checkpoint  %s\n' "$run/$(cat "$run/latest")"
printf '  metrics     %s\n' "$run/metrics.jsonl"
printf '  picture     %s\n' "$run/loss.png"
printf '  sample      %s\n' "$sample"
printf '  more text   .venv/bin/python deepy.py generate.py %s --text_gen_type interactive\n' "$config"
