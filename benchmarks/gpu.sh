#!/usr/bin/env bash
# The evidence of one GPU in under 8 minutes: the tests that need one, then the benchmarks at real size; leaves one JSON.
#
#   benchmarks/gpu.sh FILE.json [WHEELS]          WHEELS: a folder of packages to install first, into a place of their own
#   benchmarks/gpu.sh FILE.json [WHEELS] --try    the same at tiny sizes on a CPU, in Triton's interpreter
#
# PYTHON picks the interpreter (python3), TOTAL the seconds of all of it (465), TESTS those of the tests at most (200).
set -uo pipefail
PYTHON=${PYTHON:-python3} TOTAL=${TOTAL:-465} TESTS=${TESTS:-200}
[ $# -ge 1 ] || { sed -n '2,7s/^# \{0,1\}//p' "$0"; exit 2; }
json=$(realpath -m -- "$1"); shift
wheels="" try=()
for argument in "$@"; do
    if [ "$argument" = --try ]; then try=(--try); else wheels=$(realpath -m -- "$argument"); fi
done
cd "$(dirname "$0")/.." || exit
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT
mkdir -p "$(dirname "$json")"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false

if [ -n "$wheels" ]; then
    install=("$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$work/site")
    "${install[@]}" "$wheels"/*.whl || for wheel in "$wheels"/*.whl; do
        "${install[@]}" "$wheel" || echo "not installed: $(basename "$wheel")"
    done
    export PYTHONPATH="$work/site:$PYTHONPATH"
fi

tests=(tests/gpu tests/conformance -m gpu)
if [ ${#try[@]} -gt 0 ]; then
    tests=(tests/gpu)
    export DPO_KERNELS_GPU_TESTS=cpu TRITON_INTERPRET=1
fi
# Most of the tests' time is Triton's compiler's: several processes share it where pytest-xdist is there.
parallel=()
if [ ${#try[@]} -eq 0 ] && "$PYTHON" -c "import xdist" 2>/dev/null; then
    cores=$(nproc) && parallel=(-n "$((cores < 8 ? cores : 8))" --dist worksteal)
fi
timeout -s INT -k 15 "$TESTS" "$PYTHON" -m pytest "${tests[@]}" -rfE --tb=short --durations=8 "${parallel[@]}" \
    --junitxml "$work/tests.xml" -p no:cacheprovider
tested=$?
echo "tests: exit status $tested after $SECONDS s"

left=$((TOTAL - SECONDS))
# Peers whose needs differ share the memory in turn.
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
# The benchmarks start nothing new 30 s before the end; what hangs is ended at the end. The JSON is there either way.
timeout -k 5 "$left" "$PYTHON" -m benchmarks.gpu --json "$json" --tests "$work/tests.xml" "$tested" \
    --seconds "$((left > 60 ? left - 30 : left))" "${try[@]}"
measured=$?
[ -s "$json" ] || echo '{"gpu": {"finished": false, "failed": {"start": "the benchmarks wrote nothing"}}}' >"$json"
echo "benchmarks: exit status $measured after $SECONDS s; $json"
[ "$tested" -eq 0 ] && [ "$measured" -eq 0 ]
