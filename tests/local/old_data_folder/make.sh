#!/usr/bin/env bash
# Makes before_projects.tar.xz with the version before projects: make.sh CHECKOUT OUT.tar.xz
# CHECKOUT is a clone at commit 7833284 with its environment (make setup). Logs and the built model stay out.
set -euo pipefail
checkout=$1 out=$2
export PYTHONPATH=$checkout ROSE_DATA_DIR ROSE_PORT=18123 ROSE_URL=http://127.0.0.1:18123 ROSE_CONFIG=/nonexistent
ROSE_DATA_DIR=$(mktemp -d)
chmod 711 "$ROSE_DATA_DIR"
files=$(mktemp -d)
rose() { "$checkout/.venv/bin/python" -m cli.app "$@"; }
field() { python3 -c "import json, sys; print(json.load(sys.stdin)$1)"; }
python3 -c "
import json
for n in range(60):
    print(json.dumps({'messages': [{'role': 'user', 'content': f'What is thing {n}?'},
                                   {'role': 'assistant', 'content': f'Thing {n} is red.'}]}))" >"$files/sixty.jsonl"
head -2 "$files/sixty.jsonl" >"$files/two.jsonl"
echo '{}' >"$files/bad.jsonl"

rose up --detach
rose models build
rose finetune watch "$(rose finetune create "$(rose upload "$files/two.jsonl" -q)" --model tiny --suffix old -q --epochs 2 --lora-r 1)"
paused=$(rose finetune create "$(rose upload "$files/sixty.jsonl" -q)" --model tiny --suffix paused -q --epochs 3 --batch-size 1 --lora-r 1)
until [ "$(rose finetune get "$paused" --json | field "['progress']['step']")" -ge 5 ]; do sleep 0.1; done
rose finetune pause "$paused"
rose files delete "$(rose upload "$files/two.jsonl" -q)"
bad=$(curl -s "$ROSE_URL/v1/files" -F purpose=fine-tune -F "file=@$files/bad.jsonl" | field "['id']")
curl -s "$ROSE_URL/v1/fine_tuning/jobs" -H 'content-type: application/json' -H 'Idempotency-Key: old-key' \
    -d "{\"model\": \"tiny\", \"training_file\": \"$bad\"}"
sleep 10
rose finetune list
rose projections verify
rose down
rm -rf "$ROSE_DATA_DIR"/{logs/*,models/tiny,run,lock}
tar -C "$ROSE_DATA_DIR" --sort=name -cf - . | xz -6 >"$out"
