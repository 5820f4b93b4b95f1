#!/usr/bin/env bash
# From a text to a ternary model that writes, by the commands a user would type. Run again, it continues
# from the last checkpoint; another TEXT or ITERS needs another OUT. Only the Hugging Face folder is written anew.
set -euo pipefail
TEXT="${TEXT:-stdlib:}"
OUT="${OUT:-demo-output}"
ITERS="${ITERS:-}"
RANKS=2

say() { printf '\n\033[1m== %s\033[0m\n' "$*"; }
run() { printf '\033[2m$ %s\033[0m\n' "$*"; "$@"; }

text_state() { # names, sizes and times of the text's files
  [ "$TEXT" = "stdlib:" ] || find "$TEXT" -type f -exec ls -ln --time-style=+%s {} + 2>/dev/null | cksum
}
inputs="TEXT=$TEXT $(text_state) ITERS=$ITERS $(cksum < launch/configs/demo.yaml)"
if [ "$TEXT" != "stdlib:" ] && [ ! -e "$TEXT" ]; then
  echo "TEXT=$TEXT: no such file or folder. Check the path, or leave it out." >&2
  exit 2
fi
if [ -d "$OUT" ] && [ "$(cat "$OUT/.inputs" 2>/dev/null)" != "$inputs" ]; then
  echo "OUT=$OUT: the folder holds something else, or a demo of another text, length or configuration. Name another one (make demo OUT=folder), or remove it." >&2
  exit 2
fi
mkdir -p "$OUT"
printf '%s' "$inputs" > "$OUT/.inputs"

cores=$(nproc 2>/dev/null || sysctl -n hw.ncpu)
export OMP_NUM_THREADS=$(( cores / RANKS > 0 ? cores / RANKS : 1 ))
# Libraries' notes about absent accelerators would bury the demo.
export PYTHONWARNINGS=ignore

trap 'echo "Stopped. The same command continues from the last checkpoint." >&2' INT

say "1. tokenizer (SentencePiece) from $TEXT"
if [ ! -d "$OUT/tokenizer" ]; then
  run bitcpm data tokenizer --input "$TEXT" --output "$OUT/tokenizer" --vocab-size 2048
fi

say "2. Megatron dataset"
if [ ! -f "$OUT/data/text.json" ]; then
  run bitcpm data prepare --input "$TEXT" --tokenizer "$OUT/tokenizer" --output-prefix "$OUT/data/text"
fi

# The demo validates on 320 windows of 256 tokens; a small text has fewer, in global batches of 8.
eval_iters=$(python - "$OUT/data/text.json" <<'PY'
import json, sys
tokens = json.load(open(sys.argv[1]))["splits"]["valid"]["tokens"]
print(min(40, (tokens - 1) // 256 // 8))
PY
)
if [ "$eval_iters" -lt 1 ]; then
  echo "TEXT=$TEXT: too little text to validate on (8 windows of 256 tokens in 3 % of it). Give about 300 kB or more, and another OUT." >&2
  exit 2
fi

train() { # folder, further settings
  local folder="$OUT/$1"; shift
  local resume=()
  [ -f "$folder/latest_checkpointed_iteration.txt" ] && resume=(--resume)
  [ -n "$ITERS" ] && set -- "$@" --set "training.train_iters=$ITERS" \
    --set "optimizer.lr_warmup_iters=$(( ITERS / 10 ))" --set "training.eval_interval=$ITERS" \
    --set "checkpoint.save_interval=$ITERS"
  run torchrun --standalone --nproc_per_node "$RANKS" -m megatron_bitcpm train \
    --config launch/configs/demo.yaml --set "data.prefix=$OUT/data/text" \
    --set "data.tokenizer=$OUT/tokenizer" --set "checkpoint.directory=$folder" \
    --set "training.eval_iters=$eval_iters" "$@" "${resume[@]}"
}

say "3. ternary pretraining, tensor parallel over $RANKS ranks"
train ternary

say "4. the same model, seed and tokens in full precision"
train full-precision --set quant.enabled=false --set optimizer.lr=1.5e-3

say "5. Hugging Face folder"
run bitcpm convert --input "$OUT/ternary" --output "$OUT/hf" --overwrite

say "6. verification against the checkpoint"
run bitcpm verify "$OUT/hf" "$OUT/ternary"

say "7. summary"
run python tools/demo_summary.py "$OUT"
