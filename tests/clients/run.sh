#!/usr/bin/env bash
# Third-party clients, unmodified, against a real server with SmolLM2 and, for embeddings, MiniLM:
#
#   tests/clients/run.sh FOLDER [CLIENT...]
#
# FOLDER keeps one virtual environment per client (litellm, langchain-openai, instructor, lm-eval), because their
# requirements exclude each other. PYTHON is an interpreter with sagellm[dev]; the default is .venv/bin/python.
# Exits with 1 when a check fails.
set -euo pipefail
[[ $# -ge 1 ]] || { sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 2; }
mkdir -p "$1"
folder=$(cd "$1" && pwd)
shift
cd "$(dirname "${BASH_SOURCE[0]}")"
python=${PYTHON:-../../.venv/bin/python}
clients=("$@")
[[ ${#clients[@]} -gt 0 ]] || clients=(litellm langchain-openai instructor lm-eval)
declare -A script=([litellm]=litellm [langchain-openai]=langchain [instructor]=instructor [lm-eval]=lm_eval)

for client in "${clients[@]}"; do
  [[ -n ${script[$client]:-} ]] || { echo "no client $client; there are: ${!script[*]}" >&2; exit 2; }
  if ! cmp -s "requirements/$client.txt" "$folder/$client/installed.txt"; then
    echo "installing $client"
    python3 -m venv --clear "$folder/$client"
    "$folder/$client/bin/pip" install --quiet --disable-pip-version-check -r "requirements/$client.txt"
    cp "requirements/$client.txt" "$folder/$client/installed.txt"
  fi
done

"$python" -m sagellm.cli pull smollm2 >/dev/null
"$python" -m sagellm.cli pull minilm >/dev/null

port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
url=http://127.0.0.1:$port
# SmolLM2's own chat template knows no tools.
"$python" -m sagellm.cli serve smollm2 --tool-call-format hermes --embedding-model minilm --port "$port" \
  >"$folder/server.log" 2>&1 &
server=$!
trap 'kill "$server" 2>/dev/null || true; wait "$server" 2>/dev/null || true' EXIT
until curl --silent --fail --output /dev/null "$url/ready"; do
  kill -0 "$server" 2>/dev/null || { tail -n 5 "$folder/server.log" >&2; exit 1; }
  sleep 0.2
done

status=0
export EMBEDDING_MODEL=minilm
export LITELLM_LOCAL_MODEL_COST_MAP=True
for client in "${clients[@]}"; do
  arguments=("$url" smollm2)
  if [[ $client == lm-eval ]]; then
    "$python" expect_loglikelihoods.py smollm2 "$folder/expected.json"
    arguments+=("$folder/expected.json")
  fi
  "$folder/$client/bin/python" "drive_${script[$client]}.py" "${arguments[@]}" || status=1
done
exit "$status"
