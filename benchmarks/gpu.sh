#!/usr/bin/env bash
# Build, test and benchmark on one machine without network, in ten minutes: make gpu, or
#   bash benchmarks/gpu.sh [--device cuda|cpu] [--fresh] [--tune] [FOLDER]
#
# FOLDER (default benchmarks/results) receives summary.txt, a log per part, and the CSV rows, and after every part
# results.tar.gz with all of these: one file to fetch. A part that fails or runs out of time is recorded and the next
# one starts. A second run repeats only what did not succeed on the same sources; --fresh repeats everything.
# --device cpu runs the same steps on a CPU with tiny sizes.
# --tune searches kernel tiles too, with what time is left at the end, into FOLDER/lorun-kernels.json; nothing reads
# that file unless LORUN_KERNELS_CONFIGS names it (docs/kernels-tuning.md).
# PYTHON names the interpreter (default: .venv/bin/python, else python3); TOTAL the seconds for everything.
# Nothing on the device is configured or reset. Exit status: 0 when every part succeeded.
set -u
cd "$(dirname "$0")/.." || exit 2
root=$PWD
device=cuda
fresh=0
tune=0
out=
usage="usage: gpu.sh [--device cuda|cpu] [--fresh] [--tune] [FOLDER]"
while [ $# -gt 0 ]; do
    case $1 in
        --device) device=${2:-}; shift 2 || { echo "$usage" >&2; exit 2; } ;;
        --fresh) fresh=1; shift ;;
        --tune) tune=1; shift ;;
        -h | --help) sed -n '2,12p' "$0" | cut -c3-; exit 0 ;;
        -*) echo "$usage" >&2; exit 2 ;;
        *) out=$1; shift ;;
    esac
done
case $device in cuda | cpu) ;; *) echo "--device: expected cuda or cpu, got '$device'" >&2; exit 2 ;; esac
[ $tune = 1 ] && [ "$device" = cpu ] && { echo "--tune: expected --device cuda, got cpu" >&2; exit 2; }
out=${out:-benchmarks/results}
mkdir -p "$out/parts" || exit 2
out=$(cd "$out" && pwd)
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    [ -x .venv/bin/python ] && PYTHON=$root/.venv/bin/python
fi
total=${TOTAL:-590}
begin=$SECONDS
export PYTHONUNBUFFERED=1 PIP_NO_INDEX=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# One cache of compiled kernels for all parts: torch.compile sends Triton to another one in its process.
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-${HOME:-/tmp}/.triton/cache}

# What the results depend on: a part counts as done only for the same sources and device.
sources() { find setup.py pyproject.toml csrc kernels lorun_fast benchmarks tests -type f \
    \( -name '*.py' -o -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.cuh' -o -name '*.toml' -o -name '*.sh' \) \
    -print0 | sort -z | xargs -0 cat | cksum | tr -d ' '; }
stamp="$device $(sources)"

failed=0
summary=$out/summary.txt
record() { printf '%-10s %-22s %5ss  %s\n' "$1" "$2" "$3" "$4" | tee -a "$summary"; bundle; }

# Kept up to date, so that it is there also when the machine is taken away before the end.
bundle() (
    cd "$out" || exit
    set +f
    shopt -s nullglob
    tar -czf results.tmp summary.txt ./*.log ./*.csv ./*.json && mv results.tmp results.tar.gz
)

# part NAME SECONDS COMMAND...: runs it under a time limit, its output in NAME.log, its end in the summary.
part() {
    local name=$1 limit=$2 left status start
    shift 2
    if [ $fresh = 0 ] && [ "$(cat "$out/parts/$name" 2>/dev/null)" = "$stamp" ]; then
        record "$name" "done before" 0 "parts/$name"
        return 0
    fi
    left=$((total - (SECONDS - begin)))
    if [ $left -lt 5 ]; then
        record "$name" "not run: no time left" 0 ""
        failed=1
        return 1
    fi
    [ "$limit" -gt $left ] && limit=$left
    start=$SECONDS
    timeout --kill-after=10 "$limit" "$@" >"$out/$name.log" 2>&1
    status=$?
    case $status in
        0) record "$name" ok $((SECONDS - start)) "$name.log"; printf '%s' "$stamp" >"$out/parts/$name"; return 0 ;;
        124 | 137) record "$name" "stopped at ${limit} s" $((SECONDS - start)) "$name.log" ;;
        *) record "$name" "failed, status $status" $((SECONDS - start)) "$name.log: $(tail -n 1 "$out/$name.log")" ;;
    esac
    rm -f "$out/parts/$name"
    failed=1
    return 1
}

environment() {
    uname -srm
    command -v nvidia-smi && nvidia-smi
    command -v nvcc && nvcc --version | tail -n 2
    "$PYTHON" - "$device" <<'PYTHON'
import sys
import torch

print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, CUDA {torch.version.cuda}")
if sys.argv[1] == "cuda":
    if not torch.cuda.is_available():
        sys.exit("torch sees no CUDA device")
    p = torch.cuda.get_device_properties(0)
    print(f"{p.name}, sm_{p.major}{p.minor}, {p.multi_processor_count} multiprocessors, {p.total_memory >> 20} MiB")
try:
    import triton

    print(f"Triton {triton.__version__}")
except ImportError:
    print("Triton: none")
PYTHON
}

# Where pip cannot install, build into a folder and put that first on the path; safe_path keeps the working
# directory, whose lorun_fast has no extension and no kernels, from shadowing it.
site=$out/site
build() {
    export LORUN_FORCE_BUILD=1
    [ "$device" = cuda ] && export LORUN_BUILD_CUDA=${LORUN_BUILD_CUDA:-1}
    rm -rf "$site"
    if [ "${NO_PIP:-0}" != 1 ] && "$PYTHON" -m pip install --no-build-isolation --no-deps -e .; then
        echo "installed editable with pip"
    else
        echo "pip could not install: building into $site"
        "$PYTHON" setup.py build --build-base "$out/build" --build-lib "$site" || return 1
    fi
}
# Without the extension everything else still runs: the kernels, their tests and the layers need Python alone.
plain() {
    export LORUN_FORCE_BUILD=0 LORUN_BUILD=0
    rm -rf "$site"
    "$PYTHON" setup.py build --build-base "$out/build" --build-lib "$site"
}
use_site() {
    if [ -d "$site/lorun_fast" ]; then
        export PYTHONSAFEPATH=1 PYTHONPATH="$site:$root${PYTHONPATH:+:$PYTHONPATH}"
    fi
}

backends() {
    use_site
    "$PYTHON" - "$device" <<'PYTHON'
import sys
import torch
import lorun_fast as lf

print(lf.__file__)
lf.show_config()
op = lf.BlockCS.gaussian(0.25, 8).to(sys.argv[1])
x = torch.rand(1, 1, 16, 16, device=sys.argv[1])
print("one step:", tuple(op.gradient_step(x, op(x), 1.0).shape))
PYTHON
}

# Compiles the kernels for this card with all cores, which also fills Triton's cache for the parts that follow.
kernels() {
    use_site
    local arch
    arch=$("$PYTHON" -c 'import torch
from lorun_fast.kernels import configs
print(configs.architecture(torch.device("cuda")))') || return 1
    "$PYTHON" -m lorun_fast.kernels.check --small --arch "$arch" --jobs "$(nproc)"
}

tests() {
    use_site
    # Only the files that have such tests: a package that another one needs may be missing here. Each test is named as it
    # ends, and where it hangs: a part that is stopped prints no summary.
    # shellcheck disable=SC2046
    "$PYTHON" -m pytest -v -m gpu -o faulthandler_timeout=60 -p no:cacheprovider --durations=5 \
        --continue-on-collection-errors $(grep -lE 'mark\.gpu' tests/test_*.py)
    local status=$?
    # 5: nothing selected. On a CPU that is as it should be; with a GPU it would mean that nothing was tested.
    [ $status = 5 ] && [ "$device" = cpu ] && return 0
    return $status
}

# The soft limit ends the search between candidates and keeps what was found.
tune() {
    use_site
    "$PYTHON" -m lorun_fast.kernels.tune --out "$out/lorun-kernels.json" --limit "$1" --jobs "$(nproc)"
}

suite() {
    use_site
    local name=$1 seconds=$2
    shift 2
    "$PYTHON" -m benchmarks "$name" --device "$device" --out "$out" --limit "$seconds" "$@"
}

# Functions do not pass through timeout: each part calls this script's own functions in a fresh shell.
export -f environment build plain use_site backends kernels tests suite tune
export PYTHON device out root site
run() { local name=$1 limit=$2; shift 2; part "$name" "$limit" bash -c '"$@"' part "$@"; }

# compiled SECONDS: what torch.compile makes of the rivals, at the sizes that decide; SECONDS for either of two halves.
compiled() {
    use_site
    local status=0
    "$PYTHON" -m benchmarks ops --device cuda --out "$out" --limit "$1" --dtype fp32 --seconds 0.1 --mode forward \
        --case 'cassi.step 1x28x256*' --case 'blur_downsample.step 1x3x288x480 k25*' --case 'block_cs.step 1x1x512*' || status=1
    "$PYTHON" -m benchmarks layers network --device cuda --out "$out" --limit "$1" --dtype bf16 --seconds 0.3 \
        --without '*max-autotune*' --case 'network.cs25 16x1x256x256 wide' --case 'lora_conv2d.peft 16x64x256x256 nhwc' || status=1
    return $status
}
# searched: the network against Inductor's search, which takes more than a minute by itself.
searched() {
    use_site
    "$PYTHON" -m benchmarks network --device cuda --out "$out" --dtype bf16 --seconds 0.3 --without '*, compiled' \
        --case 'network.cs25 16x1x256x256 wide'
}
export -f compiled searched

printf '\n%s, device %s\n' "$(date '+%Y-%m-%d %H:%M:%S')" "$device" >>"$summary"
quick="--quick --threads 1"
ops=
layers=
network=
if [ "$device" = cuda ]; then
    quick=
    # At half a second for each contender and regime the first operator would take all of the time.
    ops="--no-compile --seconds 0.1"
    # Nothing compiled, which takes minutes, before all else is measured; tables in the order of the patterns.
    layers="--no-compile --seconds 0.25 --case lora_conv2d.*16x64x256x256* --case lora_conv2d.mixed*
        --case lora_conv2d.first_experiment* --case lora_conv2d.*x32x256x256* --case lora_conv2d.*1x64x256x256* --case fused_conv2d*"
    network="--no-compile --seconds 0.25 --dtype bf16 --case network.cs25* --case network.training*
        --case network.throughput*"
fi
run environment 60 environment
run build 170 build || run plain 60 plain
run backends 60 backends
[ "$device" = cuda ] && run kernels 150 kernels
run tests 170 tests
# The soft limit (--limit) ends a suite between tables and keeps its rows; timeout is for what hangs.
set -f
# shellcheck disable=SC2086
{
    run layers 120 suite layers 90 $quick $layers
    run network 100 suite network 70 $quick $network
    run ops 120 suite ops 90 $quick $ops
}
[ "$device" = cuda ] && run compiled 150 compiled 45
[ "$device" = cuda ] && run searched 200 searched
[ $tune = 1 ] && run tune 400 tune 240
record total "$([ $failed = 0 ] && echo ok || echo 'with failures')" $((SECONDS - begin)) "$out"
exit $failed
