#!/usr/bin/env bash
# install_peers.sh FOLDER [PEER...]   one environment per peer: FOLDER/PEER
#
# Peers: onnxruntime modelopt nncf (the default three), aimet quark neural_compressor onnxsim mct.
# torch is pinned to the version that the peers were measured with: for it pip finds a CPU build in our setup, and a
# constraint keeps the peers from replacing it by one that brings gigabytes of CUDA libraries.
set -euo pipefail
folder=${1:?usage: install_peers.sh FOLDER [PEER...]}
shift
peers=("$@")
[ ${#peers[@]} -gt 0 ] || peers=(onnxruntime modelopt nncf)
python=${PYTHON:-python3}
mkdir -p "$folder"
echo "torch==2.13.0" >"$folder/constraints.txt"
export PIP_CONSTRAINT=$folder/constraints.txt

install() { # PEER PACKAGE...
  local environment=$folder/$1
  shift
  [ -e "$environment/.installed" ] && return
  "$python" -m venv "$environment" || return
  local package
  for package in "$@"; do
    "$environment/bin/pip" install --quiet "$package" || return
  done
  touch "$environment/.installed"
}

for peer in "${peers[@]}"; do
  echo "installing $peer"
  case $peer in
    onnxruntime) install "$peer" onnx onnxruntime sympy onnx-ir ;;
    modelopt) install "$peer" torch==2.13.0 'nvidia-modelopt[onnx]' ;;
    nncf) install "$peer" torch==2.13.0 onnx onnxruntime nncf ;;
    aimet) install "$peer" torch==2.13.0 aimet-onnx ;;
    quark) install "$peer" torch==2.13.0 onnx onnxruntime amd-quark ;;
    neural_compressor) install "$peer" onnx-neural-compressor prettytable scipy ;; # it forgets to ask for these two
    mct) install "$peer" torch==2.13.0 torchvision model-compression-toolkit onnx onnxruntime ;; # it makes inputs
    onnxsim) install "$peer" onnx onnxruntime onnxsim ;;
    *) echo "unknown peer: $peer" >&2; exit 2 ;;
  esac || echo "could not install $peer" >&2
done
